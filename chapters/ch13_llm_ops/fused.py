"""Chapter 13, what follows a matrix product, as its last lines: the operations of this chapter without launches.

An activation reads what a product has just written, and the product has had it in registers. So the fastest GELU is no
kernel; neither are the split into query, key and value, the append to the cache, or the search for the likeliest token.
Everything is float16 but sums, the residual stream and the logits.

=====================  ==============================================  ===========================================
kernel                 the product behind it                           kernels it saves
=====================  ==============================================  ===========================================
``gemm_bias_gelu``     chapter 9's ``gemm_bias``, many rows            ``gelu_kernel``
``gemv_ln_gelu``       chapter 9's ``gemv_ln``, 1 to 8 rows            ``layernorm_row``, ``gelu_kernel``
``gemv_ln_qkv``        the same, one row                               ``layernorm_row``, ``split_qkv``, ``kv_append``
``gemv_ln_logits``     the same, one row; a wide matrix                ``layernorm_row``, most of ``greedy_argmax``
``split_qkv_append``   none: behind ``gemm_bias`` in a prefill         ``kv_append``
``embed_at``           none: the first kernel of a step
``pick_best``          none: the likeliest token becomes the next
``append_token``       none: a token drawn becomes the next
=====================  ==============================================  ===========================================

**A step that is always the same.** The last three read and write ``tokens`` and ``pos`` in device memory. A step so
made of kernels whose arguments never change can be captured into a CUDA graph once and replayed for every token.

Sources: as chapters 7 and 9; the tanh form of GELU as ``gelu_kernel``.
"""

import numpy as np
from numba import cuda, float32, int32, uint32
from numba.types import float16

