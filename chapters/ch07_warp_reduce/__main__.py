"""The chapter's demo: ``make ch07``."""

import numpy as np
from numba import cuda

from chapters.ch07_warp_reduce.argmax import argmax_launch, argmax_row
from chapters.ch07_warp_reduce.bench import LADDERS, QUICK
from chapters.ch07_warp_reduce.kernels import sum_kernel, sum_launch, sum_reference
from chapters.ch07_warp_reduce.norms import layernorm_launch, layernorm_row
from common import bench

n = 1_000_000
x = np.random.default_rng(7).random(n, dtype=np.float32)
total = cuda.to_device(np.zeros(1, np.float32))
grid, block = sum_launch(n)
sum_kernel[grid, block](cuda.to_device(x), total, n)
print(f"the sum of {n} numbers between 0 and 1, by {grid} blocks of {block} threads and {grid} atomics:")
print(f"  sum_kernel {total.copy_to_host()[0]:.3f}, one chain {np.cumsum(x)[-1]:.3f}, exact {sum_reference(x):.3f}")

rows = np.array([[3, 9, 4, 9, 1], [-5, -2, -8, -2, -2]], np.float32)
where = cuda.device_array(2, np.int32)
argmax_row[argmax_launch(*rows.shape)](cuda.to_device(rows), where, rows.shape[1])
print("\nrow            largest at   layer norm (weight 1, bias 0)")
ones, zeros = cuda.to_device(np.ones(5, np.float32)), cuda.to_device(np.zeros(5, np.float32))
normal = cuda.device_array(rows.shape, np.float32)
layernorm_row[layernorm_launch(*rows.shape)](cuda.to_device(rows), ones, zeros, normal, 5, np.float32(1e-5))
for row, column, out in zip(rows, where.copy_to_host(), normal.copy_to_host()):
    print(" ".join(f"{v:2.0f}" for v in row) + f"  column {column}     " + " ".join(f"{v:+.2f}" for v in out))

offset = np.float32(4096) + np.array([-1, 1] * 384, np.float32)  # its variance is 1
squares = (offset * offset).mean() - offset.mean() ** 2
distances = ((offset - offset.mean()) ** 2).mean()
print(f"\nvariance of numbers 4096 ± 1 in float32: mean(x²) - mean(x)² = {squares:g}, from distances {distances:g}")
bench.show(LADDERS, QUICK)
