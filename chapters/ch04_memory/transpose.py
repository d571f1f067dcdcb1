"""Chapter 4, the transpose: out[c, r] = x[r, c]. Rows become columns, so one side of a plain copy is strided.

========================  ===================================  ======================  ==============================
kernel                    what it changes                      sectors a warp of 32    what it costs
========================  ===================================  ======================  ==============================
``transpose_v1_naive``    one thread an element                4 read, 32 written      7/8 of each sector written is
                                                                                       a neighbour's (the cache helps)
``transpose_v2_tile``     32 x 32 tile in shared memory: read  4 read, 4 written       a barrier; the tile's column
                          row by row, written row by row                               is read 32 banks deep
``transpose_v3_padded``   a 33rd column that nobody uses       4 read, 4 written       128 bytes of shared memory
``transpose_v4_unrolled`` loops of constant length: the        4 read, 4 written       a few registers
                          compiler unrolls them, so that 4
                          loads of a thread are under way
``transpose_v5_float4``   16 bytes a thread, 64 x 64 tile      64 read, 64 written,    sizes must be multiples of 4;
                                                               for 512 floats          2-way bank conflicts
========================  ===================================  ======================  ==============================

Shared memory is spread over 32 *banks*, one float wide: address a lies in bank a % 32, and a bank serves one address at
a time. Down a column of a 32-wide tile all addresses differ by 32: one bank, 32 turns. In a 33-wide tile they differ by
33: 32 banks, one turn.
"""

import numpy as np
from numba import cuda, float32

from chapters.ch02_launch.kernels import MAX_GRID
from common.ptx import load_float4, store_float4

TILE = 32
TILE_PADDED = TILE + 1
ROWS = 8  # a block is 32 x 8 threads; each thread moves 4 elements of the tile, 8 rows apart
WIDE = 64  # the tile of transpose_v5_float4: 16 threads a row, 4 floats each
WIDE_PADDED = WIDE + 1
WIDE_THREADS = 256
WIDE_ROWS = WIDE_THREADS // (WIDE // 4)  # rows that the block moves at a time


