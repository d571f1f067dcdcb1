"""The chapter's demo: ``make ch06``."""

import numpy as np
from numba import cuda

from chapters.ch06_shared_tile.bench import LADDERS, QUICK
from chapters.ch06_shared_tile.kernels import TILE, matmul_kernel, matmul_launch
from common import bench

M, N, K = 3, 40, 20
A = np.repeat(np.arange(1, M + 1, dtype=np.float32)[:, None], K, axis=1)  # rows of 1, of 2, of 3
B = np.ones((K, N), np.float32)
C = cuda.device_array((M, N), np.float32)
grid, block = matmul_launch(M, N)
matmul_kernel[grid, block](cuda.to_device(A), cuda.to_device(B), C, M, N, K)
print(f"({M}, {K}) @ ({K}, {N}): {grid[0] * grid[1]} blocks of {block[0]} x {block[1]} threads, {-(-K // TILE)} rounds")
print(f"first column of C, 20 times 1, 2 and 3: {C.copy_to_host()[:, 0].astype(int)}")
print(f"threads with an element of C: {M * N} of {grid[0] * grid[1] * TILE * TILE}; the others only help to load")

size = 1024
naive = 2 * size**3  # a row of A and a column of B for each element of C
asked = {"one thread an element": naive, f"tiles of {TILE} x {TILE}": naive / TILE, "each float once": 2 * size**2}
print(f"\nfloats of A and B that a {size} x {size} product asks of global memory, in millions:")
print("  " + ", ".join(f"{how} {floats / 1e6:.1f}" for how, floats in asked.items()))
bench.show(LADDERS, QUICK)
