"""Chapter 13, a Llama's layer in the launches of ``fused.py`` and ``fused_rows.py``: what replaces GPT-2's kernels.

An RMS norm has no mean to subtract: behind a product whose matrix has the norm's weight, one factor a row is left. The
two new operations, rotary positions and SwiGLU, both make two numbers of a row into new ones. If the rows of the matrix
that make them are **neighbours**, the two are in one thread's hands when the product ends, and neither costs a launch:
queries and keys i and i + head_dim / 2, gate i and value i. So the rows are put into that order once, when weights are
loaded (:func:`turned_order`, :func:`paired_order`).

==========================  ==============================================  ===========================================
kernel                      the product                                     kernels it saves
==========================  ==============================================  ===========================================
``gemv_rms_qkv_rope``       chapter 9's ``gemv_ln``, 8 rows at a time       ``rmsnorm_row``, ``split_qkv_rope_pages``
``gemv_rms_swiglu``         the same                                        ``rmsnorm_row``, ``swiglu_fused``
``gemv_rms_logits``         the same; a matrix of many rows                 ``rmsnorm_row``, most of ``argmax_row``
``parts_rms``               none: ``parts_norm`` for this norm              as there
``gemm_qkv_rope_32``        chapter 9's tiles of 32 x 32, many rows         ``split_qkv_rope_pages``
``gemm_swiglu_32``          the same                                        ``swiglu_fused``
==========================  ==============================================  ===========================================

The last two have twins with tiles of 64 x 64. Everything else of a layer is what GPT-2 has: the products back to the
residual stream, attention, the logits of many rows. What a norm saves is small: all of this is for the launches.

It loses where a residual stream leaves the range of float16, ± 65504, in which it is multiplied; and one number of a
row that is thousands of times the others takes digits from nobody but itself.

Sources: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; Su et al. 2021, "RoFormer"; Shazeer 2020, "GLU
Variants Improve Transformer"; else as ``fused.py``.
"""

import math

import numpy as np
from numba import cuda, float32, int32, uint32
from numba.types import float16

from chapters.ch07_warp_reduce.kernels import WARP, block_sum
from chapters.ch09_gemm.gemv_tensor import (
    ROWS_MAX,
    STEPS,
    TILE,
    WARPS,
    first_column,
    first_row,
    load_weights,
    multiply_wide,
    rms_scale,
    share_sums,
    sum_of_warps,
    x_row,
)
from chapters.ch09_gemm.gemv_tensor import THREE_BLOCKS as THREE_VECTOR_BLOCKS
from chapters.ch09_gemm.skinny import (
    LARGE_STAGES,
    PARTS_MAX,
    SMALL,
    SMALL_STAGES,
    THREE_BLOCKS,
    multiply_columns,
    tile_col,
    tile_row,
)
from common.ptx import griddep_launch, griddep_wait

from .fused import keep_best
from .fused_rows import FOURS, load_row, store_row
from .kernels import silu_of, swiglu_fused_reference

PAIRS = TILE // 2  # of neighbours among the rows of W that a block has


