"""Chapter 9, the last rungs, for one family of GPUs: Hopper's tensor cores read shared memory themselves.

=========================  ==================================  ====================================  ==================
kernel                     what it changes                     bytes a multiprocessor loads from     shared memory
                                                               the L2 cache for a multiply-add
=========================  ==================================  ====================================  ==================
``gemm_v6_pipeline``       (``pipeline.py``)                   1 / 32: tiles of 128 x 128            48 KiB, 2 blocks
``gemm_v7_warpgroup``      ``wgmma``: 4 warps ask for          3 / 128: tiles of 128 x 256           192 KiB, 1 block
                           64 x 256 x 16 at once, and go on
``gemm_v8_tma``            one thread asks for a whole tile,   3 / 128                               193 KiB, 1 block
                           and a unit of its own copies it
=========================  ==================================  ====================================  ==================

v6's warps spend instructions and registers to bring each operand from shared memory. Here only the sums are in
registers, 128 a thread, and while the tensor cores work, the warps do nothing but begin the next copies. So one block
of 8 warps keeps a multiprocessor busy, where v6 needs two of 4, and its tile of C can be twice as large. Memory beyond
48 KiB is asked for at launch, as dynamic shared memory.

v7's copies are 12 instructions a thread and tile, each with an address and a comparison; they crowd the queue that
loads and stores go through. v8 has none: the tensor memory accelerator (see ``common.ptx_hopper``) copies, and the host
tells it beforehand how the matrices lie in memory. That costs a call for each matrix, once.

They lose where C has few tiles of 128 x 256: below some 2000 x 2000 most multiprocessors idle. On a GPU they need
sm_90, and only that: later ones have another instruction. Sources: PTX ISA, "wgmma", "cp.async.bulk.tensor"; NVIDIA's
CUTLASS 3, for Hopper.
"""

from numba import cuda, float32, uint64
from numba.types import float16

from common.ptx import cp_async_commit, cp_async_half8, cp_async_wait, store_float2
from common.ptx_hopper import (
    arrivals_init,
    arrivals_wait,
    copy_tile_async,
    fence_async_proxy,
    swizzle128,
    tile_map,
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
ALIGNED = 128  # mbarriers: STAGES would do, but behind 1024 bytes of them the tiles begin where the swizzle wants it
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


@cuda.jit(device=True, forceinline=True)
def multiply_tile(acc, tiles, at):
    """Ask for acc += this warpgroup's half of A's tile times Bt's tile, of the stage that begins at tiles[at]."""
    a, b = at + cuda.threadIdx.x // WARPGROUP * (A_SIZE // 2), at + A_SIZE
    wgmma_fence()
    wgmma_m64n256k16(acc, tiles, a, b, 0)
    wgmma_m64n256k16(acc, tiles, a, b, 16)
    wgmma_m64n256k16(acc, tiles, a, b, 32)
    wgmma_m64n256k16(acc, tiles, a, b, 48)
    wgmma_commit()


@cuda.jit(device=True, forceinline=True)
def store_sums(acc, C, row0, col0, M, N):
    """The block's tile of C, as far as it lies in (M, N): two neighbours at a time, if rows begin at 8 bytes."""
    lane = cuda.threadIdx.x % 32
    for half in range(2):
        row = row0 + cuda.threadIdx.x // 32 * 16 + half * 8 + lane // 4
        for n in range(N_MMAS):
            col = col0 + n * 8 + lane % 4 * 2
            if row < M and col < N:
                if N % 2 == 0:
                    store_float2(C, (row, col), acc[n, 2 * half], acc[n, 2 * half + 1])
                else:
                    C[row, col] = acc[n, 2 * half]
                    if col + 1 < N:
                        C[row, col + 1] = acc[n, 2 * half + 1]


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
        multiply_tile(acc, tiles, now)
        next_k = k0 + (STAGES - 2) * DEPTH
        copy_rows(tiles, free, A, row0, TILE_ROWS, next_k, M, K)
        copy_rows(tiles, free + A_SIZE, Bt, col0, TILE_COLS, next_k, N, K)
        cp_async_commit()
        wgmma_wait(1)
        now = now + STAGE_SIZE if now < (STAGES - 1) * STAGE_SIZE else 0
        free = free + STAGE_SIZE if free < (STAGES - 1) * STAGE_SIZE else 0
    wgmma_wait(0)
    store_sums(acc, C, row0, col0, M, N)


def gemm_v8_maps(A, Bt):
    """``A_map, Bt_map`` for :func:`gemm_v8_tma`; see ``tile_map``, whose ValueErrors these are too."""
    return tile_map(A, TILE_ROWS), tile_map(Bt, TILE_COLS)


@cuda.jit(device=True, forceinline=True)
def copy_both(tiles, stage, A_map, Bt_map, row0, col0, k0, arrived):
    """Begin to copy the tiles of A and Bt from column k0 on to stage ``stage`` of the ring; one thread does."""
    at = stage * STAGE_SIZE
    copy_tile_async(tiles, at, A_map, row0, k0, TILE_ROWS, arrived, stage)
    copy_tile_async(tiles, at + A_SIZE, Bt_map, col0, k0, TILE_COLS, arrived, stage)


@cuda.jit(launch_bounds=ONE_BLOCK)
def gemm_v8_tma(A_map, Bt_map, C, M, N, K):
    """C = A @ Bt.T, rung 8: one thread asks for the copy of a whole tile, and a unit of its own does it.

    A_map, Bt_map: of A (M, K) and Bt (N, K), float16, from ``gemm_v8_maps(A, Bt)``. All else as v7.
    Launch: ``gemm_v8_tma[gemm_v7_launch(M, N)](*gemm_v8_maps(A, Bt), C, M, N, K)``, 256 threads; on a GPU, sm_90 only.
    """
    arrived = cuda.shared.array(ALIGNED, uint64)
    tiles = cuda.shared.array(0, float16)
    acc = cuda.local.array((N_MMAS, 4), float32)
    row0 = cuda.blockIdx.y * TILE_ROWS
    col0 = cuda.blockIdx.x * TILE_COLS
    for n in range(N_MMAS):
        for e in range(4):
            acc[n, e] = float32(0)
    if cuda.threadIdx.x == 0:
        for stage in range(STAGES):
            arrivals_init(arrived, stage, 2)  # a tile of A and one of Bt
        for stage in range(STAGES - 2):
            if stage * DEPTH < K:
                copy_both(tiles, stage, A_map, Bt_map, row0, col0, stage * DEPTH, arrived)
    cuda.syncthreads()
    now = 0
    free = STAGES - 2
    phase = 0
    for k0 in range(0, K, DEPTH):
        arrivals_wait(arrived, now, phase)
        cuda.syncthreads()  # the tensor cores have left stage `free`, two before `now`
        next_k = k0 + (STAGES - 2) * DEPTH
        if cuda.threadIdx.x == 0 and next_k < K:
            copy_both(tiles, free, A_map, Bt_map, row0, col0, next_k, arrived)
        multiply_tile(acc, tiles, now * STAGE_SIZE)
        wgmma_wait(1)
        free = free + 1 if free < STAGES - 1 else 0
        now = now + 1 if now < STAGES - 1 else 0
        phase = phase if now else 1 - phase  # once round the ring
    wgmma_wait(0)
    store_sums(acc, C, row0, col0, M, N)
