"""The checks of ch08/scan: see `common.grade`."""

import numpy as np
import pytest

from common.grade import check, random, same, shared_out

THREADS, WARP = 1024, 32


def numbers(n):
    return random(n).integers(-100, 100, n).astype(np.int32)


def right(got, x, on, hint="steps"):
    """Compare an inclusive scan with NumPy's."""
    expected = np.cumsum(x, dtype=np.int32)
    if np.array_equal(got, expected - x):
        hint = "inclusive"
    elif hint == "steps" and len(x) > WARP and np.array_equal(got[:WARP], expected[:WARP]):
        hint = "warps"
    same(got, expected, "out", on, hint=hint)


def test_memory(student):
    for n in (1100, 40):
        got = student.clean("scan", numbers(n), on=f"n = {n}").value
        check((got != -7).any(), f"your kernels have not written any element of out, on n = {n}", "steps")


def test_block(student):
    told = []
    for n in (1, 2, 31, 32, 33, 500, 1023, 1024):
        x, on = numbers(n), f"n = {n}"
        out, sums = student.call("block_scans", x, on=on).value
        right(out, x, on)
        told.append((sums, x, on))
    for sums, x, on in told:  # later: a sum is wrong wherever the scan is
        same(sums, [x.sum(dtype=np.int32)], "sums", on, hint="sums")


@pytest.mark.parametrize("n", [1025, 2048, 5000, 70_000, 300_001])
def test_long(student, n):
    x, on = numbers(n), f"n = {n}"
    out, sums = student.call("block_scans", x, on=on).value
    for first in range(0, n, THREADS):
        right(out[first : first + THREADS], x[first : first + THREADS], f"{on}, elements from {first} on, first launch")
    same(sums, np.add.reduceat(x, range(0, n, THREADS), dtype=np.int32), "sums", on, hint="sums")
    right(student.call("scan", x, on=on).value, x, on, "offset")


def test_parallel(student):
    x = numbers(3 * THREADS)
    on = f"n = {len(x)}"
    answer = student.call("block_scans", x, on=on, memory=True)
    for first in range(0, len(x), THREADS):  # counts are worth nothing if the result is wrong
        block = slice(first, first + THREADS)
        right(answer.value[0][block], x[block], f"{on}, elements from {first} on, first launch")
    elements = answer.total("threads", space="global", access="read")
    check(elements <= len(x), f"threads read {elements} elements of {len(x)}, on {on}", "alone")
    shared_out(answer, on, "scan_blocks", warps=8)
    allowed = 3 * 50 * WARP  # Hillis and Steele need some 3 requests of 32 warps in each of 10 steps
    requests = answer.total("requests", space="shared")
    seen = f"warps turn to shared memory {requests} times, {allowed} are more than enough"
    check(requests <= allowed, f"{seen}, on {on}", "alone")
    # One thread may go over the totals of 32 warps, and one of each warp store its own: but not over 1024 elements.
    lonely = sum(one["requests"] for one in answer.memory if one["threads"] < 3 * one["requests"])
    allowed = 3 * 8 * WARP
    seen = f"one or two threads alone turn to memory {lonely} times, {allowed} are more than enough"
    check(lonely <= allowed, f"{seen}, on {on}", "alone")
    answer = student.call("scan", x, on=on, memory=True)
    right(answer.value, x, on, "offset")
    shared_out(answer, on, "add_offsets", warps=0)
