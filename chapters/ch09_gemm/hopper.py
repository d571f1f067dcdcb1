"""Chapter 9, the last rung, for one family of GPUs: Hopper's tensor cores read shared memory themselves.

=========================  ==================================  ====================================  ==================
kernel                     what it changes                     bytes a multiprocessor loads from     shared memory
                                                               the L2 cache for a multiply-add
=========================  ==================================  ====================================  ==================
``gemm_v6_pipeline``       (``pipeline.py``)                   1 / 32: tiles of 128 x 128            48 KiB, 2 blocks
``gemm_v7_warpgroup``      ``wgmma``: 4 warps ask for          3 / 128: tiles of 128 x 256           192 KiB, 1 block
                           64 x 256 x 16 at once, and go on
=========================  ==================================  ====================================  ==================

v6's warps spend instructions and registers to bring each operand from shared memory. Here only the sums are in
registers, 128 a thread, and while the tensor cores work, the warps do nothing but begin the next copies. So one block
of 8 warps keeps a multiprocessor busy, where v6 needs two of 4, and its tile of C can be twice as large. Memory beyond
48 KiB is asked for at launch, as dynamic shared memory.

It loses where C has few tiles of 128 x 256: below some 2000 x 2000 most multiprocessors idle. On a GPU it needs sm_90,
and only that: later ones have another instruction. Sources: PTX ISA, "wgmma"; NVIDIA's CUTLASS 3, for Hopper.
"""

from numba import cuda, float32
from numba.types import float16

from common.ptx import cp_async_commit, cp_async_half8, cp_async_wait
from common.ptx_hopper import (
    fence_async_proxy,
    swizzle128,
    wgmma_commit,
    wgmma_fence,
    wgmma_m64n256k16,
    wgmma_wait,
)

from .kernels import GRID_ROWS

THREADS = 256  # two warpgroups, one above the other, with 64 x 256 elements of C each
TILE_ROWS = 128
TILE_COLS = 256
DEPTH = 64  # columns of A and Bt in shared memory at a time: rows of 128 bytes
STAGES = 4  # the tile that the tensor cores read, the next one, the one after it that is arriving, and one being left
A_SIZE = TILE_ROWS * DEPTH
STAGE_SIZE = (TILE_ROWS + TILE_COLS) * DEPTH  # float16: A's tile, then Bt's
SHARED_BYTES = 2 * STAGES * STAGE_SIZE
PIECES = DEPTH // 8
ROWS_AT_ONCE = THREADS // PIECES
WARPGROUP = 128
N_MMAS = TILE_COLS // 8
ONE_BLOCK = (THREADS, 1)


def gemm_v7_launch(M, N):
    """Launch configuration of :func:`gemm_v7_warpgroup`: ``(grid, block, stream, shared bytes)``.

    Raises ValueError if a size is not positive, or M is more than 65535 tiles.
    """
    if M <= 0 or N <= 0:
        raise ValueError(f"shape ({M}, {N}): a product needs at least 1 row and 1 column")
    if M > GRID_ROWS * TILE_ROWS:
        raise ValueError(
            f"M = {M}: a grid has at most {GRID_ROWS} blocks along y, which is {GRID_ROWS * TILE_ROWS} rows; "
            "launch once for each part of A's rows"
        )
    grid = (N + TILE_COLS - 1) // TILE_COLS, (M + TILE_ROWS - 1) // TILE_ROWS
    return grid, THREADS, 0, SHARED_BYTES


@cuda.jit(device=True, forceinline=True)
def copy_rows(tiles, at, X, row0, n_rows, k0, rows, K):
    """Begin to copy X[row0 : row0 + n_rows, k0 : k0 + 64] of a (rows, K) float16 array to tiles[at …]; 0 outside."""
    piece = cuda.threadIdx.x % PIECES
    first = cuda.threadIdx.x // PIECES
    col = k0 + 8 * piece
    for i in range(0, n_rows, ROWS_AT_ONCE):
        row = first + i
        inside = row0 + row < rows and col < K
        cp_async_half8(tiles, at + row * DEPTH + swizzle128(row, 8 * piece), X, (row0 + row, col), inside)


@cuda.jit(launch_bounds=ONE_BLOCK)
def gemm_v7_warpgroup(A, Bt, C, M, N, K):
    """C = A @ Bt.T, rung 7: warpgroups multiply 64 x 256 x 16 out of shared memory, in the background.

    A: (M, K), Bt: (N, K) float16, C: (M, N) float32, all C-contiguous, from a multiple of 16 bytes on; C overlaps
    neither. M, N, K: int32, at least 1, K a multiple of 8.
    Launch: ``gemm_v7_warpgroup[gemm_v7_launch(M, N)](…)``, 256 threads; on a GPU, sm_90 only.
    """
    tiles = cuda.shared.array(0, float16)
    acc = cuda.local.array((N_MMAS, 4), float32)
    row0 = cuda.blockIdx.y * TILE_ROWS
    col0 = cuda.blockIdx.x * TILE_COLS
    group = cuda.threadIdx.x // WARPGROUP
    for n in range(N_MMAS):
        for e in range(4):
            acc[n, e] = float32(0)
    for stage in range(STAGES - 2):
        copy_rows(tiles, stage * STAGE_SIZE, A, row0, TILE_ROWS, stage * DEPTH, M, K)
        copy_rows(tiles, stage * STAGE_SIZE + A_SIZE, Bt, col0, TILE_COLS, stage * DEPTH, N, K)
        cp_async_commit()
    now = 0
    free = (STAGES - 2) * STAGE_SIZE
    for k0 in range(0, K, DEPTH):
        cp_async_wait(1)
        fence_async_proxy()
        cuda.syncthreads()  # tile `now` is complete, and the tensor cores have left tile `free`, two before it
        a, b = now + group * WARPGROUP // 2 * DEPTH, now + A_SIZE
        wgmma_fence()
        wgmma_m64n256k16(acc, tiles, a, b, 0)
        wgmma_m64n256k16(acc, tiles, a, b, 16)
        wgmma_m64n256k16(acc, tiles, a, b, 32)
        wgmma_m64n256k16(acc, tiles, a, b, 48)
        wgmma_commit()
        next_k = k0 + (STAGES - 2) * DEPTH
        copy_rows(tiles, free, A, row0, TILE_ROWS, next_k, M, K)
        copy_rows(tiles, free + A_SIZE, Bt, col0, TILE_COLS, next_k, N, K)
        cp_async_commit()
        wgmma_wait(1)
        now = now + STAGE_SIZE if now < (STAGES - 1) * STAGE_SIZE else 0
        free = free + STAGE_SIZE if free < (STAGES - 1) * STAGE_SIZE else 0
    wgmma_wait(0)
    lane = cuda.threadIdx.x % 32
    for half in range(2):
        row = row0 + cuda.threadIdx.x // 32 * 16 + half * 8 + lane // 4
        for n in range(N_MMAS):
            for e in range(2):
                col = col0 + n * 8 + lane % 4 * 2 + e
                if row < M and col < N:
                    C[row, col] = acc[n, 2 * half + e]
