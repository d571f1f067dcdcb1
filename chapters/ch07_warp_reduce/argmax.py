"""Chapter 7, the largest element of a row, and where it is: reductions again, with another operation than ``+``.

===========================  ===========================================  ==========================================
kernel                       what it changes                              beside reading the row (block of 256)
===========================  ===========================================  ==========================================
``row_max_v1_shared_tree``   halving an array in shared memory            9 barriers
``row_max_v2_warp_shuffle``  5 shuffles a warp, then 8 numbers shared     2 barriers
``row_max_v3_float4``        as version 2; four reads of 16 bytes are     2 barriers; x must be 16-byte aligned, and
                             under way at a time in each thread           cols a multiple of 4, or it gains little
``argmax_row``               value and index travel together              1 barrier, twice the shuffles
``greedy_argmax``            the same for a single row, in one block      1 barrier
===========================  ===========================================  ==========================================

Every kernel reads each element once, 4 bytes, and writes 4 bytes a row. Where there are few rows, blocks are few, and
most of a GPU idles: with a single row (``greedy_argmax``), all but one multiprocessor.

NaN never wins: every comparison with it is false. (NumPy and PyTorch let it win.) So a NaN among a model's logits
does not stop a generation; look for it in the layer that made it.
"""

import numpy as np
from numba import cuda, float32, int32

from chapters.ch04_memory.vectors import load_row4
from chapters.ch07_warp_reduce.kernels import FULL_WARP, MAX_THREADS, WARP, block_max, row_launch, row_threads

ARGMAX_THREADS = 1024
FOURS = 4  # loads of 16 bytes that a thread of row_max_v3_float4 begins before it needs the first of them

# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def warp_argmax(value, index):
    """Largest value of a warp's 32 lanes and its index, in every lane: ``(value, index)``; equal values: lowest index.

    value: float32, not NaN. index: int32. All 32 lanes must call it together.
    """
    for step in range(5):
        other = cuda.shfl_xor_sync(FULL_WARP, value, 16 >> step)
        other_index = cuda.shfl_xor_sync(FULL_WARP, index, 16 >> step)
        if other > value or (other == value and other_index < index):
            value = other
            index = other_index
    return value, index


