"""Chapter 8: radix select and top-k against sorting: ties, both zeros, infinities and NaN included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numba import cuda

from chapters.ch08_atomics_scan import topk as ch08

SIZES = [1, 31, 32, 33, 127, 1023, 1024, 1025, 4097, 50257]
TAIL = 40
NAN, INF = np.float32(np.nan), np.float32(np.inf)


def device_vector(x):
    """x on the device with +inf behind it, which would be the largest of all."""
    return cuda.to_device(np.concatenate([x, np.full(TAIL, np.inf, np.float32)]))[: len(x)]


def radix_select(x, k, launch=None):
    """(k-th largest, how many are greater) by the kernel."""
    value, greater = cuda.to_device(np.zeros(1, np.float32)), cuda.to_device(np.full(1, -9, np.int32))
    launch = launch or ch08.radix_select_launch(len(x), k)
    ch08.radix_select_kernel[launch](device_vector(x), value, greater, len(x), k)
    return value.copy_to_host()[0], int(greater.copy_to_host()[0])


def top_k(x, k):
    """(values, indices) by the kernel; checks that nothing is written behind them."""
    values, indices = cuda.to_device(np.full(k + TAIL, 7, np.float32)), cuda.to_device(np.full(k + TAIL, 7, np.int32))
    ch08.top_k[ch08.top_k_launch(len(x), k)](device_vector(x), values, indices, len(x), k)
    values, indices = values.copy_to_host(), indices.copy_to_host()
    assert (values[k:] == 7).all() and (indices[k:] == 7).all()
    return values[:k], indices[:k]


def check_select(x, k):
    assert radix_select(x, k) == ch08.radix_select_reference(x, k)


def check_top_k(x, k):
    values, indices = top_k(x, k)
    expected_values, expected_indices = ch08.top_k_reference(x, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(values.view(np.int32), expected_values.view(np.int32))  # bits: -0.0 stays -0.0


def some_k(n):
    return sorted({1, 2, n // 3, n // 2, n - 1, n} & set(range(1, n + 1)))


# --- the k-th largest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_radix_select(rng, n):
    x = rng.standard_normal(n, dtype=np.float32) * 3
    for k in some_k(n):
        check_select(x, k)


def test_radix_select_all_k(rng):
    x = rng.standard_normal(67, dtype=np.float32)
    assert [radix_select(x, k) for k in range(1, 68)] == [(value, k) for k, value in enumerate(sorted(x)[::-1])]


def test_radix_select_of_every_size_of_number(rng):
    """Bit patterns drawn alike, so that all exponents, subnormal numbers, infinities and NaN occur."""
    x = rng.integers(0, 2**32, 5001, dtype=np.uint32).view(np.float32)
    for k in some_k(5001):
        check_select(x, k)


@pytest.mark.parametrize("bit", [0, 7, 8, 15, 16, 23, 24, 30])
def test_radix_select_tells_neighbours_apart_in_every_digit(bit):
    base = np.float32(2.5).view(np.uint32)
    x = np.array([base, base ^ np.uint32(1 << bit)] * 20, np.uint32).view(np.float32)
    assert radix_select(x, 20) == (x.max(), 0)
    assert radix_select(x, 21) == (x.min(), 20)
    assert radix_select(-x, 20) == (-x.min(), 0)
    assert radix_select(-x, 21) == (-x.max(), 20)


def test_radix_select_in_the_smallest_block(rng):
    x = rng.integers(0, 50, 3001).astype(np.float32)
    assert radix_select(x, 700, (1, 256)) == ch08.radix_select_reference(x, 700)


def test_radix_select_of_equals():
    assert radix_select(np.full(3000, 2.5, np.float32), 1500) == (2.5, 0)
    x = np.array([1, 3, 3, 2, 3, 2], np.float32)
    assert [radix_select(x, k) for k in range(1, 7)] == [(3, 0)] * 3 + [(2, 3)] * 2 + [(1, 5)]


def test_zeros_are_equal():
    x = np.array([0.0, -0.0, 1, -0.0, -1], np.float32)
    assert [radix_select(x, k) for k in range(1, 6)] == [(1, 0), (0, 1), (0, 1), (0, 1), (-1, 4)]


def test_infinities_and_nan():
    x = np.array([NAN, 1, -INF, INF, NAN, -INF, 0], np.float32)
    assert [radix_select(x, k) for k in range(1, 8)] == [(INF, 0), (1, 1), (0, 2)] + [(-INF, 3)] * 4
    assert radix_select(np.full(40, NAN), 7) == (-INF, 0)
    assert radix_select(np.array([NAN, 5, NAN], np.float32), 2) == (-INF, 1)


NUMBERS = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]), st.floats(width=32))
FEW = hnp.arrays(np.float32, st.integers(1, 90), elements=NUMBERS, fill=st.sampled_from([0.0, 1.0, np.nan]))


@settings(max_examples=60, deadline=None)
@given(x=FEW, data=st.data())
def test_select_and_top_k_of_anything(x, data):
    k = data.draw(st.integers(1, len(x)))
    check_select(x, k)
    check_top_k(x, k)


# --- the k largest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_top_k(rng, n):
    x = rng.standard_normal(n, dtype=np.float32) * 3
    for k in (k for k in (1, 2, 40, 1000, 1023, 1024) if k <= n):
        check_top_k(x, k)


@pytest.mark.parametrize("n", [1025, 65_535, 65_536, 65_537, 100_003])
@pytest.mark.parametrize("k", [1, 3, 64, 65, 1024])
def test_top_k_of_equals_takes_the_lowest_indices(rng, n, k):
    """block_nth_equal takes two rounds up to 256², and three above."""
    check_top_k(rng.integers(0, 4, n).astype(np.float32), k)
    np.testing.assert_array_equal(top_k(np.full(n, 3, np.float32), k)[1], np.arange(k))
    rare = np.zeros(n, np.float32)
    rare[rng.choice(n, 1025, replace=False)] = 1
    check_top_k(rare, k)


def test_top_k_never_selects_nan():
    x = np.array([NAN, 1, -INF, NAN, 2], np.float32)
    values, indices = top_k(x, 5)
    np.testing.assert_array_equal(values, [2, 1, -INF, -INF, -INF])
    np.testing.assert_array_equal(indices, [4, 1, 2, -1, -1])
    np.testing.assert_array_equal(top_k(np.full(9, NAN), 3)[1], [-1, -1, -1])
    np.testing.assert_array_equal(top_k(np.full(1, NAN), 1)[1], [-1])


def test_top_k_keeps_the_sign_of_zero():
    x = np.array([-0.0, 0.0, -1, -0.0], np.float32)
    values, indices = top_k(x, 3)
    np.testing.assert_array_equal(indices, [0, 1, 3])
    np.testing.assert_array_equal(np.signbit(values), [True, False, True])


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    check_top_k(rng.integers(0, 40, 1057).astype(np.float32), 100)  # radix_select_kernel is the beginning of it


# --- launch configurations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launch", [ch08.radix_select_launch, ch08.top_k_launch])
def test_launch_names_what_it_cannot_take(launch):
    with pytest.raises(ValueError, match="^n = 0: a launch needs at least 1 element"):
        launch(0, 1)
    for k in (0, -1, 11):
        with pytest.raises(ValueError, match=f"^k = {k}: .* from 1 to 10$"):
            launch(10, k)


def test_top_k_launch_names_its_limit():
    with pytest.raises(ValueError, match="^k = 1025: 1024 .*radix_select_kernel"):
        ch08.top_k_launch(5000, 1025)
