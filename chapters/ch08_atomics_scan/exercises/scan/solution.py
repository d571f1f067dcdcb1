"""Exercise ch08/scan: the inclusive scan of an array of any length, in three launches.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch08/scan
"""

import numpy as np
from numba import cuda, int32

import common
from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP

THREADS = 1024  # of a block, which scans so many elements: 32 warps of 32 lanes


# --- your code begins (optional) ---
@cuda.jit(device=True)
def scan_warp(value):
    lane = cuda.threadIdx.x % WARP
    for step in range(5):
        lower = cuda.shfl_up_sync(FULL_WARP, value, 1 << step)
        if lane >= 1 << step:
            value += lower
    return value


# --- your code ends ---


@cuda.jit
def scan_blocks(x, out, sums, n):
    """Each block scans its own THREADS elements: out[i] = the sum of x from the block's first element to x[i].

    x, out: (n,) int32. sums: (blocks,) int32: sums[b] = the sum of all elements of block b. n: at least 1. Launched
    with one thread an element, in blocks of THREADS; the last block may have fewer elements than threads.
    """
    # --- your code begins ---
    totals = cuda.shared.array(WARP, int32)
    tid = cuda.threadIdx.x
    lane = tid % WARP
    warp = tid // WARP
    i = cuda.grid(1)
    value = x[i] if i < n else int32(0)
    value = scan_warp(value)
    if lane == WARP - 1:
        totals[warp] = value
    cuda.syncthreads()
    if warp == 0:
        totals[lane] = scan_warp(totals[lane])
    cuda.syncthreads()
    if warp > 0:
        value += totals[warp - 1]
    if i < n:
        out[i] = value
    if tid == THREADS - 1:
        sums[cuda.blockIdx.x] = value
    # --- your code ends ---


@cuda.jit
def add_offsets(out, through, n):
    """Add to each element of out what lies before its block.

    out: (n,) int32, as scan_blocks has left it. through: (blocks,) int32, through[b] = the sum of all elements of the
    blocks 0 to b. Launched like scan_blocks.
    """
    # --- your code begins ---
    i = cuda.grid(1)
    if cuda.blockIdx.x > 0 and i < n:
        out[i] += through[cuda.blockIdx.x - 1]
    # --- your code ends ---


# What follows is given: it launches your kernels.


def filled(n):
    return cuda.to_device(np.full(n, -7, np.int32))


def block_scans(x):
    """What the first launch leaves for x (n,) int32: ``[out, sums]``."""
    blocks = (len(x) + THREADS - 1) // THREADS
    out, sums = filled(len(x)), filled(blocks)
    scan_blocks[blocks, THREADS](cuda.to_device(x), out, sums, len(x))
    return [out.copy_to_host(), sums.copy_to_host()]


def scan(x):
    """The inclusive scan of x (n,) int32, n from 1 to THREADS * THREADS: (n,) int32."""
    n = len(x)
    blocks = (n + THREADS - 1) // THREADS
    out, sums, through, total = filled(n), filled(blocks), filled(blocks), filled(1)
    scan_blocks[blocks, THREADS](cuda.to_device(x), out, sums, n)  # each block by itself
    scan_blocks[1, THREADS](sums, through, total, blocks)  # the blocks' sums: an array like any other
    add_offsets[blocks, THREADS](out, through, n)
    return out.copy_to_host()


def traffic(x):
    """What `block_scans` asks of memory, counted on the CPU backend: see `common.memory_report`.

    out: the first of its results. elements: how often threads read an element of an array in global memory. requests:
    how many instructions of warps read or write shared memory, with one lane or all 32.
    """
    with common.memory_report() as report:
        out, _ = block_scans(x)
    return {
        "out": out,
        "elements": sum(line.threads for line in report.lines if line.space == "global" and line.access == "read"),
        "requests": sum(line.requests for line in report.lines if line.space == "shared"),
    }
