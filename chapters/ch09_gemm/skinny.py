"""Chapter 9, products of some dozen rows: a batch of sequences, the newest token of each, and a network's weights.

C = A @ Bt.T has few rows now, and Bt, (N, K), is the size it is for one row or a thousand. The weights of GPT-2's
layers are 1 to 5 MB; an H200 reads them in 0.3 to 1.2 µs, and ``gemm_bias``, with tiles that fill a GPU at a thousand
rows, takes 12 to 39. Neither its arithmetic nor its bytes need that time: it waits.

=========================  ==========================================  ================================================
kernel                     what it changes                             when it loses
=========================  ==========================================  ================================================
``gemm_bias``              (``pipeline.py``) tiles of 64 x 64, 12      up to some hundred rows: 24 blocks for 128 rows
                           blocks for N = 768 and 64 rows; two tiles   of 768, and each waits 24 times
                           of 32 columns on their way
``gemm_parts_64``          **K is split too**: blocks along z take a   its parts, float32, are written and read again
                           part each, and leave sums that the next
                           kernel adds; three tiles of 64 columns on
                           their way
``gemm_parts_32``          tiles of 32 x 32: four times the blocks;    above 64 rows, where each byte of a tile is used
                           and 704 columns of weights are asked for    half as often
                           before the kernel's turn has come
=========================  ==========================================  ================================================

**Why waits.** A block multiplies a tile of 64 columns in some 0.3 µs, and new ones take 0.6 µs from memory. What keeps
a GPU busy is bytes on their way: blocks times tiles that each has asked for. 12 blocks of 8 KB tiles, two ahead, are
200 KB; memory that answers after 0.6 µs and moves 4 TB/s needs 2.4 MB.

**Splitting K.** With N = 768 there are 24 tiles of 32 columns, and no more. Eight blocks that share K bring 192. Each
leaves its sums in ``parts``; someone has to add them, and the residual stream is read anyway by the norm that comes
next (chapter 13's ``parts_norm``). The parts are added in one order, so the result is the same in every run; and if
their number depends on N and K alone (:func:`parts_of`), a row's result does not depend on how many rows there are.

**Weights are there already.** A depends on the kernel in front, Bt on nothing. Launched as dependent (see
``gemv_half.py``), a block asks for as much of Bt as it has room for, and then waits: so the two matrices have rings of
their own in shared memory.

**One barrier a tile.** Copies of the tile after next begin when all warps have left the one before: four tiles of room
for three on their way. Rows of 64 float16 are 128 bytes, all of the banks; piece c of row r lies at place c ^ (r % 8).

Sources: as ``pipeline.py``; NVIDIA's CUTLASS, "split-K"; Osama et al. 2023, "Stream-K".
"""

import numpy as np
from numba import cuda, float32, int32, uint32
from numba.types import float16

from common.ptx import (
    cp_async_commit,
    cp_async_half8,
    cp_async_wait,
    griddep_launch,
    griddep_wait,
    ldmatrix_x4,
    store_float2,
)

from .kernels import GRID_ROWS
from .pipeline import multiply_operands
from .tensor_core import MMA_K, MMA_M, MMA_N, WARP

THREADS = 128  # 4 warps, 2 x 2, with a quarter of the block's tile of C each
DEPTH = 64  # columns of A and Bt in shared memory at a time: rows of 128 bytes
PIECES = DEPTH // 8  # of 16 bytes, in a row
ROWS_AT_ONCE = THREADS // PIECES
STAGES = 4
WAITING = STAGES - 2  # copies of tiles that may still be under way when the oldest is needed
SMALL, LARGE = 32, 64  # sides of the tiles
SMALL_ROWS = 64  # up to so many rows, small ones are faster
SMALL_STAGES, LARGE_STAGES = 12, 4  # tiles of Bt that there is room for, in the 64 KiB that a block can have on sm_75
THREE_BLOCKS = (THREADS, 3)  # on a multiprocessor, with 64 KiB of shared memory each
PARTS_MAX = 8
BLOCKS = 192  # more than multiprocessors on any GPU of today
FEW_ROWS = 512  # up to so many, twice as many blocks: more of the weights is asked for at a time, and parts are small
PART_COLUMNS = (192, 1536)  # a part of K has so many at least, and so many at most


