"""Chapter 9, matrix products: C = A @ B in float32, from chapter 6's tiles to most of what the card can do.

Chapter 6's ``matmul_v3_any_shape`` reads two numbers from shared memory for each multiply-add, and a GPU can add far
faster than it can read. So a thread now computes a whole tile of C in its registers: of a column of 8 numbers of A and
a row of 8 of B it makes 64 products.

==========================  ==============================  ==============  =================  =================
kernel                      what it changes                 tile of C:      reads from shared  barriers for each
                                                            block, thread   for 1 multiply-add column of A
==========================  ==============================  ==============  =================  =================
ch06's last version         where the ladder starts         16², 1          2                  2 / 16
``gemm_v1_register_tile``   a tile a thread, in registers   64², 4²         1 / 2              2 / 16
``gemm_v2_vector_loads``    16 bytes a load, all along      128², 8²        1 / 4 (in 1 / 16   2 / 8
                                                                            instructions)
``gemm_v3_double_buffer``   loads the next tile while it    128², 8²        1 / 4 (in 1 / 16   1 / 8
                            computes with this one                          instructions)
==========================  ==============================  ==============  =================  =================

A block reads 4 * K * (tile rows + tile columns) bytes for its tile of C; 128² against 64² halves the traffic. All lose
where the tiles do not fill the card: C of 512 x 512 is 16 tiles of 128², and an H200 has 132 multiprocessors. For C
of a few rows see ``gemv.py``; for float16 and tensor cores ``tensor_core.py``, where the ladder goes on with v4.

All take the same arguments, any shape; ``gemm`` is the last one. Sources: Volkov and Demmel 2008, "Benchmarking GPUs to
Tune Dense Linear Algebra" (v1); NVIDIA's "CUTLASS: Fast Linear Algebra in CUDA C++", 2017 (v2, v3).
"""

from numba import cuda, float32

from common.ptx import load_float4, store_float4

from ..ch04_memory.vectors import load_row4, store_row4
from ..ch06_shared_tile.kernels import matmul_reference

GRID_ROWS = 65535  # the most blocks a grid has along y

# v1: 16 x 16 threads with 4 x 4 elements each
SIDE = 16
SMALL = 4
SMALL_TILE = 64  # SIDE * SMALL
SMALL_DEPTH = 16

# v2, v3: 16 x 16 threads with 8 x 8 elements each, as four quarters of 4 x 4
EACH = 8
QUARTER = 4
TILE = 128  # SIDE * EACH
HALF_TILE = 64
DEPTH = 8  # columns of A, rows of B that are in shared memory at a time: 4 * 256 numbers each, 16 bytes a thread
# A lies transposed in shared memory, (DEPTH, TILE). The 2 x 4 numbers that two neighbouring threads store there stand 4
# rows apart: 4 numbers of padding a row put these 16 banks apart, and rows still begin at a multiple of 16 bytes.
TILE_PAD = 132
# For the compiler, a promise: 256 threads a block; and a wish: room for 2 blocks on a multiprocessor, so that one can
# compute while the other waits at its barrier. With 65536 registers there, that leaves 128 a thread, 64 of them sums.
TWO_BLOCKS = (256, 2)


# --- launch ----------------------------------------------------------------------------------------------------------


