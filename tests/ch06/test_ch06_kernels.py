"""Chapter 6: every version of the product against one reference, on sizes that do not fit the tile."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch06_shared_tile import kernels as ch06

ANY_SHAPE = [ch06.matmul_v1_naive, ch06.matmul_v3_any_shape]
SHAPES = [  # M, N, K
    (1, 1, 1), (1, 33, 7), (31, 1, 16), (16, 16, 1), (17, 15, 31), (33, 127, 33), (5, 1025, 65), (127, 3, 1025),
]  # fmt: skip
TILE_SHAPES = [(16, 16, 16), (32, 16, 48), (16, 80, 16), (48, 64, 272)]
TAIL = 40  # elements behind each array


def matmul(kernel, A, B):
    """A @ B on the device. NaN lies behind A and B and 7 behind C; checks that it is still there."""
    (M, K), N = A.shape, B.shape[1]
    nan, seven = np.full(TAIL, np.nan, np.float32), np.full(TAIL, 7, np.float32)
    device_a = cuda.to_device(np.concatenate([A.ravel(), nan]))[: M * K].reshape(M, K)
    device_b = cuda.to_device(np.concatenate([B.ravel(), nan]))[: K * N].reshape(K, N)
    buffer = cuda.to_device(np.concatenate([np.full(M * N, np.nan, np.float32), seven]))
    device_c = buffer[: M * N].reshape(M, N)
    kernel[ch06.matmul_launch(M, N)](device_a, device_b, device_c, M, N, K)
    np.testing.assert_array_equal(buffer.copy_to_host()[M * N :], 7)
    return device_c.copy_to_host()


def whole_numbers(rng, *shape):
    """float32 integers so small that sums of products are exact: any mistake shows as a difference."""
    return rng.integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("kernel", ANY_SHAPE, ids=lambda k: k.__name__)
@pytest.mark.parametrize("M, N, K", SHAPES + TILE_SHAPES[:2])
def test_any_shape_is_exact_on_whole_numbers(rng, kernel, M, N, K):
    A, B = whole_numbers(rng, M, K), whole_numbers(rng, K, N)
    np.testing.assert_array_equal(matmul(kernel, A, B), ch06.matmul_reference(A, B))


@pytest.mark.parametrize("M, N, K", TILE_SHAPES)
def test_tiled_is_exact_on_multiples_of_the_tile(rng, M, N, K):
    ch06.require_multiples_of_tile(M, N, K)
    A, B = whole_numbers(rng, M, K), whole_numbers(rng, K, N)
    np.testing.assert_array_equal(matmul(ch06.matmul_v2_tiled, A, B), ch06.matmul_reference(A, B))


@pytest.mark.parametrize("kernel", [*ANY_SHAPE, ch06.matmul_v2_tiled], ids=lambda k: k.__name__)
def test_rounding_stays_within_the_bound_of_a_float32_sum(rng, kernel):
    M, N, K = (32, 48, 320) if kernel is ch06.matmul_v2_tiled else (33, 47, 301)
    A, B = rng.standard_normal((M, K), dtype=np.float32), rng.standard_normal((K, N), dtype=np.float32)
    bound = (K + 1) * 2.0**-24 * (np.abs(A).astype(np.float64) @ np.abs(B))  # Higham 2002, section 3.1
    assert np.all(np.abs(matmul(kernel, A, B) - A.astype(np.float64) @ B) <= bound)


@pytest.mark.parametrize("kernel", ANY_SHAPE, ids=lambda k: k.__name__)
def test_no_index_outside_the_arrays(rng, monkeypatch, kernel):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    A, B = whole_numbers(rng, 17, 33), whole_numbers(rng, 33, 31)
    np.testing.assert_array_equal(matmul(kernel, A, B), ch06.matmul_reference(A, B))


def test_a_row_of_the_product_does_not_depend_on_the_other_rows(rng):
    A, B = rng.standard_normal((35, 70), dtype=np.float32), rng.standard_normal((70, 33), dtype=np.float32)
    np.testing.assert_array_equal(matmul(ch06.matmul_kernel, A[:18], B), matmul(ch06.matmul_kernel, A, B)[:18])


@pytest.mark.parametrize(
    "name, sizes", [("M", (15, 16, 16)), ("N", (16, 33, 16)), ("K", (16, 16, 8)), ("K", (16, 16, 0))]
)
def test_sizes_that_the_tiled_version_cannot_take_are_named(name, sizes):
    with pytest.raises(ValueError, match=f"^{name} = {sizes['MNK'.index(name)]} .*matmul_v3_any_shape"):
        ch06.require_multiples_of_tile(*sizes)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_launch_refuses_empty(shape):
    with pytest.raises(ValueError, match="at least 1"):
        ch06.matmul_launch(*shape)
