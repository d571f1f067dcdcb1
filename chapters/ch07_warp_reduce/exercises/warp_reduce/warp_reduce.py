"""Exercise ch07/warp_reduce: the smallest and the largest element of each row, by shuffles.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch07/warp_reduce
"""

import math

import numpy as np
from numba import cuda, float32

import common
from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP

# --- your code begins (optional) ---
# --- your code ends ---


@cuda.jit
def row_range(x, low, high, cols):
    """low[r] = the smallest element of row r of x, high[r] = the largest; one block a row.

    x: (rows, cols) float32, without NaN; ±inf may be there. low, high: (rows,) float32. cols: at least 1.
    Launched with one block a row, of any multiple of WARP threads from 32 to 1024, whatever cols is.
    """
    # --- your code begins ---
    raise NotImplementedError("your code")
    # --- your code ends ---


# What follows is given: it launches your kernel.


def ranges(x, threads):
    """The smallest and the largest element of each row of x (rows, cols) float32, as an array (2, rows)."""
    rows, cols = x.shape
    low, high = (cuda.to_device(np.full(rows, np.nan, np.float32)) for _ in range(2))
    row_range[rows, threads](cuda.to_device(x), low, high, cols)
    return np.stack([low.copy_to_host(), high.copy_to_host()])


def traffic(x, threads):
    """What `ranges` asks of memory, counted on the CPU backend: see `common.memory_report`.

    ranges: the result. elements: floats that threads read from x. sectors, best: pieces of 32 bytes that these reads
    move, and as few as would do. stored: numbers that threads store in shared memory. atomics: atomic operations.
    """
    with common.memory_report() as report:
        result = ranges(x, threads)
    reads = [line for line in report.lines if line.space == "global" and line.access == "read"]
    return {
        "ranges": result,
        "elements": sum(line.threads for line in reads),
        "sectors": sum(line.sectors for line in reads),
        "best": sum(line.ideal_sectors for line in reads),
        "stored": sum(line.threads for line in report.lines if line.space == "shared" and line.access == "write"),
        "atomics": sum(line.threads for line in report.lines if line.access == "atomic"),
    }
