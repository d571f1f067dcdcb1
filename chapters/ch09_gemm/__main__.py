"""The chapter's demo: ``make ch09``."""

import numpy as np
from numba import cuda

from chapters.ch09_gemm.bench import LADDERS, QUICK
from chapters.ch09_gemm.kernels import EACH, SIDE, gemm, gemm_launch
from chapters.ch09_gemm.tensor_core import MMA_K, MMA_M, MMA_N, gemm_half, gemm_v5_launch
from common import bench

print("reads from shared memory for each multiply-add, and flops for each byte of global memory:")
for each, name in ((1, "matmul_v3_any_shape"), (4, "gemm_v1_register_tile"), (EACH, "gemm_v2_vector_loads and later")):
    print(f"  {each} x {each} a thread: {2 / each:5} reads, {SIDE * each // 4:3} flops a byte   {name}")
print(f"multiply-adds of one instruction of a warp: 32; of one on a tensor core: {MMA_M * MMA_N * MMA_K}")

M, N, K = 3, 40, 5000
A, B = np.ones((M, K), np.float32), np.ones((K, N), np.float32)
C = cuda.device_array((M, N), np.float32)
gemm[gemm_launch(M, N)](cuda.to_device(A), cuda.to_device(B), C, M, N, K)
print(f"\nA and B full of ones, K = {K}: C[0, 0] is")
print(f"  {C.copy_to_host()[0, 0]:.0f}  float32")
A16, B16 = A.astype(np.float16), B.astype(np.float16)
gemm_half[gemm_v5_launch(M, N)](cuda.to_device(A16), cuda.to_device(B16), C, M, N, K)
print(f"  {C.copy_to_host()[0, 0]:.0f}  inputs in float16, sums in float32 (tensor core; emulated on a CPU)")
total = np.float16(0)
for k in range(K):
    total = np.float16(total + A16[0, k] * B16[k, 0])
print(f"  {total:.0f}  sums in float16, too")
bench.show(LADDERS, QUICK)
