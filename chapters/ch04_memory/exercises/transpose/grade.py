"""The checks of ch04/transpose: see `common.grade`."""

import numpy as np
import pytest

from common.grade import check, random, same, shared_out

SECTOR = 8  # floats
UNTOUCHED = -7  # what is in out before the launch
FULL = [(2, 64, 96), (1, 160, 32)]  # no tile sticks out, and rows begin with a sector: what must be moved is plain


def numbers(shape):
    """Different numbers, in no order: a wrong element is never right by chance."""
    return random(sum(shape)).permutation(int(np.prod(shape))).astype(np.float32).reshape(shape)


def counted(student, shape):
    """The answer of a transpose, with what it asked of memory, and the input in words."""
    x, on = numbers(shape), f"x of shape {shape}"
    answer = student.call("transpose", x, on=on, memory=True)
    same(answer.value, x.transpose(0, 2, 1), "out", on, hint="corner")  # counts are worth nothing if it is wrong
    return answer, on


def test_memory(student):
    for shape in (2, 40, 50), (1, 65, 3):
        got = student.clean("transpose", numbers(shape), on=f"x of shape {shape}").value
        check((got != UNTOUCHED).any(), f"nothing was written to out, on x of shape {shape}", "start")


@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 64, 96), (3, 33, 50), (1, 1, 31), (2, 127, 1), (12, 100, 64)])
def test_values(student, shape):
    x, on = numbers(shape), f"x of shape {shape}"
    got, expected = student.call("transpose", x, on=on).value, x.transpose(0, 2, 1)
    hint = "turn" if shape == (1, 32, 32) else "corner"
    if shape[0] > 1 and np.array_equal(got[0], expected[0]):
        hint = "heads"
    elif np.array_equal(got[:, :, :8], expected[:, :, :8]) or np.array_equal(got[:, :8], expected[:, :8]):
        hint = "rows"
    same(got, expected, "out", on, hint=hint)


@pytest.mark.parametrize("shape", FULL)
def test_coalesced(student, shape):
    answer, on = counted(student, shape)
    rows = answer.memory
    hint = "strided" if any(one["space"] == "shared" for one in rows) else "no-tile"
    needed = int(np.prod(shape)) // SECTOR
    for access in ("read", "write"):
        mine = [one for one in rows if one["space"] == "global" and one["access"] == access]
        moved = sum(one["sectors"] for one in mine)
        each = [f"line {one['line']}: {one['array']}, {one['sectors'] / one['requests']:.3g} a request" for one in mine]
        told = f"{access}s move {moved} sectors of global memory"
        check(moved >= needed, f"{told}, but the data fill {needed}, on {on}", "rows")
        check(moved <= needed, f"{told}, and {needed} would do, on {on} ({'; '.join(each)})", hint)
    shared_out(answer, on, "transpose_heads", warps=8)


@pytest.mark.parametrize("shape", FULL)
def test_banks(student, shape):
    answer, on = counted(student, shape)
    rows = [one for one in answer.memory if one["space"] == "shared"]
    for access in ("write", "read"):
        through = answer.total("threads", space="shared", access=access)
        told = f"{access}s of shared memory are {through}, for {np.prod(shape)} elements"
        check(through >= np.prod(shape), f"{told}, on {on}", "no-tile")
    worst = max(rows, key=lambda one: one["wavefronts"] / one["ideal_wavefronts"])
    turns, best = worst["wavefronts"], worst["ideal_wavefronts"]
    told = f"line {worst['line']}: {worst['access']}s of {worst['array']} take {turns} turns"
    check(turns == best, f"{told}, and {best} would do, on {on}")
