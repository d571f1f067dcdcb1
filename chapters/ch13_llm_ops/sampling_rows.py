"""Chapter 13, sampling for a batch: a row a block, with settings in arrays.

Each row of logits is of another request, with other settings. As launch arguments they would take a launch
a row, and a CUDA graph for each setting. In arrays on the device, a row's block reads its own: the launches are always
the same ones, with the same arguments.

==================  ====================================================================  =============================
kernel              what it does                                                          blocks
==================  ====================================================================  =============================
``adjust_rows``     penalties and biases: logits -> a second buffer                       one for 2048 tokens of a row
``draw_rows``       temperature, top-k, top-p, min-p and the draw, for rows that draw     one a row
``count_tokens``    the new tokens are counted, for the penalties of the next step        a thread a row
``logprobs_rows``   log-probabilities of a token and of the likeliest ones, and its rank  one a row
==================  ====================================================================  =============================

A step is ``adjust_rows``, chapter 7's ``argmax_row`` for all rows, ``draw_rows``, which overwrites the token of those
that draw, and ``count_tokens``. Rows without penalties need neither the first nor the last. (``sampling_slices.py`` has
the draw by several blocks a row, which the capstone takes.)

A row's result depends on its logits, settings, seed and step alone: not on which row of which batch it is. Without
penalties and min-p it is the token that ``sampling.sample`` draws, since the same device functions draw it.
"""

import math

import numpy as np
from numba import cuda, float32, float64, int32, int64, uint64

from chapters.ch03_indexing.kernels import blocks_1d
from chapters.ch07_warp_reduce.argmax import argmax_reference
from chapters.ch07_warp_reduce.kernels import WARP, block_max, warp_max
from chapters.ch08_atomics_scan.topk import NO_PLACE, float_key, key_float
from chapters.ch13_llm_ops.sampling import (
    DROPPED,
    INDEX_BITS,
    LAST_INDEX,
    SAMPLING_THREADS,
    UNIT,
    block_sum_int64,
    draw_index,
    draw_reference,
    filter_block,
    uniform_reference,
    weight_of,
    weights_reference,
)

ADJUST_THREADS = 256
SLICE = 2048  # tokens of a row that a block of adjust_rows takes
IN_PROMPT = 1 << 30  # in a count: the token occurs in the prompt; the bits below say how often it was generated
MAX_TOP = 20  # log-probabilities of the likeliest tokens that a row can ask for
COUNT_THREADS = 64


# --- penalties and biases --------------------------------------------------------------------------------------------


