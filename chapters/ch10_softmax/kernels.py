"""Chapter 10, softmax: every element needs two facts about its whole row, and one of them keeps it from overflowing.

softmax(x)[c] = exp(x[c]) / sum over j of exp(x[j]), a row at a time, one block a row. exp overflows float32 above 88.7,
but softmax does not change when the same number is subtracted from all of a row. Subtract the row's largest element and
no exponent is above 0. The two facts, largest element and sum, are reductions over the block (chapter 7).

============================  ====================================  ===============  ================================
kernel                        passes over the row                   reductions       floats moved an element
============================  ====================================  ===============  ================================
``softmax_v1_naive``          exponentials and their sum; divide    1 in the block   4 (two reads, two writes)
``softmax_v2_stable``         largest; exponentials and their sum;  2 in the block   5 (three reads, two writes)
                              divide
``softmax_v3_online``         largest and sum together; divide      2 in the block   3 (two reads, one write), for two
                                                                                     exponentials an element more
``softmax_v4_warp_per_row``   as v3, one warp a row                 2 in the warp    3; no barrier, 8 rows a block
``softmax_v5_registers``      one: the row stays in registers       2 in the block   2 (one read, one write), up to
                                                                                     16384 columns
============================  ====================================  ===============  ================================

Moving the floats is what takes the time on a GPU, unless they come from a cache: a row of v4 is short enough to be
read from L1 the second time, and a row of v2 may be. A block for each short row (v1 to v3) leaves most of its threads
without an element; a warp for each long row (v4) takes its turns 32 elements at a time. v5 takes none: each thread asks
for all its elements at once and waits once.

All take the same arguments. v1 to v3 share ``softmax_launch(rows)``; the last two have their own. ``softmax_row`` is
v2: its launch depends on the number of rows alone, and which thread adds which element does not depend on cols, so that
masked elements at a row's end change no bit. ``logsumexp_row`` is v3's first pass, for losses and perplexities.
"""

import math

import numpy as np
from numba import cuda, float32

from chapters.ch04_memory.vectors import load_row4, store_row4
from chapters.ch07_warp_reduce.kernels import block_max, block_sum, warp_max, warp_sum

THREADS = 64  # of a block: full warps for the reductions, and still several elements a thread in attention's rows
WARPS_MAX = 32
WARP = 32
WARP_ROWS = 8  # rows a block of softmax_v4_warp_per_row, a warp each
PER_THREAD = 16  # elements of a row that a thread of softmax_v5_registers holds
REGISTERS_MAX_COLS = 1024 * PER_THREAD  # 1024: the largest block
LOGSUMEXP_THREADS = 256  # its rows are long: a vocabulary of logits
LOWEST = np.float32(np.finfo(np.float32).min)  # a finite "less than all": LOWEST - LOWEST is 0, -inf - -inf is NaN


def softmax_launch(rows):
    """Launch configuration for a softmax over ``rows`` rows, one block each: ``(grid, block)``.

    Raises ValueError if ``rows`` is not positive.
    """
    if rows <= 0:
        raise ValueError(f"rows = {rows}: a launch needs at least 1 row; skip the launch for empty input")
    return rows, THREADS


@cuda.jit
def softmax_v1_naive(x, out, cols):
    """out[r] = softmax(x[r]) straight from the definition; wrong for large inputs, so do not use it.

    An element above 88.7 becomes inf / inf, NaN, the others of its row 0; elements below -104 alone make 0 / 0, NaN.
    x, out: (rows, cols) float32, C-contiguous; ``out`` may be ``x`` itself. cols: int32.
    Launch: ``softmax_v1_naive[softmax_launch(rows)](…)``, any block of full warps.
    """
    partial = cuda.shared.array(WARPS_MAX, float32)
    row = cuda.blockIdx.x
    total = float32(0)
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        e = math.exp(x[row, c])
        out[row, c] = e
        total += e
    total = block_sum(total, partial)
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        out[row, c] /= total  # the elements that this thread wrote itself: no barrier needed


