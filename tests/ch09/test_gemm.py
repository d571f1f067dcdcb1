"""Chapter 9: every matrix product, float32 and float16, against one reference, on sizes that do not fit the tiles."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch09_gemm import kernels as ch09
from chapters.ch09_gemm import tensor_core

LAUNCH = {
    ch09.gemm_v1_register_tile: ch09.gemm_v1_launch,
    ch09.gemm_v2_vector_loads: ch09.gemm_launch,
    ch09.gemm_v3_double_buffer: ch09.gemm_launch,
    tensor_core.gemm_v4_half_storage: ch09.gemm_launch,
    tensor_core.gemm_v5_tensor_core: tensor_core.gemm_v5_launch,
}
HALF = [tensor_core.gemm_v4_half_storage, tensor_core.gemm_v5_tensor_core]
SHAPES = [  # M, N, K: no multiples of anything; of 4 or 8 only; whole tiles; just beside them
    (1, 1, 1), (1, 33, 7), (31, 1, 16), (17, 15, 31), (33, 127, 33), (3, 1025, 9), (129, 5, 1025),
    (1, 4, 4), (5, 12, 20), (127, 132, 36), (7, 8, 8), (65, 136, 40), (130, 260, 24),
    (128, 128, 8), (64, 128, 64), (128, 256, 32), (256, 128, 48),
]  # fmt: skip
TAIL = 40  # elements behind each array

every_kernel = pytest.mark.parametrize("kernel", LAUNCH, ids=lambda k: k.py_func.__name__)


def dtype_of(kernel):
    return np.float16 if kernel in HALF else np.float32


def product(kernel, A, B):
    """A @ B on the device. NaN lies behind A and B and 7 behind C; checks that it is still there."""
    (M, K), N = A.shape, B.shape[1]
    nan, seven = np.full(TAIL, np.nan, A.dtype), np.full(TAIL, 7, np.float32)
    device_a = cuda.to_device(np.concatenate([A.ravel(), nan]))[: M * K].reshape(M, K)
    device_b = cuda.to_device(np.concatenate([B.ravel(), nan]))[: K * N].reshape(K, N)
    buffer = cuda.to_device(np.concatenate([np.full(M * N, np.nan, np.float32), seven]))
    device_c = buffer[: M * N].reshape(M, N)
    kernel[LAUNCH[kernel](M, N)](device_a, device_b, device_c, M, N, K)
    np.testing.assert_array_equal(buffer.copy_to_host()[M * N :], 7)
    return device_c.copy_to_host()


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
    unit = 2.0**-22 if kernel is tensor_core.gemm_v5_tensor_core else 2.0**-24
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


@pytest.mark.parametrize("kernel", [ch09.gemm, tensor_core.gemm_half], ids=lambda k: k.py_func.__name__)
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
    assert np.prod(launch(1, 1)[1]) == 256
    for M, N in [(0, 5), (5, 0), (-1, 5)]:
        with pytest.raises(ValueError, match="at least 1"):
            launch(M, N)
    assert launch(65535 * tile, 1)[0] == (1, 65535)
    with pytest.raises(ValueError, match=f"M = {65535 * tile + 1}: .*at most 65535"):
        launch(65535 * tile + 1, 1)
