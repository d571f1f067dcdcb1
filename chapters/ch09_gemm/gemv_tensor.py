"""Chapter 9, matrix times vector on tensor cores, for 1 to 8 rows of x: not for their speed, but to have no work left.

A GPU reads 2 bytes of W and has to take them apart, convert and multiply them: in ``gemv_v4_half`` some 20 instructions
for each load of 16 bytes. A tensor core takes the same 16 bytes as they are. Its product is 16 x 8 x 16, rows of W by
rows of x: seven eighths of it are thrown away when x has one row, and up to eight rows cost nothing more.

==========================  =====================================================  ===================================
kernel                      what it changes                                        instructions for 16 bytes of W
==========================  =====================================================  ===================================
``gemv_v4_half``            (``gemv_half.py``)                                     about 20, for one row of x
``gemv_v5_tensor_core``     8 or 16 rows of W a block, whose 8 warps share K;      about 3, for 1 to 8 rows of x
                            weights wait in shared memory
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
and W alone and is the same in every run. Sources: as ``gemv_half.py``; for the layer norm, see ``normalise_x``.
"""

import numpy as np
from numba import cuda, float32, uint32
from numba.cuda import libdevice
from numba.types import float16

from common.ptx import (
    cp_async_commit,
    cp_async_float4,
    cp_async_half8,
    cp_async_wait,
    griddep_launch,
    griddep_wait,
    load_float4,
    load_half8,
    mma_m16n8k16,
    pack_half2,
    store_half2,
)

from ..ch07_warp_reduce.kernels import WARP, warp_sum

WARPS = 8
THREADS = WARPS * WARP
DEPTH = 32  # columns of W that a warp multiplies at a time: 4 lanes side by side with 8 numbers each
ROWS_MAX = 8
SMALL_TILE, TILE = 8, 16  # rows of W
EACH = 2  # groups of 4 elements of a row of x that a thread normalises
D_MODEL_MAX = THREADS * 4 * EACH
BLOCKS_WANTED = 132
# Room for 4 blocks on a multiprocessor, and so 64 registers a thread: the blocks of kernels that wait for their turn
# stand there beside those at work, with their weights already there.
FOUR_BLOCKS = (THREADS, 4)
BLOCKS_MAX = 396  # 3 on each of 132 multiprocessors: more would only take turns
SHARED_MAX = 160 * 1024  # what a block can have on a GPU with background copies, nearly


def gemv_tile(N):
    """Rows of W that a block takes at a time: 16, or 8 if there would be too few blocks. Raises ValueError if N < 1."""
    if N <= 0:
        raise ValueError(f"N = {N}: a launch needs at least 1 row of W")
    return TILE if N >= TILE * BLOCKS_WANTED else SMALL_TILE


def gemv_tensor_launch(N, K, rows=1):
    """Launch configuration of :func:`gemv_v5_tensor_core`: ``(grid, block, stream, shared bytes)``.

    At most 396 blocks, which take tiles of W in turn. Raises ValueError if a size is not positive, K not a multiple of
    8 or too large for shared memory, or rows more than 8.
    """
    tiles = _tiles(N, K, rows)
    return _launch(min(tiles, BLOCKS_MAX), 2 if tiles > BLOCKS_MAX else 1, N, K, rows)


def gemv_block_launch(N, K, rows=1):
    """Launch configuration of :func:`gemv_bias_residual`, a block for each tile of W; otherwise as that of v5."""
    return _launch(_tiles(N, K, rows), 1, N, K, rows)


def gemv_ln_launch(N, d_model, rows=1):
    """Launch configuration of the kernels with a layer norm in front, a block for each tile of W.

    Raises ValueError as :func:`gemv_tensor_launch`, and if d_model is more than 2048.
    """
    return _with_norm(gemv_block_launch(N, d_model, rows), d_model)


