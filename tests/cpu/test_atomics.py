"""Atomics of the CPU backend: numba-cuda's meaning, exact under threads; the plain twins; volatile access."""

import math
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest

from common.cpu import atomics, half  # noqa: F401 (half: float16 arrays)
from common.cpu.atomics import ATOMIC, BLOCK_ATOMIC

jit = numba.njit(error_model="numpy", fastmath={"contract"}, nogil=True)
INTEGERS, FLOATS = ("int32", "uint32", "int64", "uint64"), ("float32", "float64")
WORKERS = 4


def in_threads(function, *args):
    """Run function(thread number, *args) in several threads that start together."""
    start = threading.Barrier(WORKERS)

    def work(k):
        start.wait()
        return function(k, *args)

    with ThreadPoolExecutor(WORKERS) as pool:
        return [f.result(timeout=60) for f in [pool.submit(work, k) for k in range(WORKERS)]]


# --- meaning --------------------------------------------------------------------------------------------------------


def is_nan(v):
    return isinstance(v, float) and math.isnan(v)


MODEL = {  # the new element, in exact Python numbers
    "add": lambda old, v: old + v,
    "sub": lambda old, v: old - v,
    "max": lambda old, v: v if v > old else old,
    "min": lambda old, v: v if v < old else old,
    "nanmax": lambda old, v: v if v > old or is_nan(old) else old,
    "nanmin": lambda old, v: v if v < old or is_nan(old) else old,
    "and_": lambda old, v: old & v,
    "or_": lambda old, v: old | v,
    "xor": lambda old, v: old ^ v,
    "exch": lambda old, v: v,
    "inc": lambda old, v: 0 if old >= v else old + 1,
    "dec": lambda old, v: v if old == 0 or old > v else old - 1,
}


def supported(name):
    if name in ("inc", "dec"):
        return ("uint32", "uint64")
    return INTEGERS + FLOATS if name in ("add", "sub", "max", "min", "nanmax", "nanmin") else INTEGERS


@pytest.mark.parametrize("table", [ATOMIC, BLOCK_ATOMIC], ids=["atomic", "block"])
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_every_operation_against_a_model(table, dtype):
    names = [n for n in MODEL if dtype in supported(n)]
    scope = {n: table[n] for n in names}
    body = "".join(f"        old[{k}, i] = {n}(a[{k}], i, v[i])\n" for k, n in enumerate(names))
    exec(f"def run(a, v, old):\n    for i in range(v.size):\n{body}", scope)
    run = jit(scope["run"])

    size = 131
    rng = random.Random(dtype)
    if dtype in FLOATS:
        pool = [0.0, 1.5, -2.25, math.inf, -math.inf, math.nan, 3.0, 1e30]
        before = np.array([rng.choice(pool) for _ in range(size)], dtype)
        v = np.array([rng.choice(pool) for _ in range(size)], dtype)
    else:
        info = np.iinfo(dtype)
        pool = [0, 1, 2, 7, info.max, info.max - 1, info.min, info.min + 1]
        pool += [rng.randint(info.min, info.max) for _ in range(4)]
        before = np.array([rng.choice(pool) for _ in range(size)], dtype)
        v = np.array([rng.choice(pool) for _ in range(size)], dtype)
    a, old = np.tile(before, (len(names), 1)), np.zeros((len(names), size), dtype)
    run(a, v, old)
    for k, name in enumerate(names):
        np.testing.assert_array_equal(old[k], before, err_msg=name)
        expected = [MODEL[name](x.item(), y.item()) for x, y in zip(before, v)]
        if dtype in FLOATS:
            with np.errstate(over="ignore"):
                expected = np.array(expected, np.float64).astype(dtype)
        else:
            bits = np.dtype(dtype).itemsize * 8
            expected = np.array([e % 2**bits for e in expected], f"uint{bits}").astype(dtype)
        np.testing.assert_array_equal(a[k], expected, err_msg=name)