from chapters.ch03_indexing.kernels import blocks_2d
from chapters.ch07_warp_reduce.argmax import block_argmax
from chapters.ch07_warp_reduce.kernels import WARP
from chapters.ch09_gemm.gemv_tensor import (
    FOUR_BLOCKS,
    ROWS_MAX,
    TILE,
    WARPS,
    copy_norm,
    copy_weights,
    layernorm_half_reference,
    next_total,
    normalise_x,
    padded_depth,
    place_of_x,
    stores,
    tile_total,
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
from common.ptx import cp_async_wait, griddep_launch, griddep_wait

from .kernels import gelu_of, gelu_reference

PICK_THREADS = 1024


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


@cuda.jit(launch_bounds=FOUR_BLOCKS)
def gemv_ln_gelu(x, ln_weight, ln_bias, W, bias, out, rows, N, d_model, tile, eps):
    """out[b] = gelu(W @ layernorm(x[b]) + bias) for 1 to 8 rows, in float16: the first half of an MLP.

    out: (rows * N,) float16, flat. All else as chapter 9's ``gemv_ln``.
    Launch: ``gemv_ln_gelu[gemv_ln_launch(N, d_model, rows)](…)``.
    """
    shared = cuda.shared.array(0, float16, alignment=16)
    norm = cuda.shared.array(0, float32, alignment=16)
    sums = cuda.shared.array((WARPS, TILE, ROWS_MAX), float32)
    partial = cuda.shared.array((WARPS, 2), float32)
    r, b = cuda.threadIdx.x // ROWS_MAX, cuda.threadIdx.x % ROWS_MAX
    row0 = cuda.blockIdx.x * tile
    at = tile * padded_depth(d_model)
    norm_at = (at + rows * (padded_depth(d_model) + 8)) // 2
    griddep_launch()
    copy_norm(norm, norm_at, ln_weight, ln_bias, d_model)
    copy_weights(shared, 0, W, row0, tile, N, d_model)
    row_bias = bias[min(row0 + r, N - 1)]
    normalise_x(x, 0, norm, norm_at, shared, at, rows, d_model, eps, partial)
    cp_async_wait(0)
    total = tile_total(shared, 0, at, tile, rows, d_model, sums)
    if stores(row0, tile, rows, N):
        out[b * N + row0 + r] = gelu_of(total + row_bias)


@cuda.jit(device=True, forceinline=True)
def head_and_element(row, d_model, head_dim):
    """Head, and element of it, that row ``row`` of the 3 * d_model rows of query, key and value makes."""
    if row >= 2 * d_model:
        row -= 2 * d_model
    elif row >= d_model:
        row -= d_model
    head = row // head_dim
    return head, row - head * head_dim


@cuda.jit(launch_bounds=FOUR_BLOCKS)
def gemv_ln_qkv(x, ln_weight, ln_bias, W, bias, q, k_cache, v_cache, pos, d_model, head_dim, tile, eps):
    """Query, key and value of one token from its place in the residual stream: key and value to the cache's end.

    With y = W @ layernorm(x[0]) + bias of 3 * d_model numbers: q = the first d_model, k_cache[head, pos[0]] and
    v_cache[head, pos[0]] = the others, head by head. x: (1, d_model) float32. W: (3 * d_model, d_model) float16. bias:
    (3 * d_model,) float32. q: (d_model,) float16. k_cache, v_cache: (n_head, max_tokens, head_dim) float16. pos: (1,)
    int32, from 0 to max_tokens - 1; in a graph of dependent launches, no kernel in front of this one writes it.
    d_model, head_dim: int32. tile, eps: as chapter 9's ``gemv_ln``.
    Launch: ``gemv_ln_qkv[gemv_ln_launch(3 * d_model, d_model)](…)``.
    """
    shared = cuda.shared.array(0, float16, alignment=16)
    norm = cuda.shared.array(0, float32, alignment=16)
    sums = cuda.shared.array((WARPS, TILE, ROWS_MAX), float32)
    partial = cuda.shared.array((WARPS, 2), float32)
    N = 3 * d_model
    row0 = cuda.blockIdx.x * tile
    row = row0 + cuda.threadIdx.x // ROWS_MAX
    at = tile * padded_depth(d_model)
    norm_at = (at + padded_depth(d_model) + 8) // 2
    griddep_launch()
    copy_norm(norm, norm_at, ln_weight, ln_bias, d_model)
    copy_weights(shared, 0, W, row0, tile, N, d_model)
    row_bias = bias[min(row, N - 1)]
    head, i = head_and_element(row, d_model, head_dim)  # divisions: while the weights are on their way
    slot = pos[0]
    normalise_x(x, 0, norm, norm_at, shared, at, 1, d_model, eps, partial)
    cp_async_wait(0)
    total = tile_total(shared, 0, at, tile, 1, d_model, sums)
    if stores(row0, tile, 1, N):
        if row < d_model:
            q[row] = total + row_bias
        elif row < 2 * d_model:
            k_cache[head, slot, i] = total + row_bias
        else:
            v_cache[head, slot, i] = total + row_bias


@cuda.jit(launch_bounds=FOUR_BLOCKS)
def gemv_ln_logits(x, at_row, ln_weight, ln_bias, W, logits, best, best_token, vocab_size, d_model, tile, eps):
    """logits = W @ layernorm(x[at_row]), and each block's largest logit and its token: greedy decoding, first half.

    x: (T, d_model) float32; at_row: int32, the row of x. W: (vocab_size, d_model) float16, GPT-2's embedding. logits:
    (vocab_size,) float32. best: float32, best_token: int32, both (blocks,), with blocks those of the launch; equal
    logits: the lowest token; a block of nothing but NaN: -inf and vocab_size. tile, eps: as chapter 9's ``gemv_ln``.
    Launch: ``gemv_ln_logits[gemv_ln_tensor_launch(vocab_size, d_model)](…)``.
    """
    shared = cuda.shared.array(0, float16, alignment=16)
    norm = cuda.shared.array(0, float32, alignment=16)
    sums = cuda.shared.array((WARPS, TILE, ROWS_MAX), float32)
    partial = cuda.shared.array((WARPS, 2), float32)
    best_partial = cuda.shared.array(WARP, float32)
    token_partial = cuda.shared.array(WARP, int32)
    row0 = cuda.blockIdx.x * tile
    at = place_of_x(tile, vocab_size, d_model)
    norm_at = (at + 1 * (padded_depth(d_model) + 8)) // 2
    stage = 0
    griddep_launch()
    copy_norm(norm, norm_at, ln_weight, ln_bias, d_model)
    copy_weights(shared, stage, W, row0, tile, vocab_size, d_model)
    normalise_x(x, at_row, norm, norm_at, shared, at, 1, d_model, eps, partial)
    largest = float32(-np.inf)
    token = int32(vocab_size)  # stands for "none yet"
    while row0 < vocab_size:
        total = next_total(shared, stage, at, W, row0, tile, 1, vocab_size, d_model, sums)
        if stores(row0, tile, 1, vocab_size):
            row = row0 + cuda.threadIdx.x // ROWS_MAX
            logits[row] = total
            if total > largest or (total == largest and row < token):
                largest = total
                token = int32(row)
        row0 += cuda.gridDim.x * tile
        stage = 1 - stage
    largest, token = block_argmax(largest, token, best_partial, token_partial)
    if cuda.threadIdx.x == 0:
        best[cuda.blockIdx.x] = largest
        best_token[cuda.blockIdx.x] = token


def pick_best_launch():
    """Launch configuration of :func:`pick_best`: ``(grid, block)``, one block."""
    return 1, PICK_THREADS


@cuda.jit
def pick_best(best, best_token, n_blocks, vocab_size, tokens, shown, pos):
    """tokens[pos[0] + 1] = the likeliest token, from each block's best; then pos[0] += 1: the end of a greedy step.

    best, best_token: (n_blocks,) from :func:`gemv_ln_logits`. tokens, shown: (max_tokens + 1,) int32; ``shown`` gets
    the same token and may lie in the host's memory (``cuda.mapped_array``), where the host reads it without a copy.
    -1 if all logits are NaN. pos: (1,) int32. n_blocks, vocab_size: int32.
    Launch: ``pick_best[pick_best_launch()](…)``.
    """
    partial = cuda.shared.array(WARP, float32)
    partial_token = cuda.shared.array(WARP, int32)
    griddep_launch()
    griddep_wait()
    largest = float32(-np.inf)
    token = int32(vocab_size)
    for block in range(cuda.threadIdx.x, n_blocks, cuda.blockDim.x):
        if best[block] > largest or (best[block] == largest and best_token[block] < token):
            largest = best[block]
            token = best_token[block]
    largest, token = block_argmax(largest, token, partial, partial_token)
    if cuda.threadIdx.x == 0:
        slot = pos[0] + 1
        chosen = token if token < vocab_size else -1
        tokens[slot] = chosen
        shown[slot] = chosen
        pos[0] = slot


def append_token_launch():
    """Launch configuration of :func:`append_token`: ``(grid, block)``, a single thread."""
    return 1, 1


@cuda.jit
def append_token(chosen, tokens, shown, pos, step):
    """tokens[pos[0] + 1] = shown[pos[0] + 1] = chosen[0]; then pos[0] += 1, step[0] += 1: the end of a sampled step.

    chosen: (1,) int32. tokens, shown, pos: as :func:`pick_best`. step: (1,) int64, of the seed's random numbers.
    Launch: ``append_token[append_token_launch()](…)``, one thread.
    """
    griddep_launch()
    griddep_wait()
    slot = pos[0] + 1
    tokens[slot] = chosen[0]
    shown[slot] = chosen[0]
    pos[0] = slot
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


def gemv_ln_logits_reference(x, ln_weight, ln_bias, W, eps):
    """NumPy reference of the logits of :func:`gemv_ln_logits`: (d_model,) float32; returns (vocab_size,) float32."""
    hidden = layernorm_half_reference(x[None], ln_weight, ln_bias, eps)[0].astype(np.float64)
    return (W.astype(np.float64) @ hidden).astype(np.float32)