def turned_order(n_head, n_kv_head, head_dim):
    """Where the rows of a matrix for queries, keys and values come from: (N,) int64, ``W[turned_order(…)]``.

    Rows i and i + head_dim / 2 of a head of queries or keys become neighbours, 2 * i and 2 * i + 1; values stay.
    """
    rows = np.arange((n_head + 2 * n_kv_head) * head_dim)
    n_turned = (n_head + n_kv_head) * head_dim
    rows[:n_turned] = rows[:n_turned].reshape(-1, 2, head_dim // 2).transpose(0, 2, 1).ravel()
    return rows


def paired_order(d_ff):
    """Where the rows of a matrix for gates, and for values behind them, come from: gate i, value i, gate i + 1, …"""
    return np.arange(2 * d_ff).reshape(2, d_ff).T.ravel()


# --- up to eight rows ------------------------------------------------------------------------------------------------
#
# Thread b * 8 + p has rows 2 * p and 2 * p + 1 of the tile and row b of the group: the first 64 of a block do.


@cuda.jit(device=True, forceinline=True)
def pair_behind_rms(sums, moments, p, b, d_model, eps):
    """W[2 * p], W[2 * p + 1] times rmsnorm(x[b]), of what the warps have left in ``sums`` and ``moments``."""
    scale = rms_scale(moments, b, d_model, eps)
    return sum_of_warps(sums, 2 * p, b) * scale, sum_of_warps(sums, 2 * p + 1, b) * scale


@cuda.jit(launch_bounds=THREE_VECTOR_BLOCKS)
def gemv_rms_qkv_rope(
    x, W, q, k_cache, v_cache, slot_mapping, positions, cos, sin,
    rows, d_model, n_head, n_kv_head, head_dim, block_size, eps,
):  # fmt: skip
    """Query, key and value of each row of the residual stream, turned by its position: keys and values to their pages.

    With y = W rmsnorm(x[b]) of (n_head + 2 * n_kv_head) * head_dim numbers, W with its norm's weight and its rows in
    ``turned_order``: q[b] = the first n_head * head_dim, turned, in the order before that; keys, turned, and values go
    to k_cache and v_cache as in ``gemv_ln_qkv``. positions: (rows,) int32; -1, padding, turns as 0. cos, sin: of
    ``rope_tables``, with a line for each position. In a graph of dependent launches, no kernel in front of this one
    writes positions or slot_mapping. Otherwise as in ``gemv_ln_qkv``.
    Launch: ``gemv_rms_qkv_rope[gemv_tensor_launch(N, d_model, rows)](…)``.
    """
    sums = cuda.shared.array((WARPS, ROWS_MAX, TILE), float32)
    moments = cuda.shared.array((WARPS, ROWS_MAX, 2), float32)
    w = cuda.local.array((STEPS, 2, 4), uint32)
    q_width, kv_width = n_head * head_dim, n_kv_head * head_dim
    N = q_width + 2 * kv_width
    row0 = cuda.blockIdx.x * TILE
    p, b = cuda.threadIdx.x % PAIRS, cuda.threadIdx.x // PAIRS
    col = row0 + 2 * p
    b0 = first_row()
    griddep_launch()
    load_weights(W, row0, first_column(), N, d_model, w)
    row = min(b0 + b, rows - 1)
    slot = slot_mapping[row]
    page_bits = 31 - cuda.clz(int32(block_size))
    head = int32(uint32(col) // uint32(head_dim))  # of queries, then keys, then values
    point = (col - head * head_dim) // 2  # the pair of it
    turns = head < n_head + n_kv_head
    c = s = float32(0)
    if turns:
        position = max(positions[row], 0)
        c, s = cos[position, point], sin[position, point]
    at = x_row(rows) * d_model + first_column()
    griddep_wait()
    c0, c1, c2, c3 = multiply_wide(x, at, W, row0, N, d_model, w, moments)
    share_sums(sums, rows - b0, c0, c1, c2, c3)
    cuda.syncthreads()
    if b < min(rows - b0, ROWS_MAX) and col < N:
        low, high = pair_behind_rms(sums, moments, p, b, d_model, eps)
        first, second = 2 * point, 2 * point + 1
        if turns:
            low, high = low * c - high * s, low * s + high * c
            first, second = point, point + head_dim // 2
        page, place = slot >> page_bits, slot & (block_size - 1)
        if head < n_head:
            to = row * q_width + head * head_dim
            q[to + first], q[to + second] = low, high
        elif slot >= 0 and turns:
            k_cache[page, head - n_head, place, first] = low
            k_cache[page, head - n_head, place, second] = high
        elif slot >= 0:
            v_cache[page, head - n_head - n_kv_head, place, first] = low
            v_cache[page, head - n_head - n_kv_head, place, second] = high


@cuda.jit(launch_bounds=THREE_VECTOR_BLOCKS)
def gemv_rms_swiglu(x, W, out, rows, d_ff, d_model, eps):
    """out[b, i] = silu(gate[i]) * value[i], 8 rows at a time: the first half of a gated MLP, in float16.

    gate, value: of W rmsnorm(x[b]), W (2 * d_ff, d_model) with its norm's weight and its rows in ``paired_order``. out:
    (rows * d_ff,) float16, flat. Otherwise as chapter 9's ``gemv_ln``.
    Launch: ``gemv_rms_swiglu[gemv_tensor_launch(2 * d_ff, d_model, rows)](…)``.
    """
    sums = cuda.shared.array((WARPS, ROWS_MAX, TILE), float32)
    moments = cuda.shared.array((WARPS, ROWS_MAX, 2), float32)
    w = cuda.local.array((STEPS, 2, 4), uint32)
    row0 = cuda.blockIdx.x * TILE
    p, b = cuda.threadIdx.x % PAIRS, cuda.threadIdx.x // PAIRS
    i = row0 // 2 + p
    b0 = first_row()
    griddep_launch()
    load_weights(W, row0, first_column(), 2 * d_ff, d_model, w)
    at = x_row(rows) * d_model + first_column()
    griddep_wait()
    c0, c1, c2, c3 = multiply_wide(x, at, W, row0, 2 * d_ff, d_model, w, moments)
    share_sums(sums, rows - b0, c0, c1, c2, c3)
    cuda.syncthreads()
    if b < min(rows - b0, ROWS_MAX) and i < d_ff:
        gate, value = pair_behind_rms(sums, moments, p, b, d_model, eps)
        out[(b0 + b) * d_ff + i] = silu_of(gate) * value


@cuda.jit(launch_bounds=THREE_VECTOR_BLOCKS)
def gemv_rms_logits(x, logits_rows, W, logits, best, best_token, n_logits, vocab_size, d_model, eps):
    """logits[i] = W rmsnorm(x[logits_rows[i]]), and each block's largest and its token: ``gemv_ln_logits`` for an RMS
    norm whose weight is in W. Arguments as there.
    Launch: ``gemv_rms_logits[gemv_tensor_launch(vocab_size, d_model, n_logits)](…)``.
    """
    sums = cuda.shared.array((WARPS, ROWS_MAX, TILE), float32)
    moments = cuda.shared.array((WARPS, ROWS_MAX, 2), float32)
    w = cuda.local.array((STEPS, 2, 4), uint32)
    row0 = cuda.blockIdx.x * TILE
    r, b = cuda.threadIdx.x % TILE, cuda.threadIdx.x // TILE
    b0 = first_row()
    griddep_launch()
    load_weights(W, row0, first_column(), vocab_size, d_model, w)
    at = logits_rows[x_row(n_logits)] * d_model + first_column()
    griddep_wait()
    c0, c1, c2, c3 = multiply_wide(x, at, W, row0, vocab_size, d_model, w, moments)
    share_sums(sums, n_logits - b0, c0, c1, c2, c3)
    cuda.syncthreads()
    if b < ROWS_MAX and b // 2 * 2 < n_logits - b0:  # whole warps, of two rows each
        y = float32(0)
        if b < n_logits - b0:
            y = sum_of_warps(sums, r, b) * rms_scale(moments, b, d_model, eps)
        keep_best(y, r, b0 + b, row0 + r, logits, best, best_token, n_logits, vocab_size)


# --- more rows -------------------------------------------------------------------------------------------------------


@cuda.jit(device=True, forceinline=True)
def rms_of_row(x, parts, n_parts, bias, row, rows, d_model, eps, keep, h, to, v, p, partial):
    """``norm_of_row`` without a mean: h[to] = y / sqrt(mean of squares + eps)."""
    load_row(x, parts, n_parts, bias, row, rows, d_model, keep, v, p)
    total = float32(0)
    for i in range(FOURS):
        total += (v[i, 0] * v[i, 0] + v[i, 1] * v[i, 1]) + (v[i, 2] * v[i, 2] + v[i, 3] * v[i, 3])
    scale = float32(1) / math.sqrt(block_sum(total, partial) / float32(d_model) + float32(eps))
    store_row(h, to, d_model, v, float32(0), scale)


@cuda.jit
def parts_rms(x, parts, n_parts, bias, h, rows, d_model, eps):
    """x[r] += the sum of the row's parts + bias; h[r] = x[r] / sqrt(mean of its squares + eps): ``parts_norm`` for an
    RMS norm, whose weight is in the matrix that follows. Arguments as there.
    Launch: ``parts_rms[parts_norm_launch(rows, d_model)](…)``.
    """
    partial = cuda.shared.array(WARP, float32)
    v = cuda.local.array((FOURS, 4), float32)
    p = cuda.local.array((PARTS_MAX, 4), float32)
    griddep_launch()
    griddep_wait()
    row = int32(cuda.blockIdx.x)
    rms_of_row(x, parts, int32(n_parts), bias, row, int32(rows), int32(d_model), eps, 1, h, row, v, p, partial)


@cuda.jit
def parts_rms_of(x, parts, n_parts, bias, listed, h, rows, d_model, eps):
    """h[i] = what :func:`parts_rms` makes of row listed[i]; x stays as it is. Arguments as ``parts_norm_of``'s.
    Launch: ``parts_rms_of[parts_norm_launch(n_listed, d_model)](…)``.
    """
    partial = cuda.shared.array(WARP, float32)
    v = cuda.local.array((FOURS, 4), float32)
    p = cuda.local.array((PARTS_MAX, 4), float32)
    griddep_launch()
    griddep_wait()
    row, to = int32(listed[cuda.blockIdx.x]), int32(cuda.blockIdx.x)
    rms_of_row(x, parts, int32(n_parts), bias, row, int32(rows), int32(d_model), eps, 0, h, to, v, p, partial)


@cuda.jit(device=True, forceinline=True)
def product_qkv_rope(
    A, Bt, q, k_cache, v_cache, slot_mapping, positions, cos, sin, M, K, n_head, n_kv_head, head_dim, block_size,
    tiles, a, b, acc, slots, b_stages,
):  # fmt: skip
    """The whole of ``gemm_qkv_rope``. slots: (m, 2, 2) int32, local: places of rows, and their positions."""
    M, n_head, n_kv_head = int32(M), int32(n_head), int32(n_kv_head)
    q_width, N = int32(n_head * head_dim), int32((n_head + 2 * n_kv_head) * head_dim)
    dim_bits, page_bits = 31 - cuda.clz(int32(head_dim)), 31 - cuda.clz(int32(block_size))
    griddep_launch()
    for m in range(acc.shape[0]):
        for half in range(2):
            row = min(tile_row(acc, m, half), M - 1)
            slots[m, half, 0], slots[m, half, 1] = slot_mapping[row], max(positions[row], 0)
    multiply_columns(A, Bt, tiles, a, b, acc, M, N, int32(0), int32(K), b_stages)
    for n in range(acc.shape[1]):
        col = tile_col(acc, n)
        head, dim = col >> dim_bits, col & (1 << dim_bits) - 1
        turns, point = head < n_head + n_kv_head, dim >> 1
        first = point if turns else dim
        apart = int32(1 << dim_bits - 1) if turns else int32(1)  # of the two numbers, where they go
        of_kind = head - n_head if turns else head - n_head - n_kv_head
        for m in range(acc.shape[0]):
            for half in range(2):
                row, slot, position = tile_row(acc, m, half), slots[m, half, 0], slots[m, half, 1]
                low, high = acc[m, n, 2 * half], acc[m, n, 2 * half + 1]
                if row < M and col < N:
                    if turns:
                        c, s = cos[position, point], sin[position, point]
                        low, high = low * c - high * s, low * s + high * c
                    if head < n_head:
                        at = row * q_width + (head << dim_bits) + first
                        q[at], q[at + apart] = low, high
                    elif slot >= 0:
                        page, place = slot >> page_bits, slot & (1 << page_bits) - 1
                        at = (((page * n_kv_head + of_kind << page_bits) + place) << dim_bits) + first
                        if turns:
                            k_cache[at], k_cache[at + apart] = low, high
                        else:
                            v_cache[at], v_cache[at + apart] = low, high


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemm_qkv_rope_32(
    A, Bt, q, k_cache, v_cache, slot_mapping, positions, cos, sin, M, K, n_head, n_kv_head, head_dim, block_size
):  # fmt: skip
    """Query, key and value of each row, turned by its position: keys and values to their pages. Tiles of 32 x 32.

    Bt: its rows in ``turned_order``. positions: (M,) int32; -1, padding, turns as 0. cos, sin: of ``rope_tables``, with
    a line for each position. q gets the order before that, and so do the caches. There is no bias. Otherwise as
    ``gemm_qkv_pages_32``. Launch: ``gemm_qkv_rope_32[skinny_launch(M, N, 32)](…)``, 128 threads.
    """
    tiles = cuda.shared.array(0, float16)
    a = cuda.local.array((1, 4), uint32)
    b = cuda.local.array((2, 2), uint32)
    acc = cuda.local.array((1, 2, 4), float32)
    slots = cuda.local.array((1, 2, 2), int32)
    product_qkv_rope(
        A, Bt, q, k_cache, v_cache, slot_mapping, positions, cos, sin, M, K, n_head, n_kv_head, head_dim, block_size,
        tiles, a, b, acc, slots, SMALL_STAGES,
    )  # fmt: skip


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemm_qkv_rope_64(
    A, Bt, q, k_cache, v_cache, slot_mapping, positions, cos, sin, M, K, n_head, n_kv_head, head_dim, block_size
):  # fmt: skip
    """:func:`gemm_qkv_rope_32` in tiles of 64 x 64. Launch: ``gemm_qkv_rope_64[skinny_launch(M, N, 64)](…)``."""
    tiles = cuda.shared.array(0, float16)
    a = cuda.local.array((2, 4), uint32)
    b = cuda.local.array((4, 2), uint32)
    acc = cuda.local.array((2, 4, 4), float32)
    slots = cuda.local.array((2, 2, 2), int32)
    product_qkv_rope(
        A, Bt, q, k_cache, v_cache, slot_mapping, positions, cos, sin, M, K, n_head, n_kv_head, head_dim, block_size,
        tiles, a, b, acc, slots, LARGE_STAGES,
    )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def product_swiglu(A, Bt, C, M, d_ff, K, tiles, a, b, acc, b_stages):
    """The whole of ``gemm_swiglu``."""
    M, d_ff = int32(M), int32(d_ff)
    griddep_launch()
    multiply_columns(A, Bt, tiles, a, b, acc, M, 2 * d_ff, int32(0), int32(K), b_stages)
    for m in range(acc.shape[0]):
        for half in range(2):
            row = tile_row(acc, m, half)
            for n in range(acc.shape[1]):
                i = tile_col(acc, n) >> 1
                if row < M and i < d_ff:
                    C[row * d_ff + i] = silu_of(acc[m, n, 2 * half]) * acc[m, n, 2 * half + 1]


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemm_swiglu_32(A, Bt, C, M, d_ff, K):
    """C[r, i] = silu(gate[r, i]) * value[r, i], both of A @ Bt.T, in float16. Tiles of 32 x 32.

    A: (M, K), Bt: (2 * d_ff, K) float16, its rows in ``paired_order``. C: (M * d_ff,) float16, flat. M, d_ff, K: int32,
    K a multiple of 8. Launch: ``gemm_swiglu_32[skinny_launch(M, 2 * d_ff, 32)](…)``, 128 threads.
    """
    tiles = cuda.shared.array(0, float16)
    a = cuda.local.array((1, 4), uint32)
    b = cuda.local.array((2, 2), uint32)
    acc = cuda.local.array((1, 2, 4), float32)
    product_swiglu(A, Bt, C, M, d_ff, K, tiles, a, b, acc, SMALL_STAGES)


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemm_swiglu_64(A, Bt, C, M, d_ff, K):
    """:func:`gemm_swiglu_32` in tiles of 64 x 64. Launch: ``gemm_swiglu_64[skinny_launch(M, 2 * d_ff, 64)](…)``."""
    tiles = cuda.shared.array(0, float16)
    a = cuda.local.array((2, 4), uint32)
    b = cuda.local.array((4, 2), uint32)
    acc = cuda.local.array((2, 4, 4), float32)
    product_swiglu(A, Bt, C, M, d_ff, K, tiles, a, b, acc, LARGE_STAGES)


def gemm_qkv_rope(tile):
    """The kernel with such a tile: 32 or 64."""
    return gemm_qkv_rope_32 if tile == SMALL else gemm_qkv_rope_64


def gemm_swiglu(tile):
    """The kernel with such a tile: 32 or 64."""
    return gemm_swiglu_32 if tile == SMALL else gemm_swiglu_64


# --- references ------------------------------------------------------------------------------------------------------


def rms_reference(x, eps):
    """RMS norm without a weight, in float64: (rows, d_model)."""
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)


def parts_rms_reference(x, parts, bias, eps):
    """NumPy reference of :func:`parts_rms`: (x afterwards, float32, h, float16). parts: (n_parts, rows, d_model)."""
    x = x + (parts.astype(np.float64).sum(axis=0) + bias if len(parts) else 0)
    return x.astype(np.float32), rms_reference(x, eps).astype(np.float16)


def swiglu_product_reference(h, W):
    """NumPy reference of the gated products: h (rows, d_model) is normal, W (2 * d_ff, d_model) has gates and then
    values; returns (rows, d_ff) float16."""
    both = h.astype(np.float64) @ W.astype(np.float64).T
    return swiglu_fused_reference(both.astype(np.float32)).astype(np.float16)
