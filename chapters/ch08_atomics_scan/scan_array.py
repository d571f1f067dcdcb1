"""Chapter 8, the scan of an array of any length: *reduce, then scan*, in three launches (``scan``).

======================  ==========================================  ===============================
kernel                  what it does                                bytes moved (4-byte elements)
======================  ==========================================  ===============================
``scan_tile_sums``      the sum of each tile of 1024, a warp each   4 n read
``scan_tile_offsets``   exclusive scan of these sums, one block     (8 read + 4 written) * n / 1024
``scan_tiles``          each tile again, from its offset on         4 n read, 4 n written
======================  ==========================================  ===============================

A block knows nothing of the blocks before it until a launch ends, so x is read twice: 12 bytes an element where 8 are
needed. One pass is possible if a tile waits until an earlier one has published its sum (Merrill and Garland 2016,
"Single-pass Parallel Prefix Scan with Decoupled Look-back"); but then blocks wait for blocks, and CUDA's model
does not promise that the earlier block runs. Few elements lose as well: three launches take longer than they do.

Integers are exact (and wrap round as int32 does). Floats are added in a fixed order, so every run gives the same bits:
a tile's sum lane by lane (every 32nd element), then the lanes in the tree of ``warp_inclusive_scan``; within a tile, 32
neighbours in that tree, then from one 32 to the next in turn. Where a tile begins the order changes, so that an output
may be an ulp or so less than the one before it even if no x is negative.
"""

from numba import cuda

from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP
from common.ptx import add_same

from .scan import warp_inclusive_scan

TILE = 1024  # elements that a warp scans
SCAN_THREADS = 256
OFFSETS_THREADS = 1024
OFFSETS_WARPS = OFFSETS_THREADS // WARP
ROWS = 4  # of 32 elements: what a warp reads at once


# --- launch configurations -------------------------------------------------------------------------------------------


def tiles_of(n):
    """How many tiles ``n`` elements make.

    Raises ValueError if ``n`` is not positive.
    """
    if n <= 0:
        raise ValueError(f"n = {n}: a launch needs at least 1 element; a scan of none is empty")
    return (n + TILE - 1) // TILE


def scan_scratch(n):
    """How long the array ``sums`` must be to scan ``n`` elements: a sum a tile, the total, and 32 for the warps.

    Raises ValueError if ``n`` is not positive.
    """
    return tiles_of(n) + 1 + OFFSETS_WARPS


def scan_launch(n):
    """Launch configuration of :func:`scan_tile_sums` and :func:`scan_tiles`: ``(grid, block)``, a warp a tile.

    Raises ValueError if ``n`` is not positive.
    """
    warps = SCAN_THREADS // WARP
    return (tiles_of(n) + warps - 1) // warps, SCAN_THREADS


def scan_offsets_launch():
    """Launch configuration of :func:`scan_tile_offsets`: ``(grid, block)``, one block."""
    return 1, OFFSETS_THREADS


# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def warp_range_sum(x, begin, end):
    """x[begin] + … + x[end - 1] by the lanes of a warp, returned in every lane; begin < end."""
    first = begin + cuda.threadIdx.x % WARP
    total = x[min(first, end - 1)]  # a lane past the end holds a number too, but a scan hands it to no lane below
    for i in range(first + WARP, end, WARP):
        total = add_same(total, x[i])
    total = warp_inclusive_scan(total)
    return cuda.shfl_sync(FULL_WARP, total, min(end - begin, WARP) - 1)


@cuda.jit(device=True)
def pick(row, a, b, c, d):
    """The one of four values that ``row`` names. Once the loop over rows is unrolled, nothing of this is left."""
    return (a if row == 0 else b) if row < 2 else (c if row == 2 else d)


