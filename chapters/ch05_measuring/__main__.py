"""The chapter's demo: ``make ch05``."""

from types import SimpleNamespace

import common  # picks the backend: before numba.cuda

# isort: split
import numpy as np
from numba import cuda

from chapters.ch03_indexing.kernels import blocks_grid_stride, vector_add
from chapters.ch05_measuring import timing
from chapters.ch05_measuring.bench import LADDERS, QUICK
from chapters.ch05_measuring.occupancy import LIMITS, occupancy
from chapters.ch05_measuring.streams import overlap
from common import bench

n = 1 << 18
fresh = timing.fresh_kernel(vector_add)


def host(_=0):
    return SimpleNamespace(x=np.ones(n, np.float32), y=np.ones(n, np.float32), out=np.zeros(n, np.float32))


def device(_=0):
    return SimpleNamespace(**{name: cuda.to_device(array) for name, array in vars(host()).items()})


def launch(a):
    fresh[blocks_grid_stride(n)](a.x, a.y, a.out, n)


print(f"how long does it take to add two vectors of {n} floats? milliseconds:")
one = device()
print(f"  wrong, with the compiler:      {timing.time_wrong_with_compile(launch, one):10.4f}")
print(f"  wrong, without waiting:        {timing.time_wrong_no_sync(launch, one):10.4f}")
print(f"  wrong, always the same arrays: {timing.time_wrong_same_array(launch, one).median:10.4f}")
print(f"  with copies there and back:    {timing.time_with_copies(launch, host()):10.4f}")
print(f"  right:                         {timing.time_right(launch, timing.input_sets(device, 12 * n)).median:10.4f}")

if common.BACKEND != "gpu":
    print("  (no queue here: a launch returns when its work is done, so not waiting does no harm)")

print("\noccupancy of a kernel of 40 registers in blocks of 256 threads with 20 KiB of shared memory:")
for arch in LIMITS:
    found = occupancy(256, 40, 20 << 10, arch)
    print(f"  {arch}: {found.blocks} blocks, {found.warps} warps, {found.share:4.0%}, limited by {found.limit}")

found = overlap(n=1 << 20, rounds=3)
print("\nthe same copy, kernel, copy in order and in chunks on three streams, milliseconds:")
print(f"  in order {found.in_order:.2f}, in chunks {found.overlapped:.2f}, the longest part alone {found.ideal:.2f}")
bench.show(LADDERS, QUICK)
