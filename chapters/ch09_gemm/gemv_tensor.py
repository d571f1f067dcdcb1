"""Chapter 9, matrix times vector on tensor cores, eight rows of x at a time: not for their speed, but to have no work.

A GPU reads 2 bytes of W and has to take them apart, convert and multiply them: in ``gemv_v4_half`` some 20 instructions
for each load of 16 bytes. A tensor core takes the same 16 bytes as they are. Its product is 16 x 8 x 16, rows of W by
rows of x: seven eighths of it are thrown away when x has one row, and up to eight rows cost nothing more. Each further
group of eight reads W again, from the L2 cache if W fits: blocks of all groups lie along y of the grid.

==========================  =====================================================  ===================================
kernel                      what it changes                                        instructions for 16 bytes of W
==========================  =====================================================  ===================================
``gemv_v4_half``            (``gemv_half.py``)                                     about 20, for one row of x
``gemv_v5_tensor_core``     16 rows of W a block, whose 8 warps share K; weights   about 3, for 1 to 8 rows of x
                            wait in registers, as the product wants them
``gemv_bias_residual``      v5 with 8 rows of W and 16 warps, added to x with a    about 4
                            bias: for a W of few, long rows
``gemv_wide_residual``      the same with v5's tiles, for many long rows of W;     about 3
                            weights run six steps ahead of the product
``gemv_ln``                 v5 behind a layer norm, and a bias                     about 3, and a pass over x
==========================  =====================================================  ===================================

**Any order of K will do**, as long as both operands have it: a sum of products does not care. The instruction wants of
each lane pairs that are 8 numbers apart; given instead the four pairs of one load, for W and x alike, it multiplies
what belongs together. So nothing is rearranged: a lane loads 16 bytes, and they are an operand.

**A kernel that is waited for should have little left to do.** Each thread asks for all its weights before
``griddep_wait`` (see ``gemv_half.py``), and has them in registers when x comes. Then: load x, multiply, add up the
warps, store. One barrier.

**A layer norm can be moved behind the product.** Its weight and bias belong into W and the bias, once and for all
(:func:`fold_norm`). What is left is (x - mean) * scale, two numbers for a whole row:
W (x - mean) * scale = (W x - mean * (sum of each row of W)) * scale. So the product need not wait for mean and scale;
both are taken along and meet in the last line. The price: x itself is rounded to float16, so it has to be within
65504, and digits are lost if its mean is many times its spread.

They lose where x has many rows (``pipeline.py``). A result depends on its rows of x and W alone and is the same
in every run. Sources: as ``gemv_half.py``; PTX ISA, "Matrix Fragments for mma.m16n8k16".
"""

import numpy as np
from numba import cuda, float32, uint32
from numba.cuda import libdevice

from common.ptx import (
    griddep_launch,
    griddep_wait,
    load_float4_if,
    load_half8_if,
    load_half8_now,
    load_half8_once_if,
    mma_m16n8k16,
    pack_half2,
)

from ..ch07_warp_reduce.kernels import FULL_WARP, WARP, warp_sum

TILE = 16  # rows of W a block
WARPS = 8
THREADS = WARPS * WARP
DEPTH = 32  # columns of W that a warp multiplies at a time: 4 lanes side by side with 8 numbers each
STEPS = 3  # of that depth, whose weights a warp holds in registers: 768 columns a block
WIDE, WIDE_STEPS = 1536, 6  # rows of W that make a block for most multiprocessors; steps where they are that many
SHORT_TILE, MANY_WARPS, PAIRS = 8, 16, 3  # where W has few rows, long ones: 3072 columns a block
MANY_THREADS = MANY_WARPS * WARP
STRIDE, SHORT_STRIDE = WARPS * DEPTH, MANY_WARPS * DEPTH  # columns from one step of a warp to its next
ROWS_MAX = 8  # rows of x in a group, which a block multiplies at once
GROUPS_MAX = 65535  # of a grid, along y
# Registers for weights and for all of x that a thread asks for at once, and room for 3 blocks on a multiprocessor:
# those of kernels that wait for their turn stand beside those at work, with their weights already there.
THREE_BLOCKS = (THREADS, 3)
TWO_BLOCKS = (THREADS, 2)
ONE_BLOCK = (MANY_THREADS, 1)


