"""Chapter 13, what follows a matrix product, as its last lines: the operations of this chapter without launches.

An activation reads what a product has just written, and the product has had it in registers. So the fastest GELU is no
kernel; neither are the split into query, key and value, the append to the cache, or the search for the likeliest token.
Everything is float16 but sums, the residual stream and the logits. A layer norm's weight and bias are folded into the
matrix behind it (chapter 9's ``fold_norm``).

=====================  ==============================================  ===========================================
kernel                 the product behind it                           kernels it saves
=====================  ==============================================  ===========================================
``gemm_bias_gelu``     chapter 9's ``gemm_bias``, many rows            ``gelu_kernel``
``gemv_ln_gelu``       chapter 9's ``gemv_ln``, 1 to 8 rows            ``layernorm_row``, ``gelu_kernel``
``gemv_ln_qkv``        the same, one row                               ``layernorm_row``, ``split_qkv``, ``kv_append``
``gemv_ln_logits``     the same, one row; a matrix of many rows        ``layernorm_row``, most of ``greedy_argmax``
``gemv_parts_…``       chapter 9's ``gemv_bias_residual``, one row     what combines chapter 12's ``decode_v4_parts``
``split_qkv_append``   none: behind ``gemm_bias`` in a prefill         ``kv_append``
``embed_at``           none: in front of a prompt
``pick_best``          none: the likeliest token becomes the next      ``embed_at``
``append_token``       none: a token drawn becomes the next            ``embed_at``
=====================  ==============================================  ===========================================

**A step that is always the same.** The last two read and write ``tokens`` and ``pos`` in device memory. A step so
made of kernels whose arguments never change can be captured into a CUDA graph once and replayed for every token.

Sources: as chapters 7 and 9; the tanh form of GELU as ``gelu_kernel``.
"""

import numpy as np
from numba import cuda, float32, int32, uint32
from numba.types import float16

from chapters.ch03_indexing.kernels import blocks_2d
from chapters.ch07_warp_reduce.argmax import block_argmax, warp_argmax
from chapters.ch07_warp_reduce.kernels import WARP
from chapters.ch09_gemm.gemv_tensor import (
    MANY_WARPS,
    ONE_BLOCK,
    ROWS_MAX,
    SHORT_STRIDE,
    SHORT_TILE,
    STEPS,
    THREE_BLOCKS,
    TILE,
    WARPS,
    behind_norm,
    first_column,
    load_short_weights,
    load_weights,
    multiply_residual,
    multiply_steps,
    share_sums,
    x_row,
)
from chapters.ch09_gemm.pipeline import (
    DEPTH,
    FIVE_BLOCKS,
    M_SMALL,
    N_SMALL,
    SMALL,
    STAGES,
    element_col,
    element_row,
    store_pair,
    tile_product,
)
from chapters.ch12_flash.decode_half import active_chunks, load_combined
from common.ptx import griddep_launch, griddep_wait

from .kernels import gelu_of, gelu_reference

PICK_THREADS = 1024
APPEND_THREADS = 256


