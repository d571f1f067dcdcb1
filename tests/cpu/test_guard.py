"""Kernels that leave their arrays are caught without MINI_CHECK: guarded memory, canaries, first launches on copies."""

import ctypes
import functools
import os
import subprocess
import sys
import threading

import guard_kernels as k
import numpy as np
import pytest
from conftest import ROOT
from numba import cuda

import common
from common.cpu import crash, guard, launch
from common.cpu.errors import OutOfBoundsError

pytestmark = pytest.mark.provokes  # that is what these tests are about

WHERE = {"host": lambda a: a, "device": cuda.to_device}


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    monkeypatch.delenv("MINI_CHECK", raising=False)
    for kernel in vars(k).values():  # each test begins with first launches
        getattr(kernel, "_history", {}).clear()


@pytest.fixture(params=WHERE)
def place(request):
    """Puts an array where the kernel finds it: a NumPy array as it is, or a device array."""
    return WHERE[request.param]


def zeros(n, dtype=np.float32):
    return np.zeros(n, dtype)


def content(a):
    return a if isinstance(a, np.ndarray) else a.copy_to_host()


def caught(function, *words, kernel):
    """Run what must end in an error that names the kernel, its file and line, and what to do; returns the error."""
    with pytest.raises(OutOfBoundsError) as error:
        function()
    text = str(error.value)
    assert kernel.__name__ in text and "guard_kernels.py:" in text and "if i < n" in text
    for word in words:
        assert word in text
    return error.value


# --- beginners' mistakes ----------------------------------------------------------------------------------------------


def test_a_missing_guard_is_an_error_with_line_index_and_thread(place):
    a = place(np.arange(1000, dtype=np.float32))
    error = caught(lambda: k.scale[40, 256](a, 2.0), "a: index 1000 on axis 0 is outside 0 … 999", kernel=k.scale)
    assert "block (3, 0, 0), thread (232, 0, 0); in the kernel scale, grid (40, 1, 1), block (256, 1, 1)" in str(error)
    assert error.lineno == k.scale.py_func.__code__.co_firstlineno + 3


