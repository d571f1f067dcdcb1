"""Chapter 10, softmax: every element needs two facts about its whole row, and one of them keeps it from overflowing.

softmax(x)[c] = exp(x[c]) / sum over j of exp(x[j]), a row at a time, one block a row. exp overflows float32 above 88.7,
but softmax does not change when the same number is subtracted from all of a row. Subtract the row's largest element and
no exponent is above 0. The two facts, largest element and sum, are reductions over the block (chapter 7).

=====================  ==========================================  ===================  =============================
kernel                 passes over the row                         reductions a row     bytes an element (float32)
=====================  ==========================================  ===================  =============================
``softmax_v1_naive``   exponentials and their sum; divide          1                    16 (two reads, two writes)
``softmax_v2_stable``  largest; exponentials and their sum;        2                    20 (three reads, two writes)
                       divide
=====================  ==========================================  ===================  =============================

Both take the same arguments and the same launch, ``softmax_launch(rows)``; ``softmax_row`` is the last one.
"""

import math

import numpy as np
from numba import cuda, float32

from chapters.ch07_warp_reduce.kernels import block_max, block_sum

THREADS = 64  # of a block: full warps for the reductions, and still several elements a thread in attention's rows
WARPS_MAX = 32


def softmax_launch(rows):
    """Launch configuration for a softmax over ``rows`` rows, one block each: ``(grid, block)``.

    Raises ValueError if ``rows`` is not positive.
    """
    if rows <= 0:
        raise ValueError(f"rows = {rows}: a launch needs at least 1 row; skip the launch for empty input")
    return rows, THREADS


@cuda.jit
def softmax_v1_naive(x, out, cols):
    """out[r] = softmax(x[r]) straight from the definition; wrong for large inputs, so do not use it.

    An element above 88.7 becomes inf and its row NaN; a row of elements below -104 becomes 0 / 0, NaN as well.
    x, out: (rows, cols) float32, C-contiguous; ``out`` may be ``x`` itself. cols: int32.
    Launch: ``softmax_v1_naive[softmax_launch(rows)](…)``, any block of full warps.
    """
    partial = cuda.shared.array(WARPS_MAX, float32)
    row = cuda.blockIdx.x
    total = float32(0)
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        e = math.exp(x[row, c])
        out[row, c] = e
        total += e
    total = block_sum(total, partial)
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        out[row, c] /= total  # the elements that this thread wrote itself: no barrier needed


@cuda.jit
def softmax_v2_stable(x, out, cols):
    """out[r] = softmax(x[r]) with the row's largest element subtracted: no exponential is above 1, the sum at least 1.

    Elements of -inf get weight 0 (attention's mask). A row of nothing but -inf has no softmax and becomes NaN, as does
    a row that holds NaN or +inf.
    x, out: (rows, cols) float32, C-contiguous; ``out`` may be ``x`` itself. cols: int32.
    Launch: ``softmax_v2_stable[softmax_launch(rows)](…)``, any block of full warps.
    Source: Goodfellow et al. 2016, "Deep Learning", section 4.1.
    """
    partial = cuda.shared.array(WARPS_MAX, float32)
    row = cuda.blockIdx.x
    largest = float32(-math.inf)  # threads without an element bring this, which changes no maximum
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        largest = max(largest, x[row, c])
    largest = block_max(largest, partial)
    total = float32(0)
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        e = math.exp(x[row, c] - largest)
        out[row, c] = e
        total += e
    total = block_sum(total, partial)
    for c in range(cuda.threadIdx.x, cols, cuda.blockDim.x):
        out[row, c] /= total


softmax_row = softmax_v2_stable


def softmax_reference(x):
    """NumPy reference of all versions: (rows, cols) float32, computed in float64; returns (rows, cols) float32."""
    x = x.astype(np.float64)
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)
