"""Chapter 9, matrix times vector in float16, for 1 to 8 rows: half the bytes, and the work around it for nothing.

While a GPU reads a matrix for a single row of x, its arithmetic idles: normalising x first, or adding a bias and the
residual afterwards, costs no time there, but as a kernel of its own each costs a launch and a trip through memory.

==========================  =====================================================  ===================================
kernel                      what it changes                                        bytes read for one row of x
==========================  =====================================================  ===================================
``gemv_v3_vector``          (``gemv.py``, float32)                                 4 * N * K
``gemv_v4_half``            float16; a lane has four loads of 16 bytes under way;  2 * N * K
                            several warps share a row if rows are few
``gemv_bias_residual``      v4, and the result is added to x with a bias           2 * N * K
``gemv_ln``                 v4 behind a layer norm, and a bias                     2 * N * K
==========================  =====================================================  ===================================

The last two take up to 8 rows, of as many sequences that are decoded together: a row of W waits in registers while each
of them is multiplied with it. More rows are work for a tensor core (``pipeline.py``).

**Ask before you may.** Weights are there from the beginning; only x comes from the kernel before. So each kernel
asks for its first weights and only then calls ``griddep_wait`` (see ``common.ptx``): launched as dependent in a CUDA
graph, on sm_90 or later, it has them on their way while the kernel before still runs, which let it in by
``griddep_launch``. Small kernels spend most of their time waiting for their first bytes, and that is what this hides.
Elsewhere it changes nothing.

They lose where N is small: few warps. A result depends on its
rows of x and W alone and is the same in every run. Sources: as ``gemv.py``; CUDA Programming Guide, "Programmatic
Dependent Launch"; layer norm as in chapter 7, version 1.
"""

import math

import numpy as np
from numba import cuda, float32, uint32
from numba.types import float16

from common.ptx import griddep_launch, griddep_wait, load_half8, load_half8_once, unpack_half2

from ..ch07_warp_reduce.kernels import WARP, warp_sum

