"""Chapter 7, reductions: many numbers to one, within a warp, then a block, then the grid.

The 32 lanes of a warp can read each other's registers (a *shuffle*). A block's warps can only meet in shared memory, at
a barrier; blocks only in global memory, by atomics. So a sum takes the fast road as far as it goes:

==========================  ===========================================  ============================================
kernel                      how the threads come to one number           beside reading the input (block of 256)
==========================  ===========================================  ============================================
``sum_v1_shared_tree``      halving an array in shared memory            9 barriers, 1 atomic a block
``sum_v2_warp_shuffle``     5 shuffles a warp                            no barrier, 8 atomics a block
``sum_v3_warp_then_block``  5 shuffles a warp, then 8 numbers shared     2 barriers, 1 atomic a block
``layernorm_v1_two_pass``   ``block_sum`` twice: mean, then variance     4 barriers; x is read three times
``gemv_logits``             one dot product a warp                       no barrier; the matrix is read once
``greedy_argmax``           value and index shuffled together            1 barrier, one block
==========================  ===========================================  ============================================

``warp_sum``, ``warp_max``, ``block_sum`` and ``block_max`` are device functions for any kernel: later chapters import
them. Lanes exchange in a *butterfly* (lane l with lane l XOR 16, 8, 4, 2, 1): after it every lane has the result, and
the same bits, since a + b and b + a round alike. So a block's result never depends on which thread came first.
"""

import math

import numpy as np
from numba import cuda, float32, int32

WARP = 32
FULL_WARP = 0xFFFFFFFF  # a shuffle's mask: all 32 lanes take part
SUM_THREADS = 256
SUM_BLOCKS = 1024  # enough to fill any GPU of today; more would only add atomics
LAYERNORM_THREADS = 128
GEMV_THREADS = 256
ARGMAX_THREADS = 1024


# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def warp_sum(value):
    """Sum of ``value`` over the 32 lanes of a warp, returned in every lane.

    value: float32 (or float64, int32, int64). All 32 lanes must call it together. Source: Luitjens 2014, "Faster
    Parallel Reductions on Kepler".
    """
    for step in range(5):
        value += cuda.shfl_xor_sync(FULL_WARP, value, 16 >> step)
    return value


@cuda.jit(device=True)
def warp_max(value):
    """Largest ``value`` of the 32 lanes of a warp, returned in every lane. NaN is ignored (as in CUDA's ``fmaxf``).

    value: float32 (or float64, int32, int64). All 32 lanes must call it together.
    """
    for step in range(5):
        value = max(value, cuda.shfl_xor_sync(FULL_WARP, value, 16 >> step))
    return value


