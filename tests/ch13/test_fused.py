"""Chapter 13: what is fused to a matrix product, and the small kernels of a step, against NumPy; mostly exact."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch03_indexing.kernels import blocks_2d
from chapters.ch07_warp_reduce.argmax import greedy_argmax_reference
from chapters.ch09_gemm.gemv_tensor import (
    gemv_ln_launch,
    gemv_ln_reference,
    gemv_ln_tensor_launch,
    gemv_tile,
    layernorm_half_reference,
)
from chapters.ch09_gemm.pipeline import gemm_bias_launch
from chapters.ch13_llm_ops import fused as ch13
from chapters.ch13_llm_ops.kernels import gelu_reference

TAIL = 40  # elements behind each array
INF = np.inf
EXACT = np.float32(0)  # as eps: the layer norm of whole_rows is then a row of whole numbers


def with_tail(array, fill):
    """A device copy of ``array`` with more elements behind it: ``(buffer, view of the array's shape)``."""
    buffer = cuda.to_device(np.concatenate([array.ravel(), np.full(TAIL, fill, array.dtype)]))
    return buffer, buffer[: array.size].reshape(array.shape)


def on_device(launch, inputs, outputs):
    """``outputs`` after ``launch(*inputs, *outputs)`` on device copies of all.

    Behind inputs lies NaN, or for integers a place that is wrong, -9; and 7 behind the outputs: checks that it is still
    there.
    """
    read = [with_tail(array, np.nan if array.dtype.kind == "f" else -9)[1] for array in inputs]
    written = [with_tail(array, 7) for array in outputs]
    launch(*read, *(view for _, view in written))
    for (buffer, _), array in zip(written, outputs):
        np.testing.assert_array_equal(buffer.copy_to_host()[array.size :], 7)
    return [view.copy_to_host() for _, view in written]


def nan(dtype, *shape):
    """What a kernel leaves unwritten shows."""
    return np.full(shape, np.nan, dtype)


def whole(rng, dtype, *shape):
    """Integers so small that sums of products are exact: any mistake shows as a difference."""
    return rng.integers(-8, 9, shape, np.int8).astype(dtype)


def whole_rows(rng, rows, d_model):
    """Rows whose layer norm, with eps 0, is 1 and -1, half of each: as whole numbers of several sizes."""
    signs = rng.permuted(np.tile(np.int8([1, -1]), (rows, d_model // 2)), axis=1)
    return (rng.integers(-5, 6, (rows, 1)) + 2.0 ** rng.integers(-2, 4, (rows, 1)) * signs).astype(np.float32)


def whole_norm(rng, d_model):
    """Weight and bias that make odd numbers of 1 and -1: never 0, so float16 hides whatever float32 has rounded."""
    odd, even = 2 * rng.integers(-4, 4, d_model) + 1, 2 * rng.integers(-4, 5, d_model)
    return odd.astype(np.float32), even.astype(np.float32)


def assert_gelu_of(found, y):
    """Found is gelu(y), for an exact y: right to 1e-5 and 1e-6 as gelu_kernel, then rounded to float16."""
    expected = gelu_reference(y).astype(np.float64)
    assert (np.abs(found - expected) <= (2.0**-11 + 1e-5) * np.abs(expected) + 1e-6).all()


# --- GELU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (130, 33, 17), (33, 130, 72), (129, 257, 40)])
def test_gemm_bias_gelu(rng, M, N, K):
    """Odd and even N, K a multiple of 8 or not; sums are multiples of 1 / 64 from some -10 to 10."""
    A, Bt = whole(rng, np.float16, M, K), whole(rng, np.float16, N, K) / np.float16(64)
    bias = (rng.integers(-200, 200, N) / 64).astype(np.float32)
    kernel = ch13.gemm_bias_gelu[gemm_bias_launch(M, N)]
    (found,) = on_device(lambda *arrays: kernel(*arrays, M, N, K), (A, Bt, bias), [nan(np.float16, M, N)])
    exact = A.astype(np.float64) @ Bt.astype(np.float64).T + bias
    assert_gelu_of(found, exact)
    assert_gelu_of(ch13.gemm_bias_gelu_reference(A, Bt, bias), exact)


@pytest.mark.parametrize("N, d_model, rows", [(1, 8, 1), (33, 264, 8), (130, 768, 3), (6500, 8, 2)])
def test_gemv_ln_gelu(rng, N, d_model, rows):
    x, W = whole_rows(rng, rows, d_model), whole(rng, np.float16, N, d_model) / np.float16(64)
    (ln_weight, ln_bias), bias = whole_norm(rng, d_model), whole(rng, np.float32, N)
    kernel, sizes = ch13.gemv_ln_gelu[gemv_ln_launch(N, d_model, rows)], (rows, N, d_model, gemv_tile(N), EXACT)
    inputs = x, ln_weight, ln_bias, W, bias
    (found,) = on_device(lambda *arrays: kernel(*arrays, *sizes), inputs, [nan(np.float16, rows * N)])
    hidden = layernorm_half_reference(x, ln_weight, ln_bias, 0).astype(np.float64)
    assert_gelu_of(found.reshape(rows, N), hidden @ W.astype(np.float64).T + bias)


# --- query, key and value --------------------------------------------------------------------------------------------


def empty_caches(n_head, max_tokens, head_dim):
    return [np.full((n_head, max_tokens, head_dim), -1, np.float16) for _ in range(2)]


def qkv_of_a_token(x, ln_weight, ln_bias, W, bias, n_head, max_tokens, pos):
    """gemv_ln_qkv on the device, with eps 0: q and both caches, -1 where nothing was written."""
    d_model = x.shape[1]
    head_dim = d_model // n_head
    kernel, sizes = ch13.gemv_ln_qkv[gemv_ln_launch(3 * d_model, d_model)], (gemv_tile(3 * d_model), EXACT)
    outputs = [nan(np.float16, d_model), *empty_caches(n_head, max_tokens, head_dim), np.int32([pos])]
    inputs = x, ln_weight, ln_bias, W, bias
    *found, same = on_device(lambda *arrays: kernel(*arrays, d_model, head_dim, *sizes), inputs, outputs)
    assert same[0] == pos
    return found


@pytest.mark.parametrize("n_head, head_dim, pos", [(1, 8, 0), (3, 8, 5), (2, 128, 8), (12, 64, 3)])
def test_gemv_ln_qkv(rng, n_head, head_dim, pos):
    """Up to the last slot of nine; the largest has tiles of 16 rows."""
    d_model = n_head * head_dim
    x, W = whole_rows(rng, 1, d_model), whole(rng, np.float16, 3 * d_model, d_model)
    norm, bias = whole_norm(rng, d_model), 700 * whole(rng, np.float32, 3 * d_model) + 1
    q, k_cache, v_cache = qkv_of_a_token(x, *norm, W, bias, n_head, 9, pos)
    expected = gemv_ln_reference(x, *norm, W, bias, 0)[0]
    np.testing.assert_array_equal(q, expected[:d_model])
    for cache, rows in ((k_cache, expected[d_model : 2 * d_model]), (v_cache, expected[2 * d_model :])):
        np.testing.assert_array_equal(cache[:, pos], rows.reshape(n_head, head_dim))
        assert (np.delete(cache, pos, axis=1) == -1).all()


def split(qkv, n_head, max_tokens, pos):
    """split_qkv_append on the device: q and both caches."""
    T, d_model = len(qkv), qkv.shape[1] // 3
    head_dim = d_model // n_head
    kernel = ch13.split_qkv_append[ch13.split_qkv_append_launch(T, d_model)]
    outputs = [nan(np.float16, n_head, T, head_dim), *empty_caches(n_head, max_tokens, head_dim), np.int32([pos])]
    *found, same = on_device(lambda *arrays: kernel(*arrays, T, d_model, head_dim), [qkv], outputs)
    assert same[0] == pos
    return found


@pytest.mark.parametrize("n_head, head_dim, T, pos", [(1, 1, 1, 0), (3, 5, 33, 7), (2, 32, 9, 0), (2, 64, 5, 35)])
def test_split_qkv_append(rng, n_head, head_dim, T, pos):
    d_model = n_head * head_dim
    qkv = rng.standard_normal((T, 3 * d_model)).astype(np.float16)
    q, *caches = split(qkv, n_head, 40, pos)
    expected = qkv.reshape(T, 3, n_head, head_dim).transpose(1, 2, 0, 3)
    np.testing.assert_array_equal(q, expected[0])
    for cache, part in zip(caches, expected[1:]):
        np.testing.assert_array_equal(cache[:, pos : pos + T], part)
        assert (np.delete(cache, np.s_[pos : pos + T], axis=1) == -1).all()


# --- logits and the likeliest ----------------------------------------------------------------------------------------


def logits_of(x, at, ln_weight, ln_bias, W):
    """gemv_ln_logits on the device, with eps 0: logits, best and best_token."""
    vocab_size, d_model = W.shape
    configuration = gemv_ln_tensor_launch(vocab_size, d_model)
    blocks = configuration[0]

    def launch(x, *arrays):
        sizes = vocab_size, d_model, gemv_tile(vocab_size), EXACT
        ch13.gemv_ln_logits[configuration](x, at, *arrays, *sizes)

    outputs = [nan(np.float32, vocab_size), nan(np.float32, blocks), np.full(blocks, -9, np.int32)]
    return on_device(launch, (x, ln_weight, ln_bias, W), outputs)


def pick(best, best_token, vocab_size, pos=2):
    """The token that pick_best writes behind position ``pos``, to ``tokens`` and ``shown`` alike, and nothing else."""

    def launch(best, best_token, *arrays):
        ch13.pick_best[ch13.pick_best_launch()](best, best_token, len(best), vocab_size, *arrays)

    outputs = [np.full(6, -5, np.int32), np.full(6, -5, np.int32), np.int32([pos])]
    tokens, shown, new_pos = on_device(launch, (best, best_token), outputs)
    np.testing.assert_array_equal(shown, tokens)
    assert new_pos[0] == pos + 1 and (np.delete(tokens, pos + 1) == -5).all()
    return int(tokens[pos + 1])


def greedy(x, at, ln_weight, ln_bias, W):
    """Logits on the device, and the token picked; what blocks have found is theirs."""
    logits, best, best_token = logits_of(x, at, ln_weight, ln_bias, W)
    found = best_token < len(W)
    np.testing.assert_array_equal(logits[best_token[found]], best[found])
    assert (best[~found] == -INF).all() and (best_token[~found] == len(W)).all()
    return logits, pick(best, best_token, len(W))


@pytest.mark.parametrize("vocab_size, d_model", [(1, 8), (7, 264), (257, 768), (6500, 24)])
def test_greedy_token_of_whole_numbers(rng, vocab_size, d_model):
    """Of each row of x; the likeliest twice, so that the lower token has to win."""
    x, norm = whole_rows(rng, 3, d_model), whole_norm(rng, d_model)
    W = whole(rng, np.float16, vocab_size, d_model)
    for at in range(3):
        expected = ch13.gemv_ln_logits_reference(x[at], *norm, W, 0)
        W[vocab_size // 3] = W[expected.argmax()]
        expected = ch13.gemv_ln_logits_reference(x[at], *norm, W, 0)
        logits, token = greedy(x, at, *norm, W)
        np.testing.assert_array_equal(logits, expected)
        assert token == expected.argmax() and (vocab_size < 9 or (expected == expected.max()).sum() > 1)


def test_equal_logits_give_the_lowest_token(rng):
    """In the same tile, in another block, in the next round of a block; and all equal."""
    x, (ln_weight, ln_bias), W = whole_rows(rng, 1, 8), whole_norm(rng, 8), np.zeros((6500, 8), np.float16)
    W[:, 0], ln_bias[0] = 1, 8  # what is normalised begins with a number above 0
    assert greedy(x, 0, ln_weight, ln_bias, W)[1] == 0
    for likeliest in ([32, 33, 700], [40, 6499], [6490, 6499], [17, 6336 + 17]):
        W[:, 0] = 1
        W[likeliest, 0] = 2
        logits, token = greedy(x, 0, ln_weight, ln_bias, W)
        assert (logits == logits.max()).sum() == len(likeliest) and token == likeliest[0]


def test_nan_never_wins(rng):
    x, norm, W = whole_rows(rng, 1, 24), whole_norm(rng, 24), whole(rng, np.float16, 300, 24)
    order = np.argsort(-greedy(x, 0, *norm, W)[0], kind="stable")
    W[order[:5]] = np.nan
    W[:8] = np.nan  # nothing but NaN for the first block
    logits, token = greedy(x, 0, *norm, W)
    best = next(token for token in order if not np.isnan(logits[token]))
    assert np.isnan(logits).sum() >= 8 and token == best == greedy_argmax_reference(logits)


@pytest.mark.parametrize("spoilt", ["x", "W", "ln_bias"])
def test_all_nan_gives_minus_one(rng, spoilt):
    arrays = {"x": whole_rows(rng, 1, 24), "ln_weight": np.ones(24, np.float32), "ln_bias": np.zeros(24, np.float32)}
    arrays["W"] = whole(rng, np.float16, 300, 24)
    arrays[spoilt][..., 5] = np.nan
    logits, token = greedy(arrays.pop("x"), 0, **arrays)
    assert np.isnan(logits).all() and token == -1


def test_all_minus_infinity_gives_token_0(rng):
    ln_weight, ln_bias = np.zeros(24, np.float32), np.ones(24, np.float32)
    logits, token = greedy(whole_rows(rng, 1, 24), 0, ln_weight, ln_bias, np.full((300, 24), -INF, np.float16))
    assert (logits == -INF).all() and token == 0


@pytest.mark.parametrize("n_blocks", [1, 33, 1500])
def test_pick_best_of_many_blocks(rng, n_blocks):
    """Equal bests: the lowest token, whichever block has it."""
    best = rng.integers(-3, 3, n_blocks).astype(np.float32)
    best_token = rng.permutation(9000)[:n_blocks].astype(np.int32)
    assert pick(best, best_token, 9000, pos=0) == best_token[best == best.max()].min()
    best[:], best_token[:] = -INF, 9000
    assert pick(best, best_token, 9000) == -1
    best_token[n_blocks // 2] = 8999
    assert pick(best, best_token, 9000) == 8999


# --- the ends of a step ----------------------------------------------------------------------------------------------


def test_append_token():
    tokens, shown = np.full((2, 9), -5, np.int32)
    pos, step = np.int32([3]), np.int64([(1 << 40) + 6])
    for token in (17, -1, 50256):
        kernel = ch13.append_token[ch13.append_token_launch()]
        tokens, shown, pos, step = on_device(kernel, [np.int32([token])], [tokens, shown, pos, step])
    assert tokens.tolist() == shown.tolist() == [-5] * 4 + [17, -1, 50256] + [-5] * 2
    assert pos[0] == 6 and step[0] == (1 << 40) + 9


def embedded(tokens, pos, wte, wpe, T):
    """embed_at on the device."""
    d_model = wte.shape[1]
    kernel, inputs = ch13.embed_at[blocks_2d(T, d_model)], (np.int32(tokens), np.int32([pos]), wte, wpe)
    return on_device(lambda *arrays: kernel(*arrays, T, d_model), inputs, [nan(np.float32, T, d_model)])[0]


@pytest.mark.parametrize("T, pos", [(1, 0), (1, 11), (5, 0), (9, 3)])
@pytest.mark.parametrize("d_model", [1, 72, 129])
def test_embed_at(rng, T, pos, d_model):
    """Added in float32; token -1, of a step that had nothing to choose from, reads as token 0."""
    wte, wpe = (rng.standard_normal((n, d_model)).astype(np.float16) for n in (50, 12))
    tokens = rng.integers(0, 50, 13).astype(np.int32)
    tokens[pos] = 49
    tokens[pos + T - 1] = -1
    found = embedded(tokens, pos, wte, wpe, T)
    tokens[pos + T - 1] = 0
    places = np.arange(pos, pos + T)
    np.testing.assert_array_equal(found, wte[tokens[places]].astype(np.float32) + wpe[places].astype(np.float32))


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    x, norm, W, bias = whole_rows(rng, 1, 24), whole_norm(rng, 24), whole(rng, np.float16, 72, 24), np.zeros(72)
    q, _, v_cache = qkv_of_a_token(x, *norm, W, bias.astype(np.float32), 3, 4, 3)
    expected = gemv_ln_reference(x, *norm, W, bias, 0)[0]
    np.testing.assert_array_equal([q, v_cache[:, 3].ravel()], [expected[:24], expected[48:]])
    assert pick(np.float32([1, 3, 3]), np.int32([5, 9, 7]), 10) == 7
    assert embedded([3, 49], 0, np.ones((50, 33), np.float16), np.ones((2, 33), np.float16), 2).sum() == 2 * 2 * 33
    assert (split(np.ones((5, 30), np.float16), 2, 7, 2)[2][:, 2:] == 1).all()


def test_launches_refuse():
    for sizes in [(0, 64), (5, 0), (-1, 64)]:
        with pytest.raises(ValueError, match="at least 1"):
            ch13.split_qkv_append_launch(*sizes)
