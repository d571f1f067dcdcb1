"""The checks of ch09/nibbles: see `common.grade`."""

import numpy as np
import pytest

from common.grade import check, random, same, shared_out

GROUP, IN_WORD, UNTOUCHED = 32, 8, -7


def pack(q):
    """Words of q (K, N), from 0 to 15: (K // 8, N) int32."""
    parts = q.astype(np.uint32).reshape(-1, IN_WORD, q.shape[1])
    return sum(parts[:, j] << np.uint32(4 * j) for j in range(IN_WORD)).view(np.int32)


def whole(K, N, x=2, step=3, least=8):
    """``x, q, steps, least``, all whole, as large as said and of both signs; no step is 0."""
    rng = random(K, N)
    q = rng.integers(0, 16, (K, N))
    steps = rng.integers(1, step + 1, (K // GROUP, N)) * rng.choice([-1, 1], (K // GROUP, N))
    lows = rng.integers(-least, least + 1, (K // GROUP, N))
    return rng.integers(-x, x + 1, K).astype(np.float16), q, steps.astype(np.float16), lows.astype(np.float16)


def fractions(K, N):
    """As `whole`, but numbers as a model has them."""
    rng = random(K, N, 1)
    steps, lows = 0.05 * rng.standard_normal((2, K // GROUP, N))
    q = rng.integers(0, 16, (K, N))
    return rng.standard_normal(K).astype(np.float16), q, steps.astype(np.float16), 8 * lows.astype(np.float16)


def spread(numbers):
    """A number a group → a number a weight, in float64."""
    return np.repeat(numbers.astype(np.float64), GROUP, axis=0)


def called(student, function, numbers, **how):
    x, q, steps, least = numbers
    return student.call(function, x, pack(q), steps, least, **how)


def told_of(numbers, what="whole numbers"):
    return f"K = {len(numbers[1])}, N = {numbers[1].shape[1]}, {what}"


def of_mistakes(x, q, steps, least):
    """[(hint, in words, y)]: what comes of mistakes that people make."""
    x, K = x.astype(np.float64), len(q)
    step, low, group = spread(steps), spread(least), np.arange(K) // GROUP
    right = step * q
    others = {
        "those of group 0": np.zeros(K, int),
        "those of row k // 64": group // 2,
        "those of row k // 8, from 0 again behind the last": np.arange(K) // IN_WORD % len(steps),
        "those of row k, from 0 again behind the last": np.arange(K) % len(steps),
    }
    made = [
        ("least", "the least number is left out", x @ right),
        ("least", "the least number is added once a group", x @ right + least.sum(axis=0, dtype=np.float64)),
        ("least", "the least number is added once a column", x @ right + low[0]),
        ("least", "the least number is added behind the product with x", x @ right + low.sum(axis=0)),
        ("weight", "the step is left out", x @ (q + low)),
        ("weight", "step and least number have changed places", x @ (low * q + step)),
        ("weight", "the step multiplies the least number, too", x @ (step * (q + low))),
        ("column", "step and least number are those of column 0", x @ (step[:, :1] * q + low[:, :1])),
        ("all", "only the first group counts", x[:GROUP] @ (right + low)[:GROUP]),
    ]
    for words, rows in others.items():
        mine, its = steps.astype(np.float64)[rows], least.astype(np.float64)[rows]
        made += [("group", f"step and least number are {words}", x @ (mine * q + its))]
        made += [("group", f"the step is one of {words}", x @ (mine * q + low))]
        made += [("group", f"the least number is one of {words}", x @ (right + its))]
    return made


def right(y, numbers, on, slack=0.0, hint="weight"):
    """Compare y with NumPy's. slack: 0 asks for equality; else how many roundings to float32 a weight may cost."""
    x, q, steps, least = numbers
    expected = x.astype(np.float64) @ (spread(steps) * q + spread(least))
    size = np.abs(x).astype(np.float64) @ (np.abs(spread(steps)) * q + np.abs(spread(least)))
    bound = slack * 2.0**-24 * len(q) * size  # Higham 2002, section 3.1: in any order
    if not np.all(np.abs(y - expected) <= bound):
        for mistake, words, wrong in of_mistakes(*numbers):
            if np.all(np.abs(y - wrong) <= bound) and not np.all(np.abs(wrong - expected) <= bound):
                check(False, f"y is what comes out if {words}, on {on}", mistake)
        if np.all((np.abs(y - expected) <= bound) | (y == UNTOUCHED)):
            hint = "missing"
        elif np.array_equal(y, expected + UNTOUCHED):
            hint = "stored"
        elif np.all(np.abs(y - expected) <= 0.01 * size):
            hint = "rounding"
    if slack == 0:
        same(y, expected.astype(np.float32), "y", on, hint=hint)
        return
    far = np.where(np.isnan(y), np.inf, np.abs(y - expected) / bound)
    n = int(far.argmax())
    seen = f"y[{n}] is {y[n]:.9g}, expected {expected[n]:.9g}, and float32 comes within {bound[n]:.2g} of it"
    check(far[n] <= 1, f"{seen}, on {on}", hint)


def test_memory(student):
    for K, N in ((64, 150), (32, 5)):
        x, q, steps, least = numbers = fractions(K, N)
        y = student.clean("product", x, pack(q), steps, least, on=told_of(numbers, "random weights")).value
        check((y != UNTOUCHED).any(), f"your kernel has not written any element of y, on K = {K}, N = {N}", "missing")


def test_apart(student):
    """x is 1 at one k and 0 elsewhere, so y is row k of W; the steps are 1 and the least numbers 0, so that is q."""
    K, N = GROUP, 24
    q = random(9).integers(0, 16, (K, N))
    q[IN_WORD - 1 :: IN_WORD, : N // 2] |= 8  # the sign bit of a word: set in these columns
    q[IN_WORD - 1 :: IN_WORD, N // 2 :] &= 7  # … and not in those
    ones, zeros = np.ones((1, N), np.float16), np.zeros((1, N), np.float16)
    on, rows = f"K = {K}, N = {N}, all steps 1, all least numbers 0", []
    for k in range(K):
        x = np.zeros(K, np.float16)
        x[k] = 1
        rows.append(called(student, "product", (x, q, ones, zeros), on=f"{on}, x = 1 at k = {k} and 0 elsewhere").value)
    got = np.stack(rows)
    if np.array_equal(got, q):
        return
    k, n = (int(i) for i in np.argwhere(got != q)[0])
    word = int(pack(q)[k // IN_WORD, n])
    if (got == UNTOUCHED).all(axis=0).any():
        hint = "missing"
    elif np.array_equal(got, q + UNTOUCHED):
        hint = "stored"
    elif np.array_equal(got, np.ones_like(q)):
        hint = "weight"
    elif np.array_equal(got[:, N // 2 :], q[:, N // 2 :]):
        hint = "sign"
    elif np.array_equal(np.sort(got, axis=0), np.sort(q, axis=0)):
        hint = "order"
    else:
        hint = "apart" if (got[np.isfinite(got)] % 1 == 0).all() and 0 <= got.min() and got.max() < 16 else "mask"
    seen = f"with x = 1 at k = {k} and 0 elsewhere, y[{n}] is {got[k, n]:.9g}, expected {q[k, n]}"
    place = f"words[{k // IN_WORD}, {n}] is {word}, in hexadecimal {word & 0xFFFFFFFF:#010x}"
    check(False, f"{seen}; {place}; on {on}", hint)


@pytest.mark.parametrize("K, N", [(32, 33), (64, 70), (96, 300), (320, 129), (1024, 40), (64, 1)])
def test_groups(student, K, N):
    numbers = whole(K, N)  # sums are so small that float16 would hold them
    on = told_of(numbers)
    right(called(student, "product", numbers, on=on).value, numbers, on)


def test_float32(student):
    numbers = whole(64, 150, x=8, step=60, least=2000)  # float16 skips whole numbers above 2048
    on = told_of(numbers, "whole numbers, weights up to 2900")
    right(called(student, "product", numbers, on=on).value, numbers, on, hint="rounding")
    for K, N in ((32, 200), (768, 50)):
        numbers = fractions(K, N)
        on = told_of(numbers, "random weights")
        right(called(student, "product", numbers, on=on).value, numbers, on, slack=2, hint="rounding")
    numbers = whole(64, 150)
    on = told_of(numbers)
    counted = called(student, "traffic", numbers, on=on, cpu=True).value["operations"]
    for kind, hint in (("float64", "wide"), ("float16", "rounding")):
        check(not counted.get(kind), f"threads make {counted.get(kind)} operations in {kind}, on {on}", hint)


def test_reads(student):
    numbers = whole(96, 300)
    (K, N), on = numbers[1].shape, told_of(numbers)
    answer = called(student, "product", numbers, on=on, memory=True)
    right(answer.value, numbers, on)  # counts are worth nothing if y is wrong
    shared_out(answer, on, "gemv_q4", warps=8)
    for name, each, hint in [("words", IN_WORD, "word"), *((one, GROUP, "once-a-group") for one in ("steps", "least"))]:
        read, needed = answer.total("threads", array=name, access="read"), N * K // each
        seen = f"threads read {read} elements of {name}"
        check(read >= needed, f"{seen} in a way that can be counted, of {needed}, on {on}", "slices")
        check(read <= needed, f"{seen}, {needed} are enough, on {on}", hint)
    for access, needed in (("read", 0), ("write", N)):
        times = answer.total("threads", array="y", access=access)
        check(times <= needed, f"threads {access} {times} elements of y, {needed} are enough, on {on}", "register")
