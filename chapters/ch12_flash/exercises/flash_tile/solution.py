"""Exercise ch12/flash_tile: attention over tiles of keys, with no score ever stored.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch12/flash_tile
"""

import math

import numpy as np
from numba import cuda, float32

import common

TILE = 32  # keys of a tile; also queries, and so threads, of a block
HEAD_DIM = 16  # numbers of a query, key or value
LOWEST = np.float32(np.finfo(np.float32).min)  # less than every score, and LOWEST - LOWEST is 0

# --- your code begins (optional) ---
# --- your code ends ---


@cuda.jit
def flash(q, k, v, out, n_tokens, scale, causal):
    """out[head, t] = sum over keys j of softmax(scale * q[head, t] · k[head])[j] * v[head, j].

    q, k, v, out: (n_head, n_tokens, HEAD_DIM) float32. n_tokens: int32. scale: float32. causal: int32; 1: only the
    keys j <= t count, 0: all. Launched with one thread a query, in blocks of TILE, and heads along y. A block reads
    each key and value at most once from global memory, and each query once.
    """
    # --- your code begins ---
    k_tile = cuda.shared.array((TILE, HEAD_DIM), float32)
    v_tile = cuda.shared.array((TILE, HEAD_DIM), float32)
    mine = cuda.local.array(HEAD_DIM, float32)  # this thread's query
    acc = cuda.local.array(HEAD_DIM, float32)  # the weighted sum of values so far, relative to largest
    tid = cuda.threadIdx.x
    query = cuda.grid(1)
    head = cuda.blockIdx.y
    for i in range(HEAD_DIM):
        mine[i] = q[head, query, i] * scale if query < n_tokens else float32(0)
        acc[i] = float32(0)
    largest = LOWEST
    total = float32(0)

    for first in range(0, n_tokens, TILE):
        if first + tid < n_tokens:
            for i in range(HEAD_DIM):
                k_tile[tid, i] = k[head, first + tid, i]
                v_tile[tid, i] = v[head, first + tid, i]
        cuda.syncthreads()
        seen = query + 1 if causal else n_tokens  # keys that this query sees
        for j in range(min(TILE, seen - first, n_tokens - first)):
            score = float32(0)
            for i in range(HEAD_DIM):
                score += mine[i] * k_tile[j, i]
            new_largest = max(largest, score)
            shrink = math.exp(largest - new_largest)
            p = math.exp(score - new_largest)
            total = total * shrink + p
            for i in range(HEAD_DIM):
                acc[i] = acc[i] * shrink + p * v_tile[j, i]
            largest = new_largest
        cuda.syncthreads()

    if query < n_tokens:
        for i in range(HEAD_DIM):
            out[head, query, i] = acc[i] / total
    # --- your code ends ---


# What follows is given: it launches your kernel.


def attention(q, k, v, causal):
    """Attention for q, k, v (n_head, n_tokens, HEAD_DIM) float32; causal: 0 or 1. Returns the output, of that shape."""
    n_head, n_tokens, _ = q.shape
    out = cuda.to_device(np.full(q.shape, np.nan, np.float32))
    grid = (n_tokens + TILE - 1) // TILE, n_head
    scale = np.float32(1 / math.sqrt(HEAD_DIM))
    flash[grid, TILE](cuda.to_device(q), cuda.to_device(k), cuda.to_device(v), out, n_tokens, scale, causal)
    return out.copy_to_host()


def reads(q, k, v):
    """How many floats of global memory your kernel reads where each query sees all keys, counted on the CPU backend."""
    with common.memory_report() as report:
        attention(q, k, v, 0)
    return sum(one.bytes for one in report.lines if one.space == "global" and one.access == "read") // 4
