"""The checks of ch13/llama_block: see `common.grade`. The oracle is a block in NumPy, in float64."""

import numpy as np
import pytest

from common.grade import check, same
from common.grade.student import random

SIZES = {  # with as many heads of keys as of queries; two for four; one for three, with heads wider than their share
    "own": dict(n_head=4, n_kv_head=4, head_dim=16, d_model=64, d_ff=96, eps=1e-5, rotary_base=1e4),
    "pairs": dict(n_head=4, n_kv_head=2, head_dim=16, d_model=48, d_ff=101, eps=1e-5, rotary_base=1e4),
    "one": dict(n_head=3, n_kv_head=1, head_dim=8, d_model=33, d_ff=71, eps=1e-2, rotary_base=1e5),
}
NEAR = dict(rtol=2e-4, atol=2e-4)
# A mistake in the oracle's words -> the hint for who makes it.
MISTAKES = {
    "no positions": "positions", "only queries turned": "positions", "values turned too": "values",
    "neighbours paired": "positions", "positions from 0": "where", "layer norm": "norm", "other norm": "norm",
    "no second norm": "norm", "no eps": "eps", "gate and up exchanged": "swiglu", "no gate": "swiglu", "gelu": "swiglu",
    "heads in turn": "groups", "no first residual": "residual", "no second residual": "residual",
    "residual of the norm": "residual",
}  # fmt: skip


def weights(s, seed):
    """Random weights of a block, matrices as (in, out), all of a size that matters."""
    rng, d, q, kv = random(seed), s["d_model"], s["n_head"] * s["head_dim"], s["n_kv_head"] * s["head_dim"]
    shapes = {
        "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,), "self_attn.q_proj.weight": (d, q),
        "self_attn.k_proj.weight": (d, kv), "self_attn.v_proj.weight": (d, kv), "self_attn.o_proj.weight": (q, d),
        "mlp.gate_proj.weight": (d, s["d_ff"]), "mlp.up_proj.weight": (d, s["d_ff"]),
        "mlp.down_proj.weight": (s["d_ff"], d),
    }  # fmt: skip
    spread = lambda shape: 0.3 if len(shape) == 1 else 2 * shape[0] ** -0.5
    return {name: (rng.standard_normal(shape) * spread(shape) + (len(shape) == 1)).astype(np.float32)
            for name, shape in shapes.items()}  # fmt: skip


def turned(x, positions, base, neighbours=False):
    """Heads (n_head, T, head_dim), their pairs turned by the positions."""
    half = x.shape[2] // 2
    angles = positions[:, None] * base ** (-np.arange(half) / half)
    c, s = np.cos(angles), np.sin(angles)
    a, b = (x[..., ::2], x[..., 1::2]) if neighbours else (x[..., :half], x[..., half:])
    parts = a * c - b * s, a * s + b * c
    return np.stack(parts, -1).reshape(x.shape) if neighbours else np.concatenate(parts, -1)


def oracle(s, w, x, positions, wrong=None):
    """The rows behind a block, in float64. wrong: one of `MISTAKES`, to be made."""
    w, x, T = {name: array.astype(np.float64) for name, array in w.items()}, x.astype(np.float64), len(x)
    group, hd, eps = s["n_head"] // s["n_kv_head"], s["head_dim"], 0.0 if wrong == "no eps" else s["eps"]
    first, second = w["input_layernorm.weight"], w["post_attention_layernorm.weight"]
    if wrong == "other norm":
        first, second = second, first

    def norm(a, weight):
        a = a - a.mean(1, keepdims=True) if wrong == "layer norm" else a
        return a / np.sqrt((a**2).mean(1, keepdims=True) + eps) * weight

    h = norm(x, first)
    q, k, v = (h @ w[f"self_attn.{part}_proj.weight"] for part in "qkv")
    q, k, v = (a.reshape(T, -1, hd).transpose(1, 0, 2) for a in (q, k, v))
    repeat = (lambda a: np.tile(a, (group, 1, 1))) if wrong == "heads in turn" else (lambda a: np.repeat(a, group, 0))
    k, v, places = repeat(k), repeat(v), np.arange(T) if wrong == "positions from 0" else positions
    turn = lambda a: turned(a, places, s["rotary_base"], wrong == "neighbours paired")
    q = q if wrong == "no positions" else turn(q)
    k = k if wrong in ("no positions", "only queries turned") else turn(k)
    v = turn(v) if wrong == "values turned too" else v
    scores = np.where(np.tri(T, dtype=bool), q @ k.transpose(0, 2, 1) / np.sqrt(hd), -np.inf)
    e = np.exp(scores - scores.max(2, keepdims=True))
    attended = (e / e.sum(2, keepdims=True) @ v).transpose(1, 0, 2).reshape(T, -1) @ w["self_attn.o_proj.weight"]
    x = attended + (0 if wrong == "no first residual" else h if wrong == "residual of the norm" else x)
    h = x if wrong == "no second norm" else norm(x, second)
    gate, up = h @ w["mlp.gate_proj.weight"], h @ w["mlp.up_proj.weight"]
    gate, up = (up, gate) if wrong == "gate and up exchanged" else (gate, up)
    silu = lambda a: a / (1 + np.exp(-a))
    gelu = lambda a: a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) / 2
    inner = silu(up) if wrong == "no gate" else (gelu if wrong == "gelu" else silu)(gate) * up
    return inner @ w["mlp.down_proj.weight"] + (0 if wrong == "no second residual" else x)


