"""Chapter 7, reductions: many numbers to one, within a warp, then a block, then the grid."""

import numpy as np
from numba import cuda, float32

WARP = 32
FULL_WARP = 0xFFFFFFFF  # the mask of a shuffle: all 32 lanes take part


@cuda.jit(device=True)
def warp_sum(value):
    """Sum of ``value`` over the 32 lanes of a warp, the same bits in every lane."""
    for step in range(5):
        value += cuda.shfl_xor_sync(FULL_WARP, value, 16 >> step)
    return value


@cuda.jit(device=True)
def warp_max(value):
    """Largest ``value`` of the 32 lanes of a warp, in every lane."""
    for step in range(5):
        value = max(value, cuda.shfl_xor_sync(FULL_WARP, value, 16 >> step))
    return value


@cuda.jit(device=True)
def block_sum(value, partial):
    """Sum of ``value`` over the block, in every thread; ``partial``: (32,) float32 in shared memory."""
    lane = cuda.threadIdx.x % WARP
    value = warp_sum(value)
    if lane == 0:
        partial[cuda.threadIdx.x // WARP] = value
    cuda.syncthreads()
    value = float32(0)
    if lane < cuda.blockDim.x // WARP:
        value = partial[lane]
    value = warp_sum(value)  # every warp adds the same partial sums, so every thread has the result
    cuda.syncthreads()  # all have read ``partial``: the next call may write it
    return value


@cuda.jit(device=True)
def block_max(value, partial):
    """Largest ``value`` of the block, in every thread; ``partial``: (32,) float32 in shared memory."""
    lane = cuda.threadIdx.x % WARP
    value = warp_max(value)
    if lane == 0:
        partial[cuda.threadIdx.x // WARP] = value
    cuda.syncthreads()
    value = float32(-np.inf)
    if lane < cuda.blockDim.x // WARP:
        value = partial[lane]
    value = warp_max(value)
    cuda.syncthreads()
    return value
