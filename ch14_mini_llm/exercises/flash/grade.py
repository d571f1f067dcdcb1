"""The checks of ch14/flash: see `common.grade`. The oracle is a GPT-2 in NumPy."""

import numpy as np
import pytest

from common.grade import check, gpt2_oracle, same

SIZES = {
    "two heads": dict(n_layer=2, n_head=2, d_model=64, d_ff=128, n_ctx=200, vocab_size=211),
    "three layers": dict(n_layer=3, n_head=4, d_model=48, d_ff=96, n_ctx=256, vocab_size=97),
    "wide head": dict(n_layer=1, n_head=1, d_model=128, d_ff=64, n_ctx=70, vocab_size=127),
}
WEIGHTS = {name: gpt2_oracle.weights(sizes, len(name), wte=0.5, wpe=0.5) for name, sizes in SIZES.items()}
NEAR = dict(rtol=2e-4, atol=2e-4)
STAGES = ("attention_", "softmax_row")  # how the kernels' names begin that mha_naive launches


def made(student, name, max_length=None):
    on = f"making the model {name!r}"
    student.call("make", name, SIZES[name], WEIGHTS[name], max_length, on=on)


def expected(name, tokens, **wrong):
    return gpt2_oracle.oracle(SIZES[name], WEIGHTS[name], tokens, **wrong)[0]


def reason(got, name, tokens):
    """The hint for logits that are not right: which mistake gives just these?"""
    head_dim = SIZES[name]["d_model"] // SIZES[name]["n_head"]
    if len(tokens) == 1:  # nothing but its own value: no scale and no causal mask can spoil it
        return "attention"
    near = lambda **wrong: np.allclose(got, expected(name, tokens, **wrong), 1e-2, 1e-2)
    if near(causal=False):
        return "causal"
    scales = 1.0, SIZES[name]["d_model"] ** -0.5, 1 / head_dim, head_dim**0.5
    return "scale" if any(near(scale=scale) for scale in scales) else "attention"


@pytest.mark.parametrize("name, lengths", [("two heads", (1, 16, 17, 40, 65, 200, 5)), ("three layers", (1, 33)),
                                           ("wide head", (70, 2))])  # fmt: skip
def test_logits(student, name, lengths):
    made(student, name)
    for n in lengths:
        tokens = gpt2_oracle.prompt(SIZES[name], n, seed=n)
        on = f"the model {name!r}, T = {n}"
        got, right = student.call("logits_all", name, tokens, on=on, hint="views").value, expected(name, tokens)
        if not isinstance(got, np.ndarray) or got.shape != right.shape or not np.allclose(got, right, **NEAR):
            same(got, right, "logits", on, **NEAR, hint=reason(got, name, tokens))
        token, logits = student.call("forward", name, tokens, on=on).value
        same(logits, right[-1], "the last position's logits", on, **NEAR, hint="attention")
        best = right[-1].max() - 1e-3
        check(right[-1][token] > best, f"the next token is {token}, expected {right[-1].argmax()}, on {on}")


@pytest.mark.parametrize("name", SIZES)
def test_kernels(student, name):
    made(student, name)
    n, layers = 40, SIZES[name]["n_layer"]
    on = f"the model {name!r}, T = {n}"
    answer = student.call("forward", name, gpt2_oracle.prompt(SIZES[name], n), on=on, hint="views")
    ran = [one["kernel"] for one in answer.launches]
    old = [one for one in ran if one.startswith(STAGES)]
    check(not old, f"{old[0] if old else ''} was launched, which belongs to mha_naive, on {on}", "kernels")
    count = sum(one.startswith("flash_") for one in ran)
    check(count == layers, f"{count} launches of flash_attention for {layers} layers, on {on}", "kernels")
    check(len(ran) == 15 * layers + 4, f"{len(ran)} kernels were launched, expected {15 * layers + 4}, on {on}")


@pytest.mark.parametrize("name, n, max_length", [("three layers", 40, 40), ("two heads", 17, 90), ("wide head", 1, 1)])
def test_lse(student, name, n, max_length):
    made(student, name, max_length)
    n_head, on = SIZES[name]["n_head"], f"the model {name!r} for at most {max_length} tokens, T = {n}"
    tokens = gpt2_oracle.prompt(SIZES[name], n)
    answer = student.call("forward", name, tokens, on=on, hint="views")
    launches = answer.launches
    check(answer.made == 0, f"a forward made {answer.made} new arrays on the device, on {on}", "once")
    flash = [one["arguments"] for one in launches if one["kernel"].startswith("flash_")]
    check(flash, f"flash_attention was not launched, on {on}", "kernels")
    for arguments in flash:
        lse = arguments[4]
        enough = isinstance(lse, list) and len(lse) == 2 and lse[0] >= n_head and lse[1] >= n
        check(enough, f"lse has the shape {lse}, but {n_head} heads write {n} elements each, on {on}", "lse")


def test_scores(student):
    name = "three layers"
    sizes = SIZES[name]
    T, n_head = sizes["n_ctx"], sizes["n_head"]
    limit, on = n_head * T * T, f"a model of {n_head} heads for T = {T} tokens"
    made(student, name)
    tokens = gpt2_oracle.prompt(sizes, T)
    answer = student.call("forward", name, tokens, on=on, hint="views")
    for one in answer.launches:
        for shape in (one for one in one["arguments"] if isinstance(one, list)):
            wrong = f"{one['kernel']} was given an array of {shape}, {limit} elements or more, on {on}"
            check(np.prod(shape) < limit, wrong, "scores")
    for place, size in student.call("held", name, on=on).value.items():
        check(size < limit, f"{place} holds {size} elements; n_head * T * T is {limit}, on {on}", "scores")
    lse = n_head * T * 4
    student.note = f"n_head * T * T floats were {limit * 4 / 1e6:.1f} MB for {T} tokens; lse is {lse / 1e3:.1f} kB"