def verify(student, name, n, start=0):
    """The rows behind the block for n tokens from a position on."""
    s, on = SIZES[name], f"{n} token{'s' if n > 1 else ''} from position {start} on, {SIZES[name]['n_head']} heads of "
    on += f"queries, {SIZES[name]['n_kv_head']} of keys"
    w, positions = weights(s, n), np.arange(start, start + n, dtype=np.int32)
    x = (0.5 * random(n, start).standard_normal((n, s["d_model"]))).astype(np.float32)
    student.call("place", s, w, x, positions, on=on)
    answer = student.call("run", on=on, hint="launches")
    got, after = student.call("result", on=on).value
    right = oracle(s, w, x, positions)
    if not isinstance(got, np.ndarray) or got.shape != right.shape or not np.allclose(got, right, **NEAR):
        near = (hint for wrong, hint in MISTAKES.items()
                if np.allclose(got, oracle(s, w, x, positions, wrong), 1e-3, 1e-3))  # fmt: skip
        hint = "unwritten" if np.isnan(got).any() else next(near, "order")
        same(got, right, "x", on, **NEAR, hint=hint)
    for name, array in w.items():
        same(after[name], array, f"the weight {name}", on, hint="order")
    return answer, on


@pytest.mark.parametrize("n_head, n_kv_head", [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_heads(student, n_head, n_kv_head):
    for T, head_dim in (33, 6), (1, 8), (5, 16), (70, 40):  # the sanitizer first: a GPU only has wrong numbers
        x = random(T, n_head).standard_normal((T, n_kv_head * head_dim)).astype(np.float32)
        on = f"{T} token{'s' * (T > 1)}, {n_head} heads that read {n_kv_head}, head_dim {head_dim}"
        arguments = "heads", x, n_head, n_kv_head
        answer = student.clean(*arguments, on=on) if T == 33 else student.call(*arguments, on=on, hint="groups")
        own = x.reshape(T, n_kv_head, head_dim).transpose(1, 0, 2)
        same(answer.value, np.repeat(own, n_head // n_kv_head, 0), "out", on, hint="groups")


@pytest.mark.parametrize("name", ["own", "pairs", "one"])
def test_alone(student, name):
    verify(student, name, 1)


@pytest.mark.parametrize("n", [2, 17, 40])
def test_block(student, n):
    verify(student, "own", n)


@pytest.mark.parametrize("name, n", [("pairs", 5), ("pairs", 33), ("one", 17)])
def test_grouped(student, name, n):
    verify(student, name, n)


@pytest.mark.parametrize("name, start", [("own", 100), ("pairs", 7), ("one", 200)])
def test_positions(student, name, start):
    s, n = SIZES[name], 9
    verify(student, name, n, start)
    w, x = weights(s, n), (0.5 * random(n, start).standard_normal((n, s["d_model"]))).astype(np.float32)
    mixed, on = np.array([3, 0, 9, 9, 4, 31, 2, 250, 1], np.int32), "positions in no order"
    student.call("place", s, w, x, mixed, on=on)
    student.call("run", on=on)
    same(student.call("result", on=on).value[0], oracle(s, w, x, mixed), "x", on, **NEAR, hint="where")


def test_launches(student):
    answer, on = verify(student, "pairs", 20)
    check(answer.made == 0, f"a block made {answer.made} new arrays on the device, on {on}", "once")
    check(answer.copied == 0, f"{answer.copied} elements came to the host, on {on}", "once")
    ran = [one["kernel"] for one in answer.launches]
    for kernel, most in ("matmul_kernel", 7), ("rope_halves", 2), ("grouped_heads", 3), ("rmsnorm_row", 2):
        count = sum(kernel.removesuffix("_kernel").removesuffix("_row") in one for one in ran)
        check(count <= most, f"{count} launches of {kernel}, {most} are enough, on {on}", "launches")
    check(len(ran) <= 20, f"{len(ran)} launches, 20 are enough, on {on}", "launches")
    student.note = f"{len(ran)} launches for a block"
