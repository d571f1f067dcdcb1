"""Chapter 13, sampling: temperature, top-k, top-p and a seeded draw, on the device and without a sort.

=================  ====================================================  ===========================================
kernel             what it does                                          passes over the vocabulary, one block
=================  ====================================================  ===========================================
``filter_logits``  logits -> weights: temperature, top-k, then top-p     3, and some 15 to 30 for each filter in use
``draw_token``     weights -> a token, by one uniform random number      1, then 1/32 of it, 1/1024, …
=================  ====================================================  ===========================================

Three ideas make this short and exactly repeatable:

*Weights are integers.* A token's weight is exp((logit - largest) / temperature), the softmax before its division, in
units of 2^-40. Integer sums are exact, so they do not depend on the order of the threads, and the same logits keep the
same tokens on every run. A token less than 2^-41 times as likely as the likeliest has weight 0 and is never drawn.

*A filter is a line.* The k largest logits are those above some line; so is the smallest set of tokens that holds a
share p of the weight. Floats sort like integers once their bits are rearranged (``float_key``), so the line is found by
halving an interval of integers: each time the block adds up what lies above the middle.

*Random numbers are a function.* Philox turns (seed, step) into random bits, with no state to keep: step 7 of a
generation draws the same number whether or not steps 0 … 6 were run, on a GPU or not.

Order and ties: temperature, then top-k, then top-p over what top-k kept, renormalised (as the transformers library
does). Exactly k tokens stay; among equal logits at the edge of either filter, those with the lowest index. -inf and
NaN are never kept; if nothing else is there, the token is -1. +inf takes all the weight, shared if there are several.
"""

import math
import operator

import numpy as np
from numba import cuda, float32, float64, int64, uint64

from chapters.ch07_warp_reduce.kernels import WARP, block_max, warp_sum
from chapters.ch08_atomics_scan.topk import float_key, key_float

SAMPLING_THREADS = 512  # a thread of filter_logits needs more than the 64 registers that 1024 threads would leave it
UNIT = 1 << 40  # the weight of the likeliest token
INDEX_BITS = 22
MAX_VOCAB = 1 << INDEX_BITS  # the sum of so many weights still fits an int64
LAST_INDEX = MAX_VOCAB - 1
DROPPED = -1  # the weight of a token that a filter took out
LOWEST_KEY = -0x7F7FFFFF  # float_key of the lowest finite float32


# --- device functions: sums of integers, floats as integers, random numbers ------------------------------------------


