"""Chapter 13, a Llama's layer in few launches: norms, turned queries and keys, gated MLPs, against NumPy."""

import numpy as np
import pytest
from test_fused_rows import EPS, every_tile, int32, on_device, whole

from chapters.ch09_gemm.gemv_tensor import gemv_tensor_launch
from chapters.ch09_gemm.skinny import LARGE, SMALL, skinny_launch
from chapters.ch13_llm_ops import fused_llama as ch13
from chapters.ch13_llm_ops.fused_rows import parts_norm_launch
from chapters.ch13_llm_ops.kernels import swiglu_reference
from chapters.ch13_llm_ops.rope import rope_tables

INF = np.inf
BASE, N_POSITIONS = 1e4, 60


def product(h, W):
    return h.astype(np.float64) @ W.astype(np.float64).T


def spread(rng, rows, d_model):
    """Whole numbers that float16 holds, with a mean square of some 20 and a mean that is not 0."""
    return whole(rng, np.float32, rows, d_model) + np.float32(1)


# --- orders ----------------------------------------------------------------------------------------------------------


def test_neighbours():
    assert ch13.turned_order(2, 1, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 13, 14, 15]
    assert ch13.paired_order(3).tolist() == [0, 3, 1, 4, 2, 5]


# --- queries, keys and values ----------------------------------------------------------------------------------------

HEADS = [(1, 1, 8, 1), (6, 2, 8, 19), (9, 3, 64, 5), (4, 1, 128, 8)]


def turned(y, heads, positions, cos, sin):
    """Queries, keys and values of rows y, in the published order: (rows, heads of all kinds, head_dim), float64."""
    n_head, n_kv_head, head_dim = heads
    y = y.reshape(len(y), -1, head_dim)
    half, at = head_dim // 2, np.maximum(positions, 0)
    c, s = cos[at][:, None].astype(np.float64), sin[at][:, None].astype(np.float64)
    low, high = y[..., :half], y[..., half:]
    both = np.concatenate([low * c - high * s, low * s + high * c], axis=2)
    is_turned = np.arange(y.shape[1])[:, None] < n_head + n_kv_head
    return np.where(is_turned, both, y)


