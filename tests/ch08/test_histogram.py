"""Chapter 8: every version of the histogram against one reference; the counts are integers and exact."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch08_atomics_scan import kernels as ch08

SHARED = [ch08.histogram_v2_privatised, ch08.histogram_v3_coarsened, ch08.histogram_v4_copies]
ALL = [ch08.histogram_v1_global, *SHARED]
SIZES = [1, 31, 32, 33, 127, 1023, 1024, 1025, 100_003]
TAIL = 64


def histogram(kernel, keys, n_bins, before=0):
    """The counts. Zeros lie behind the keys, which would be counted, and 7 behind the counts, which must stay."""
    n = len(keys)
    device_keys = cuda.to_device(np.concatenate([keys, np.zeros(TAIL, keys.dtype)]))
    counts = np.full(n_bins + TAIL, 7, np.int32)
    counts[:n_bins] = before
    device_counts = cuda.to_device(counts)
    launch = ch08.histogram_v1_launch(n) if kernel is ch08.histogram_v1_global else ch08.histogram_launch(n, n_bins)
    kernel[launch](device_keys, device_counts, n, n_bins)
    counts = device_counts.copy_to_host()
    np.testing.assert_array_equal(counts[n_bins:], 7)
    return counts[:n_bins]


@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.__name__)
@pytest.mark.parametrize("n", SIZES)
def test_int32_keys(rng, kernel, n):
    keys = rng.integers(0, 100, n).astype(np.int32)
    np.testing.assert_array_equal(histogram(kernel, keys, 100), np.bincount(keys, minlength=100))


@pytest.mark.parametrize("kernel", [ch08.histogram_v1_global, ch08.histogram_v4_copies], ids=lambda k: k.__name__)
@pytest.mark.parametrize("n", [33, 100_003])
def test_bytes(rng, kernel, n):
    keys = rng.integers(0, 256, n).astype(np.uint8)
    np.testing.assert_array_equal(histogram(kernel, keys, 256), np.bincount(keys, minlength=256))
    np.testing.assert_array_equal(histogram(kernel, keys, 10), ch08.histogram_reference(keys, 10))


@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.__name__)
@pytest.mark.parametrize("n_bins", [1, 2, 31, 128, 129, 2048, 2049, 4096])
def test_any_number_of_bins(rng, kernel, n_bins):
    """Around the powers of two the number of copies changes."""
    keys = rng.integers(0, n_bins, 5000).astype(np.int32)
    keys[[0, -1]] = n_bins - 1
    np.testing.assert_array_equal(histogram(kernel, keys, n_bins), np.bincount(keys, minlength=n_bins))


def test_more_bins_than_shared_memory_holds(rng):
    keys = rng.integers(0, 50257, 70_000).astype(np.int32)
    np.testing.assert_array_equal(histogram(ch08.histogram_v1_global, keys, 50257), np.bincount(keys, minlength=50257))


@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.__name__)
def test_all_keys_alike(kernel):
    keys = np.full(40_000, 41, np.int32)
    np.testing.assert_array_equal(histogram(kernel, keys, 64), np.bincount(keys, minlength=64))


@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.__name__)
def test_keys_without_a_bin_are_not_counted(rng, kernel):
    keys = rng.integers(-40, 140, 3001).astype(np.int32)
    keys[:4] = -(2**31), 2**31 - 1, -1, 100
    counts = histogram(kernel, keys, 100)
    np.testing.assert_array_equal(counts, ch08.histogram_reference(keys, 100))
    assert counts.sum() == np.count_nonzero((keys >= 0) & (keys < 100)) < 3001


@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.__name__)
def test_counts_are_added_to_what_is_there(kernel):
    np.testing.assert_array_equal(histogram(kernel, np.array([0, 2, 2], np.int32), 3, [10, 20, 30]), [11, 20, 32])


@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.__name__)
def test_no_index_outside_the_arrays(rng, monkeypatch, kernel):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    keys = rng.integers(-5, 35, 1025).astype(np.int32)
    counts = cuda.to_device(np.zeros(33, np.int32))
    launch = ch08.histogram_launch(1025, 33)
    kernel[launch](cuda.to_device(keys), counts, 1025, 33)
    np.testing.assert_array_equal(counts.copy_to_host(), ch08.histogram_reference(keys, 33))


@pytest.mark.parametrize("n_bins", [0, -2, 4097])
def test_launch_names_the_bins_it_cannot_take(n_bins):
    with pytest.raises(ValueError, match=f"^n_bins = {n_bins}: 1 to 4096 .*histogram_v1_global"):
        ch08.histogram_launch(100, n_bins)


@pytest.mark.parametrize("launch", [ch08.histogram_v1_launch, lambda n: ch08.histogram_launch(n, 10)])
@pytest.mark.parametrize("n", [0, -3])
def test_launch_refuses_empty(launch, n):
    with pytest.raises(ValueError, match=f"^n = {n}: a launch needs at least 1 key"):
        launch(n)


@pytest.mark.parametrize("n, blocks", [(1, 1), (8192, 1), (8193, 2), (1 << 30, 512)])
def test_launch(n, blocks):
    assert ch08.histogram_launch(n, 10) == ch08.histogram_v1_launch(n) == (blocks, 256)
