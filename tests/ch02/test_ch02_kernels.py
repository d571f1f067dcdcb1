"""Chapter 2: every thread knows who it is, guards hold, and a launch that no GPU accepts is refused with the limit."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch02_launch import kernels as ch02

SIZES = [1, 31, 33, 127, 256, 1025]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("threads", [32, 96, 256])
def test_hello_names_every_thread(n, threads):
    who = cuda.to_device(np.full((n + 2, 4), -1, np.int32))
    ch02.hello_kernel[ch02.blocks_for(n, threads), threads](who, n)
    got = who.copy_to_host()
    np.testing.assert_array_equal(got[:n], ch02.hello_reference(n, threads))
    np.testing.assert_array_equal(got[n:], -1)  # threads past the end were silent


@pytest.mark.parametrize("n", SIZES)
def test_the_guarded_version_takes_any_size(rng, n):
    x = rng.standard_normal(n + 300, dtype=np.float32)
    device = cuda.to_device(x)
    ch02.double_v2_guarded[ch02.blocks_for(n, 128), 128](device, n)
    np.testing.assert_array_equal(device.copy_to_host()[:n], ch02.double_reference(x[:n]))
    np.testing.assert_array_equal(device.copy_to_host()[n:], x[n:])


@pytest.mark.parametrize("n, threads", [(256, 128), (96, 32), (1, 1)])
def test_the_unguarded_version_is_right_when_the_grid_fits(rng, n, threads):
    x = rng.standard_normal(n, dtype=np.float32)
    device = cuda.to_device(x)
    ch02.double_v1_unguarded[n // threads, threads](device)
    np.testing.assert_array_equal(device.copy_to_host(), ch02.double_reference(x))


@pytest.mark.provokes
def test_the_unguarded_version_writes_past_the_end(rng):
    x = rng.standard_normal(256, dtype=np.float32)
    device = cuda.to_device(x)
    ch02.double_v1_unguarded[2, 128](device[:200])  # the array ends at 200; what lies behind belongs to somebody else
    np.testing.assert_array_equal(device.copy_to_host()[200:], 2 * x[200:])


def test_blocks_for_rounds_up():
    assert [ch02.blocks_for(n, 256) for n in (1, 255, 256, 257, 512)] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "n, threads, named", [(0, 32, "n = 0"), (-1, 32, "n = -1"), (5, 0, "threads = 0"), (5, 1025, "1025")]
)
def test_blocks_for_refuses(n, threads, named):
    with pytest.raises(ValueError, match=named):
        ch02.blocks_for(n, threads)


@pytest.mark.parametrize("grid, block", [(1, 1024), ((7, 3), (32, 32)), ((2**31 - 1,), (1, 1, 64)), (1, (16, 8, 8))])
def test_launches_within_the_limits_pass(grid, block):
    ch02.check_launch(grid, block)


@pytest.mark.parametrize(
    "grid, block, named",
    [
        (1, 1025, "1 to 1024"),
        (1, (32, 33), "1056 threads"),
        (1, (1, 1, 65), "65 along z"),
        ((1, 65536), 32, "65536 along y"),
        (0, 32, "0 along x"),
        ((1, 1, 1, 1), 32, "4 axes"),
        (2**31, 32, "along x"),
    ],
)
def test_launches_beyond_the_limits_name_them(grid, block, named):
    with pytest.raises(ValueError, match=named):
        ch02.check_launch(grid, block)


@pytest.mark.parametrize("grid, block", [(1, 1025), (1, (32, 33)), (0, 32)])
def test_the_backend_refuses_them_too(grid, block):
    with pytest.raises(Exception):  # noqa: B017  (each backend has errors of its own; that there is one is the point)
        ch02.hello_kernel[grid, block](cuda.device_array((1, 4), np.int32), 1)
        cuda.synchronize()
