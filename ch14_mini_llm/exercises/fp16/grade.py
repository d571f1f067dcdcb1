"""The checks of ch14/fp16: see `common.grade`. The oracle is a GPT-2 in NumPy, in float64, with weights in float32."""

import numpy as np
import pytest

from common.grade import check, gpt2_oracle, same

SIZES = {
    "two heads": dict(n_layer=2, n_head=2, d_model=64, d_ff=128, n_ctx=64, vocab_size=211),
    "three layers": dict(n_layer=3, n_head=4, d_model=32, d_ff=96, n_ctx=40, vocab_size=97),
    "uneven": dict(n_layer=1, n_head=1, d_model=36, d_ff=52, n_ctx=40, vocab_size=127),
    "large": dict(n_layer=2, n_head=2, d_model=64, d_ff=128, n_ctx=40, vocab_size=211),
}
WEIGHTS = {name: gpt2_oracle.weights(sizes, len(name), wte=0.5, wpe=0.5) for name, sizes in SIZES.items()}
for key, tensor in WEIGHTS["large"].items():  # what makes up the residual stream: its norm, and so the text, stays
    if "c_proj" in key or key in ("wte.weight", "wpe.weight"):
        tensor *= np.float32(1e5)
        assert "c_proj" not in key or np.abs(tensor).max() < 65504
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
NEAR = 2e-2  # of the largest logit


def made(student, name):
    on = f"making the model {name!r}"
    student.call("make", name, SIZES[name], WEIGHTS[name], on=on, hint="weights")


@pytest.mark.parametrize("name", ["two heads", "three layers"])
def test_weights(student, name):
    made(student, name)
    on, largest = f"the model {name!r}", 0
    for layer, matrices in enumerate(student.call("matrices", name, on=on, hint="weights").value):
        for key in MATRICES:
            got, expected = matrices[key], WEIGHTS[name][f"h.{layer}.{key}"]
            what = f"layers[{layer}][{key!r}]"
            check(got.dtype == np.float16, f"{what} is {got.dtype}, not float16, on {on}", "weights")
            same(got, expected.astype(np.float16), what, on, hint="weights")
            largest += got.nbytes
    arrays = student.call("held", name, on=on).value
    halves = sum(size for _, kind, size in arrays if kind == "float16")
    check(2 * halves >= largest, f"the float16 arrays have {2 * halves} bytes, the matrices {largest}, on {on}")
    for place, kind, _ in arrays:
        old = kind != "float16" and place.rstrip("']").endswith(MATRICES)
        check(not old, f"{place} is {kind}, not float16, on {on}", "weights")
    floats = sum(size for _, kind, size in arrays if kind in ("float32", "float64"))
    most = needed(SIZES[name])
    check(floats <= most, f"float32 arrays hold {floats} elements, of which {most} are needed, on {on}", "weights")
    student.note = f"{largest / 1e3:.1f} kB for matrices that took {2 * largest / 1e3:.1f} kB in float32: {on}"


def needed(c):
    """How many float32 elements a `GPT2` holds without its matrices: the other weights, and all its buffers."""
    others = sum(tensor.size for key, tensor in gpt2_oracle.weights(c).items() if not key.endswith(MATRICES))
    T, d = c["n_ctx"], c["d_model"]
    return others + T * (9 * d + c["d_ff"]) + c["n_head"] * T * T + c["vocab_size"]


def verify(student, name, n, hint):
    """The logits at every position; returns how far off they are, relative to the largest."""
    tokens, on = gpt2_oracle.prompt(SIZES[name], n, seed=n), f"the model {name!r}, T = {n}"
    got = student.call("logits_all", name, tokens, on=on, hint="inputs").value
    right = gpt2_oracle.oracle(SIZES[name], WEIGHTS[name], tokens)[0]
    finite = np.isfinite(got).all(1)
    check(finite.all(), f"logits that follow token {int(finite.argmin())} are not finite, on {on}", hint)
    top = np.abs(right).max()
    same(got / top, right / top, "relative logits", on, atol=NEAR, hint=hint)
    return np.abs(got - right).max() / top


@pytest.mark.parametrize("name", ["two heads", "three layers", "uneven"])
def test_logits(student, name):
    made(student, name)
    error = max(verify(student, name, n, "products") for n in (1, 16, 17, 40))
    student.note = f"off by at most {100 * error:.2f} % of the largest logit: the model {name!r}"


@pytest.mark.parametrize("name, n", [("two heads", 17), ("three layers", 5)])
def test_tokens(student, name, n):
    made(student, name)
    tokens, on = gpt2_oracle.prompt(SIZES[name], n, seed=3), f"the model {name!r}, 16 tokens after a prompt of {n}"
    got = student.call("generate", name, tokens, 16, on=on, hint="inputs").value
    logits = gpt2_oracle.oracle(SIZES[name], WEIGHTS[name], [*tokens, *got[:-1]])[0][-16:]
    for step, token in enumerate(got):
        row, margin = logits[step], NEAR * np.abs(logits[step]).max()
        right = 0 <= token < len(row) and row[token] >= row.max() - margin
        check(right, f"new token {step + 1} is {token}, expected {row.argmax()}, on {on}", "products")


def test_large(student):
    made(student, "large")
    for n in (1, 17, 40):
        verify(student, "large", n, "residual")


@pytest.mark.parametrize("name", ["two heads", "three layers"])
def test_kernels(student, name):
    made(student, name)
    layers, on = SIZES[name]["n_layer"], f"the model {name!r}, T = 20"
    answer = student.call("forward", name, gpt2_oracle.prompt(SIZES[name], 20), on=on, hint="inputs")
    ran = [one["kernel"] for one in answer.launches]
    old = [one for one in ran if one.startswith(("matmul", "gemm_v")) and one != "gemm_v4_half_storage"]
    check(not old, f"{len(old)} matrix products by {', '.join(sorted(set(old)))}, on {on}", "device")
    count = ran.count("gemm_v4_half_storage")
    check(count == 4 * layers, f"{count} launches of gemm_v4_half_storage, expected {4 * layers}, on {on}", "device")
    copied = max(answer.value[1], answer.copied)
    check(copied == 1, f"{copied} elements came to the host, 1 is enough, on {on}", "device")
    check(answer.made == 0, f"a forward made {answer.made} new arrays on the device, on {on}", "once")
