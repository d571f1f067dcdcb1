"""Chapter 9: every matrix product, float32 and float16, against one reference, on sizes that do not fit the tiles."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch09_gemm import hopper, pipeline, tensor_core
from chapters.ch09_gemm import kernels as ch09
from common import BACKEND
from common.ptx_hopper import tile_map

LAUNCH = {
    ch09.gemm_v1_register_tile: ch09.gemm_v1_launch,
    ch09.gemm_v2_vector_loads: ch09.gemm_launch,
    ch09.gemm_v3_double_buffer: ch09.gemm_launch,
    tensor_core.gemm_v4_half_storage: ch09.gemm_launch,
    tensor_core.gemm_v5_tensor_core: tensor_core.gemm_v5_launch,
    pipeline.gemm_v6_pipeline: pipeline.gemm_v6_launch,
}
HOPPER = [hopper.gemm_v7_warpgroup, hopper.gemm_v8_tma]
ON_TENSOR_CORES = [tensor_core.gemm_v5_tensor_core, pipeline.gemm_v6_pipeline, *HOPPER]
HALF = [tensor_core.gemm_v4_half_storage, *ON_TENSOR_CORES]
TRANSPOSED = [pipeline.gemm_v6_pipeline, *HOPPER]  # these take B.T
SHAPES = [  # M, N, K: no multiples of anything; of 4 or 8 only; whole tiles; just beside them
    (1, 1, 1), (1, 33, 7), (31, 1, 16), (17, 15, 31), (33, 127, 33), (3, 1025, 9), (129, 5, 1025),
    (1, 4, 4), (5, 12, 20), (127, 132, 36), (7, 8, 8), (65, 136, 40), (130, 260, 24),
    (128, 128, 8), (64, 128, 64), (128, 256, 32), (256, 128, 48),
]  # fmt: skip
TAIL = 40  # elements behind each array

every_kernel = pytest.mark.parametrize("kernel", LAUNCH, ids=lambda k: k.py_func.__name__)


def dtype_of(kernel):
    return np.float16 if kernel in HALF else np.float32


def with_tail(array, fill):
    """A device copy of ``array`` with more elements behind it: ``(buffer, view of the array's shape)``."""
    buffer = cuda.to_device(np.concatenate([array.ravel(), np.full(TAIL, fill, array.dtype)]))
    return buffer, buffer[: array.size].reshape(array.shape)


def launched(kernel, launch, inputs, C, sizes):
    """What ``kernel`` makes of C. NaN lies behind the inputs and 7 behind C; checks that it is still there."""
    buffer, device_c = with_tail(C, 7)
    arrays = [with_tail(array, np.nan)[1] for array in inputs]
    kernel[launch](*(hopper.gemm_v8_maps(*arrays) if kernel is hopper.gemm_v8_tma else arrays), device_c, *sizes)
    np.testing.assert_array_equal(buffer.copy_to_host()[C.size :], 7)
    return device_c.copy_to_host()


def product(kernel, A, B):
    """A @ B on the device."""
    (M, K), N = A.shape, B.shape[1]
    launch = hopper.gemm_v7_launch if kernel in HOPPER else LAUNCH[kernel]
    inputs = A, np.ascontiguousarray(B.T) if kernel in TRANSPOSED else B
    return launched(kernel, launch(M, N), inputs, np.full((M, N), np.nan, np.float32), (M, N, K))


def whole_numbers(rng, dtype, *shape):
    """Integers so small that sums of products are exact: any mistake shows as a difference."""
    return rng.integers(-8, 9, shape).astype(dtype)


@every_kernel
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_any_shape_is_exact_on_whole_numbers(rng, kernel, M, N, K):
    A, B = whole_numbers(rng, dtype_of(kernel), M, K), whole_numbers(rng, dtype_of(kernel), K, N)
    np.testing.assert_array_equal(product(kernel, A, B), ch09.gemm_reference(A, B))


@every_kernel
@pytest.mark.parametrize("K", [301, 320])
def test_rounding_stays_within_the_bound_of_a_float32_sum(rng, kernel, K):
    A, B = rng.standard_normal((33, K)).astype(dtype_of(kernel)), rng.standard_normal((K, 48)).astype(dtype_of(kernel))
    A64, B64 = A.astype(np.float64), B.astype(np.float64)
    # Higham 2002, section 3.1; a tensor core may drop bits instead of rounding, and does so with few bits to spare
    unit = 2.0**-22 if kernel in ON_TENSOR_CORES else 2.0**-24
    assert np.all(np.abs(product(kernel, A, B) - A64 @ B64) <= (K + 1) * unit * (np.abs(A64) @ np.abs(B64)))


CHECKED = [ch09.gemm_v1_register_tile, ch09.gemm_v3_double_buffer, tensor_core.gemm_v5_tensor_core]  # v2, v4 as v3


@pytest.mark.parametrize("kernel", CHECKED, ids=lambda k: k.py_func.__name__)
@pytest.mark.parametrize("M, N, K", [(17, 31, 33), (20, 40, 24)])
def test_no_index_outside_the_arrays(rng, monkeypatch, kernel, M, N, K):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    A, B = whole_numbers(rng, dtype_of(kernel), M, K), whole_numbers(rng, dtype_of(kernel), K, N)
    np.testing.assert_array_equal(product(kernel, A, B), ch09.gemm_reference(A, B))


@every_kernel
@pytest.mark.parametrize("K", [35, 40])
def test_rows_and_columns_stay_apart(rng, kernel, K):
    """A NaN in a row of A or a column of B spoils that row or column of C and nothing else."""
    A, B = whole_numbers(rng, dtype_of(kernel), 70, K), whole_numbers(rng, dtype_of(kernel), K, 72)
    expected = ch09.gemm_reference(A, B)
    A[66, K - 1] = B[0, 71] = np.nan
    expected[66, :] = expected[:, 71] = np.nan
    np.testing.assert_array_equal(product(kernel, A, B), expected)


@pytest.mark.parametrize(
    "kernel", [ch09.gemm, tensor_core.gemm_half, pipeline.gemm_v6_pipeline], ids=lambda k: k.__name__
)
def test_a_row_of_the_product_does_not_depend_on_the_other_rows(rng, kernel):
    A, B = (
        rng.standard_normal((150, 70)).astype(dtype_of(kernel)),
        rng.standard_normal((70, 33)).astype(dtype_of(kernel)),
    )
    np.testing.assert_array_equal(product(kernel, A[:18], B), product(kernel, A, B)[:18])


@pytest.mark.parametrize("launch", {f.__name__: f for f in LAUNCH.values()}.values())
def test_launches(launch):
    tile = 64 if launch is ch09.gemm_v1_launch else 128
    assert launch(1, 2 * tile)[0] == (2, 1) and launch(2 * tile + 1, 1)[0] == (1, 3)
    assert np.prod(launch(1, 1)[1]) == (128 if launch is pipeline.gemm_v6_launch else 256)
    for M, N in [(0, 5), (5, 0), (-1, 5)]:
        with pytest.raises(ValueError, match="at least 1"):
            launch(M, N)
    assert launch(65535 * tile, 1)[0] == (1, 65535)
    with pytest.raises(ValueError, match=f"M = {65535 * tile + 1}: .*at most 65535"):
        launch(65535 * tile + 1, 1)


# --- what follows a product, fused into it ---------------------------------------------------------------------------

FUSED_SHAPES = [  # M, N, K: odd and even N, K a multiple of 8 or not; one tile and several
    (1, 1, 1), (5, 6, 35), (130, 33, 17), (33, 130, 72), (129, 257, 40), (128, 256, 64),
]  # fmt: skip
fused_shapes = pytest.mark.parametrize("M, N, K", FUSED_SHAPES)


def whole_operands(rng, M, N, K):
    """A, Bt and a bias so large that most sums with it are no float16: 4097 lies between two."""
    A, Bt = whole_numbers(rng, np.float16, M, K), whole_numbers(rng, np.float16, N, K)
    return A, Bt, rng.integers(-6000, 6000, N).astype(np.float32)


def with_bias(A, Bt, bias):
    """gemm_bias on the device."""
    (M, K), N = A.shape, len(bias)
    C = np.full((M, N), np.nan, np.float16)
    return launched(pipeline.gemm_bias, pipeline.gemm_bias_launch(M, N), (A, Bt, bias), C, (M, N, K))


def with_residual(A, Bt, bias, x):
    """x after gemm_bias_residual on the device."""
    (M, K), N = A.shape, len(bias)
    launch = pipeline.gemm_bias_launch(M, N)
    return launched(pipeline.gemm_bias_residual, launch, (A, Bt, bias), x, (M, N, K))


@fused_shapes
def test_bias_is_added_before_the_one_rounding(rng, M, N, K):
    A, Bt, bias = whole_operands(rng, M, N, K)
    found = with_bias(A, Bt, bias)
    np.testing.assert_array_equal(found, pipeline.gemm_bias_reference(A, Bt, bias))
    if M * N > 1000:  # a kernel that rounds twice would differ
        product = (A.astype(np.float64) @ Bt.astype(np.float64).T).astype(np.float16)
        assert (found != product + bias.astype(np.float16)).any()


@fused_shapes
def test_residual_gets_product_and_bias(rng, M, N, K):
    A, Bt, bias = whole_operands(rng, M, N, K)
    x = rng.integers(-(1 << 20), 1 << 20, (M, N)).astype(np.float32)  # float16 holds none of the sums
    found = with_residual(A, Bt, bias, x)
    np.testing.assert_array_equal(found, pipeline.gemm_bias_residual_reference(A, Bt, bias, x))


@pytest.mark.parametrize("N", [71, 72])
def test_fused_rows_and_columns_stay_apart(rng, N):
    """NaN in a row of A, or as the bias of a column, spoils that row or column and nothing else."""
    A, Bt, bias = whole_operands(rng, 70, N, 35)
    x = whole_numbers(rng, np.float32, 70, N)
    expected = pipeline.gemm_bias_reference(A, Bt, bias), pipeline.gemm_bias_residual_reference(A, Bt, bias, x)
    A[66, 34] = bias[N - 1] = np.nan
    for found, clean in zip((with_bias(A, Bt, bias), with_residual(A, Bt, bias, x)), expected):
        clean[66, :] = clean[:, N - 1] = np.nan
        np.testing.assert_array_equal(found, clean)


@pytest.mark.parametrize("M, N, K", [(17, 31, 33), (20, 40, 24)])
def test_fused_has_no_index_outside_the_arrays(rng, monkeypatch, M, N, K):
    monkeypatch.setenv("MINI_CHECK", "1")  # v6 and the residual's kernel load with the same lines, v7 much alike
    A, Bt, bias = whole_operands(rng, M, N, K)
    np.testing.assert_array_equal(with_bias(A, Bt, bias), pipeline.gemm_bias_reference(A, Bt, bias))


# --- one family of GPUs ----------------------------------------------------------------------------------------------


@pytest.fixture(params=HOPPER, ids=lambda k: k.py_func.__name__)
def warpgroup(request):
    """v7 and v8, if the device has their instruction: the CPU backend always does."""
    if BACKEND == "gpu" and cuda.get_current_device().compute_capability[:2] != (9, 0):
        pytest.skip("wgmma is an instruction of sm_90 only")
    return request.param


@pytest.mark.parametrize("M, N, K", [(1, 1, 8), (5, 257, 264), (129, 33, 72), (63, 300, 56), (128, 256, 320)])
def test_warpgroup_is_exact_on_whole_numbers(rng, warpgroup, M, N, K):
    """Less than a tile of 64 columns, one, and more of them than the ring of four holds."""
    A, B = whole_numbers(rng, np.float16, M, K), whole_numbers(rng, np.float16, K, N)
    np.testing.assert_array_equal(product(warpgroup, A, B), ch09.gemm_reference(A, B))


def test_warpgroup_rounding_stays_within_the_bound_of_a_float32_sum(rng, warpgroup):
    A, B = rng.standard_normal((2, 320, 40)).astype(np.float16)
    A64, B64 = A.T.astype(np.float64), B.astype(np.float64)
    bound = 321 * 2.0**-22 * (np.abs(A64) @ np.abs(B64))  # as above
    assert np.all(np.abs(product(warpgroup, np.ascontiguousarray(A.T), B) - A64 @ B64) <= bound)


def test_warpgroup_keeps_rows_and_columns_apart(rng, warpgroup):
    A, B = whole_numbers(rng, np.float16, 130, 40), whole_numbers(rng, np.float16, 40, 260)
    expected = ch09.gemm_reference(A, B)
    A[66, 39] = B[0, 257] = np.nan
    expected[66, :] = expected[:, 257] = np.nan
    found = product(warpgroup, A, B)
    np.testing.assert_array_equal(found, expected)
    alone = product(warpgroup, A[:18], B)
    np.testing.assert_array_equal(alone, found[:18])


def test_warpgroup_launch():
    assert hopper.gemm_v7_launch(129, 257) == ((2, 2), 256, 0, 196608)
    for M, N in [(0, 5), (5, 0), (-1, 5)]:
        with pytest.raises(ValueError, match="at least 1"):
            hopper.gemm_v7_launch(M, N)
    assert hopper.gemm_v7_launch(65535 * 128, 1)[0] == (1, 65535)
    with pytest.raises(ValueError, match="M = 8388481: .*at most 65535"):
        hopper.gemm_v7_launch(65535 * 128 + 1, 1)


def test_tile_map_refuses_what_the_copies_cannot_take():
    for X, tile_rows, message in [
        (np.zeros((4, 8), np.float32), 64, "float32 of shape .4, 8.: .*float16"),
        (np.zeros(8, np.float16), 64, "shape .8,.: .*float16"),
        (np.zeros((0, 8), np.float16), 64, "1 row at least"),
        (np.zeros((4, 12), np.float16), 64, "K = 12: .*multiple of 8"),
        (np.zeros((4, 8), np.float16), 0, "tile_rows = 0: .*1 to 256"),
        (np.zeros((4, 8), np.float16), 257, "tile_rows = 257: .*1 to 256"),
    ]:
        with pytest.raises(ValueError, match=message):
            tile_map(X, tile_rows)