@pytest.mark.parametrize("table", [ATOMIC, BLOCK_ATOMIC], ids=["atomic", "block"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_compare_and_swap(table, dtype):
    cas, swap = table["cas"], table["compare_and_swap"]

    @jit
    def run(a, expected, value):
        return cas(a, -1, expected, value), swap(a, expected, value)

    a = np.array([5, 6, 7], dtype)
    assert run(a, 7, 9) == (7, 5)
    assert a.tolist() == [5, 6, 9]
    assert run(a, 5, 11) == (9, 5)
    assert a.tolist() == [11, 6, 9]
    assert str(run.nopython_signatures[0].return_type.dtype) == dtype


@pytest.mark.parametrize("table", [ATOMIC, BLOCK_ATOMIC], ids=["atomic", "block"])
def test_indices_and_casts(table):
    add, high = table["add"], table["max"]

    @jit
    def one(a, i, v):
        return add(a, i, v)

    @jit
    def three(a, i, j, k, v):
        return add(a, (i, j, k), v), high(a, (-1, np.uint8(0), k), v)

    a = np.array([1, 2, 3], np.int32)
    assert one(a, -1, 2.9) == 3 and a.tolist() == [1, 2, 5]  # 2.9 is cast to int32 first
    assert one(a, np.uint64(1), True) == 2 and a.tolist() == [1, 3, 5]
    b = np.zeros((2, 3, 4), np.float32)
    for source in (b, np.asfortranarray(b), b[:, ::-1]):
        source[...] = 0
        assert three(source, 1, -1, np.int32(2), 3) == (0.0, 0.0)
        assert source[1, -1, 2] == 3 and source[-1, 0, 2] == 3 and source.sum() == 6


@pytest.mark.parametrize("name, array, index, message", [
    ("add", np.zeros(2, np.float16), 0, "atomic.add does not support float16 arrays; use one of int32"),
    ("exch", np.zeros(2, np.float32), 0, "atomic.exch does not support float32 arrays; use one of int32, uint32"),
    ("inc", np.zeros(2, np.int32), 0, "atomic.inc does not support int32 arrays; use one of uint32, uint64"),
    ("add", np.zeros(2, np.int32), 0.5, "index of a 1-dimensional array must be an integer, not float64"),
    ("add", np.zeros((2, 2)), 0, "index of a 2-dimensional array must be a tuple of 2 integers, not int64"),
    ("add", np.zeros(2), (0,), "index of a 1-dimensional array must be an integer"),
    ("max", np.zeros((2, 2)), (0, 0, 0), "index of a 2-dimensional array must be a tuple of 2 integers"),
])
def test_what_numba_cuda_refuses_is_refused_with_a_reason(name, array, index, message):
    operation = ATOMIC[name]

    @jit
    def run(a, i):
        return operation(a, i, 1)

    with pytest.raises(numba.TypingError, match=message):
        run(array, index)


def test_a_read_only_array_and_a_matrix_for_compare_and_swap_are_refused():
    add, swap = ATOMIC["add"], ATOMIC["compare_and_swap"]
    frozen = np.zeros(2, np.int32)
    frozen.flags.writeable = False
    with pytest.raises(numba.TypingError, match="read-only"):
        jit(lambda a: add(a, 0, 1))(frozen)
    with pytest.raises(numba.TypingError, match="this one has 2 dimensions; use atomic.cas"):
        jit(lambda a: swap(a, 0, 1))(np.zeros((2, 2), np.int32))


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_sums_of_several_threads_are_exact(dtype):
    add, sub = ATOMIC["add"], ATOMIC["sub"]

    @jit
    def work(k, a, n):
        for i in range(n):
            add(a, i % 3, 2)
            sub(a, (i + 1) % 3, 1)

    a = np.zeros(3, dtype)
    work(0, a, 0)
    in_threads(work, a, 30_000)
    assert a.tolist() == [WORKERS * 10_000] * 3


def test_tickets_and_extrema_of_several_threads():
    inc, low, high, add = (ATOMIC[n] for n in ("inc", "min", "max", "add"))

    @jit
    def work(k, ticket, wrap, ends, seen):
        for _ in range(20_000):
            mine = add(ticket, 0, 1)
            seen[mine] += 1  # each ticket once
            inc(wrap, 0, 6)
            low(ends, 0, np.float32(-(mine % 997)))
            high(ends, 1, np.float64(mine))

    total = WORKERS * 20_000
    ticket, wrap, ends = np.zeros(1, np.int64), np.zeros(1, np.uint32), np.zeros(2)
    seen = np.zeros(total, np.int32)
    in_threads(work, ticket, wrap, ends, seen)
    assert (seen == 1).all() and ticket[0] == total
    assert wrap[0] == total % 7
    assert ends.tolist() == [-996.0, total - 1]


def test_a_lock_of_cas_and_exch_excludes():
    cas, exch, fence = ATOMIC["cas"], ATOMIC["exch"], atomics.threadfence

    @jit
    def work(k, lock, count, n):
        for _ in range(n):
            spins = 0
            while cas(lock, 0, 0, 1) != 0:
                spins += 1
                if spins > 1_000_000_000:
                    return
            count[0] += 1
            count[1] = count[0] * 2
            fence()
            exch(lock, 0, 0)

    lock, count = np.zeros(1, np.int32), np.zeros(2, np.int64)
    work(0, lock, count, 0)
    in_threads(work, lock, count, 3_000)
    assert count.tolist() == [WORKERS * 3_000, WORKERS * 6_000] and lock[0] == 0


@pytest.mark.parametrize("dtype", ["int32", "float64", "float16", "bool"])
def test_a_waiting_loop_sees_the_store_of_another_thread(dtype):
    load, store = atomics.volatile_load, atomics.volatile_store

    @jit
    def wait(flag, data):
        for _ in range(3_000_000_000):  # seconds; a load that was moved out of the loop would end it at once, or never
            if load(flag, -1) != 0:
                return data[0]
        return -1

    @jit
    def post(flag, data):
        data[0] = 42
        store(flag, -1, True)

    flag, data = np.zeros(3, dtype), np.zeros(1, np.int64)
    post(flag, data)
    assert wait(flag, data) == 42 and flag.tolist() == [0, 0, 1]
    flag[:], data[:] = 0, 0
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait, flag, data)
        time.sleep(0.05)
        assert not waiting.done()
        post(flag, data)
        assert waiting.result(timeout=30) == 42


def test_the_tables_and_the_names_agree():
    assert list(ATOMIC) == list(BLOCK_ATOMIC) and len(ATOMIC) == 14
    for name in ATOMIC:
        assert getattr(atomics, "atomic_" + name.rstrip("_")) is ATOMIC[name]
        assert getattr(atomics, "block_" + name.rstrip("_")) is BLOCK_ATOMIC[name]
