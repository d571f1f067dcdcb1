"""Chapter 10: every version of softmax against one reference, and the inputs that tell the versions apart."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch10_softmax import kernels as ch10

VERSIONS = [ch10.softmax_v1_naive, ch10.softmax_v2_stable]
SHAPES = [(1, 1), (3, 2), (1, 31), (5, 33), (2, 63), (7, 64), (3, 65), (2, 1025)]


def softmax(kernel, x, threads=ch10.THREADS):
    """Softmax on the device. NaN lies behind x and 7 behind the result; checks that it is still there."""
    rows, cols = x.shape
    device_x = cuda.to_device(np.concatenate([x.ravel(), np.full(40, np.nan, np.float32)]))[: x.size].reshape(x.shape)
    buffer = cuda.to_device(np.concatenate([np.full(x.size, np.nan, np.float32), np.full(40, 7, np.float32)]))
    grid, _ = ch10.softmax_launch(rows)
    kernel[grid, threads](device_x, buffer[: x.size].reshape(x.shape), cols)
    got = buffer.copy_to_host()
    np.testing.assert_array_equal(got[x.size :], 7)
    return got[: x.size].reshape(x.shape)


@pytest.mark.parametrize("kernel", VERSIONS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax(rng, kernel, shape):
    x = 3 * rng.standard_normal(shape, dtype=np.float32)
    np.testing.assert_allclose(softmax(kernel, x), ch10.softmax_reference(x), rtol=2e-6, atol=0)


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_any_block_of_full_warps(rng, threads):
    x = 3 * rng.standard_normal((3, 257), dtype=np.float32)
    np.testing.assert_allclose(softmax(ch10.softmax_row, x, threads), ch10.softmax_reference(x), rtol=2e-6, atol=0)


@pytest.mark.parametrize("kernel", VERSIONS, ids=lambda k: k.__name__)
def test_in_place(rng, kernel):
    x = rng.standard_normal((9, 200), dtype=np.float32)
    device_x = cuda.to_device(x)
    kernel[ch10.softmax_launch(9)](device_x, device_x, 200)
    np.testing.assert_array_equal(device_x.copy_to_host(), softmax(kernel, x))


def test_naive_overflows_where_stable_does_not(rng):
    x = 3 * rng.standard_normal((4, 65), dtype=np.float32)
    x[1, 40] = 89  # exp is inf
    x[2] -= 200  # every exp is 0
    x[3] += 1e4
    naive, stable = softmax(ch10.softmax_v1_naive, x), softmax(ch10.softmax_v2_stable, x)
    assert np.isfinite(naive[0]).all()
    assert np.isnan(naive[1, 40]) and np.isnan(naive[2:]).all()
    np.testing.assert_allclose(stable, ch10.softmax_reference(x), rtol=2e-6, atol=1e-38)


@pytest.mark.parametrize("cols", [1, 2, 33, 300])
def test_minus_infinity_gets_no_weight(rng, cols):
    x = rng.standard_normal((6, cols), dtype=np.float32)
    for row in range(6):
        keep = rng.integers(0, cols)  # at least this one stays
        x[row, (np.arange(cols) != keep) & (rng.random(cols) < 0.5)] = -np.inf
    got = softmax(ch10.softmax_row, x)
    assert (got[np.isneginf(x)] == 0).all()
    np.testing.assert_allclose(got, ch10.softmax_reference(x), rtol=2e-6, atol=0)


def test_masked_elements_at_the_end_change_no_bit(rng):
    x = rng.standard_normal((3, 300), dtype=np.float32)
    x[:, 37:] = -np.inf
    got = softmax(ch10.softmax_row, x)
    np.testing.assert_array_equal(got[:, :37], softmax(ch10.softmax_row, np.ascontiguousarray(x[:, :37])))


def test_rows_without_a_softmax_become_nan_and_leave_the_others_alone(rng):
    x = rng.standard_normal((5, 70), dtype=np.float32)
    x[1], x[2, 3], x[3, 69] = -np.inf, np.nan, np.inf
    got = softmax(ch10.softmax_row, x)
    assert np.isnan(got[1:4]).all()
    np.testing.assert_allclose(got[[0, 4]], ch10.softmax_reference(x[[0, 4]]), rtol=2e-6, atol=0)


@pytest.mark.parametrize("rows", [0, -1])
def test_launch_refuses_empty(rows):
    with pytest.raises(ValueError, match=f"rows = {rows}"):
        ch10.softmax_launch(rows)
