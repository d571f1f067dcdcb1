"""Chapter 9, matrix products in float16: C = A @ B with A and B in float16, sums and C in float32.

The ladder of ``kernels.py`` goes on here. A block computes 128 x 128 elements of C, with the next tile on its way while
it computes with this one:

=========================  ====================================  ==================================  ==================
kernel                     what it changes                       who multiplies                      bytes of A and B
                                                                                                     a block reads
=========================  ====================================  ==================================  ==================
``gemm_v3_double_buffer``  (float32, chapter 9's ``kernels``)    a thread: 64 products a column      1024 * K
``gemm_v4_half_storage``   float16 in global memory only         a thread, in float32                512 * K
``gemm_v5_tensor_core``    float16 in shared memory as well;     a warp: 16 x 8 x 16 products with   512 * K
                           no number is multiplied by a thread   one instruction
=========================  ====================================  ==================================  ==================

v4 is no faster than v3 where the arithmetic is what takes the time, as in large square products; it wins where bytes
are, as with few rows. v5 needs a GPU of sm_75 or later. Both sum in float32: a product of two float16 is exact there.
``gemm_half`` is the last one that takes B as it lies; ``pipeline.py`` goes on, with B transposed.
"""

from numba import cuda, float32, uint32
from numba.types import float16

from common.ptx import (
    load_float4,
    load_half2,
    load_half8,
    mma_m16n8k16,
    pack_half2,
    store_float4,
    store_half2,
    store_half8,
    unpack_half2,
)

from ..ch06_shared_tile.kernels import matmul_reference
from .kernels import (
    EACH,
    HALF_TILE,
    QUARTER,
    SIDE,
    TILE,
    TILE_PAD,
    TWO_BLOCKS,
    element_or_zero,
    store_four,
    tiles_launch,
)

HALF_DEPTH = 16  # v4: columns of A in shared memory at a time: 8 numbers a thread

# v5: 8 warps, 2 x 4, with 64 x 32 elements of C each, as 4 x 4 products of 16 x 8
THREADS = 256
WARP = 32
WARPS_ALONG_N = 4
WARP_ROWS = 64
WARP_COLS = 32
MMA_M = 16
MMA_N = 8
MMA_K = 16
MMAS = 4  # products along each side of a warp's part
MMA_DEPTH = 32  # columns of A in shared memory at a time
# The 32 lanes read pairs at (row group, column pair) = (lane // 4, lane % 4). With rows of 40 float16, 20 banks, the 8
# groups begin at banks 0, 20, 8, 28, 16, 4, 24, 12: all 32 lanes in different banks. Rows stay multiples of 16 bytes.
MMA_PAD = 40


def gemm_v5_launch(M, N):
    """Launch configuration of :func:`gemm_v5_tensor_core`: ``(grid, block)``, 256 threads in a row.

    Raises ValueError if a size is not positive, or M is more than 65535 tiles of 128.
    """
    return tiles_launch(M, N, TILE, THREADS)


@cuda.jit(device=True)
def load_eight(X, row, col, rows, cols):
    """X[row, col : col + 8] of a float16 array of shape (rows, cols) as four pairs, 0 outside; 8 divides ``col``.

    One load of 16 bytes where every row begins at a multiple of 16 bytes (cols a multiple of 8), otherwise one by one.
    """
    if cols % 8 == 0:
        if row < rows and col < cols:
            return load_half8(X, (row, col))
        return uint32(0), uint32(0), uint32(0), uint32(0)
    return (
        pack_half2(element_or_zero(X, row, col, rows, cols), element_or_zero(X, row, col + 1, rows, cols)),
        pack_half2(element_or_zero(X, row, col + 2, rows, cols), element_or_zero(X, row, col + 3, rows, cols)),
        pack_half2(element_or_zero(X, row, col + 4, rows, cols), element_or_zero(X, row, col + 5, rows, cols)),
        pack_half2(element_or_zero(X, row, col + 6, rows, cols), element_or_zero(X, row, col + 7, rows, cols)),
    )


