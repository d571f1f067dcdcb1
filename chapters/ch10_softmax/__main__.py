"""The chapter's demo: ``make ch10``."""

import numpy as np
from numba import cuda, float32

from chapters.ch10_softmax import kernels as ch10
from chapters.ch10_softmax.bench import LADDERS, QUICK
from common import bench


@cuda.jit
def running_pairs(row, pairs):
    """pairs[i] = the pair (largest, total) of row[0], …, row[i]; a single thread does it."""
    largest = ch10.LOWEST
    total = float32(0)
    for i in range(row.size):
        largest, total = ch10.online_add(largest, total, row[i])
        pairs[i, 0] = largest
        pairs[i, 1] = total


x = np.array([[2, 1, 4, 3], [86.5, 85.5, 88.5, 87.5], [90, 89, 92, 91], [-110, -111, -108, -109]], np.float32)
print("four rows of four numbers, each a shifted copy of the first: their softmax is the same")
print(f"  {'row':22} {'straight from the definition':28} with the largest subtracted")
outs = []
for kernel in (ch10.softmax_v1_naive, ch10.softmax_v2_stable):
    out = cuda.device_array(x.shape, np.float32)
    kernel[ch10.softmax_launch(len(x))](cuda.to_device(x), out, x.shape[1])
    outs.append(out.copy_to_host())
for row, naive, stable in zip(x, *outs):
    shown = ["  ".join(f"{value:.3f}" for value in result) for result in (naive, stable)]
    print(f"  {' '.join(f'{value:g}' for value in row):22} {shown[0]:28} {shown[1]}")

pairs = cuda.device_array((4, 2), np.float32)
running_pairs[1, 1](cuda.to_device(x[0]), pairs)
pairs = pairs.copy_to_host()
print("\nlargest element and sum of exponentials in one pass over 2 1 4 3:")
for value, (largest, total) in zip(x[0], pairs):
    print(f"  after {value:.0f}: largest {largest:.0f}, total {total:.3f}")
print(f"  in two passes: largest {x[0].max():.0f}, total {np.exp(x[0] - x[0].max()).sum():.3f}\n")
bench.show(LADDERS, QUICK)
