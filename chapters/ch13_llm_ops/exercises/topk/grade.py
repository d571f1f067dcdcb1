"""The checks of ch13/topk: see `common.grade`."""

import math

import numpy as np
import pytest

from common.grade import check, draw_oracle, random, same, shared_out

DRAWS = 100_000
THREADS = 256


def reference(logits, k):
    """Which logits stay: a stable sort by falling logit, of those that may stay."""
    candidates = np.flatnonzero(logits > -math.inf)  # false for NaN
    order = candidates[np.argsort(-logits[candidates], kind="stable")]
    keep = np.zeros(len(logits), np.int32)
    keep[order[: max(k, 0)]] = 1
    return keep


def numbers(n, seed=0):
    return random(seed).standard_normal(n).astype(np.float32)


def kept(student, logits, k, on, hint=None):
    """Compare what stays with the reference."""
    answer = student.call("top_k", logits, k, on=on)
    ran = [one["kernel"] for one in answer.own]
    check(ran == ["keep_top_k"], f"top_k launched {ran} of your kernels, not keep_top_k, on {on}", "own-work")
    same(answer.value, reference(logits, k), "keep", on, hint=hint)


def test_memory(student):
    on = "n = 257, k = 40"
    keep = student.clean("top_k", numbers(257), 40, on=on).value
    check(not (keep == 7).any(), f"keep[{np.argmax(keep == 7)}] was not written, on {on}", "rank")
    on = "n = 300, k = 40, 3 steps"
    tokens = student.clean("sample", numbers(300), 40, 0.8, 1, 0, 3, on=on).value
    check(not (tokens == -7).any(), f"tokens[{np.argmax(tokens == -7)}] was not written, on {on}", "softmax")


@pytest.mark.parametrize("n, k", [(33, 5), (1, 1), (31, 7), (127, 40), (1025, 300), (50257, 40)])
def test_selection(student, n, k):
    kept(student, numbers(n, seed=n), k, f"n = {n}, k = {k}")


@pytest.mark.parametrize("n, k", [(40, 7), (129, 64), (1000, 1)])
def test_ties(student, n, k):
    logits = random(n).integers(0, 5, n).astype(np.float32)
    on = f"n = {n}, k = {k}, logits from 0 to 4"
    answer = student.call("top_k", logits, k, on=on)
    check(np.sum(answer.value) == min(n, k), f"{np.sum(answer.value)} tokens stay, not {min(n, k)}, on {on}", "ties")
    kept(student, logits, k, on, "ties")


@pytest.mark.parametrize("n, k", [(100, 1), (100, 100), (100, 101), (33, 1_000_000)])
def test_edges(student, n, k):
    kept(student, numbers(n, seed=k), k, f"n = {n}, k = {k}", "clamp")


@pytest.mark.parametrize("k", [1, 10, 60])
def test_special(student, k):
    logits = numbers(64)
    logits[::7], logits[3::9] = -np.inf, np.nan
    kept(student, logits, k, f"n = 64 of which some are -inf and some NaN, k = {k}", "special")
    on = "16 logits that are all -inf or NaN"
    nothing = np.array([-np.inf, np.nan] * 8, np.float32)
    same(student.call("sample", nothing, 4, 1.0, 1, 0, 2, on=on).value, [-1, -1], "tokens", on, hint="special")


def test_repeatable(student):
    logits, on = numbers(500), "n = 500, k = 50, 64 steps"
    draw = lambda seed, first: student.call("sample", logits, 50, 1.0, seed, first, 64, on=on).value
    one = draw(1, 0)
    same(draw(1, 0), one, "tokens drawn again with the same seed", on, hint="seed")
    check(not np.array_equal(draw(2, 0), one), f"seeds 1 and 2 draw the same 64 tokens, on {on}", "seed")
    same(draw(1, 16)[:48], one[16:], "tokens of steps 16 to 63 drawn alone", on, hint="seed")
    check(len(np.unique(one)) > 5, f"64 steps draw {len(np.unique(one))} different tokens, on {on}", "seed")


def counted(student, logits, k, temperature, seed, on, hint):
    """Compare how often tokens are drawn with the softmax over the k largest."""
    n = len(logits)
    tokens = student.call("sample", logits, k, temperature, seed, 0, DRAWS, on=on).value
    keep = reference(logits, k).astype(bool)
    check(((tokens >= 0) & (tokens < n)).all(), f"token {tokens.min()} was drawn, on {on}", hint)
    strangers = np.setdiff1d(tokens, np.flatnonzero(keep))
    check(len(strangers) == 0, f"{strangers[:3]} were drawn, which are not among the {k} largest, on {on}", "masked")
    weights = np.where(keep, np.exp((logits.astype(np.float64) - logits.max()) / temperature), 0)
    expected = DRAWS * weights[keep] / weights.sum()
    seen = np.bincount(tokens, minlength=n)[keep]
    distance = ((seen - expected) ** 2 / expected).sum()
    worst = int((np.abs(seen - expected) / np.sqrt(expected)).argmax())
    told = f"token {np.flatnonzero(keep)[worst]} was drawn {seen[worst]} times, expected {expected[worst]:.0f}"
    freedom = k - 1
    limit = freedom + 6 * math.sqrt(2 * freedom) + 10  # fair draws come above it less than once in 100 000 trials
    check(distance < limit, f"{told} of {DRAWS} (chi-square {distance:.0f}, allowed {limit:.0f}), on {on}", hint)


@pytest.mark.parametrize("shift, temperature", [(0.0, 1.0), (0.0, 0.5), (120.0, 1.0)])
def test_distribution(student, shift, temperature):
    n, k = 64, 12
    logits = numbers(n, seed=5) + np.float32(shift)
    on = f"n = {n}, k = {k}, temperature {temperature}, logits around {shift:g}"
    counted(student, logits, k, temperature, 7, on, "largest" if shift else "softmax")
    if shift == 0 and temperature == 1:  # more tokens than threads, and those that stay are neighbours
        n, k, first = 1000, 30, 700
        logits = numbers(n, seed=6)
        logits[first : first + k] += 8 + np.float32(0.1) * np.arange(k, dtype=np.float32) % np.float32(1)
        on = f"n = {n}, k = {k}, temperature 1, the largest logits near one another"
        counted(student, logits, k, 1.0, 8, on, "range")


def test_sums(student):
    n, seed = 8 * THREADS, int(random(11).integers(1, 2**31))
    logits, weights, steps, uniforms = draw_oracle.delicate(seed, n, 8, 24)
    on = f"n = k = {n}: the first and the last token weigh 1, those between {weights[1]:.3g}, seed {seed}"
    for step, number in zip(steps, uniforms):
        token = int(student.call("sample", logits, n, 1.0, seed, step, 1, on=f"{on}, step {step}").value[0])
        right = int(np.searchsorted(np.cumsum(weights), number * weights.sum(), side="right"))
        drawn = f"token {token} was drawn, expected {right}"
        check(draw_oracle.is_drawn(token, weights, number), f"{drawn}, on {on}, step {step}", "float64")
    answer = student.call("sample", logits, n, 1.0, seed, 0, 1, on=on, memory=True)
    for kernel in ("keep_top_k", "draw_kept"):
        shared_out(answer, on, kernel, warps=8)