@cuda.jit(device=True)
def block_argmax(value, index, partial, partial_index):
    """Largest value of a one-dimensional block and its index, in every thread; equal values: lowest index.

    value: float32, not NaN. index: int32. partial: (32,) float32, and partial_index: (32,) int32, both in shared memory
    and used once by a kernel: there is no barrier behind the last read. Full warps, all of whose threads call it.
    """
    value, index = warp_argmax(value, index)
    if cuda.threadIdx.x % WARP == 0:
        partial[cuda.threadIdx.x // WARP] = value
        partial_index[cuda.threadIdx.x // WARP] = index
    cuda.syncthreads()
    last = cuda.blockDim.x // WARP - 1
    lane = cuda.threadIdx.x % WARP
    return warp_argmax(partial[min(lane, last)], partial_index[min(lane, last)])  # the last one once or more: no matter


# --- the largest element of each row ---------------------------------------------------------------------------------


def row_max_launch(rows, cols):
    """Launch configuration of the ``row_max`` kernels: ``(grid, block)``, one block a row.

    Raises ValueError if a size is not positive.
    """
    return row_launch(rows, row_threads(cols, "row_max"), "row_max")


@cuda.jit
def row_max_v1_shared_tree(x, out, cols):
    """out[r] = the largest element of row r, by halving the threads' maxima in shared memory.

    x: (rows, cols) float32, C-contiguous. out: (rows,) float32. cols: int32. NaN is ignored; a row of nothing but NaN
    gives -inf. Launch: ``row_max_v1_shared_tree[row_max_launch(rows, cols)](…)``, any block. Source: Harris 2007.
    """
    tree = cuda.shared.array(MAX_THREADS, float32)
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    largest = float32(-np.inf)
    for c in range(tid, cols, cuda.blockDim.x):
        largest = max(largest, x[row, c])
    tree[tid] = largest
    cuda.syncthreads()
    left = cuda.blockDim.x
    while left > 1:
        half = (left + 1) // 2  # rounded up: a block need not be a power of two
        if tid + half < left:
            tree[tid] = max(tree[tid], tree[tid + half])
        cuda.syncthreads()
        left = half
    if tid == 0:
        out[row] = tree[0]


@cuda.jit
def row_max_v2_warp_shuffle(x, out, cols):
    """out[r] = the largest element of row r, by shuffles within a warp and shared memory between warps.

    x: (rows, cols) float32, C-contiguous. out: (rows,) float32. cols: int32. NaN is ignored; a row of nothing but NaN
    gives -inf. Launch: ``row_max_v2_warp_shuffle[row_max_launch(rows, cols)](…)``, any block of full warps.
    """
    partial = cuda.shared.array(WARP, float32)
    row = cuda.blockIdx.x
    largest = float32(-np.inf)
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        largest = max(largest, x[row, c])
    largest = block_max(largest, partial)
    if cuda.threadIdx.x == 0:
        out[row] = largest


@cuda.jit
def row_max_v3_float4(x, out, cols):
    """out[r] = the largest element of row r, read 16 bytes at a time, four reads under way in each thread.

    x: (rows, cols) float32, C-contiguous, beginning at a multiple of 16 bytes. All else as in version 2.
    Launch: ``row_max_v3_float4[row_max_launch(rows, cols)](…)``, any block of full warps.
    """
    partial = cuda.shared.array(WARP, float32)
    fours = cuda.local.array((FOURS, 4), float32)  # in registers: the loops over it are unrolled
    row = cuda.blockIdx.x
    lowest = float32(-np.inf)
    largest = lowest
    for first in range(4 * cuda.threadIdx.x, cols, 4 * FOURS * cuda.blockDim.x):
        for i in range(FOURS):
            c = first + 4 * i * cuda.blockDim.x
            fours[i, 0], fours[i, 1], fours[i, 2], fours[i, 3] = load_row4(x, row, c, cols, lowest)
        for i in range(FOURS):
            largest = max(largest, max(max(fours[i, 0], fours[i, 1]), max(fours[i, 2], fours[i, 3])))
    largest = block_max(largest, partial)
    if cuda.threadIdx.x == 0:
        out[row] = largest


row_max = row_max_v3_float4


def row_max_reference(x):
    """NumPy reference of the ``row_max`` kernels: (rows, cols) float32, returns (rows,) float32."""
    return np.fmax.reduce(x, axis=1, initial=-np.inf).astype(np.float32)


# --- its index -------------------------------------------------------------------------------------------------------


def argmax_launch(rows, cols):
    """Launch configuration of :func:`argmax_row`: ``(grid, block)``, one block a row.

    Raises ValueError if a size is not positive.
    """
    return row_launch(rows, row_threads(cols, "argmax_row"), "argmax_row")


@cuda.jit
def argmax_row(x, out, cols):
    """out[r] = index of the largest element of row r. Equal elements: the lowest index.

    x: (rows, cols) float32, C-contiguous. out: (rows,) int32. cols: int32, at least 1. NaN never wins; a row of nothing
    but NaN gives -1, one of nothing but -inf 0.
    Launch: ``argmax_row[argmax_launch(rows, cols)](…)``, any block of full warps.
    """
    partial = cuda.shared.array(WARP, float32)
    partial_index = cuda.shared.array(WARP, int32)
    row = cuda.blockIdx.x
    best = float32(-np.inf)
    index = int32(cols)  # cols stands for "none yet": it loses against every real index
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        value = x[row, c]
        if value > best or (value == best and c < index):
            best = value
            index = int32(c)
    best, index = block_argmax(best, index, partial, partial_index)
    if cuda.threadIdx.x == 0:
        out[row] = index if index < cols else -1


def argmax_reference(x):
    """NumPy reference of :func:`argmax_row`: (rows, cols) float32, returns (rows,) int32; -1 for rows of NaN only."""
    number = ~np.isnan(x)
    index = np.argmax(number & (x == row_max_reference(x)[:, None]), axis=1)  # argmax of bools: the first True
    return np.where(number.any(axis=1), index, -1).astype(np.int32)


# --- greedy decoding: one row ----------------------------------------------------------------------------------------


def greedy_argmax_launch():
    """Launch configuration of :func:`greedy_argmax`: ``(grid, block)``, one block."""
    return 1, ARGMAX_THREADS


@cuda.jit
def greedy_argmax(logits, out, n):
    """out[0] = index of the largest logit: greedy decoding. Equal logits: the lowest index.

    logits: (n,) float32. out: (1,) int32. n: int32, at least 1.
    NaN never wins (every comparison with it is false), where ``np.argmax`` returns the first NaN. If all logits are NaN
    there is no winner, and out[0] = -1. All -inf gives 0.
    Launch: ``greedy_argmax[greedy_argmax_launch()](…)``, one block of any multiple of 32 threads.
    """
    partial = cuda.shared.array(WARP, float32)
    partial_index = cuda.shared.array(WARP, int32)
    best = float32(-np.inf)
    index = int32(n)  # n stands for "none yet"
    for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        value = logits[i]
        if value > best or (value == best and i < index):
            best = value
            index = int32(i)
    best, index = block_argmax(best, index, partial, partial_index)
    if cuda.threadIdx.x == 0:
        out[0] = index if index < n else -1


def greedy_argmax_reference(logits):
    """NumPy reference of :func:`greedy_argmax`: (n,) float32, returns an int; -1 if all are NaN."""
    return int(argmax_reference(logits[None])[0])