def gemv_ln_tensor_launch(N, d_model, rows=1):
    """Launch configuration of a kernel with a layer norm whose blocks take tiles in turn, for a W of many rows."""
    return _with_norm(gemv_tensor_launch(N, d_model, rows), d_model)


def _tiles(N, K, rows):
    if N <= 0 or K <= 0:
        raise ValueError(f"W has shape ({N}, {K}): a launch needs at least 1 row and 1 column")
    if K % 8:
        raise ValueError(f"K = {K}: rows of W must begin at multiples of 16 bytes; pad W and x to a multiple of 8")
    if not 1 <= rows <= ROWS_MAX:
        raise ValueError(f"rows = {rows}: a GEMV takes 1 to {ROWS_MAX} rows of x; for more there is gemm_bias")
    return (N + gemv_tile(N) - 1) // gemv_tile(N)


def _launch(blocks, stages, N, K, rows):
    padded = padded_depth.py_func(K)
    n_bytes = 2 * stages * gemv_tile(N) * padded + 2 * rows * (padded + 8)
    if n_bytes > SHARED_MAX:
        raise ValueError(
            f"K = {K}, rows = {rows}: tiles of W and rows of x take {n_bytes} bytes of shared memory, of {SHARED_MAX}; "
            "multiply with gemv_v4_half, row by row"
        )
    return blocks, THREADS, 0, n_bytes


def _with_norm(launch, d_model):
    grid, block, stream, n_bytes = launch
    if d_model > D_MODEL_MAX:
        raise ValueError(
            f"d_model = {d_model}: a block normalises rows of at most {D_MODEL_MAX}; "
            "normalise with chapter 7's layernorm_row first, and multiply with gemv_v5_tensor_core"
        )
    return grid, block, stream, n_bytes + 8 * d_model


# --- device functions ------------------------------------------------------------------------------------------------
#
# Dynamic shared memory, in float16: one tile of W, or two where a block has several in turn; rows of x, 8 longer than
# their numbers, so that they begin in different banks; and behind them, in float32, weight and bias of the layer norm.


@cuda.jit(device=True, forceinline=True)
def padded_depth(K):
    """K rounded up to whole steps of 32 columns; what lies behind K is 0 in both operands."""
    return (K + DEPTH - 1) // DEPTH * DEPTH