@cuda.jit
def softmax_v2_stable(x, out, cols):
    """out[r] = softmax(x[r]) with the row's largest element subtracted: no exponential is above 1, the sum at least 1.

    Elements of -inf get weight 0 (attention's mask). A row of nothing but -inf has no softmax and becomes NaN, as does
    a row that holds NaN or +inf.
    x, out: (rows, cols) float32, C-contiguous; ``out`` may be ``x`` itself. cols: int32.
    Launch: ``softmax_v2_stable[softmax_launch(rows)](…)``, any block of full warps.
    Source: Goodfellow et al. 2016, "Deep Learning", section 4.1.
    """
    partial = cuda.shared.array(WARPS_MAX, float32)
    row = cuda.blockIdx.x
    largest = float32(-math.inf)  # threads without an element bring this, which changes no maximum
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        largest = max(largest, x[row, c])
    largest = block_max(largest, partial)
    total = float32(0)
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        e = math.exp(x[row, c] - largest)
        out[row, c] = e
        total += e
    total = block_sum(total, partial)
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        out[row, c] /= total


# --- largest element and sum in one pass -----------------------------------------------------------------------------


@cuda.jit(device=True)
def online_add(largest, total, value):
    """Take ``value`` into a running pair: ``(largest, total)``, with total = sum of exp(value - largest) so far.

    All float32. Start from (LOWEST, 0). When a larger value arrives, the sum so far shrinks by exp(old - new): it is as
    if that value had been subtracted from the start. -inf adds 0; NaN and +inf make the sum NaN.
    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.
    """
    new_largest = max(largest, value)
    return new_largest, total * math.exp(largest - new_largest) + math.exp(value - new_largest)


@cuda.jit(device=True)
def warp_online(largest, total):
    """The pairs of a warp's 32 lanes as one pair ``(largest, total)``, in every lane. All 32 lanes must call it."""
    all_largest = warp_max(largest)
    return all_largest, warp_sum(total * math.exp(largest - all_largest))


@cuda.jit(device=True)
def block_online(largest, total, partial):
    """The pairs of a block's threads as one pair ``(largest, total)``, in every thread.

    partial: (32,) float32 in shared memory, under the terms of chapter 7's ``block_sum``.
    """
    all_largest = block_max(largest, partial)
    return all_largest, block_sum(total * math.exp(largest - all_largest), partial)


@cuda.jit
def softmax_v3_online(x, out, cols):
    """out[r] = softmax(x[r]), largest element and sum found in the same pass; -inf, NaN and +inf as in v2.

    x, out: (rows, cols) float32, C-contiguous; ``out`` may be ``x`` itself. cols: int32.
    Launch: ``softmax_v3_online[softmax_launch(rows)](…)``, any block of full warps.
    Source: Milakov and Gimelshein 2018.
    """
    partial = cuda.shared.array(WARPS_MAX, float32)
    row = cuda.blockIdx.x
    largest = LOWEST
    total = float32(0)
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        largest, total = online_add(largest, total, x[row, c])
    largest, total = block_online(largest, total, partial)
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        out[row, c] = math.exp(x[row, c] - largest) / total


# --- short rows and rows in registers --------------------------------------------------------------------------------


def softmax_warp_launch(rows):
    """Launch configuration of :func:`softmax_v4_warp_per_row`, a warp a row, 8 rows a block: ``(grid, block)``.

    Raises ValueError if ``rows`` is not positive.
    """
    if rows <= 0:
        raise ValueError(f"rows = {rows}: a launch needs at least 1 row; skip the launch for empty input")
    return (rows + WARP_ROWS - 1) // WARP_ROWS, WARP_ROWS * WARP


@cuda.jit
def softmax_v4_warp_per_row(x, out, cols):
    """out[r] = softmax(x[r]) with one warp a row: lanes meet in shuffles, so warps never wait for each other.

    x, out: (rows, cols) float32, C-contiguous; ``out`` may be ``x`` itself. cols: int32; best below some 1000.
    Launch: ``softmax_v4_warp_per_row[softmax_warp_launch(rows)](…)``.
    """
    lane = cuda.threadIdx.x % WARP
    row = cuda.grid(1) // WARP
    if row < x.shape[0]:  # alike for a whole warp: no shuffle misses a lane
        largest = LOWEST
        total = float32(0)
        for c in range(lane, cols, WARP):
            largest, total = online_add(largest, total, x[row, c])
        largest, total = warp_online(largest, total)
        scale = float32(1) / total  # a multiplication an element instead of a division, for one more rounding
        for c in range(lane, cols, WARP):
            out[row, c] = math.exp(x[row, c] - largest) * scale


