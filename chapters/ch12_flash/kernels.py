"""Chapter 12, FlashAttention: softmax(scale * q @ k^T) @ v without ever storing the scores.

Chapter 10's online softmax carries a row's largest element and sum along while the row goes by. Carry the weighted sum
of v along too, and shrink it by the same factor whenever a larger score arrives: then a score is needed for a moment
only, in registers, and the n x n matrix of chapter 11 is gone.

===========================  ====================================  ==================================================
kernel                       what it changes                       floats read from global memory for one query and
                                                                   all of n keys (d = head_dim)
===========================  ====================================  ==================================================
``flash_v1_warp_per_query``  one warp a query, key by key; five    2 * n * d
                             shuffles add up each score
``flash_v2_shared_tiles``    8 queries share tiles of 32 keys;     2 * n * d / 8
                             a lane adds up a score alone
``flash_v3_register_tiles``  64 queries share tiles of 64 keys;    3 * n * d / 64 (a tile of q is read again with each
                             a thread holds 4 x 4 scores           tile of keys: so shared memory need not grow with d)
===========================  ====================================  ==================================================

v3 stands in ``register_tiles.py``. Shared memory is the next thing to run out of: for one multiplication v2 reads up to
two floats from it, v3 half a float, and 16 bytes at a time. v3 loses where a head has few queries (64 to a block, and
a single one belongs to ``decode.py``) or all heads together too few blocks to fill the card. With ``causal`` set, tiles
that lie wholly above the diagonal are left out. ``flash_attention`` and ``flash_launch`` are v3's.

Arguments are those of chapter 11's ``mha_naive`` without the scores: ``attention_scores_bytes`` there, here
``flash_extra_bytes``. Sources: Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2".
"""

import math

import numpy as np
from numba import cuda, float32

from chapters.ch07_warp_reduce.kernels import FULL_WARP, warp_max, warp_sum
from chapters.ch10_softmax.kernels import LOWEST
from chapters.ch12_flash.register_tiles import HEAD_DIM_MAX, flash_grid, flash_v3_launch, flash_v3_register_tiles

WARP = 32
PER_LANE = HEAD_DIM_MAX // WARP  # elements of a head that a lane of v1 and v2 holds: lane, lane + 32, …
V1_QUERIES = 8  # warps, and so queries, of a block; more would leave too few registers for each thread
V2_QUERIES = 8
V2_KEYS = 32  # of a tile: one a lane
V2_PADDED = HEAD_DIM_MAX + 1  # one more: lanes that read down a column meet all banks


def flash_v1_launch(n_tokens, n_head, head_dim):
    """Launch configuration of :func:`flash_v1_warp_per_query`, 8 queries a block, heads along y: ``(grid, block)``.

    Raises ValueError as ``flash_grid``: a size not positive, head_dim above 128, n_head above 65535.
    """
    return flash_grid(n_tokens, n_head, head_dim, V1_QUERIES, V1_QUERIES * WARP)


def flash_v2_launch(n_tokens, n_head, head_dim):
    """Launch configuration of :func:`flash_v2_shared_tiles`, 8 queries a block; otherwise as that of v1."""
    return flash_grid(n_tokens, n_head, head_dim, V2_QUERIES, V2_QUERIES * WARP)


@cuda.jit
def flash_v1_warp_per_query(q, k, v, out, lse, n_tokens, head_dim, scale, causal):
    """out[t, head * head_dim + i] = sum over keys j of softmax(scale * q[head, t] · k[head])[j] * v[head, j, i].

    q, k, v: (n_head, n_tokens, head_dim) float32. out: (n_tokens, n_head * head_dim) float32. lse: (n_head, n_tokens)
    float32, the logarithm of each row's sum of exponentials, from which the probabilities can be had back. All
    C-contiguous. n_tokens, head_dim: int32, head_dim at most 128. scale: float32, 1 / sqrt(head_dim) in GPT-2.
    causal: int32; 1: only keys j <= t count, 0: all.
    Launch: ``flash_v1_warp_per_query[flash_v1_launch(n_tokens, n_head, head_dim)](…)``.
    """
    lane = cuda.threadIdx.x % WARP
    query = cuda.grid(1) // WARP
    head = cuda.blockIdx.y
    if query < n_tokens:
        q_lane = cuda.local.array(PER_LANE, float32)
        acc = cuda.local.array(PER_LANE, float32)
        for i in range(PER_LANE):
            dim = lane + WARP * i
            q_lane[i] = q[head, query, dim] * scale if dim < head_dim else float32(0)
            acc[i] = float32(0)
        largest = LOWEST
        total = float32(0)
        n_keys = query + 1 if causal else n_tokens
        for key in range(n_keys):
            score = float32(0)
            for i in range(PER_LANE):
                dim = lane + WARP * i
                if dim < head_dim:
                    score += q_lane[i] * k[head, key, dim]
            score = warp_sum(score)
            new_largest = max(largest, score)
            shrink = math.exp(largest - new_largest)  # 1 unless this score is the largest so far
            p = math.exp(score - new_largest)
            total = total * shrink + p
            for i in range(PER_LANE):
                dim = lane + WARP * i
                if dim < head_dim:
                    acc[i] = acc[i] * shrink + p * v[head, key, dim]
            largest = new_largest
        for i in range(PER_LANE):
            dim = lane + WARP * i
            if dim < head_dim:
                out[query, head * head_dim + dim] = acc[i] / total  # the division comes last: once, not for each key
        if lane == 0:
            lse[head, query] = largest + math.log(total)


