"""Chapter 9, matrix times vector in float16: half the bytes, so half the time.

==========================  =====================================================  ===================================
kernel                      what it changes                                        bytes read
==========================  =====================================================  ===================================
``gemv_v3_vector``          (``gemv.py``, float32)                                 4 * N * K
``gemv_v4_half``            float16; a lane has four loads of 16 bytes under way;  2 * N * K
                            several warps share a row if rows are few
==========================  =====================================================  ===================================

**Ask before you may.** Weights are there from the beginning; only x comes from the kernel before. So a kernel asks for
its first weights and only then calls ``griddep_wait`` (see ``common.ptx``): launched as dependent in a CUDA graph, on
sm_90 or later, it has them on their way while the kernel before still runs, which let it in by ``griddep_launch``.
Small kernels spend most of their time waiting for their first bytes, and that is what this hides. Elsewhere it changes
nothing.

It loses where N is small: few warps. And it computes: each pair of float16 is taken apart before it is multiplied, by
every lane, so that with some rows of x, or with something fused to it, instructions take longer than bytes;
``gemv_tensor.py`` has the next rung. A row's result depends on that row and x alone. Sources: as ``gemv.py``; CUDA
Programming Guide, "Programmatic Dependent Launch".
"""

import numpy as np
from numba import cuda, float32, uint32

from common.ptx import griddep_launch, griddep_wait, load_half8, load_half8_once, unpack_half2

from ..ch07_warp_reduce.kernels import WARP, warp_sum

THREADS = 256
WARPS = THREADS // WARP
PIECES = 4  # loads of 8 numbers that a lane has under way before it needs the first of them
STEP = 8 * WARP  # numbers that a warp reads with one of them
FOUR_BLOCKS = (THREADS, 4)  # on a multiprocessor, which leaves a thread 64 registers
BLOCKS_MAX = 528  # 4 on each of 132 multiprocessors: more would only take turns
WARPS_WANTED = 1056  # the same number of warps is the least that keeps enough bytes under way


def gemv_split(N, K):
    """2 ** gemv_split warps share a row of W, 0 … 3: enough for its length, and more if there are few rows.

    The exponent, because a kernel can divide by 2 ** split with a shift; a division takes a GPU a hundred instructions.
    Raises ValueError if a size is not positive, or K not a multiple of 8.
    """
    if N <= 0 or K <= 0:
        raise ValueError(f"W has shape ({N}, {K}): a launch needs at least 1 row and 1 column")
    if K % 8:
        raise ValueError(f"K = {K}: rows of W must begin at multiples of 16 bytes; pad W and x to a multiple of 8")
    split = 0
    while 1 << split < WARPS and (K > PIECES * STEP << split or (N << split < WARPS_WANTED and K > STEP << split)):
        split += 1
    return split


