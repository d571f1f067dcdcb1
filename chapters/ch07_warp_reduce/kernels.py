"""Chapter 7, reductions: many numbers to one, within a warp, then a block, then the grid.

The 32 lanes of a warp can read each other's registers (a *shuffle*). A block's warps can only meet in shared memory, at
a barrier; blocks only in global memory, by atomics. So a sum takes the fast road as far as it goes:

==========================  ===========================================  ============================================
kernel                      how the threads come to one number           beside reading the input (block of 256)
==========================  ===========================================  ============================================
``sum_v1_shared_tree``      halving an array in shared memory            9 barriers, 1 atomic a block
``sum_v2_warp_shuffle``     5 shuffles a warp                            no barrier, 8 atomics a block
``sum_v3_warp_then_block``  5 shuffles a warp, then 8 numbers shared     2 barriers, 1 atomic a block
``sum_v4_float4``           as version 3; reads 16 bytes at a time       as version 3, a quarter of the load
                            into four sums                               instructions; x must be 16-byte aligned
==========================  ===========================================  ============================================

All four read each element once, 4 bytes, and add it once: what limits them is memory. Versions 1 to 3 differ in what a
block does at its end, once for thousands of elements; version 4 in how many bytes each thread has asked for before it
must wait, which counts where the input is too short to fill the GPU with threads.

Rows of a matrix, one block each: the largest element and its index in ``argmax.py``, layer norm and RMS norm in
``norms.py``.

``warp_sum``, ``warp_max``, ``block_sum`` and ``block_max`` are device functions for any kernel: later chapters import
them. Lanes exchange in a *butterfly* (lane l with lane l XOR 16, 8, 4, 2, 1): after it every lane has the result, and
the same bits, since a + b and b + a round alike. So a block's result never depends on which thread came first.
"""

import numpy as np
from numba import cuda, float32

from common.ptx import load_float4

WARP = 32
FULL_WARP = 0xFFFFFFFF  # a shuffle's mask: all 32 lanes take part
SUM_THREADS = 256
SUM_BLOCKS = 1024  # enough to fill any GPU of today; more would only add atomics
MAX_THREADS = 1024  # of a block, on every GPU
ROW_ELEMENTS = 8  # a thread of a row kernel takes so many, so that several of its reads are under way at a time
ROW_THREADS = 256  # and longer rows give it more


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


@cuda.jit
def sum_v4_float4(x, out, n):
    """out[0] += sum of x, rung 4: each load brings four neighbours, and each of them has its own running sum.

    A load's answer takes hundreds of cycles, so the bytes that a GPU can read in a second are those under way at one
    moment: 16 a thread instead of 4. Four sums, not one, so that no addition has to wait for the one before.
    x: (n,) float32 from a 16-byte boundary on (an array of its own, or a slice from a multiple of 4). out: (1,)
    float32, set to 0 before the launch. n: int32, any: the first threads take the 1 to 3 elements left over.
    Launch: ``sum_v4_float4[sum_launch(n)](…)``, any multiple of 32 threads. Source: Luitjens 2013, "Increase
    Performance with Vectorized Memory Access".
    """
    partial = cuda.shared.array(WARP, float32)
    thread = cuda.grid(1)
    total0 = total1 = total2 = total3 = float32(0)
    for i in range(4 * thread, n - 3, 4 * cuda.gridsize(1)):
        a, b, c, d = load_float4(x, i)
        total0 += a
        total1 += b
        total2 += c
        total3 += d
    if thread < n % 4:
        total0 += x[n - 1 - thread]
    total = block_sum((total0 + total1) + (total2 + total3), partial)
    if cuda.threadIdx.x == 0:
        cuda.atomic.add(out, 0, total)


sum_kernel = sum_v4_float4


def sum_reference(x):
    """NumPy reference of the sum kernels: (n,) float32, summed in float64, returns a float32."""
    return np.float32(x.sum(dtype=np.float64))


# --- launches of one block a row -------------------------------------------------------------------------------------


def row_launch(rows, threads, what):
    """Launch configuration of a kernel with one block a row: ``(grid, block)``.

    rows: the number of rows. threads: of a block, full warps. what: the kernel's name, for the message.
    Raises ValueError if ``rows`` is not positive, or ``threads`` not a multiple of 32 from 32 to 1024.
    """
    if rows <= 0:
        raise ValueError(f"{what}: rows = {rows}: a launch needs at least 1 row; skip the launch for empty input")
    if not WARP <= threads <= MAX_THREADS or threads % WARP:
        raise ValueError(
            f"{what}: threads = {threads}: a block's reductions need full warps; take a multiple of {WARP} "
            f"from {WARP} to {MAX_THREADS}"
        )
    return rows, threads


def row_threads(cols, what):
    """Threads of a block for a row of ``cols`` elements: 8 elements each, in full warps, at most 256 threads.

    Raises ValueError, naming the kernel ``what``, if ``cols`` is not positive.
    """
    if cols <= 0:
        raise ValueError(f"{what}: cols = {cols}: a launch needs at least 1 element in a row")
    warps = (cols + ROW_ELEMENTS * WARP - 1) // (ROW_ELEMENTS * WARP)
    return min(warps * WARP, ROW_THREADS)