def gemv_tensor_launch(N, K, rows=1):
    """Launch configuration of :func:`gemv_v5_tensor_core` and the kernels with a layer norm: ``(grid, block)``.

    A block of 256 threads for 16 rows of W, along x, and 8 rows of x, along y. Raises ValueError if a size is not
    positive, K not a multiple of 8 or rows above 8 * 65535.
    """
    return _blocks(N, K, rows, TILE), THREADS


def gemv_residual_launch(N, K, rows=1):
    """Launch configuration of :func:`gemv_bias_residual`, a block of 512 threads for 8 rows of W; raises as above."""
    return _blocks(N, K, rows, SHORT_TILE), MANY_THREADS


def _blocks(N, K, rows, tile):
    if N <= 0 or K <= 0:
        raise ValueError(f"W has shape ({N}, {K}): a launch needs at least 1 row and 1 column")
    if K % 8:
        raise ValueError(f"K = {K}: rows of W must begin at multiples of 16 bytes; pad W and x to a multiple of 8")
    if not 1 <= rows <= ROWS_MAX * GROUPS_MAX:
        raise ValueError(f"rows = {rows}: a launch takes 1 to {ROWS_MAX * GROUPS_MAX} rows of x")
    return (N + tile - 1) // tile, (rows + ROWS_MAX - 1) // ROWS_MAX


# --- device functions ------------------------------------------------------------------------------------------------
#
# A warp's share of K: steps of 32 columns, number warp, warp + warps, … . A lane has 8 columns of each, of two rows of
# W (group and group + 8 of the tile) and one of x: what the product wants of it.
#
# With 8 rows of W a block, the product's lower 8 rows are the same rows again, one step further on; and its columns
# take turns, an even one with a row of x at the first of two steps, an odd one with the same row at the second. Of the
# four results of a lane c0 and c3 belong together, and c1 and c2 are of no use.


@cuda.jit(device=True, forceinline=True)
def first_column():
    """The first of the columns that this lane has of its warp's steps."""
    return cuda.threadIdx.x // WARP * DEPTH + cuda.threadIdx.x % 4 * 8


@cuda.jit(device=True, forceinline=True)
def load_next(W, row0, half, row, col, N, K, w, step):
    """w[step, half] = 8 numbers, as 4 pairs, of W's row row0 + row from column ``col`` on.

    Behind the end of W these are its last row's or column's: the one is stored by nobody, the other multiplied by 0.
    W: (N, K) float16. w: (steps, 2, 4) uint32, local.
    """
    p0, p1, p2, p3 = load_half8_now(W, (min(row0 + row, N - 1), min(col, K - 8)))
    w[step, half, 0], w[step, half, 1], w[step, half, 2], w[step, half, 3] = p0, p1, p2, p3


@cuda.jit(device=True, forceinline=True)
def load_ahead(W, row0, half, row, col, N, K, w, step):
    """:func:`load_next`, but zeros from column K on: a warp whose columns end asks for nothing, and has no branch."""
    p0, p1, p2, p3 = load_half8_once_if(W, (min(row0 + row, N - 1), col), col < K)
    w[step, half, 0], w[step, half, 1], w[step, half, 2], w[step, half, 3] = p0, p1, p2, p3


@cuda.jit(device=True, forceinline=True)
def load_weights(W, row0, col, N, K, w):
    """:func:`load_next` for all steps from column ``col`` on, rows row0 + group (+ 8)."""
    row = cuda.threadIdx.x % WARP // 4
    for half in range(2):
        for step in range(w.shape[0]):
            load_next(W, row0, half, row + 8 * half, col + step * STRIDE, N, K, w, step)