def places(rng, rows, n_places):
    """Here and there, the first and the last among them, and one row of padding."""
    slots = 1 + rng.permutation(n_places - 2)[:rows].astype(np.int32)
    slots[0], slots[rows // 2] = 0, n_places - 1
    slots[rows // 3] = -1 if rows > 1 else 5
    positions = rng.integers(0, N_POSITIONS, rows, np.int32)
    return slots, np.where(slots < 0, -1, positions).astype(np.int32)


def assert_turned(q, caches, y, heads, slots, positions, tables, wrong):
    """q and the caches, -1 where nothing was written, are y turned, to ``wrong`` and the rounding to float16."""
    n_head, n_kv_head, head_dim = heads
    expected = turned(y, heads, positions, *tables)
    close = {"rtol": 2.0**-11 + 1e-6, "atol": wrong}
    np.testing.assert_allclose(q.astype(float), expected[:, :n_head].reshape(len(y), -1), **close)
    for cache, first in zip(caches, (n_head, n_head + n_kv_head)):
        _, _, block_size, _ = cache.shape
        written = np.zeros((len(cache), block_size), bool)
        for row, slot in enumerate(slots):
            if slot >= 0:
                found = cache[slot // block_size, :, slot % block_size]
                np.testing.assert_allclose(found.astype(float), expected[row, first : first + n_kv_head], **close)
                written[slot // block_size, slot % block_size] = True
        assert (cache.transpose(0, 2, 1, 3)[~written] == -1).all()


@pytest.mark.parametrize("d_model", [72, 1544])
@pytest.mark.parametrize("n_head, n_kv_head, head_dim, rows", HEADS)
def test_gemv_qkv(rng, n_head, n_kv_head, head_dim, rows, d_model):
    heads, block_size, n_pages = (n_head, n_kv_head, head_dim), 8, 6
    N = (n_head + 2 * n_kv_head) * head_dim
    x, W = spread(rng, rows, d_model), whole(rng, np.float16, N, d_model)
    slots, positions = places(rng, rows, block_size * n_pages)
    tables, order = rope_tables(N_POSITIONS, head_dim, BASE), ch13.turned_order(*heads)
    pages = [np.full((n_pages, n_kv_head, block_size, head_dim), -1, np.float16) for _ in range(2)]

    def launch(x, W, slots, positions, cos, sin, q, k, v):
        kernel = ch13.gemv_rms_qkv_rope[gemv_tensor_launch(N, d_model, rows)]
        kernel(x, W, q, k, v, slots, positions, cos, sin, rows, d_model, *heads, block_size, EPS)

    q = np.full((rows, n_head * head_dim), np.nan, np.float16)
    inputs = x.ravel(), W[order], slots, positions, *tables
    q, *caches = on_device(launch, inputs, [q.ravel(), *pages])
    y = product(ch13.rms_reference(x, EPS), W)
    wrong = 2.0**-18 * product(np.abs(ch13.rms_reference(x, EPS)), np.abs(W)).max()
    assert_turned(q.reshape(rows, -1), caches, y, heads, slots, positions, tables, wrong)


@every_tile
@pytest.mark.parametrize("n_head, n_kv_head, head_dim, rows", [(1, 1, 8, 1), (6, 2, 8, 37), (9, 3, 64, 70)])
def test_gemm_qkv(rng, tile, n_head, n_kv_head, head_dim, rows):
    heads, K, block_size, n_pages = (n_head, n_kv_head, head_dim), 72, 8, 12
    N = (n_head + 2 * n_kv_head) * head_dim
    h, W = whole(rng, np.float16, rows, K), whole(rng, np.float16, N, K)
    slots, positions = places(rng, rows, block_size * n_pages)
    tables, order = rope_tables(N_POSITIONS, head_dim, BASE), ch13.turned_order(*heads)
    pages = [np.full(n_pages * n_kv_head * block_size * head_dim, -1, np.float16) for _ in range(2)]
    kernel = ch13.gemm_qkv_rope_32 if tile == SMALL else ch13.gemm_qkv_rope_64

    def launch(h, W, slots, positions, cos, sin, q, k, v):
        sizes = rows, K, *heads, block_size
        kernel[skinny_launch(rows, N, tile)](h, W, q, k, v, slots, positions, cos, sin, *sizes)

    q = np.full(rows * n_head * head_dim, np.nan, np.float16)
    q, *caches = on_device(launch, (h, W[order], slots, positions, *tables), [q, *pages])
    caches = [cache.reshape(n_pages, n_kv_head, block_size, head_dim) for cache in caches]
    y = product(h, W)
    assert_turned(q.reshape(rows, -1), caches, y, heads, slots, positions, tables, 2.0**-20 * np.abs(y).max())


# --- gated MLPs ------------------------------------------------------------------------------------------------------


def assert_gated(found, both):
    """silu of the first half times the second, to 2e-5 and a float16's rounding; both: float64."""
    gate, value = np.split(both, 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * value
    np.testing.assert_allclose(found.astype(float), expected, rtol=2.0**-11 + 2e-5, atol=2e-6 * np.abs(both).max() ** 2)


@pytest.mark.parametrize("d_ff, d_model, rows", [(1, 8, 1), (33, 264, 8), (70, 1544, 5), (13, 72, 19)])
def test_gemv_swiglu(rng, d_ff, d_model, rows):
    x, W = spread(rng, rows, d_model), whole(rng, np.float16, 2 * d_ff, d_model) / np.float16(32)

    def launch(x, W, out):
        kernel = ch13.gemv_rms_swiglu[gemv_tensor_launch(2 * d_ff, d_model, rows)]
        kernel(x, W, out, rows, d_ff, d_model, EPS)

    inputs = x.ravel(), W[ch13.paired_order(d_ff)]
    (found,) = on_device(launch, inputs, [np.full(rows * d_ff, np.nan, np.float16)])
    assert_gated(found.reshape(rows, d_ff), product(ch13.rms_reference(x, EPS), W))


@every_tile
@pytest.mark.parametrize("M, d_ff, K", [(1, 4, 8), (37, 41, 200), (70, 68, 264)])
def test_gemm_swiglu(rng, tile, M, d_ff, K):
    h, W = whole(rng, np.float16, M, K), whole(rng, np.float16, 2 * d_ff, K) / np.float16(64)
    kernel = ch13.gemm_swiglu_32 if tile == SMALL else ch13.gemm_swiglu_64

    def launch(h, W, out):
        kernel[skinny_launch(M, 2 * d_ff, tile)](h, W, out, M, d_ff, K)

    (found,) = on_device(launch, (h, W[ch13.paired_order(d_ff)]), [np.full(M * d_ff, np.nan, np.float16)])
    assert_gated(found.reshape(M, d_ff), product(h, W))
    gate, value = np.split(product(h, W).astype(np.float32), 2, axis=1)
    reference = ch13.swiglu_product_reference(h, W)
    np.testing.assert_array_equal(reference, swiglu_reference(gate, value).astype(np.float16))


# --- norms and logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, d_model, n_parts", [(1, 8, 1), (3, 72, 8), (5, 576, 4), (2, 776, 0), (1, 5000, 3)])
def test_parts_rms(rng, rows, d_model, n_parts):
    x, bias = rng.standard_normal((rows, d_model), np.float32), rng.standard_normal(d_model, np.float32)
    parts = rng.standard_normal((n_parts, rows, d_model), np.float32)
    held = parts.ravel() if n_parts else np.zeros(4, np.float32)
    listed = np.arange(rows, dtype=np.int32)[::-1].copy()
    kernels = (kernel[parts_norm_launch(rows, d_model)] for kernel in (ch13.parts_rms, ch13.parts_rms_of))
    all_rows, some_rows = kernels

    def launch(parts, bias, listed, x, h, same_x, turned_h):
        some_rows(same_x, parts, n_parts, bias, listed, turned_h, rows, d_model, EPS)
        all_rows(x, parts, n_parts, bias, h, rows, d_model, EPS)

    empty = np.full(x.size, np.nan, np.float16)
    outputs = on_device(launch, (held, bias, listed), [x.ravel(), empty, x.ravel(), empty])
    found_x, h, same_x, turned_h = (array.reshape(rows, d_model) for array in outputs)
    expected_x, expected_h = ch13.parts_rms_reference(x, parts, bias, EPS)
    np.testing.assert_allclose(found_x, expected_x, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(h.astype(float), expected_h.astype(float), rtol=2.0**-10, atol=2e-6)
    np.testing.assert_array_equal(same_x, x)
    np.testing.assert_array_equal(turned_h, h[listed])


@pytest.mark.parametrize("n_logits, vocab_size, d_model", [(1, 1, 8), (5, 77, 264), (9, 40, 1544)])
def test_logits_and_the_best_of_each_block(rng, n_logits, vocab_size, d_model):
    x, W = spread(rng, 12, d_model), whole(rng, np.float16, vocab_size, d_model)
    W[vocab_size // 3] = W[vocab_size - 1]  # equal logits
    listed = int32(*rng.permutation(12)[:n_logits])
    if n_logits > 1:
        x[listed[1], 0] = np.nan
    launch = gemv_tensor_launch(vocab_size, d_model, n_logits)
    blocks = launch[0][0]

    def launched(x, listed, W, logits, best, best_token):
        ch13.gemv_rms_logits[launch](x, listed, W, logits, best, best_token, n_logits, vocab_size, d_model, EPS)

    outputs = [np.full((n_logits, width), -5, kind) for width, kind in
               ((vocab_size, np.float32), (blocks, np.float32), (blocks, np.int32))]  # fmt: skip
    logits, best, best_token = on_device(launched, (x.ravel(), listed, W), outputs)
    exact = product(ch13.rms_reference(x, EPS)[listed], W)
    wrong = 2.0**-18 * np.nanmax(product(np.abs(ch13.rms_reference(x, EPS)[listed]), np.abs(W)))
    np.testing.assert_allclose(logits, exact, rtol=1e-6, atol=wrong)
    for i in range(blocks):
        part = np.where(np.isnan(logits[:, 16 * i : 16 * i + 16]), -INF, logits[:, 16 * i : 16 * i + 16])
        for row in range(n_logits):
            nothing = np.isnan(logits[row]).all()
            assert best[row, i] == part[row].max()
            assert best_token[row, i] == (vocab_size if nothing else 16 * i + part[row].argmax())


# --- together --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_model", [72, 1544])
def test_a_row_has_the_same_bits_in_any_company(rng, d_model):
    d_ff, rows = 41, 19
    x, W = rng.standard_normal((rows, d_model), np.float32), rng.standard_normal((2 * d_ff, d_model)).astype(np.float16)

    def of(x):
        n = len(x)
        kernel = ch13.gemv_rms_swiglu[gemv_tensor_launch(2 * d_ff, d_model, n)]
        launch = lambda x, W, out: kernel(x, W, out, n, d_ff, d_model, EPS)
        return on_device(launch, (x.ravel(), W), [np.full(n * d_ff, np.nan, np.float16)])[0].reshape(n, d_ff)

    together = of(x)
    for some in (np.s_[:1], np.s_[17:18], np.s_[3:12]):
        np.testing.assert_array_equal(of(x[some]), together[some])


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    test_gemv_qkv(rng, 6, 2, 8, 19, 72)
    test_gemm_qkv(rng, SMALL, 6, 2, 8, 37)
    test_gemm_qkv(rng, LARGE, 6, 2, 8, 37)
    test_gemv_swiglu(rng, 13, 72, 19)
    test_gemm_swiglu(rng, SMALL, 37, 41, 200)
    test_gemm_swiglu(rng, LARGE, 37, 41, 200)
    test_logits_and_the_best_of_each_block(rng, 5, 77, 264)
    test_parts_rms(rng, 3, 72, 8)
