"""Chapter 9: matrix times vector in float16: v4, v5 for 1 to 8 rows, with a residual, and behind a layer norm."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch09_gemm import gemv_half, gemv_tensor

SIZES = [(N, K) for N in (1, 33, 130, 768) for K in (8, 264, 768, 3072, 9000)]
SIZES += [(2119, 1544), (6500, 8)]  # tiles of 16 rows of W; more of them than blocks
NORM_SIZES = [(N, d_model) for N in (1, 33, 130, 768) for d_model in (8, 264, 768)] + [(5, 2048), (6500, 8)]
EPS = np.float32(1e-5)
TAIL = 40  # elements behind each array
# Roundings: to float16, to float32, and where a tensor core adds, which may drop bits (see test_gemm.py)
HALF_UNIT, UNIT, TENSOR_UNIT = 2.0**-11, 2.0**-24, 2.0**-22


def with_tail(array, fill):
    """A device copy of ``array`` with more elements behind it: ``(buffer, view of the array's shape)``."""
    buffer = cuda.to_device(np.concatenate([array.ravel(), np.full(TAIL, fill, array.dtype)]))
    return buffer, buffer[: array.size].reshape(array.shape)


def launched(kernel, launch, inputs, out, *sizes):
    """What ``kernel`` makes of ``out``. NaN lies behind the inputs and 7 behind out; checks that it is still there."""
    buffer, device_out = with_tail(out, 7)
    kernel[launch](*[with_tail(array, np.nan)[1] for array in inputs], device_out, *sizes)
    np.testing.assert_array_equal(buffer.copy_to_host()[out.size :], 7)
    return device_out.copy_to_host()


def gemv(x, W):
    """gemv_v4_half on the device."""
    N, K = W.shape
    out, split = np.full(N, np.nan, np.float32), gemv_half.gemv_split(N, K)
    return launched(gemv_half.gemv_v4_half, gemv_half.gemv_half_launch(N, K), (x, W), out, N, K, split)


def product(x, W):
    """gemv_v5_tensor_core on the device; x: (rows, K)."""
    (rows, K), N = x.shape, len(W)
    launch, out = gemv_tensor.gemv_tensor_launch(N, K, rows), np.full((rows, N), np.nan, np.float32)
    inputs = x.ravel(), W
    return launched(gemv_tensor.gemv_v5_tensor_core, launch, inputs, out, rows, N, K, gemv_tensor.gemv_tile(N))


def with_residual(a, W, bias, x):
    """x after gemv_bias_residual on the device; a: (rows, K)."""
    (rows, K), N = a.shape, len(W)
    launch, inputs = gemv_tensor.gemv_block_launch(N, K, rows), (a.ravel(), W, bias)
    return launched(gemv_tensor.gemv_bias_residual, launch, inputs, x, rows, N, K, gemv_tensor.gemv_tile(N))


def normalised(x, ln_weight, ln_bias, W, bias, eps=EPS):
    """gemv_ln on the device."""
    (rows, d_model), N = x.shape, len(W)
    launch, out = gemv_tensor.gemv_ln_launch(N, d_model, rows), np.full((rows, N), np.nan, np.float16)
    inputs, sizes = (x, ln_weight, ln_bias, W, bias), (rows, N, d_model, gemv_tensor.gemv_tile(N))
    return launched(gemv_tensor.gemv_ln, launch, inputs, out, *sizes, np.float32(eps))


def whole(rng, dtype, *shape):
    """Integers so small that sums of products are exact: any mistake shows as a difference."""
    return rng.integers(-8, 9, shape, np.int8).astype(dtype)


def normals(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


# --- the matrix alone, and with a residual ---------------------------------------------------------------------------


@pytest.mark.parametrize("N, K", SIZES)
def test_gemv_is_exact_on_whole_numbers(rng, N, K):
    x, W = whole(rng, np.float16, K), whole(rng, np.float16, N, K)
    np.testing.assert_array_equal(gemv(x, W), gemv_half.gemv_half_reference(x, W))


@pytest.mark.parametrize("N, K", SIZES)
def test_rows_are_exact_on_whole_numbers(rng, N, K):
    rows = 3 if K < 9000 else 1  # of that length shared memory has room for one
    x, W, bias = whole(rng, np.float16, rows, K), whole(rng, np.float16, N, K), whole(rng, np.float32, N)
    np.testing.assert_array_equal(product(x, W), gemv_tensor.gemv_tensor_reference(x, W))
    before = rng.integers(-(1 << 20), 1 << 20, (rows, N)).astype(np.float32)  # float16 holds none of the sums
    expected = gemv_tensor.gemv_bias_residual_reference(x, W, bias, before)
    np.testing.assert_array_equal(with_residual(x, W, bias, before), expected)


@pytest.mark.parametrize("K", [264, 9000])
def test_rounding_stays_within_the_bound_of_a_float32_sum(rng, K):
    """Products of two float16 are exact in float32; K additions, of bias and x two more: Higham 2002, section 3.1."""
    x, W = normals(rng, 1, K).astype(np.float16), normals(rng, 33, K).astype(np.float16)
    x64, W64 = x.astype(np.float64), W.astype(np.float64)
    bias, before = normals(rng, 33), normals(rng, 1, 33)
    exact, size = x64 @ W64.T, np.abs(x64) @ np.abs(W64).T
    assert np.all(np.abs(gemv(x[0], W) - exact[0]) <= K * UNIT * size[0])
    assert np.all(np.abs(product(x, W) - exact) <= K * TENSOR_UNIT * size)
    allowed = (K + 2) * TENSOR_UNIT * (size + np.abs(bias) + np.abs(before))
    assert np.all(np.abs(with_residual(x, W, bias, before) - (before + (exact + bias))) <= allowed)


# --- behind a layer norm ---------------------------------------------------------------------------------------------


def whole_rows(rng, rows, d_model):
    """Rows whose layer norm, with eps 0, is 1 and -1, half of each: as whole numbers of several sizes."""
    signs = rng.permuted(np.tile(np.int8([1, -1]), (rows, d_model // 2)), axis=1)
    return (rng.integers(-5, 6, (rows, 1)) + 2.0 ** rng.integers(-2, 4, (rows, 1)) * signs).astype(np.float32)


def whole_norm(rng, d_model):
    """Weight and bias that make odd numbers of 1 and -1: never 0, so float16 hides whatever float32 has rounded."""
    odd, even = 2 * rng.integers(-4, 4, d_model) + 1, 2 * rng.integers(-4, 5, d_model)
    return odd.astype(np.float32), even.astype(np.float32)


@pytest.mark.parametrize("N, d_model", NORM_SIZES)
def test_behind_a_layer_norm_it_is_exact_on_whole_numbers(rng, N, d_model):
    """Behind the layer norm nothing is rounded but the result; with such a bias few results are float16."""
    x, W = whole_rows(rng, 3, d_model), whole(rng, np.float16, N, d_model)
    norm, bias = whole_norm(rng, d_model), 700 * whole(rng, np.float32, N) + 1
    found = normalised(x, *norm, W, bias, eps=0)
    np.testing.assert_array_equal(found, gemv_tensor.gemv_ln_reference(x, *norm, W, bias, 0))


@pytest.mark.parametrize("d_model", [264, 2048])
def test_layer_norm_rounds_once_to_float16(rng, d_model):
    """W is the identity. Rows so small that eps counts, large, far from 0, constant, and with one far larger number."""
    x = normals(rng, 6, d_model)
    x[0] *= 1e-3
    x[1] *= 1e4
    x[2] += 300
    x[3] = 17.3
    x[4, 0] = 3000  # in front, where the kernel takes the distance from
    x[5, 9] = -3000
    ln_weight, ln_bias = normals(rng, d_model), normals(rng, d_model)
    mean, deviation = (f(x, axis=1, dtype=np.float64, keepdims=True) for f in (np.mean, np.std))
    deviation = np.sqrt(deviation**2 + np.float64(EPS))
    scaled = (x - mean) / deviation * ln_weight
    # In float32: a scale made of two sums, whose difference is as exact as 1 is to (mean / deviation)^2 of the
    # distances to the row's first number, at most d_model; a distance as exact as that number; and the two operations.
    distance = np.abs(x[:, :1] - mean)
    before = (16 + 8 * (distance / deviation) ** 2) * UNIT * np.abs(scaled)
    before += 4 * UNIT * (np.abs(ln_weight) * (distance + np.abs(x)) / deviation + np.abs(ln_bias))
    expected = scaled + ln_bias
    allowed = 1.01 * (HALF_UNIT * np.abs(expected) + 2.0**-25 + before)
    found = normalised(x, ln_weight, ln_bias, np.eye(d_model, dtype=np.float16), np.zeros(d_model, np.float32))
    assert np.all(np.abs(found - expected) <= allowed)


@pytest.mark.parametrize("op", ["product", "residual", "norm"])
def test_a_row_does_not_depend_on_the_others(rng, op):
    """1 to 8 rows, in either order, beside NaN, and again: the same bits for the same row."""
    W, bias = normals(rng, 40, 776).astype(np.float16), normals(rng, 40)
    x, before, (ln_weight, ln_bias) = normals(rng, 8, 776), normals(rng, 8, 40), normals(rng, 2, 776)

    def run(rows):
        if op == "product":
            return product(x[rows].astype(np.float16), W)
        if op == "residual":
            return with_residual(x[rows].astype(np.float16), W, bias, before[rows])
        return normalised(x[rows], ln_weight, ln_bias, W, bias)

    together = run(np.arange(8))
    np.testing.assert_array_equal(run(np.arange(8)), together)
    np.testing.assert_array_equal(run(np.arange(8)[::-1]), together[::-1])
    for rows in range(1, 8):
        np.testing.assert_array_equal(run(np.arange(rows)), together[:rows])
    x[3] = np.nan
    expected = together.copy()
    expected[3] = np.nan
    np.testing.assert_array_equal(run(np.arange(8)), expected)


def test_a_row_of_the_matrix_does_not_depend_on_the_others(rng):
    x, W = normals(rng, 776).astype(np.float16), normals(rng, 40, 776).astype(np.float16)
    together, by_rows = gemv(x, W), product(x[None], W)[0]
    np.testing.assert_array_equal(gemv(x, W), together)
    W[12] = np.nan
    for run, clean in ((gemv(x, W), together), (product(x[None], W)[0], by_rows)):
        expected = clean.copy()
        expected[12] = np.nan
        np.testing.assert_array_equal(run, expected)


@pytest.mark.parametrize("N, K, rows", [(9, 264, 1), (6341, 8, 3)])
def test_no_index_outside_the_arrays(rng, monkeypatch, N, K, rows):
    """v5 loads as the residual's kernel does; the layer norm is looked at where it stands in front of more, chapter 13.

    The CPU backend raises at any; on a GPU compute-sanitizer is the tool.
    """
    monkeypatch.setenv("MINI_CHECK", "1")
    x, W, bias = whole(rng, np.float16, rows, K), whole(rng, np.float16, N, K), whole(rng, np.float32, N)
    np.testing.assert_array_equal(gemv(x[0], W), gemv_half.gemv_half_reference(x[0], W))
    before = normals(rng, rows, N).round()
    expected = gemv_tensor.gemv_bias_residual_reference(x, W, bias, before)
    np.testing.assert_array_equal(with_residual(x, W, bias, before), expected)


# --- launches --------------------------------------------------------------------------------------------------------

TENSOR_LAUNCHES = [
    gemv_tensor.gemv_tensor_launch, gemv_tensor.gemv_block_launch,
    gemv_tensor.gemv_ln_launch, gemv_tensor.gemv_ln_tensor_launch,
]  # fmt: skip


@pytest.mark.parametrize(
    "N, K, split, grid",
    [
        (1, 8, 0, 1), (50257, 768, 0, 528), (768, 768, 1, 192), (130, 264, 1, 33), (768, 1024, 1, 192),
        (768, 1032, 1, 192), (4000, 1032, 1, 528), (768, 3072, 2, 384), (1, 9000, 3, 1), (9, 9000, 3, 9),
    ],
)  # fmt: skip
def test_warps_that_share_a_row(N, K, split, grid):
    assert gemv_half.gemv_split(N, K) == split
    assert gemv_half.gemv_half_launch(N, K) == (grid, 256)


def test_tiles():
    assert [gemv_tensor.gemv_tile(N) for N in (1, 2111, 2112)] == [8, 8, 16]
    for launch in TENSOR_LAUNCHES:
        assert launch(9, 8)[:3] == (2, 256, 0)
        assert launch(2111, 8, 8)[0] == 264 and launch(2113, 8)[0] == 133
        in_turn = launch in (gemv_tensor.gemv_tensor_launch, gemv_tensor.gemv_ln_tensor_launch)
        assert launch(50257, 768)[0] == (gemv_tensor.BLOCKS_MAX if in_turn else 3142)
        assert launch(9, 2048, 8)[3] > launch(9, 2048, 1)[3] > launch(9, 1024, 1)[3] > 2 * (8 + 1) * 1024  # W's tile, x


@pytest.mark.parametrize("launch", [gemv_half.gemv_half_launch, gemv_half.gemv_split, *TENSOR_LAUNCHES])
def test_launches_refuse(launch):
    for N, K, named in [
        (0, 8, r"shape \(0, 8\): .*at least 1 row"), (8, 0, r"shape \(8, 0\)"), (-1, 8, r"shape \(-1, 8\)"),
        (8, 12, "K = 12: .*multiples of 16 bytes; pad W and x"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=named):
            launch(N, K)


@pytest.mark.parametrize("launch", TENSOR_LAUNCHES)
@pytest.mark.parametrize("rows", [0, 9])
def test_launches_refuse_rows(launch, rows):
    with pytest.raises(ValueError, match=f"rows = {rows}: .*1 to 8 rows of x; for more there is gemm_bias"):
        launch(8, 8, rows)


def test_launch_refuses_what_is_too_long():
    for launch in (gemv_tensor.gemv_ln_launch, gemv_tensor.gemv_ln_tensor_launch):
        assert launch(8, 2048, 8)
        with pytest.raises(ValueError, match="d_model = 2056: .*at most 2048; .*layernorm_row first"):
            launch(8, 2056)
    for launch in TENSOR_LAUNCHES:
        with pytest.raises(ValueError, match="K = 9000, rows = 3: .* of shared memory, of 163840; .*gemv_v4_half"):
            launch(8, 9000, 3)
    assert gemv_tensor.gemv_ln_launch(50257, 2048, 8)
    with pytest.raises(ValueError, match="K = 2048, rows = 8: "):  # two tiles of 16 rows
        gemv_tensor.gemv_ln_tensor_launch(50257, 2048, 8)
    with pytest.raises(ValueError, match="N = 0: .*at least 1"):
        gemv_tensor.gemv_tile(0)
