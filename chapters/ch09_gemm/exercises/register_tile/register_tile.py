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
    raise NotImplementedError("your code")
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