def tile_of(rows, small_rows=SMALL_ROWS):
    """Side of the tile for so many rows: 32 up to ``small_rows``, else 64."""
    return SMALL if rows <= small_rows else LARGE


def parts_of(N, K, rows=1):
    """Parts of K, 1 to 8: no longer than 1536 columns, and as many as it takes to have a block for each multiprocessor,
    or two of them for up to 512 rows.

    With rows=1 it depends on N and K alone: the most parts that any number of rows gets.
    Raises ValueError if a size is not positive.
    """
    if N <= 0 or K <= 0 or rows <= 0:
        raise ValueError(f"{rows} rows times ({N}, {K}): a product needs at least 1 of each")
    tile, (least, most) = tile_of(rows), PART_COLUMNS
    blocks, wanted = -(-N // tile) * -(-rows // tile), BLOCKS * (2 if rows <= FEW_ROWS else 1)
    parts = 1
    while parts < PARTS_MAX and K >= 2 * parts * least and (blocks * parts < wanted or K > parts * most):
        parts *= 2
    return parts


def skinny_launch(M, N, tile, parts=1):
    """Launch configuration of the kernels with such a tile, of 32 or 64 rows: ``(grid, block, stream, shared bytes)``.

    Tiles lie with A's rows along x, so that those which need the same weights run at the same time. Raises ValueError
    if a size is not positive, parts not from 1 to 8, or N is more than 65535 tiles.
    """
    if M <= 0 or N <= 0:
        raise ValueError(f"shape ({M}, {N}): a product needs at least 1 row and 1 column")
    if not 1 <= parts <= PARTS_MAX:
        raise ValueError(f"parts = {parts} is not from 1 to {PARTS_MAX}; let parts_of choose it")
    if N > GRID_ROWS * tile:
        raise ValueError(
            f"N = {N}: a grid has at most {GRID_ROWS} tiles of {tile} columns; launch once for each part of Bt's rows"
        )
    grid = (M + tile - 1) // tile, (N + tile - 1) // tile, parts
    stages = STAGES + (SMALL_STAGES if tile == SMALL else LARGE_STAGES)
    return grid, THREADS, 0, 2 * stages * tile * DEPTH


# --- device functions ------------------------------------------------------------------------------------------------
#
# Shared memory holds a ring of tiles of A, and one of tiles of Bt. ``acc`` says by its shape how large they are:
# (1, 2, 4) for 32 x 32, (2, 4, 4) for 64 x 64: products of 16 x 8 that a warp has below and beside each other.


@cuda.jit(device=True, forceinline=True)
def piece_place(row, piece):
    """Where in a tile piece ``piece`` (0 … 7) of row ``row`` is: an element's index."""
    return row * DEPTH + (piece ^ row % PIECES) * 8


@cuda.jit(device=True, forceinline=True)
def copy_panel(tiles, at, X, row0, n_rows, k0, rows, end):
    """Begin to copy X[row0 : row0 + n_rows, k0 : k0 + 64] of a float16 array with ``rows`` rows to tiles[at …].

    0 from row ``rows`` and from column ``end`` on, which is a multiple of 8.
    """
    piece = cuda.threadIdx.x % PIECES
    first = cuda.threadIdx.x // PIECES
    col = k0 + 8 * piece
    for i in range(0, n_rows, ROWS_AT_ONCE):
        row = first + i
        inside = row0 + row < rows and col < end
        cp_async_half8(tiles, at + piece_place(row, piece), X, (row0 + row, col), inside)


@cuda.jit(device=True, forceinline=True)
def load_fragments(tiles, a_at, b_at, k, a, b):
    """a, b = the pairs of this warp's rows of the tiles that begin at a_at and b_at, columns k … k + 15. a: (m, 4), b:
    (n, 2) uint32, local, for m x n products."""
    lane = cuda.threadIdx.x % WARP
    warp_row = cuda.threadIdx.x // WARP // 2 * MMA_M * a.shape[0]
    warp_col = cuda.threadIdx.x // WARP % 2 * MMA_N * b.shape[0]
    for m in range(a.shape[0]):
        row = warp_row + m * MMA_M + lane % 16  # the row and the piece that this lane names to ldmatrix
        a[m, 0], a[m, 1], a[m, 2], a[m, 3] = ldmatrix_x4(tiles, a_at + piece_place(row, k // 8 + lane // 16))
    for n in range(0, b.shape[0], 2):
        row = warp_col + n * MMA_N + lane // 16 * 8 + lane % 8
        piece = k // 8 + lane // 8 % 2
        b[n, 0], b[n, 1], b[n + 1, 0], b[n + 1, 1] = ldmatrix_x4(tiles, b_at + piece_place(row, piece))


@cuda.jit(device=True, forceinline=True)
def multiply_columns(A, Bt, tiles, a, b, acc, M, N, begin, end, b_stages):
    """acc = this thread's part of A @ Bt.T for the block's tile of C, over columns begin … end - 1 of both.

    A: (M, K), Bt: (N, K) float16, end a multiple of 8. A is not read before the kernel in front has ended; b_stages - 1
    tiles of Bt are. a, b, acc: see above; what they hold does not matter. Where its elements lie: :func:`tile_row`,
    :func:`tile_col`.
    """
    a_rows, b_rows = 2 * MMA_M * acc.shape[0], 2 * MMA_N * acc.shape[1]
    a_size, b_size = a_rows * DEPTH, b_rows * DEPTH
    a_end, b_end = STAGES * a_size, STAGES * a_size + b_stages * b_size
    row0, col0 = cuda.blockIdx.x * a_rows, cuda.blockIdx.y * b_rows
    for m in range(acc.shape[0]):
        for n in range(acc.shape[1]):
            for e in range(4):
                acc[m, n, e] = float32(0)
    for stage in range(b_stages - 1):
        if begin + stage * DEPTH < end:
            copy_panel(tiles, a_end + stage * b_size, Bt, col0, b_rows, begin + stage * DEPTH, N, end)
    griddep_wait()
    for stage in range(STAGES - 1):
        copy_panel(tiles, stage * a_size, A, row0, a_rows, begin + stage * DEPTH, M, end)
        cp_async_commit()
    a_now, a_free = 0, a_end - a_size
    b_now, b_free = a_end, b_end - b_size
    k0 = begin
    while k0 < end:
        cp_async_wait(WAITING)  # my part of this A tile, and of the older copies of Bt, is there
        cuda.syncthreads()  # everybody's part is, and all have left the tiles before
        a_next, b_next = k0 + (STAGES - 1) * DEPTH, k0 + (b_stages - 1) * DEPTH
        if a_next < end:
            copy_panel(tiles, a_free, A, row0, a_rows, a_next, M, end)
        if b_next < end:
            copy_panel(tiles, b_free, Bt, col0, b_rows, b_next, N, end)
        cp_async_commit()
        for k in range(0, DEPTH, MMA_K):
            load_fragments(tiles, a_now, b_now, k, a, b)
            multiply_operands(a, b, acc)
        a_free, b_free = a_now, b_now
        a_now = a_now + a_size if a_now < a_end - a_size else 0
        b_now = b_now + b_size if b_now < b_end - b_size else a_end
        k0 += DEPTH
    cp_async_wait(0)


@cuda.jit(device=True, forceinline=True)
def tile_row(acc, m, half):
    """The row in C of acc[m, n, 2 * half] and acc[m, n, 2 * half + 1]."""
    first = (cuda.blockIdx.x * 2 + cuda.threadIdx.x // WARP // 2) * acc.shape[0] + m
    return int32(first * MMA_M + half * 8 + cuda.threadIdx.x % WARP // 4)


@cuda.jit(device=True, forceinline=True)
def tile_col(acc, n):
    """The column in C of acc[m, n, 0] and acc[m, n, 2], an even one; that of 1 and 3 is the next."""
    first = (cuda.blockIdx.y * 2 + cuda.threadIdx.x // WARP % 2) * acc.shape[1] + n
    return int32(first * MMA_N + cuda.threadIdx.x % 4 * 2)


@cuda.jit(device=True, forceinline=True)
def multiply_part(A, Bt, tiles, a, b, acc, parts, M, N, K, b_stages):
    """The whole of ``gemm_parts``: blockIdx.z's share of K, and its sums to ``parts``."""
    M, N, K = int32(M), int32(N), int32(K)
    share = (K + DEPTH * cuda.gridDim.z - 1) // (DEPTH * cuda.gridDim.z) * DEPTH
    begin = int32(cuda.blockIdx.z * share)
    griddep_launch()
    multiply_columns(A, Bt, tiles, a, b, acc, M, N, begin, min(begin + share, K), b_stages)
    for m in range(acc.shape[0]):
        for half in range(2):
            row = tile_row(acc, m, half)
            if row < M:
                for n in range(acc.shape[1]):
                    col = tile_col(acc, n)
                    if col < N:
                        place = (cuda.blockIdx.z * M + row) * N + col
                        store_float2(parts, place, acc[m, n, 2 * half], acc[m, n, 2 * half + 1])


# --- kernels ---------------------------------------------------------------------------------------------------------


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemm_parts_32(A, Bt, parts, M, N, K):
    """parts[z] = A @ Bt.T over part z of K: the sums that make up C, tiles of 32 x 32.

    A: (M, K), Bt: (N, K) float16. parts: float32, flat, gridDim.z times M * N, which together are below 2**31; a part
    may be empty, its sums are 0. All C-contiguous, from a multiple of 16 bytes on. M, N, K: int32, at least 1, N and K
    multiples of 8. In a graph of dependent launches, the kernel in front may write A, none may write Bt.
    Launch: ``gemm_parts_32[skinny_launch(M, N, 32, parts_of(N, K, M))](…)``, 128 threads; sm_75 or later.
    """
    tiles = cuda.shared.array(0, float16)
    a = cuda.local.array((1, 4), uint32)
    b = cuda.local.array((2, 2), uint32)
    acc = cuda.local.array((1, 2, 4), float32)
    multiply_part(A, Bt, tiles, a, b, acc, parts, M, N, K, SMALL_STAGES)


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemm_parts_64(A, Bt, parts, M, N, K):
    """:func:`gemm_parts_32` in tiles of 64 x 64: each number of A and Bt that is copied is used twice as often.

    The same sums, bit by bit. Launch: ``gemm_parts_64[skinny_launch(M, N, 64, parts_of(N, K, M))](…)``, 128 threads.
    """
    tiles = cuda.shared.array(0, float16)
    a = cuda.local.array((2, 4), uint32)
    b = cuda.local.array((4, 2), uint32)
    acc = cuda.local.array((2, 4, 4), float32)
    multiply_part(A, Bt, tiles, a, b, acc, parts, M, N, K, LARGE_STAGES)


def gemm_parts(tile):
    """The kernel with such a tile: 32 or 64, of :func:`tile_of`."""
    return gemm_parts_32 if tile == SMALL else gemm_parts_64


# --- reference -------------------------------------------------------------------------------------------------------


def gemm_parts_reference(A, Bt, n_parts):
    """NumPy reference of :func:`gemm_parts`: (n_parts, M, N) float32, each summed in float64."""
    K = A.shape[1]
    share = -(-K // (DEPTH * n_parts)) * DEPTH
    parts = [A[:, at : at + share].astype(np.float64) @ Bt[:, at : at + share].astype(np.float64).T
             for at in range(0, n_parts * share, share)]  # fmt: skip
    return np.array(parts, np.float32)