@cuda.jit(launch_bounds=TWO_BLOCKS)
def gemm_v4_half_storage(A, B, C, M, N, K):
    """C = A @ B, rung 4: as rung 3, with A and B in float16: half the bytes. The arithmetic is float32 as before.

    A: (M, K), B: (K, N) float16, C: (M, N) float32, all C-contiguous; C overlaps neither. M, N, K: int32, at least 1.
    The arrays begin at a multiple of 16 bytes; K and N are best multiples of 8 (else elements are loaded one by one).
    Launch: ``gemm_v4_half_storage[gemm_launch(M, N)](…)``, 256 threads.

    16 bytes are now 8 numbers, so a tile is 16 deep. They wait in registers as pairs and become float32 on their way
    into shared memory: once, not each time that one of 16 threads reads them.
    """
    a_tile = cuda.shared.array((2, HALF_DEPTH, TILE_PAD), float32, alignment=16)
    b_tile = cuda.shared.array((2, HALF_DEPTH, TILE), float32, alignment=16)
    acc = cuda.local.array((EACH, EACH), float32)
    a = cuda.local.array(EACH, float32)
    b = cuda.local.array(EACH, float32)
    tx = cuda.threadIdx.x
    ty = cuda.threadIdx.y
    tid = ty * SIDE + tx
    a_row, a_col = tid // 2, tid % 2 * 8
    b_row, b_col = tid // 16, tid % 16 * 8
    row0 = cuda.blockIdx.y * TILE
    col0 = cuda.blockIdx.x * TILE
    for i in range(EACH):
        for j in range(EACH):
            acc[i, j] = float32(0)
    now = 0
    for k0 in range(-HALF_DEPTH, K, HALF_DEPTH):  # the first round only fills a buffer, the last fills one with zeros
        next_k = k0 + HALF_DEPTH
        p0, p1, p2, p3 = load_eight(A, row0 + a_row, next_k + a_col, M, K)
        q0, q1, q2, q3 = load_eight(B, next_k + b_row, col0 + b_col, K, N)
        if k0 >= 0:
            for k in range(HALF_DEPTH):
                a[0], a[1], a[2], a[3] = load_float4(a_tile, (now, k, 4 * ty))
                a[4], a[5], a[6], a[7] = load_float4(a_tile, (now, k, HALF_TILE + 4 * ty))
                b[0], b[1], b[2], b[3] = load_float4(b_tile, (now, k, 4 * tx))
                b[4], b[5], b[6], b[7] = load_float4(b_tile, (now, k, HALF_TILE + 4 * tx))
                for i in range(EACH):
                    for j in range(EACH):
                        acc[i, j] += a[i] * b[j]
        now = 1 - now
        a_tile[now, a_col, a_row], a_tile[now, a_col + 1, a_row] = unpack_half2(p0)
        a_tile[now, a_col + 2, a_row], a_tile[now, a_col + 3, a_row] = unpack_half2(p1)
        a_tile[now, a_col + 4, a_row], a_tile[now, a_col + 5, a_row] = unpack_half2(p2)
        a_tile[now, a_col + 6, a_row], a_tile[now, a_col + 7, a_row] = unpack_half2(p3)
        b0, b1 = unpack_half2(q0)
        b2, b3 = unpack_half2(q1)
        store_float4(b_tile, (now, b_row, b_col), b0, b1, b2, b3)
        b0, b1 = unpack_half2(q2)
        b2, b3 = unpack_half2(q3)
        store_float4(b_tile, (now, b_row, b_col + 4), b0, b1, b2, b3)
        cuda.syncthreads()
    for i in range(EACH):
        row = row0 + i // QUARTER * HALF_TILE + 4 * ty + i % QUARTER
        for j in range(0, EACH, QUARTER):
            col = col0 + j // QUARTER * HALF_TILE + 4 * tx
            store_four(C, row, col, M, N, acc[i, j], acc[i, j + 1], acc[i, j + 2], acc[i, j + 3])


@cuda.jit(device=True)
def store_columns(tile, now, n, k, upper, lower):
    """tile[now, n, k : k + 2] and tile[now, n + 1, k : k + 2] from pairs of two rows, k and k + 1, of columns n, n + 1.

    upper: (X[k, n], X[k, n + 1]), lower: (X[k + 1, n], X[k + 1, n + 1]), each a uint32; n and k are even.
    """
    store_half2(tile, (now, n, k), (upper & 0xFFFF) | ((lower & 0xFFFF) << 16))
    store_half2(tile, (now, n + 1, k), (upper >> 16) | (lower & 0xFFFF0000))


