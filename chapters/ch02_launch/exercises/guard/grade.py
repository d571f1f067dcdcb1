"""The checks of ch02/guard: see `common.grade`."""

import numpy as np
import pytest

from common.grade import check, random, same, shared_out

THREADS = 128
LOW, HIGH = -0.5, 0.75  # exact in float32


def numbers(size, seed):
    """Normal numbers, the first and the last ones outside of LOW to HIGH: a clamp that misses them is seen."""
    x = random(seed).standard_normal(size).astype(np.float32)
    x[: min(size, 2)] = 9
    x[-1:] = -9
    return x


def clamped(student, x, n, on):
    """What clamp gives, after it was made sure that it launched the kernel."""
    answer = student.call("clamp", x, n, LOW, HIGH, on=on)
    ran = [one["kernel"] for one in answer.own]
    check(ran == ["clamp_kernel"], f"clamp launched {ran or 'no kernel'}, not clamp_kernel once, on {on}", "own-launch")
    returned = getattr(answer.value, "shape", answer.value)
    check(returned == x.shape, f"clamp returned {returned!r}, not an array of shape {x.shape}, on {on}", "values")
    return answer


def test_memory(student):
    for n, blocks in (300, 3), (129, 4), (1, 1):
        on = f"n = {n}, an array of {n} elements, {blocks} blocks of {THREADS}"
        x = numbers(n, n)
        got = student.clean("clamp_with", blocks, x, n, LOW, HIGH, on=on).value
        check(not np.array_equal(got, x), f"x is as it was before the launch, on {on}", "start")
    on = "n = 333, an array of 333 elements"
    student.clean("clamp", numbers(333, 0), 333, LOW, HIGH, on=on, hint="own-launch")


@pytest.mark.parametrize("n", [1025, 33, 127, 31, 1, 128, 20_000])
def test_values(student, n):
    x, on = numbers(n, n), f"n = {n}, low = {LOW}, high = {HIGH}"
    expected = np.clip(x, LOW, HIGH)
    same(student.call("clamp_with", -(-n // THREADS), x, n, LOW, HIGH, on=on).value, expected, "x", on)
    same(clamped(student, x, n, on).value, expected, "clamp(x)", on, hint="uncovered")
    if n == 1025:  # and it takes many threads to do it
        blocks, x = 8, np.full(1024, 9, np.float32)
        on = f"n = 1024, all of them above high, {blocks} blocks of {THREADS}"
        answer = student.call("clamp_with", blocks, x, 1024, LOW, HIGH, on=on, memory=True)
        shared_out(answer, on, "clamp_kernel", warps=8)


@pytest.mark.parametrize("n, size", [(300, 500), (1, 128), (127, 1000), (1025, 1026)])
def test_behind(student, n, size):
    on = f"n = {n}, an array of {size} elements"
    x = np.full(size, 9, np.float32)  # all of it too large: whatever is clamped is seen
    expected = np.where(np.arange(size) < n, np.float32(HIGH), x)
    for blocks in (-(-n // THREADS), -(-n // THREADS) + 3):
        more = f"{on}, {blocks} blocks of {THREADS}"
        got = student.call("clamp_with", blocks, x, n, LOW, HIGH, on=more).value
        same(got, expected, "x", more, hint="behind" if np.array_equal(got[:n], expected[:n]) else "values")
    got = clamped(student, x, n, on).value
    same(got, expected, "clamp(x)", on, hint="behind" if np.array_equal(got[:n], expected[:n]) else "uncovered")


@pytest.mark.parametrize("n, size", [(129, 129), (128, 128), (1, 1), (1024, 1024), (385, 385), (100, 1000), (0, 40)])
def test_blocks(student, n, size):
    on = f"n = {n}, an array of {size} elements"
    x = numbers(size, n)
    if n == 0:
        answer = student.call("clamp", x, 0, LOW, HIGH, on=on, hint="empty")
        check(not answer.launches, f"clamp launched a kernel, on {on}", "empty")
        same(answer.value, x, "clamp(x)", on, hint="empty")
        return
    launch = clamped(student, x, n, on).own[0]
    idle = f"{on}, with a clamp_kernel that does nothing"
    same(student.call("clamp", x, n, LOW, HIGH, on=idle, idle=True).value, x, "clamp(x)", idle, hint="own-launch")
    grid, block = launch["grid"], launch["block"]
    check(block == [THREADS, 1, 1], f"the block is {block}, expected {[THREADS, 1, 1]}, on {on}")
    check(grid == [-(-n // THREADS), 1, 1], f"the grid is {grid}, expected {[-(-n // THREADS), 1, 1]}, on {on}")
