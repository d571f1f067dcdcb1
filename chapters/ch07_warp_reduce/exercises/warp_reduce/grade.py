"""The checks of ch07/warp_reduce: see `common.grade`."""

import numpy as np
import pytest

from common.grade import check, random, same, shared_out

WARP = 32


def rows_of(cols, rows=3, seed=0, shift=0.0):
    return (random(seed).standard_normal((rows, cols)) + shift).astype(np.float32)


def right(got, x, on):
    """Compare with NumPy's, low first. Nothing is added, so nothing is rounded: the numbers must be the same."""
    check(np.shape(got) == (2, len(x)), f"the result is {got!r}, on {on}", "steps")
    for name, mine, expected, neutral in (
        ("low", got[0], x.min(axis=1), np.inf),
        ("high", got[1], x.max(axis=1), -np.inf),
    ):
        known = all(number in (*row, neutral) for number, row in zip(mine, x))  # if not, a thread began with it
        same(mine, expected, name, on, hint="steps" if known else "neutral")


def told_of(x, threads):
    return f"cols = {x.shape[1]}, blocks of {threads} threads"


def counted(student):
    """An answer of blocks of 8 warps, with what they asked of memory, and on which input. The result must be right."""
    x, threads = rows_of(1000, seed=8), 256
    on = told_of(x, threads)
    answer = student.call("ranges", x, threads, on=on, memory=True)
    right(answer.value, x, on)
    return answer, x, threads // WARP * len(x), on


def test_memory(student):
    for cols, threads in ((300, 64), (5, 64)):
        x = rows_of(cols)
        on = told_of(x, threads)
        got = student.clean("ranges", x, threads, on=on).value
        check(not np.isnan(got).all(), f"your kernel has written neither low nor high, on {on}", "steps")


@pytest.mark.parametrize("threads", [32, 1024])
def test_lengths(student, threads):
    for cols in (1, 31, 33, 127, 256, 1025, 5000):
        x = rows_of(cols, seed=cols)
        right(student.call("ranges", x, threads, on=told_of(x, threads)).value, x, told_of(x, threads))
    for place in (0, 31, threads - 1, threads, 2 * threads):  # both numbers sit at the edge of something
        x = rows_of(2 * threads + 1, rows=2, seed=place)
        x[0, place], x[1, place] = 50, -50
        on = f"{told_of(x, threads)}, the largest (row 0) or smallest (row 1) at column {place}"
        right(student.call("ranges", x, threads, on=on).value, x, on)


@pytest.mark.parametrize("shift", [-10.0, 10.0])
def test_neutral(student, shift):
    for cols in (3, 100, 1000):
        x = rows_of(cols, seed=cols, shift=shift) * np.float32(1e30)  # beyond every number that one might begin with
        on = f"{told_of(x, 1024)}, all elements {'below' if shift < 0 else 'above'} 0"
        right(student.call("ranges", x, 1024, on=on).value, x, on)
    x = rows_of(40, rows=4)
    x[0], x[1] = -np.inf, np.inf
    x[2, 7], x[3, 9] = -np.inf, np.inf
    on = f"{told_of(x, 1024)}: a row of -inf, a row of inf, a row with one -inf, a row with one inf"
    right(student.call("ranges", x, 1024, on=on).value, x, on)


def test_shuffles(student):
    answer, _, warps, on = counted(student)
    atomics = answer.total("threads", access="atomic")
    check(atomics == 0, f"there are {atomics} atomic operations, on {on}", "shuffles")
    stored = answer.total("threads", space="shared", access="write")
    seen = f"threads store {stored} numbers in shared memory"
    check(stored <= 2 * warps, f"{seen}, two for each of {warps} warps are enough, on {on}", "shuffles")
    check(stored >= warps, f"{seen}, so not all of the {warps} warps take part, on {on}", "warps")
    shared_out(answer, on, "row_range", warps=8, hint="warps")


def test_reads(student):
    answer, x, _, on = counted(student)
    elements, moved, best = (
        answer.total(what, space="global", access="read") for what in ("threads", "sectors", "ideal_sectors")
    )
    seen = f"threads read {elements} elements of x, which has {x.size}"
    check(elements < 1.1 * x.size, f"{seen}, on {on}", "once")
    seen = f"the reads of x move {moved} pieces of 32 bytes, {best} would do"
    check(moved <= 1.1 * best, f"{seen}, on {on}", "coalesced")
