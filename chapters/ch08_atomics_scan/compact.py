"""Chapter 8, stream compaction: keep the elements greater than a threshold, closed up, with their places in x.

Every element kept needs a place of its own in the output. Either it draws the next number from a counter, or it counts
the elements kept before it: a scan of flags. The counter is one pass, but hands out numbers to whoever comes first.

=============================  ==========================  ==========  ===============================================
kernel                         atomics                     order       when it loses
=============================  ==========================  ==========  ===============================================
``compact_v1_atomic``          one an element kept         any         many elements kept: all queue at the counter
``compact_v2_warp_atomic``     one for 128 elements read   any         large arrays: the counter again; where order,
                                                                       or the same order twice, matters
``compact_v3_count``, then     none                        as in x     few elements: three launches; x is read twice
``scan_tile_offsets``, then
``compact_v3_scatter``
=============================  ==========================  ==========  ===============================================

Within a warp no scan is needed: a ballot gives every lane the 32 flags as the bits of one number, and the bits below a
lane's own, counted (``popc``), are the flags before it. NaN is greater than nothing and is never kept.
"""

import numpy as np
from numba import cuda, float32, int32

from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP
from common.ptx import add_same

from .scan_array import TILE, scan_launch, scan_offsets_launch, scan_tile_offsets, tiles_of

COMPACT_THREADS = 256
COMPACT_BLOCKS = 1024
COMPACT_ROWS = 4  # of 32 elements: what a warp reads at once


