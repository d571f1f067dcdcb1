"""Draws by inverse transform, exactly: what the exercises of chapter 13 are compared with."""

import numpy as np

EXACT = 1e-9  # of all weight: what sums in float64 may differ by in any order, with exp in float32 of small weights


def uniforms(seed, first_step, count):
    """``uniform(seed, step, 0)`` of chapter 13 for ``count`` steps from ``first_step`` on: (count,) float64."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    step = np.arange(first_step, first_step + count, dtype=np.uint64)
    a, b, c, d = step & low, step >> half, np.zeros_like(step), np.zeros_like(step)
    key, other = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        even, odd = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = odd >> half ^ b ^ np.uint64(key), odd & low, even >> half ^ d ^ np.uint64(other), even & low
        key, other = key + 0x9E3779B9 & 0xFFFFFFFF, other + 0xBB67AE85 & 0xFFFFFFFF
    return a * 2.0**-32


def is_drawn(token, weights, number):
    """Is a token the first at which the running sum of ``weights`` (n,) float64 passes ``number`` times their sum?"""
    if not 0 <= token < len(weights) or weights[token] <= 0:
        return False
    running = np.cumsum(weights)
    near = EXACT * running[-1]
    return running[token] - weights[token] - near <= number * running[-1] <= running[token] + near


def delicate(seed, n, range_size, count):
    """Logits that only sums in float64 tell apart, and steps of a seed that do: ``(logits, weights, steps, numbers)``.

    logits: (n,) float32, weights: (n,) float64, their exp. The first and the last token weigh 1, those between 2.6e-8
    each, a fifth of what float32 can add to 1; in the first ``range_size`` tokens together, they are as badly rounded
    as can be, and in the last ones there are none. steps: ``count`` of them, whose numbers fall between the two.
    """
    logits = np.full(n, np.log(2.0**-23 * 1.5 / (range_size - 1)), np.float32)
    logits[[0, -1]] = 0
    logits[-range_size:-1] = -np.inf
    weights = np.exp(logits.astype(np.float64))
    steps, numbers, first = [], [], 0
    while len(steps) < count:
        block = uniforms(seed, first, 1 << 18)
        line = block * weights.sum()
        hits = np.flatnonzero((line > 1 + 1e-6) & (line < weights[:-1].sum() - 1e-6))
        steps += (first + hits).tolist()
        numbers += block[hits].tolist()
        first += len(block)
    return logits, weights, steps[:count], numbers[:count]
