"""The checks of ch13/topp: see `common.grade`."""

import math

import numpy as np
import pytest

from common.grade import check, draw_oracle, random, same, shared_out

DRAWS = 100_000
THREADS = 256


def ranked(logits, temperature=1.0):
    """The tokens that may stay, likeliest first, of equals the lower index; and the share of all weight of each."""
    candidates = np.flatnonzero(logits > -math.inf)  # false for NaN
    order = candidates[np.argsort(-logits[candidates], kind="stable")]
    weights = np.exp((logits[order].astype(np.float64) - np.float64(logits[order[0]])) / temperature)
    return order, weights / weights.sum()


def reference(logits, temperature, p):
    """Which logits stay."""
    keep = np.zeros(len(logits), np.int32)
    order, share = ranked(logits, temperature)
    keep[order[(np.cumsum(share) - share < p) | (p >= 1)]] = 1
    return keep


def between(logits, p, temperature=1.0):
    """A number near ``p`` that is far from every possible sum, so that no rounding decides which tokens stay."""
    _, share = ranked(logits, temperature)
    sums = np.cumsum(share)
    last = min(int(np.searchsorted(sums, p)), len(sums) - 1)
    return float(sums[last] - share[last] / 2)


def numbers(n, seed=0):
    return (2 * random(seed).standard_normal(n)).astype(np.float32)


def stay(count):
    return f"{count} token{'s' * (count != 1)} stay{'s' * (count == 1)}"


def kept(student, logits, temperature, p, on, hint=None):
    """Compare what stays with the reference."""
    answer = student.call("top_p", logits, temperature, p, on=on)
    ran = [one["kernel"] for one in answer.own]
    check(ran == ["weigh", "keep_top_p"], f"top_p launched {ran}, not weigh and keep_top_p, on {on}", "own-work")
    expected = reference(logits, temperature, p)
    got, order = answer.value, ranked(logits, temperature)[0]
    if not np.array_equal(got, expected):
        size, wanted = int((got == 1).sum()), int(expected.sum())
        if hint is None and abs(size - wanted) == 1 and (got[order[:size]] == 1).all():
            share = ranked(logits, temperature)[1][:size].sum()
            told = f"{stay(size)}, which hold{'s' * (size == 1)} a share of {share:.6g}; expected {wanted}, on {on}"
            check(False, told, "reaches")
        check(size == wanted, f"{stay(size)}, expected {wanted}, on {on}", hint)
    same(got, expected, "keep", on, hint=hint)


def words(n, p, temperature=None):
    return f"n = {n}, p = {p:.6g}" + (f", temperature {temperature:g}" if temperature else "")


def test_memory(student):
    student.clean("top_p", numbers(300), 1.0, 0.9, on="n = 300, p = 0.9")
    student.clean("sample", numbers(45), 0.8, 0.9, 1, 0, 3, on="n = 45, p = 0.9, 3 steps")


@pytest.mark.parametrize("n, p", [(33, 0.9), (1, 0.5), (31, 0.3), (127, 0.7), (1025, 0.95), (50257, 0.9)])
def test_nucleus(student, n, p):
    logits = numbers(n, seed=n)
    p = between(logits, p)
    kept(student, logits, 1.0, p, words(n, p))
    expected = np.exp(logits.astype(np.float64) - np.float64(logits.max()))
    on = f"n = {n}, temperature 1"
    got = student.call("weigh_all", logits, 1.0, on=on).value
    shares = np.allclose(got / got.sum(), expected / expected.sum(), rtol=1e-13, atol=0)
    same(got, expected, "weights", on, rtol=1e-13, hint="largest" if shares else "weights")


@pytest.mark.parametrize("n, values, p", [(40, 3, 0.7), (129, 2, 0.4), (1000, 5, 0.9)])
def test_ties(student, n, values, p):
    for count, share in [(64, 0.25), (8, 0.5), (512, 0.75)]:  # each token weighs 1, and no sum is rounded
        logits = np.zeros(count, np.float32)
        on = f"{count} equal logits, p = {share}"
        size = int((student.call("top_p", logits, 1.0, share, on=on).value == 1).sum())
        told = f"{stay(size)}, expected {int(share * count)}, which hold exactly {share}, on {on}"
        check(size == int(share * count), told, "reaches" if abs(size - share * count) == 1 else "ties")
        kept(student, logits, 1.0, share, on, "ties")
    logits = random(n).integers(0, values, n).astype(np.float32)
    p = between(logits, p)
    kept(student, logits, 1.0, p, f"{words(n, p)}, logits from 0 to {values - 1}", "ties")


