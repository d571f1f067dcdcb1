"""Chapter 13, what comes before and behind the products of some dozen rows (chapter 9's ``skinny.py``).

Up to eight rows, ``fused.py`` hides a whole layer behind five matrix-vector products. With more, a product is tiles,
and a norm can no longer be taken along: each of its 24 or 96 blocks would need all of the row. So the norm is a kernel
of its own; but it has work that someone has to do anyway.

========================  ================================================  ==========================================
kernel                    what it does                                      kernels it saves
========================  ================================================  ==========================================
``parts_norm``            x += parts of a product and bias; h = norm of x   the residual's kernel, and what adds parts
``parts_norm_of``         the same for some rows only, x left alone         what gathers them
``gemm_qkv_pages_32``     queries, and keys and values in their pages       ``split_qkv_pages``
``gemm_gelu_32``          gelu(product + bias)                              ``gelu_kernel``
``gemm_logits_32``        logits, and each tile's likeliest token           most of ``argmax_row``
========================  ================================================  ==========================================

Each of the last three has a twin with tiles of 64 x 64, for more rows; a row's numbers are the same in both, since K is
added up in the same order. A layer is seven launches: norm, qkv, attention, parts, norm, gelu, parts.

What the epilogue needs from memory (biases, places in the pages) is asked for before the product begins, not behind it,
where nothing is left to wait with.
Sources: as ``fused.py`` and chapter 9's ``skinny.py``.
"""

import math

import numpy as np
from numba import cuda, float32, int32, uint32
from numba.types import float16

from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP, block_sum, row_launch
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
from common.ptx import (
    griddep_launch,
    griddep_wait,
    load_float4,
    load_float4_if,
    pack_half2,
    store_float4,
    store_half2,
)

from .kernels import gelu_of, gelu_reference

FOURS = 4  # pieces of 4 numbers that a thread holds of a row
ROW_MAX = 1024 * 4 * FOURS


# --- the residual stream ---------------------------------------------------------------------------------------------