def tiles_launch(M, N, tile, block):
    """``(grid, block)`` with one block for each ``tile`` x ``tile`` elements of an (M, N) product, columns along x.

    Raises ValueError if a size is not positive, or M is more than 65535 tiles.
    """
    if M <= 0 or N <= 0:
        raise ValueError(f"shape ({M}, {N}): a product needs at least 1 row and 1 column")
    if M > GRID_ROWS * tile:
        raise ValueError(
            f"M = {M}: a grid has at most {GRID_ROWS} blocks along y, which is {GRID_ROWS * tile} rows; "
            "launch once for each part of A's rows"
        )
    return ((N + tile - 1) // tile, (M + tile - 1) // tile), block


def gemm_v1_launch(M, N):
    """Launch configuration of :func:`gemm_v1_register_tile`. Raises ValueError as :func:`tiles_launch` does."""
    return tiles_launch(M, N, SMALL_TILE, (SIDE, SIDE))


def gemm_launch(M, N):
    """Launch configuration of v2, v3 and v4. Raises ValueError as :func:`tiles_launch` does."""
    return tiles_launch(M, N, TILE, (SIDE, SIDE))


# --- v1 --------------------------------------------------------------------------------------------------------------


@cuda.jit
def gemm_v1_register_tile(A, B, C, M, N, K):
    """C = A @ B, rung 1: each thread computes 4 x 4 elements of C in registers.

    A: (M, K), B: (K, N), C: (M, N), all float32, C-contiguous; C overlaps neither. M, N, K: int32, at least 1.
    Launch: ``gemm_v1_register_tile[gemm_v1_launch(M, N)](…)``, 256 threads.

    A thread's elements stand 16 apart, not side by side: so neighbours in a warp read and write neighbours in memory.
    ``cuda.local.array`` is in registers here, because every loop over it has constant bounds and is unrolled.
    """
    a_tile = cuda.shared.array((SMALL_TILE, SMALL_DEPTH), float32)
    b_tile = cuda.shared.array((SMALL_DEPTH, SMALL_TILE), float32)
    acc = cuda.local.array((SMALL, SMALL), float32)
    a = cuda.local.array(SMALL, float32)
    b = cuda.local.array(SMALL, float32)
    tx = cuda.threadIdx.x
    ty = cuda.threadIdx.y
    row = cuda.blockIdx.y * SMALL_TILE + ty
    col = cuda.blockIdx.x * SMALL_TILE + tx
    for i in range(SMALL):
        for j in range(SMALL):
            acc[i, j] = float32(0)
    for k0 in range(0, K, SMALL_DEPTH):
        for i in range(SMALL):
            if row + i * SIDE < M and k0 + tx < K:
                a_tile[ty + i * SIDE, tx] = A[row + i * SIDE, k0 + tx]
            else:
                a_tile[ty + i * SIDE, tx] = float32(0)  # what lies outside counts as 0
            if k0 + ty < K and col + i * SIDE < N:
                b_tile[ty, tx + i * SIDE] = B[k0 + ty, col + i * SIDE]
            else:
                b_tile[ty, tx + i * SIDE] = float32(0)
        cuda.syncthreads()
        for k in range(SMALL_DEPTH):
            for i in range(SMALL):
                a[i] = a_tile[ty + i * SIDE, k]
                b[i] = b_tile[k, tx + i * SIDE]
            for i in range(SMALL):
                for j in range(SMALL):
                    acc[i, j] += a[i] * b[j]  # 8 reads for 16 multiply-adds
        cuda.syncthreads()
    for i in range(SMALL):
        for j in range(SMALL):
            if row + i * SIDE < M and col + j * SIDE < N:
                C[row + i * SIDE, col + j * SIDE] = acc[i, j]


# --- 16 bytes at a time ----------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def element_or_zero(X, row, col, rows, cols):
    """X[row, col] as float32; 0 outside of (rows, cols)."""
    if row < rows and col < cols:
        return float32(X[row, col])
    return float32(0)


@cuda.jit(device=True)
def load_four(X, row, col, rows, cols):
    """X[row, col : col + 4] of a float32 array of shape (rows, cols), 0 outside; ``col`` is a multiple of 4."""
    zero = float32(0)
    if row < rows:
        return load_row4(X, row, col, cols, zero)
    return zero, zero, zero, zero


@cuda.jit(device=True)
def store_four(X, row, col, rows, cols, a, b, c, d):
    """X[row, col : col + 4] = a, b, c, d; what lies outside of (rows, cols) is not written. As :func:`load_four`."""
    if row < rows:
        store_row4(X, row, col, cols, a, b, c, d)


@cuda.jit
def gemm_v2_vector_loads(A, B, C, M, N, K):
    """C = A @ B, rung 2: 8 x 8 elements a thread, and 16 bytes at a time from global to shared memory to registers.

    A: (M, K), B: (K, N), C: (M, N), all float32, C-contiguous; C overlaps neither. M, N, K: int32, at least 1. The
    arrays begin at a multiple of 16 bytes. Where N (or K) is not a multiple of 4, B and C (or A) go through element by
    element: correct, slower. Launch: ``gemm_v2_vector_loads[gemm_launch(M, N)](…)``, 256 threads.

    The inner loop wants columns of A, so A is stored transposed. A thread's rows of C are ``4 ty … 4 ty + 3`` and the
    same 64 further down; its columns likewise: threads side by side then read 16 bytes side by side.
    """
    a_tile = cuda.shared.array((DEPTH, TILE_PAD), float32, alignment=16)
    b_tile = cuda.shared.array((DEPTH, TILE), float32, alignment=16)
    acc = cuda.local.array((EACH, EACH), float32)
    a = cuda.local.array(EACH, float32)
    b = cuda.local.array(EACH, float32)
    tx = cuda.threadIdx.x
    ty = cuda.threadIdx.y
    tid = ty * SIDE + tx
    a_row, a_col = tid // 2, tid % 2 * 4  # which four of the tile of A, and of B, this thread brings
    b_row, b_col = tid // 32, tid % 32 * 4
    row0 = cuda.blockIdx.y * TILE
    col0 = cuda.blockIdx.x * TILE
    for i in range(EACH):
        for j in range(EACH):
            acc[i, j] = float32(0)
    for k0 in range(0, K, DEPTH):
        a0, a1, a2, a3 = load_four(A, row0 + a_row, k0 + a_col, M, K)
        a_tile[a_col, a_row] = a0
        a_tile[a_col + 1, a_row] = a1
        a_tile[a_col + 2, a_row] = a2
        a_tile[a_col + 3, a_row] = a3
        b0, b1, b2, b3 = load_four(B, k0 + b_row, col0 + b_col, K, N)
        store_float4(b_tile, (b_row, b_col), b0, b1, b2, b3)
        cuda.syncthreads()
        for k in range(DEPTH):
            a[0], a[1], a[2], a[3] = load_float4(a_tile, (k, 4 * ty))
            a[4], a[5], a[6], a[7] = load_float4(a_tile, (k, HALF_TILE + 4 * ty))
            b[0], b[1], b[2], b[3] = load_float4(b_tile, (k, 4 * tx))
            b[4], b[5], b[6], b[7] = load_float4(b_tile, (k, HALF_TILE + 4 * tx))
            for i in range(EACH):
                for j in range(EACH):
                    acc[i, j] += a[i] * b[j]  # 4 loads for 64 multiply-adds
        cuda.syncthreads()
    for i in range(EACH):
        row = row0 + i // QUARTER * HALF_TILE + 4 * ty + i % QUARTER
        for j in range(0, EACH, QUARTER):
            col = col0 + j // QUARTER * HALF_TILE + 4 * tx
            store_four(C, row, col, M, N, acc[i, j], acc[i, j + 1], acc[i, j + 2], acc[i, j + 3])


@cuda.jit(launch_bounds=TWO_BLOCKS)
def gemm_v3_double_buffer(A, B, C, M, N, K):
    """C = A @ B, rung 3: two tiles of A and of B in shared memory; one is computed with while the other is filled.

    A: (M, K), B: (K, N), C: (M, N), all float32, C-contiguous; C overlaps neither. M, N, K: int32, at least 1. The
    arrays begin at a multiple of 16 bytes; N and K are best multiples of 4, as for :func:`gemm_v2_vector_loads`.
    Launch: ``gemm_v3_double_buffer[gemm_launch(M, N)](…)``, 256 threads.

    A round asks for the next tile first and needs it last: the 512 multiply-adds between the two hide the way to
    memory. It writes where nobody reads in this round, so one barrier a round is enough.
    """
    a_tile = cuda.shared.array((2, DEPTH, TILE_PAD), float32, alignment=16)
    b_tile = cuda.shared.array((2, DEPTH, TILE), float32, alignment=16)
    acc = cuda.local.array((EACH, EACH), float32)
    a = cuda.local.array(EACH, float32)
    b = cuda.local.array(EACH, float32)
    tx = cuda.threadIdx.x
    ty = cuda.threadIdx.y
    tid = ty * SIDE + tx
    a_row, a_col = tid // 2, tid % 2 * 4
    b_row, b_col = tid // 32, tid % 32 * 4
    row0 = cuda.blockIdx.y * TILE
    col0 = cuda.blockIdx.x * TILE
    for i in range(EACH):
        for j in range(EACH):
            acc[i, j] = float32(0)
    now = 0  # the buffer that is computed with
    for k0 in range(-DEPTH, K, DEPTH):  # the first round only fills a buffer, the last fills one with zeros
        next_k = k0 + DEPTH
        a0, a1, a2, a3 = load_four(A, row0 + a_row, next_k + a_col, M, K)
        b0, b1, b2, b3 = load_four(B, next_k + b_row, col0 + b_col, K, N)
        if k0 >= 0:
            for k2 in range(0, DEPTH, 2):
                for k in range(k2, k2 + 2):  # unrolled: the second column is read while the first is computed with
                    a[0], a[1], a[2], a[3] = load_float4(a_tile, (now, k, 4 * ty))
                    a[4], a[5], a[6], a[7] = load_float4(a_tile, (now, k, HALF_TILE + 4 * ty))
                    b[0], b[1], b[2], b[3] = load_float4(b_tile, (now, k, 4 * tx))
                    b[4], b[5], b[6], b[7] = load_float4(b_tile, (now, k, HALF_TILE + 4 * tx))
                    for i in range(EACH):
                        for j in range(EACH):
                            acc[i, j] += a[i] * b[j]
        now = 1 - now
        a_tile[now, a_col, a_row] = a0
        a_tile[now, a_col + 1, a_row] = a1
        a_tile[now, a_col + 2, a_row] = a2
        a_tile[now, a_col + 3, a_row] = a3
        store_float4(b_tile, (now, b_row, b_col), b0, b1, b2, b3)
        cuda.syncthreads()  # this round's tile is read, the next one is complete
    for i in range(EACH):
        row = row0 + i // QUARTER * HALF_TILE + 4 * ty + i % QUARTER
        for j in range(0, EACH, QUARTER):
            col = col0 + j // QUARTER * HALF_TILE + 4 * tx
            store_four(C, row, col, M, N, acc[i, j], acc[i, j + 1], acc[i, j + 2], acc[i, j + 3])


gemm = gemm_v3_double_buffer

gemm_reference = matmul_reference  # (M, K) and (K, N), summed in float64; returns (M, N) float32
