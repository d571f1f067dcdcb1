"""Chapter 12, the third rung of FlashAttention: the scores of 64 queries and 64 keys in the registers of a block.

What chapter 9 did for a product, twice over: scores = q @ k^T and out += p @ v, each thread with a small tile of the
result in registers, and between them the online softmax, in registers as well. What lies where, for one step:

================  ============================  ====================================================================
in shared memory  q_tile, k_tile: 64 x 32       32 elements of each head at a time: head_dim does not decide the size
                  p_tile: 64 x 64               probabilities: computed by one thread, needed by 16
                  v_tile: 32 x 64               half of the keys, half of a head of 128
in registers      scores: 4 x 4 a thread        4 queries, 4 keys
                  acc: 2 x 4 x 4 a thread       4 queries, 4 elements of each half of the head
                  largest, total: 4 a thread    largest is alike in a query's 16 threads; total is each one's own part
================  ============================  ====================================================================

For each multiplication a thread reads 1/2 float from shared memory, 16 bytes at a time; one float would be too much:
a multiprocessor multiplies four times as fast as it reads there. A head_dim of 32 leaves half of the threads without
work in p @ v. Arguments are those of ``flash_v1_warp_per_query`` in ``kernels.py``, where ``flash_attention`` is bound.
Source: Dao 2023, "FlashAttention-2".
"""

import math

from numba import cuda, float32

from chapters.ch07_warp_reduce.kernels import FULL_WARP
from chapters.ch10_softmax.kernels import LOWEST
from common.ptx import load_float4, store_float4

HEAD_DIM_MAX = 128
THREADS = 256  # 16 x 16, each with 4 queries and 4 keys
QUERIES = 64
KEYS = 64
CHUNK = 32  # elements of a head in shared memory at a time, for the scores
CHUNK_PADDED = CHUNK + 4  # still a multiple of 16 bytes; 8 rows down a column meet all 32 banks
KEYS_PADDED = KEYS + 4
V_KEYS = 32  # a tile of v: 32 keys x 64 elements of a head
V_DIMS = 64
HALVES = HEAD_DIM_MAX // V_DIMS


