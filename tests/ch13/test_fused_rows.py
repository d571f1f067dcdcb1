"""Chapter 13, around products of some dozen rows: norms that add parts, and the three epilogues, against references."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch09_gemm.skinny import LARGE, SMALL, skinny_launch
from chapters.ch13_llm_ops import fused_rows as ch13
from chapters.ch13_llm_ops.kernels import gelu_reference

INF = np.inf
EPS = np.float32(1e-5)
TAIL = 40

every_tile = pytest.mark.parametrize("tile", [LARGE, SMALL])


def with_tail(array, fill):
    """A device copy of ``array`` with more elements behind it: ``(buffer, view of the array's shape)``."""
    buffer = cuda.to_device(np.concatenate([array.ravel(), np.full(TAIL, fill, array.dtype)]))
    return buffer, buffer[: array.size].reshape(array.shape)


def on_device(launch, inputs, outputs):
    """``outputs`` after ``launch(*inputs, *outputs)`` on device copies; behind inputs lies NaN or -9, and 7 behind the
    outputs, which is still there afterwards."""
    read = [with_tail(array, np.nan if array.dtype.kind == "f" else -9)[1] for array in inputs]
    written = [with_tail(array, 7) for array in outputs]
    launch(*read, *(view for _, view in written))
    for (buffer, _), array in zip(written, outputs):
        np.testing.assert_array_equal(buffer.copy_to_host()[array.size :], 7)
    return [view.copy_to_host() for _, view in written]


def whole(rng, dtype, *shape):
    return rng.integers(-8, 9, shape, np.int8).astype(dtype)


def int32(*values):
    return np.array(values, np.int32)


# --- the residual stream ---------------------------------------------------------------------------------------------


def normed(x, parts, bias):
    """x and h after parts_norm on the device."""
    rows, d_model = x.shape
    kernel = ch13.parts_norm[ch13.parts_norm_launch(rows, d_model)]
    held = parts.ravel() if len(parts) else np.zeros(4, np.float32)

    def launch(parts, bias, x, h):
        kernel(x, parts, len(parts_given), bias, h, rows, d_model, EPS)

    parts_given = parts
    x, h = on_device(launch, (held, bias), [x.ravel(), np.full(x.size, np.nan, np.float16)])
    return x.reshape(rows, d_model), h.reshape(rows, d_model)


@pytest.mark.parametrize("rows, d_model, n_parts", [(1, 8, 1), (3, 72, 8), (5, 768, 4), (2, 776, 0), (1, 5000, 3)])
def test_parts_norm(rng, rows, d_model, n_parts):
    x, bias = rng.standard_normal((rows, d_model), np.float32), rng.standard_normal(d_model, np.float32)
    parts = rng.standard_normal((n_parts, rows, d_model), np.float32)
    found_x, found_h = normed(x, parts, bias)
    expected_x, expected_h = ch13.parts_norm_reference(x, parts, bias, EPS)
    np.testing.assert_allclose(found_x, expected_x, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(found_h.astype(float), expected_h.astype(float), rtol=2.0**-10, atol=2e-6)
    if not n_parts:
        np.testing.assert_array_equal(found_x, x)


def test_a_large_mean_costs_no_digits(rng):
    x = (3000 + rng.standard_normal((2, 768))).astype(np.float32)
    _, h = normed(x, np.zeros((0, 2, 768), np.float32), np.zeros(768, np.float32))
    _, expected = ch13.parts_norm_reference(x.astype(np.float64), np.zeros((0, 2, 768)), 0, EPS)
    np.testing.assert_allclose(h.astype(float), expected.astype(float), atol=2e-3)


@pytest.mark.parametrize("d", [264, 72])
def test_listed_rows_are_normed_and_x_stays(rng, d):
    x, bias = rng.standard_normal((6, d), np.float32), rng.standard_normal(d, np.float32)
    parts, listed = rng.standard_normal((4, 6, d), np.float32), int32(5, 0, 5, 2)
    kernel = ch13.parts_norm_of[ch13.parts_norm_launch(4, d)]

    def launch(parts, bias, listed, x, h):
        kernel(x, parts, 4, bias, listed, h, 6, d, EPS)

    found_x, h = on_device(launch, (parts.ravel(), bias, listed), [x.ravel(), np.full(4 * d, np.nan, np.float16)])
    np.testing.assert_array_equal(found_x, x.ravel())
    np.testing.assert_array_equal(h.reshape(4, d), normed(x, parts, bias)[1][listed])


# --- products --------------------------------------------------------------------------------------------------------


@every_tile
@pytest.mark.parametrize("M, N, K", [(1, 8, 8), (37, 72, 200), (70, 136, 264)])
def test_gelu(rng, tile, M, N, K):
    kernel = ch13.gemm_gelu_32 if tile == SMALL else ch13.gemm_gelu_64
    A, Bt, bias = whole(rng, np.float16, M, K), whole(rng, np.float16, N, K), whole(rng, np.float32, N)
    A[:, 1:] = np.where(rng.random((M, K - 1)) < 0.1, A[:, 1:], 0)  # sums where gelu is not a line

    def launch(A, Bt, bias, C):
        kernel[skinny_launch(M, N, tile)](A, Bt, bias, C, M, N, K)

    (C,) = on_device(launch, (A, Bt, bias / 8), [np.full(M * N, np.nan, np.float16)])
    expected = gelu_reference(A.astype(np.float64) @ Bt.T.astype(np.float64) + bias / 8)
    np.testing.assert_allclose(C.reshape(M, N).astype(float), expected, rtol=2.0**-11 + 1e-5, atol=1e-6)
    np.testing.assert_array_equal(ch13.gemm_gelu_reference(A, Bt, bias / 8), expected.astype(np.float16))


@every_tile
@pytest.mark.parametrize("n_head, n_kv_head, head_dim, rows", [(1, 1, 8, 1), (6, 2, 8, 37), (4, 2, 64, 70)])
def test_qkv(rng, tile, n_head, n_kv_head, head_dim, rows):
    """At places here and there, the first and the last among them, and rows of padding."""
    kernel = ch13.gemm_qkv_pages_32 if tile == SMALL else ch13.gemm_qkv_pages_64
    K, block_size, n_pages = 72, 8, 12
    q_width, kv_width = n_head * head_dim, n_kv_head * head_dim
    N = q_width + 2 * kv_width
    A, Bt = whole(rng, np.float16, rows, K), whole(rng, np.float16, N, K)
    bias = 10 * whole(rng, np.float32, N) + 1
    slots = 1 + rng.permutation(8 * n_pages - 2)[:rows].astype(np.int32)
    slots[0], slots[rows // 2] = 0, 8 * n_pages - 1
    slots[rows // 3] = -1 if rows > 1 else 5
    pages = [np.full(n_pages * n_kv_head * block_size * head_dim, -1, np.float16) for _ in range(2)]

    def launch(A, Bt, bias, slots, q, k, v):
        sizes = rows, K, n_head, n_kv_head, head_dim, block_size
        kernel[skinny_launch(rows, N, tile)](A, Bt, bias, q, k, v, slots, *sizes)

    q, *caches = on_device(launch, (A, Bt, bias, slots), [np.full(rows * q_width, np.nan, np.float16), *pages])
    y = (A.astype(np.float64) @ Bt.astype(np.float64).T + bias).astype(np.float16)
    np.testing.assert_array_equal(q.reshape(rows, q_width), y[:, :q_width])
    for cache, col in zip(caches, (q_width, q_width + kv_width)):
        expected = np.full((n_pages, n_kv_head, block_size, head_dim), -1, np.float16)
        for row, slot in enumerate(slots):
            if slot >= 0:
                part = y[row, col : col + kv_width].reshape(n_kv_head, head_dim)
                expected[slot // block_size, :, slot % block_size] = part
        np.testing.assert_array_equal(cache.reshape(expected.shape), expected)


def logits_of(tile, A, Bt, bias, room=3):
    """Logits, and the best of each half of a tile: there is ``room`` for more columns, which are not written."""
    (M, K), N = A.shape, len(Bt)
    kernel = ch13.gemm_logits_32 if tile == SMALL else ch13.gemm_logits_64
    launch = skinny_launch(M, N, tile)
    n_best = 2 * launch[0][1]
    best = np.full((M, n_best + room), -5, np.float32), np.full((M, n_best + room), -5, np.int32)

    def launched(A, Bt, bias, logits, best, best_token):
        kernel[launch](A, Bt, bias, logits, best, best_token, M, N, K)

    logits, *best = on_device(launched, (A, Bt, bias), [np.full((M, N), np.nan, np.float32), *best])
    assert all((array[:, n_best:] == -5).all() for array in best)
    return logits, *(array[:, :n_best] for array in best)


@every_tile
@pytest.mark.parametrize("M, N, K", [(1, 1, 8), (9, 257, 72), (70, 131, 200)])
def test_logits_and_the_best_of_each_half_tile(rng, tile, M, N, K):
    A, Bt, bias = whole(rng, np.float16, M, K), whole(rng, np.float16, N, K), whole(rng, np.float32, N)
    Bt[N // 3], bias[N // 3] = Bt[N - 1], bias[N - 1]  # equal logits
    if M > 4:
        bias[N // 2] = np.nan  # in every row; and a row of nothing but NaN
        A[4, 0] = np.nan
    logits, best, best_token = logits_of(tile, A, Bt, bias)
    expected = A.astype(np.float64) @ Bt.astype(np.float64).T + bias
    np.testing.assert_array_equal(logits, expected.astype(np.float32))
    half = tile // 2
    for i in range(best.shape[1]):
        part = expected[:, i * half : (i + 1) * half]
        shown = np.where(np.isnan(part), -INF, part)
        for row in range(M):
            if part.shape[1] and not np.isnan(part[row]).all():
                assert best[row, i] == shown[row].max() and best_token[row, i] == i * half + shown[row].argmax()
            else:
                assert best[row, i] == -INF and best_token[row, i] == N


def test_a_row_has_the_same_bits_in_any_tile(rng):
    A, Bt = (rng.standard_normal((n, 320)).astype(np.float16) for n in (70, 48))
    bias = rng.standard_normal(48, np.float32)
    large = logits_of(LARGE, A, Bt, bias)[0]
    np.testing.assert_array_equal(logits_of(SMALL, A, Bt, bias)[0], large)
    np.testing.assert_array_equal(logits_of(SMALL, A[41:42], Bt, bias)[0][0], large[41])


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    test_logits_and_the_best_of_each_half_tile(rng, SMALL, 9, 257, 72)
    test_qkv(rng, SMALL, 6, 2, 8, 37)
    test_gelu(rng, SMALL, 37, 72, 200)
    test_parts_norm(rng, 3, 72, 8)


def test_launches_refuse():
    for sizes, error in (((0, 8), "rows = 0"), ((1, 12), "d_model = 12"), ((1, 16392), "d_model = 16392")):
        with pytest.raises(ValueError, match=error):
            ch13.parts_norm_launch(*sizes)