def compact_launch(n):
    """Launch configuration of the versions with a counter for ``n`` elements: ``(grid, block)``.

    Raises ValueError if ``n`` is not positive.
    """
    if n <= 0:
        raise ValueError(f"n = {n}: a launch needs at least 1 element; of none, none are kept")
    elements = COMPACT_ROWS * COMPACT_THREADS
    return min((n + elements - 1) // elements, COMPACT_BLOCKS), COMPACT_THREADS


@cuda.jit
def clear_count(count):
    """count[0] = 0, so that the next launch of a version with a counter begins anew; nothing is copied from the host.

    count: (1,) int32. Launch: ``clear_count[1, 1](count)``.
    """
    count[0] = 0


@cuda.jit
def compact_v1_atomic(x, values, indices, count, n, threshold):
    """values = the elements of x above threshold, indices = where they were, rung 1: each draws a number from count.

    x: (n,) float32. values: (n,) float32 and indices: (n,) int32; what lies behind the elements kept is not written.
    count: (1,) int32, set to 0 before the launch; then how many are kept. n: int32. threshold: float32.
    The order is that of the atomics: on a GPU another one each run. All lanes want one address, and NVIDIA's compiler
    sees it: it lets a warp draw once for its lanes. Where the address is in the data, as in a histogram, it cannot.
    Launch: ``compact_v1_atomic[compact_launch(n)](…)``.
    """
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        value = x[i]
        if value > float32(threshold):
            place = cuda.atomic.add(count, 0, 1)
            values[place] = value
            indices[place] = i


@cuda.jit(device=True)
def write_kept(kept, value, i, values, indices, place):
    """Writes the elements of the lanes that ``kept`` names, a ballot, from ``place`` on, in the lanes' order.

    Returns the place behind them, alike in all lanes.
    """
    if (kept >> (cuda.threadIdx.x % WARP)) & 1:
        mine = place + cuda.popc(kept & cuda.lanemask_lt())
        values[mine] = value
        indices[mine] = i
    return place + cuda.popc(kept)


@cuda.jit
def compact_v2_warp_atomic(x, values, indices, count, n, threshold):
    """values = the elements of x above threshold, rung 2: a warp draws numbers for all that it keeps of 128 elements.

    Arguments as :func:`compact_v1_atomic`. The order is kept within 128 elements, and any beyond that.
    Launch: ``compact_v2_warp_atomic[compact_launch(n)](…)``. Source: Adinetz 2014, "CUDA Pro Tip: Optimized Filtering
    with Warp-Aggregated Atomics".
    """
    values_ahead = cuda.local.array(COMPACT_ROWS, float32)  # in registers: loops of known length are unrolled
    kept = cuda.local.array(COMPACT_ROWS, int32)
    limit = float32(threshold)
    lane = cuda.threadIdx.x % WARP
    warp = cuda.grid(1) // WARP
    n_warps = cuda.gridsize(1) // WARP
    for first in range(warp * COMPACT_ROWS * WARP, n, n_warps * COMPACT_ROWS * WARP):
        for row in range(COMPACT_ROWS):  # all reads are under way before the first is needed
            values_ahead[row] = x[min(first + row * WARP + lane, n - 1)]
        total = int32(0)
        for row in range(COMPACT_ROWS):
            inside = first + row * WARP + lane < n
            kept[row] = cuda.ballot_sync(FULL_WARP, inside and values_ahead[row] > limit)
            total += cuda.popc(kept[row])
        if total > 0:
            place = int32(0)
            if lane == 0:
                place = cuda.atomic.add(count, 0, total)
            place = cuda.shfl_sync(FULL_WARP, place, 0)
            for row in range(COMPACT_ROWS):
                place = write_kept(kept[row], values_ahead[row], first + row * WARP + lane, values, indices, place)


@cuda.jit
def compact_v3_count(x, counts, n, threshold):
    """counts[t] = how many of the t-th 1024 elements of x are above threshold, rung 3's first launch; a warp each.

    x: (n,) float32. counts: (scan_scratch(n),) int32. n: int32. threshold: float32.
    Launch: ``compact_v3_count[scan_launch(n)](…)``.
    """
    limit = float32(threshold)
    lane = cuda.threadIdx.x % WARP
    tile = cuda.grid(1) // WARP
    begin = tile * TILE
    if begin < n:
        mine = int32(0)
        for i in range(begin + lane, min(begin + TILE, n), WARP):
            if x[i] > limit:
                mine += 1
        kept = int32(mine)  # mine is an int64, as every sum of Numba's: shuffles of 32 bits take half as long
        for step in range(5):
            kept = add_same(kept, cuda.shfl_xor_sync(FULL_WARP, kept, 16 >> step))
        if lane == 0:
            counts[tile] = kept


@cuda.jit
def compact_v3_scatter(x, counts, values, indices, n, threshold):
    """values = the elements of x above threshold in their order, indices = where they were: rung 3's last launch.

    x, values, indices, n, threshold as :func:`compact_v1_atomic`. counts: (scan_scratch(n),) int32, how many are kept
    before each tile, from scan_tile_offsets. Launch: ``compact_v3_scatter[scan_launch(n)](…)``.
    """
    values_ahead = cuda.local.array(COMPACT_ROWS, float32)
    limit = float32(threshold)
    lane = cuda.threadIdx.x % WARP
    tile = cuda.grid(1) // WARP
    begin = tile * TILE
    if begin < n:
        end = min(begin + TILE, n)
        place = counts[tile]
        for first in range(begin, end, COMPACT_ROWS * WARP):
            for row in range(COMPACT_ROWS):
                values_ahead[row] = x[min(first + row * WARP + lane, end - 1)]
            for row in range(COMPACT_ROWS):
                i = first + row * WARP + lane
                kept = cuda.ballot_sync(FULL_WARP, i < end and values_ahead[row] > limit)
                place = write_kept(kept, values_ahead[row], i, values, indices, place)


def compact(x, counts, values, indices, n, threshold, stream=0):
    """Rung 3, all three launches: the elements of x above threshold, in their order; the result stays on the device.

    x: (n,) float32. counts: (scan_scratch(n),) int32, working memory; afterwards counts[tiles_of(n)] is how many are
    kept. values: (n,) float32, indices: (n,) int32. All are device arrays. Raises ValueError if ``n`` is not positive.
    """
    grid, block = scan_launch(n)
    compact_v3_count[grid, block, stream](x, counts, n, threshold)
    one, threads = scan_offsets_launch()
    scan_tile_offsets[one, threads, stream](counts, tiles_of(n))
    compact_v3_scatter[grid, block, stream](x, counts, values, indices, n, threshold)


def compact_reference(x, threshold):
    """NumPy reference of all versions: (n,) float32; returns (values, indices) in the order of x, float32 and int32."""
    indices = np.flatnonzero(x > np.float32(threshold))
    return x[indices], indices.astype(np.int32)
