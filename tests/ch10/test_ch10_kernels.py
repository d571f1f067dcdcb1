"""Chapter 10: every version of softmax against one reference, and the inputs that tell the versions apart."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch10_softmax import kernels as ch10

VERSIONS = [
    ch10.softmax_v1_naive, ch10.softmax_v2_stable, ch10.softmax_v3_online, ch10.softmax_v4_warp_per_row,
    ch10.softmax_v5_registers,
]  # fmt: skip
SAFE = VERSIONS[1:]
SHAPES = [(1, 1), (3, 2), (1, 31), (5, 33), (2, 63), (7, 64), (9, 65), (2, 1025), (1, 4099)]


def launch_of(kernel, rows, cols):
    if kernel is ch10.softmax_v4_warp_per_row:
        return ch10.softmax_warp_launch(rows)
    if kernel is ch10.softmax_v5_registers:
        return ch10.softmax_registers_launch(rows, cols)
    return ch10.softmax_launch(rows)


def softmax(kernel, x, threads=None):
    """Softmax on the device. NaN lies behind x and 7 behind the result; checks that it is still there."""
    rows, cols = x.shape
    device_x = cuda.to_device(np.concatenate([x.ravel(), np.full(40, np.nan, np.float32)]))[: x.size].reshape(x.shape)
    buffer = cuda.to_device(np.concatenate([np.full(x.size, np.nan, np.float32), np.full(40, 7, np.float32)]))
    grid, block = launch_of(kernel, rows, cols)
    kernel[grid, threads or block](device_x, buffer[: x.size].reshape(x.shape), cols)
    got = buffer.copy_to_host()
    np.testing.assert_array_equal(got[x.size :], 7)
    return got[: x.size].reshape(x.shape)


@pytest.mark.parametrize("kernel", VERSIONS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax(rng, kernel, shape):
    x = 3 * rng.standard_normal(shape, dtype=np.float32)
    np.testing.assert_allclose(softmax(kernel, x), ch10.softmax_reference(x), rtol=3e-6, atol=0)


@pytest.mark.parametrize("kernel", [ch10.softmax_row, ch10.softmax_v3_online], ids=lambda k: k.__name__)
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_any_block_of_full_warps(rng, kernel, threads):
    x = 3 * rng.standard_normal((3, 257), dtype=np.float32)
    np.testing.assert_allclose(softmax(kernel, x, threads), ch10.softmax_reference(x), rtol=2e-6, atol=0)


@pytest.mark.parametrize("kernel", VERSIONS, ids=lambda k: k.__name__)
def test_in_place(rng, kernel):
    x = rng.standard_normal((9, 200), dtype=np.float32)
    device_x = cuda.to_device(x)
    kernel[launch_of(kernel, 9, 200)](device_x, device_x, 200)
    np.testing.assert_array_equal(device_x.copy_to_host(), softmax(kernel, x))


@pytest.mark.parametrize("kernel", SAFE, ids=lambda k: k.__name__)
def test_naive_overflows_where_the_others_do_not(rng, kernel):
    x = 3 * rng.standard_normal((4, 65), dtype=np.float32)
    x[1, 40] = 89  # exp is inf
    x[2] -= 200  # every exp is 0
    x[3] += 1e4
    naive, stable = softmax(ch10.softmax_v1_naive, x), softmax(kernel, x)
    assert np.isfinite(naive[0]).all()
    assert np.isnan(naive[1, 40]) and np.isnan(naive[2:]).all()
    np.testing.assert_allclose(stable, ch10.softmax_reference(x), rtol=2e-6, atol=1e-38)


@pytest.mark.parametrize("kernel", SAFE, ids=lambda k: k.__name__)
@pytest.mark.parametrize("cols", [1, 2, 33, 300])
def test_minus_infinity_gets_no_weight(rng, kernel, cols):
    x = rng.standard_normal((6, cols), dtype=np.float32)
    for row in range(6):
        keep = rng.integers(0, cols)  # at least this one stays
        x[row, (np.arange(cols) != keep) & (rng.random(cols) < 0.5)] = -np.inf
    got = softmax(kernel, x)
    assert (got[np.isneginf(x)] == 0).all()
    np.testing.assert_allclose(got, ch10.softmax_reference(x), rtol=2e-6, atol=0)


def test_masked_elements_at_the_end_change_no_bit(rng):
    x = rng.standard_normal((3, 300), dtype=np.float32)
    x[:, 37:] = -np.inf
    got = softmax(ch10.softmax_row, x)
    np.testing.assert_array_equal(got[:, :37], softmax(ch10.softmax_row, np.ascontiguousarray(x[:, :37])))


@pytest.mark.parametrize("kernel", SAFE, ids=lambda k: k.__name__)
def test_rows_without_a_softmax_become_nan_and_leave_the_others_alone(rng, kernel):
    x = rng.standard_normal((5, 70), dtype=np.float32)
    x[1], x[2, 3], x[3, 69] = -np.inf, np.nan, np.inf
    got = softmax(kernel, x)
    assert np.isnan(got[1:4]).all()
    np.testing.assert_allclose(got[[0, 4]], ch10.softmax_reference(x[[0, 4]]), rtol=2e-6, atol=0)


@pytest.mark.parametrize("kernel", SAFE, ids=lambda k: k.__name__)
def test_the_largest_and_the_smallest_floats(kernel):
    """Differences overflow to inf, which exp takes to 0; ``LOWEST`` itself may be an element."""
    big = np.finfo(np.float32).max
    x = np.full((3, 40), -big, np.float32)
    x[1, 35] = big
    x[2, ::2] = -np.inf
    got = softmax(kernel, x)
    np.testing.assert_allclose(got[0], np.full(40, 1 / 40), rtol=2e-7)
    np.testing.assert_array_equal(got[1], np.arange(40) == 35)
    np.testing.assert_allclose(got[2], np.where(np.arange(40) % 2, 1 / 20, 0), rtol=2e-7)


@pytest.mark.parametrize("kernel", SAFE, ids=lambda k: k.__name__)
def test_rising_rows(kernel):
    """Every element is larger than all before it: the online sum shrinks at each step."""
    x = (np.arange(300, dtype=np.float32) / 8).reshape(1, -1)
    np.testing.assert_allclose(softmax(kernel, x), ch10.softmax_reference(x), rtol=3e-6, atol=0)


@pytest.mark.parametrize("kernel", SAFE, ids=lambda k: k.__name__)
def test_no_index_outside_the_arrays(rng, monkeypatch, kernel):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    x = rng.standard_normal((9, 70), dtype=np.float32)
    np.testing.assert_allclose(softmax(kernel, x), ch10.softmax_reference(x), rtol=3e-6, atol=0)


# --- the logarithm of the sum ----------------------------------------------------------------------------------------


def logsumexp(x):
    """logsumexp of each row on the device; 7 lies behind the result and is checked to be there still."""
    rows, cols = x.shape
    device_x = cuda.to_device(np.concatenate([x.ravel(), np.full(40, np.nan, np.float32)]))[: x.size].reshape(x.shape)
    buffer = cuda.to_device(np.full(rows + 40, 7, np.float32))
    ch10.logsumexp_row[ch10.logsumexp_launch(rows)](device_x, buffer, cols)
    got = buffer.copy_to_host()
    np.testing.assert_array_equal(got[rows:], 7)
    return got[:rows]


@pytest.mark.parametrize("shape", [*SHAPES, (2, 50257)])
@pytest.mark.parametrize("offset", [0, 3000, -3000])
def test_logsumexp(rng, shape, offset):
    """Off by the rounding of log and of the last sum, and by the sum's own relative error."""
    x = 3 * rng.standard_normal(shape, dtype=np.float32) + np.float32(offset)
    np.testing.assert_allclose(logsumexp(x), ch10.logsumexp_reference(x), rtol=2e-7, atol=3e-6)