def adjust_launch(n_rows, vocab_size):
    """Launch configuration of :func:`adjust_rows`: ``(grid, block)``, a block a slice of a row.

    Raises ValueError if a size is not positive.
    """
    _check_sizes(n_rows, vocab_size)
    return (-(-vocab_size // SLICE), n_rows), ADJUST_THREADS


@cuda.jit
def adjust_rows(
    logits, adjusted, active, presence, frequency, repetition, count_slot, counts, bias_ids, bias_values, vocab_size
):
    """adjusted[r] = logits[r] with the penalties of row r for the tokens that its text has, plus its biases.

    logits, adjusted: (n_rows, vocab_size) float32. By row, (max_rows,): active int32, 0 for a row to leave alone;
    presence, frequency, repetition float32 (repetition > 0; neutral: 0, 0, 1); count_slot int32, the row of ``counts``,
    -1 for no penalties. counts: (max_slots, vocab_size) int32: how often a token was generated, plus IN_PROMPT if the
    prompt has it. bias_ids: (max_rows, width) int32, different tokens, then -1 to the end; bias_values: float32.
    vocab_size: int32. A token of the text with a logit above 0 is divided by repetition, another one multiplied; then
    frequency · count is subtracted, and presence if it was generated at all. In float64, rounded once.
    Launch: ``adjust_rows[adjust_launch(n_rows, vocab_size)](…)``, any block. Source: repetition, Keskar et al. 2019,
    "CTRL"; presence and frequency, OpenAI's API.
    """
    row = cuda.blockIdx.y
    begin = cuda.blockIdx.x * SLICE
    end = min(begin + SLICE, vocab_size)
    if active[row] == 0:
        return
    slot = count_slot[row]
    for i in range(begin + cuda.threadIdx.x, end, cuda.blockDim.x):
        logit = float64(logits[row, i])
        count = 0
        if slot >= 0:
            count = counts[slot, i]
        if count != 0:
            generated = count & (IN_PROMPT - 1)
            logit = logit / repetition[row] if logit > 0 else logit * repetition[row]
            logit -= float64(frequency[row]) * generated
            if generated > 0:
                logit -= presence[row]
        adjusted[row, i] = logit
    cuda.syncthreads()
    for j in range(cuda.threadIdx.x, bias_ids.shape[1], cuda.blockDim.x):
        token = bias_ids[row, j]
        if token < 0:
            break
        if begin <= token < end:
            adjusted[row, token] += bias_values[row, j]


@cuda.jit
def count_tokens(chosen, active, count_slot, counts, n_rows):
    """counts[count_slot[r], chosen[r]] += 1 for the active rows r that have a slot and a token.

    chosen, active: (n_rows,) int32. count_slot: (n_rows,) int32, no slot twice; -1 for none. counts: (max_slots,
    vocab_size) int32. n_rows: int32. A token of -1 is none. Launch: ``count_tokens[count_launch(n_rows)](…)``, any
    block.
    """
    row = cuda.grid(1)
    if row < n_rows and active[row] != 0 and count_slot[row] >= 0 and chosen[row] >= 0:
        counts[count_slot[row], chosen[row]] += 1


def count_launch(n_rows):
    """Launch configuration of :func:`count_tokens`: ``(grid, block)``, a thread a row."""
    return blocks_1d(n_rows, COUNT_THREADS)


def counts_of(prompt, generated, vocab_size):
    """A row of ``counts``, (vocab_size,) int32, from the tokens of a prompt and those generated behind it."""
    counts = np.bincount(np.asarray(generated, np.int64), minlength=vocab_size).astype(np.int32)
    counts[np.asarray(prompt, np.int64)] |= IN_PROMPT
    return counts


# --- the draw --------------------------------------------------------------------------------------------------------


def rows_launch(n_rows):
    """Launch configuration of ``draw_rows`` and ``logprobs_rows``: ``(grid, block)``, a block a row.

    Raises ValueError if ``n_rows`` is not positive.
    """
    _check_sizes(n_rows, 1)
    return n_rows, SAMPLING_THREADS


@cuda.jit
def draw_rows(logits, weights, chosen, active, temperature, top_k, top_p, min_p, seed, step, vocab_size):
    """chosen[r] = a token drawn from row r, for active rows with a temperature; step[r] += 1 for active rows.

    logits: (n_rows, vocab_size) float32. weights: (n_rows, vocab_size) int64, working memory. chosen: (n_rows,) int32,
    left alone where temperature is 0: there ``argmax_row`` has written it; -1 if no logit can be drawn. By row,
    (max_rows,): active int32; temperature float64, 0 or more; top_k int32, 0 for no filter; top_p float64 in (0, 1];
    min_p float64 in [0, 1]; seed uint64; step int64, the number of the new token. vocab_size: int32, at most MAX_VOCAB.
    top-k and top-p as in :func:`filter_logits`; of what they leave, min-p drops tokens that are less than min_p times
    as likely as the likeliest.
    Launch: ``draw_rows[rows_launch(n_rows)](…)``. Source: min-p, Nguyen et al. 2024, "Turning Up the Heat".
    """
    partial_max = cuda.shared.array(WARP, float32)
    partial = cuda.shared.array(WARP, int64)
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    if active[row] == 0:
        return
    if temperature[row] > 0:
        k = top_k[row] if top_k[row] > 0 else vocab_size
        shares = weights[row]
        filter_block(logits[row], shares, vocab_size, temperature[row], k, top_p[row], partial_max, partial)
        least = min_p[row] * UNIT  # the likeliest weighs UNIT
        if least > 0:
            for i in range(tid, vocab_size, cuda.blockDim.x):
                if shares[i] < least:
                    shares[i] = DROPPED
        cuda.syncthreads()
        token = draw_index(shares, vocab_size, seed[row], uint64(step[row]), uint64(0), partial)
        if tid == 0:
            chosen[row] = token
    if tid == 0:
        step[row] += 1  # all have read it: draw_index has barriers behind that


# --- log-probabilities -----------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def block_max_int64(value, partial):
    """Largest ``value`` of a one-dimensional block, in every thread: chapter 7's ``block_max`` for integers.

    value: int64. partial: (32,) int64 in shared memory, free for use again as soon as the call returns.
    """
    largest = warp_max(value)
    if cuda.threadIdx.x % WARP == 0:
        partial[cuda.threadIdx.x // WARP] = largest
    cuda.syncthreads()
    largest = partial[0]
    for warp in range(1, cuda.blockDim.x // WARP):
        largest = max(largest, partial[warp])
    cuda.syncthreads()
    return largest


@cuda.jit(device=True)
def log_share(logit, largest, total):
    """log(exp(logit) / sum of all exp), float64. total: int64, the sum of the weights, see :func:`weight_of`."""
    distance = float64(0)
    if logit != largest:  # inf - inf would be NaN
        distance = float64(logit) - float64(largest)
    return distance - math.log(float64(total) / UNIT)


@cuda.jit
def logprobs_rows(logits, tokens, n_top, logprob, rank, top_ids, top_logprobs, vocab_size):
    """logprob[r], rank[r] = of token tokens[r] in log_softmax(logits[r]); top_ids[r], top_logprobs[r] = the likeliest.

    logits: (n_rows, vocab_size) float32. tokens: (n_rows,) int32; -1 gives NaN and rank 0. n_top: (n_rows,) int32, how
    many of the likeliest, up to MAX_TOP; -1 leaves a row alone. logprob: (n_rows,) float32. rank: (n_rows,) int32, 1
    for the likeliest. top_ids: (n_rows, MAX_TOP) int32 and top_logprobs: (n_rows, MAX_TOP) float32, from the likeliest
    on; of equal ones the lowest id first. vocab_size: int32, at most MAX_VOCAB.
    NaN counts as -inf; where fewer than n_top logits are above that, the ids behind them are -1. The sum is of
    integers, in units of 2^-40: no order of the threads changes a bit. Each of the likeliest takes a pass.
    Launch: ``logprobs_rows[rows_launch(n_rows)](…)``.
    """
    partial_max = cuda.shared.array(WARP, float32)
    partial = cuda.shared.array(WARP, int64)
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    if n_top[row] < 0:
        return
    x = logits[row]
    token = tokens[row]
    given = x[max(token, 0)]
    largest = float32(-np.inf)
    for i in range(tid, vocab_size, cuda.blockDim.x):
        largest = max(largest, x[i])  # max ignores NaN
    largest = block_max(largest, partial_max)

    total = int64(0)
    likelier = int64(0)
    for i in range(tid, vocab_size, cuda.blockDim.x):
        if x[i] > float32(-np.inf):
            total += weight_of(x[i], largest, 1.0)
        if x[i] > given or (x[i] == given and i < token):
            likelier += 1
    total = block_sum_int64(total, partial)
    likelier = block_sum_int64(likelier, partial)
    if tid == 0:
        known = token >= 0 and total > 0
        logprob[row] = log_share(given, largest, total) if known else np.nan
        rank[row] = likelier + 1 if known else 0

    line = (float_key(largest) + 1) << INDEX_BITS  # above every token's place
    for j in range(n_top[row]):
        place = int64(NO_PLACE)
        for i in range(tid, vocab_size, cuda.blockDim.x):
            if x[i] > float32(-np.inf):
                here = (float_key(x[i]) << INDEX_BITS) + (LAST_INDEX - i)
                if here < line:
                    place = max(place, here)
        line = block_max_int64(place, partial)
        if tid == 0:
            index = int32(-1)
            share = -np.inf
            if line != NO_PLACE:
                index = int32(LAST_INDEX - (line & LAST_INDEX))
                share = log_share(key_float(line >> INDEX_BITS), largest, total)
            top_ids[row, j] = index
            top_logprobs[row, j] = share


def _check_sizes(n_rows, vocab_size):
    for name, size in ("n_rows", n_rows), ("vocab_size", vocab_size):
        if size <= 0:
            raise ValueError(f"{name} = {size}: a launch needs at least 1")


# --- references ------------------------------------------------------------------------------------------------------


def adjust_reference(logits, counts=None, presence=0.0, frequency=0.0, repetition=1.0, bias=None):
    """NumPy reference of :func:`adjust_rows` for a row: (n,) float32, (n,) int32, {id: value}; returns (n,) float32."""
    x = logits.astype(np.float64)
    if counts is not None:
        generated, repetition = counts & (IN_PROMPT - 1), np.float64(np.float32(repetition))
        x = np.where(counts == 0, x, np.where(x > 0, x / repetition, x * repetition))
        x = x - np.float64(np.float32(frequency)) * generated
        x = x - np.float64(np.float32(presence)) * (generated > 0)
    x = x.astype(np.float32)
    for token, value in (bias or {}).items():
        x[token] += np.float32(value)
    return x


def draw_row_reference(logits, temperature, top_k=0, top_p=1.0, min_p=0.0, seed=0, step=0):
    """NumPy reference of ``argmax_row`` and :func:`draw_rows` for a row: (n,) float32, returns an int, -1 if none."""
    if temperature == 0:
        return int(argmax_reference(logits[None])[0])
    weights = weights_reference(logits, temperature, top_k if top_k > 0 else None, top_p)
    weights[weights < min_p * UNIT] = DROPPED
    return draw_reference(weights, uniform_reference(seed, step))


def logprobs_reference(logits, token, n_top):
    """NumPy reference of :func:`logprobs_rows` for a row of numbers: ``(logprob, rank, top_ids, top_logprobs)``."""
    x = logits.astype(np.float64)
    shares = x - x.max() - np.log(np.exp(x - x.max()).sum())
    order = np.argsort(-x, kind="stable")
    return shares[token], int(np.flatnonzero(order == token)[0]) + 1, order[:n_top], shares[order[:n_top]]