@pytest.mark.parametrize("n", [1, 2, 100, 700])
def test_edges(student, n):
    logits = numbers(n, seed=n + 1)
    logits[n // 2 + 1 :: 3] -= 60  # their weight is there, and too small to move the sum
    logits[n // 3 + 1 :: 5] -= 900  # e to the power of -900 is 0
    kept(student, logits, 1.0, 1.0, f"{words(n, 1)}, logits from {logits.min():.0f} to {logits.max():.0f}", "all")
    kept(student, logits, 1.0, 1e-9, words(n, 1e-9), "one")
    kept(student, np.zeros(n, np.float32), 1.0, 1e-9, f"{words(n, 1e-9)}, all logits 0", "one")


@pytest.mark.parametrize("p", [0.3, 0.9, 1.0])
def test_special(student, p):
    logits = numbers(64)
    logits[::7], logits[3::9] = -np.inf, np.nan
    p = p if p == 1 else between(logits, p)
    kept(student, logits, 1.0, p, f"{words(64, p)}, some logits -inf and some NaN", "special")
    on = f"16 logits that are all -inf or NaN, p = {p:.6g}"
    nothing = np.array([-np.inf, np.nan] * 8, np.float32)
    same(student.call("top_p", nothing, 1.0, p, on=on).value, [0] * 16, "keep", on, hint="special")
    same(student.call("sample", nothing, 1.0, p, 1, 0, 2, on=on).value, [-1, -1], "tokens", on, hint="masked")


@pytest.mark.parametrize("temperature, around", [(0.5, 0), (2.0, 0), (0.004, 5), (0.004, -5)])
def test_temperature(student, temperature, around):
    logits = numbers(200, seed=9)
    hint = "temperature"
    if around:  # all logits near one another: many stay
        logits, hint = logits * np.float32(temperature) + np.float32(around), "largest"
    p = between(logits, 0.9, temperature)
    kept(student, logits, temperature, p, f"{words(200, p, temperature)}, logits around {around}", hint)


def test_repeatable(student):
    logits, on = numbers(500), "n = 500, p = 0.9, 64 steps"
    run = lambda seed, first: student.call("sample", logits, 1.0, 0.9, seed, first, 64, on=on).value
    one = run(1, 0)
    same(run(1, 0), one, "tokens drawn again with the same seed", on)
    check(not np.array_equal(run(2, 0), one), f"seeds 1 and 2 draw the same 64 tokens, on {on}")
    same(run(1, 16)[:48], one[16:], "tokens of steps 16 to 63 drawn alone", on)
    check(len(np.unique(one)) > 5, f"64 steps draw {len(np.unique(one))} different tokens, on {on}")


@pytest.mark.parametrize("p, temperature", [(0.8, 1.0), (0.6, 2.0), (0.95, 0.7)])
def test_distribution(student, p, temperature):
    n = 64 if p != 0.6 else 1000  # more tokens than threads
    logits = numbers(n, seed=5)
    p = between(logits, p, temperature)
    on = words(n, p, temperature)
    tokens = student.call("sample", logits, temperature, p, 7, 0, DRAWS, on=on).value
    keep = reference(logits, temperature, p).astype(bool)
    check(((tokens >= 0) & (tokens < n)).all(), f"token {tokens.min()} was drawn, on {on}")
    strangers = np.setdiff1d(tokens, np.flatnonzero(keep))
    check(len(strangers) == 0, f"tokens {strangers[:3].tolist()} were drawn, which are not kept, on {on}", "masked")
    weights = np.exp(logits[keep].astype(np.float64) / temperature)
    expected = DRAWS * weights / weights.sum()
    seen = np.bincount(tokens, minlength=n)[keep]
    distance = ((seen - expected) ** 2 / expected).sum()
    worst = int(np.abs(seen - expected).argmax())
    told = f"token {np.flatnonzero(keep)[worst]} was drawn {seen[worst]} times, expected {expected[worst]:.0f}"
    freedom = len(expected) - 1
    limit = freedom + 6 * math.sqrt(2 * freedom) + 10  # fair draws come above it less than once in 100 000 trials
    check(distance < limit, f"{told} of {DRAWS} (chi-square {distance:.0f}, allowed {limit:.0f}), on {on}")


def test_sums(student):
    n, seed = 8 * THREADS, int(random(11).integers(1, 2**31))
    logits, weights, steps, uniforms = draw_oracle.delicate(seed, n, 8, 24)
    on = f"n = {n}, p = 1: the first and the last token weigh 1, those between {weights[1]:.3g}, seed {seed}"
    for step, number in zip(steps, uniforms):
        token = int(student.call("sample", logits, 1.0, 1.0, seed, step, 1, on=f"{on}, step {step}").value[0])
        right = int(np.searchsorted(np.cumsum(weights), number * weights.sum(), side="right"))
        drawn = f"token {token} was drawn, expected {right}"
        check(draw_oracle.is_drawn(token, weights, number), f"{drawn}, on {on}, step {step}", "float64")
    on = f"n = {THREADS}, p = 0.5, {THREADS} equal logits"  # exactly half of them stay
    answer = student.call("sample", np.zeros(THREADS, np.float32), 1.0, 0.5, seed, 0, THREADS, on=on, memory=True)
    for kernel in ("weigh", "keep_top_p", "draw"):
        shared_out(answer, on, kernel, warps=8)
