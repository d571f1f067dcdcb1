"""Chapter 8: stream compaction; the stable version in order, the others as sets of (index, value)."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch08_atomics_scan import compact as ch08
from chapters.ch08_atomics_scan.scan_array import scan_scratch, tiles_of

SIZES = [1, 31, 32, 33, 127, 1023, 1024, 1025, 100_003]
COUNTERS = [ch08.compact_v1_atomic, ch08.compact_v2_warp_atomic]
ALL = [*COUNTERS, ch08.compact]
TAIL = 40


def run(kernel, x, threshold):
    """(values, indices) of what was kept. +inf lies behind x; checks that nothing is written behind what was kept."""
    n = len(x)
    device_x = cuda.to_device(np.concatenate([x, np.full(TAIL, np.inf, np.float32)]))[:n]
    values, indices = cuda.to_device(np.full(n, -7, np.float32)), cuda.to_device(np.full(n, -7, np.int32))
    if kernel is ch08.compact:
        counts = cuda.to_device(np.full(scan_scratch(n), -9, np.int32))
        ch08.compact(device_x, counts, values, indices, n, np.float32(threshold))
        count = counts.copy_to_host()[tiles_of(n)]
    else:
        counter = cuda.to_device(np.zeros(1, np.int32))
        kernel[ch08.compact_launch(n)](device_x, values, indices, counter, n, np.float32(threshold))
        count = counter.copy_to_host()[0]
    values, indices = values.copy_to_host(), indices.copy_to_host()
    assert (values[count:] == -7).all() and (indices[count:] == -7).all()
    values, indices = values[:count], indices[:count]
    if kernel is not ch08.compact:
        order = np.argsort(indices)
        values, indices = values[order], indices[order]
    return values, indices


def check(kernel, x, threshold):
    values, indices = run(kernel, x, threshold)
    expected_values, expected_indices = ch08.compact_reference(x, threshold)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(values, expected_values)
    return indices


def name_of(kernel):
    return kernel.__name__


@pytest.mark.parametrize("kernel", ALL, ids=name_of)
@pytest.mark.parametrize("n", SIZES)
def test_compact(rng, kernel, n):
    check(kernel, rng.standard_normal(n, dtype=np.float32), 0.5)


@pytest.mark.parametrize("kernel", ALL, ids=name_of)
@pytest.mark.parametrize("threshold, kept", [(-np.inf, 5000), (-1, 5000), (1, 0), (np.inf, 0), (np.nan, 0)])
def test_all_and_none(rng, kernel, threshold, kept):
    assert len(check(kernel, rng.random(5000, dtype=np.float32), threshold)) == kept


@pytest.mark.parametrize("kernel", ALL, ids=name_of)
def test_special_values(kernel):
    x = np.array([np.nan, 0.0, -0.0, np.inf, -np.inf, 1e-45, 1.0] * 9, np.float32)
    kept = check(kernel, x, 0.0)
    assert set(kept % 7) == {3, 5, 6}
    assert set(check(kernel, x, -np.inf) % 7) == {1, 2, 3, 5, 6}


@pytest.mark.parametrize("kernel", ALL, ids=name_of)
def test_equal_to_the_threshold_is_not_kept(kernel):
    x = np.full(77, np.float32(0.1))
    x[70] = np.nextafter(np.float32(0.1), np.float32(1))
    np.testing.assert_array_equal(check(kernel, x, 0.1), [70])


def test_a_single_element_at_every_edge(rng):
    for place in (0, 31, 32, 127, 128, 1023, 1024, 2047, 2048):
        x = np.zeros(2049, np.float32)
        x[place] = 1
        for kernel in ALL:
            np.testing.assert_array_equal(check(kernel, x, 0.5), [place])


def test_counters_continue_from_where_they_stand():
    for kernel in COUNTERS:
        counter = cuda.to_device(np.array([3], np.int32))
        values, indices = cuda.to_device(np.zeros(8, np.float32)), cuda.to_device(np.zeros(8, np.int32))
        kernel[ch08.compact_launch(5)](
            cuda.to_device(np.ones(5, np.float32)), values, indices, counter, 5, np.float32(0)
        )
        assert counter.copy_to_host()[0] == 8
        np.testing.assert_array_equal(values.copy_to_host(), [0, 0, 0, 1, 1, 1, 1, 1])


def test_clear_count():
    counter = cuda.to_device(np.array([3, 5], np.int32))
    ch08.clear_count[1, 1](counter)
    np.testing.assert_array_equal(counter.copy_to_host(), [0, 5])


@pytest.mark.parametrize("kernel", ALL, ids=name_of)
def test_no_index_outside_the_arrays(rng, monkeypatch, kernel):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    check(kernel, rng.standard_normal(1057, dtype=np.float32), 0.5)


@pytest.mark.parametrize("n", [0, -3])
def test_launch_refuses_empty(n):
    with pytest.raises(ValueError, match=f"^n = {n}: a launch needs at least 1 element"):
        ch08.compact_launch(n)


@pytest.mark.parametrize("n, blocks", [(1, 1), (1024, 1), (1025, 2), (1 << 30, 1024)])
def test_launch(n, blocks):
    assert ch08.compact_launch(n) == (blocks, 256)
