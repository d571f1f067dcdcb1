"""Chapter 8, scans over one block: every sum so far, in parallel.

*Inclusive*: out[i] = x[0] + … + x[i]; *exclusive*: without x[i]. A scan turns "how many does each have?" into "where
does each begin?": it is how threads agree on places without atomics, and keep their order. Of at most 1024 elements:

=========================  =========  ====================================  ================  =========================
kernel                     scan       how                                   additions (1024)  barriers
=========================  =========  ====================================  ================  =========================
``scan_v1_hillis_steele``  inclusive  add the neighbour 1, 2, 4, … to the   9217, 10 steps    11
                                      left
``scan_v2_blelloch``       exclusive  a tree of sums upwards, then          2046, 20 steps    22
                                      prefixes downwards
``scan_v3_warp``           exclusive  shuffles in each warp, then over the  5281, 11 steps    3
                                      warps' totals
=========================  =========  ====================================  ================  =========================

v1 does log n times the additions needed; v2 hardly more than needed, but half of its threads idle, then three quarters,
…, with a barrier each time: to count additions is not to count time. v3 has the steps of v1, most without a barrier.

``warp_inclusive_scan`` and ``block_exclusive_scan`` are device functions for any kernel. Arrays of any length are in
``scan_array.py``.
"""

import numpy as np
from numba import cuda, int32

from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP
from common.ptx import add_same

TILE = 1024  # elements that a block scans
TILE_PADDED = TILE + TILE // WARP
PARTIAL = WARP + 1  # length of the array ``partial`` of block_exclusive_scan: a sum a warp, after a 0


# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def warp_inclusive_scan(value):
    """Sum of ``value`` over this lane and all lower ones of the warp: 5 shuffles. All 32 lanes must call it together.

    value: int32, int64, float32 or float64. A lane gets nothing from the lanes above it: they may hold anything.
    Source: Harris, Garland 2012, "Optimizing Parallel Prefix Operations for the Fermi Architecture".
    """
    lane = cuda.threadIdx.x % WARP
    for step in range(5):
        lower = cuda.shfl_up_sync(FULL_WARP, value, 1 << step)
        if lane >= 1 << step:
            value = add_same(lower, value)
    return value


@cuda.jit(device=True)
def block_exclusive_scan(value, partial):
    """Sum of ``value`` over all lower threads of a one-dimensional block, and over all of them: ``(before, total)``.

    value: int32, int64 or float32. partial: (PARTIAL,) of that type in shared memory, declared by the kernel; its
    contents do not matter, and it may be used again as soon as the call returns. The block must be a multiple of 32
    threads, and all must call it.
    """
    lane = cuda.threadIdx.x % WARP
    warp = cuda.threadIdx.x // WARP
    n_warps = cuda.blockDim.x // WARP
    through = warp_inclusive_scan(value)
    if lane == WARP - 1:
        partial[warp + 1] = through
    if cuda.threadIdx.x == 0:
        partial[0] = 0
    cuda.syncthreads()
    if warp == 0:  # the warps' totals are 32 numbers at most: one warp scans them
        warps_through = warp_inclusive_scan(partial[min(lane, n_warps - 1) + 1])
        cuda.syncwarp()  # a lane beyond the last warp has read that one's total, too: before it is written over
        if lane < n_warps:
            partial[lane + 1] = warps_through
    cuda.syncthreads()
    before = cuda.shfl_up_sync(FULL_WARP, through, 1)  # not through - value, which would round, and make NaN of inf
    if lane == 0:
        before = partial[0]
    before = add_same(partial[warp], before)
    total = partial[n_warps]
    cuda.syncthreads()  # all have read partial: from here on the next call may write it
    return before, total


# --- the ladder ------------------------------------------------------------------------------------------------------


def scan_block_launch(n, per_thread=1):
    """Launch configuration of the scans over one block: ``(grid, block)``, ``per_thread`` elements a thread.

    per_thread: 1, or 2 for :func:`scan_v2_blelloch`. Raises ValueError if ``n`` is not in 1 … TILE.
    """
    if not 1 <= n <= TILE:
        raise ValueError(
            f"n = {n}: one block scans 1 to {TILE} elements; use scan_array.scan for more, and no launch for none"
        )
    return 1, TILE // per_thread