@cuda.jit(device=True, forceinline=True)
def load_short_weights(W, row0, col, N, K, w):
    """:func:`load_weights` for a tile of 8 rows: w[pair, half] is of row row0 + group, at two steps one after other."""
    row = cuda.threadIdx.x % WARP // 4
    for pair in range(w.shape[0]):
        for half in range(2):
            load_next(W, row0, half, row, col + (2 * pair + half) * SHORT_STRIDE, N, K, w, pair)


@cuda.jit(device=True, forceinline=True)
def load_x(x, at, col, advance, K, b):
    """b[step] = 8 numbers, as 4 pairs, of x from x[at] on, column ``col``, and each step ``advance`` further; 0 from K.

    x: float16, flat. b: (steps, 4) uint32, local.
    """
    for step in range(b.shape[0]):
        inside = col + step * advance < K
        b[step, 0], b[step, 1], b[step, 2], b[step, 3] = load_half8_if(x, at + step * advance, inside)


@cuda.jit(device=True, forceinline=True)
def multiply_step(w, step, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3):
    """c and d + the weights in w[step] times four pairs of x. Two chains of sums: neither waits for the other."""
    u0, u1, u2, u3 = w[step, 0, 0], w[step, 0, 1], w[step, 0, 2], w[step, 0, 3]
    v0, v1, v2, v3 = w[step, 1, 0], w[step, 1, 1], w[step, 1, 2], w[step, 1, 3]
    c0, c1, c2, c3 = mma_m16n8k16(u0, v0, u1, v1, b0, b1, c0, c1, c2, c3)
    d0, d1, d2, d3 = mma_m16n8k16(u2, v2, u3, v3, b2, b3, d0, d1, d2, d3)
    return c0, c1, c2, c3, d0, d1, d2, d3


@cuda.jit(device=True, forceinline=True)
def multiply_steps(w, b, col, advance, K, c0, c1, c2, c3):
    """c + the tile's weights in ``w`` times x in ``b``: the product's four sums of this lane."""
    d0 = d1 = d2 = d3 = float32(0)
    col -= cuda.threadIdx.x % 4 * 8
    for step in range(w.shape[0]):
        if col + step * advance < K:  # the same for all lanes
            c0, c1, c2, c3, d0, d1, d2, d3 = multiply_step(
                w, step, b[step, 0], b[step, 1], b[step, 2], b[step, 3], c0, c1, c2, c3, d0, d1, d2, d3
            )
    return c0 + d0, c1 + d1, c2 + d2, c3 + d3


@cuda.jit(device=True, forceinline=True)
def first_row():
    """The first row of x of this block's group."""
    return cuda.blockIdx.y * ROWS_MAX