@cuda.jit(device=True)
def block_sum(value, partial):
    """Sum of ``value`` over a one-dimensional block, returned in every thread.

    value: float32. partial: (32,) float32 in shared memory, declared by the kernel; its contents do not matter, and it
    may be used again as soon as the call returns. The block must be a multiple of 32 threads, and all must call it.
    """
    total = warp_sum(value)
    if cuda.threadIdx.x % WARP == 0:
        partial[cuda.threadIdx.x // WARP] = total
    cuda.syncthreads()
    total = float32(0)
    for warp in range(cuda.blockDim.x // WARP):  # every thread adds the few numbers left: all read the same address,
        total += partial[warp]  # which costs one read, and nobody has to hand the result round
    cuda.syncthreads()  # all have read partial: from here on the next call may write it
    return total


@cuda.jit(device=True)
def block_max(value, partial):
    """Largest ``value`` of a one-dimensional block, returned in every thread. NaN is ignored; all NaN gives -inf.

    value: float32. partial: (32,) float32 in shared memory, under the terms of :func:`block_sum`.
    """
    largest = warp_max(value)
    if cuda.threadIdx.x % WARP == 0:
        partial[cuda.threadIdx.x // WARP] = largest
    cuda.syncthreads()
    largest = float32(-np.inf)
    for warp in range(cuda.blockDim.x // WARP):
        if partial[warp] > largest:
            largest = partial[warp]
    cuda.syncthreads()
    return largest


# --- the sum of a vector: the ladder ---------------------------------------------------------------------------------


def sum_launch(n):
    """Launch configuration of the sum kernels for ``n`` elements: ``(grid, block)``, some 32 elements a thread or more.

    Raises ValueError if ``n`` is not positive.
    """
    if n <= 0:
        raise ValueError(f"n = {n}: a launch needs at least 1 element; the sum of none is 0 without a kernel")
    return min((n + 32 * SUM_THREADS - 1) // (32 * SUM_THREADS), SUM_BLOCKS), SUM_THREADS


@cuda.jit
def sum_v1_shared_tree(x, out, n):
    """out[0] += sum of x, rung 1: each block halves its 256 sums in shared memory until one is left.

    x: (n,) float32. out: (1,) float32, set to 0 before the launch. n: int32. Half of the threads that worked in one
    step idle in the next, and each step costs a barrier. Blocks add in any order: the last bits vary from run to run.
    Launch: ``sum_v1_shared_tree[sum_launch(n)](…)``, 256 threads exactly. Source: Harris 2007, "Optimizing Parallel
    Reduction in CUDA".
    """
    tree = cuda.shared.array(SUM_THREADS, float32)
    tid = cuda.threadIdx.x
    total = float32(0)
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):  # the grid strides over the input: any n, any grid
        total += x[i]
    tree[tid] = total
    cuda.syncthreads()
    stride = SUM_THREADS // 2
    while stride > 0:
        if tid < stride:
            tree[tid] += tree[tid + stride]
        cuda.syncthreads()  # not inside the if: a barrier is for all threads
        stride //= 2
    if tid == 0:
        cuda.atomic.add(out, 0, tree[0])


@cuda.jit
def sum_v2_warp_shuffle(x, out, n):
    """out[0] += sum of x, rung 2: lanes exchange registers; no shared memory, no barrier, but an atomic from each warp.

    x: (n,) float32. out: (1,) float32, set to 0 before the launch. n: int32.
    Launch: ``sum_v2_warp_shuffle[sum_launch(n)](…)``, any multiple of 32 threads. Source: Luitjens 2014.
    """
    total = float32(0)
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        total += x[i]
    total = warp_sum(total)
    if cuda.threadIdx.x % WARP == 0:
        cuda.atomic.add(out, 0, total)


@cuda.jit
def sum_v3_warp_then_block(x, out, n):
    """out[0] += sum of x, rung 3: shuffles within a warp, shared memory between warps, one atomic a block.

    x: (n,) float32. out: (1,) float32, set to 0 before the launch. n: int32.
    Launch: ``sum_v3_warp_then_block[sum_launch(n)](…)``, any multiple of 32 threads. Source: Luitjens 2014.
    """
    partial = cuda.shared.array(WARP, float32)
    total = float32(0)
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        total += x[i]
    total = block_sum(total, partial)
    if cuda.threadIdx.x == 0:
        cuda.atomic.add(out, 0, total)


sum_kernel = sum_v3_warp_then_block


def sum_reference(x):
    """NumPy reference of the sum kernels: (n,) float32, summed in float64, returns a float32."""
    return np.float32(x.sum(dtype=np.float64))


# --- layer normalisation ---------------------------------------------------------------------------------------------


def layernorm_launch(rows):
    """Launch configuration of :func:`layernorm_row`: ``(grid, block)``, one block a row.

    Raises ValueError if ``rows`` is not positive.
    """
    if rows <= 0:
        raise ValueError(f"rows = {rows}: a launch needs at least 1 row")
    return rows, LAYERNORM_THREADS


@cuda.jit
def layernorm_v1_two_pass(x, weight, bias, out, d_model, eps):
    """out[r] = (x[r] - mean) / sqrt(variance + eps) * weight + bias, with mean and variance of row r; one block a row.

    x, out: (rows, d_model) float32, C-contiguous; ``out`` may be ``x`` itself. weight, bias: (d_model,) float32.
    d_model: int32. eps: float, 1e-5 in GPT-2. The mean comes first, and then the variance (over d_model, not
    d_model - 1) from the distances to it: a pass more than mean(x²) - mean(x)² takes, which cancels to nothing where a
    row's values are large and close together. A row with NaN or ±inf becomes NaN.
    Launch: ``layernorm_v1_two_pass[layernorm_launch(rows)](…)``. Source: Ba, Kiros, Hinton 2016, "Layer Normalization".
    """
    partial = cuda.shared.array(WARP, float32)
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    total = float32(0)
    for c in range(tid, d_model, cuda.blockDim.x):
        total += x[row, c]
    mean = block_sum(total, partial) / float32(d_model)
    total = float32(0)
    for c in range(tid, d_model, cuda.blockDim.x):
        distance = x[row, c] - mean
        total += distance * distance
    variance = block_sum(total, partial) / float32(d_model)
    scale = float32(1) / math.sqrt(variance + float32(eps))
    for c in range(tid, d_model, cuda.blockDim.x):
        out[row, c] = (x[row, c] - mean) * scale * weight[c] + bias[c]


layernorm_row = layernorm_v1_two_pass


def layernorm_reference(x, weight, bias, eps):
    """NumPy reference of :func:`layernorm_row`: (rows, d_model) float32, in float64 inside, returns float32."""
    x = x.astype(np.float64)
    centred = x - x.mean(axis=1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)
    return (normal * weight + bias).astype(np.float32)


# --- matrix times vector ---------------------------------------------------------------------------------------------


def gemv_logits_launch(vocab_size):
    """Launch configuration of :func:`gemv_logits`: ``(grid, block)``, one warp a row, 8 rows a block.

    Raises ValueError if ``vocab_size`` is not positive.
    """
    if vocab_size <= 0:
        raise ValueError(f"vocab_size = {vocab_size}: a launch needs at least 1 row")
    rows = GEMV_THREADS // WARP
    return (vocab_size + rows - 1) // rows, GEMV_THREADS


@cuda.jit
def gemv_logits(x, wte, logits, vocab_size, d_model):
    """logits[v] = wte[v] · x: the last hidden state against every token's embedding (GPT-2 shares wte with its head).

    x: (d_model,) float32. wte: (vocab_size, d_model) float32, C-contiguous. logits: (vocab_size,) float32.
    vocab_size, d_model: int32. One warp a row: its lanes read 32 neighbours of the row at a time and add in float32.
    Launch: ``gemv_logits[gemv_logits_launch(vocab_size)](…)``. Source: Bell and Garland 2008 (their "vector" kernel);
    the tied head is Press and Wolf 2017.
    """
    lane = cuda.threadIdx.x % WARP
    row = cuda.grid(1) // WARP
    if row < vocab_size:  # alike for all lanes of a warp: warps stay or go as a whole, so no shuffle misses one
        total = float32(0)
        for c in range(lane, d_model, WARP):
            total += wte[row, c] * x[c]
        total = warp_sum(total)
        if lane == 0:
            logits[row] = total


def gemv_logits_reference(x, wte):
    """NumPy reference of :func:`gemv_logits`: (d_model,) and (vocab_size, d_model) float32, summed in float64."""
    return (wte.astype(np.float64) @ x.astype(np.float64)).astype(np.float32)


# --- the index of the largest element --------------------------------------------------------------------------------


def greedy_argmax_launch():
    """Launch configuration of :func:`greedy_argmax`: ``(grid, block)``, one block."""
    return 1, ARGMAX_THREADS


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
    tid = cuda.threadIdx.x
    best = float32(-np.inf)
    index = int32(n)  # n stands for "none yet": it loses against every real index
    for i in range(tid, n, cuda.blockDim.x):
        value = logits[i]
        if value > best or (value == best and i < index):
            best = value
            index = int32(i)
    best, index = warp_argmax(best, index)
    if tid % WARP == 0:
        partial[tid // WARP] = best
        partial_index[tid // WARP] = index
    cuda.syncthreads()
    best = partial[0]
    index = partial_index[0]
    for warp in range(1, cuda.blockDim.x // WARP):
        if partial[warp] > best or (partial[warp] == best and partial_index[warp] < index):
            best = partial[warp]
            index = partial_index[warp]
    if tid == 0:
        out[0] = index if index < n else -1


def greedy_argmax_reference(logits):
    """NumPy reference of :func:`greedy_argmax`: (n,) float32, returns an int; -1 if all are NaN."""
    number = ~np.isnan(logits)
    if not number.any():
        return -1
    return int(np.flatnonzero(number & (logits == np.nanmax(logits)))[0])