@pytest.mark.parametrize("n", [1, 3, 16, 31, 64, 1000, 1023, 1024, 1025, 40_000])
def test_a_missing_guard_at_every_size(n, place):
    a = place(np.ones(n, np.float32))
    caught(lambda: k.scale[n // 32 + 1, 32](a, 2.0), f"index {n} on axis 0", kernel=k.scale)


@pytest.mark.parametrize("shape", [(33, 41, 29), (5, 5, 5), (17, 16, 16), (16, 16, 17)])
def test_the_textbook_product_at_odd_sizes(shape, place):
    m, inner, n = shape
    arrays = [place(np.ones(s, np.float32)) for s in ((m, inner), (inner, n), (m, n))]
    grid = -(-m // 16), -(-n // 16)
    caught(lambda: k.matmul[grid, (16, 16)](*arrays), "is outside 0 …", kernel=k.matmul)


def test_the_textbook_product_where_it_fits(place):
    a, b, c = (place(np.full((32, 32), v, np.float32)) for v in (2, 3, 0))
    for _ in range(2):
        k.matmul[(2, 2), (16, 16)](a, b, c)
        assert (content(c) == 32 * 6).all()


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 100, 1000, 1024, 4096, 4097])
def test_a_write_to_the_next_element(n, place):
    out = place(zeros(n))
    caught(lambda: k.write_next[n // 64 + 1, 64](out, n), f"out: index {n} on axis 0", kernel=k.write_next)


@pytest.mark.parametrize("n", [1, 17, 1000, 1024])
def test_a_read_of_the_next_element_of_a_numpy_array(n):
    a, out = zeros(n), zeros(n)
    caught(lambda: k.read_next[n // 64 + 1, 64](a, out, n), f"a: index {n} on axis 0", kernel=k.read_next)


def test_a_read_behind_a_device_array_is_seen_from_64_bytes_on(monkeypatch):
    a, b, out = cuda.to_device(zeros(1024)), cuda.to_device(zeros(1000)), cuda.to_device(zeros(1024))
    caught(lambda: k.read_next[16, 64](a, out, 1024), "a: index 1024 on axis 0", kernel=k.read_next)
    k.read_next[16, 64](b, out, 1000)  # as the documentation says: not seen, but …
    monkeypatch.setenv("MINI_CHECK", "1")
    with pytest.raises(OutOfBoundsError, match="a: index 1000 on axis 0"):
        k.read_next[16, 64](b, out, 1000)


@pytest.mark.parametrize("distance", [11, 25, 1000, 100_000])
def test_a_write_before_the_array(distance, place):
    out = place(zeros(10, np.float64))
    caught(lambda: k.write_before[1, 32](out, distance), f"out: index -{distance} on axis 0", kernel=k.write_before)


def test_an_index_that_wraps_round_stays_what_it_is_on_a_gpu(place):
    out = place(zeros(10, np.float64))
    k.write_before[1, 32](out, 4)
    assert (content(out) == 1).all()


@pytest.mark.parametrize("step", [2, 100, 10**4, 10**6, 10**8, -(10**6)])
def test_writes_far_away(step, place):
    out = place(zeros(1000, np.float64))
    caught(lambda: k.write_far[4, 256](out, step), "out: index ", kernel=k.write_far)


@pytest.mark.parametrize("bad", [16, 17, 40, 5000, 10**9, 10**10])
def test_data_that_leads_outside_the_histogram(bad, place):
    bins = np.arange(300) % 16
    bins[137] = bad
    h, x = place(np.zeros(16, np.int32)), place(bins)
    caught(lambda: k.add_atomic[2, 256](x, h), f"h: index {bad} on axis 0", "thread (137, 0, 0)", kernel=k.add_atomic)


def test_a_kernel_with_barriers(place):
    a, out = place(zeros(100)), place(zeros(100))
    caught(lambda: k.tile_reversed[4, 32](a, out), "index 100 on axis 0", kernel=k.tile_reversed)


@pytest.mark.parametrize("make", [cuda.pinned_array, cuda.mapped_array, cuda.managed_array])
def test_other_arrays_of_the_device(make):
    out = make(1000, np.float32)
    for _ in range(2):  # not only at the first launch
        caught(lambda: k.write_next[16, 64](out, 1000), "out: index 1000", kernel=k.write_next)


def test_slices_of_device_arrays_end_with_the_whole_array():
    whole = cuda.to_device(zeros(1000))
    k.write_next[8, 64](whole[:500], 500)  # an element of the same array: a GPU writes it as well
    assert whole.copy_to_host()[500] == 1
    caught(lambda: k.write_next[8, 64](whole[500:], 500), "out: index 500", kernel=k.write_next)


# --- what comes after -------------------------------------------------------------------------------------------------


def test_later_launches_work_and_are_not_blamed(place):
    bad, good = place(zeros(1000)), place(np.ones(1000, np.float32))
    for launched in range(1, 4):
        caught(lambda: k.write_next[16, 64](bad, 1000), kernel=k.write_next)  # the same launch fails again
        k.guarded[8, 128](bad, 1.0)
        k.guarded[8, 128](good, 2.0)
        assert (content(good) == 2**launched).all()


def test_numpy_arrays_keep_their_contents_if_the_first_launch_fails():
    a = np.arange(1000, dtype=np.float32)
    caught(lambda: k.scale[40, 256](a, 2.0), kernel=k.scale)
    assert np.array_equal(a, np.arange(1000))


def test_a_mistake_that_does_not_show_again_names_array_and_distance(place):
    def launch(far):
        places = np.arange(10)
        places[3] += 7 + far
        k.scatter_once[1, 32](cuda.to_device(places), place(zeros(10)))  # the kernel overwrites `places`

    for far, words in ((0, "writes outside its arrays, 1 byte behind out (shape (10,), float32)"), (100, "401 bytes")):
        error = caught(functools.partial(launch, far), words, "MINI_CHECK=1", kernel=k.scatter_once)
        assert error.lineno == k.scatter_once.py_func.__code__.co_firstlineno + 1


def test_every_canary_byte_is_looked_at():
    for n in (1, 10, 33, 1000):
        array = cuda.to_device(zeros(n))
        low, size = array.host.ctypes.data, array.nbytes
        behind = -size % 64
        for at in [*range(low - 64, low, 7), *range(low + size, low + size + behind)]:
            ctypes.memset(at, 0, 1)
            with pytest.raises(OutOfBoundsError, match="writes outside its arrays, [0-9]+ bytes? (before|behind) a "):
                k.guarded[n // 64 + 1, 64](array, 1.0)
            k.guarded[n // 64 + 1, 64](array, 1.0)


def test_an_error_of_the_kernel_itself_is_still_that_error():
    with pytest.raises(common.cpu.errors.LaunchError, match="argument 1 of guarded"):
        k.guarded[1, 32]("text", 1.0)


# --- NumPy arrays on copies -------------------------------------------------------------------------------------------


def test_each_new_shape_and_grid_is_watched():
    def launch(grid, n):
        k.scale[grid, 256](np.ones(n, np.float32), 2.0)

    launch(4, 1024)
    for grid, n in ((4, 1023), (5, 1024), (8, 2000)):
        caught(functools.partial(launch, grid, n), f"index {n} on axis 0", kernel=k.scale)


def test_small_arrays_are_watched_for_each_new_number():
    for _ in range(3):
        k.write_next[16, 64](zeros(1000), 10)
    caught(lambda: k.write_next[16, 64](zeros(1000), 1000), "index 1000", kernel=k.write_next)


def test_arrays_that_share_memory_share_it_in_the_copy():
    for _ in range(2):  # the second launch is not on copies
        a = np.arange(100.0)
        k.add_both[2, 64](a, a)
        assert np.array_equal(a, 2 * np.arange(100.0))
        a = np.arange(100.0)
        k.add_both[2, 64](a, a[50:])
        assert np.array_equal(a, np.append(np.arange(50), 50 + 2 * np.arange(50)))


def test_layouts_and_flags_stay_what_they_are(rng):
    base = rng.random((6, 7))
    values = [np.asfortranarray(base), base[2:4], base[:0], np.float32(3), np.broadcast_to(base[1], (4, 7)), 5]
    values[1].flags.writeable = False
    staged = guard.Staged(values)
    for given, copy in zip(values, staged.values):
        if not isinstance(given, np.ndarray):
            assert copy is given
            continue
        assert np.array_equal(copy, given) and copy.strides == given.strides and copy.dtype == given.dtype
        assert copy.flags.writeable == given.flags.writeable
        assert not given.size or copy.ctypes.data != given.ctypes.data
        assert copy.flags.aligned and copy.flags.f_contiguous == given.flags.f_contiguous


def test_only_what_the_kernel_changed_is_copied_back():
    a = np.zeros(100, np.int16)
    staged = guard.Staged([a])
    a[7] = 1  # another thread, during the launch
    staged.values[0][[3, 50]] = 9
    staged.copy_back()
    assert a[7] == 1 and a[3] == a[50] == 9 and np.count_nonzero(a) == 3


def test_large_arrays_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(guard, "MAX_STAGED", 1000)
    monkeypatch.setattr(guard, "Staged", None)
    a = np.ones(777, np.float32)
    k.guarded[777 // 8 + 1, 8](a, 2.0)
    assert (a == 2).all()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not guard.arena(), reason="this system has no arena")
def test_memory_is_used_again():
    def sizes():
        return len(guard.arena().places), len(guard._red)

    for n in (10, 5000, 3_000_000):
        cuda.device_array(n)
        before = sizes()
        for _ in range(50):
            cuda.device_array(n)
            a = np.ones(n // 10 + 1)
            k.guarded[1, 32](a[:5], 2.0)
        after = sizes()
        assert after[0] <= before[0] + 2 and after[1] <= before[1] + 1


def test_more_memory_than_there_is_is_an_error():
    total = launch.machine.memory_info()[1]
    for factor in (4, 100, 10**6):
        with pytest.raises(MemoryError):
            cuda.device_array(int(total * factor), np.uint8)


@pytest.mark.skipif(not guard.arena(), reason="this system has no arena")
def test_an_array_ends_where_nothing_is_readable():
    array = cuda.to_device(zeros(1000))
    end = array.host.ctypes.data + array.nbytes
    mapped = []
    for line in open("/proc/self/maps"):
        span, flags = line.split()[:2]
        low, high = (int(v, 16) for v in span.split("-"))
        if low < end + 64 + guard.GAP and high > end:
            mapped.append((low, high, flags))
    reserved = [m for m in mapped if m[2].startswith("---")]
    assert reserved and reserved[0][0] - end < 64 and reserved[0][1] - reserved[0][0] >= guard.GAP - guard.PAGE


SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests/cpu"]
import common
import numpy as np
from numba import cuda
from common.cpu import crash, guard
{prepare}
import guard_kernels as k
assert guard.arena() is None
for make in (np.ones, lambda n, t: cuda.to_device(np.ones(n, t))):
    for kernel, arguments in ((k.scale, (2.0,)), (k.write_next, (1000,)), (k.write_before, (1001,))):
        try:
            kernel[16, 64](make(1000, np.float32), *arguments)
        except common.cpu.errors.OutOfBoundsError as error:
            print(error)
        good = make(1000, np.float32)
        k.guarded[16, 64](good, 3.0)
        assert (np.asarray(good) == 3).all()
"""


NOT_HERE = ["crash.CAN_CATCH = False", "crash._compiled_handler = None", "guard.LARGEST = 1", "guard.LARGEST = 1 << 62"]


@pytest.mark.parametrize("prepare", NOT_HERE)
def test_without_an_arena_canaries_report_what_was_written(prepare):
    """Another system, or no room for the arena."""
    script = SCRIPT.format(root=str(ROOT), prepare=prepare.replace("62", "62; guard.LEAST = 1 << 62"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environ())
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "in the kernel" in line]
    assert [line.split(":")[2].strip() + line.split(":")[3].split(" on ")[0] for line in lines] == 2 * [
        "a index 1000", "out index 1000", "out index -1001"]  # fmt: skip


def environ():
    return {key: v for key, v in os.environ.items() if key != "MINI_CHECK"} | {"MINI_BACKEND": "cpu"}


def test_under_an_address_space_limit():
    script = "ulimit -v 6000000; exec " + sys.executable + " -c '" + (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + \"/tests/cpu\"]\n"
        "import common, numpy as np, guard_kernels as k\n"
        "k.write_next[16, 64](np.ones(1000, np.float32), 1000)"
    ) + f"' {ROOT}"  # fmt: skip
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=300, env=environ())
    assert "out: index 1000 on axis 0" in done.stderr


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_get_their_own_errors_and_results():
    results = {}

    def work(number):
        right = []
        for repeat in range(20):
            n = 1000 + 10 * number + repeat
            a = WHERE["host" if number % 2 else "device"](np.ones(n, np.float32))
            kernel = k.scale if number % 3 == 0 else k.guarded
            try:
                kernel[40, 256](a, 3.0)
                right.append(kernel is k.guarded and bool((content(a) == 3).all()))
            except OutOfBoundsError as error:
                right.append(kernel is k.scale and f"index {n} on axis 0" in str(error))
        results[number] = right

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6 and all(all(right) for right in results.values())


def test_a_thread_that_ends_gives_its_row_back():
    def work():
        k.guarded[1, 32](np.ones(5, np.float32), 2.0)
        assert launch._mine.row.number is not None

    work()
    before = len(crash._free_rows)
    for _ in range(2 * crash.ROWS):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(crash._free_rows) == before
