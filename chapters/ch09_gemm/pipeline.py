"""Chapter 9, the tensor cores kept busy: tiles that arrive in the background, and what follows a product fused into it.

In ``gemm_v5_tensor_core`` threads carry each number from global memory to a register to shared memory, and then read it
from there in pieces of 4 bytes; meanwhile the tensor cores wait. Here nobody carries.

=========================  ==================================  ===================================  ===================
kernel                     what it changes                     shared memory bytes read for a       waits for memory
                                                               product of 16 x 8 x 16
=========================  ==================================  ===================================  ===================
``gemm_v5_tensor_core``    (``tensor_core.py``)                192: a warp has 64 x 32 of C         once a tile
``gemm_v6_pipeline``       copies in the background, three     128: a warp has 64 x 64, and 16      only if two tiles
                           tiles deep; ``ldmatrix``            bytes a lane at a time               of 32 are too few
``gemm_bias``              v6 in tiles of 64 x 64, and         256: a warp has 32 x 32              as v6
                           C = A @ B + bias in float16
``gemm_bias_residual``     the same, and x += A @ B + bias     256                                  as v6
=========================  ==================================  ===================================  ===================

From here on B is given transposed, ``Bt`` (N, K): a network's weights can be stored either way, and so the tiles of
both operands are loaded by the same lines, 16 bytes along K at a time. (The product of one row, ``gemv_half.py``, can
be fast with that layout only.) ``Bt`` is what PyTorch calls the weight of a linear layer: (out, in).

**The pipeline.** Shared memory holds three tiles. While the tensor cores work through one, the copies of the next two
are under way; a copy (``cp.async``) passes no register, so two tiles ahead cost nothing but their room.

**The swizzle.** ``ldmatrix`` reads 8 rows of 16 bytes at a time. Rows of 64 bytes begin in two places only, of the 8
that a cycle can serve. So row r keeps its four pieces of 16 bytes in another order, piece c at place c ^ (r // 2 % 4):
then any 8 rows have their piece c in 8 different places. No byte is spent on padding; three tiles take just 48 KiB.

**The epilogue** is the last lines of a kernel, where each sum is still in a register: what a network does with a
product costs nothing there. Those kernels are for prompts, some hundred rows: with tiles of 128 x 128 most of a GPU
would have none, so theirs are a quarter of that.

v6 loses where C is small: 128 x 128 to a block, and a GPU has 100 blocks or more to fill; the others where it is large.
On sm_75 they run without background copies (see ``common.ptx``). Sources: NVIDIA's CUTLASS (swizzle and stages); Kerr
et al. 2020, "Developing CUDA Kernels to Push Tensor Cores to the Absolute Limit on NVIDIA A100".
"""

import numpy as np
from numba import cuda, float32, uint32
from numba.types import float16

from common.ptx import (
    cp_async_commit,
    cp_async_half8,
    cp_async_wait,
    ldmatrix_x4,
    mma_m16n8k16,
    pack_half2,
    store_half2,
    store_half8,
)

from .kernels import TILE, tiles_launch
from .tensor_core import MMA_K, MMA_M, MMA_N, WARP, load_eight

THREADS = 128  # 4 warps, 2 x 2, with a quarter of the block's tile of C each: 64 x 64, or 32 x 32
TWO_BLOCKS = (THREADS, 2)  # 4 warps alone would often all wait; with two blocks a thread has up to 255 registers
SMALL = 64  # side of the tile of the kernels with an epilogue
FIVE_BLOCKS = (THREADS, 5)
STAGES = 3
WAITING = 1  # STAGES - 2: copies of tiles that may still be under way when the oldest is needed
DEPTH = 32
PIECES = 4  # of 16 bytes, in a row of DEPTH float16
ROWS_AT_ONCE = 32  # THREADS // PIECES
M_MMAS, N_MMAS = 4, 8  # products that a warp has side by side of 16 x 8, in a tile of 128 x 128
M_SMALL, N_SMALL = 2, 4  # and of 64 x 64


def gemm_v6_launch(M, N):
    """Launch configuration of :func:`gemm_v6_pipeline`: ``(grid, block)``, 128 threads, a tile of 128 x 128 each block.

    Raises ValueError if a size is not positive, or M is more than 65535 tiles.
    """
    return tiles_launch(M, N, TILE, THREADS)