@cuda.jit(device=True)
def warp_range_scan(x, out, begin, end, carry, exclusive):
    """Scan of x[begin … end - 1] on top of ``carry`` by the lanes of a warp; ``out`` may be ``x``; begin < end."""
    lane = cuda.threadIdx.x % WARP
    last = end - 1
    for first in range(begin + lane, end + lane, ROWS * WARP):
        a = x[min(first, last)]  # four reads are under way before the first is needed
        b = x[min(first + WARP, last)]
        c = x[min(first + 2 * WARP, last)]
        d = x[min(first + 3 * WARP, last)]
        cuda.syncwarp()  # all lanes have read, also x[last], before one of them writes: ``out`` may be ``x``
        for row in range(ROWS):
            through = add_same(carry, warp_inclusive_scan(pick(row, a, b, c, d)))
            before = cuda.shfl_up_sync(FULL_WARP, through, 1)
            if lane == 0:
                before = carry
            i = first + row * WARP
            if i < end:
                out[i] = before if exclusive else through
            carry = cuda.shfl_sync(FULL_WARP, through, WARP - 1)


# --- the three launches ----------------------------------------------------------------------------------------------


@cuda.jit
def scan_tile_sums(x, sums, n):
    """sums[t] = sum of the t-th 1024 elements of x, a warp each.

    x: (n,) int32 or float32. sums: (scan_scratch(n),) of the same type. n: int32.
    Launch: ``scan_tile_sums[scan_launch(n)](…)``.
    """
    tile = cuda.grid(1) // WARP
    begin = tile * TILE
    if begin < n:
        total = warp_range_sum(x, begin, min(begin + TILE, n))
        if cuda.threadIdx.x % WARP == 0:
            sums[tile] = total


@cuda.jit
def scan_tile_offsets(sums, tiles):
    """sums[t] = sums[0] + … + sums[t - 1] in place, and sums[tiles] = the total; one block.

    sums: (tiles + 33,) int32 or float32. tiles: int32. Each warp takes a stretch, first its sum, then its scan: what
    the whole grid does to x. The warps meet in the last 33 places of ``sums``, once; shared memory would be faster, but
    it has one type, and this kernel takes any.
    Launch: ``scan_tile_offsets[scan_offsets_launch()](…)``, 1024 threads exactly.
    """
    lane = cuda.threadIdx.x % WARP
    warp = cuda.threadIdx.x // WARP
    stretch = (tiles + OFFSETS_WARPS - 1) // OFFSETS_WARPS
    begin = warp * stretch
    end = min(begin + stretch, tiles)
    if cuda.threadIdx.x == 0:
        sums[tiles] = 0
    if lane == 0:
        sums[tiles + 1 + warp] = 0  # for warps with an empty stretch
    cuda.syncwarp()
    if begin < end:
        total = warp_range_sum(sums, begin, end)
        if lane == 0:
            sums[tiles + 1 + warp] = total
    cuda.syncthreads()  # holds for global memory too, within a block
    if warp == 0:
        sums[tiles + 1 + lane] = warp_inclusive_scan(sums[tiles + 1 + lane])
    cuda.syncthreads()
    carry = sums[tiles + warp]
    total = sums[tiles + OFFSETS_WARPS]
    cuda.syncthreads()  # all have their carry: its places may be written
    if begin < end:
        warp_range_scan(sums, sums, begin, end, carry, 1)
    if cuda.threadIdx.x == 0:
        sums[tiles] = total


@cuda.jit
def scan_tiles(x, sums, out, n, exclusive):
    """out[i] = x[0] + … + x[i], without x[i] if ``exclusive``, from the offsets of the tiles.

    x, out: (n,) int32 or float32; ``out`` may be ``x`` itself. sums: (scan_scratch(n),), from scan_tile_offsets.
    n, exclusive: int32. Launch: ``scan_tiles[scan_launch(n)](…)``.
    """
    tile = cuda.grid(1) // WARP
    begin = tile * TILE
    if begin < n:
        warp_range_scan(x, out, begin, min(begin + TILE, n), sums[tile], exclusive)


def scan(x, sums, out, n, exclusive=False, stream=0):
    """Scan of any length in three launches; the result stays on the device.

    x, out: (n,) int32 or float32; ``out`` may be ``x`` itself. sums: (scan_scratch(n),) of the same type, working
    memory; afterwards sums[tiles_of(n)] is the sum of all. All are device arrays. Raises ValueError if ``n`` is not
    positive.
    """
    grid, block = scan_launch(n)
    scan_tile_sums[grid, block, stream](x, sums, n)
    one, threads = scan_offsets_launch()
    scan_tile_offsets[one, threads, stream](sums, tiles_of(n))
    scan_tiles[grid, block, stream](x, sums, out, n, int(exclusive))
