"""Chapter 7, RMS norm: each row of a matrix gets mean square 1. Layer norm (``norms.py``) without mean and bias.

==========================  ==================================================  ================  ======================
kernel                      what it changes                                     bytes, barriers   when it loses
==========================  ==================================================  ================  ======================
``rmsnorm_v1_two_reads``    one sum, of x²                                      12, 2 (x twice)   long rows
``rmsnorm_v2_shared_row``   the row stays in shared memory: read once           8, 2              rows over 4096 floats
``rmsnorm_v3_registers``    the row stays in registers, moved 16 bytes at a     8, 2              rows over 16384 floats
                            time
==========================  ==================================================  ================  ======================

``rmsnorm_row`` is the version with the row in shared memory, for the reason that layer norm's is.
"""

import math

import numpy as np
from numba import cuda, float32

from chapters.ch04_memory.vectors import load_row4, load_vector4, store_row4
from chapters.ch07_warp_reduce.kernels import WARP, block_sum
from chapters.ch07_warp_reduce.norms import EACH, FOURS, ROW_MAX_FLOATS, norm_launch


def rmsnorm_launch(rows, d_model):
    """Launch configuration of :func:`rmsnorm_row`, good for all versions: ``(grid, block)``, one block a row.

    Raises ValueError if a size is not positive or d_model is more than 4096.
    """
    return norm_launch(rows, d_model, "rmsnorm_row")


@cuda.jit
def rmsnorm_v1_two_reads(x, weight, out, d_model, eps):
    """out[r] = x[r] / sqrt(mean of x[r]² + eps) * weight: no mean is taken off and no bias put on; one block a row.

    x, out: (rows, d_model) float32, C-contiguous; ``out`` may be ``x`` itself. weight: (d_model,) float32. d_model:
    int32. eps: float, 1e-5 in Llama 2 and 3. Squares overflow float32 from 1.8e19 on, and such a row becomes 0, NaN
    where it holds ±inf; a row with NaN becomes NaN.
    Launch: ``rmsnorm_v1_two_reads[rmsnorm_launch(rows, d_model)](…)``, any block of full warps.
    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    partial = cuda.shared.array(WARP, float32)
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    total = float32(0)
    for c in range(tid, d_model, cuda.blockDim.x):
        value = x[row, c]
        total += value * value
    mean_square = block_sum(total, partial) / float32(d_model)
    scale = float32(1) / math.sqrt(mean_square + float32(eps))
    for c in range(tid, d_model, cuda.blockDim.x):
        out[row, c] = x[row, c] * scale * weight[c]


@cuda.jit
def rmsnorm_v2_shared_row(x, weight, out, d_model, eps):
    """RMS norm as :func:`rmsnorm_v1_two_reads`, the row kept in shared memory: x is read once.

    d_model: int32, at most 4096; the kernel does not look, :func:`rmsnorm_launch` does. All else as in version 1.
    Launch: ``rmsnorm_v2_shared_row[rmsnorm_launch(rows, d_model)](…)``, any block of full warps.
    """
    partial = cuda.shared.array(WARP, float32)
    kept = cuda.shared.array(ROW_MAX_FLOATS, float32)
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    total = float32(0)
    for c in range(tid, d_model, cuda.blockDim.x):
        value = x[row, c]
        kept[c] = value
        total += value * value
    mean_square = block_sum(total, partial) / float32(d_model)
    scale = float32(1) / math.sqrt(mean_square + float32(eps))
    for c in range(tid, d_model, cuda.blockDim.x):
        out[row, c] = kept[c] * scale * weight[c]


@cuda.jit
def rmsnorm_v3_registers(x, weight, out, d_model, eps):
    """RMS norm as :func:`rmsnorm_v1_two_reads`, the row kept in registers, as in :func:`layernorm_v4_registers`.

    Launch: ``rmsnorm_v3_registers[registers_launch(rows, d_model, "rmsnorm")](…)``.
    """
    partial = cuda.shared.array(WARP, float32)
    kept = cuda.local.array(EACH, float32)
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    zero = float32(0)
    for i in range(FOURS):
        c = 4 * (tid + i * cuda.blockDim.x)
        kept[4 * i], kept[4 * i + 1], kept[4 * i + 2], kept[4 * i + 3] = load_row4(x, row, c, d_model, zero)
    total = zero
    for i in range(EACH):
        total += kept[i] * kept[i]
    mean_square = block_sum(total, partial) / float32(d_model)
    scale = float32(1) / math.sqrt(mean_square + float32(eps))
    for i in range(FOURS):
        c = 4 * (tid + i * cuda.blockDim.x)
        w0, w1, w2, w3 = load_vector4(weight, c, d_model, zero)
        y0, y1 = kept[4 * i] * scale * w0, kept[4 * i + 1] * scale * w1
        y2, y3 = kept[4 * i + 2] * scale * w2, kept[4 * i + 3] * scale * w3
        store_row4(out, row, c, d_model, y0, y1, y2, y3)


rmsnorm_row = rmsnorm_v2_shared_row


def rmsnorm_reference(x, weight, eps):
    """NumPy reference of the ``rmsnorm`` kernels: (rows, d_model) float32, in float64 inside, returns float32."""
    x = x.astype(np.float64)
    return (x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * weight).astype(np.float32)
