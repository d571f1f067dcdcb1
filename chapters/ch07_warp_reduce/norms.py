"""Chapter 7, layer norm: each row of a matrix gets mean 0 and variance 1.

The row's statistics are reductions over a block, and every element needs them: the row is needed again once they are
known. Where it waits in the meantime is what the versions differ in. Bytes are those of an element of float32 as they
pass between the multiprocessor and its caches; weight and bias, the same for every row, come on top.

==========================  =======================================================  ================  ================
kernel                      what it changes                                          bytes, barriers   when it loses
==========================  =======================================================  ================  ================
``layernorm_v1_two_pass``   ``block_sum`` of x, then of (x - mean)²                  16, 4 (x read     long rows: three
                                                                                     three times)      times the reads
``layernorm_v2_one_pass``   mean and variance together, by Welford's update and      12, 1 (x twice)   a division for
                            Chan's merge                                                               each element
``layernorm_v3_shared_row`` the row stays in shared memory: read once, and           8, 4 (x once)     rows over 4096
                            version 1's two passes cost no more reads                                  floats
``layernorm_v4_registers``  the row stays in registers, 16 floats a thread, and      8, 4 (x once)     rows over 16384
                            moves 16 bytes at a time                                                   floats
==========================  =======================================================  ================  ================

``layernorm_row`` is the version with the row in shared memory: on a GPU that is filled the one with registers is
faster, on a processor, which has 16 registers and not 65536, slower. RMS norm, which Llama uses, is in ``rmsnorm.py``.

The tempting one pass, mean(x²) - mean(x)², is not here: it subtracts two large numbers that are nearly equal, and a row
of values around 3000 with a spread of 1 has no correct digit left in float32.
"""

import math

import numpy as np
from numba import cuda, float32

from chapters.ch04_memory.vectors import load_row4, load_vector4, store_row4
from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP, block_sum, row_launch, row_threads

ROW_MAX_FLOATS = 4096  # of the versions that keep a row in shared memory: 16 KiB a block
FOURS = 4  # loads of 16 bytes a thread of the versions that keep a row in registers
EACH = 16  # FOURS * 4 floats
REGISTER_MAX_FLOATS = 1024 * EACH


def norm_launch(rows, d_model, what):
    """Launch configuration for ``rows`` rows of ``d_model`` floats, one block each: ``(grid, block)``.

    Raises ValueError, naming the kernel ``what``, if a size is not positive or d_model is more than 4096.
    """
    if d_model > ROW_MAX_FLOATS:
        raise ValueError(
            f"{what}: d_model = {d_model}: a row in shared memory has at most {ROW_MAX_FLOATS} floats; launch "
            f"layernorm_v2_one_pass or rmsnorm_v1_two_reads, which take any, with row_launch({rows}, 256, …)"
        )
    return row_launch(rows, row_threads(d_model, what), what)