@cuda.jit
def gemm_v5_tensor_core(A, B, C, M, N, K):
    """C = A @ B, rung 5: a warp multiplies 16 x 16 by 16 x 8 numbers with one instruction of its tensor core.

    A: (M, K), B: (K, N) float16, C: (M, N) float32, all C-contiguous; C overlaps neither. M, N, K: int32, at least 1.
    The arrays begin at a multiple of 16 bytes; K and N are best multiples of 8 (else elements are loaded one by one).
    Launch: ``gemm_v5_tensor_core[gemm_v5_launch(M, N)](…)``, 256 threads; sm_75 or later.

    The instruction takes pairs that run along k, as :func:`common.ptx.mma_m16n8k16` shows. A has them as it lies; B is
    stored transposed, (N, K): each thread brings 2 rows of 8 and stores 8 columns of 2.
    """
    a_tile = cuda.shared.array((2, TILE, MMA_PAD), float16, alignment=16)
    b_tile = cuda.shared.array((2, TILE, MMA_PAD), float16, alignment=16)
    acc = cuda.local.array((MMAS, MMAS, 4), float32)
    b = cuda.local.array((MMAS, 2), uint32)
    tid = cuda.threadIdx.x
    a_row, a_col = tid // 4, tid % 4 * 8  # and the same 64 rows further down
    b_row, b_col = tid % 16 * 2, tid // 16 * 8
    row0 = cuda.blockIdx.y * TILE
    col0 = cuda.blockIdx.x * TILE
    warp = tid // WARP
    warp_row = warp // WARPS_ALONG_N * WARP_ROWS
    warp_col = warp % WARPS_ALONG_N * WARP_COLS
    group = tid % WARP // 4
    two = tid % 4 * 2
    for m in range(MMAS):
        for n in range(MMAS):
            for e in range(4):
                acc[m, n, e] = float32(0)
    now = 0
    for k0 in range(-MMA_DEPTH, K, MMA_DEPTH):  # the first round only fills a buffer, the last fills one with zeros
        next_k = k0 + MMA_DEPTH
        p0, p1, p2, p3 = load_eight(A, row0 + a_row, next_k + a_col, M, K)
        q0, q1, q2, q3 = load_eight(A, row0 + HALF_TILE + a_row, next_k + a_col, M, K)
        r0, r1, r2, r3 = load_eight(B, next_k + b_row, col0 + b_col, K, N)
        s0, s1, s2, s3 = load_eight(B, next_k + b_row + 1, col0 + b_col, K, N)
        if k0 >= 0:
            for k in range(0, MMA_DEPTH, MMA_K):
                for n in range(MMAS):
                    col = warp_col + n * MMA_N + group
                    b[n, 0] = load_half2(b_tile, (now, col, k + two))
                    b[n, 1] = load_half2(b_tile, (now, col, k + two + 8))
                for m in range(MMAS):
                    row = warp_row + m * MMA_M + group
                    a0 = load_half2(a_tile, (now, row, k + two))
                    a1 = load_half2(a_tile, (now, row + 8, k + two))
                    a2 = load_half2(a_tile, (now, row, k + two + 8))
                    a3 = load_half2(a_tile, (now, row + 8, k + two + 8))
                    for n in range(MMAS):
                        acc[m, n, 0], acc[m, n, 1], acc[m, n, 2], acc[m, n, 3] = mma_m16n8k16(
                            a0, a1, a2, a3, b[n, 0], b[n, 1], acc[m, n, 0], acc[m, n, 1], acc[m, n, 2], acc[m, n, 3]
                        )
        now = 1 - now
        store_half8(a_tile, (now, a_row, a_col), p0, p1, p2, p3)
        store_half8(a_tile, (now, a_row + HALF_TILE, a_col), q0, q1, q2, q3)
        store_columns(b_tile, now, b_col, b_row, r0, s0)
        store_columns(b_tile, now, b_col + 2, b_row, r1, s1)
        store_columns(b_tile, now, b_col + 4, b_row, r2, s2)
        store_columns(b_tile, now, b_col + 6, b_row, r3, s3)
        cuda.syncthreads()
    for m in range(MMAS):
        for n in range(MMAS):
            for e in range(4):
                row = row0 + warp_row + m * MMA_M + e // 2 * 8 + group
                col = col0 + warp_col + n * MMA_N + two + e % 2
                if row < M and col < N:
                    C[row, col] = acc[m, n, e]


gemm_half = gemm_v5_tensor_core

gemm_half_reference = matmul_reference  # (M, K) and (K, N) float16, summed in float64; returns (M, N) float32