def transpose_launch(rows, cols):
    """Launch configuration of every transpose of a (rows, cols) array, one block a 32 x 32 tile: ``(grid, block)``.

    Raises ValueError if a size is not positive, or if rows needs more than the 65535 blocks a grid may have along y.
    """
    if rows <= 0 or cols <= 0:
        raise ValueError(f"shape ({rows}, {cols}): a transpose needs at least 1 row and 1 column")
    tiles_y = (rows + TILE - 1) // TILE
    if tiles_y > MAX_GRID[1]:
        raise ValueError(f"rows = {rows}: more than the {MAX_GRID[1]} tiles that a grid can have along y; use slices")
    return ((cols + TILE - 1) // TILE, tiles_y), (TILE, ROWS)


def transpose_float4_launch(rows, cols):
    """Launch configuration of :func:`transpose_v5_float4`, one block a 64 x 64 tile: ``(grid, block)``.

    Raises ValueError if a size is not a positive multiple of 4, or if rows needs too many blocks along y.
    """
    for name, size in (("rows", rows), ("cols", cols)):
        if size <= 0 or size % 4:
            raise ValueError(f"{name} = {size} is not a positive multiple of 4; transpose_v4_unrolled takes any size")
    tiles_y = (rows + WIDE - 1) // WIDE
    if tiles_y > MAX_GRID[1]:
        raise ValueError(f"rows = {rows}: more than the {MAX_GRID[1]} tiles that a grid can have along y; use slices")
    return ((cols + WIDE - 1) // WIDE, tiles_y), WIDE_THREADS


@cuda.jit
def transpose_v1_naive(x, out, rows, cols):
    """out[c, r] = x[r, c]: neighbouring threads read neighbours and write ``rows`` floats apart.

    x: (rows, cols) float32. out: (cols, rows) float32, not overlapping x. Both C-contiguous. rows, cols: int32.
    Launch: ``transpose_v1_naive[transpose_launch(rows, cols)](…)``.
    """
    col = cuda.blockIdx.x * TILE + cuda.threadIdx.x
    first_row = cuda.blockIdx.y * TILE + cuda.threadIdx.y
    for row in range(first_row, min(cuda.blockIdx.y * TILE + TILE, rows), ROWS):
        if col < cols:
            out[col, row] = x[row, col]


@cuda.jit
def transpose_v2_tile(x, out, rows, cols):
    """out[c, r] = x[r, c] through a tile in shared memory: the strided side is turned where strides cost less.

    Arguments and launch as :func:`transpose_v1_naive`. Source: Ruetsch and Micikevicius 2009, "Optimizing Matrix
    Transpose in CUDA".
    """
    tile = cuda.shared.array((TILE, TILE), float32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    x_row, x_col = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE  # the tile's corner in x; swapped, its corner in out
    for i in range(ty, TILE, ROWS):
        if x_row + i < rows and x_col + tx < cols:
            tile[i, tx] = x[x_row + i, x_col + tx]
    cuda.syncthreads()  # the whole tile is there
    for i in range(ty, TILE, ROWS):
        if x_col + i < cols and x_row + tx < rows:
            out[x_col + i, x_row + tx] = tile[tx, i]  # a column of the tile: one bank, 32 threads


@cuda.jit
def transpose_v3_padded(x, out, rows, cols):
    """out[c, r] = x[r, c] through a tile with one column too many, so that a column touches every bank once.

    Arguments and launch as :func:`transpose_v1_naive`. Source: Ruetsch and Micikevicius 2009.
    """
    tile = cuda.shared.array((TILE, TILE_PADDED), float32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    x_row, x_col = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
    for i in range(ty, TILE, ROWS):
        if x_row + i < rows and x_col + tx < cols:
            tile[i, tx] = x[x_row + i, x_col + tx]
    cuda.syncthreads()
    for i in range(ty, TILE, ROWS):
        if x_col + i < cols and x_row + tx < rows:
            out[x_col + i, x_row + tx] = tile[tx, i]


@cuda.jit
def transpose_v4_unrolled(x, out, rows, cols):
    """out[c, r] = x[r, c] as the version before, with loops whose length the compiler knows.

    ``range(ty, TILE, ROWS)`` runs 4 times, but that follows only from ty < ROWS, which no compiler knows. Said as
    ``range(4)`` the loop is unrolled, and all loads start before the first has arrived.
    Arguments and launch as :func:`transpose_v1_naive`.
    """
    tile = cuda.shared.array((TILE, TILE_PADDED), float32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    x_row, x_col = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
    for step in range(TILE // ROWS):
        i = ty + step * ROWS
        if x_row + i < rows and x_col + tx < cols:
            tile[i, tx] = x[x_row + i, x_col + tx]
    cuda.syncthreads()
    for step in range(TILE // ROWS):
        i = ty + step * ROWS
        if x_col + i < cols and x_row + tx < rows:
            out[x_col + i, x_row + tx] = tile[tx, i]


@cuda.jit
def transpose_v5_float4(x, out, rows, cols):
    """out[c, r] = x[r, c] with 16 bytes a thread on both sides, for sizes that are multiples of 4.

    A warp reads two rows of 64 floats and writes two rows of 64 floats: 512 bytes with one instruction each. Between
    them the tile turns 4 x 4 patches. x: (rows, cols) float32. out: (cols, rows) float32, not overlapping x. Both
    C-contiguous and starting at a multiple of 16 bytes. rows, cols: int32.
    Launch: ``transpose_v5_float4[transpose_float4_launch(rows, cols)](…)``.
    """
    tile = cuda.shared.array((WIDE, WIDE_PADDED), float32)
    quad = 4 * (cuda.threadIdx.x % (WIDE // 4))  # the first of this thread's 4 neighbours
    first = cuda.threadIdx.x // (WIDE // 4)
    x_row, x_col = cuda.blockIdx.y * WIDE, cuda.blockIdx.x * WIDE
    for step in range(WIDE // WIDE_ROWS):
        i = first + step * WIDE_ROWS
        if x_row + i < rows and x_col + quad < cols:  # all 4 are inside, or none: cols is a multiple of 4
            a, b, c, d = load_float4(x, (x_row + i, x_col + quad))
            tile[i, quad] = a
            tile[i, quad + 1] = b
            tile[i, quad + 2] = c
            tile[i, quad + 3] = d
    cuda.syncthreads()
    for step in range(WIDE // WIDE_ROWS):
        i = first + step * WIDE_ROWS
        if x_col + i < cols and x_row + quad < rows:
            a, b, c, d = tile[quad, i], tile[quad + 1, i], tile[quad + 2, i], tile[quad + 3, i]
            store_float4(out, (x_col + i, x_row + quad), a, b, c, d)


transpose_kernel = transpose_v4_unrolled  # the fastest that takes any shape


def transpose_reference(x):
    """NumPy reference of all versions: (rows, cols) in, C-contiguous (cols, rows) out."""
    return np.ascontiguousarray(x.T)
