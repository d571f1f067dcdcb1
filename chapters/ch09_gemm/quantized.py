"""Chapter 9, weights of few bits: y = x @ W + bias, where W is read in 8 or 4 bits, and multiplied as a float.

A step that makes one token reads every weight once, so its time is bytes. Numbers of a trained matrix are small and
close together: within a *group* of 32 neighbours along K, 256 steps, or 16, say nearly all of it. So a group has a step
``d`` and 32 whole numbers ``q``, and with 4 bits its least number ``m`` too:

    8 bits    w[k] = d * q[k]          q from -127 to 127            8.5 bits a weight
    4 bits    w[k] = d * q[k] + m      q from 0 to 15                5   bits a weight

====================  ======================================================  ==========================================
kernel                what is new                                             when it loses
====================  ======================================================  ==========================================
``quant_v1_bytes``    panels.py's rung 2 with a byte a weight, and a step     half of the bytes, and three operations a
                      for each group                                          weight where there was one
``quant_v2_nibbles``  4 bits: eight weights of a column are one int32, taken  once more: two shifts and masks a weight
                      apart in registers
``quant_v3_rows``     16 rows share what is read and taken apart: v1's        one row
                      weights
``quant_v4_rows``     … and v2's                                              one row; where there are tensor cores
====================  ======================================================  ==========================================

``d * q`` has 18 bits at most, for ``d`` is a float16: float32 holds it as it is, and so there is one rounding in
``d * q + m``. The weights that a kernel multiplies with are those that NumPy unpacks, bit for bit, and sums are made in
the order of panels.py. So a row has the bits of `linear_v2_panels` with unpacked weights, on every rung.

Panels are those of panels.py, 32 columns wide: ``q[p, k, t]`` int8, or ``words[p, k // 8, t]`` int32 with weight k in
bits 4 (k % 8) to 4 (k % 8) + 3; ``steps[p, k // 32, t]`` and ``least[p, k // 32, t]`` float16. Rows are packed into
them from blocks as ggml has them, a group behind the other:

    ``q8_0``   float16 d; 32 int8 q                                   34 bytes
    ``q4_1``   float16 d, m; 16 bytes: q[i] low, q[i + 16] high       20 bytes

Sources: ggml (llama.cpp), ggml-common.h, for the blocks; Dettmers et al. 2022, "LLM.int8()"; Frantar et al. 2024,
"MARLIN", for weights taken apart in registers.
"""

import numpy as np
from numba import cuda, float32, int32

from .panels import PANEL, ROWS, linear_launch, panels_shape

GROUP = 32  # weights along K that share a step
IN_WORD = 8  # weights of 4 bits in an int32
BLOCK_BYTES = {8: 34, 4: 20}  # of a group, by bits


def groups_of(K):
    """Groups of a row of K weights. Raises ValueError if K is no multiple of 32."""
    if K <= 0 or K % GROUP:
        raise ValueError(f"K = {K}: weights of few bits come in groups of {GROUP}; use float16")
    return K // GROUP