@cuda.jit(device=True)
def block_sum_int64(value, partial):
    """Sum of ``value`` over a one-dimensional block, in every thread: chapter 7's ``block_sum`` for integers.

    value: int64. partial: (32,) int64 in shared memory, free for use again as soon as the call returns.
    """
    total = warp_sum(value)
    if cuda.threadIdx.x % WARP == 0:
        partial[cuda.threadIdx.x // WARP] = total
    cuda.syncthreads()
    total = int64(0)
    for warp in range(cuda.blockDim.x // WARP):
        total += partial[warp]
    cuda.syncthreads()
    return total


@cuda.jit(device=True)
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four random 32-bit words from a counter (c0 … c3) and a key (k0, k1), as a tuple.

    All are uint64 that hold 32 bits: in one type, products and shifts mean the same on every machine.
    Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    low = uint64(0xFFFFFFFF)
    for _ in range(10):
        product0 = uint64(0xD2511F53) * c0
        product1 = uint64(0xCD9E8D57) * c2
        c0 = (product1 >> uint64(32)) ^ c1 ^ k0
        c1 = product1 & low
        c2 = (product0 >> uint64(32)) ^ c3 ^ k1
        c3 = product0 & low
        k0 = (k0 + uint64(0x9E3779B9)) & low  # the golden ratio and sqrt(3) - 1, in units of 2^-32
        k1 = (k1 + uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


@cuda.jit(device=True)
def uniform(seed, step, draw):
    """Draw number ``draw`` of step ``step``: a float64 in [0, 1), a multiple of 2^-32. All arguments uint64."""
    low = uint64(0xFFFFFFFF)
    half = uint64(32)
    word, _, _, _ = philox4x32(step & low, step >> half, draw & low, draw >> half, seed & low, seed >> half)
    return float64(word) * 2.0**-32


# --- the filters -----------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def keep_largest(logits, weights, need, count, low, high, n, partial):
    """Drops all tokens but the fewest of the largest logits whose weights add up to ``need``.

    logits: (n,) float32. weights: (n,) int64; tokens that leave get DROPPED. need: int64, from 1 to the sum of weights.
    count: int64, the tokens not dropped yet. low, high: int64, every such token's place is in low … high - 1.
    partial: (32,) int64, shared. All threads of the block call it. Returns the place of the line drawn, int64.

    A token's *place* is float_key(logit) · 2^22 + 2^22 - 1 - index: no two are equal, and among equal logits a lower
    index has the higher place. The line is moved by halves until one token alone lies between low and high.
    """
    tid = cuda.threadIdx.x
    count_low = count  # tokens at or above low; their weight is always >= need
    count_high = int64(0)  # tokens at or above high; their weight is always < need
    while count_low - count_high > 1:
        middle = low + (high - low) // 2
        edge = key_float(middle >> INDEX_BITS)
        last = LAST_INDEX - (middle & LAST_INDEX)
        mass = int64(0)
        count = int64(0)
        for i in range(tid, n, cuda.blockDim.x):
            if weights[i] >= 0 and (logits[i] > edge or (logits[i] == edge and i <= last)):
                mass += weights[i]
                count += 1
        mass = block_sum_int64(mass, partial)
        count = block_sum_int64(count, partial)
        if mass >= need:
            low = middle
            count_low = count
        else:
            high = middle
            count_high = count
    edge = key_float(low >> INDEX_BITS)
    last = LAST_INDEX - (low & LAST_INDEX)
    for i in range(tid, n, cuda.blockDim.x):
        if not (logits[i] > edge or (logits[i] == edge and i <= last)):
            weights[i] = DROPPED
    return low


@cuda.jit(device=True)
def weight_of(logit, largest, temperature):
    """exp((logit - largest) / temperature) in units of 2^-40, int64. logit, largest: float32. temperature: float64."""
    weight = int64(UNIT)
    if logit < largest:  # inf - inf would be NaN
        weight = int64(math.exp((float64(logit) - float64(largest)) / temperature) * UNIT + 0.5)
    return weight


@cuda.jit(device=True)
def filter_block(logits, weights, n, temperature, k, p, partial_max, partial):
    """What :func:`filter_logits` does, by one block; there the arguments are explained.

    partial_max: (32,) float32, and partial: (32,) int64, both shared. A thread has written weights[i] for the i that it
    strides over; others may read them behind a barrier.
    """
    tid = cuda.threadIdx.x
    largest = float32(-np.inf)
    for i in range(tid, n, cuda.blockDim.x):
        largest = max(largest, logits[i])  # max ignores NaN
    largest = block_max(largest, partial_max)

    low = int64(LOWEST_KEY) << INDEX_BITS
    high = (float_key(largest) + 1) << INDEX_BITS
    count = int64(n)
    need = int64(k)
    for top_p in range(2):  # first top-k, where each token weighs 1, so that k tokens are a weight of k; then top-p
        total = int64(0)
        for i in range(tid, n, cuda.blockDim.x):
            weight = int64(DROPPED)
            if top_p == 0:
                if logits[i] > float32(-np.inf):  # false for NaN too
                    weight = int64(1)
            elif weights[i] != DROPPED:
                weight = weight_of(logits[i], largest, temperature)
            weights[i] = weight
            total += max(weight, 0)
        total = block_sum_int64(total, partial)
        if top_p == 0:
            count = total
        else:
            count = min(count, int64(k))
            need = total
            if p < 1.0:
                need = max(int64(p * total), 1)
        if need < total:
            low = keep_largest(logits, weights, need, count, low, high, n, partial)


@cuda.jit
def filter_logits(logits, weights, n, temperature, k, p):
    """weights[i] = exp((logits[i] - largest) / temperature) in units of 2^-40 for the tokens kept, DROPPED for others.

    logits: (n,) float32. weights: (n,) int64. n: int32, at most MAX_VOCAB. temperature: float64 > 0. k: int32 >= 1, no
    filter from n on. p: float64 in (0, 1]; 1 is no filter. Kept: the k largest logits, and of these the fewest whose
    weights make up p of the sum (to the unit; always one at least). exp is taken in float64, and only for the tokens
    that top-k left: float32 would be off by some 2^-22, which moves the edge of top-p in a flat distribution.
    Launch: ``filter_logits[sample_launch()](…)``, one block. Source: top-k, Fan et al. 2018; top-p, Holtzman et al.
    2020, "The Curious Case of Neural Text Degeneration".
    """
    partial_max = cuda.shared.array(WARP, float32)
    partial = cuda.shared.array(WARP, int64)
    filter_block(logits, weights, n, temperature, k, p, partial_max, partial)


# --- the draw --------------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def draw_index(weights, n, seed, step, draw, sums):
    """A token, drawn with probability weights[token] / sum of weights, in every thread of the block; -1 if all are 0.

    weights: (n,) int64. seed, step, draw: uint64, see :func:`uniform`. sums: (32,) int64, shared. The token is the one
    at which the running sum of the weights passes uniform · total. To find it, the warps add up 32 stretches of the
    vocabulary; the one in which that point lies is divided by 32 again, and so on.
    """
    lane = cuda.threadIdx.x % WARP
    warp = cuda.threadIdx.x // WARP
    n_warps = cuda.blockDim.x // WARP
    begin = int64(0)  # the token is one of begin … end - 1
    end = int64(n)
    total = int64(0)
    target = int64(-1)  # how much of the weight from begin on lies in front of the point: known after the first round
    while end - begin > 1 or target < 0:
        stretch = (end - begin + WARP - 1) // WARP
        for turn in range((WARP + n_warps - 1) // n_warps):  # one turn in a block of 32 warps
            part = warp + turn * n_warps
            first = begin + part * stretch
            mass = int64(0)
            for i in range(first + lane, min(first + stretch, end), WARP):
                mass += max(weights[i], 0)
            mass = warp_sum(mass)
            if lane == 0 and part < WARP:
                sums[part] = mass
        cuda.syncthreads()
        if target < 0:
            for part in range(WARP):
                total += sums[part]
            target = int64(uniform(seed, step, draw) * total)
        chosen = 0
        while chosen < WARP - 1 and sums[chosen] <= target:
            target -= sums[chosen]
            chosen += 1
        cuda.syncthreads()  # all have read sums: the next round writes it
        begin += chosen * stretch
        end = min(begin + stretch, end)
    return begin if total > 0 else int64(-1)


@cuda.jit
def draw_token(weights, out, n, seed, step):
    """out[d] = a token, drawn with probability weights[token] / sum of weights; block d makes draw d of this step.

    weights: (n,) int64, from filter_logits; DROPPED counts as 0. out: (draws,) int32; -1 if all weights are 0.
    n: int32. seed, step: uint64; the same pair always draws the same numbers.
    Launch: ``draw_token[sample_launch(draws)](…)``. Source: inversion sampling, Devroye 1986, chapter III.
    """
    sums = cuda.shared.array(WARP, int64)
    token = draw_index(weights, n, seed, step, uint64(cuda.blockIdx.x), sums)
    if cuda.threadIdx.x == 0:
        out[cuda.blockIdx.x] = token


@cuda.jit
def draw_token_at(weights, out, n, seed, step):
    """:func:`draw_token` with the step in device memory, step[0], (1,) int64: for a launch that is always the same."""
    sums = cuda.shared.array(WARP, int64)
    token = draw_index(weights, n, seed, uint64(step[0]), uint64(cuda.blockIdx.x), sums)
    if cuda.threadIdx.x == 0:
        out[cuda.blockIdx.x] = token


# --- host side -------------------------------------------------------------------------------------------------------


def sample_launch(draws=1):
    """Launch configuration of the sampling kernels: ``(grid, block)``, one block, or one a draw for ``draw_token``.

    Raises ValueError if ``draws`` is not positive.
    """
    if draws <= 0:
        raise ValueError(f"draws = {draws}: a launch needs at least 1 draw")
    return draws, SAMPLING_THREADS


def _whole(name, value, low, high, fix):
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or not low <= whole <= high:
        raise ValueError(f"{name} = {value!r}: must be a whole number from {low} to {high}; {fix}")
    return whole


def check_sampling(n, temperature=1.0, k=None, p=1.0, seed=0, step=0):
    """The sampling parameters, checked, as the kernels take them: ``(n, temperature, k, p, seed, step)``.

    k: None or more than n becomes n, no filter. seed and step become np.uint64. Raises ValueError, naming the value,
    the limit and what to do, unless 1 <= n <= MAX_VOCAB, temperature > 0 and finite, k >= 1, 0 < p <= 1, and seed and
    step are in 0 … 2^64 - 1.
    """
    n = _whole("n", n, 1, MAX_VOCAB, "it is the length of the logits")
    k = n if k is None else min(_whole("k", k, 1, 2**31 - 1, "leave top-k out (None) to keep every token"), n)
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature = {temperature}: must be more than 0 and finite; "
            "for the likeliest token each time use greedy decoding, or k = 1"
        )
    if not 0 < p <= 1:
        raise ValueError(f"p = {p}: must be more than 0 and at most 1; 1 keeps every token")
    seed = _whole("seed", seed, 0, 2**64 - 1, "any number there gives its own sequence")
    step = _whole("step", step, 0, 2**64 - 1, "count the tokens generated so far")
    return n, float(temperature), k, float(p), np.uint64(seed), np.uint64(step)


def sample(logits, weights, out, n, temperature=1.0, k=None, p=1.0, seed=0, step=0, stream=0):
    """Draws ``len(out)`` tokens from the logits of one position; the result stays on the device.

    logits: (n,) float32. weights: (n,) int64, working memory; afterwards what filter_logits wrote. out: (draws,)
    int32; -1 if no logit can be drawn. All three are device arrays. The other parameters, and the ValueErrors raised,
    are those of :func:`check_sampling`; one seed and a new step for each token make a generation.
    """
    n, temperature, k, p, seed, step = check_sampling(n, temperature, k, p, seed, step)
    grid, block = sample_launch()
    filter_logits[grid, block, stream](logits, weights, n, temperature, k, p)
    grid, block = sample_launch(out.shape[0])
    draw_token[grid, block, stream](weights, out, n, seed, step)


# --- references ------------------------------------------------------------------------------------------------------


def weights_reference(logits, temperature=1.0, k=None, p=1.0):
    """NumPy reference of :func:`filter_logits`, by sorting: (n,) float32; returns (n,) int64."""
    weights = np.full(len(logits), DROPPED, np.int64)
    valid = np.flatnonzero(logits > -np.inf)
    if not len(valid):
        return weights
    kept = valid[np.argsort(-logits[valid], kind="stable")][:k]  # stable: the lowest index first among equals
    distance = np.zeros(len(kept))
    smaller = logits[kept] < logits[kept[0]]
    distance[smaller] = logits[kept[smaller]].astype(np.float64) - np.float64(logits[kept[0]])
    mass = np.floor(np.exp(distance / temperature) * UNIT + 0.5).astype(np.int64)
    if p < 1:
        running = np.cumsum(mass)
        size = 1 + int(np.searchsorted(running, int(p * running[-1])))
        kept, mass = kept[:size], mass[:size]
    weights[kept] = mass
    return weights


def kept_reference(logits, temperature=1.0, k=None, p=1.0):
    """The tokens that :func:`filter_logits` keeps: (n,) float32, returns (n,) bool."""
    return weights_reference(logits, temperature, k, p) != DROPPED


def probabilities_reference(logits, temperature=1.0, k=None, p=1.0):
    """The probability of each token to be drawn: (n,) float32, returns (n,) float64, 0 for the tokens not kept."""
    weights = np.maximum(weights_reference(logits, temperature, k, p), 0).astype(np.float64)
    return weights / max(weights.sum(), 1.0)


def philox_reference(counter, key):
    """Reference of :func:`philox4x32` in Python's integers: four and two 32-bit words, returns four."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 % 2**32, (product0 >> 32) ^ c3 ^ k1, product0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def uniform_reference(seed, step, draw=0):
    """Reference of :func:`uniform`: Python ints, returns a float in [0, 1)."""
    counter = step % 2**32, step >> 32, draw % 2**32, draw >> 32
    return philox_reference(counter, (seed % 2**32, seed >> 32))[0] * 2.0**-32


def draw_reference(weights, number):
    """NumPy reference of :func:`draw_token`: (n,) int64 and a uniform number in [0, 1); returns an int, -1 if none."""
    running = np.cumsum(np.maximum(weights, 0))
    if running[-1] == 0:
        return -1
    return int(np.searchsorted(running, int(number * float(running[-1])), side="right"))