@cuda.jit(device=True, forceinline=True)
def x_row(rows):
    """The row of x that this lane loads. Rows too many are multiplied all the same: nobody stores what comes of it."""
    return min(first_row() + cuda.threadIdx.x % WARP // 4, rows - 1)


@cuda.jit(device=True, forceinline=True)
def multiply_x(x, at, W, row0, N, K, w, b):
    """This warp's share of the tile times x, float16: four sums a lane. Weights of its first columns are in ``w``.

    at: where this lane's part of x begins: x_row(rows) * K + first_column(), worked out before it is needed. b: (steps,
    4) uint32, local. Where K is longer than registers hold, a step's weights and x are asked for when those before
    have been multiplied, and arrive while all other steps are.
    """
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = float32(0)
    row = cuda.threadIdx.x % WARP // 4
    col = first_column()
    load_x(x, at, col, STRIDE, K, b)
    done = 0
    while col - cuda.threadIdx.x % 4 * 8 + done < K:  # the same for all lanes
        for step in range(w.shape[0]):
            c0, c1, c2, c3, d0, d1, d2, d3 = multiply_step(
                w, step, b[step, 0], b[step, 1], b[step, 2], b[step, 3], c0, c1, c2, c3, d0, d1, d2, d3
            )
            ahead = done + (step + w.shape[0]) * STRIDE
            load_ahead(W, row0, 0, row, col + ahead, N, K, w, step)
            load_ahead(W, row0, 1, row + 8, col + ahead, N, K, w, step)
            p0, p1, p2, p3 = load_half8_if(x, at + ahead, col + ahead < K)
            b[step, 0], b[step, 1], b[step, 2], b[step, 3] = p0, p1, p2, p3
        done += w.shape[0] * STRIDE
    return c0 + d0, c1 + d1, c2 + d2, c3 + d3


@cuda.jit(device=True, forceinline=True)
def multiply_short_x(x, at, W, row0, N, K, w):
    """:func:`multiply_x` for a tile of 8 rows of W, and 4 rows of x: the product with row lane % 4 is c0 + c3.

    at: where row group // 2 of the four begins, and first_column(), and a step further if group is odd.
    """
    b = cuda.local.array((PAIRS, 4), uint32)
    more_w = cuda.local.array((1, 2, 4), uint32)
    more_b = cuda.local.array((1, 4), uint32)
    behind = cuda.threadIdx.x % WARP // 4 % 2 * SHORT_STRIDE
    col = first_column()
    load_x(x, at, col + behind, 2 * SHORT_STRIDE, K, b)
    c0, c1, c2, c3 = multiply_steps(w, b, col, 2 * SHORT_STRIDE, K, float32(0), float32(0), float32(0), float32(0))
    done = 2 * PAIRS * SHORT_STRIDE
    while col - cuda.threadIdx.x % 4 * 8 + done < K:
        load_short_weights(W, row0, col + done, N, K, more_w)
        load_x(x, at + done, col + done + behind, 2 * SHORT_STRIDE, K, more_b)
        c0, c1, c2, c3 = multiply_steps(more_w, more_b, col + done, 2 * SHORT_STRIDE, K, c0, c1, c2, c3)
        done += 2 * SHORT_STRIDE
    return c0 + c3


@cuda.jit(device=True, forceinline=True)
def load_residual(x, at, inside, v, step):
    """v[step] = 8 numbers of x from x[at] on, 0 if not ``inside``. v: (steps, 8) float32, local."""
    v[step, 0], v[step, 1], v[step, 2], v[step, 3] = load_float4_if(x, at, inside)
    v[step, 4], v[step, 5], v[step, 6], v[step, 7] = load_float4_if(x, at + 4, inside)


@cuda.jit(device=True, forceinline=True)
def pack_residual(v, step, b, total, squares):
    """b[step] = v[step] as 4 pairs; returns total + their sum, squares + that of their squares."""
    for pair in range(4):
        low, high = v[step, 2 * pair], v[step, 2 * pair + 1]
        total += low + high
        squares += low * low + high * high
        b[step, pair] = pack_half2(low, high)
    return total, squares


@cuda.jit(device=True, forceinline=True)
def share_moments(total, squares, moments):
    """Sum, and sum of squares, of the numbers of x that a warp has multiplied, to ``moments``, by row."""
    for lane in (1, 2):  # the 4 lanes with the same row of x
        total += cuda.shfl_xor_sync(FULL_WARP, total, lane)
        squares += cuda.shfl_xor_sync(FULL_WARP, squares, lane)
    if cuda.threadIdx.x % 4 == 0:
        moments[cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP // 4, 0] = total
        moments[cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP // 4, 1] = squares


@cuda.jit(device=True, forceinline=True)
def multiply_residual(x, at, W, row0, N, K, w, moments):
    """:func:`multiply_x` for x in float32; sum and sum of squares of its numbers go to ``moments``.

    moments: (8, 8, 2) float32, shared: by warp and row of the group.
    """
    v = cuda.local.array((STEPS, 8), float32)
    b = cuda.local.array((STEPS, 4), uint32)
    more_w = cuda.local.array((1, 2, 4), uint32)
    more_v = cuda.local.array((1, 8), float32)
    more_b = cuda.local.array((1, 4), uint32)
    total = float32(0)
    squares = float32(0)
    col = first_column()
    for step in range(STEPS):  # asked for all at once
        load_residual(x, at + step * STRIDE, col + step * STRIDE < K, v, step)
    for step in range(STEPS):
        total, squares = pack_residual(v, step, b, total, squares)
    c0, c1, c2, c3 = multiply_steps(w, b, col, STRIDE, K, float32(0), float32(0), float32(0), float32(0))
    done = STEPS * STRIDE
    while col - cuda.threadIdx.x % 4 * 8 + done < K:  # K is longer than registers hold
        load_weights(W, row0, col + done, N, K, more_w)
        load_residual(x, at + done, col + done < K, more_v, 0)
        total, squares = pack_residual(more_v, 0, more_b, total, squares)
        c0, c1, c2, c3 = multiply_steps(more_w, more_b, col + done, STRIDE, K, c0, c1, c2, c3)
        done += STRIDE
    share_moments(total, squares, moments)
    return c0, c1, c2, c3


@cuda.jit(device=True, forceinline=True)
def multiply_wide(x, at, W, row0, N, K, w, moments):
    """:func:`multiply_residual` for long rows: as in :func:`multiply_x`, weights arrive while others are multiplied.

    Of x, only one step is on its way behind the first: the blocks of a multiprocessor read the same, and find it in the
    L1 cache.
    """
    v = cuda.local.array((STEPS, 8), float32)
    b = cuda.local.array((STEPS, 4), uint32)
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = float32(0)
    total = float32(0)
    squares = float32(0)
    row = cuda.threadIdx.x % WARP // 4
    col = first_column()
    for step in range(STEPS):  # asked for all at once
        load_residual(x, at + step * STRIDE, col + step * STRIDE < K, v, step)
    for step in range(STEPS):
        total, squares = pack_residual(v, step, b, total, squares)
    done = STEPS * STRIDE
    load_residual(x, at + done, col + done < K, v, 0)
    for step in range(STEPS):
        c0, c1, c2, c3, d0, d1, d2, d3 = multiply_step(
            w, step, b[step, 0], b[step, 1], b[step, 2], b[step, 3], c0, c1, c2, c3, d0, d1, d2, d3
        )
        ahead = done + step * STRIDE
        load_ahead(W, row0, 0, row, col + ahead, N, K, w, step)
        load_ahead(W, row0, 1, row + 8, col + ahead, N, K, w, step)
    while col - cuda.threadIdx.x % 4 * 8 + done < K:
        for step in range(STEPS):
            here = done + step * STRIDE
            total, squares = pack_residual(v, 0, b, total, squares)
            load_residual(x, at + here + STRIDE, col + here + STRIDE < K, v, 0)
            c0, c1, c2, c3, d0, d1, d2, d3 = multiply_step(
                w, step, b[0, 0], b[0, 1], b[0, 2], b[0, 3], c0, c1, c2, c3, d0, d1, d2, d3
            )
            ahead = here + STEPS * STRIDE
            load_ahead(W, row0, 0, row, col + ahead, N, K, w, step)
            load_ahead(W, row0, 1, row + 8, col + ahead, N, K, w, step)
        done += STEPS * STRIDE
    share_moments(total, squares, moments)
    return c0 + d0, c1 + d1, c2 + d2, c3 + d3


@cuda.jit(device=True, forceinline=True)
def share_sums(sums, rows, c0, c1, c2, c3):
    """sums[warp, b, r] = this warp's part of the product of row r of the tile and row b of the group.

    rows: of the group, or more. A barrier has to follow. sums: (8, 8, 16) float32, shared.
    """
    warp = cuda.threadIdx.x // WARP
    group = cuda.threadIdx.x % WARP // 4
    two = cuda.threadIdx.x % 4 * 2
    if two < rows:
        sums[warp, two, group] = c0
        sums[warp, two, group + 8] = c2
    if two + 1 < rows:
        sums[warp, two + 1, group] = c1
        sums[warp, two + 1, group + 8] = c3


@cuda.jit(device=True, forceinline=True)
def sum_of_warps(sums, r, b):
    """The product of row r of the tile and row b of the group."""
    total = float32(0)
    for warp in range(sums.shape[0]):
        total += sums[warp, b, r]
    return total


@cuda.jit(device=True, forceinline=True)
def norm_of(moments, b, d_model, eps):
    """Mean of row b of the group, and 1 / sqrt(variance + eps).

    In one pass: mean of squares less square of mean. Chapter 7 warns of that; here float16 has lost the digits first.
    """
    total = float32(0)
    squares = float32(0)
    for warp in range(WARPS):
        total += moments[warp, b, 0]
        squares += moments[warp, b, 1]
    share = float32(1) / float32(d_model)
    mean = total * share
    variance = max(squares * share - mean * mean, float32(0))
    return mean, libdevice.rsqrtf(variance + float32(eps))


@cuda.jit(device=True, forceinline=True)
def rms_scale(moments, b, d_model, eps):
    """1 / sqrt(mean of squares + eps) of row b of the group: all that an RMS norm leaves to be done behind a product
    whose W has its weight."""
    squares = float32(0)
    for warp in range(WARPS):
        squares += moments[warp, b, 1]
    return libdevice.rsqrtf(squares * (float32(1) / float32(d_model)) + float32(eps))


@cuda.jit(device=True, forceinline=True)
def behind_norm(sums, moments, r, b, row_sum, row_bias, d_model, eps):
    """W[r] layernorm(x[b]) + bias for row b of the group, of what the warps have left in ``sums`` and ``moments``."""
    mean, scale = norm_of(moments, b, d_model, eps)
    return (sum_of_warps(sums, r, b) - mean * row_sum) * scale + row_bias


# --- kernels ---------------------------------------------------------------------------------------------------------
#
# Thread b * tile + r stores the product of row r of the tile and row b of the group: the first threads of a block do.


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemv_v5_tensor_core(x, W, out, rows, N, K):
    """out[b, n] = W[n] · x[b], rung 5: products of 16 x 8 x 16 on tensor cores, for 8 rows of x at a time.

    x: (rows * K,) float16, flat. W: (N, K) float16. out: (rows, N) float32. All C-contiguous, W and x from a multiple
    of 16 bytes on. rows, N, K: int32; K a multiple of 8.
    Launch: ``gemv_v5_tensor_core[gemv_tensor_launch(N, K, rows)](…)``, 256 threads; sm_75 or later.
    """
    sums = cuda.shared.array((WARPS, ROWS_MAX, TILE), float32)
    w = cuda.local.array((STEPS, 2, 4), uint32)
    pairs = cuda.local.array((STEPS, 4), uint32)
    r, b = cuda.threadIdx.x % TILE, cuda.threadIdx.x // TILE
    row0 = cuda.blockIdx.x * TILE
    b0 = first_row()
    griddep_launch()
    load_weights(W, row0, first_column(), N, K, w)
    at = x_row(rows) * K + first_column()
    griddep_wait()
    c0, c1, c2, c3 = multiply_x(x, at, W, row0, N, K, w, pairs)
    share_sums(sums, rows - b0, c0, c1, c2, c3)
    cuda.syncthreads()
    if b < min(rows - b0, ROWS_MAX) and row0 + r < N:
        out[b0 + b, row0 + r] = sum_of_warps(sums, r, b)


@cuda.jit(launch_bounds=ONE_BLOCK)
def gemv_bias_residual(a, W, bias, x, rows, N, K):
    """x[b] += W @ a[b] + bias, 8 rows at a time: a linear layer that ends in the residual stream.

    a: (rows * K,) float16, W: (N, K) float16. bias: (N,), x: (rows * N,) float32; a and x flat. All C-contiguous, a and
    W from a multiple of 16 bytes on. rows, N, K: int32, K a multiple of 8.
    Launch: ``gemv_bias_residual[gemv_residual_launch(N, K, rows)](…)``, 512 threads; sm_75 or later.
    """
    sums = cuda.shared.array((MANY_WARPS, ROWS_MAX, SHORT_TILE), float32)
    w = cuda.local.array((PAIRS, 2, 4), uint32)
    r, b = cuda.threadIdx.x % SHORT_TILE, cuda.threadIdx.x // SHORT_TILE
    warp, group, of_four = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP // 4, cuda.threadIdx.x % 4
    row0 = cuda.blockIdx.x * SHORT_TILE
    b0 = first_row()
    left = min(rows - b0, ROWS_MAX)
    griddep_launch()
    load_short_weights(W, row0, first_column(), N, K, w)
    row_bias = bias[min(row0 + r, N - 1)]  # asked for now, it is there when the sum is
    column = first_column() + group % 2 * SHORT_STRIDE
    at = (b0 + min(group // 2, left - 1)) * K + column
    griddep_wait()
    before = x[(b0 + b) * N + row0 + r] if b < left and row0 + r < N else float32(0)
    total = multiply_short_x(a, at, W, row0, N, K, w)
    if of_four < left:
        sums[warp, of_four, group] = total
    if left > 4:
        at = (b0 + min(4 + group // 2, left - 1)) * K + column
        total = multiply_short_x(a, at, W, row0, N, K, w)
        if 4 + of_four < left:
            sums[warp, 4 + of_four, group] = total
    cuda.syncthreads()
    if b < left and row0 + r < N:
        x[(b0 + b) * N + row0 + r] = before + (sum_of_warps(sums, r, b) + row_bias)


@cuda.jit(launch_bounds=TWO_BLOCKS)
def gemv_wide_residual(a, W, bias, x, rows, N, K):
    """x[b] += W @ a[b] + bias for a W of many rows, long ones: v5, whose weights run six steps ahead of the product.

    Arguments as :func:`gemv_bias_residual`'s, which has twice as many blocks: there are enough. Eight rows of x take no
    more time than one.
    Launch: ``gemv_wide_residual[gemv_tensor_launch(N, K, rows)](…)``, 256 threads; sm_75 or later.
    """
    sums = cuda.shared.array((WARPS, ROWS_MAX, TILE), float32)
    w = cuda.local.array((WIDE_STEPS, 2, 4), uint32)
    pairs = cuda.local.array((WIDE_STEPS, 4), uint32)
    r, b = cuda.threadIdx.x % TILE, cuda.threadIdx.x // TILE
    row0 = cuda.blockIdx.x * TILE
    b0 = first_row()
    left = min(rows - b0, ROWS_MAX)
    griddep_launch()
    load_weights(W, row0, first_column(), N, K, w)
    row_bias = bias[min(row0 + r, N - 1)]
    at = x_row(rows) * K + first_column()
    griddep_wait()
    before = x[(b0 + b) * N + row0 + r] if b < left and row0 + r < N else float32(0)
    c0, c1, c2, c3 = multiply_x(a, at, W, row0, N, K, w, pairs)
    share_sums(sums, left, c0, c1, c2, c3)
    cuda.syncthreads()
    if b < left and row0 + r < N:
        x[(b0 + b) * N + row0 + r] = before + (sum_of_warps(sums, r, b) + row_bias)


def residual_product(N, K, rows=1):
    """The kernel that suits a W of this shape, and its launch: :func:`gemv_bias_residual` or its wide form."""
    if N >= WIDE:
        return gemv_wide_residual, gemv_tensor_launch(N, K, rows)
    return gemv_bias_residual, gemv_residual_launch(N, K, rows)


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemv_ln(x, W, row_sums, bias, out, rows, N, d_model, eps):
    """out[b] = W @ (x[b] - mean) * scale + bias, 8 rows at a time, in float16: a linear layer behind a layer norm.

    mean and scale are those of the layer norm, whose weight and bias are in W, row_sums and bias: see
    :func:`fold_norm`. x: (rows * d_model,) float32, flat, within 65504. W: (N, d_model) float16. row_sums, bias: (N,)
    float32. out: (rows, N) float16. All C-contiguous, x and W from a multiple of 16 bytes on. rows, N, d_model: int32,
    d_model a multiple of 8. eps: float32. Launch: ``gemv_ln[gemv_tensor_launch(N, d_model, rows)](…)``.
    """
    sums = cuda.shared.array((WARPS, ROWS_MAX, TILE), float32)
    moments = cuda.shared.array((WARPS, ROWS_MAX, 2), float32)
    w = cuda.local.array((STEPS, 2, 4), uint32)
    r, b = cuda.threadIdx.x % TILE, cuda.threadIdx.x // TILE
    row0 = cuda.blockIdx.x * TILE
    griddep_launch()
    load_weights(W, row0, first_column(), N, d_model, w)
    row_sum, row_bias = row_sums[min(row0 + r, N - 1)], bias[min(row0 + r, N - 1)]
    b0 = first_row()
    at = x_row(rows) * d_model + first_column()
    griddep_wait()
    c0, c1, c2, c3 = multiply_residual(x, at, W, row0, N, d_model, w, moments)
    share_sums(sums, rows - b0, c0, c1, c2, c3)
    cuda.syncthreads()
    if b < min(rows - b0, ROWS_MAX) and row0 + r < N:
        out[b0 + b, row0 + r] = behind_norm(sums, moments, r, b, row_sum, row_bias, d_model, eps)


def fold_norm_launch(N):
    """Launch configuration of :func:`fold_norm`: a warp for each row of W. Raises ValueError if N is not positive."""
    if N <= 0:
        raise ValueError(f"N = {N}: a launch needs at least 1 row of W")
    return (N + WARPS - 1) // WARPS, THREADS


@cuda.jit
def fold_norm(W, bias, ln_weight, ln_bias, folded, row_sums, folded_bias, N, d_model):
    """Move weight and bias of a layer norm into the linear layer behind it: W layernorm(x) + bias, see ``gemv_ln``.

    folded[n] = W[n] * ln_weight, row_sums[n] = the sum of folded[n] as float16 has it, folded_bias[n] = bias[n] +
    W[n] · ln_bias. W, folded: (N, d_model) float16, which may be the same. bias, row_sums, folded_bias: (N,) float32;
    bias and folded_bias may be the same. ln_weight, ln_bias: (d_model,) float32. N, d_model: int32.
    Launch: ``fold_norm[fold_norm_launch(N)](…)``.
    """
    row = cuda.grid(1) // WARP
    if row < N:
        total = float32(0)
        shift = float32(0)
        for col in range(cuda.threadIdx.x % WARP, d_model, WARP):
            weight = float32(W[row, col])
            folded[row, col] = weight * ln_weight[col]
            total += float32(folded[row, col])
            shift += weight * ln_bias[col]
        total = warp_sum(total)
        shift = warp_sum(shift)
        if cuda.threadIdx.x % WARP == 0:
            row_sums[row] = total
            folded_bias[row] = bias[row] + shift


# --- references ------------------------------------------------------------------------------------------------------


def gemv_tensor_reference(x, W):
    """NumPy reference of :func:`gemv_v5_tensor_core`, x as (rows, K): in float64; returns (rows, N) float32."""
    return (x.astype(np.float64) @ W.astype(np.float64).T).astype(np.float32)


def gemv_bias_residual_reference(a, W, bias, x):
    """NumPy reference of :func:`gemv_bias_residual`, a as (rows, K); returns x afterwards, (rows, N) float32."""
    return (x + (a.astype(np.float64) @ W.astype(np.float64).T + bias)).astype(np.float32)


def fold_norm_reference(W, bias, ln_weight, ln_bias):
    """NumPy reference of :func:`fold_norm`: (folded, row_sums, folded_bias), summed in float64."""
    folded = (W.astype(np.float32) * ln_weight).astype(np.float16)
    shift = W.astype(np.float64) @ ln_bias
    return folded, folded.astype(np.float64).sum(axis=1).astype(np.float32), (bias + shift).astype(np.float32)


def gemv_ln_reference(x, W, bias, eps):
    """NumPy reference of :func:`gemv_ln`: x - mean times scale, in float64; returns (rows, N) float16."""
    x = x.astype(np.float64)
    centred = x - x.mean(axis=1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)
    return (normal @ W.astype(np.float64).T + bias).astype(np.float16)
