"""The checks of ch04/transpose: see `common.grade`."""

import numpy as np
import pytest

from common.grade import check, same

SECTOR = 8  # floats
UNTOUCHED = -7  # what is in out before the launch
FULL = [(2, 64, 96), (1, 160, 32)]  # no tile sticks out, and rows begin with a sector: what must be moved is plain


def numbers(shape):
    """Different numbers, in no order: a wrong element is never right by chance."""
    return np.random.default_rng(sum(shape)).permutation(int(np.prod(shape))).astype(np.float32).reshape(shape)


def counted(student, shape):
    return student.call("count", numbers(shape), on=f"x of shape {shape}", cpu=True).value


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
    rows, on = counted(student, shape), f"x of shape {shape}"
    hint = "strided" if any(one["space"] == "shared" for one in rows) else "no-tile"
    needed = int(np.prod(shape)) // SECTOR
    for access in ("read", "write"):
        mine = [one for one in rows if one["space"] == "global" and one["access"] == access]
        moved = sum(one["sectors"] for one in mine)
        each = [f"line {one['line']}: {one['array']}, {one['sectors'] / one['requests']:.3g} a request" for one in mine]
        told = f"{access}s move {moved} sectors of global memory"
        check(moved >= needed, f"{told}, but the data fill {needed}, on {on}", "rows")
        check(moved <= needed, f"{told}, and {needed} would do, on {on} ({'; '.join(each)})", hint)


@pytest.mark.parametrize("shape", FULL)
def test_banks(student, shape):
    rows, on = [one for one in counted(student, shape) if one["space"] == "shared"], f"x of shape {shape}"
    used = {one["access"] for one in rows}
    check({"read", "write"} <= used, f"shared memory is not both written and read, on {on}", "no-tile")
    worst = max(rows, key=lambda one: one["turns"] / one["best_turns"])
    told = f"line {worst['line']}: {worst['access']}s of {worst['array']} take {worst['turns']} turns"
    check(worst["turns"] == worst["best_turns"], f"{told}, and {worst['best_turns']} would do, on {on}")
