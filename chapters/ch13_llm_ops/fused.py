"""Chapter 13, what follows a matrix product, as its last lines: the operations of this chapter without launches.

An activation reads what a product has just written, and the product has had it in registers. So the fastest GELU is no
kernel; neither are the split into query, key and value, the append to the cache, or the search for the likeliest token.
Everything is float16 but sums, the residual stream and the logits. A layer norm's weight and bias are folded into the
matrix behind it (chapter 9's ``fold_norm``).

=====================  ==============================================  ===========================================
kernel                 the product behind it                           kernels it saves
=====================  ==============================================  ===========================================
``gemm_bias_gelu``     chapter 9's ``gemm_bias``, many rows            ``gelu_kernel``
``gemv_ln_gelu``       chapter 9's ``gemv_ln``, 8 rows at a time       ``layernorm_row``, ``gelu_kernel``
``gemv_ln_qkv``        the same                                        ``layernorm_row``, ``split_qkv_pages``
``gemv_ln_logits``     the same; a matrix of many rows                 ``layernorm_row``, most of ``argmax_row``
``gemv_parts_…``       chapter 9's ``gemv_bias_residual``              what combines chapter 12's ``paged_v4_parts``
``pick_best``          none: the likeliest token becomes the next      ``append_rows``
``append_rows``        none: a token chosen becomes the next           ``embed_rows``
=====================  ==============================================  ===========================================

**A step that is always the same.** The last two read and write the rows' positions in device memory, and the kernels
before them look there where a key belongs. A step so made of kernels whose arguments never change can be captured into
a CUDA graph once and replayed for every token, for one sequence or thirty.

Sources: as chapters 7 and 9; the tanh form of GELU as ``gelu_kernel``.
"""

import numpy as np
from numba import cuda, float32, int32, uint32
from numba.types import float16

