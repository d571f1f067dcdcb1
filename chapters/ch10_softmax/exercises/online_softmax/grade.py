"""The checks of ch10/online_softmax: see `common.grade`."""

import numpy as np
import pytest

from common.grade import check, random, same, shared_out

LOWEST = np.finfo(np.float32).min


def reference(x):
    """The softmax of each row, in float64."""
    x = x.astype(np.float64)
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def numbers(rows, cols, seed=0):
    return random(seed).normal(0, 3, (rows, cols)).astype(np.float32)


def right(student, x, on, hint=None, nan="neutral"):
    """Compare the softmax of each row with the reference. nan: the hint if there is NaN; hint: for all else."""
    answer = student.call("softmax_rows", x, on=on)
    ran = [one["kernel"] for one in answer.own]
    check(ran == ["softmax"], f"softmax_rows launched {ran} of your kernels, not softmax, on {on}", "own-work")
    got, expected = answer.value, reference(x)
    lost = np.argwhere(np.isnan(got))
    told = f"out[{', '.join(map(str, lost[0]))}]" if len(lost) else ""
    check(len(lost) == 0, f"{told} is NaN, {len(lost)} of {x.size} elements are, on {on}", nan)
    rtol = 2e-5 if x.shape[1] < 10_000 else 2e-4  # a thread's sum of hundreds, in float32
    if not np.allclose(got, expected, rtol=rtol, atol=1e-30):
        for row, (mine, theirs) in enumerate(zip(got.astype(np.float64), expected)):
            total = mine.sum()
            if 0 < total < np.inf and abs(total - 1) > 1e-4 and np.allclose(mine / total, theirs, rtol=1e-3, atol=1e-9):
                told = f"the elements of row {row} have the right proportions but sum to {total:.4g}, not 1, on {on}"
                check(False, told, hint or "sum")
    same(got, expected, "out", on, rtol=rtol, atol=1e-30, hint=hint)
    return got


def combined(student, one, hint=None):
    """Compare the merge of two pairs with the reference."""
    (m1, t1), (m2, t2) = one
    m = max(m1, m2)
    expected = [m, t1 * np.exp(m1 - m) + t2 * np.exp(m2 - m)]
    on = f"the pairs ({m1:g}, {t1:g}) and ({m2:g}, {t2:g})"
    got = student.call("merged", np.array([one], np.float32), on=on).value
    same(float(got[0, 0]), expected[0], "largest", on, hint=hint)
    same(float(got[0, 1]), expected[1], "total", on, rtol=1e-5, hint=hint)


def test_memory(student):
    student.clean("softmax_rows", numbers(2, 300), on="2 rows of 300")
    student.clean("softmax_rows", numbers(2, 45), on="2 rows of 45")


def test_merge(student):
    pairs = [
        ((1.0, 1.0), (3.0, 1.0)), ((3.0, 1.0), (1.0, 1.0)), ((2.0, 1.5), (2.0, 2.25)), ((-4.0, 3.0), (5.0, 1.25)),
        ((7.0, 2.0), (6.5, 20.0)), ((-9000.0, 2.0), (-9001.0, 4.0)), ((9000.0, 2.0), (-9000.0, 5.0)),
    ]  # fmt: skip
    for one in pairs:
        combined(student, one)
    for one in [((LOWEST, 0.0), (-3.0, 2.0)), ((-3.0, 2.0), (LOWEST, 0.0))]:
        on = f"(-3, 2) {'after' if one[0][1] == 0 else 'and then'} the pair of nothing, (LOWEST, 0)"
        got = student.call("merged", np.array([one], np.float32), on=on).value
        same(got[0], [-3, 2], "(largest, total)", on, rtol=1e-5, hint="neutral")


@pytest.mark.parametrize("rows, cols", [(3, 256), (2, 1), (5, 31), (4, 33), (3, 127), (2, 129), (3, 1025), (1, 20_000)])
@pytest.mark.parametrize("order", ["in any order", "rising", "falling"])
def test_rows(student, rows, cols, order):
    x = numbers(rows, cols, seed=cols)
    if order != "in any order":
        x = np.ascontiguousarray(np.sort(x, axis=1)[:, :: 1 if order == "rising" else -1])
    right(student, x, f"{rows} rows of {cols}, {order}")


@pytest.mark.parametrize("cols", [6, 131, 777])
def test_large(student, cols):
    x = numbers(5, cols, seed=cols)
    x[0] += 10_000
    x[1] -= 10_000
    x[2] += np.where(np.arange(cols) % 3 == 1, 10_000, -10_000)
    x[3] = -12_345
    x[4] = 85  # exp(85) is finite in float32, the sum of many is not
    names = ["around 10 000", "around -10 000", "around 10 000 and -10 000", "all equal -12 345", "all equal 85"]
    for row, name in zip(x, names):
        right(student, row[None].copy(), f"a row of {cols} logits, {name}", "largest", "largest")


@pytest.mark.parametrize("cols", [2, 64, 1000])
def test_masked(student, cols):
    x = numbers(5, cols, seed=cols)
    x[0, : cols // 2] = x[1, cols // 2 :] = x[2, ::2] = x[3, 1:] = x[4, :-1] = -np.inf
    names = ["in the first half", "in the second half", "at each second place", "behind the first", "but for the last"]
    for row, name in zip(x, names):
        on = f"a row of {cols} with -inf {name}"
        out = right(student, row[None].copy(), on)
        worst = np.abs(out[0][np.isneginf(row)]).max()
        check(worst == 0, f"an element of -inf got the weight {worst:.3g}, on {on}", "neutral")


@pytest.mark.parametrize("rows, cols", [(2, 96), (1, 640)])
def test_passes(student, rows, cols):
    x, on = numbers(rows, cols), f"{rows} row{'s' * (rows > 1)} of {cols}"
    answer = student.call("softmax_rows", x, on=on, memory=True)
    same(answer.value, reference(x), "out", on, rtol=2e-5, atol=1e-30)  # counts are worth nothing if it is wrong
    seen = answer.total("bytes", space="global", access="read") / x.nbytes
    check(seen <= 2, f"for each element, {seen:.3g} floats are read from global memory, not 2, on {on}", "twice")
    shared_out(answer, on, "softmax", warps=min(8, 4 * rows) if cols >= 128 else 3)