def parts_norm_launch(rows, d_model):
    """Launch configuration of :func:`parts_norm` and :func:`parts_norm_of`: ``(grid, block)``, a block a row.

    Raises ValueError if a size is not positive, or d_model not a multiple of 8 or above 16384.
    """
    if not 8 <= d_model <= ROW_MAX or d_model % 8:
        raise ValueError(f"d_model = {d_model}: a row has a multiple of 8 numbers, at most {ROW_MAX}")
    threads = (d_model // 4 + WARP - 1) // WARP * WARP
    return row_launch(rows, min(threads, 1024), "parts_norm")


@cuda.jit(device=True, forceinline=True)
def load_row(x, parts, n_parts, bias, row, rows, d_model, keep, v, p):
    """v = this thread's numbers of y = x[row] + (the sum of the row's parts + bias), 0 behind its end; x[row] = y if
    keep. v: (FOURS, 4), p: (PARTS_MAX, 4) float32, local."""
    first = 4 * cuda.threadIdx.x
    step = 4 * cuda.blockDim.x
    for i in range(FOURS):
        col = first + i * step
        inside = col < d_model
        at = row * d_model + col
        v[i, 0], v[i, 1], v[i, 2], v[i, 3] = load_float4_if(x, at, inside)
        if inside and n_parts:
            for z in range(PARTS_MAX):  # asked for all at once
                place = (min(z, n_parts - 1) * rows + row) * d_model + col
                p[z, 0], p[z, 1], p[z, 2], p[z, 3] = load_float4_if(parts, place, z < n_parts)
            b0, b1, b2, b3 = load_float4(bias, col)
            s0 = s1 = s2 = s3 = float32(0)
            for z in range(PARTS_MAX):
                s0, s1, s2, s3 = s0 + p[z, 0], s1 + p[z, 1], s2 + p[z, 2], s3 + p[z, 3]
            v[i, 0], v[i, 1], v[i, 2], v[i, 3] = (
                v[i, 0] + (s0 + b0), v[i, 1] + (s1 + b1), v[i, 2] + (s2 + b2), v[i, 3] + (s3 + b3),
            )  # fmt: skip
            if keep:
                store_float4(x, at, v[i, 0], v[i, 1], v[i, 2], v[i, 3])


@cuda.jit(device=True, forceinline=True)
def store_row(h, to, d_model, v, mean, scale):
    """h[to] = (v - mean) * scale, in float16."""
    for i in range(FOURS):
        col = 4 * (cuda.threadIdx.x + i * cuda.blockDim.x)
        if col < d_model:
            at = to * d_model + col
            store_half2(h, at, pack_half2((v[i, 0] - mean) * scale, (v[i, 1] - mean) * scale))
            store_half2(h, at + 2, pack_half2((v[i, 2] - mean) * scale, (v[i, 3] - mean) * scale))


@cuda.jit(device=True, forceinline=True)
def norm_of_row(x, parts, n_parts, bias, row, rows, d_model, eps, keep, h, to, v, p, partial):
    """h[to] = (y - mean) / sqrt(variance + eps), y as :func:`load_row` has it.

    partial: (32,) float32, shared. By all threads of the block.
    """
    load_row(x, parts, n_parts, bias, row, rows, d_model, keep, v, p)
    total = float32(0)
    for i in range(FOURS):
        total += (v[i, 0] + v[i, 1]) + (v[i, 2] + v[i, 3])
    mean = block_sum(total, partial) / float32(d_model)
    total = float32(0)
    for i in range(FOURS):
        if 4 * (cuda.threadIdx.x + i * cuda.blockDim.x) < d_model:
            for e in range(4):
                distance = v[i, e] - mean
                total += distance * distance
    scale = float32(1) / math.sqrt(block_sum(total, partial) / float32(d_model) + float32(eps))
    store_row(h, to, d_model, v, mean, scale)


@cuda.jit
def parts_norm(x, parts, n_parts, bias, h, rows, d_model, eps):
    """x[r] += the sum of the row's parts + bias; h[r] = (x[r] - mean) / sqrt(variance + eps): a layer norm without
    weight and bias, which are in the matrix that follows (chapter 9's ``fold_norm``).

    x: (rows * d_model,) float32. parts: (n_parts * rows * d_model,) float32, of ``gemm_parts``; n_parts 0: neither it
    nor bias is read, and x stays as it is. bias: (d_model,) float32. h: (rows * d_model,) float16, written. All flat,
    from a multiple of 16 bytes on. n_parts, rows, d_model: int32. eps: float32.
    Launch: ``parts_norm[parts_norm_launch(rows, d_model)](…)``.
    """
    partial = cuda.shared.array(WARP, float32)
    v = cuda.local.array((FOURS, 4), float32)
    p = cuda.local.array((PARTS_MAX, 4), float32)
    griddep_launch()
    griddep_wait()
    row = int32(cuda.blockIdx.x)
    norm_of_row(x, parts, int32(n_parts), bias, row, int32(rows), int32(d_model), eps, 1, h, row, v, p, partial)


@cuda.jit
def parts_norm_of(x, parts, n_parts, bias, listed, h, rows, d_model, eps):
    """h[i] = what :func:`parts_norm` makes of row listed[i]; x stays as it is.

    listed: int32, a row a block, from 0 to rows - 1; h has as many rows. All else as there.
    Launch: ``parts_norm_of[parts_norm_launch(n_listed, d_model)](…)``.
    """
    partial = cuda.shared.array(WARP, float32)
    v = cuda.local.array((FOURS, 4), float32)
    p = cuda.local.array((PARTS_MAX, 4), float32)
    griddep_launch()
    griddep_wait()
    row, to = int32(listed[cuda.blockIdx.x]), int32(cuda.blockIdx.x)
    norm_of_row(x, parts, int32(n_parts), bias, row, int32(rows), int32(d_model), eps, 0, h, to, v, p, partial)


# --- products --------------------------------------------------------------------------------------------------------


@cuda.jit(device=True, forceinline=True)
def load_biases(bias, N, acc, biases):
    """biases[n] = the two that belong to acc[m, n]: (n, 2) float32, local. 0 behind the end, which may be odd."""
    for n in range(acc.shape[1]):
        col = tile_col(acc, n)
        biases[n, 0] = bias[col] if col < N else float32(0)
        biases[n, 1] = bias[col + 1] if col + 1 < N else float32(0)


@cuda.jit(device=True, forceinline=True)
def product_qkv(
    A, Bt, bias, q, k_cache, v_cache, slot_mapping, M, K, n_head, n_kv_head, head_dim, block_size, tiles, a, b, acc,
    biases, slots, b_stages,
):  # fmt: skip
    """The whole of ``gemm_qkv_pages``. slots: (m, 2) int32, local."""
    M, n_kv_head = int32(M), int32(n_kv_head)
    q_width, kv_width = int32(n_head * head_dim), int32(n_kv_head * head_dim)
    N = q_width + 2 * kv_width
    dim_bits, page_bits = 31 - cuda.clz(int32(head_dim)), 31 - cuda.clz(int32(block_size))
    griddep_launch()
    load_biases(bias, N, acc, biases)
    for m in range(acc.shape[0]):
        for half in range(2):
            slots[m, half] = slot_mapping[min(tile_row(acc, m, half), M - 1)]
    multiply_columns(A, Bt, tiles, a, b, acc, M, N, int32(0), int32(K), b_stages)
    for n in range(acc.shape[1]):
        col = tile_col(acc, n)
        behind_q = col - q_width
        is_value = behind_q >= kv_width
        inner = behind_q - kv_width if is_value else behind_q
        head, dim = inner >> dim_bits, inner & (1 << dim_bits) - 1
        for m in range(acc.shape[0]):
            for half in range(2):
                row, slot = tile_row(acc, m, half), slots[m, half]
                pair = pack_half2(acc[m, n, 2 * half] + biases[n, 0], acc[m, n, 2 * half + 1] + biases[n, 1])
                if row < M and col < N:
                    if col < q_width:
                        store_half2(q, row * q_width + col, pair)
                    elif slot >= 0:
                        page, place = slot >> page_bits, slot & (1 << page_bits) - 1
                        at = (((page * n_kv_head + head << page_bits) + place) << dim_bits) + dim
                        if is_value:
                            store_half2(v_cache, at, pair)
                        else:
                            store_half2(k_cache, at, pair)


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemm_qkv_pages_32(
    A, Bt, bias, q, k_cache, v_cache, slot_mapping, M, K, n_head, n_kv_head, head_dim, block_size
):  # fmt: skip
    """Query, key and value of each row: keys and values to their pages. Tiles of 32 x 32.

    With y = A @ Bt.T + bias of (n_head + 2 * n_kv_head) * head_dim columns: q[r] = the first n_head * head_dim of y[r];
    the others, head by head, go to k_cache and v_cache, page slot_mapping[r] // block_size, place slot_mapping[r] %
    block_size. A: (M, K), Bt: (N, K) float16 with a row a column of y. bias: (N,) float32. q: float16, flat. k_cache,
    v_cache: (num_blocks, n_kv_head, block_size, head_dim) float16, but flat, below 2**31 elements. slot_mapping: (M,)
    int32; a row at -1 is padding, and no key of it is stored. head_dim (8 or more), block_size: powers of two; all
    sizes int32, K a multiple of 8. In a graph of dependent launches no kernel in front writes slot_mapping or bias.
    Launch: ``gemm_qkv_pages_32[skinny_launch(M, N, 32)](…)``, 128 threads.
    """
    tiles = cuda.shared.array(0, float16)
    a = cuda.local.array((1, 4), uint32)
    b = cuda.local.array((2, 2), uint32)
    acc = cuda.local.array((1, 2, 4), float32)
    biases = cuda.local.array((2, 2), float32)
    slots = cuda.local.array((1, 2), int32)
    product_qkv(
        A, Bt, bias, q, k_cache, v_cache, slot_mapping, M, K, n_head, n_kv_head, head_dim, block_size, tiles, a, b, acc,
        biases, slots, SMALL_STAGES,
    )  # fmt: skip


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemm_qkv_pages_64(
    A, Bt, bias, q, k_cache, v_cache, slot_mapping, M, K, n_head, n_kv_head, head_dim, block_size
):  # fmt: skip
    """:func:`gemm_qkv_pages_32` in tiles of 64 x 64. Launch: ``gemm_qkv_pages_64[skinny_launch(M, N, 64)](…)``."""
    tiles = cuda.shared.array(0, float16)
    a = cuda.local.array((2, 4), uint32)
    b = cuda.local.array((4, 2), uint32)
    acc = cuda.local.array((2, 4, 4), float32)
    biases = cuda.local.array((4, 2), float32)
    slots = cuda.local.array((2, 2), int32)
    product_qkv(
        A, Bt, bias, q, k_cache, v_cache, slot_mapping, M, K, n_head, n_kv_head, head_dim, block_size, tiles, a, b, acc,
        biases, slots, LARGE_STAGES,
    )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def product_gelu(A, Bt, bias, C, M, N, K, tiles, a, b, acc, biases, b_stages):
    """The whole of ``gemm_gelu``."""
    M, N = int32(M), int32(N)
    griddep_launch()
    load_biases(bias, N, acc, biases)
    multiply_columns(A, Bt, tiles, a, b, acc, M, N, int32(0), int32(K), b_stages)
    for m in range(acc.shape[0]):
        for half in range(2):
            row = tile_row(acc, m, half)
            for n in range(acc.shape[1]):
                col = tile_col(acc, n)
                low = gelu_of(acc[m, n, 2 * half] + biases[n, 0])
                high = gelu_of(acc[m, n, 2 * half + 1] + biases[n, 1])
                if row < M and col < N:
                    store_half2(C, row * N + col, pack_half2(low, high))


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemm_gelu_32(A, Bt, bias, C, M, N, K):
    """C = gelu(A @ Bt.T + bias) in float16: the first half of an MLP. Tiles of 32 x 32.

    A: (M, K), Bt: (N, K), C: (M * N,), flat, float16. bias: (N,) float32. M, N, K: int32, N and K multiples of 8.
    Launch: ``gemm_gelu_32[skinny_launch(M, N, 32)](…)``, 128 threads.
    """
    tiles = cuda.shared.array(0, float16)
    a = cuda.local.array((1, 4), uint32)
    b = cuda.local.array((2, 2), uint32)
    acc = cuda.local.array((1, 2, 4), float32)
    biases = cuda.local.array((2, 2), float32)
    product_gelu(A, Bt, bias, C, M, N, K, tiles, a, b, acc, biases, SMALL_STAGES)


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemm_gelu_64(A, Bt, bias, C, M, N, K):
    """:func:`gemm_gelu_32` in tiles of 64 x 64. Launch: ``gemm_gelu_64[skinny_launch(M, N, 64)](…)``."""
    tiles = cuda.shared.array(0, float16)
    a = cuda.local.array((2, 4), uint32)
    b = cuda.local.array((4, 2), uint32)
    acc = cuda.local.array((2, 4, 4), float32)
    biases = cuda.local.array((4, 2), float32)
    product_gelu(A, Bt, bias, C, M, N, K, tiles, a, b, acc, biases, LARGE_STAGES)


@cuda.jit(device=True, forceinline=True)
def product_logits(A, Bt, bias, logits, best, best_token, M, N, K, tiles, a, b, acc, biases, b_stages):
    """The whole of ``gemm_logits``."""
    M, N = int32(M), int32(N)
    lane = cuda.threadIdx.x % WARP
    griddep_launch()
    load_biases(bias, N, acc, biases)
    multiply_columns(A, Bt, tiles, a, b, acc, M, N, int32(0), int32(K), b_stages)
    for m in range(acc.shape[0]):
        for half in range(2):
            row = tile_row(acc, m, half)
            largest = float32(-np.inf)
            token = N  # stands for "none yet"
            for n in range(acc.shape[1]):
                for e in range(2):
                    col = tile_col(acc, n) + e
                    if col < N:
                        y = acc[m, n, 2 * half + e] + biases[n, e]
                        if row < M:
                            logits[row, col] = y
                        if y > largest or (y == largest and col < token):  # not NaN; -inf is better than none
                            largest, token = y, col
            for step in (1, 2):  # the 4 lanes of a row
                other = cuda.shfl_xor_sync(FULL_WARP, largest, step)
                other_token = cuda.shfl_xor_sync(FULL_WARP, token, step)
                if other > largest or (other == largest and other_token < token):
                    largest, token = other, other_token
            if row < M and lane % 4 == 0:
                place = 2 * cuda.blockIdx.y + cuda.threadIdx.x // WARP % 2
                best[row, place] = largest
                best_token[row, place] = token


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemm_logits_32(A, Bt, bias, logits, best, best_token, M, N, K):
    """logits = A @ Bt.T + bias, and the likeliest token of each half of a tile's columns. Tiles of 32 x 32.

    A: (M, K), Bt: (N, K) float16, N the size of the vocabulary. bias: (N,), logits: (M, N) float32. best: float32,
    best_token: int32, both (M or more, 2 * gridDim.y or more); equal logits: the lowest token; nothing but NaN: -inf
    and N. ``pick_best`` reads them. M, N, K: int32, K a multiple of 8.
    Launch: ``gemm_logits_32[skinny_launch(M, N, 32)](…)``, 128 threads.
    """
    tiles = cuda.shared.array(0, float16)
    a = cuda.local.array((1, 4), uint32)
    b = cuda.local.array((2, 2), uint32)
    acc = cuda.local.array((1, 2, 4), float32)
    biases = cuda.local.array((2, 2), float32)
    product_logits(A, Bt, bias, logits, best, best_token, M, N, K, tiles, a, b, acc, biases, SMALL_STAGES)


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemm_logits_64(A, Bt, bias, logits, best, best_token, M, N, K):
    """:func:`gemm_logits_32` in tiles of 64 x 64. Launch: ``gemm_logits_64[skinny_launch(M, N, 64)](…)``."""
    tiles = cuda.shared.array(0, float16)
    a = cuda.local.array((2, 4), uint32)
    b = cuda.local.array((4, 2), uint32)
    acc = cuda.local.array((2, 4, 4), float32)
    biases = cuda.local.array((4, 2), float32)
    product_logits(A, Bt, bias, logits, best, best_token, M, N, K, tiles, a, b, acc, biases, LARGE_STAGES)


def gemm_qkv_pages(tile):
    """The kernel with such a tile: 32 or 64."""
    return gemm_qkv_pages_32 if tile == SMALL else gemm_qkv_pages_64


def gemm_gelu(tile):
    """The kernel with such a tile: 32 or 64."""
    return gemm_gelu_32 if tile == SMALL else gemm_gelu_64


def gemm_logits(tile):
    """The kernel with such a tile: 32 or 64."""
    return gemm_logits_32 if tile == SMALL else gemm_logits_64


# --- references ------------------------------------------------------------------------------------------------------


def parts_norm_reference(x, parts, bias, eps):
    """NumPy reference of :func:`parts_norm`: (x afterwards, float32, h, float16). parts: (n_parts, rows, d_model)."""
    x = x + (parts.astype(np.float64).sum(axis=0) + bias if len(parts) else 0)
    centred = x - x.mean(axis=1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)
    return x.astype(np.float32), normal.astype(np.float16)


def gemm_gelu_reference(A, Bt, bias):
    """NumPy reference of :func:`gemm_gelu`: (M, N) float16."""
    return gelu_reference(A.astype(np.float64) @ Bt.astype(np.float64).T + bias).astype(np.float16)
