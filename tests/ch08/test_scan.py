"""Chapter 8: scans of a block and of an array, inclusive and exclusive, exact on integers, bounded on floats."""

import numpy as np
import pytest
from numba import cuda, float32, int32

from chapters.ch08_atomics_scan import scan as block
from chapters.ch08_atomics_scan import scan_array as array

SIZES = [1, 31, 32, 33, 127, 1023, 1024]
LADDER = {  # kernel: (elements a thread, exclusive)
    block.scan_v1_hillis_steele: (1, False),
    block.scan_v2_blelloch: (2, True),
    block.scan_v3_warp: (1, True),
}
TAIL = 40
EDGE = np.iinfo(np.int32)


def device_vector(x, tail):
    """x on the device with ``tail`` behind it: the vector, and the whole buffer."""
    buffer = cuda.to_device(np.concatenate([x, np.full(TAIL, tail, x.dtype)]))
    return buffer[: len(x)], buffer


# --- one block -------------------------------------------------------------------------------------------------------


def scan_block(kernel, x):
    """x scanned by one of the ladder's kernels. Large numbers lie behind x, 7 behind out."""
    per_thread, _ = LADDER[kernel]
    device_x, _ = device_vector(x, 1 << 20)
    device_out, buffer = device_vector(np.full_like(x, -9), 7)
    kernel[block.scan_block_launch(len(x), per_thread)](device_x, device_out, len(x))
    np.testing.assert_array_equal(buffer.copy_to_host()[len(x) :], 7)
    return device_out.copy_to_host()


@pytest.mark.parametrize("kernel", LADDER, ids=lambda k: k.__name__)
@pytest.mark.parametrize("n", SIZES)
def test_block(rng, kernel, n):
    x = rng.integers(-1000, 1000, n).astype(np.int32)
    np.testing.assert_array_equal(scan_block(kernel, x), block.scan_reference(x, LADDER[kernel][1]))


@pytest.mark.parametrize("kernel", LADDER, ids=lambda k: k.__name__)
def test_block_wraps_round_as_int32_does(kernel):
    x = np.full(100, EDGE.max, np.int32)
    x[::3] = EDGE.min
    np.testing.assert_array_equal(scan_block(kernel, x), block.scan_reference(x, LADDER[kernel][1]))


@pytest.mark.parametrize("kernel", LADDER, ids=lambda k: k.__name__)
def test_block_no_index_outside_the_arrays(rng, monkeypatch, kernel):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    per_thread, exclusive = LADDER[kernel]
    x = rng.integers(0, 9, 501).astype(np.int32)
    out = cuda.device_array(501, np.int32)
    kernel[block.scan_block_launch(501, per_thread)](cuda.to_device(x), out, 501)
    np.testing.assert_array_equal(out.copy_to_host(), block.scan_reference(x, exclusive))


@pytest.mark.parametrize("n", [0, -3, 1025])
def test_block_launch_names_the_sizes_it_cannot_take(n):
    with pytest.raises(ValueError, match=f"^n = {n}: one block scans 1 to 1024 "):
        block.scan_block_launch(n)


# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit
def scan_twice_int32(x, out):
    """out[0], out[1] = before and total of x, as thread i sees them; out[2]: before of out[0], on the same array."""
    partial = cuda.shared.array(33, int32)
    i = cuda.threadIdx.x
    before, total = block.block_exclusive_scan(x[i], partial)
    out[0, i] = before
    out[1, i] = total
    again, _ = block.block_exclusive_scan(before, partial)
    out[2, i] = again


@cuda.jit
def scan_twice_float32(x, out):
    """As scan_twice_int32."""
    partial = cuda.shared.array(33, float32)
    i = cuda.threadIdx.x
    before, total = block.block_exclusive_scan(x[i], partial)
    out[0, i] = before
    out[1, i] = total
    again, _ = block.block_exclusive_scan(before, partial)
    out[2, i] = again