@cuda.jit
def flash_v2_shared_tiles(q, k, v, out, lse, n_tokens, head_dim, scale, causal):
    """Attention as :func:`flash_v1_warp_per_query`, 32 keys at a time from shared memory, for 8 queries.

    For the scores a lane is a key: it adds up its score alone, and the warp meets once a tile instead of once a key.
    For the weighted sum a lane is elements of the head again, and a shuffle hands each probability to all lanes.
    Launch: ``flash_v2_shared_tiles[flash_v2_launch(n_tokens, n_head, head_dim)](…)``.
    """
    q_tile = cuda.shared.array((V2_QUERIES, HEAD_DIM_MAX), float32)
    k_tile = cuda.shared.array((V2_KEYS, V2_PADDED), float32)
    v_tile = cuda.shared.array((V2_KEYS, HEAD_DIM_MAX), float32)
    acc = cuda.local.array(PER_LANE, float32)
    lane = cuda.threadIdx.x % WARP
    warp = cuda.threadIdx.x // WARP
    head = cuda.blockIdx.y
    query = cuda.blockIdx.x * V2_QUERIES + warp
    for i in range(PER_LANE):
        dim = lane + WARP * i
        if dim < head_dim:
            q_tile[warp, dim] = q[head, query, dim] * scale if query < n_tokens else float32(0)
        acc[i] = float32(0)
    largest = LOWEST
    total = float32(0)  # of this lane's keys alone, until the end
    n_keys = min((cuda.blockIdx.x + 1) * V2_QUERIES, n_tokens) if causal else n_tokens  # those the last query sees
    for key0 in range(0, n_keys, V2_KEYS):
        for row in range(warp, V2_KEYS, V2_QUERIES):
            for dim in range(lane, head_dim, WARP):
                inside = key0 + row < n_tokens
                k_tile[row, dim] = k[head, key0 + row, dim] if inside else float32(0)
                v_tile[row, dim] = v[head, key0 + row, dim] if inside else float32(0)
        cuda.syncthreads()
        key = key0 + lane
        score = float32(-math.inf)
        if key < n_tokens and (not causal or key <= query):
            score = float32(0)
            for dim in range(head_dim):
                score += q_tile[warp, dim] * k_tile[lane, dim]
        new_largest = max(largest, warp_max(score))
        shrink = math.exp(largest - new_largest)
        p = math.exp(score - new_largest)
        total = total * shrink + p
        largest = new_largest
        for i in range(PER_LANE):
            acc[i] *= shrink
        for j in range(V2_KEYS):
            p_j = cuda.shfl_sync(FULL_WARP, p, j)
            for i in range(PER_LANE):
                dim = lane + WARP * i
                if dim < head_dim:
                    acc[i] += p_j * v_tile[j, dim]
        cuda.syncthreads()  # all warps have read the tiles
    total = warp_sum(total)
    if query < n_tokens:
        for i in range(PER_LANE):
            dim = lane + WARP * i
            if dim < head_dim:
                out[query, head * head_dim + dim] = acc[i] / total
        if lane == 0:
            lse[head, query] = largest + math.log(total)


flash_launch = flash_v3_launch
flash_attention = flash_v3_register_tiles


def flash_extra_bytes(n_head, n_tokens):
    """Bytes of global memory that FlashAttention needs beside its inputs and output: ``lse``, a float32 a row.

    Chapter 11's ``attention_scores_bytes`` is the same figure for ``mha_naive``: n_tokens times as much.
    """
    return 4 * n_head * n_tokens


def flash_reference(q, k, v, scale, causal):
    """NumPy reference of all versions: q, k, v (n_head, n_tokens, head_dim) float32, computed in float64.

    Returns ``out`` (n_tokens, n_head * head_dim) and ``lse`` (n_head, n_tokens), both float32.
    """
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(1, 2) * scale
    if causal:
        scores = np.where(np.tri(scores.shape[1], dtype=bool), scores, -np.inf)
    largest = scores.max(axis=2, keepdims=True)
    e = np.exp(scores - largest)
    total = e.sum(axis=2, keepdims=True)
    out = (e @ v.astype(np.float64) / total).swapaxes(0, 1)
    return out.reshape(len(out), -1).astype(np.float32), (largest + np.log(total))[:, :, 0].astype(np.float32)
