"""Chapter 9, matrix times vector on tensor cores, for 1 to 8 rows of x: not for their speed, but to have no work left.

A GPU reads 2 bytes of W and has to take them apart, convert and multiply them: in ``gemv_v4_half`` some 20 instructions
for each load of 16 bytes. A tensor core takes the same 16 bytes as they are. Its product is 16 x 8 x 16, rows of W by
rows of x: seven eighths of it are thrown away when x has one row, and up to eight rows cost nothing more.

==========================  =====================================================  ===================================
kernel                      what it changes                                        instructions for 16 bytes of W
==========================  =====================================================  ===================================
``gemv_v4_half``            (``gemv_half.py``)                                     about 20, for one row of x
``gemv_v5_tensor_core``     8 or 16 rows of W a block, whose 12 warps share K      about 3, for 1 to 8 rows of x
``gemv_bias_residual``      v5, and the result is added to x with a bias           the same
``gemv_ln``                 v5 behind a layer norm, and a bias                     the same, and some 60 a warp
==========================  =====================================================  ===================================

**Any order of K will do**, as long as both operands have it: a sum of products does not care. The instruction wants of
each lane pairs that are 8 numbers apart; given instead the four pairs of one load, for W and x alike, it multiplies
what belongs together. So nothing is rearranged, and a lane's load is 16 bytes.

**What surrounds it is nearly free**: one kernel less is a launch less, and a trip through memory. Each block normalises
x for itself, a few KiB from the L2 cache. With 16 rows of W a block there are few blocks, and so few repetitions;
where W has few rows, a block takes 8 (:func:`gemv_tile`), to have more multiprocessors at work.

Kernels ask for their first weights before ``griddep_wait``: see ``gemv_half.py``. They lose where x has more than 8
rows (``pipeline.py``), and where W has fewer than some thousand rows: blocks are few. A result depends on its rows of x
and W alone and is the same in every run. Sources: as ``gemv_half.py``; layer norm as in chapter 7, version 1.
"""

import math

import numpy as np
from numba import cuda, float32, uint32
from numba.types import float16

from common.ptx import griddep_launch, griddep_wait, load_half8, load_half8_once, mma_m16n8k16

from ..ch07_warp_reduce.kernels import WARP, warp_sum

WARPS = 12
THREADS = WARPS * WARP
DEPTH = 32  # columns of W that a warp multiplies at a time: 4 lanes side by side with 8 numbers each
STEP = DEPTH * WARPS
LOADS = 8  # of 16 bytes that a lane has under way: 8 pieces of one row, or 4 of each of two rows
ROWS_MAX = 8
SMALL_TILE, TILE = 8, 16  # rows of W
EACH = 6  # elements of a row of x that a thread normalises
D_MODEL_MAX = THREADS * EACH
TWO_BLOCKS = (THREADS, 2)  # on a multiprocessor, which leaves a thread 85 registers
BLOCKS_MAX = 264  # 2 on each of 132 multiprocessors: more would only take turns
BLOCKS_WANTED = 132


def gemv_tile(N):
    """Rows of W that a block takes at a time: 16, or 8 if there would be too few blocks. Raises ValueError if N < 1."""
    if N <= 0:
        raise ValueError(f"N = {N}: a launch needs at least 1 row of W")
    return TILE if N >= TILE * BLOCKS_WANTED else SMALL_TILE