def quantized_shapes(K, N, bits):
    """Shapes of a (K, N) matrix of so many bits: of its panels, and of its steps. Raises ValueError as `groups_of`."""
    n_groups, n_panels = groups_of(K), panels_shape(K, N)[0]
    return (n_panels, K if bits == 8 else K // IN_WORD, PANEL), (n_panels, n_groups, PANEL)


def pack_blocks_launch(K, N):
    """Launch configuration of :func:`pack_q8` and :func:`pack_q4`: ``(grid, block)``, a block a panel."""
    return panels_shape(K, N)[0], (PANEL, 8)


def quantized_linear(bits, M, N):
    """The fastest rung for M rows of x, with its launch configuration: ``kernel, (grid, block)``."""
    if M == 1:
        return (quant_v1_bytes if bits == 8 else quant_v2_nibbles), linear_launch(M, N)
    return (quant_v3_rows if bits == 8 else quant_v4_rows), linear_launch(M, N, ROWS)


# --- packing ---------------------------------------------------------------------------------------------------------


@cuda.jit
def pack_q8(blocks, steps_in, q, steps, K, N):
    """Rows of ``q8_0`` blocks into panels.

    blocks: (N, K / 32, 34) uint8, and the same memory as float16, steps_in: (N, K / 32, 17). q, steps:
    ``quantized_shapes(K, N, 8)``, int8 and float16; 0 behind row N. K, N: int32.
    Launch: ``pack_q8[pack_blocks_launch(K, N)](…)``.
    """
    p, t = cuda.blockIdx.x, cuda.threadIdx.x
    row = p * PANEL + t
    for group in range(cuda.threadIdx.y, K // GROUP, cuda.blockDim.y):
        steps[p, group, t] = float32(steps_in[row, group, 0]) if row < N else float32(0)
        for i in range(GROUP):
            byte = int32(blocks[row, group, 2 + i]) if row < N else int32(0)
            q[p, group * GROUP + i, t] = byte - 256 if byte > 127 else byte


@cuda.jit
def pack_q4(blocks, steps_in, words, steps, least, K, N):
    """Rows of ``q4_1`` blocks into panels.

    blocks: (N, K / 32, 20) uint8, and the same memory as float16, steps_in: (N, K / 32, 10). words, and steps and
    least: ``quantized_shapes(K, N, 4)``, int32 and float16; 0 behind row N. K, N: int32.
    Launch: ``pack_q4[pack_blocks_launch(K, N)](…)``.
    """
    p, t = cuda.blockIdx.x, cuda.threadIdx.x
    row = p * PANEL + t
    for group in range(cuda.threadIdx.y, K // GROUP, cuda.blockDim.y):
        steps[p, group, t] = float32(steps_in[row, group, 0]) if row < N else float32(0)
        least[p, group, t] = float32(steps_in[row, group, 1]) if row < N else float32(0)
        for i in range(GROUP // IN_WORD):
            word = int32(0)
            for j in range(IN_WORD):
                k = i * IN_WORD + j  # the second half of a group is in the high halves of the bytes
                if row < N:
                    weight = (int32(blocks[row, group, 4 + k % 16]) >> 4 * (k // 16)) & 15
                    if j == IN_WORD - 1 and weight > 7:
                        weight -= 16  # its highest bit is the word's sign
                    word = word | int32(weight << 4 * j)
            words[p, group * (GROUP // IN_WORD) + i, t] = word


# --- products --------------------------------------------------------------------------------------------------------


@cuda.jit
def quant_v1_bytes(x, q, steps, bias, y, M, N, K, add):
    """y = x @ W + bias, W in 8 bits: a thread a column.

    x: (M, K) float32. q, steps: of :func:`pack_q8`. bias: (N,) float32. y: (M, N) float32; with add = 1 the product is
    added to what is there. M, N, K, add: int32. Launch: ``quant_v1_bytes[linear_launch(M, N)](…)``.
    """
    row, p, t = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    col = p * PANEL + t
    total = float32(0)
    for group in range(K // GROUP):
        step = float32(steps[p, group, t])
        for i in range(GROUP):
            k = group * GROUP + i
            total = cuda.fma(x[row, k], step * float32(q[p, k, t]), total)
    if col < N:
        total += bias[col]
        y[row, col] = y[row, col] + total if add else total


@cuda.jit
def quant_v2_nibbles(x, words, steps, least, bias, y, M, N, K, add):
    """y = x @ W + bias, W in 4 bits: eight weights of a column are read at once.

    words, steps, least: of :func:`pack_q4`. The others as in :func:`quant_v1_bytes`.
    Launch: ``quant_v2_nibbles[linear_launch(M, N)](…)``.
    """
    row, p, t = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    col = p * PANEL + t
    total = float32(0)
    for group in range(K // GROUP):
        step, low = float32(steps[p, group, t]), float32(least[p, group, t])
        for i in range(GROUP // IN_WORD):
            word = words[p, group * (GROUP // IN_WORD) + i, t]
            for j in range(IN_WORD):
                weight = cuda.fma(step, float32(int32((word >> 4 * j) & 15)), low)
                total = cuda.fma(x[row, group * GROUP + i * IN_WORD + j], weight, total)
    if col < N:
        total += bias[col]
        y[row, col] = y[row, col] + total if add else total


@cuda.jit
def quant_v3_rows(x, q, steps, bias, y, M, N, K, add):
    """:func:`quant_v1_bytes` for many rows: 16 of them share eight weights at a time.

    Launch: ``quant_v3_rows[linear_launch(M, N, ROWS)](…)``.
    """
    totals = cuda.local.array(ROWS, float32)
    weights = cuda.local.array(IN_WORD, float32)
    row0, p, t = cuda.blockIdx.x * ROWS, cuda.blockIdx.y, cuda.threadIdx.x
    col = p * PANEL + t
    n_rows = min(M - row0, ROWS)
    for r in range(ROWS):
        totals[r] = float32(0)
    for k in range(0, K, IN_WORD):
        step = float32(steps[p, k // GROUP, t])
        for j in range(IN_WORD):
            weights[j] = step * float32(q[p, k + j, t])
        for r in range(ROWS):
            if r < n_rows:
                total = totals[r]
                for j in range(IN_WORD):
                    total = cuda.fma(x[row0 + r, k + j], weights[j], total)
                totals[r] = total
    if col < N:
        for r in range(ROWS):
            if r < n_rows:
                total = totals[r] + bias[col]
                y[row0 + r, col] = y[row0 + r, col] + total if add else total


@cuda.jit
def quant_v4_rows(x, words, steps, least, bias, y, M, N, K, add):
    """:func:`quant_v2_nibbles` for many rows: 16 of them share a word that was taken apart once.

    Launch: ``quant_v4_rows[linear_launch(M, N, ROWS)](…)``.
    """
    totals = cuda.local.array(ROWS, float32)
    weights = cuda.local.array(IN_WORD, float32)
    row0, p, t = cuda.blockIdx.x * ROWS, cuda.blockIdx.y, cuda.threadIdx.x
    col = p * PANEL + t
    n_rows = min(M - row0, ROWS)
    for r in range(ROWS):
        totals[r] = float32(0)
    for k in range(0, K, IN_WORD):
        step, low = float32(steps[p, k // GROUP, t]), float32(least[p, k // GROUP, t])
        word = words[p, k // IN_WORD, t]
        for j in range(IN_WORD):
            weights[j] = cuda.fma(step, float32(int32((word >> 4 * j) & 15)), low)
        for r in range(ROWS):
            if r < n_rows:
                total = totals[r]
                for j in range(IN_WORD):
                    total = cuda.fma(x[row0 + r, k + j], weights[j], total)
                totals[r] = total
    if col < N:
        for r in range(ROWS):
            if r < n_rows:
                total = totals[r] + bias[col]
                y[row0 + r, col] = y[row0 + r, col] + total if add else total


# --- references ------------------------------------------------------------------------------------------------------


def quantize_reference(rows, bits):
    """Rows of numbers as blocks: (N, K) float32 → (N, K / 32, 34 or 20) uint8, with the steps of float16.

    8 bits: the largest of a group is 127 steps away from 0. 4 bits: 15 steps from the least to the largest.
    """
    groups = np.asarray(rows, np.float32).reshape(len(rows), groups_of(rows.shape[1]), GROUP)
    if bits == 8:
        step = (np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)).astype(np.float16)
        least = np.zeros_like(step)
    else:
        least = groups.min(axis=2, keepdims=True)
        step = ((groups.max(axis=2, keepdims=True) - least) / np.float32(15)).astype(np.float16)
        least = least.astype(np.float16)
    whole = np.divide(groups - least.astype(np.float32), step.astype(np.float32), out=np.zeros_like(groups),
                      where=step != 0)  # fmt: skip
    if bits == 8:
        q = np.clip(np.rint(whole), -127, 127).astype(np.int8).view(np.uint8)
        return np.concatenate([step.view(np.uint8), q], axis=2)
    q = np.clip(np.rint(whole), 0, 15).astype(np.uint8)
    return np.concatenate([step.view(np.uint8), least.view(np.uint8), q[..., :16] | q[..., 16:] << 4], axis=2)


def unpack_reference(blocks, bits):
    """The numbers of blocks: (N, K / 32, 34 or 20) uint8 → (N, K) float32."""
    step = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    if bits == 8:
        numbers = np.ascontiguousarray(blocks[..., 2:]).view(np.int8) * step
    else:
        least = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16).astype(np.float32)
        numbers = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=2) * step + least
    return numbers.reshape(len(blocks), -1)