def registers_launch(rows, d_model, what):
    """Launch configuration of a version that keeps a row in registers, 16 floats a thread: ``(grid, block)``.

    Raises ValueError, naming the kernel ``what``, if a size is not positive or d_model is more than 16384.
    """
    if not 1 <= d_model <= REGISTER_MAX_FLOATS:
        raise ValueError(
            f"{what}: d_model = {d_model}: 1024 threads hold 1 to {REGISTER_MAX_FLOATS} floats in their registers; "
            "for longer rows there are layernorm_v2_one_pass and rmsnorm_v1_two_reads"
        )
    return row_launch(rows, (d_model + WARP * EACH - 1) // (WARP * EACH) * WARP, what)


# --- layer norm ------------------------------------------------------------------------------------------------------


def layernorm_launch(rows, d_model):
    """Launch configuration of :func:`layernorm_row`, good for all versions: ``(grid, block)``, one block a row.

    Raises ValueError if a size is not positive or d_model is more than 4096.
    """
    return norm_launch(rows, d_model, "layernorm_row")


@cuda.jit
def layernorm_v1_two_pass(x, weight, bias, out, d_model, eps):
    """out[r] = (x[r] - mean) / sqrt(variance + eps) * weight + bias, with mean and variance of row r; one block a row.

    x, out: (rows, d_model) float32, C-contiguous; ``out`` may be ``x`` itself. weight, bias: (d_model,) float32.
    d_model: int32. eps: float, 1e-5 in GPT-2. The mean comes first, and then the variance (over d_model, not
    d_model - 1) from the distances to it. A row with NaN or ±inf becomes NaN.
    Launch: ``layernorm_v1_two_pass[layernorm_launch(rows, d_model)](…)``, any block of full warps.
    Source: Ba, Kiros, Hinton 2016, "Layer Normalization".
    """
    partial = cuda.shared.array(WARP, float32)
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    total = float32(0)
    for c in range(tid, d_model, cuda.blockDim.x):
        total += x[row, c]
    mean = block_sum(total, partial) / float32(d_model)
    total = float32(0)
    for c in range(tid, d_model, cuda.blockDim.x):
        distance = x[row, c] - mean
        total += distance * distance
    variance = block_sum(total, partial) / float32(d_model)
    scale = float32(1) / math.sqrt(variance + float32(eps))
    for c in range(tid, d_model, cuda.blockDim.x):
        out[row, c] = (x[row, c] - mean) * scale * weight[c] + bias[c]


@cuda.jit(device=True)
def merge_moments(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Count, mean and M2 (the sum of squared distances to the mean) of two sets taken together, from those of each.

    All float32; a set may be empty (0, 0, 0). Returns the three as a tuple. Nothing large is subtracted from anything
    large: the means differ by what the sets differ by. Source: Chan, Golub, LeVeque 1983.
    """
    count = count_a + count_b
    delta = mean_b - mean_a
    share = count_b / max(count, float32(1))  # two empty sets: 0 / 1
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * count_a * share


@cuda.jit
def layernorm_v2_one_pass(x, weight, bias, out, d_model, eps):
    """Layer norm as :func:`layernorm_v1_two_pass`, with mean and variance from a single pass.

    Each thread takes its elements one by one (Welford's update: the mean moves by delta / count, and M2 grows by the
    distances to the old and the new mean), then lanes and warps merge what they have (:func:`merge_moments`).
    Arguments, launch and NaN as in version 1. Source: Welford 1962; Chan, Golub, LeVeque 1983.
    """
    counts = cuda.shared.array(WARP, float32)
    means = cuda.shared.array(WARP, float32)
    m2s = cuda.shared.array(WARP, float32)
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    count = float32(0)
    mean = float32(0)
    m2 = float32(0)
    for c in range(tid, d_model, cuda.blockDim.x):
        value = x[row, c]
        count += float32(1)
        delta = value - mean
        mean += delta / count
        m2 += delta * (value - mean)
    for step in range(5):
        lanes = 16 >> step
        other_count = cuda.shfl_xor_sync(FULL_WARP, count, lanes)
        other_mean = cuda.shfl_xor_sync(FULL_WARP, mean, lanes)
        other_m2 = cuda.shfl_xor_sync(FULL_WARP, m2, lanes)
        count, mean, m2 = merge_moments(count, mean, m2, other_count, other_mean, other_m2)
    if tid % WARP == 0:
        counts[tid // WARP] = count
        means[tid // WARP] = mean
        m2s[tid // WARP] = m2
    cuda.syncthreads()
    count = counts[0]  # the merge is not symmetric in its rounding, so lanes may differ in the last bit: from here on
    mean = means[0]  # every thread of the block has the same numbers
    m2 = m2s[0]
    for warp in range(1, cuda.blockDim.x // WARP):
        count, mean, m2 = merge_moments(count, mean, m2, counts[warp], means[warp], m2s[warp])
    scale = float32(1) / math.sqrt(m2 / count + float32(eps))
    for c in range(tid, d_model, cuda.blockDim.x):
        out[row, c] = (x[row, c] - mean) * scale * weight[c] + bias[c]


@cuda.jit
def layernorm_v3_shared_row(x, weight, bias, out, d_model, eps):
    """Layer norm as :func:`layernorm_v1_two_pass`, the row kept in shared memory: x is read once.

    d_model: int32, at most 4096; the kernel does not look, :func:`layernorm_launch` does. All else as in version 1.
    No barrier guards the row: each thread comes back to the elements that it put there itself.
    Launch: ``layernorm_v3_shared_row[layernorm_launch(rows, d_model)](…)``, any block of full warps.
    """
    partial = cuda.shared.array(WARP, float32)
    kept = cuda.shared.array(ROW_MAX_FLOATS, float32)
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    total = float32(0)
    for c in range(tid, d_model, cuda.blockDim.x):
        value = x[row, c]
        kept[c] = value
        total += value
    mean = block_sum(total, partial) / float32(d_model)
    total = float32(0)
    for c in range(tid, d_model, cuda.blockDim.x):
        distance = kept[c] - mean
        total += distance * distance
    variance = block_sum(total, partial) / float32(d_model)
    scale = float32(1) / math.sqrt(variance + float32(eps))
    for c in range(tid, d_model, cuda.blockDim.x):
        out[row, c] = (kept[c] - mean) * scale * weight[c] + bias[c]


@cuda.jit
def layernorm_v4_registers(x, weight, bias, out, d_model, eps):
    """Layer norm as :func:`layernorm_v1_two_pass`, the row kept in registers and moved 16 bytes at a time.

    All four loads of a thread are under way before the first number is used. d_model: int32, at most 16384. x, out,
    weight, bias begin at multiples of 16 bytes; d_model is best a multiple of 4. All else as in version 1.
    Launch: ``layernorm_v4_registers[registers_launch(rows, d_model, "layernorm")](…)``.
    """
    partial = cuda.shared.array(WARP, float32)
    kept = cuda.local.array(EACH, float32)  # in registers: every loop over it is unrolled, every index a constant
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    zero = float32(0)
    for i in range(FOURS):
        c = 4 * (tid + i * cuda.blockDim.x)
        kept[4 * i], kept[4 * i + 1], kept[4 * i + 2], kept[4 * i + 3] = load_row4(x, row, c, d_model, zero)
    total = zero
    for i in range(EACH):
        total += kept[i]
    mean = block_sum(total, partial) / float32(d_model)
    total = zero
    for i in range(FOURS):
        for j in range(4):
            if 4 * (tid + i * cuda.blockDim.x) + j < d_model:  # what lies behind the row counted 0 for the mean only
                distance = kept[4 * i + j] - mean
                total += distance * distance
    variance = block_sum(total, partial) / float32(d_model)
    scale = float32(1) / math.sqrt(variance + float32(eps))
    for i in range(FOURS):
        c = 4 * (tid + i * cuda.blockDim.x)
        w0, w1, w2, w3 = load_vector4(weight, c, d_model, zero)
        b0, b1, b2, b3 = load_vector4(bias, c, d_model, zero)
        y0 = (kept[4 * i] - mean) * scale * w0 + b0
        y1 = (kept[4 * i + 1] - mean) * scale * w1 + b1
        y2 = (kept[4 * i + 2] - mean) * scale * w2 + b2
        y3 = (kept[4 * i + 3] - mean) * scale * w3 + b3
        store_row4(out, row, c, d_model, y0, y1, y2, y3)


layernorm_row = layernorm_v3_shared_row


def layernorm_reference(x, weight, bias, eps):
    """NumPy reference of the ``layernorm`` kernels: (rows, d_model) float32, in float64 inside, returns float32."""
    x = x.astype(np.float64)
    centred = x - x.mean(axis=1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)
    return (normal * weight + bias).astype(np.float32)