@cuda.jit(device=True, forceinline=True)
def copy_weights(shared, stage, W, row0, tile, N, K):
    """Begin to copy W[row0 : row0 + tile] to tile number ``stage`` of shared memory, and commit; 0 outside W.

    W: (N, K) float16. A step of 32 columns of all rows lies together there, so that a warp reads it without conflicts.
    """
    at = stage * tile * padded_depth(K)
    row = cuda.threadIdx.x // WARP
    while row < tile:
        col = cuda.threadIdx.x % WARP * 8
        while col < padded_depth(K):
            place = at + (col // DEPTH * tile + row) * DEPTH + col % DEPTH
            cp_async_half8(shared, place, W, (row0 + row, col), row0 + row < N and col < K)
            col += WARP * 8
        row += WARPS
    cp_async_commit()


@cuda.jit(device=True, forceinline=True)
def copy_x(shared, at, x, rows, K):
    """Begin to copy rows of x to shared[at …], and commit. x: (rows * K,) float16, flat."""
    for row in range(rows):
        col = cuda.threadIdx.x * 8
        while col < padded_depth(K):
            cp_async_half8(shared, at + row * (padded_depth(K) + 8) + col, x, row * K + col, col < K)
            col += THREADS * 8
    cp_async_commit()


@cuda.jit(device=True, forceinline=True)
def copy_norm(norm, at, weight, bias, d_model):
    """Begin to copy weight and bias of the layer norm to norm[at …], and commit: a thread those that it will need."""
    for j in range(EACH):
        c = 4 * (cuda.threadIdx.x + THREADS * j)
        if c < d_model:
            cp_async_float4(norm, at + c, weight, c, True)
            cp_async_float4(norm, at + d_model + c, bias, c, True)
    cp_async_commit()


@cuda.jit(device=True, forceinline=True)
def normalise_x(x, first, norm, norm_at, shared, at, rows, d_model, eps, partial):
    """shared[at …] = layer norm of x[first + b] in float16, for ``rows`` rows, as :func:`copy_x` lays them out.

    x: (at least first + rows, d_model) float32. norm: from :func:`copy_norm`, the copies of which may still be under
    way, but no more than one group behind them. partial: (8, 2) float32, shared. A barrier has to follow. Calls
    ``griddep_wait`` before it reads x.

    One reduction instead of two: sum and sum of squares travel together, of the distances to the row's first element.
    Without that shift it would be the one pass that chapter 7 warns of: squares of a row far from 0 are large, and
    their difference is nothing but rounding. With it, only a first element far from all others costs digits, and
    float16, into which the row goes, keeps few of them anyway.
    """
    v = cuda.local.array((EACH, 4), float32)
    share = float32(1) / float32(d_model)
    griddep_wait()
    for b in range(rows):
        shift = x[first + b, 0]
        total = float32(0)
        squares = float32(0)
        for j in range(EACH):  # asked for all at once: nothing here waits for `shift`
            c = 4 * (cuda.threadIdx.x + THREADS * j)
            if c < d_model:
                v[j, 0], v[j, 1], v[j, 2], v[j, 3] = load_float4(x, (first + b, c))
        for j in range(EACH):
            if 4 * (cuda.threadIdx.x + THREADS * j) < d_model:
                for e in range(4):
                    v[j, e] -= shift
                    total += v[j, e]
                    squares += v[j, e] * v[j, e]
        total = warp_sum(total)
        squares = warp_sum(squares)
        if b > 0:
            cuda.syncthreads()  # all have read partial
        if cuda.threadIdx.x % WARP == 0:
            partial[cuda.threadIdx.x // WARP, 0] = total
            partial[cuda.threadIdx.x // WARP, 1] = squares
        cuda.syncthreads()
        total = float32(0)
        squares = float32(0)
        for warp in range(WARPS):
            total += partial[warp, 0]
            squares += partial[warp, 1]
        mean = total * share
        variance = max(squares * share - mean * mean, float32(0))
        scale = libdevice.rsqrtf(variance + float32(eps))
        cp_async_wait(1)
        for j in range(EACH):
            c = 4 * (cuda.threadIdx.x + THREADS * j)
            place = at + b * (padded_depth(d_model) + 8) + c
            if c < d_model:
                w0, w1, w2, w3 = load_float4(norm, norm_at + c)
                b0, b1, b2, b3 = load_float4(norm, norm_at + d_model + c)
                low = pack_half2((v[j, 0] - mean) * scale * w0 + b0, (v[j, 1] - mean) * scale * w1 + b1)
                high = pack_half2((v[j, 2] - mean) * scale * w2 + b2, (v[j, 3] - mean) * scale * w3 + b3)
                store_half2(shared, place, low)
                store_half2(shared, place + 2, high)
            elif c < padded_depth(d_model):
                store_half2(shared, place, uint32(0))
                store_half2(shared, place + 2, uint32(0))


@cuda.jit(device=True, forceinline=True)
def multiply_tile(shared, stage, at, tile, rows, K, sums):
    """sums[warp, r, b] = this warp's share of W[row0 + r] · x[b], for the tile's rows and 8 rows of x.

    shared: W's tile number ``stage``, and x at ``at``. sums: (8, 16, 8) float32, shared. A barrier has to follow.
    """
    group = cuda.threadIdx.x % WARP // 4
    inner = cuda.threadIdx.x % 4 * 8
    warp = cuda.threadIdx.x // WARP
    place = (stage * tile * padded_depth(K) + warp * tile * DEPTH) + group * DEPTH + inner
    x_row = min(group, rows - 1)  # rows too many are multiplied all the same: nobody stores what comes of it
    x_place = at + x_row * (padded_depth(K) + 8) + warp * DEPTH + inner
    lower = (tile - SMALL_TILE) * DEPTH  # 8 rows further down, or with a tile of 8 rows the same again, for nobody
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = float32(0)
    k = warp * DEPTH
    while k < K:
        u0, u1, u2, u3 = load_half8(shared, place)
        v0, v1, v2, v3 = load_half8(shared, place + lower)
        x0, x1, x2, x3 = load_half8(shared, x_place)
        c0, c1, c2, c3 = mma_m16n8k16(u0, v0, u1, v1, x0, x1, c0, c1, c2, c3)
        d0, d1, d2, d3 = mma_m16n8k16(u2, v2, u3, v3, x2, x3, d0, d1, d2, d3)  # waits for nobody
        place += WARPS * tile * DEPTH
        x_place += WARPS * DEPTH
        k += WARPS * DEPTH
    sums[warp, group, cuda.threadIdx.x % 4 * 2] = c0 + d0
    sums[warp, group, cuda.threadIdx.x % 4 * 2 + 1] = c1 + d1
    sums[warp, group + SMALL_TILE, cuda.threadIdx.x % 4 * 2] = c2 + d2
    sums[warp, group + SMALL_TILE, cuda.threadIdx.x % 4 * 2 + 1] = c3 + d3


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
def tile_total(shared, stage, at, tile, rows, K, sums):
    """The tile in ``stage`` times x, once both are there; what :func:`sum_of_warps` says. Copies must have arrived."""
    cuda.syncthreads()  # W's tile and x are complete, and all have read sums
    multiply_tile(shared, stage, at, tile, rows, K, sums)
    cuda.syncthreads()
    return sum_of_warps(sums)


@cuda.jit(device=True, forceinline=True)
def next_total(shared, stage, at, W, row0, tile, rows, N, K, sums):
    """:func:`tile_total` while the block's next tile is on its way to the other stage."""
    following = row0 + cuda.gridDim.x * tile
    if following < N:
        copy_weights(shared, 1 - stage, W, following, tile, N, K)
        cp_async_wait(1)
    else:
        cp_async_wait(0)
    return tile_total(shared, stage, at, tile, rows, K, sums)


@cuda.jit(device=True, forceinline=True)
def place_of_x(tile, N, K):
    """Where in shared memory x begins: behind one tile of W, or two if the block has several."""
    return tile * padded_depth(K) * (2 if cuda.gridDim.x * tile < N else 1)


# --- kernels ---------------------------------------------------------------------------------------------------------


@cuda.jit(launch_bounds=FOUR_BLOCKS)
def gemv_v5_tensor_core(x, W, out, rows, N, K, tile):
    """out[b, n] = W[n] · x[b], rung 5: products of 16 x 8 x 16 on tensor cores, for 1 to 8 rows of x.

    x: (rows * K,) float16, flat. W: (N, K) float16. out: (rows, N) float32. All C-contiguous, W and x from a multiple
    of 16 bytes on. rows, N, K: int32; K a multiple of 8. tile: int32, ``gemv_tile(N)``.
    Launch: ``gemv_v5_tensor_core[gemv_tensor_launch(N, K, rows)](…)``, 256 threads; sm_75 or later.
    """
    shared = cuda.shared.array(0, float16, alignment=16)
    sums = cuda.shared.array((WARPS, TILE, ROWS_MAX), float32)
    r, b = cuda.threadIdx.x // ROWS_MAX, cuda.threadIdx.x % ROWS_MAX
    row0 = cuda.blockIdx.x * tile
    at = place_of_x(tile, N, K)
    stage = 0
    griddep_launch()
    copy_weights(shared, stage, W, row0, tile, N, K)
    griddep_wait()
    copy_x(shared, at, x, rows, K)
    while row0 < N:
        total = next_total(shared, stage, at, W, row0, tile, rows, N, K, sums)
        if stores(row0, tile, rows, N):
            out[b, row0 + r] = total
        row0 += cuda.gridDim.x * tile
        stage = 1 - stage


@cuda.jit(launch_bounds=FOUR_BLOCKS)
def gemv_bias_residual(a, W, bias, x, rows, N, K, tile):
    """x[b] += W @ a[b] + bias for 1 to 8 rows: a linear layer that ends in the residual stream.

    a: (rows * K,) float16, flat. W: (N, K) float16. bias: (N,), x: (rows, N) float32. All C-contiguous, a and W from a
    multiple of 16 bytes on. rows, N, K: int32, K a multiple of 8. tile: int32, ``gemv_tile(N)``.
    Launch: ``gemv_bias_residual[gemv_block_launch(N, K, rows)](…)``.
    """
    shared = cuda.shared.array(0, float16, alignment=16)
    sums = cuda.shared.array((WARPS, TILE, ROWS_MAX), float32)
    r, b = cuda.threadIdx.x // ROWS_MAX, cuda.threadIdx.x % ROWS_MAX
    row0 = cuda.blockIdx.x * tile
    at = tile * padded_depth(K)
    griddep_launch()
    copy_weights(shared, 0, W, row0, tile, N, K)
    row_bias = bias[min(row0 + r, N - 1)]  # asked for now, it is there when the sum is
    griddep_wait()
    copy_x(shared, at, a, rows, K)
    before = x[b, row0 + r] if stores(row0, tile, rows, N) else float32(0)
    cp_async_wait(0)
    total = tile_total(shared, 0, at, tile, rows, K, sums)
    if stores(row0, tile, rows, N):
        x[b, row0 + r] = before + (total + row_bias)


@cuda.jit(launch_bounds=FOUR_BLOCKS)
def gemv_ln(x, ln_weight, ln_bias, W, bias, out, rows, N, d_model, tile, eps):
    """out[b] = W @ layernorm(x[b]) + bias for 1 to 8 rows, in float16.

    x: (rows, d_model) float32. ln_weight, ln_bias: (d_model,) float32. W: (N, d_model) float16. bias: (N,) float32.
    out: (rows, N) float16. All C-contiguous, from a multiple of 16 bytes on. rows, N, d_model: int32. tile: int32,
    ``gemv_tile(N)``. eps: float32. Launch: ``gemv_ln[gemv_ln_launch(N, d_model, rows)](…)``.
    """
    shared = cuda.shared.array(0, float16, alignment=16)
    norm = cuda.shared.array(0, float32, alignment=16)
    sums = cuda.shared.array((WARPS, TILE, ROWS_MAX), float32)
    partial = cuda.shared.array((WARPS, 2), float32)
    r, b = cuda.threadIdx.x // ROWS_MAX, cuda.threadIdx.x % ROWS_MAX
    row0 = cuda.blockIdx.x * tile
    at = tile * padded_depth(d_model)
    norm_at = (at + rows * (padded_depth(d_model) + 8)) // 2
    griddep_launch()
    copy_norm(norm, norm_at, ln_weight, ln_bias, d_model)
    copy_weights(shared, 0, W, row0, tile, N, d_model)
    row_bias = bias[min(row0 + r, N - 1)]
    normalise_x(x, 0, norm, norm_at, shared, at, rows, d_model, eps, partial)
    cp_async_wait(0)
    total = tile_total(shared, 0, at, tile, rows, d_model, sums)
    if stores(row0, tile, rows, N):
        out[b, row0 + r] = total + row_bias


# --- references ------------------------------------------------------------------------------------------------------


def layernorm_half_reference(x, weight, bias, eps):
    """NumPy reference of :func:`normalise_x`: (rows, d_model) float32; returns float16."""
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