def gemm_bias_launch(M, N):
    """Launch configuration of the kernels with an epilogue, a tile of 64 x 64 each block; otherwise as that of v6."""
    return tiles_launch(M, N, SMALL, THREADS)


# --- device functions ------------------------------------------------------------------------------------------------
#
# The shapes of the arrays that they are given say how large a tile is, and so how often they loop.


@cuda.jit(device=True, forceinline=True)
def tile_place(row, piece):
    """Where in its row of DEPTH float16 a tile keeps piece ``piece`` (0 … 3) of row ``row``: an element's index."""
    return (piece ^ (row // 2 % PIECES)) * 8


@cuda.jit(device=True, forceinline=True)
def copy_tile(tiles, stage, X, row0, k0, rows, K):
    """Begin to copy X[row0 …, k0 : k0 + 32] of a (rows, K) float16 array to the rows of tiles[stage]; 0 outside.

    Each thread brings 4 pieces of 16 bytes, or 2. Rows of X begin at multiples of 16 bytes only if 8 divides K;
    otherwise the thread loads element by element, and waits.
    """
    piece = cuda.threadIdx.x % PIECES
    first = cuda.threadIdx.x // PIECES
    col = k0 + 8 * piece
    if K % 8 == 0:
        for i in range(0, tiles.shape[1], ROWS_AT_ONCE):
            row = first + i
            inside = row0 + row < rows and col < K
            cp_async_half8(tiles, (stage, row, tile_place(row, piece)), X, (row0 + row, col), inside)
    else:
        for i in range(0, tiles.shape[1], ROWS_AT_ONCE):
            row = first + i
            p0, p1, p2, p3 = load_eight(X, row0 + row, col, rows, K)
            store_half8(tiles, (stage, row, tile_place(row, piece)), p0, p1, p2, p3)


@cuda.jit(device=True, forceinline=True)
def load_operands(a_tiles, b_tiles, now, k, a, b):
    """a, b = the pairs of this warp's rows of both tiles ``now``, columns k … k + 15, as a product wants them.

    a: (4, 4), b: (8, 2) uint32, local; for a tile of 64 x 64 (2, 4) and (4, 2).
    """
    lane = cuda.threadIdx.x % WARP
    warp_row = cuda.threadIdx.x // WARP // 2 * (a_tiles.shape[1] // 2)
    warp_col = cuda.threadIdx.x // WARP % 2 * (b_tiles.shape[1] // 2)
    for m in range(a.shape[0]):
        row = warp_row + m * MMA_M + lane % 16  # the row and the piece that this lane names to ldmatrix
        col = tile_place(row, k // 8 + lane // 16)
        a[m, 0], a[m, 1], a[m, 2], a[m, 3] = ldmatrix_x4(a_tiles, (now, row, col))
    for n in range(0, b.shape[0], 2):
        row = warp_col + n * MMA_N + lane // 16 * 8 + lane % 8
        col = tile_place(row, k // 8 + lane // 8 % 2)
        b[n, 0], b[n, 1], b[n + 1, 0], b[n + 1, 1] = ldmatrix_x4(b_tiles, (now, row, col))


@cuda.jit(device=True, forceinline=True)
def multiply_operands(a, b, acc):
    """acc += the products of 16 x 8 x 16 of what :func:`load_operands` loaded. acc: (4, 8, 4) float32, local."""
    for m in range(acc.shape[0]):
        for n in range(acc.shape[1]):
            acc[m, n, 0], acc[m, n, 1], acc[m, n, 2], acc[m, n, 3] = mma_m16n8k16(
                a[m, 0], a[m, 1], a[m, 2], a[m, 3], b[n, 0], b[n, 1],
                acc[m, n, 0], acc[m, n, 1], acc[m, n, 2], acc[m, n, 3],
            )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def tile_product(A, Bt, a_tiles, b_tiles, a, b, next_a, next_b, acc, M, N, K):
    """acc = this thread's part of A @ Bt.T for the block's tile of C: the whole of v6 but its last lines.

    A: (M, K), Bt: (N, K) float16. a_tiles, b_tiles: (3, 128, 32) float16 in shared memory. acc: (4, 8, 4) float32,
    local, for 4 x 8 products of 16 x 8; :func:`element_row` and :func:`element_col` say where its elements lie in C.
    a, b, next_a, next_b: as :func:`load_operands` has them; what they hold does not matter.
    """
    row0 = cuda.blockIdx.y * a_tiles.shape[1]
    col0 = cuda.blockIdx.x * b_tiles.shape[1]
    for m in range(acc.shape[0]):
        for n in range(acc.shape[1]):
            for e in range(4):
                acc[m, n, e] = float32(0)
    for stage in range(STAGES - 1):
        copy_tile(a_tiles, stage, A, row0, stage * DEPTH, M, K)
        copy_tile(b_tiles, stage, Bt, col0, stage * DEPTH, N, K)
        cp_async_commit()
    now = 0
    free = STAGES - 1
    for k0 in range(0, K, DEPTH):
        cp_async_wait(WAITING)  # my part of tile `now` is there
        cuda.syncthreads()  # everybody's part is, and all have left tile `free`
        next_k = k0 + (STAGES - 1) * DEPTH
        copy_tile(a_tiles, free, A, row0, next_k, M, K)
        copy_tile(b_tiles, free, Bt, col0, next_k, N, K)
        cp_async_commit()
        load_operands(a_tiles, b_tiles, now, 0, a, b)
        load_operands(a_tiles, b_tiles, now, MMA_K, next_a, next_b)
        multiply_operands(a, b, acc)  # while the second operands are on their way
        multiply_operands(next_a, next_b, acc)
        free = now
        now = now + 1 if now < STAGES - 1 else 0


@cuda.jit(device=True, forceinline=True)
def element_row(tile, m, half):
    """The row in C of acc[m, n, 2 * half] and acc[m, n, 2 * half + 1] of :func:`tile_product`, by the tile's side."""
    warp_row = cuda.threadIdx.x // WARP // 2 * (tile // 2)
    return cuda.blockIdx.y * tile + warp_row + m * MMA_M + half * 8 + cuda.threadIdx.x % WARP // 4


@cuda.jit(device=True, forceinline=True)
def element_col(tile, n):
    """The column in C of acc[m, n, 0] and acc[m, n, 2] of :func:`tile_product`; that of 1 and 3 is the next."""
    warp_col = cuda.threadIdx.x // WARP % 2 * (tile // 2)
    return cuda.blockIdx.x * tile + warp_col + n * MMA_N + cuda.threadIdx.x % 4 * 2


@cuda.jit(device=True, forceinline=True)
def store_pair(C, row, col, M, N, low, high):
    """C[row, col], C[row, col + 1] = low, high in float16, as far as they lie in (M, N); ``col`` is even."""
    if row < M:
        if N % 2 == 0:  # rows begin at multiples of 4 bytes
            if col < N:
                store_half2(C, (row, col), pack_half2(low, high))
        else:
            if col < N:
                C[row, col] = low
            if col + 1 < N:
                C[row, col + 1] = high


# --- kernels ---------------------------------------------------------------------------------------------------------


@cuda.jit(launch_bounds=TWO_BLOCKS)
def gemm_v6_pipeline(A, Bt, C, M, N, K):
    """C = A @ Bt.T, rung 6: tiles arrive by background copies, three deep; a warp multiplies 64 x 64 of C.

    A: (M, K), Bt: (N, K) float16, C: (M, N) float32, all C-contiguous; C overlaps neither. M, N, K: int32, at least 1.
    A and Bt begin at a multiple of 16 bytes; K is best a multiple of 8 (else elements are loaded one by one).
    Launch: ``gemm_v6_pipeline[gemm_v6_launch(M, N)](…)``, 128 threads; sm_75 or later.
    """
    a_tiles = cuda.shared.array((STAGES, TILE, DEPTH), float16, alignment=16)
    b_tiles = cuda.shared.array((STAGES, TILE, DEPTH), float16, alignment=16)
    a = cuda.local.array((M_MMAS, 4), uint32)
    b = cuda.local.array((N_MMAS, 2), uint32)
    next_a = cuda.local.array((M_MMAS, 4), uint32)
    next_b = cuda.local.array((N_MMAS, 2), uint32)
    acc = cuda.local.array((M_MMAS, N_MMAS, 4), float32)
    tile_product(A, Bt, a_tiles, b_tiles, a, b, next_a, next_b, acc, M, N, K)
    for m in range(M_MMAS):
        for n in range(N_MMAS):
            for e in range(4):
                row, col = element_row(TILE, m, e // 2), element_col(TILE, n) + e % 2
                if row < M and col < N:
                    C[row, col] = acc[m, n, e]


@cuda.jit(launch_bounds=FIVE_BLOCKS)
def gemm_bias(A, Bt, bias, C, M, N, K):
    """C = A @ Bt.T + bias, rounded to float16: a linear layer whose result feeds another tensor core.

    A: (M, K), Bt: (N, K), C: (M, N) float16. bias: (N,) float32. All else as in :func:`gemm_v6_pipeline`.
    Launch: ``gemm_bias[gemm_bias_launch(M, N)](…)``.
    """
    a_tiles = cuda.shared.array((STAGES, SMALL, DEPTH), float16, alignment=16)
    b_tiles = cuda.shared.array((STAGES, SMALL, DEPTH), float16, alignment=16)
    a = cuda.local.array((M_SMALL, 4), uint32)
    b = cuda.local.array((N_SMALL, 2), uint32)
    next_a = cuda.local.array((M_SMALL, 4), uint32)
    next_b = cuda.local.array((N_SMALL, 2), uint32)
    acc = cuda.local.array((M_SMALL, N_SMALL, 4), float32)
    tile_product(A, Bt, a_tiles, b_tiles, a, b, next_a, next_b, acc, M, N, K)
    for n in range(N_SMALL):
        col = element_col(SMALL, n)
        bias0 = bias[col] if col < N else float32(0)
        bias1 = bias[col + 1] if col + 1 < N else float32(0)
        for m in range(M_SMALL):
            for half in range(2):
                low, high = acc[m, n, 2 * half] + bias0, acc[m, n, 2 * half + 1] + bias1
                store_pair(C, element_row(SMALL, m, half), col, M, N, low, high)


@cuda.jit(launch_bounds=FIVE_BLOCKS)
def gemm_bias_residual(A, Bt, bias, x, M, N, K):
    """x += A @ Bt.T + bias, x in float32: a linear layer that ends in the residual stream.

    A: (M, K), Bt: (N, K) float16. bias: (N,), x: (M, N) float32. All else as in :func:`gemm_v6_pipeline`.
    Launch: ``gemm_bias_residual[gemm_bias_launch(M, N)](…)``.
    """
    a_tiles = cuda.shared.array((STAGES, SMALL, DEPTH), float16, alignment=16)
    b_tiles = cuda.shared.array((STAGES, SMALL, DEPTH), float16, alignment=16)
    a = cuda.local.array((M_SMALL, 4), uint32)
    b = cuda.local.array((N_SMALL, 2), uint32)
    next_a = cuda.local.array((M_SMALL, 4), uint32)
    next_b = cuda.local.array((N_SMALL, 2), uint32)
    acc = cuda.local.array((M_SMALL, N_SMALL, 4), float32)
    tile_product(A, Bt, a_tiles, b_tiles, a, b, next_a, next_b, acc, M, N, K)
    for m in range(M_SMALL):
        for n in range(N_SMALL):
            for e in range(4):
                row, col = element_row(SMALL, m, e // 2), element_col(SMALL, n) + e % 2
                if row < M and col < N:
                    x[row, col] += acc[m, n, e] + bias[col]


# --- references ------------------------------------------------------------------------------------------------------


def gemm_v6_reference(A, Bt):
    """NumPy reference of :func:`gemm_v6_pipeline`: (M, K) and (N, K) float16, in float64; (M, N) float32."""
    return (A.astype(np.float64) @ Bt.astype(np.float64).T).astype(np.float32)


def gemm_bias_reference(A, Bt, bias):
    """NumPy reference of :func:`gemm_bias`: float16 operands, (N,) float32 bias; returns (M, N) float16."""
    return (A.astype(np.float64) @ Bt.astype(np.float64).T + bias).astype(np.float16)


def gemm_bias_residual_reference(A, Bt, bias, x):
    """NumPy reference of :func:`gemm_bias_residual`: returns x afterwards, (M, N) float32, a new array."""
    return (x + (A.astype(np.float64) @ Bt.astype(np.float64).T + bias)).astype(np.float32)