def test_logsumexp_of_the_extremes():
    x = np.zeros((5, 70), np.float32)
    x[0], x[1, 7], x[2, 8], x[3, 1:] = -np.inf, np.nan, np.inf, -np.inf
    got = logsumexp(x)
    assert got[0] == -np.inf and np.isnan(got[1:3]).all() and got[3] == 0
    assert got[4] == np.float32(np.log(70))


def test_loss_and_softmax_agree(rng):
    x = 3 * rng.standard_normal((4, 257), dtype=np.float32)
    log_probs = x - logsumexp(x)[:, None]
    np.testing.assert_allclose(np.exp(log_probs), softmax(ch10.softmax_row, x), rtol=1e-5)


# --- launch configurations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launch", [ch10.softmax_launch, ch10.softmax_warp_launch, ch10.logsumexp_launch])
@pytest.mark.parametrize("rows", [0, -1])
def test_launch_refuses_empty(launch, rows):
    with pytest.raises(ValueError, match=f"rows = {rows}"):
        launch(rows)


@pytest.mark.parametrize("cols, threads", [(1, 32), (512, 32), (513, 64), (1024, 64), (4096, 256), (16384, 1024)])
def test_registers_launch(cols, threads):
    assert ch10.softmax_registers_launch(3, cols) == (3, threads)


@pytest.mark.parametrize("shape, named", [((0, 5), "at least 1"), ((5, 0), "at least 1"), ((1, 16385), "16385.*v3")])
def test_registers_launch_refuses(shape, named):
    with pytest.raises(ValueError, match=named):
        ch10.softmax_registers_launch(*shape)
