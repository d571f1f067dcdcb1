"""Chapter 7: the device functions, the ladder of sums and the launches against their NumPy references."""

import numpy as np
import pytest
from numba import cuda, float32

from chapters.ch07_warp_reduce import kernels as ch07

SIZES = [1, 31, 33, 127, 1025]
BLOCKS = [32, 96, 1024]
SUMS = [ch07.sum_v1_shared_tree, ch07.sum_v2_warp_shuffle, ch07.sum_v3_warp_then_block, ch07.sum_v4_float4]


def name_of(kernel):
    return kernel.py_func.__name__


# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit
def reduce_four_ways(x, out):
    """out[0 … 3, i] = block_sum, block_max, warp_sum, warp_max of x, as thread i sees them; out[4]: a third use."""
    partial = cuda.shared.array(32, float32)
    i = cuda.threadIdx.x
    out[0, i] = ch07.block_sum(x[i], partial)
    out[1, i] = ch07.block_max(x[i], partial)  # straight away on the same array
    out[2, i] = ch07.warp_sum(x[i])
    out[3, i] = ch07.warp_max(x[i])
    out[4, i] = ch07.block_sum(x[i] - out[1, i], partial)


@pytest.mark.parametrize("threads", BLOCKS)
def test_every_thread_gets_the_result(rng, threads):
    x = rng.standard_normal(threads, dtype=np.float32) - 10  # all negative: a zero that slips in would be the maximum
    device_out = cuda.to_device(np.zeros((5, threads), np.float32))
    reduce_four_ways[1, threads](cuda.to_device(x), device_out)
    out, warps = device_out.copy_to_host(), x.reshape(-1, 32)
    assert (out[0] == out[0, 0]).all() and (out[4] == out[4, 0]).all()
    np.testing.assert_allclose(out[0, 0], x.sum(dtype=np.float64), rtol=1e-6)
    np.testing.assert_array_equal(out[1], np.full(threads, x.max()))
    np.testing.assert_allclose(out[2], np.repeat(warps.sum(axis=1, dtype=np.float64), 32), rtol=1e-6)
    np.testing.assert_array_equal(out[3], np.repeat(warps.max(axis=1), 32))
    np.testing.assert_allclose(out[4, 0], (x - x.max()).sum(dtype=np.float64), rtol=1e-5)


@pytest.mark.parametrize("lane", [0, 5, 63])
def test_sum_keeps_nan_and_max_ignores_it(lane):
    x = np.ones(64, np.float32)
    x[lane] = np.nan
    device_out = cuda.to_device(np.zeros((5, 64), np.float32))
    reduce_four_ways[1, 64](cuda.to_device(x), device_out)
    out = device_out.copy_to_host()
    assert np.isnan(out[0]).all()
    assert (out[1] == 1).all() and (out[3] == 1).all()


def test_block_max_of_minus_infinity():
    device_out = cuda.to_device(np.zeros((5, 96), np.float32))
    reduce_four_ways[1, 96](cuda.to_device(np.full(96, -np.inf, np.float32)), device_out)
    assert (device_out.copy_to_host()[1] == -np.inf).all()


# --- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", SUMS, ids=name_of)
@pytest.mark.parametrize("n", [*SIZES, 2, 3, 8192, 100_003])
def test_sum(rng, kernel, n):
    x = rng.standard_normal(n, dtype=np.float32)
    out = cuda.to_device(np.zeros(1, np.float32))
    kernel[ch07.sum_launch(n)](cuda.to_device(x), out, n)
    tolerance = 1e-6 * np.abs(x).sum()  # cancellation: the error follows the terms, not the sum
    np.testing.assert_allclose(out.copy_to_host()[0], ch07.sum_reference(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kernel", SUMS, ids=name_of)
def test_sum_of_integers_is_exact_with_many_blocks(kernel):
    n = 300_000
    x = (np.arange(n) % 5).astype(np.float32)
    assert ch07.sum_launch(n)[0] > 30
    out = cuda.to_device(np.full(1, 3, np.float32))  # the kernels add to what is there
    kernel[ch07.sum_launch(n)](cuda.to_device(x), out, n)
    assert out.copy_to_host()[0] == 3 + x.sum(dtype=np.float64)


@pytest.mark.parametrize("kernel", SUMS, ids=name_of)
def test_sum_reads_nothing_past_n(kernel):
    x = np.ones(1000, np.float32)
    x[700:] = np.nan
    out = cuda.to_device(np.zeros(1, np.float32))
    kernel[ch07.sum_launch(700)](cuda.to_device(x), out, 700)
    assert out.copy_to_host()[0] == 700


@pytest.mark.parametrize("kernel", SUMS, ids=name_of)
def test_no_index_outside_the_array(monkeypatch, kernel):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    for n in (1, 2, 3, 1027):
        out = cuda.to_device(np.zeros(1, np.float32))
        kernel[ch07.sum_launch(n)](cuda.to_device(np.ones(n, np.float32)), out, n)
        assert out.copy_to_host()[0] == n


@pytest.mark.parametrize("kernel", SUMS, ids=name_of)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_sum_of_special_values(kernel, value):
    x = np.ones(1027, np.float32)
    x[1025] = value
    out = cuda.to_device(np.zeros(1, np.float32))
    kernel[ch07.sum_launch(1027)](cuda.to_device(x), out, 1027)
    np.testing.assert_array_equal(out.copy_to_host()[0], np.float32(value))


# --- launch configurations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, -3])
def test_launch_refuses_empty(n):
    with pytest.raises(ValueError, match=f"n = {n}: a launch needs at least 1"):
        ch07.sum_launch(n)
    with pytest.raises(ValueError, match=f"^top: rows = {n}: a launch needs at least 1 row; skip"):
        ch07.row_launch(n, 32, "top")
    with pytest.raises(ValueError, match=f"^top: cols = {n}: a launch needs at least 1 element"):
        ch07.row_threads(n, "top")


@pytest.mark.parametrize("threads", [0, -32, 31, 48, 1056])
def test_row_launch_refuses_blocks_of_part_warps(threads):
    with pytest.raises(ValueError, match=f"^top: threads = {threads}: .*multiple of 32 from 32 to 1024"):
        ch07.row_launch(5, threads, "top")
    assert ch07.row_launch(5, 1024, "top") == (5, 1024)


@pytest.mark.parametrize("cols, threads", [(1, 32), (256, 32), (257, 64), (768, 96), (1024, 128), (4096, 256)])
def test_row_threads_follow_the_row(cols, threads):
    assert ch07.row_threads(cols, "top") == threads


@pytest.mark.parametrize("n, blocks", [(1, 1), (8192, 1), (8193, 2), (1 << 30, 1024)])
def test_sum_launch(n, blocks):
    assert ch07.sum_launch(n) == (blocks, 256)