@cuda.jit
def scan_v1_hillis_steele(x, out, n):
    """out[i] = x[0] + … + x[i], rung 1: in step s each thread adds the sum that ends 2^s places to its left.

    x, out: (n,) int32. n: int32, at most TILE. The sums change seats between two arrays: with one, a thread could read
    what its neighbour has already written, and it would take two barriers a step to forbid that.
    Launch: ``scan_v1_hillis_steele[scan_block_launch(n)](…)``. Source: Hillis and Steele 1986, "Data Parallel
    Algorithms".
    """
    sums = cuda.shared.array((2, TILE), int32)
    tid = cuda.threadIdx.x
    sums[0, tid] = x[tid] if tid < n else 0
    cuda.syncthreads()
    now = 0
    stride = 1
    while stride < TILE:
        value = sums[now, tid]
        if tid >= stride:
            value += sums[now, tid - stride]
        now = 1 - now
        sums[now, tid] = value
        cuda.syncthreads()
        stride *= 2
    if tid < n:
        out[tid] = sums[now, tid]


@cuda.jit(device=True)
def padded(i):
    """Where element i lies in an array with one unused place after every 32.

    The tree's level s touches every 2^s-th element: addresses that share few banks, or one. A place more in each 32
    moves them apart, as the 33rd column does in a transpose.
    """
    return i + i // WARP


@cuda.jit
def scan_v2_blelloch(x, out, n):
    """out[i] = x[0] + … + x[i - 1], rung 2: a tree of sums up to the root, then prefixes down to the leaves.

    x, out: (n,) int32. n: int32, at most TILE. On the way down a node hands its own prefix to its left child, and that
    plus the left child's sum to its right child.
    Launch: ``scan_v2_blelloch[scan_block_launch(n, 2)](…)``, a thread a pair. Source: Blelloch 1990, "Prefix Sums and
    Their Applications"; padding: Harris, Sengupta, Owens 2007, GPU Gems 3, chapter 39.
    """
    tree = cuda.shared.array(TILE_PADDED, int32)
    tid = cuda.threadIdx.x
    for i in range(tid, TILE, cuda.blockDim.x):
        tree[padded(i)] = x[i] if i < n else 0
    cuda.syncthreads()
    stride = 1
    while stride < TILE:
        right = (2 * tid + 2) * stride - 1  # the last leaf under this thread's node: the node's sum is kept there
        if right < TILE:
            tree[padded(right)] += tree[padded(right - stride)]
        cuda.syncthreads()
        stride *= 2
    if tid == 0:
        tree[padded(TILE - 1)] = 0  # nothing comes before the root
    cuda.syncthreads()
    stride = TILE // 2
    while stride > 0:
        right = (2 * tid + 2) * stride - 1
        if right < TILE:
            left_sum = tree[padded(right - stride)]
            tree[padded(right - stride)] = tree[padded(right)]
            tree[padded(right)] += left_sum
        cuda.syncthreads()
        stride //= 2
    for i in range(tid, n, cuda.blockDim.x):
        out[i] = tree[padded(i)]


@cuda.jit
def scan_v3_warp(x, out, n):
    """out[i] = x[0] + … + x[i - 1], rung 3: :func:`block_exclusive_scan`, warps by shuffles, then their totals.

    x, out: (n,) int32. n: int32, at most TILE. Launch: ``scan_v3_warp[scan_block_launch(n)](…)``.
    """
    partial = cuda.shared.array(PARTIAL, int32)
    tid = cuda.threadIdx.x
    value = int32(x[tid]) if tid < n else int32(0)
    before, _ = block_exclusive_scan(value, partial)
    if tid < n:
        out[tid] = before


scan_block = scan_v3_warp


def scan_reference(x, exclusive=False):
    """NumPy reference of all scans: (n,) int32, which wraps round, or float32, summed in float64; returns x's type."""
    sums = np.cumsum(x, dtype=np.int64 if x.dtype == np.int32 else np.float64)
    if exclusive:
        sums = np.concatenate([np.zeros(1, sums.dtype), sums[:-1]])
    return sums.astype(x.dtype)
