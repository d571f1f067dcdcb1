"""The checks of ch03/indexing: see `common.grade`."""

import numpy as np
import pytest

from common.grade import check, random, same, shared_out

# Kernels are compiled for each block, and for each sign of down and right: there are few of them in all checks.
BLOCK = (16, 4)  # threads along x and y, for roll
UNTOUCHED = -7  # what is in out before the launch


def numbers(*shape):
    """Different numbers, in no order: a wrong element is never right by chance."""
    return random(sum(shape)).permutation(int(np.prod(shape))).astype(np.float32).reshape(shape)


def cover(rows, cols):
    """A grid of roll that has a thread for each element."""
    return [-(-cols // BLOCK[0]), -(-rows // BLOCK[1])]


def mirrored(student, shape, blocks, threads, on):
    """Compare with the reference, and say what else the result is, if that is known."""
    image = numbers(*shape)
    got, expected = student.call("mirror", image, blocks, threads, on=on).value, image[:, ::-1]
    hint = "mirror"
    if np.array_equal(got, image[:, ::-1, ::-1]):
        hint = "channels"
    elif np.array_equal(got, image[::-1]):
        hint = "upside"
    elif (got == expected).any() and ((got == expected) | (got == UNTOUCHED)).all():
        hint = "stride"
    same(got, expected, "out", on, hint=hint)


def rolled(student, shape, down, right, grid, on, covers):
    """Compare with the reference, and say what else the result is, if that is known. covers: is the grid that large?"""
    x = numbers(*shape)
    got, expected = student.call("roll", x, down, right, grid, BLOCK, on=on).value, np.roll(x, (down, right), (0, 1))
    hint = "wrap" if abs(down) > 3 or down < 0 else "roll"
    if np.array_equal(got, np.roll(x, (-down, -right), (0, 1))):
        hint = "direction"
    elif np.array_equal(got, np.roll(x, (right, down), (0, 1))):
        hint = "roll"
    elif (got == UNTOUCHED).any():
        hint = "stride" if not covers else "wrap" if down or right else "axes"
    same(got, expected, "out", on, hint=hint)


def clean(student, function, *args, on):
    """No finding of the sanitizer, and something was done."""
    out = student.clean(function, *args, on=on).value
    check((out != UNTOUCHED).any(), f"{function} wrote nothing to out, on {on}", "start")


def test_memory(student):
    on = "mirror, a picture of shape (5, 7, 3), 2 blocks of 64 threads"
    clean(student, "mirror", numbers(5, 7, 3), 2, 64, on=on)
    for down, right in (-1, -4), (2000, 3):
        on = f"roll, x of shape (5, 37), down = {down}, right = {right}, {cover(5, 37)} blocks of {BLOCK}"
        clean(student, "roll", numbers(5, 37), down, right, cover(5, 37), BLOCK, on=on)


@pytest.mark.parametrize("shape", [(6, 10, 4), (7, 33, 1), (1, 31, 3), (127, 1, 2), (40, 25, 3), (1, 1, 1)])
def test_mirror(student, shape):
    size = int(np.prod(shape))
    on = f"a picture of shape {shape}, {-(-size // 64)} blocks of 64 threads"
    mirrored(student, shape, -(-size // 64), 64, on)


@pytest.mark.parametrize("shape", [(6, 33), (127, 5), (1, 31), (33, 1), (20, 20)])
@pytest.mark.parametrize("down, right", [(0, 0), (1, 3), (-2, -1), (1000, 2003), (-1000, -50)])
def test_roll(student, shape, down, right):
    on = f"x of shape {shape}, down = {down}, right = {right}, {cover(*shape)} blocks of {BLOCK}"
    rolled(student, shape, down, right, cover(*shape), on, True)


@pytest.mark.parametrize("function", ["mirror", "roll"])
def test_neighbours(student, function):
    if function == "mirror":
        on, arguments = "a picture of shape (16, 32, 3), 12 blocks of 64 threads", (numbers(16, 32, 3), 12, 64)
    else:  # rows of a block are 64 bytes, and so is what they go to: no sector is cut
        on = f"x of shape (32, 64), down = 1, right = 8, {cover(32, 64)} blocks of {BLOCK}"
        arguments = numbers(32, 64), 1, 8, cover(32, 64), BLOCK
    answer = student.call(function, *arguments, on=f"{function}, {on}", memory=True)
    shared_out(answer, on, f"{function}_kernel", warps=8, hint="neighbours")
    moved, best = answer.total("sectors", space="global"), answer.total("ideal_sectors", space="global")
    traffic = f"{function}_kernel's reads and writes move {moved} pieces of 32 bytes, {best} would do"
    check(moved <= 2 * best, f"{traffic}, on {on}", "neighbours")


@pytest.mark.parametrize("blocks, threads", [(1, 1), (1, 64), (3, 64), (40, 64)])
def test_grids(student, blocks, threads):
    on = f"a picture of shape (9, 31, 3), {blocks} blocks of {threads} threads"
    mirrored(student, (9, 31, 3), blocks, threads, on)
    shape = (19, 70)
    grid = {1: [1, 1], 3: [2, 3], 40: [9, 8]}[blocks]
    on = f"x of shape {shape}, down = 1, right = 2, {grid} blocks of {BLOCK}"
    rolled(student, shape, 1, 2, grid, on, blocks == 40)
