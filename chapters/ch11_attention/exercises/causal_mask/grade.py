"""The checks of ch11/causal_mask: see `common.grade`."""

import math

import numpy as np
import pytest

from common.grade import HALF, check, random, same, shared_out


def reference(q, k, scale=None):
    """Causal attention weights, in float64. scale: 1 / sqrt(head_dim) by default."""
    scores = np.einsum("hqi,hki->hqk", q.astype(np.float64), k.astype(np.float64))
    scores *= 1 / math.sqrt(q.shape[2]) if scale is None else scale
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    e = np.exp(scores - scores.max(axis=2, keepdims=True))
    return e / e.sum(axis=2, keepdims=True)


def numbers(n_head, n_tokens, head_dim, seed=0):
    made = random(seed).standard_normal((2, n_head, n_tokens, head_dim)).astype(np.float32)
    return made[0], made[1]


def weights_of(student, q, k, on):
    """The student's weights."""
    answer = student.call("attention_weights", q, k, on=on)
    ran = [one["kernel"] for one in answer.own]
    check(ran == ["causal_weights"], f"attention_weights launched {ran}, not causal_weights, on {on}", "own-work")
    return answer.value


def words(n_head, n_tokens, head_dim):
    return f"{n_head} head{'s' * (n_head > 1)}, {n_tokens} token{'s' * (n_tokens > 1)}, head_dim {head_dim}"


SHAPES = [(1, 1, 8), (2, 17, 16), (1, 33, 8), (2, 65, 20), (3, 100, 5)]


def test_memory(student):
    for shape in (2, 40, 6), (1, 3, 4):
        student.clean("attention_weights", *numbers(*shape), on=words(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_mask(student, shape):
    got, on = weights_of(student, *numbers(*shape), words(*shape)), words(*shape)
    later = np.broadcast_to(~np.tri(shape[1], dtype=bool), got.shape)
    for wrong, should, hint in [
        (later & np.isnan(got), "0: the key is later than the query, and nothing was written", "zeros"),
        (later & (got != 0), "0: the key is later than the query", "diagonal"),
        (~later & ~(got > 0), "more than 0: the key is visible to the query", "diagonal"),
    ]:
        where = np.argwhere(wrong)
        if len(where):
            at = tuple(map(int, where[0]))
            check(False, f"weights[{at[0]}, {at[1]}, {at[2]}] is {got[at]:.4g}, expected {should}, on {on}", hint)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums(student, shape):
    on = words(*shape)
    sums = weights_of(student, *numbers(*shape, seed=1), on).sum(axis=2, dtype=np.float64)
    head, query = (int(i) for i in np.unravel_index(np.abs(sums - 1).argmax(), sums.shape))
    told = f"row {query} of head {head} sums to {sums[head, query]:.4g}, not to 1, on {on}"
    check(np.abs(sums - 1).max() < 1e-4, told)


@pytest.mark.parametrize("shape", [(1, 9, 16), (1, 33, 64), (2, 17, 1), *SHAPES])
def test_scale(student, shape):
    _, n_tokens, head_dim = shape
    on = words(*shape)
    q, k = numbers(*shape, seed=2)
    got = weights_of(student, q, k, on)
    expected = reference(q, k)
    if not np.allclose(got, expected, rtol=1e-4, atol=1e-6):
        others = {"1": 1, "1 / head_dim": 1 / head_dim, "sqrt(head_dim)": math.sqrt(head_dim)}
        others |= {"1 / sqrt(n_tokens)": 1 / math.sqrt(n_tokens), "1 / sqrt(64)": 1 / 8}
        for name, value in others.items():
            close = np.allclose(got, reference(q, k, value), rtol=1e-4, atol=1e-6)
            check(not close, f"the weights are those of a scale of {name}, not 1 / sqrt(head_dim), on {on}", "scale")
        first = np.allclose(got[0], expected[0], rtol=1e-4, atol=1e-6)
        check(not first, f"head 0 has the right weights, the other heads do not, on {on}", "heads")
    sound = np.allclose(np.tril(got).sum(axis=2), 1, atol=1e-4) and not np.triu(got, 1).any()
    same(got, expected, "weights", on, rtol=1e-4, atol=1e-6, hint="scale" if sound else "follows")


def test_lanes(student):
    shape, on = (1, 64, 32), words(1, 64, 32)
    answer = student.call("attention_weights", *numbers(*shape), on=on, memory=True)
    shared_out(answer, on, "causal_weights", lanes=HALF, warps=8)  # a query that sees few keys has work for few lanes


@pytest.mark.parametrize("size", [300.0, -300.0])
def test_large(student, size):
    n_tokens, head_dim = 37, 16
    q, k = numbers(1, n_tokens, head_dim, seed=3)
    q[..., 0], k[..., 0] = 4.0, size  # scores around size, for all keys
    on = f"{words(1, n_tokens, head_dim)}, scores around {size:g}"
    same(weights_of(student, q, k, on), reference(q, k), "weights", on, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", ["others", "larger", "NaN"])
def test_future(student, value):
    shape, first = (2, 50, 8), 23
    q, k = numbers(*shape, seed=4)
    changed = k.copy()
    changed[:, first:] = numbers(*shape, seed=5)[1][:, first:]
    if value != "others":
        changed[:, first:] = np.nan if value == "NaN" else 1000 * changed[:, first:]
    name = {"others": "other numbers", "larger": "numbers around 1000", "NaN": "NaN"}[value]
    on = f"{words(*shape)}, the keys from {first} on replaced by {name}"
    before = weights_of(student, q, k, words(*shape))[:, :first]
    after = weights_of(student, q, changed, on)[:, :first]
    changed = np.argwhere(~np.isclose(after, before, rtol=0, atol=0, equal_nan=True))
    if len(changed):
        at = tuple(map(int, changed[0]))
        told = f"weights[{at[0]}, {at[1]}, {at[2]}] was {before[at]:.9g} and becomes {after[at]:.9g}"
        check(False, f"{told}, on {on}")