from chapters.ch07_warp_reduce.argmax import block_argmax
from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP
from chapters.ch09_gemm.gemv_tensor import (
    MANY_THREADS,
    MANY_WARPS,
    ROWS_MAX,
    SHORT_STRIDE,
    SHORT_TILE,
    STEPS,
    THREADS,
    THREE_BLOCKS,
    TILE,
    WARPS,
    behind_norm,
    first_column,
    first_row,
    load_short_weights,
    load_weights,
    multiply_residual,
    multiply_steps,
    share_sums,
    sum_of_warps,
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

from .batch import slot_of
from .kernels import gelu_of, gelu_reference

PICK_THREADS = 1024
AT_ONCE = 4  # blocks whose best a thread of pick_best asks for at once
ONE_AND_MORE = (MANY_THREADS + THREADS, 1)  # so few registers that a block of the kernel behind it has room beside it
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
    """out[b] = gelu(W layernorm(x[b]) + bias), 8 rows at a time, in float16: the first half of an MLP.

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
    b0 = first_row()
    at = x_row(rows) * d_model + first_column()
    griddep_wait()
    c0, c1, c2, c3 = multiply_residual(x, at, W, row0, N, d_model, w, moments)
    share_sums(sums, rows - b0, c0, c1, c2, c3)
    cuda.syncthreads()
    if b < min(rows - b0, ROWS_MAX) and row0 + r < N:
        out[(b0 + b) * N + row0 + r] = gelu_of(behind_norm(sums, moments, r, b, row_sum, row_bias, d_model, eps))


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemv_ln_qkv(
    x, W, row_sums, bias, q, k_cache, v_cache, slot_mapping,
    rows, d_model, n_head, n_kv_head, head_dim, block_size, eps,
):  # fmt: skip
    """Query, key and value of each row of the residual stream: keys and values to their pages.

    With y = W layernorm(x[b]) + bias of (n_head + 2 * n_kv_head) * head_dim numbers: q[b] = the first n_head *
    head_dim; the others, head by head, go to k_cache and v_cache, page slot_mapping[b] // block_size, place
    slot_mapping[b] % block_size. x: (rows * d_model,) float32, flat. W: (N, d_model) float16 with as many rows as y.
    row_sums, bias: (N,) float32. q: float16, flat. k_cache, v_cache: (num_blocks, n_kv_head, block_size, head_dim)
    float16. slot_mapping: (rows,) int32; a row at -1 is padding, and no key of it is stored. In a graph of dependent
    launches, no kernel in front of this one writes it. block_size: a power of two; all sizes int32. Otherwise as
    chapter 9's ``gemv_ln``.
    Launch: ``gemv_ln_qkv[gemv_tensor_launch(N, d_model, rows)](…)``.
    """
    sums = cuda.shared.array((WARPS, ROWS_MAX, TILE), float32)
    moments = cuda.shared.array((WARPS, ROWS_MAX, 2), float32)
    w = cuda.local.array((STEPS, 2, 4), uint32)
    q_width, kv_width = n_head * head_dim, n_kv_head * head_dim
    N = q_width + 2 * kv_width
    row0 = cuda.blockIdx.x * TILE
    r, b = cuda.threadIdx.x % TILE, cuda.threadIdx.x // TILE
    col = row0 + r
    b0 = first_row()
    griddep_launch()
    load_weights(W, row0, first_column(), N, d_model, w)
    row_sum, row_bias = row_sums[min(col, N - 1)], bias[min(col, N - 1)]
    row = min(b0 + b, rows - 1)  # a division: while the weights are on their way
    slot = slot_mapping[row]
    page_bits = 31 - cuda.clz(int32(block_size))
    behind_q = max(col - q_width, 0)
    is_value = behind_q >= kv_width
    inner = behind_q - kv_width if is_value else behind_q
    head = int32(uint32(inner) // uint32(head_dim))
    dim = inner - head * head_dim
    at = x_row(rows) * d_model + first_column()
    griddep_wait()
    c0, c1, c2, c3 = multiply_residual(x, at, W, row0, N, d_model, w, moments)
    share_sums(sums, rows - b0, c0, c1, c2, c3)
    cuda.syncthreads()
    if b < min(rows - b0, ROWS_MAX) and col < N:
        y = behind_norm(sums, moments, r, b, row_sum, row_bias, d_model, eps)
        if col < q_width:
            q[row * q_width + col] = y
        elif slot >= 0:
            page, place = slot >> page_bits, slot & (block_size - 1)
            if is_value:
                v_cache[page, head, place, dim] = y
            else:
                k_cache[page, head, place, dim] = y


@cuda.jit(device=True, forceinline=True)
def multiply_parts(parts, lse, W, row0, N, n_active, row, n_head, n_chunks, bits, lse_stride, width, w):
    """``multiply_short_x`` of chapter 9 where x is attention in parts: returns the product with row lane % 4.

    row: the one of the four that this lane loads. bits: head_dim is 2 ** bits. w: (1, 2, 4), the first weights.
    """
    a = cuda.local.array((1, 4), uint32)
    more_w = cuda.local.array((1, 2, 4), uint32)
    behind = cuda.threadIdx.x % WARP // 4 % 2 * SHORT_STRIDE
    col = first_column()
    a[0, 0] = a[0, 1] = a[0, 2] = a[0, 3] = uint32(0)
    at = col + behind
    if at < width:
        a[0, 0], a[0, 1], a[0, 2], a[0, 3] = load_combined(
            parts, lse, n_active, row * n_chunks, at, row * n_head + (at >> bits), lse_stride, width
        )
    c0, c1, c2, c3 = multiply_steps(w, a, col, 2 * SHORT_STRIDE, width, float32(0), float32(0), float32(0), float32(0))
    col += 2 * SHORT_STRIDE
    while col - cuda.threadIdx.x % 4 * 8 < width:  # more than 1024 columns
        load_short_weights(W, row0, col, N, width, more_w)
        at = col + behind
        a[0, 0] = a[0, 1] = a[0, 2] = a[0, 3] = uint32(0)
        if at < width:
            a[0, 0], a[0, 1], a[0, 2], a[0, 3] = load_combined(
                parts, lse, n_active, row * n_chunks, at, row * n_head + (at >> bits), lse_stride, width
            )
        c0, c1, c2, c3 = multiply_steps(more_w, a, col, 2 * SHORT_STRIDE, width, c0, c1, c2, c3)
        col += 2 * SHORT_STRIDE
    return c0 + c3


@cuda.jit(launch_bounds=ONE_AND_MORE)
def gemv_parts_residual(
    parts, lse, W, bias, x, positions, rows, d_model, n_head, head_dim, n_chunks, lse_stride
):  # fmt: skip
    """x[b] += W @ attention[b] + bias, where attention lies in parts: the projection behind ``paged_v4_parts``.

    parts, lse, positions: as there, with n_chunks: gridDim.x there; lse_stride: ``lse_stride_of(n_chunks)``. W:
    (d_model, n_head * head_dim) float16. bias: (d_model,), x: (rows * d_model,) float32. All sizes int32. Each block
    combines the chunks for itself, as it loads them. A row at position -1 gets numbers that say nothing.
    Launch: ``gemv_parts_residual[gemv_residual_launch(d_model, n_head * head_dim, rows)](…)``.
    """
    sums = cuda.shared.array((MANY_WARPS, ROWS_MAX, SHORT_TILE), float32)
    w = cuda.local.array((1, 2, 4), uint32)
    r, b = cuda.threadIdx.x % SHORT_TILE, cuda.threadIdx.x // SHORT_TILE
    warp, group, of_four = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP // 4, cuda.threadIdx.x % 4
    row0 = cuda.blockIdx.x * SHORT_TILE
    width = n_head * head_dim
    b0 = first_row()
    left = min(rows - b0, ROWS_MAX)
    griddep_launch()
    load_short_weights(W, row0, first_column(), d_model, width, w)
    row_bias = bias[min(row0 + r, d_model - 1)]
    bits = 31 - cuda.clz(int32(head_dim))
    row = b0 + min(group // 2, left - 1)
    n_active = active_chunks(positions[row], head_dim)
    place = (b0 + b) * d_model + row0 + r
    griddep_wait()
    before = x[place] if b < left and row0 + r < d_model else float32(0)
    four = 0  # the first of four rows
    while True:
        total = multiply_parts(
            parts, lse, W, row0, d_model, n_active, row, n_head, n_chunks, bits, lse_stride, width, w
        )
        if four + of_four < left:
            sums[warp, four + of_four, group] = total
        four += 4
        if four >= left:
            break
        row = b0 + min(four + group // 2, left - 1)
        n_active = active_chunks(positions[row], head_dim)
    cuda.syncthreads()
    if b < left and row0 + r < d_model:
        x[place] = before + (sum_of_warps(sums, r, b) + row_bias)


@cuda.jit(device=True, forceinline=True)
def keep_best(y, r, row, col, logits, best, best_token, n_logits, vocab_size):
    """logits[row, col] = y, and the largest of the 16 of this block and row to best, its token to best_token.

    r: which of the 16 this thread has; they are half a warp, of which both halves call this. A row from n_logits on is
    none, and a column from vocab_size on.
    """
    largest = float32(-np.inf)
    token = int32(vocab_size)  # stands for "none yet"
    inside = row < n_logits
    if inside and col < vocab_size:
        logits[row, col] = y
        if y >= largest:  # not NaN
            largest = y
            token = int32(col)
    step = TILE // 2
    while step:
        other = cuda.shfl_xor_sync(FULL_WARP, largest, step)
        other_token = cuda.shfl_xor_sync(FULL_WARP, token, step)
        if other > largest or (other == largest and other_token < token):
            largest = other
            token = other_token
        step //= 2
    if inside and r == 0:
        best[row, cuda.blockIdx.x] = largest
        best_token[row, cuda.blockIdx.x] = token


@cuda.jit(launch_bounds=THREE_BLOCKS)
def gemv_ln_logits(
    x, logits_rows, W, row_sums, bias, logits, best, best_token, n_logits, vocab_size, d_model, eps
):  # fmt: skip
    """logits[i] = W layernorm(x[logits_rows[i]]) + bias, and each block's largest and its token: greedy, first half.

    x: float32, flat, rows of d_model. logits_rows: (n_logits,) int32. W: (vocab_size, d_model) float16, GPT-2's
    embedding with its last layer norm in it. logits: (n_logits, vocab_size) float32. best: float32, best_token: int32,
    both (n_logits, blocks along x of the launch); equal logits: the lowest token; a block of nothing but NaN: -inf and
    vocab_size. Otherwise as chapter 9's ``gemv_ln``.
    Launch: ``gemv_ln_logits[gemv_tensor_launch(vocab_size, d_model, n_logits)](…)``.
    """
    sums = cuda.shared.array((WARPS, ROWS_MAX, TILE), float32)
    moments = cuda.shared.array((WARPS, ROWS_MAX, 2), float32)
    w = cuda.local.array((STEPS, 2, 4), uint32)
    row0 = cuda.blockIdx.x * TILE
    r, b = cuda.threadIdx.x % TILE, cuda.threadIdx.x // TILE
    col = row0 + r
    b0 = first_row()
    griddep_launch()
    load_weights(W, row0, first_column(), vocab_size, d_model, w)
    row_sum, row_bias = row_sums[min(col, vocab_size - 1)], bias[min(col, vocab_size - 1)]
    at = logits_rows[x_row(n_logits)] * d_model + first_column()
    griddep_wait()
    c0, c1, c2, c3 = multiply_residual(x, at, W, row0, vocab_size, d_model, w, moments)
    share_sums(sums, n_logits - b0, c0, c1, c2, c3)
    cuda.syncthreads()
    if b < ROWS_MAX and b // 2 * 2 < n_logits - b0:  # whole warps, of two rows each
        y = float32(0)
        if b < n_logits - b0:
            y = behind_norm(sums, moments, r, b, row_sum, row_bias, d_model, eps)
        keep_best(y, r, b0 + b, col, logits, best, best_token, n_logits, vocab_size)


# --- the ends of a step ----------------------------------------------------------------------------------------------


@cuda.jit(device=True, forceinline=True)
def append_and_embed(
    token, row, position, slot, place, chosen, positions, slot_mapping, ring, shown, wte, wpe, x
):  # fmt: skip
    """What a step ends with: the token to chosen and shown, the row one on, the token's embedding to x; by all threads.

    position, slot: the row's next; place: ring[row] as it was.
    """
    if cuda.threadIdx.x == 0:
        chosen[row] = token
        if place >= 0:
            shown[place, row] = token
            positions[row] = position
            slot_mapping[row] = slot
            ring[row] = place + 1 if place + 1 < shown.shape[0] else 0
    if place >= 0 and (position < wpe.shape[0] or wpe.shape[0] == 0):  # a next step has a place
        d_model = wte.shape[1]
        c = cuda.threadIdx.x
        while c < d_model:  # a range would divide by the step, to know how often
            value = float32(wte[max(token, 0), c])
            if wpe.shape[0]:
                value += float32(wpe[position, c])
            x[row * d_model + c] = value
            c += cuda.blockDim.x


def pick_best_launch(n_rows=1):
    """Launch configuration of :func:`pick_best`: ``(grid, block)``, a block a row. Raises ValueError without a row."""
    if n_rows <= 0:
        raise ValueError(f"{n_rows} rows: a launch needs at least 1")
    return n_rows, PICK_THREADS


@cuda.jit
def pick_best(
    best, best_token, n_blocks, vocab_size, chosen, positions, slot_mapping, block_table, block_size, ring, shown,
    wte, wpe, x,
):  # fmt: skip
    """chosen[i] = the likeliest token of row i, from each block's best; otherwise as :func:`append_rows`.

    best, best_token: (n_rows, n_blocks) from :func:`gemv_ln_logits`. -1 if all logits are NaN. n_blocks, vocab_size:
    int32. A thread asks for four blocks' bests at once, and waits once.
    Launch: ``pick_best[pick_best_launch(n_rows)](…)``.
    """
    partial = cuda.shared.array(WARP, float32)
    partial_token = cuda.shared.array(WARP, int32)
    values = cuda.local.array(AT_ONCE, float32)
    tokens = cuda.local.array(AT_ONCE, int32)
    griddep_launch()
    row = cuda.blockIdx.x
    position = positions[row] + 1
    place = ring[row]
    slot = slot_of(block_table, row, position, block_size)
    griddep_wait()
    largest = float32(-np.inf)
    token = int32(vocab_size)
    first = cuda.threadIdx.x
    while first < n_blocks:
        for i in range(AT_ONCE):
            block = min(first + i * cuda.blockDim.x, n_blocks - 1)
            values[i], tokens[i] = best[row, block], best_token[row, block]
        for i in range(AT_ONCE):
            if values[i] > largest or (values[i] == largest and tokens[i] < token):
                largest = values[i]
                token = tokens[i]
        first += AT_ONCE * cuda.blockDim.x
    largest, token = block_argmax(largest, token, partial, partial_token)
    token = token if token < vocab_size else int32(-1)
    append_and_embed(
        token, row, position, slot, place, chosen, positions, slot_mapping, ring, shown, wte, wpe, x
    )  # fmt: skip


def append_rows_launch(n_rows=1):
    """Launch configuration of :func:`append_rows`: ``(grid, block)``, a block a row. Raises ValueError if none."""
    return pick_best_launch(n_rows)[0], APPEND_THREADS


@cuda.jit
def append_rows(chosen, positions, slot_mapping, block_table, block_size, ring, shown, wte, wpe, x):
    """Row i is one token longer: shown[ring[i], i] = chosen[i], positions[i] += 1, the token's embedding to x[i].

    chosen, positions, slot_mapping, ring: (n_rows,) int32. slot_mapping[i] becomes the place in the pages of the row's
    new position, as line i of block_table, (n_rows or more, max_blocks) int32, has it: if that has no page for it yet,
    ``place_rows`` has to follow when it has. block_size: int32, a power of two. shown: (places, n_rows or more) int32,
    which may lie in the host's memory (``cuda.mapped_array``), where it is read without a copy; ring[i] goes on to the
    next place, and round, so that a step's tokens are there until the host has read them. A row with -1 in ring is
    padding, or is not one on: nothing but chosen is written. wte: (vocab_size, d_model), wpe: (n_ctx, d_model), float16
    or float32; x: float32, flat, left alone if wpe has no such position. wpe (0, d_model): nothing is added, in models
    that have no table of positions. Token -1 (there was none to choose) embeds as 0.
    Launch: ``append_rows[append_rows_launch(n_rows)](…)``.
    """
    griddep_launch()
    griddep_wait()
    row = cuda.blockIdx.x
    position = positions[row] + 1
    place = ring[row]
    token = chosen[row]
    slot = slot_of(block_table, row, position, block_size)
    cuda.syncthreads()  # all have read them
    append_and_embed(
        token, row, position, slot, place, chosen, positions, slot_mapping, ring, shown, wte, wpe, x
    )  # fmt: skip


# --- references ------------------------------------------------------------------------------------------------------


def gemm_bias_gelu_reference(A, Bt, bias):
    """NumPy reference of :func:`gemm_bias_gelu`: float16 operands, (N,) float32 bias; returns (M, N) float16."""
    return gelu_reference(A.astype(np.float64) @ Bt.astype(np.float64).T + bias).astype(np.float16)


def gemv_ln_logits_reference(x, W, bias, eps):
    """NumPy reference of the logits of :func:`gemv_ln_logits`: (d_model,) float32; returns (vocab_size,) float32."""
    x = x.astype(np.float64) - x.mean(dtype=np.float64)
    return (W.astype(np.float64) @ (x / np.sqrt((x**2).mean() + eps)) + bias).astype(np.float32)
