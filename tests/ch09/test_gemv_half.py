"""Chapter 9: matrix times vector in float16: v4, v5 for groups of eight rows, with a residual, behind a layer norm."""

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
    return launched(gemv_tensor.gemv_v5_tensor_core, launch, (x.ravel(), W), out, rows, N, K)


def with_residual(a, W, bias, x, wide=False):
    """x after gemv_bias_residual, or gemv_wide_residual, on the device; a: (rows, K)."""
    (rows, K), N = a.shape, len(W)
    kernel, launch = gemv_tensor.gemv_bias_residual, gemv_tensor.gemv_residual_launch(N, K, rows)
    if wide:
        kernel, launch = gemv_tensor.gemv_wide_residual, gemv_tensor.gemv_tensor_launch(N, K, rows)
    return launched(kernel, launch, (a.ravel(), W, bias), x.ravel(), rows, N, K).reshape(x.shape)


def folded(W, bias, ln_weight, ln_bias):
    """fold_norm on the device: (folded, row_sums, folded_bias)."""
    N, d_model = W.shape
    inputs = [with_tail(array, np.nan)[1] for array in (W, bias, ln_weight, ln_bias)]
    outs = [np.full_like(W, np.nan), np.full(N, np.nan, np.float32), np.full(N, np.nan, np.float32)]
    buffers, views = zip(*[with_tail(out, 7) for out in outs])
    gemv_tensor.fold_norm[gemv_tensor.fold_norm_launch(N)](*inputs, *views, N, d_model)
    for buffer, out in zip(buffers, outs):
        np.testing.assert_array_equal(buffer.copy_to_host()[out.size :], 7)
    return [view.copy_to_host() for view in views]


def normalised(x, W, row_sums, bias, eps=EPS):
    """gemv_ln on the device."""
    (rows, d_model), N = x.shape, len(W)
    launch, out = gemv_tensor.gemv_tensor_launch(N, d_model, rows), np.full((rows, N), np.nan, np.float16)
    inputs = x.ravel(), W, row_sums, bias
    return launched(gemv_tensor.gemv_ln, launch, inputs, out, rows, N, d_model, np.float32(eps))


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
    rows = 13  # of which gemv_bias_residual takes four at a time, and a block eight
    x, W, bias = whole(rng, np.float16, rows, K), whole(rng, np.float16, N, K), whole(rng, np.float32, N)
    np.testing.assert_array_equal(product(x, W), gemv_tensor.gemv_tensor_reference(x, W))
    before = rng.integers(-(1 << 20), 1 << 20, (rows, N)).astype(np.float32)  # float16 holds none of the sums
    expected = gemv_tensor.gemv_bias_residual_reference(x, W, bias, before)
    np.testing.assert_array_equal(with_residual(x, W, bias, before), expected)
    np.testing.assert_array_equal(with_residual(x, W, bias, before, wide=True), expected)


@pytest.mark.parametrize("K", [9000, 264])
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


@pytest.mark.parametrize("N, d_model", NORM_SIZES)
def test_fold_norm(rng, N, d_model):
    """Exact where float16 holds the products; with other numbers rounded once, and summed in float32."""
    W, bias, ln_weight, ln_bias = (whole(rng, dtype, *shape) for dtype, shape in [
        (np.float16, (N, d_model)), (np.float32, (N,)), (np.float32, (d_model,)), (np.float32, (d_model,))
    ])  # fmt: skip
    for found, expected in zip(
        folded(W, bias, ln_weight, ln_bias), gemv_tensor.fold_norm_reference(W, bias, ln_weight, ln_bias)
    ):
        np.testing.assert_array_equal(found, expected)
    W, ln_weight, ln_bias = normals(rng, N, d_model).astype(np.float16), normals(rng, d_model), normals(rng, d_model)
    found, (into, sums, shift) = (
        folded(W, bias, ln_weight, ln_bias),
        gemv_tensor.fold_norm_reference(W, bias, ln_weight, ln_bias),
    )
    np.testing.assert_array_equal(found[0], into)
    allowed = d_model * UNIT * np.abs(into.astype(np.float64)).sum(axis=1)
    assert np.all(np.abs(found[1] - sums) <= allowed + UNIT * np.abs(sums))
    allowed = (d_model + 1) * UNIT * (np.abs(W.astype(np.float64)) @ np.abs(ln_bias) + np.abs(bias))
    assert np.all(np.abs(found[2] - shift) <= allowed + UNIT * np.abs(shift))


def test_fold_norm_in_place(rng):
    """W and bias may be what they become."""
    W, bias, norm = normals(rng, 33, 264).astype(np.float16), normals(rng, 33), normals(rng, 2, 264)
    device_W, device_bias, row_sums = cuda.to_device(W), cuda.to_device(bias), cuda.device_array(33, np.float32)
    outs = device_W, row_sums, device_bias
    kernel = gemv_tensor.fold_norm[gemv_tensor.fold_norm_launch(33)]
    kernel(device_W, device_bias, *map(cuda.to_device, norm), *outs, 33, 264)
    for found, expected in zip(outs, folded(W, bias, *norm)):
        np.testing.assert_array_equal(found.copy_to_host(), expected)