@cuda.jit(launch_bounds=FIVE_BLOCKS)
def gemm_bias_gelu(A, Bt, bias, C, M, N, K):
    """C = gelu(A @ Bt.T + bias), rounded to float16: the first half of an MLP, for many tokens.

    A: (M, K), Bt: (N, K), C: (M, N) float16. bias: (N,) float32. All else as chapter 9's ``gemm_bias``.
    Launch: ``gemm_bias_gelu[gemm_bias_launch(M, N)](…)``.
    """
    a_tiles = cuda.shared.array((STAGES, SMALL, DEPTH), float16, alignment=16)
    b_tiles = cuda.shared.array((STAGES, SMALL, DEPTH), float16, alignment=16)
    a = cuda.local.array((M_SMALL, 4), uint32)
    b = cuda.local.array((N_SMALL, 2), uint32)
    next_a = cuda.local.array((M_SMALL, 4), uint32)
    next_b = cuda.local.array((N_SMALL, 2), uint32)
    acc = cuda.local.array((M_SMALL, N_SMALL, 4), float32)
    tile_product(A, Bt, a_tiles, b_tiles, a, b, next_a, next_b, acc, M, N, K)
    for n in range(N_SMALL):
        col = element_col(SMALL, n)
        bias0 = bias[col] if col < N else float32(0)
        bias1 = bias[col + 1] if col + 1 < N else float32(0)
        for m in range(M_SMALL):
            for half in range(2):
                low, high = gelu_of(acc[m, n, 2 * half] + bias0), gelu_of(acc[m, n, 2 * half + 1] + bias1)
                store_pair(C, element_row(SMALL, m, half), col, M, N, low, high)


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemv_ln_gelu(x, W, row_sums, bias, out, rows, N, d_model, eps):
    """out[b] = gelu(W layernorm(x[b]) + bias) for 1 to 8 rows, in float16: the first half of an MLP.

    out: (rows * N,) float16, flat. All else as chapter 9's ``gemv_ln``.
    Launch: ``gemv_ln_gelu[gemv_tensor_launch(N, d_model, rows)](…)``.
    """
    sums = cuda.shared.array((WARPS, ROWS_MAX, TILE), float32)
    moments = cuda.shared.array((WARPS, ROWS_MAX, 2), float32)
    w = cuda.local.array((STEPS, 2, 4), uint32)
    r, b = cuda.threadIdx.x % TILE, cuda.threadIdx.x // TILE
    row0 = cuda.blockIdx.x * TILE
    griddep_launch()
    load_weights(W, row0, first_column(), N, d_model, w)
    row_sum, row_bias = row_sums[min(row0 + r, N - 1)], bias[min(row0 + r, N - 1)]
    at = x_row(rows) * d_model + first_column()
    griddep_wait()
    c0, c1, c2, c3 = multiply_residual(x, at, W, row0, N, d_model, w, moments)
    share_sums(sums, rows, c0, c1, c2, c3)
    cuda.syncthreads()
    if b < rows and row0 + r < N:
        out[b * N + row0 + r] = gelu_of(behind_norm(sums, moments, r, b, row_sum, row_bias, d_model, eps))


@cuda.jit(device=True, forceinline=True)
def head_and_element(row, d_model, head_dim):
    """Head, and element of it, that row ``row`` of the 3 * d_model rows of query, key and value makes."""
    if row >= 2 * d_model:
        row -= 2 * d_model
    elif row >= d_model:
        row -= d_model
    head = row // head_dim
    return head, row - head * head_dim


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemv_ln_qkv(x, W, row_sums, bias, q, k_cache, v_cache, pos, d_model, head_dim, eps):
    """Query, key and value of one token from its place in the residual stream: key and value to the cache's end.

    With y = W layernorm(x[0]) + bias of 3 * d_model numbers: q = the first d_model, k_cache[head, pos[0]] and
    v_cache[head, pos[0]] = the others, head by head. x: (d_model,) float32, flat. W: (3 * d_model, d_model) float16.
    row_sums, bias: (3 * d_model,) float32. q: (d_model,) float16. k_cache, v_cache: (n_head, max_tokens, head_dim)
    float16. pos: (1,) int32, from 0 to max_tokens - 1; in a graph of dependent launches, no kernel in front of this one
    writes it. d_model, head_dim: int32. All else as chapter 9's ``gemv_ln``.
    Launch: ``gemv_ln_qkv[gemv_tensor_launch(3 * d_model, d_model)](…)``.
    """
    sums = cuda.shared.array((WARPS, ROWS_MAX, TILE), float32)
    moments = cuda.shared.array((WARPS, ROWS_MAX, 2), float32)
    w = cuda.local.array((STEPS, 2, 4), uint32)
    N = 3 * d_model
    row0 = cuda.blockIdx.x * TILE
    r = cuda.threadIdx.x % TILE
    row = row0 + r
    griddep_launch()
    load_weights(W, row0, first_column(), N, d_model, w)
    row_sum, row_bias = row_sums[min(row, N - 1)], bias[min(row, N - 1)]
    head, i = head_and_element(row, d_model, head_dim)  # divisions: while the weights are on their way
    slot = pos[0]
    at = first_column()
    griddep_wait()
    c0, c1, c2, c3 = multiply_residual(x, at, W, row0, N, d_model, w, moments)
    share_sums(sums, 1, c0, c1, c2, c3)
    cuda.syncthreads()
    if cuda.threadIdx.x < TILE and row < N:
        y = behind_norm(sums, moments, r, 0, row_sum, row_bias, d_model, eps)
        if row < d_model:
            q[row] = y
        elif row < 2 * d_model:
            k_cache[head, slot, i] = y
        else:
            v_cache[head, slot, i] = y


