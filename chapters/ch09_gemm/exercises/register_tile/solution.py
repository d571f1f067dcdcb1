"""Exercise ch09/register_tile: C = A.T @ B, with 4 x 4 elements of C in the registers of each thread.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch09/register_tile
"""

import numpy as np
from numba import cuda, float32

import common

SIDE = 8  # a block has SIDE x SIDE threads
EACH = 4  # a thread computes EACH x EACH elements of C
TILE = SIDE * EACH  # a block computes TILE x TILE elements of C
DEPTH = 8  # rows of A and of B that are in shared memory at a time


@cuda.jit
def matmul_tn(A, B, C, M, N, K):
    """C = A.T @ B: C[i, j] is column i of A times column j of B.

    A: (K, M), B: (K, N), C: (M, N), all float32, C-contiguous. M, N, K: at least 1, not always multiples of anything.
    Launched with one block of SIDE x SIDE threads for each TILE x TILE elements of C, columns along x.
    """
    # --- your code begins ---
    a_tile = cuda.shared.array((DEPTH, TILE), float32)
    b_tile = cuda.shared.array((DEPTH, TILE), float32)
    acc = cuda.local.array((EACH, EACH), float32)
    a = cuda.local.array(EACH, float32)
    b = cuda.local.array(EACH, float32)
    tx = cuda.threadIdx.x
    ty = cuda.threadIdx.y
    row0 = cuda.blockIdx.y * TILE
    col0 = cuda.blockIdx.x * TILE
    for i in range(EACH):
        for j in range(EACH):
            acc[i, j] = float32(0)
    for k0 in range(0, K, DEPTH):
        for i in range(EACH):
            x = tx + i * SIDE
            a_tile[ty, x] = A[k0 + ty, row0 + x] if k0 + ty < K and row0 + x < M else float32(0)
            b_tile[ty, x] = B[k0 + ty, col0 + x] if k0 + ty < K and col0 + x < N else float32(0)
        cuda.syncthreads()
        for k in range(DEPTH):
            for i in range(EACH):
                a[i] = a_tile[k, ty + i * SIDE]
                b[i] = b_tile[k, tx + i * SIDE]
            for i in range(EACH):
                for j in range(EACH):
                    acc[i, j] += a[i] * b[j]
        cuda.syncthreads()
    for i in range(EACH):
        for j in range(EACH):
            row = row0 + ty + i * SIDE
            col = col0 + tx + j * SIDE
            if row < M and col < N:
                C[row, col] = acc[i, j]
    # --- your code ends ---


# What follows is given: it launches your kernel.


def product(A, B):
    """A.T @ B, for A (K, M) and B (K, N), float32; returns (M, N) float32."""
    (K, M), N = A.shape, B.shape[1]
    C = cuda.to_device(np.full((M, N), -7, np.float32))
    grid = (N + TILE - 1) // TILE, (M + TILE - 1) // TILE
    matmul_tn[grid, (SIDE, SIDE)](cuda.to_device(A), cuda.to_device(B), C, M, N, K)
    return C.copy_to_host()


def traffic(A, B):
    """What `product` asks of memory, counted on the CPU backend: see `common.memory_report`.

    C: the product. elements: floats that threads read from A and B. shared: floats that threads read from shared
    memory. sectors, best: pieces of 32 bytes that reads of A and B and stores to C move, and as few as would do.
    """
    with common.memory_report() as report:
        C = product(A, B)
    in_global = [line for line in report.lines if line.space == "global"]
    return {
        "C": C,
        "elements": sum(line.threads for line in in_global if line.access == "read"),
        "shared": sum(line.threads for line in report.lines if line.space == "shared" and line.access == "read"),
        "sectors": sum(line.sectors for line in in_global),
        "best": sum(line.ideal_sectors for line in in_global),
    }