def assert_normalised(x, W, bias, eps):
    """gemv_ln within what its roundings can do: of x to float16, and of the sums, mean and scale in float32.

    The mean is as wrong as a sum of x; so is the variance, as a difference of mean square and squared mean, relative to
    both; the scale half of that, relative to itself.
    """
    x64, W64, d_model = x.astype(np.float64), W.astype(np.float64), x.shape[1]
    row_sums = W64.sum(axis=1).astype(np.float32)
    mean = x64.mean(axis=1, keepdims=True)
    variance = ((x64 - mean) ** 2).mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt(variance + eps)
    exact = (x64 - mean) * scale @ W64.T + bias
    rounded = np.abs(x64.astype(np.float16).astype(np.float64) - x64) @ np.abs(W64).T
    added = d_model * TENSOR_UNIT * (np.abs(x64) @ np.abs(W64).T)
    wrong_mean = (d_model + 2) * UNIT * np.abs(x64).mean(axis=1, keepdims=True) * np.abs(row_sums)
    wrong_scale = (d_model + 8) * UNIT * (1 + (x64**2).mean(axis=1, keepdims=True) * scale**2)
    allowed = (rounded + added + wrong_mean) * scale * (1 + wrong_scale) + wrong_scale * np.abs(exact - bias)
    allowed += 4 * UNIT * (np.abs(exact) + np.abs(bias)) + HALF_UNIT * (np.abs(exact) + allowed) + 2.0**-25
    assert np.all(np.abs(normalised(x, W, row_sums, bias, eps) - exact) <= 1.01 * allowed)


@pytest.mark.parametrize("rows", [1, 3, 8, 18])
@pytest.mark.parametrize("N, d_model", NORM_SIZES)
def test_behind_a_layer_norm(rng, N, d_model, rows):
    """Small whole numbers, which float16 holds: what is wrong is float32's alone, and the last rounding."""
    x, W, bias = whole(rng, np.float32, rows, d_model), whole(rng, np.float16, N, d_model), whole(rng, np.float32, N)
    assert_normalised(x, W, bias, EPS)


@pytest.mark.parametrize("d_model", [264, 2048])
def test_layer_norm_of_rows_of_all_kinds(rng, d_model):
    """Rows so small that eps counts, large, far from 0, constant, and with one far larger number."""
    x = normals(rng, 6, d_model)
    x[0] *= 1e-3
    x[1] *= 1e4
    x[2] += 300
    x[3] = 17.3
    x[4, 0] = 3000
    x[5, 9] = -3000
    assert_normalised(x, np.eye(d_model, dtype=np.float16), normals(rng, d_model), EPS)
    assert_normalised(x, normals(rng, 40, d_model).astype(np.float16), normals(rng, 40), EPS)


def test_folded_it_is_the_layer_norm_and_the_matrix(rng):
    """The parts together: against chapter 7's order, layer norm first, with weight and bias."""
    x, W, bias = normals(rng, 2, 264), normals(rng, 33, 264).astype(np.float16), normals(rng, 33)
    ln_weight, ln_bias = normals(rng, 2, 264)
    normal = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + EPS) * ln_weight + ln_bias
    expected = normal.astype(np.float64) @ W.astype(np.float64).T + bias
    found = normalised(x, *folded(W, bias, ln_weight, ln_bias))
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("op", ["product", "residual", "wide", "norm"])
def test_a_row_does_not_depend_on_the_others(rng, op):
    """1 to 8 rows, in either order, beside NaN, and again: the same bits for the same row."""
    W, bias = normals(rng, 40, 776).astype(np.float16), normals(rng, 40)
    x, before, row_sums = normals(rng, 8, 776), normals(rng, 8, 40), W.astype(np.float32).sum(axis=1)

    def run(rows):
        if op == "product":
            return product(x[rows].astype(np.float16), W)
        if op in ("residual", "wide"):
            return with_residual(x[rows].astype(np.float16), W, bias, before[rows], op == "wide")
        return normalised(x[rows], W, row_sums, bias)

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
    for wide in (False, True):
        np.testing.assert_array_equal(with_residual(x, W, bias, before, wide), expected)


# --- launches --------------------------------------------------------------------------------------------------------

TENSOR_LAUNCHES = [gemv_tensor.gemv_tensor_launch, gemv_tensor.gemv_residual_launch]


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
    assert gemv_tensor.gemv_tensor_launch(17, 8) == ((2, 1), 256) == gemv_tensor.gemv_tensor_launch(32, 9000, 8)
    assert gemv_tensor.gemv_residual_launch(17, 8) == ((3, 1), 512) == gemv_tensor.gemv_residual_launch(24, 9000, 8)
    assert gemv_tensor.gemv_tensor_launch(50257, 768, 9)[0] == (3142, 2)
    assert gemv_tensor.fold_norm_launch(17) == (3, 256)
    assert gemv_tensor.residual_product(1535, 8) == (gemv_tensor.gemv_bias_residual, ((192, 1), 512))
    assert gemv_tensor.residual_product(1536, 8, 9) == (gemv_tensor.gemv_wide_residual, ((96, 2), 256))


@pytest.mark.parametrize("launch", [gemv_half.gemv_half_launch, gemv_half.gemv_split, *TENSOR_LAUNCHES])
def test_launches_refuse(launch):
    for N, K, named in [
        (0, 8, r"shape \(0, 8\): .*at least 1 row"), (8, 0, r"shape \(8, 0\)"), (-1, 8, r"shape \(-1, 8\)"),
        (8, 12, "K = 12: .*multiples of 16 bytes; pad W and x"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=named):
            launch(N, K)


@pytest.mark.parametrize("launch", TENSOR_LAUNCHES)
@pytest.mark.parametrize("rows", [0, 8 * 65535 + 1])
def test_launches_refuse_rows(launch, rows):
    with pytest.raises(ValueError, match=f"rows = {rows}: .*1 to 524280 rows of x"):
        launch(8, 8, rows)


def test_fold_norm_refuses_no_rows():
    with pytest.raises(ValueError, match="N = 0: .*at least 1 row"):
        gemv_tensor.fold_norm_launch(0)