def flash_grid(n_tokens, n_head, head_dim, queries, threads):
    """Launch configuration of any version that takes ``queries`` a block, heads along y: ``(grid, block)``.

    Raises ValueError if a size is not positive, head_dim above 128 or n_head above 65535.
    """
    if n_tokens <= 0 or n_head <= 0 or head_dim <= 0:
        raise ValueError(f"{n_tokens} tokens, {n_head} heads of {head_dim}: attention needs at least 1 of each")
    if n_head > 65535:
        raise ValueError(f"n_head = {n_head}: a grid has at most 65535 blocks along y; launch slices of the heads")
    if head_dim > HEAD_DIM_MAX:
        raise ValueError(f"head_dim = {head_dim}: these kernels take at most {HEAD_DIM_MAX}; use ch11's mha_naive")
    return ((n_tokens + queries - 1) // queries, n_head), threads


def flash_v3_launch(n_tokens, n_head, head_dim):
    """Launch configuration of :func:`flash_v3_register_tiles`, 64 queries a block: ``(grid, block)``.

    Raises ValueError as :func:`flash_grid`, and if head_dim is not a multiple of 4, as reads of 16 bytes need it.
    """
    launch = flash_grid(n_tokens, n_head, head_dim, QUERIES, THREADS)
    if head_dim % 4:
        raise ValueError(f"head_dim = {head_dim}: rows must be a multiple of 4 floats long; use flash_v2_shared_tiles")
    return launch


@cuda.jit(device=True)
def half_warp_max(value):
    """Largest ``value`` (float32) of the 16 lanes of a half warp, in each of them. All 32 lanes must call it."""
    for step in range(4):
        value = max(value, cuda.shfl_xor_sync(FULL_WARP, value, 8 >> step))
    return value


@cuda.jit(device=True)
def half_warp_sum(value):
    """Sum of ``value`` (float32) over the 16 lanes of a half warp, in each of them. All 32 lanes must call it."""
    for step in range(4):
        value += cuda.shfl_xor_sync(FULL_WARP, value, 8 >> step)
    return value


@cuda.jit(device=True)
def load_tile(tile, x, head, row0, n_tokens, dim0, head_dim, width):
    """tile[r, i] = x[head, row0 + r, dim0 + i], 0 outside x: 2048 floats in rows of ``width``, by 256 threads.

    All are moved 16 bytes at a time, two a thread; neighbouring threads read on in the same row.
    """
    dim = cuda.threadIdx.x % (width // 4) * 4
    for part in range(2):
        row = cuda.threadIdx.x // (width // 4) + part * THREADS * 4 // width
        a, b, c, d = float32(0), float32(0), float32(0), float32(0)  # not what lies behind: 0 * NaN is NaN
        if row0 + row < n_tokens and dim0 + dim < head_dim:
            a, b, c, d = load_float4(x, (head, row0 + row, dim0 + dim))
        store_float4(tile, (row, dim), a, b, c, d)


@cuda.jit
def flash_v3_register_tiles(q, k, v, out, lse, n_tokens, head_dim, scale, causal):
    """Attention as :func:`flash_v1_warp_per_query`, 64 queries x 64 keys a step, 4 x 4 scores a thread.

    Threads stand 16 x 16: ``ty`` names 4 queries, ``tx`` the keys tx, tx + 16, tx + 32, tx + 48 for the scores and the
    elements 4 * tx … + 3 (and those 64 further) of a head for the output. A query's 16 threads are half a warp, so its
    largest score takes 4 shuffles. All arrays must be 16-byte aligned and head_dim a multiple of 4.
    Launch: ``flash_v3_register_tiles[flash_v3_launch(n_tokens, n_head, head_dim)](…)``, 256 threads exactly.
    """
    q_tile = cuda.shared.array((QUERIES, CHUNK_PADDED), float32, alignment=16)
    k_tile = cuda.shared.array((KEYS, CHUNK_PADDED), float32, alignment=16)
    p_tile = cuda.shared.array((QUERIES, KEYS_PADDED), float32, alignment=16)
    v_tile = cuda.shared.array((V_KEYS, V_DIMS), float32, alignment=16)
    regs = cuda.local.array((4, 4), float32)  # [query, element] of q; later [query, key] of the probabilities
    scores = cuda.local.array((4, 4), float32)  # [query, key]
    acc = cuda.local.array((HALVES, 4, 4), float32)  # [half of the head, query, element]
    largest = cuda.local.array(4, float32)
    total = cuda.local.array(4, float32)  # of this thread's keys alone, until the end
    tx = cuda.threadIdx.x % 16
    ty = cuda.threadIdx.x // 16
    head = cuda.blockIdx.y
    query0 = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * QUERIES  # blocks with the most keys start first
    for r in range(4):
        largest[r] = LOWEST
        total[r] = float32(0)
        for h in range(HALVES):
            for c in range(4):
                acc[h, r, c] = float32(0)
    n_keys = min(query0 + QUERIES, n_tokens) if causal else n_tokens
    for key0 in range(0, n_keys, KEYS):
        for r in range(4):
            for c in range(4):
                scores[r, c] = float32(0)
        for dim0 in range(0, head_dim, CHUNK):
            cuda.syncthreads()  # all have read the chunk before
            load_tile(q_tile, q, head, query0, n_tokens, dim0, head_dim, CHUNK)
            load_tile(k_tile, k, head, key0, n_tokens, dim0, head_dim, CHUNK)
            cuda.syncthreads()
            for i in range(0, min(CHUNK, head_dim - dim0), 4):
                for r in range(4):
                    regs[r, 0], regs[r, 1], regs[r, 2], regs[r, 3] = load_float4(q_tile, (4 * ty + r, i))
                for c in range(4):
                    k0, k1, k2, k3 = load_float4(k_tile, (tx + 16 * c, i))
                    for r in range(4):
                        scores[r, c] += regs[r, 0] * k0 + regs[r, 1] * k1 + regs[r, 2] * k2 + regs[r, 3] * k3
        for r in range(4):
            row_largest = largest[r]
            for c in range(4):
                key = key0 + tx + 16 * c
                scores[r, c] *= scale
                if key >= n_tokens or (causal and key > query0 + 4 * ty + r):
                    scores[r, c] = float32(-math.inf)
                row_largest = max(row_largest, scores[r, c])
            row_largest = half_warp_max(row_largest)
            shrink = math.exp(largest[r] - row_largest)
            largest[r] = row_largest
            total[r] *= shrink
            for c in range(4):
                p = math.exp(scores[r, c] - row_largest)
                p_tile[4 * ty + r, tx + 16 * c] = p
                total[r] += p
            for h in range(HALVES):
                for c in range(4):
                    acc[h, r, c] *= shrink
        for h in range(HALVES):
            if h * V_DIMS < head_dim:
                for j0 in range(0, min(KEYS, n_keys - key0), V_KEYS):
                    cuda.syncthreads()  # p_tile is complete, and all have read v_tile
                    load_tile(v_tile, v, head, key0 + j0, n_tokens, h * V_DIMS, head_dim, V_DIMS)
                    cuda.syncthreads()
                    for j in range(0, min(V_KEYS, n_keys - key0 - j0), 4):  # p is 0 for the keys after n_keys
                        for r in range(4):
                            regs[r, 0], regs[r, 1], regs[r, 2], regs[r, 3] = load_float4(p_tile, (4 * ty + r, j0 + j))
                        for jj in range(4):
                            v0, v1, v2, v3 = load_float4(v_tile, (j + jj, 4 * tx))
                            for r in range(4):
                                acc[h, r, 0] += regs[r, jj] * v0
                                acc[h, r, 1] += regs[r, jj] * v1
                                acc[h, r, 2] += regs[r, jj] * v2
                                acc[h, r, 3] += regs[r, jj] * v3
    for r in range(4):
        query = query0 + 4 * ty + r
        row_total = half_warp_sum(total[r])
        if query < n_tokens:
            inverse = float32(1) / row_total
            for h in range(HALVES):
                if h * V_DIMS + 4 * tx < head_dim:
                    store_float4(
                        out, (query, head * head_dim + h * V_DIMS + 4 * tx),
                        acc[h, r, 0] * inverse, acc[h, r, 1] * inverse, acc[h, r, 2] * inverse, acc[h, r, 3] * inverse,
                    )  # fmt: skip
            if tx == 0:
                lse[head, query] = largest[r] + math.log(row_total)
