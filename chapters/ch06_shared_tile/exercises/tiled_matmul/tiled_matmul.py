"""Exercise ch06/tiled_matmul: C = A @ B.T, with a shared tile of A and one of B.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch06/tiled_matmul
"""

import numpy as np
from numba import cuda, float32

import common

TILE = 16  # a block has TILE x TILE threads and computes TILE x TILE elements of C
PADDED = TILE + 1  # the shape of a shared array is made of numbers and names: TILE + 1 cannot stand there


@cuda.jit
def matmul_nt(A, B, C, M, N, K):
    """C = A @ B.T: C[i, j] is row i of A times row j of B.

    A: (M, K), B: (N, K), C: (M, N), all float32, C-contiguous. M, N, K: at least 1, not always multiples of TILE.
    Launched with one thread an element of C, columns along x, in blocks of TILE x TILE.
    """
    # --- your code begins ---
    raise NotImplementedError("your code")
    # --- your code ends ---


# What follows is given: it launches your kernel.


def product(A, B):
    """A @ B.T, for A (M, K) and B (N, K), float32; returns (M, N) float32."""
    (M, K), N = A.shape, len(B)
    C = cuda.to_device(np.full((M, N), -7, np.float32))
    grid = (N + TILE - 1) // TILE, (M + TILE - 1) // TILE
    matmul_nt[grid, (TILE, TILE)](cuda.to_device(A), cuda.to_device(B), C, M, N, K)
    return C.copy_to_host()


def traffic(A, B):
    """What `product` asks of memory, counted on the CPU backend: see `common.memory_report`.

    C: the product. elements: floats that threads read from A and from B. sectors, best: pieces of 32 bytes that these
    reads move, and as few as would do. turns, free: turns that shared memory takes, and as many without bank conflicts.
    """
    with common.memory_report() as report:
        C = product(A, B)
    reads = [line for line in report.lines if line.space == "global" and line.access == "read"]
    shared = [line for line in report.lines if line.space == "shared"]
    return {
        "C": C,
        "elements": sum(line.threads for line in reads),
        "sectors": sum(line.sectors for line in reads),
        "best": sum(line.ideal_sectors for line in reads),
        "turns": sum(line.wavefronts for line in shared),
        "free": sum(line.ideal_wavefronts for line in shared),
    }