@pytest.mark.parametrize(
    "kernel, dtype, threads",
    [(scan_twice_int32, np.int32, 32), (scan_twice_float32, np.float32, 96), (scan_twice_int32, np.int32, 1024)],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_every_thread_gets_its_prefix_and_the_total(rng, kernel, dtype, threads):
    x = rng.integers(-3, 4, threads).astype(dtype)  # small whole numbers: floats are exact too
    device_out = cuda.to_device(np.full((3, threads), 77, dtype))
    kernel[1, threads](cuda.to_device(x), device_out)
    out = device_out.copy_to_host()
    np.testing.assert_array_equal(out[0], block.scan_reference(x, exclusive=True))
    np.testing.assert_array_equal(out[1], x.sum())
    np.testing.assert_array_equal(out[2], block.scan_reference(block.scan_reference(x, True), True))


# --- any length ------------------------------------------------------------------------------------------------------


def scan_array(x, exclusive, in_place=False):
    """x scanned by scan(). Large numbers lie behind x, 7 behind out and sums. Checks the total in ``sums`` as well."""
    n = len(x)
    device_x, x_buffer = device_vector(x, 1 << 20)
    device_sums, sums_buffer = device_vector(np.full(array.scan_scratch(n), -9, x.dtype), 7)
    device_out, buffer = device_vector(np.full_like(x, -9), 7)
    array.scan(device_x, device_sums, device_x if in_place else device_out, n, exclusive)
    np.testing.assert_array_equal(buffer.copy_to_host()[n:], 7)
    np.testing.assert_array_equal(sums_buffer.copy_to_host()[-TAIL:], 7)
    np.testing.assert_array_equal(x_buffer.copy_to_host()[n:], 1 << 20)
    out = (device_x if in_place else device_out).copy_to_host()
    total = device_sums.copy_to_host()[array.tiles_of(n)]
    if x.dtype == np.int32:
        assert total == x.sum(dtype=np.int32)
    return out


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("n", [*SIZES, 1025, 8191, 8193, 32_769, 100_003])
def test_array(rng, n, exclusive):
    x = rng.integers(-1000, 1000, n).astype(np.int32)
    np.testing.assert_array_equal(scan_array(x, exclusive), block.scan_reference(x, exclusive))


@pytest.mark.parametrize("n", [3_000_000])
def test_array_of_millions(rng, n):
    """2930 tiles: a warp of scan_tile_offsets takes 92 of them, more than it reads at once, and the last fewer."""
    x = rng.integers(EDGE.min, EDGE.max, n, dtype=np.int32)
    np.testing.assert_array_equal(scan_array(x, True), block.scan_reference(x, True))


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("n", [33, 4133])
def test_array_in_place(rng, n, exclusive):
    x = rng.integers(-1000, 1000, n).astype(np.int32)
    np.testing.assert_array_equal(scan_array(x, exclusive, in_place=True), block.scan_reference(x, exclusive))


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("n", [1, 33, 1025, 100_003])
def test_array_of_floats(rng, n, exclusive):
    x = rng.standard_normal(n, dtype=np.float32)
    exact = block.scan_reference(x.astype(np.float64), exclusive)
    # A prefix is a sum of at most 34 steps of a tile's sum, log2 of the tiles or so, 32 carries and 5 shuffles.
    bound = 128 * 2.0**-24 * np.cumsum(np.abs(x), dtype=np.float64) + 1e-30
    assert np.all(np.abs(scan_array(x, exclusive) - exact) <= bound)


def test_array_of_whole_floats_is_exact(rng):
    x = rng.integers(-8, 9, 50_001).astype(np.float32)
    np.testing.assert_array_equal(scan_array(x, False), block.scan_reference(x))


def test_array_of_floats_gives_the_same_bits_each_time(rng):
    x = rng.standard_normal(20_001, dtype=np.float32)
    np.testing.assert_array_equal(scan_array(x, False), scan_array(x, False))


def test_infinity_and_nan_spoil_only_what_comes_after_them():
    x = np.ones(3000, np.float32)
    x[1500] = np.inf
    x[2500] = np.nan
    out = scan_array(x, False)
    np.testing.assert_array_equal(out[:1500], np.arange(1, 1501))
    assert (out[1500:2500] == np.inf).all() and np.isnan(out[2500:]).all()
    np.testing.assert_array_equal(scan_array(x, True)[1:], out[:-1])


def test_array_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    n = 2049
    x = rng.integers(0, 9, n).astype(np.int32)
    out, sums = cuda.device_array(n, np.int32), cuda.device_array(array.scan_scratch(n), np.int32)
    array.scan(cuda.to_device(x), sums, out, n)
    np.testing.assert_array_equal(out.copy_to_host(), block.scan_reference(x))


@pytest.mark.parametrize("size", [array.tiles_of, array.scan_scratch, array.scan_launch])
@pytest.mark.parametrize("n", [0, -3])
def test_launch_refuses_empty(size, n):
    with pytest.raises(ValueError, match=f"^n = {n}: a launch needs at least 1 element"):
        size(n)


@pytest.mark.parametrize("n, tiles, blocks", [(1, 1, 1), (1024, 1, 1), (1025, 2, 1), (8193, 9, 2)])
def test_launch(n, tiles, blocks):
    assert array.tiles_of(n) == tiles
    assert array.scan_scratch(n) == tiles + 33
    assert array.scan_launch(n) == (blocks, 256)
