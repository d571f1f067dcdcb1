"""Chapter 11: each stage against its reference, the whole against NumPy, and the property that makes it causal."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch11_attention import kernels as ch11

SCORES = [ch11.attention_scores_v1_naive, ch11.attention_scores_v2_tiled]
VALUES = [ch11.attention_values_v1_naive, ch11.attention_values_v2_tiled]
SHAPES = [  # n_head, n_tokens, head_dim
    (1, 1, 1), (3, 1, 64), (12, 2, 5), (1, 16, 16), (3, 31, 32), (12, 33, 64), (1, 65, 1), (3, 65, 5), (2, 64, 33),
]  # fmt: skip


def with_tail(array, tail, fill=np.nan):
    """A device copy of ``array`` with more elements behind it: ``(buffer, view of the array's shape)``."""
    buffer = cuda.to_device(np.concatenate([array.ravel(), np.full(tail, fill, np.float32)]))
    return buffer, buffer[: array.size].reshape(array.shape)


def result(shape):
    """A device array of NaN with 7 behind it, as :func:`with_tail`."""
    return with_tail(np.full(shape, np.nan, np.float32), 50, 7)


def attention(q, k, v):
    """mha_naive on the device; returns the output and the probabilities."""
    n_head, n_tokens, head_dim = q.shape
    inputs = [with_tail(a, 50)[1] for a in (q, k, v)]
    behind_scores, scores = result((n_head, n_tokens, n_tokens))
    behind_out, out = result((n_tokens, n_head * head_dim))
    ch11.mha_naive(*inputs, scores, out, n_tokens, n_head, head_dim)
    for buffer, view in ((behind_scores, scores), (behind_out, out)):
        np.testing.assert_array_equal(buffer.copy_to_host()[view.size :], 7)
    return out.copy_to_host(), scores.copy_to_host()


@pytest.mark.parametrize("kernel", SCORES, ids=lambda k: k.__name__)
@pytest.mark.parametrize("n_head, n_tokens, head_dim", SHAPES)
def test_scores_are_exact_on_whole_numbers(rng, kernel, n_head, n_tokens, head_dim):
    q, k = rng.integers(-8, 9, (2, n_head, n_tokens, head_dim)).astype(np.float32)
    buffer, scores = result((n_head, n_tokens, n_tokens))
    kernel[ch11.attention_scores_launch(n_tokens, n_head)](
        with_tail(q, 50)[1], with_tail(k, 50)[1], scores, n_tokens, head_dim, np.float32(0.125)
    )
    np.testing.assert_array_equal(scores.copy_to_host(), ch11.attention_scores_reference(q, k, 0.125))
    np.testing.assert_array_equal(buffer.copy_to_host()[scores.size :], 7)


@pytest.mark.parametrize("kernel", VALUES, ids=lambda k: k.__name__)
@pytest.mark.parametrize("n_head, n_tokens, head_dim", SHAPES)
def test_values_are_exact_on_whole_numbers(rng, kernel, n_head, n_tokens, head_dim):
    probs = rng.integers(0, 9, (n_head, n_tokens, n_tokens)).astype(np.float32)
    probs[:, ~np.tri(n_tokens, dtype=bool)] = np.nan  # not to be read
    v = rng.integers(-8, 9, (n_head, n_tokens, head_dim)).astype(np.float32)
    buffer, out = result((n_tokens, n_head * head_dim))
    kernel[ch11.attention_values_launch(n_tokens, n_head, head_dim)](
        with_tail(probs, 50)[1], with_tail(v, 50)[1], out, n_tokens, n_head, head_dim
    )
    np.testing.assert_array_equal(out.copy_to_host(), ch11.attention_values_reference(probs, v))
    np.testing.assert_array_equal(buffer.copy_to_host()[out.size :], 7)


@pytest.mark.parametrize("n_head, n_tokens, head_dim", SHAPES)
def test_mha(rng, n_head, n_tokens, head_dim):
    q, k, v = rng.standard_normal((3, n_head, n_tokens, head_dim), dtype=np.float32)
    out, probs = attention(q, k, v)
    np.testing.assert_allclose(out, ch11.mha_reference(q, k, v), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(probs.sum(axis=2), 1, rtol=1e-5)
    assert (probs[:, ~np.tri(n_tokens, dtype=bool)] == 0).all()


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    q, k, v = rng.standard_normal((3, 2, 17, 33), dtype=np.float32)
    np.testing.assert_allclose(attention(q, k, v)[0], ch11.mha_reference(q, k, v), rtol=1e-5, atol=2e-6)


def test_large_scores_do_not_overflow(rng):
    q, k, v = 40 * rng.standard_normal((3, 2, 33, 32), dtype=np.float32)  # scores of some thousands
    out, _ = attention(q, k, v)
    np.testing.assert_allclose(out, ch11.mha_reference(q, k, v), rtol=1e-2, atol=1e-2)  # exp of a rounded large score


@pytest.mark.parametrize("n_tokens", [2, 31, 33, 65])
def test_a_later_token_changes_no_bit_of_earlier_outputs(rng, n_tokens):
    q, k, v = rng.standard_normal((3, 3, n_tokens, 32), dtype=np.float32)
    before, _ = attention(q, k, v)
    for first in {1, n_tokens // 2, n_tokens - 1}:
        changed = [a.copy() for a in (q, k, v)]
        for a in changed:
            a[:, first:] = 100 * rng.standard_normal(a[:, first:].shape, dtype=np.float32)
        after, _ = attention(*changed)
        np.testing.assert_array_equal(after[:first].view(np.int32), before[:first].view(np.int32))
        assert (after[first:] != before[first:]).all()


def test_a_prefix_alone_gives_the_same_bits(rng):
    q, k, v = rng.standard_normal((3, 3, 65, 32), dtype=np.float32)
    whole, _ = attention(q, k, v)
    for n in (1, 16, 17, 33):
        part, _ = attention(*(np.ascontiguousarray(a[:, :n]) for a in (q, k, v)))
        np.testing.assert_array_equal(part.view(np.int32), whole[:n].view(np.int32))


def test_the_first_token_sees_only_itself(rng):
    q, k, v = rng.standard_normal((3, 3, 33, 5), dtype=np.float32)
    out, _ = attention(q, k, v)
    np.testing.assert_array_equal(out[0], v[:, 0].ravel())


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_empty_sizes_are_refused(sizes):
    empty = np.zeros((1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="at least 1"):
        ch11.mha_naive(empty, empty, empty, empty, empty[0], *sizes)


@pytest.mark.parametrize("n_tokens", [1, 33, 65])
def test_bytes_of_the_scores(n_tokens):
    for dtype in (np.float32, np.float16):
        assert ch11.attention_scores_bytes(3, n_tokens, dtype) == np.zeros((3, n_tokens, n_tokens), dtype).nbytes
    assert ch11.attention_scores_bytes(3, 2 * n_tokens) == 4 * ch11.attention_scores_bytes(3, n_tokens)
    with pytest.raises(ValueError, match="at least 1"):
        ch11.attention_scores_bytes(3, 0)
