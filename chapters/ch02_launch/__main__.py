"""The chapter's demo: ``make ch02``."""

import numpy as np
from numba import cuda

from chapters.ch02_launch.bench import LADDERS, QUICK
from chapters.ch02_launch.kernels import blocks_for, double_kernel, hello_kernel
from common import bench

n, threads = 100, 64
blocks = blocks_for(n, threads)
idle = blocks * threads - n
print(f"hello_kernel[{blocks}, {threads}] on n = {n}: {blocks * threads} threads, {idle} of them with nothing to do")
who = cuda.device_array((n, 4), np.int32)  # on the device
hello_kernel[blocks, threads](who, n)
who = who.copy_to_host()  # waits for the kernel
for i in (0, 1, 31, 32, 63, 64, 99):
    block, thread, warp, lane = who[i]
    print(f"  thread number {i:2} is thread {thread:2} of block {block}: warp {warp}, lane {lane:2}")

x = np.arange(8, dtype=np.float32)
device_x = cuda.to_device(x)  # host to device
double_kernel[blocks_for(x.size, threads), threads](device_x, x.size)
print(f"doubled on the device: {x.astype(int)} -> {device_x.copy_to_host().astype(int)}")
print()
bench.show(LADDERS, QUICK)