def gemv_half_launch(N, K):
    """Launch configuration of :func:`gemv_v4_half`: ``(grid, block)``.

    Raises ValueError if a size is not positive, or K not a multiple of 8.
    """
    rows = WARPS >> gemv_split(N, K)
    return min((N + rows - 1) // rows, BLOCKS_MAX), THREADS


# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit(device=True, forceinline=True)
def dot8(w0, w1, w2, w3, x0, x1, x2, x3):
    """The sum of 8 products of float16, from four pairs each (uint32), in float32."""
    w0_low, w0_high = unpack_half2(w0)
    w1_low, w1_high = unpack_half2(w1)
    w2_low, w2_high = unpack_half2(w2)
    w3_low, w3_high = unpack_half2(w3)
    x0_low, x0_high = unpack_half2(x0)
    x1_low, x1_high = unpack_half2(x1)
    x2_low, x2_high = unpack_half2(x2)
    x3_low, x3_high = unpack_half2(x3)
    low = w0_low * x0_low + w1_low * x1_low + w2_low * x2_low + w3_low * x3_low
    return low + (w0_high * x0_high + w1_high * x1_high + w2_high * x2_high + w3_high * x3_high)


@cuda.jit(device=True, forceinline=True)
def load_pieces(W, row, split, N, K, w):
    """w[j] = the 8 numbers (four pairs) of W[row] from 8 * lane + 256 * (part + 2 ** split * j) on, 0 outside W.

    W: (N, K) float16. w: (4, 4) uint32, local. part: this warp's number among the 2 ** split warps of the row.
    """
    first = 8 * (cuda.threadIdx.x % WARP) + STEP * (cuda.threadIdx.x // WARP & ((1 << split) - 1))
    for j in range(PIECES):
        col = first + (STEP * j << split)
        if row < N and col < K:
            w[j, 0], w[j, 1], w[j, 2], w[j, 3] = load_half8_once(W, (row, col))
        else:
            w[j, 0] = w[j, 1] = w[j, 2] = w[j, 3] = uint32(0)


@cuda.jit(device=True, forceinline=True)
def row_total(W, row, w, x, split, N, K, partial):
    """W[row] · x in every thread of the row's warps. All threads of the block must call it.

    w: what :func:`load_pieces` loaded. x: (K,) float16. partial: (8,) float32, shared.
    """
    lane = cuda.threadIdx.x % WARP
    warp = cuda.threadIdx.x // WARP
    part = warp & ((1 << split) - 1)
    first = 8 * lane + STEP * part
    total = float32(0)
    if row < N:
        for j in range(PIECES):
            col = first + (STEP * j << split)
            if col < K:
                x0, x1, x2, x3 = load_half8(x, col)
                total += dot8(w[j, 0], w[j, 1], w[j, 2], w[j, 3], x0, x1, x2, x3)
        col = first + (PIECES * STEP << split)
        while col < K:  # of a row longer than w
            w0, w1, w2, w3 = load_half8_once(W, (row, col))
            x0, x1, x2, x3 = load_half8(x, col)
            total += dot8(w0, w1, w2, w3, x0, x1, x2, x3)
            col += STEP << split
    total = warp_sum(total)
    if split > 0:
        cuda.syncthreads()  # all have read what the round before left
        if lane == 0:
            partial[warp] = total
        cuda.syncthreads()
        total = float32(0)
        for other in range(1 << split):
            total += partial[warp - part + other]
    return total


@cuda.jit(device=True, forceinline=True)
def leads(split):
    """Whether this thread is the one that stores what the 2 ** split warps of a row have found."""
    return cuda.threadIdx.x & ((WARP << split) - 1) == 0


# --- kernels ---------------------------------------------------------------------------------------------------------


@cuda.jit(launch_bounds=FOUR_BLOCKS)
def gemv_v4_half(x, W, out, N, K, split):
    """out[n] = W[n] · x, rung 4: in float16, summed in float32.

    x: (K,), W: (N, K) float16. out: (N,) float32. All C-contiguous, W and x from a multiple of 16 bytes on. N, K:
    int32; K a multiple of 8. split: int32, ``gemv_split(N, K)``.
    Launch: ``gemv_v4_half[gemv_half_launch(N, K)](…)``, 256 threads.
    """
    partial = cuda.shared.array(WARPS, float32)
    w = cuda.local.array((PIECES, 4), uint32)
    warp = cuda.threadIdx.x // WARP
    n_rows = WARPS >> split  # of W, that the block takes at a time
    griddep_launch()
    row0 = cuda.blockIdx.x * n_rows
    while row0 < N:
        row = row0 + (warp >> split)
        load_pieces(W, row, split, N, K, w)
        griddep_wait()
        total = row_total(W, row, w, x, split, N, K, partial)
        if row < N and leads(split):
            out[row] = total
        row0 += cuda.gridDim.x * n_rows


# --- references ------------------------------------------------------------------------------------------------------


def gemv_half_reference(x, W):
    """NumPy reference of :func:`gemv_v4_half`: (K,) and (N, K) float16, summed in float64; returns (N,) float32."""
    return (W.astype(np.float64) @ x.astype(np.float64)).astype(np.float32)