THREADS = 256
WARPS = THREADS // WARP
PIECES = 4  # loads of 8 numbers that a lane has under way before it needs the first of them
STEP = 8 * WARP  # numbers that a warp reads with one of them
EACH = 8  # elements of a row that a thread normalises
D_MODEL_MAX = THREADS * EACH
ROWS_MAX = 8
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
    """Launch configuration of :func:`gemv_v4_half` and :func:`gemv_bias_residual`: ``(grid, block)``.

    Raises ValueError if a size is not positive, or K not a multiple of 8.
    """
    rows = WARPS >> gemv_split(N, K)
    return min((N + rows - 1) // rows, BLOCKS_MAX), THREADS


def gemv_ln_launch(N, d_model, rows=1):
    """Launch configuration of the kernels with a layer norm in front: ``(grid, block, stream, shared bytes)``.

    Raises ValueError if a size is not positive, rows are more than 8, or d_model is more than 2048 or no multiple of 8.
    """
    grid, block = gemv_half_launch(N, d_model)
    if not 1 <= rows <= ROWS_MAX:
        raise ValueError(f"rows = {rows}: a GEMV takes 1 to {ROWS_MAX} rows of x; for more there is gemm_bias")
    if d_model > D_MODEL_MAX:
        raise ValueError(
            f"d_model = {d_model}: a block normalises rows of at most {D_MODEL_MAX}; "
            "normalise with chapter 7's layernorm_row first, and multiply with gemv_v4_half"
        )
    return grid, block, 0, (8 + 2 * rows) * d_model  # the norm's weight and bias, and the rows in float16


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
def load_row(W, bias, row, split, N, K, w):
    """:func:`load_pieces`, and returns bias[row]: asked for now, it is there when the sum is."""
    load_pieces(W, row, split, N, K, w)
    return bias[row] if row < N else float32(0)


@cuda.jit(device=True, forceinline=True)
def row_total(W, row, w, x, at, split, N, K, partial):
    """W[row] · x[at : at + K] in every thread of the row's warps. All threads of the block must call it.

    w: what :func:`load_pieces` loaded. x: flat float16, in shared or global memory. partial: (8,) float32, shared.
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
                x0, x1, x2, x3 = load_half8(x, at + col)
                total += dot8(w[j, 0], w[j, 1], w[j, 2], w[j, 3], x0, x1, x2, x3)
        col = first + (PIECES * STEP << split)
        while col < K:  # of a row longer than w
            w0, w1, w2, w3 = load_half8_once(W, (row, col))
            x0, x1, x2, x3 = load_half8(x, at + col)
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


@cuda.jit(device=True, forceinline=True)
def load_norm(weight, bias, d_model, norm):
    """norm[2 * c] = weight[c], norm[2 * c + 1] = bias[c], float32, in shared memory: before x is there."""
    for j in range(EACH):
        c = cuda.threadIdx.x + THREADS * j
        if c < d_model:
            norm[2 * c] = weight[c]
            norm[2 * c + 1] = bias[c]


@cuda.jit(device=True, forceinline=True)
def layernorm_to_shared(x, first, norm, out, rows, d_model, eps, partial):
    """out[at + b * d_model + c] = layer norm of x[first + b] in float16, at = 4 * d_model, for ``rows`` rows.

    x: (at least first + rows, d_model) float32. norm: from :func:`load_norm`; a thread reads there what it has written.
    out: flat float16, the same shared memory: what is normalised lies behind ``norm``. partial: (8, 2) float32, shared.
    Ends in a barrier.

    One reduction instead of two: sum and sum of squares travel together, of the distances to the row's first element.
    Without that shift, squares of a row far from 0 would be large, and their difference nothing but rounding.
    """
    values = cuda.local.array(EACH, float32)
    lane = cuda.threadIdx.x % WARP
    for b in range(rows):
        shift = x[first + b, 0]
        total = float32(0)
        squares = float32(0)
        for j in range(EACH):
            c = cuda.threadIdx.x + THREADS * j
            values[j] = x[first + b, c] - shift if c < d_model else float32(0)
            total += values[j]
            squares += values[j] * values[j]
        total = warp_sum(total)
        squares = warp_sum(squares)
        if lane == 0:
            partial[cuda.threadIdx.x // WARP, 0] = total
            partial[cuda.threadIdx.x // WARP, 1] = squares
        cuda.syncthreads()
        total = float32(0)
        squares = float32(0)
        for warp in range(WARPS):
            total += partial[warp, 0]
            squares += partial[warp, 1]
        mean = total / float32(d_model)
        variance = max(squares / float32(d_model) - mean * mean, float32(0))
        scale = float32(1) / math.sqrt(variance + float32(eps))
        for j in range(EACH):
            c = cuda.threadIdx.x + THREADS * j
            if c < d_model:
                out[4 * d_model + b * d_model + c] = (values[j] - mean) * scale * norm[2 * c] + norm[2 * c + 1]
        cuda.syncthreads()  # the row is complete, and all have read partial


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
        total = row_total(W, row, w, x, 0, split, N, K, partial)
        if row < N and leads(split):
            out[row] = total
        row0 += cuda.gridDim.x * n_rows


@cuda.jit(launch_bounds=FOUR_BLOCKS)
def gemv_bias_residual(a, W, bias, x, rows, N, K, split):
    """x[b] += W @ a[b] + bias for 1 to 8 rows: a linear layer that ends in the residual stream.

    a: (rows * K,) float16, flat. W: (N, K) float16. bias: (N,), x: (rows, N) float32. All C-contiguous, a and W from a
    multiple of 16 bytes on. rows, N, K: int32, K a multiple of 8. split: int32, ``gemv_split(N, K)``.
    Launch: ``gemv_bias_residual[gemv_half_launch(N, K)](…)``.
    """
    partial = cuda.shared.array(WARPS, float32)
    w = cuda.local.array((PIECES, 4), uint32)
    n_rows = WARPS >> split
    row0 = cuda.blockIdx.x * n_rows
    griddep_launch()
    while row0 < N:
        row = row0 + (cuda.threadIdx.x // WARP >> split)
        row_bias = load_row(W, bias, row, split, N, K, w)
        griddep_wait()
        for b in range(rows):
            before = x[b, row] if row < N else float32(0)
            total = row_total(W, row, w, a, b * K, split, N, K, partial)
            if row < N and leads(split):
                x[b, row] = before + (total + row_bias)
        row0 += cuda.gridDim.x * n_rows


@cuda.jit(launch_bounds=FOUR_BLOCKS)
def gemv_ln(x, ln_weight, ln_bias, W, bias, out, rows, N, d_model, split, eps):
    """out[b] = W @ layernorm(x[b]) + bias for 1 to 8 rows, in float16.

    x: (rows, d_model) float32. ln_weight, ln_bias: (d_model,) float32. W: (N, d_model) float16. bias: (N,) float32.
    out: (rows, N) float16. All C-contiguous, W from a multiple of 16 bytes on. rows, N, d_model: int32. split: int32,
    ``gemv_split(N, d_model)``. eps: float32. Every block normalises x for itself: a few KiB, that lie in the L2 cache.
    Launch: ``gemv_ln[gemv_ln_launch(N, d_model, rows)](…)``.
    """
    norm = cuda.shared.array(0, float32, alignment=16)
    x_hat = cuda.shared.array(0, float16, alignment=16)
    norm_partial = cuda.shared.array((WARPS, 2), float32)
    partial = cuda.shared.array(WARPS, float32)
    w = cuda.local.array((PIECES, 4), uint32)
    n_rows = WARPS >> split
    row0 = cuda.blockIdx.x * n_rows
    row = row0 + (cuda.threadIdx.x // WARP >> split)
    griddep_launch()
    row_bias = load_row(W, bias, row, split, N, d_model, w)
    load_norm(ln_weight, ln_bias, d_model, norm)
    griddep_wait()
    layernorm_to_shared(x, 0, norm, x_hat, rows, d_model, eps, norm_partial)
    while row0 < N:
        for b in range(rows):
            total = row_total(W, row, w, x_hat, (4 + b) * d_model, split, N, d_model, partial)
            if row < N and leads(split):
                out[b, row] = total + row_bias
        row0 += cuda.gridDim.x * n_rows
        row = row0 + (cuda.threadIdx.x // WARP >> split)
        row_bias = load_row(W, bias, row, split, N, d_model, w)


# --- references ------------------------------------------------------------------------------------------------------


def layernorm_half_reference(x, weight, bias, eps):
    """NumPy reference of :func:`layernorm_to_shared`: (rows, d_model) float32; returns float16."""
    x = x.astype(np.float64)
    centred = x - x.mean(axis=1, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps) * weight + bias).astype(np.float16)


def gemv_half_reference(x, W):
    """NumPy reference of :func:`gemv_v4_half`: (K,) and (N, K) float16, summed in float64; returns (N,) float32."""
    return (W.astype(np.float64) @ x.astype(np.float64)).astype(np.float32)


def gemv_bias_residual_reference(a, W, bias, x):
    """NumPy reference of :func:`gemv_bias_residual`, a as (rows, K); returns x afterwards, (rows, N) float32."""
    return (x + (a.astype(np.float64) @ W.astype(np.float64).T + bias)).astype(np.float32)


def gemv_ln_reference(x, ln_weight, ln_bias, W, bias, eps):
    """NumPy reference of :func:`gemv_ln`: the layer norm rounded to float16, then float64; (rows, N) float16."""
    hidden = layernorm_half_reference(x, ln_weight, ln_bias, eps).astype(np.float64)
    return (hidden @ W.astype(np.float64).T + bias).astype(np.float16)