def gemv_tensor_launch(N, K, rows=1):
    """Launch configuration of :func:`gemv_v5_tensor_core` and :func:`gemv_bias_residual`: ``(grid, block)``.

    Raises ValueError if a size is not positive, K not a multiple of 8, or rows more than 8.
    """
    if N <= 0 or K <= 0:
        raise ValueError(f"W has shape ({N}, {K}): a launch needs at least 1 row and 1 column")
    if K % 8:
        raise ValueError(f"K = {K}: rows of W must begin at multiples of 16 bytes; pad W and x to a multiple of 8")
    if not 1 <= rows <= ROWS_MAX:
        raise ValueError(f"rows = {rows}: a GEMV takes 1 to {ROWS_MAX} rows of x; for more there is gemm_bias")
    tile = gemv_tile(N)
    return min((N + tile - 1) // tile, BLOCKS_MAX), THREADS


def gemv_ln_launch(N, d_model, rows=1):
    """Launch configuration of the kernels with a layer norm in front: ``(grid, block, stream, shared bytes)``.

    Raises ValueError as :func:`gemv_tensor_launch`, and if d_model is more than 2304.
    """
    grid, block = gemv_tensor_launch(N, d_model, rows)
    if d_model > D_MODEL_MAX:
        raise ValueError(
            f"d_model = {d_model}: a block normalises rows of at most {D_MODEL_MAX}; "
            "normalise with chapter 7's layernorm_row first, and multiply with gemv_v5_tensor_core"
        )
    return grid, block, 0, 2 * rows * d_model


# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit(device=True, forceinline=True)
def load_rows(W, row0, tile, N, K, w):
    """Ask for this lane's first 16-byte pieces of W[row0 : row0 + tile]; 0 outside W.

    W: (N, K) float16. w: (8, 4) uint32, local: with a tile of 8 rows, eight pieces of row row0 + lane // 4; with 16
    rows, four pieces of that row, and four of the row 8 below, in turn. Pieces are 384 columns apart.
    """
    row = row0 + cuda.threadIdx.x % WARP // 4
    first = cuda.threadIdx.x // WARP * DEPTH + cuda.threadIdx.x % 4 * 8
    for j in range(LOADS):
        w[j, 0] = w[j, 1] = w[j, 2] = w[j, 3] = uint32(0)
    if tile == SMALL_TILE:
        for j in range(LOADS):
            if row < N and first + STEP * j < K:
                w[j, 0], w[j, 1], w[j, 2], w[j, 3] = load_half8_once(W, (row, first + STEP * j))
    else:
        for j in range(LOADS):
            below = row + j % 2 * SMALL_TILE
            if below < N and first + STEP * (j // 2) < K:
                w[j, 0], w[j, 1], w[j, 2], w[j, 3] = load_half8_once(W, (below, first + STEP * (j // 2)))


@cuda.jit(device=True, forceinline=True)
def multiply_piece(u0, u1, u2, u3, v0, v1, v2, v3, x0, x1, x2, x3, acc):
    """acc += 32 columns of 16 rows of W, times 8 rows of x. u, v: a lane's piece of W's row, and of that 8 below.

    x0 … x3: its piece of row lane // 4 of x. acc: (4,) float32, local.
    """
    acc[0], acc[1], acc[2], acc[3] = mma_m16n8k16(u0, v0, u1, v1, x0, x1, acc[0], acc[1], acc[2], acc[3])
    acc[0], acc[1], acc[2], acc[3] = mma_m16n8k16(u2, v2, u3, v3, x2, x3, acc[0], acc[1], acc[2], acc[3])


@cuda.jit(device=True, forceinline=True)
def multiply_rows(W, row0, tile, w, x, rows, N, K, sums):
    """sums[warp, r, b] = W[row0 + r] · x[b] over this warp's columns, for the tile's rows and 8 rows of x.

    w: from :func:`load_rows`. x: (rows * K,) float16, flat, in global or shared memory. sums: (12, 16, 8) float32,
    shared. All threads of the block must call it; a barrier has to follow before sums are read.
    """
    acc = cuda.local.array(4, float32)
    xs = cuda.local.array((LOADS, 4), uint32)
    group = cuda.threadIdx.x % WARP // 4
    begin = cuda.threadIdx.x // WARP * DEPTH
    inner = cuda.threadIdx.x % 4 * 8
    zero = uint32(0)
    for j in range(LOADS):  # all loads before the first product
        xs[j, 0] = xs[j, 1] = xs[j, 2] = xs[j, 3] = zero
        if group < rows and begin + STEP * j + inner < K:
            xs[j, 0], xs[j, 1], xs[j, 2], xs[j, 3] = load_half8(x, group * K + begin + STEP * j + inner)
    acc[0] = acc[1] = acc[2] = acc[3] = float32(0)
    if tile == SMALL_TILE:
        for j in range(LOADS):
            if begin + STEP * j < K:  # alike for the whole warp
                multiply_piece(
                    w[j, 0], w[j, 1], w[j, 2], w[j, 3], zero, zero, zero, zero,
                    xs[j, 0], xs[j, 1], xs[j, 2], xs[j, 3], acc,
                )  # fmt: skip
        begin += STEP * LOADS
    else:
        for j in range(LOADS // 2):
            if begin + STEP * j < K:
                multiply_piece(
                    w[2 * j, 0], w[2 * j, 1], w[2 * j, 2], w[2 * j, 3],
                    w[2 * j + 1, 0], w[2 * j + 1, 1], w[2 * j + 1, 2], w[2 * j + 1, 3],
                    xs[j, 0], xs[j, 1], xs[j, 2], xs[j, 3], acc,
                )  # fmt: skip
        begin += STEP * LOADS // 2
    while begin < K:  # of rows longer than w
        row, col = row0 + group, begin + inner
        u0 = u1 = u2 = u3 = v0 = v1 = v2 = v3 = x0 = x1 = x2 = x3 = zero
        if row < N and col < K:
            u0, u1, u2, u3 = load_half8_once(W, (row, col))
        if tile == TILE and row + SMALL_TILE < N and col < K:
            v0, v1, v2, v3 = load_half8_once(W, (row + SMALL_TILE, col))
        if group < rows and col < K:
            x0, x1, x2, x3 = load_half8(x, group * K + col)
        multiply_piece(u0, u1, u2, u3, v0, v1, v2, v3, x0, x1, x2, x3, acc)
        begin += STEP
    warp = cuda.threadIdx.x // WARP
    sums[warp, group, cuda.threadIdx.x % 4 * 2] = acc[0]
    sums[warp, group, cuda.threadIdx.x % 4 * 2 + 1] = acc[1]
    sums[warp, group + SMALL_TILE, cuda.threadIdx.x % 4 * 2] = acc[2]
    sums[warp, group + SMALL_TILE, cuda.threadIdx.x % 4 * 2 + 1] = acc[3]


@cuda.jit(device=True, forceinline=True)
def sum_of_warps(sums):
    """What thread r * 8 + b has to store: the product of row r of the tile and row b of x; 128 threads have one."""
    total = float32(0)
    if cuda.threadIdx.x < TILE * ROWS_MAX:
        for warp in range(WARPS):
            total += sums[warp, cuda.threadIdx.x // ROWS_MAX, cuda.threadIdx.x % ROWS_MAX]
    return total


@cuda.jit(device=True, forceinline=True)
def stores(row0, tile, rows, N):
    """Whether this thread has a result to store (:func:`sum_of_warps`): of a row of the tile, of W, and of x."""
    r, b = cuda.threadIdx.x // ROWS_MAX, cuda.threadIdx.x % ROWS_MAX
    return r < tile and row0 + r < N and b < rows


@cuda.jit(device=True, forceinline=True)
def layernorm_to_shared(x, first, weight, bias, out, rows, d_model, eps, partial):
    """out[b * d_model + c] = layer norm of x[first + b] in float16, for ``rows`` rows; ends in a barrier.

    x: (at least first + rows, d_model) float32. weight, bias: (d_model,) float32. out: flat float16, shared. partial:
    (12, 2) float32, shared. Calls ``griddep_wait`` when it has asked for weight and bias, and before it reads x.

    One reduction instead of two: sum and sum of squares travel together, of the distances to the row's first element.
    Without that shift, squares of a row far from 0 would be large, and their difference nothing but rounding. Loads
    stand apart from what waits for them, and none in a branch, so that all are under way at once.
    """
    values = cuda.local.array(EACH, float32)
    weights = cuda.local.array(EACH, float32)
    biases = cuda.local.array(EACH, float32)
    for j in range(EACH):
        c = min(cuda.threadIdx.x + THREADS * j, d_model - 1)
        weights[j] = weight[c]
        biases[j] = bias[c]
    griddep_wait()
    for b in range(rows):
        shift = x[first + b, 0]
        for j in range(EACH):
            values[j] = x[first + b, min(cuda.threadIdx.x + THREADS * j, d_model - 1)]
        total = float32(0)
        squares = float32(0)
        for j in range(EACH):
            values[j] -= shift
            value = values[j] if cuda.threadIdx.x + THREADS * j < d_model else float32(0)
            total += value
            squares += value * value
        total = warp_sum(total)
        squares = warp_sum(squares)
        if cuda.threadIdx.x % WARP == 0:
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
                out[b * d_model + c] = (values[j] - mean) * scale * weights[j] + biases[j]
        cuda.syncthreads()  # the row is complete, and all have read partial


# --- kernels ---------------------------------------------------------------------------------------------------------


@cuda.jit(launch_bounds=TWO_BLOCKS)
def gemv_v5_tensor_core(x, W, out, rows, N, K, tile):
    """out[b, n] = W[n] · x[b], rung 5: products of 16 x 8 x 16 on tensor cores, for 1 to 8 rows of x.

    x: (rows * K,) float16, flat. W: (N, K) float16. out: (rows, N) float32. All C-contiguous, W and x from a multiple
    of 16 bytes on. rows, N, K: int32; K a multiple of 8. tile: int32, ``gemv_tile(N)``.
    Launch: ``gemv_v5_tensor_core[gemv_tensor_launch(N, K, rows)](…)``, 384 threads; sm_75 or later.
    """
    sums = cuda.shared.array((WARPS, TILE, ROWS_MAX), float32)
    w = cuda.local.array((LOADS, 4), uint32)
    row0 = cuda.blockIdx.x * tile
    griddep_launch()
    load_rows(W, row0, tile, N, K, w)
    griddep_wait()
    while row0 < N:
        multiply_rows(W, row0, tile, w, x, rows, N, K, sums)
        load_rows(W, row0 + cuda.gridDim.x * tile, tile, N, K, w)
        cuda.syncthreads()
        total = sum_of_warps(sums)
        if stores(row0, tile, rows, N):
            out[cuda.threadIdx.x % ROWS_MAX, row0 + cuda.threadIdx.x // ROWS_MAX] = total
        cuda.syncthreads()  # all have read sums
        row0 += cuda.gridDim.x * tile


@cuda.jit(launch_bounds=TWO_BLOCKS)
def gemv_bias_residual(a, W, bias, x, rows, N, K, tile):
    """x[b] += W @ a[b] + bias for 1 to 8 rows: a linear layer that ends in the residual stream.

    a: (rows * K,) float16, flat. W: (N, K) float16. bias: (N,), x: (rows, N) float32. All C-contiguous, a and W from a
    multiple of 16 bytes on. rows, N, K: int32, K a multiple of 8. tile: int32, ``gemv_tile(N)``.
    Launch: ``gemv_bias_residual[gemv_tensor_launch(N, K, rows)](…)``.
    """
    sums = cuda.shared.array((WARPS, TILE, ROWS_MAX), float32)
    w = cuda.local.array((LOADS, 4), uint32)
    r, b = cuda.threadIdx.x // ROWS_MAX, cuda.threadIdx.x % ROWS_MAX
    row0 = cuda.blockIdx.x * tile
    griddep_launch()
    load_rows(W, row0, tile, N, K, w)
    row_bias = bias[min(row0 + r, N - 1)]  # asked for now, it is there when the sum is
    griddep_wait()
    while row0 < N:
        before = x[min(b, rows - 1), min(row0 + r, N - 1)]
        multiply_rows(W, row0, tile, w, a, rows, N, K, sums)
        load_rows(W, row0 + cuda.gridDim.x * tile, tile, N, K, w)
        cuda.syncthreads()
        total = sum_of_warps(sums)
        if stores(row0, tile, rows, N):
            x[b, row0 + r] = before + (total + row_bias)
        cuda.syncthreads()
        row0 += cuda.gridDim.x * tile
        row_bias = bias[min(row0 + r, N - 1)]


@cuda.jit(launch_bounds=TWO_BLOCKS)
def gemv_ln(x, ln_weight, ln_bias, W, bias, out, rows, N, d_model, tile, eps):
    """out[b] = W @ layernorm(x[b]) + bias for 1 to 8 rows, in float16.

    x: (rows, d_model) float32. ln_weight, ln_bias: (d_model,) float32. W: (N, d_model) float16. bias: (N,) float32.
    out: (rows, N) float16. All C-contiguous, W from a multiple of 16 bytes on. rows, N, d_model: int32. tile: int32,
    ``gemv_tile(N)``. eps: float32. Launch: ``gemv_ln[gemv_ln_launch(N, d_model, rows)](…)``.
    """
    x_hat = cuda.shared.array(0, float16, alignment=16)
    sums = cuda.shared.array((WARPS, TILE, ROWS_MAX), float32)
    partial = cuda.shared.array((WARPS, 2), float32)
    w = cuda.local.array((LOADS, 4), uint32)
    r, b = cuda.threadIdx.x // ROWS_MAX, cuda.threadIdx.x % ROWS_MAX
    row0 = cuda.blockIdx.x * tile
    griddep_launch()
    load_rows(W, row0, tile, N, d_model, w)
    row_bias = bias[min(row0 + r, N - 1)]
    layernorm_to_shared(x, 0, ln_weight, ln_bias, x_hat, rows, d_model, eps, partial)
    while row0 < N:
        multiply_rows(W, row0, tile, w, x_hat, rows, N, d_model, sums)
        load_rows(W, row0 + cuda.gridDim.x * tile, tile, N, d_model, w)
        cuda.syncthreads()
        total = sum_of_warps(sums)
        if stores(row0, tile, rows, N):
            out[b, row0 + r] = total + row_bias
        cuda.syncthreads()
        row0 += cuda.gridDim.x * tile
        row_bias = bias[min(row0 + r, N - 1)]


# --- references ------------------------------------------------------------------------------------------------------


def layernorm_half_reference(x, weight, bias, eps):
    """NumPy reference of :func:`layernorm_to_shared`: (rows, d_model) float32; returns float16."""
    x = x.astype(np.float64)
    centred = x - x.mean(axis=1, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps) * weight + bias).astype(np.float16)


def gemv_tensor_reference(x, W):
    """NumPy reference of :func:`gemv_v5_tensor_core`, x as (rows, K): in float64; returns (rows, N) float32."""
    return (x.astype(np.float64) @ W.astype(np.float64).T).astype(np.float32)


def gemv_bias_residual_reference(a, W, bias, x):
    """NumPy reference of :func:`gemv_bias_residual`, a as (rows, K); returns x afterwards, (rows, N) float32."""
    return (x + (a.astype(np.float64) @ W.astype(np.float64).T + bias)).astype(np.float32)


def gemv_ln_reference(x, ln_weight, ln_bias, W, bias, eps):
    """NumPy reference of :func:`gemv_ln`: the layer norm rounded to float16, then float64; (rows, N) float16."""
    hidden = layernorm_half_reference(x, ln_weight, ln_bias, eps).astype(np.float64)
    return (hidden @ W.astype(np.float64).T + bias).astype(np.float16)