def softmax_registers_launch(rows, cols):
    """Launch configuration of :func:`softmax_v5_registers`: a block a row, 16 elements a thread: ``(grid, block)``.

    Raises ValueError if a size is not positive or if ``cols`` is above 16384.
    """
    if rows <= 0 or cols <= 0:
        raise ValueError(f"shape ({rows}, {cols}): a softmax needs at least 1 row and 1 column")
    if cols > REGISTERS_MAX_COLS:
        raise ValueError(
            f"cols = {cols}: 1024 threads hold {REGISTERS_MAX_COLS} elements in registers; use softmax_v3_online"
        )
    warps = (cols + WARP * PER_THREAD - 1) // (WARP * PER_THREAD)
    return rows, warps * WARP


@cuda.jit
def softmax_v5_registers(x, out, cols):
    """out[r] = softmax(x[r]) with the row in registers between its reductions: read once, written once.

    With the row at hand, v2's order costs nothing extra: one exponential an element, and its -inf, NaN and +inf. Rows
    are moved 16 bytes at a time where cols is a multiple of 4 (and x and out begin at a multiple of 16 bytes).
    x, out: (rows, cols) float32, C-contiguous; ``out`` may be ``x`` itself. cols: int32, at most 16 a thread.
    Launch: ``softmax_v5_registers[softmax_registers_launch(rows, cols)](…)``.
    """
    partial = cuda.shared.array(WARPS_MAX, float32)
    values = cuda.local.array(PER_THREAD, float32)  # registers: after unrolling, every index is a constant
    row = cuda.blockIdx.x
    nothing = float32(-math.inf)  # its exponential is 0
    for i in range(0, PER_THREAD, 4):  # all loads are on their way before one is used
        c = 4 * cuda.threadIdx.x + i * cuda.blockDim.x
        values[i], values[i + 1], values[i + 2], values[i + 3] = load_row4(x, row, c, cols, nothing)
    largest = LOWEST
    for i in range(PER_THREAD):
        largest = max(largest, values[i])
    largest = block_max(largest, partial)
    total = float32(0)
    for i in range(PER_THREAD):
        values[i] = math.exp(values[i] - largest)
        total += values[i]
    scale = float32(1) / block_sum(total, partial)
    for i in range(0, PER_THREAD, 4):
        c = 4 * cuda.threadIdx.x + i * cuda.blockDim.x
        y0, y1, y2, y3 = values[i] * scale, values[i + 1] * scale, values[i + 2] * scale, values[i + 3] * scale
        store_row4(out, row, c, cols, y0, y1, y2, y3)


softmax_row = softmax_v2_stable


def softmax_reference(x):
    """NumPy reference of all versions: (rows, cols) float32, computed in float64; returns (rows, cols) float32."""
    x = x.astype(np.float64)
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)


# --- the logarithm of the sum ----------------------------------------------------------------------------------------


def logsumexp_launch(rows):
    """Launch configuration of :func:`logsumexp_row`, one block a row: ``(grid, block)``.

    Raises ValueError if ``rows`` is not positive.
    """
    if rows <= 0:
        raise ValueError(f"rows = {rows}: a launch needs at least 1 row; skip the launch for empty input")
    return rows, LOGSUMEXP_THREADS


@cuda.jit
def logsumexp_row(x, out, cols):
    """out[r] = log(sum over c of exp(x[r, c])), without overflow: largest + log(sum of exp(x - largest)).

    x[r, c] - out[r] is the logarithm of softmax(x)[r, c]: with x a row of logits and c the right token, its negative is
    the cross-entropy loss, and exp of the mean loss the perplexity. -inf counts as nothing; a row of nothing but -inf
    gives -inf, a row with NaN or +inf NaN. x is read once.
    x: (rows, cols) float32, C-contiguous. out: (rows,) float32. cols: int32.
    Launch: ``logsumexp_row[logsumexp_launch(rows)](…)``, any block of full warps.
    """
    partial = cuda.shared.array(WARPS_MAX, float32)
    row = cuda.blockIdx.x
    largest = LOWEST
    total = float32(0)
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        largest, total = online_add(largest, total, x[row, c])
    largest, total = block_online(largest, total, partial)
    if cuda.threadIdx.x == 0:
        out[row] = largest + math.log(total)


def logsumexp_reference(x):
    """NumPy reference of :func:`logsumexp_row`: (rows, cols) float32, computed in float64; returns (rows,) float32."""
    x = x.astype(np.float64)
    largest = x.max(axis=1)
    largest[np.isneginf(largest)] = 0
    with np.errstate(divide="ignore"):
        return (largest + np.log(np.exp(x - largest[:, None]).sum(axis=1))).astype(np.float32)
