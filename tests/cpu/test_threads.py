"""Launches and copies of several threads happen one after another, as on a GPU's default stream."""

import threading

import numpy as np
import pytest
from numba import cuda

import common

N, LAUNCH = 50_000, (200, 256)
on_the_cpu = pytest.mark.skipif(common.BACKEND != "cpu", reason="the sanitizer is the CPU backend's")


@cuda.jit
def add(x, n, times):
    i = cuda.grid(1)
    if i < n:
        for _ in range(times):
            x[i] += 1


def by_threads(work, count=4):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_no_update_is_lost():
    x = cuda.to_device(np.zeros(N, np.float32))
    add[LAUNCH](x, N, 1)
    by_threads(lambda: [add[LAUNCH](x, N, 3) for _ in range(100)])
    np.testing.assert_array_equal(x.copy_to_host(), 1 + 4 * 3 * 100)


@pytest.mark.skipif(common.BACKEND != "cpu", reason="a GPU copies such an array there and back, in as many steps")
def test_no_update_of_a_numpy_array_is_lost():
    x = np.zeros(N, np.float32)
    by_threads(lambda: [add[LAUNCH](x, N, 3) for _ in range(20)])
    np.testing.assert_array_equal(x, 4 * 3 * 20)


def test_a_copy_sees_whole_launches():
    x = cuda.to_device(np.zeros(N, np.float32))
    add[LAUNCH](x, N, 3)
    seen = []

    def work():
        for _ in range(50):
            add[LAUNCH](x, N, 3)
            seen.append(x.copy_to_host())

    by_threads(work, 2)
    assert all(np.all(copy == copy[0]) and copy[0] % 3 == 0 for copy in seen)


@on_the_cpu
def test_two_threads_launches_are_no_race():
    x = cuda.to_device(np.zeros(1000))
    with common.sanitize() as report:
        by_threads(lambda: [add[4, 256](x, 1000, 1) for _ in range(5)], 2)
    assert report.clean and report.launches == 10 and np.all(x.copy_to_host() == 10)


@cuda.jit
def of_no_axes(x, out):
    if cuda.grid(1) == 0:
        out[0] = x[()] + 1
        x[()] = 5


@on_the_cpu
@pytest.mark.parametrize("watch", ["sanitize", "memory_report"])
def test_an_array_without_axes_is_not_looked_at_and_that_is_said(watch):
    x, out = np.array(3.0), np.zeros(1)
    with getattr(common, watch)() as report:
        of_no_axes[1, 32](x, out)
    assert (x, out[0]) == (5, 4) and "an array without axes" in str(report)
