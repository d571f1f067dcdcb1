"""The checks of ch12/flash_tile: see `common.grade`."""

import math

import numpy as np
import pytest

from common.grade import check, random, same, shared_out

TILE, HEAD_DIM = 32, 16
SCALE = 1 / math.sqrt(HEAD_DIM)


def reference(q, k, v, causal=False, scale=SCALE):
    """Attention, in float64."""
    scores = np.einsum("hqi,hki->hqk", q.astype(np.float64), k.astype(np.float64)) * scale
    if causal:
        scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    e = np.exp(scores - scores.max(axis=2, keepdims=True))
    return e @ v.astype(np.float64) / e.sum(axis=2, keepdims=True)


def numbers(n_head, n_tokens, seed=0):
    """q, k, v: v is around 1, so that a lost or surplus weight shows."""
    made = random(seed).standard_normal((3, n_head, n_tokens, HEAD_DIM)).astype(np.float32)
    return made[0], made[1], made[2] + np.float32(1)


def words(n_head, n_tokens, causal=False):
    heads, tokens = "s" * (n_head > 1), "s" * (n_tokens > 1)
    return f"{n_head} head{heads}, {n_tokens} token{tokens}, {'causal' if causal else 'not causal'}"


def run(student, q, k, v, causal, on):
    """The student's output."""
    answer = student.call("attention", q, k, v, int(causal), on=on)
    ran = [one["kernel"] for one in answer.own]
    check(ran == ["flash"], f"attention launched {ran} of your kernels, not flash, on {on}", "own-work")
    return answer.value


def right(student, q, k, v, causal, on, hint=None, atol=2e-5):
    """Compare the output with the reference."""
    same(run(student, q, k, v, causal, on), reference(q, k, v, causal), "out", on, rtol=2e-4, atol=atol, hint=hint)


def falling(n_head):
    """One tile of keys whose scores fall, so that nothing has to be rescaled: q, k, v, and the input in words."""
    q, k, v = numbers(n_head, TILE)
    q, k = q / 10, k / 10
    q[..., 0], k[..., 0] = 4.0, np.linspace(3, 0, TILE)
    return q, k, v, f"{words(n_head, TILE)}, scores that fall from key to key"


def test_memory(student):
    for n_tokens, causal in (70, 0), (70, 1), (5, 0):
        student.clean("attention", *numbers(1, n_tokens), causal, on=words(1, n_tokens, causal))


@pytest.mark.parametrize("n_head", [1, 3])
def test_tile(student, n_head):
    q, k, v, on = falling(n_head)
    got = run(student, q, k, v, False, on)
    if not np.allclose(got, reference(q, k, v), rtol=2e-4, atol=2e-5):
        for name, value in ("1", 1.0), ("1 / HEAD_DIM", 1 / HEAD_DIM), ("scale * scale", 1 / HEAD_DIM):
            close = np.allclose(got, reference(q, k, v, scale=value), rtol=2e-4, atol=2e-5)
            check(not close, f"the output is that of a scale of {name}, not 1 / sqrt(HEAD_DIM), on {on}", "scale")
    same(got, reference(q, k, v), "out", on, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("tiles", [2, 4])
@pytest.mark.parametrize("order", ["fall", "rise"])
def test_rescale(student, order, tiles):
    n_tokens = tiles * TILE
    q, k, v = numbers(2, n_tokens, seed=tiles)
    q[..., 0], k[..., 0] = 4.0, np.linspace(0, 5, n_tokens)  # this part of a score is 0 to 5
    if order == "fall":  # on the whole: some keys have a larger score than the one before
        k = np.ascontiguousarray(k[:, ::-1])
    right(student, q, k, v, False, f"{words(2, n_tokens)}, scores that {order}")


@pytest.mark.parametrize("n_tokens", [1, 17, 33, 63, 100, 700])
def test_lengths(student, n_tokens):
    q, k, v = numbers(2, n_tokens, seed=n_tokens)
    k[..., 0], q[..., 0] = -8.0, 2.0  # scores around -4: a surplus key of zeros would weigh the most
    right(student, q, k, v, False, words(2, n_tokens))


@pytest.mark.parametrize("n_tokens", [1, 32, 50, 97])
def test_causal(student, n_tokens):
    right(student, *numbers(2, n_tokens, seed=n_tokens), True, words(2, n_tokens, True))


@pytest.mark.parametrize("size", [10_000.0, -10_000.0])
@pytest.mark.parametrize("causal", [False, True])
def test_large(student, size, causal):
    n_tokens = 45
    q, k, v = numbers(1, n_tokens, seed=7)
    q[..., 0], k[..., 0] = 4.0, size  # scores around size, for all keys
    # float32 near 10 000 is off by 1/1000 and more
    on = f"{words(1, n_tokens, causal)}, scores around {size:g}"
    same(run(student, q, k, v, causal, on), reference(q, k, v, causal), "out", on, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("n_head, n_tokens", [(1, 96), (2, 50)])
def test_traffic(student, n_head, n_tokens):
    on, given = words(n_head, n_tokens), numbers(n_head, n_tokens)
    answer = student.call("attention", *given, 0, on=on, memory=True)
    # counts are worth nothing if it is wrong
    same(answer.value, reference(*given), "out", on, rtol=2e-4, atol=2e-5)
    seen = answer.total("bytes", space="global", access="read") // 4
    blocks = -(-n_tokens // TILE)
    most = n_head * n_tokens * HEAD_DIM * (1 + 2 * blocks)
    told = f"{seen} floats are read from global memory; queries once, and keys and values once a block, are {most}"
    check(seen <= most, f"{told}, on {on}")
    if n_tokens % TILE == 0:
        shared_out(answer, on, "flash", warps=n_tokens // TILE)