@cuda.jit(launch_bounds=ONE_BLOCK)
def gemv_parts_residual(parts, lse, W, bias, x, pos, d_model, head_dim, lse_stride):
    """x[0] += W @ attention + bias, where the attention lies in parts: the projection behind ``decode_v4_parts``.

    parts, lse, pos, head_dim: as there, with n_head * head_dim = d_model; lse_stride: int32,
    ``lse_stride_of(n_chunks)``. W: (d_model, d_model) float16. bias, x: (d_model,) float32. d_model: int32. Each block
    combines the chunks for itself, as it loads them.
    Launch: ``gemv_parts_residual[gemv_residual_launch(d_model, d_model)](…)``.
    """
    sums = cuda.shared.array((MANY_WARPS, SHORT_TILE), float32)
    w = cuda.local.array((1, 2, 4), uint32)
    a = cuda.local.array((1, 4), uint32)
    r, group = cuda.threadIdx.x % SHORT_TILE, cuda.threadIdx.x % WARP // 4
    row0 = cuda.blockIdx.x * SHORT_TILE
    col = first_column()
    griddep_launch()
    load_short_weights(W, row0, col, d_model, d_model, w)
    row_bias = bias[min(row0 + r, d_model - 1)]
    n_active = active_chunks(pos[0], head_dim)
    bits = 31 - cuda.clz(int32(head_dim))
    at = col + group % 2 * SHORT_STRIDE
    griddep_wait()
    before = x[min(row0 + r, d_model - 1)]
    c0 = c1 = c2 = c3 = float32(0)
    while True:
        a[0, 0] = a[0, 1] = a[0, 2] = a[0, 3] = uint32(0)
        if at < d_model:
            p0, p1, p2, p3 = load_combined(parts, lse, n_active, at, at >> bits, lse_stride, d_model)
            a[0, 0], a[0, 1], a[0, 2], a[0, 3] = p0, p1, p2, p3
        c0, c1, c2, c3 = multiply_steps(w, a, col, 2 * SHORT_STRIDE, d_model, c0, c1, c2, c3)
        col += 2 * SHORT_STRIDE
        at += 2 * SHORT_STRIDE
        if col - cuda.threadIdx.x % 4 * 8 >= d_model:
            break
        load_short_weights(W, row0, col, d_model, d_model, w)  # d_model is more than 1024
    if cuda.threadIdx.x % 4 == 0:
        sums[cuda.threadIdx.x // WARP, group] = c0 + c3
    cuda.syncthreads()
    if cuda.threadIdx.x < SHORT_TILE and row0 + r < d_model:
        total = float32(0)
        for warp in range(MANY_WARPS):
            total += sums[warp, r]
        x[row0 + r] = before + (total + row_bias)


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemv_ln_logits(x, at_row, W, row_sums, bias, logits, best, best_token, vocab_size, d_model, eps):
    """logits = W layernorm(x[at_row]) + bias, and each block's largest and its token: greedy decoding, first half.

    x: (T * d_model,) float32, flat; at_row: int32, the row of x. W: (vocab_size, d_model) float16, GPT-2's embedding
    with its last layer norm in it. logits: (vocab_size,) float32. best: float32, best_token: int32, both (blocks,),
    with blocks those of the launch; equal logits: the lowest token; a block of nothing but NaN: -inf and vocab_size.
    All else as chapter 9's ``gemv_ln``. Launch: ``gemv_ln_logits[gemv_tensor_launch(vocab_size, d_model)](…)``.
    """
    sums = cuda.shared.array((WARPS, ROWS_MAX, TILE), float32)
    moments = cuda.shared.array((WARPS, ROWS_MAX, 2), float32)
    w = cuda.local.array((STEPS, 2, 4), uint32)
    row0 = cuda.blockIdx.x * TILE
    r = cuda.threadIdx.x % TILE
    row = row0 + r
    griddep_launch()
    load_weights(W, row0, first_column(), vocab_size, d_model, w)
    row_sum, row_bias = row_sums[min(row, vocab_size - 1)], bias[min(row, vocab_size - 1)]
    at = at_row * d_model + first_column()
    griddep_wait()
    c0, c1, c2, c3 = multiply_residual(x, at, W, row0, vocab_size, d_model, w, moments)
    share_sums(sums, 1, c0, c1, c2, c3)
    cuda.syncthreads()
    if cuda.threadIdx.x < WARP:
        largest = float32(-np.inf)
        token = int32(vocab_size)  # stands for "none yet"
        if cuda.threadIdx.x < TILE and row < vocab_size:
            y = behind_norm(sums, moments, r, 0, row_sum, row_bias, d_model, eps)
            logits[row] = y
            if y >= largest:  # not NaN
                largest = y
                token = int32(row)
        largest, token = warp_argmax(largest, token)
        if cuda.threadIdx.x == 0:
            best[cuda.blockIdx.x] = largest
            best_token[cuda.blockIdx.x] = token


# --- the ends of a step ----------------------------------------------------------------------------------------------


@cuda.jit(device=True, forceinline=True)
def append_and_embed(chosen, slot, tokens, shown, pos, wte, wpe, x):
    """What a step ends with: the token to its slot, ``pos``, and the token's embedding to x; by all threads."""
    if cuda.threadIdx.x == 0:
        tokens[slot] = chosen
        shown[slot] = chosen
        pos[0] = slot
    if slot < wpe.shape[0]:  # a next step has a place
        for c in range(cuda.threadIdx.x, wpe.shape[1], cuda.blockDim.x):
            x[c] = float32(wte[max(chosen, 0), c]) + float32(wpe[slot, c])


def pick_best_launch():
    """Launch configuration of :func:`pick_best`: ``(grid, block)``, one block."""
    return 1, PICK_THREADS


@cuda.jit
def pick_best(best, best_token, n_blocks, vocab_size, tokens, shown, pos, wte, wpe, x):
    """tokens[pos[0] + 1] = the likeliest token, from each block's best; pos[0] += 1; its embedding to x[0].

    best, best_token: (n_blocks,) from :func:`gemv_ln_logits`. tokens, shown: (max_tokens + 1,) int32; ``shown`` gets
    the same token and may lie in the host's memory (``cuda.mapped_array``), where the host reads it without a copy.
    -1 if all logits are NaN, which embeds as token 0. pos: (1,) int32. wte, wpe, x: as :func:`embed_at`; x is left
    alone if wpe has no such position. n_blocks, vocab_size: int32. Launch: ``pick_best[pick_best_launch()](…)``.
    """
    partial = cuda.shared.array(WARP, float32)
    partial_token = cuda.shared.array(WARP, int32)
    griddep_launch()
    griddep_wait()
    slot = pos[0] + 1
    largest = float32(-np.inf)
    token = int32(vocab_size)
    for block in range(cuda.threadIdx.x, n_blocks, cuda.blockDim.x):
        if best[block] > largest or (best[block] == largest and best_token[block] < token):
            largest = best[block]
            token = best_token[block]
    largest, token = block_argmax(largest, token, partial, partial_token)
    append_and_embed(token if token < vocab_size else -1, slot, tokens, shown, pos, wte, wpe, x)


def append_token_launch():
    """Launch configuration of :func:`append_token`: ``(grid, block)``, one block."""
    return 1, APPEND_THREADS


@cuda.jit
def append_token(chosen, tokens, shown, pos, step, wte, wpe, x):
    """tokens[pos[0] + 1] = shown[pos[0] + 1] = chosen[0]; pos[0] += 1, step[0] += 1; the token's embedding to x[0].

    chosen: (1,) int32. step: (1,) int64, of the seed's random numbers. All else as :func:`pick_best`.
    Launch: ``append_token[append_token_launch()](…)``.
    """
    griddep_launch()
    griddep_wait()
    slot = pos[0] + 1
    cuda.syncthreads()  # all have read pos
    append_and_embed(chosen[0], slot, tokens, shown, pos, wte, wpe, x)
    if cuda.threadIdx.x == 0:
        step[0] += 1


@cuda.jit
def embed_at(tokens, pos, wte, wpe, x, T, d_model):
    """x[t] = wte[tokens[pos[0] + t]] + wpe[pos[0] + t] for T tokens from position pos[0] on, added in float32.

    tokens: (max_tokens + 1,) int32. pos: (1,) int32. wte: (vocab_size, d_model), wpe: (n_ctx, d_model) float16. x:
    (T, d_model) float32. All C-contiguous. T, d_model: int32. A token below 0 (there was none to choose) reads as 0.
    Launch: ``embed_at[blocks_2d(T, d_model)](…)``.
    """
    c, t = cuda.grid(2)
    griddep_launch()
    griddep_wait()
    if t < T and c < d_model:
        place = pos[0] + t
        token = max(tokens[place], 0)
        x[t, c] = float32(wte[token, c]) + float32(wpe[place, c])


def split_qkv_append_launch(T, d_model):
    """Launch of :func:`split_qkv_append`: ``(grid, block)``, a thread for each column (x) of each token (y).

    Raises ValueError if a size is not positive.
    """
    return blocks_2d(T, d_model)


@cuda.jit
def split_qkv_append(qkv, q, k_cache, v_cache, pos, T, d_model, head_dim):
    """Rows of query, key and value apart, head by head; keys and values to the cache's end.

    qkv: (T, 3 * d_model) float16. q: (n_head, T, head_dim) float16. k_cache, v_cache: (n_head, max_tokens, head_dim)
    float16, written from token pos[0] on. pos: (1,) int32. T, d_model, head_dim: int32; pos[0] + T is at most
    max_tokens. Launch: ``split_qkv_append[split_qkv_append_launch(T, d_model)](…)``.
    """
    c, t = cuda.grid(2)
    if t < T and c < d_model:
        head, i = c // head_dim, c % head_dim
        slot = pos[0] + t
        q[head, t, i] = qkv[t, c]
        k_cache[head, slot, i] = qkv[t, d_model + c]
        v_cache[head, slot, i] = qkv[t, 2 * d_model + c]


# --- references ------------------------------------------------------------------------------------------------------


def gemm_bias_gelu_reference(A, Bt, bias):
    """NumPy reference of :func:`gemm_bias_gelu`: float16 operands, (N,) float32 bias; returns (M, N) float16."""
    return gelu_reference(A.astype(np.float64) @ Bt.astype(np.float64).T + bias).astype(np.float16)


def gemv_ln_logits_reference(x, W, bias, eps):
    """NumPy reference of the logits of :func:`gemv_ln_logits`: (d_model,) float32; returns (vocab_size,) float32."""
    x = x.astype(np.float64) - x.mean(dtype=np.float64)
    return (W.astype(np.float64) @ (x / np.sqrt((x**2).mean() + eps)) + bias).astype(np.float32)
