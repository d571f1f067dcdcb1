"""Chapter 12, decoding: one new token, so one query a head, against all the keys and values kept from before.

Each number of a key or value is read for one multiplication, so time is bytes. What FlashAttention shares among queries
there is nobody here to share with; the only question is how to keep enough reads on their way.

==============================  ===================================  =================================================
kernel                          blocks                               what it costs beside reading keys and values
==============================  ===================================  =================================================
``decode_v1_block_per_head``    n_head                               12 blocks (GPT-2) leave a GPU's other hundred
                                                                     multiprocessors idle
``decode_v2_split_k``           n_head * n_split                     n_split * (head_dim + 2) floats a head, written
``decode_combine``              n_head, a second launch              and read again; a launch
==============================  ===================================  =================================================

A split leaves the pair of chapter 10's online softmax, largest score and sum, and the weighted sum of its values:
pairs combine in any grouping. v1 does so between its 8 warps, in shared memory; v2 also between blocks, which can only
meet in another launch. ``decode_attention`` launches both; ``decode_splits`` chooses the number of splits. With few
tokens, v1 is quicker by a launch.
Source: Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding for long-context inference".
"""

import math

import numpy as np
from numba import cuda, float32

from chapters.ch07_warp_reduce.kernels import warp_sum
from chapters.ch10_softmax.kernels import LOWEST
from chapters.ch12_flash.kernels import HEAD_DIM_MAX, PER_LANE, WARP

THREADS = 256
WARPS = THREADS // WARP
GROUP = 4  # keys that a warp has on their way at once
SPLIT_BLOCKS = 1024  # as many blocks in all fill any GPU of today
SPLIT_MIN_TOKENS = 2 * WARPS * GROUP  # a split below this has less to do than combining costs
SPLITS_MAX = 128


def decode_launch(n_tokens, n_head, head_dim):
    """Launch configuration of :func:`decode_v1_block_per_head`: ``(grid, block)``.

    Raises ValueError if a size is not positive or head_dim above 128.
    """
    if n_tokens <= 0 or n_head <= 0 or head_dim <= 0:
        raise ValueError(f"{n_tokens} tokens, {n_head} heads of {head_dim}: attention needs at least 1 of each")
    if head_dim > HEAD_DIM_MAX:
        raise ValueError(f"head_dim = {head_dim}: a warp holds at most {HEAD_DIM_MAX}; split the head's elements")
    return n_head, THREADS


def decode_splits(n_tokens, n_rows):
    """Number of splits for ``n_rows`` queries (heads, or heads of all sequences) of up to ``n_tokens`` tokens each.

    Enough to fill the card, at most 128, and none so short that combining would cost more than it saves.
    Raises ValueError if a size is not positive.
    """
    if n_tokens <= 0 or n_rows <= 0:
        raise ValueError(f"{n_tokens} tokens, {n_rows} queries: attention needs at least 1 of each")
    wanted = (SPLIT_BLOCKS + n_rows - 1) // n_rows
    return min(wanted, (n_tokens + SPLIT_MIN_TOKENS - 1) // SPLIT_MIN_TOKENS, SPLITS_MAX)


def decode_split_launch(n_tokens, n_head, head_dim, n_split):
    """Launch configuration of :func:`decode_v2_split_k`, splits along x, heads along y: ``(grid, block)``.

    Raises ValueError as :func:`decode_launch`, and if n_split is not from 1 to 128.
    """
    decode_launch(n_tokens, n_head, head_dim)
    if not 1 <= n_split <= SPLITS_MAX:
        raise ValueError(f"n_split = {n_split} is not from 1 to {SPLITS_MAX}; let decode_splits choose it")
    return (n_split, n_head), THREADS


def decode_workspace(n_rows, n_split, head_dim):
    """Shapes of the float32 arrays that splits leave their partial results in: ``(pairs, sums)``.

    pairs: (n_rows, n_split, 2), largest score and sum of exponentials. sums: (n_rows, n_split, head_dim).
    """
    return (n_rows, n_split, 2), (n_rows, n_split, head_dim)


# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def attend_group(q_lane, keys, values, n_keys, head_dim, largest, total, acc):
    """Take the first ``n_keys`` of 4 keys into a warp's running attention: returns ``(largest, total)``, updates acc.

    Local arrays hold elements lane, lane + 32, … : q_lane, acc (4,), of the scaled query and the weighted sum; keys,
    values (4, 4), a row a key; those from element head_dim on are not looked at. One new maximum and one shrinking
    serve 4 keys, and their 4 sums by shuffles do not wait for each other. All 32 lanes must call it.
    """
    scores = cuda.local.array(GROUP, float32)
    new_largest = largest
    for j in range(GROUP):
        score = float32(0)
        for i in range(PER_LANE):
            if WARP * i < head_dim:
                score += q_lane[i] * keys[j, i]
        score = warp_sum(score)
        scores[j] = score if j < n_keys else float32(-math.inf)
        new_largest = max(new_largest, scores[j])
    shrink = math.exp(largest - new_largest)
    total *= shrink
    for i in range(PER_LANE):
        acc[i] *= shrink
    for j in range(GROUP):
        p = math.exp(scores[j] - new_largest)
        total += p
        for i in range(PER_LANE):
            if WARP * i < head_dim:
                acc[i] += p * values[j, i]
    return new_largest, total


@cuda.jit(device=True)
def attend_tokens(q_lane, k, v, head, start, end, head_dim, acc):
    """A warp's share of tokens start … end - 1 of a head: the pair ``(largest, total)``; acc is updated.

    k, v: (n_head, max_tokens, head_dim) float32. q_lane, acc as in :func:`attend_group`. The block's 8 warps take
    groups of 4 tokens in turn.
    """
    keys = cuda.local.array((GROUP, PER_LANE), float32)
    values = cuda.local.array((GROUP, PER_LANE), float32)
    largest = LOWEST
    total = float32(0)
    for first in range(start + cuda.threadIdx.x // WARP * GROUP, end, WARPS * GROUP):
        for j in range(GROUP):
            for i in range(PER_LANE):  # keys and values are asked for together, before anyone waits for one of them
                dim = cuda.threadIdx.x % WARP + WARP * i
                inside = first + j < end and dim < head_dim
                keys[j, i] = k[head, first + j, dim] if inside else float32(0)
                values[j, i] = v[head, first + j, dim] if inside else float32(0)
        # all elements that there is room for, 0 behind head_dim: no branch
        largest, total = attend_group(q_lane, keys, values, end - first, HEAD_DIM_MAX, largest, total, acc)
    return largest, total


@cuda.jit(device=True)
def combine_warps(largest, total, acc, head_dim, warp_pairs, warp_sums):
    """The running attention of a block's 8 warps as one: ``(largest, total, sum)``, the sum of element threadIdx.x.

    acc: local array as in :func:`attend_group`. warp_pairs: (8, 2), warp_sums: (8, 128), float32 in shared memory;
    their contents do not matter. All 256 threads must call it; only the first ``head_dim`` get total and sum. A warp
    that saw no key brings (LOWEST, 0) and zeros.
    """
    lane = cuda.threadIdx.x % WARP
    warp = cuda.threadIdx.x // WARP
    for i in range(PER_LANE):
        warp_sums[warp, lane + WARP * i] = acc[i]
    if lane == 0:
        warp_pairs[warp, 0] = largest
        warp_pairs[warp, 1] = total
    cuda.syncthreads()
    largest = LOWEST
    for w in range(WARPS):
        largest = max(largest, warp_pairs[w, 0])
    total = float32(0)
    acc_sum = float32(0)
    if cuda.threadIdx.x < head_dim:
        for w in range(WARPS):
            weight = math.exp(warp_pairs[w, 0] - largest)
            total += weight * warp_pairs[w, 1]
            acc_sum += weight * warp_sums[w, cuda.threadIdx.x]
    return largest, total, acc_sum


# --- kernels ---------------------------------------------------------------------------------------------------------


@cuda.jit
def decode_v1_block_per_head(q, k, v, out, n_tokens, head_dim, scale):
    """out[head] = softmax(scale * q[head] · k[head, :n_tokens]) @ v[head, :n_tokens], a block a head, 8 warps.

    q, out: (n_head, head_dim) float32. k, v: (n_head, max_tokens, head_dim) float32, max_tokens at least n_tokens;
    what lies behind n_tokens is not read. All C-contiguous. n_tokens, head_dim: int32, head_dim at most 128.
    scale: float32, 1 / sqrt(head_dim) in GPT-2.
    Launch: ``decode_v1_block_per_head[decode_launch(n_tokens, n_head, head_dim)](…)``, 256 threads exactly.
    """
    warp_pairs = cuda.shared.array((WARPS, 2), float32)
    warp_sums = cuda.shared.array((WARPS, HEAD_DIM_MAX), float32)
    q_lane = cuda.local.array(PER_LANE, float32)
    acc = cuda.local.array(PER_LANE, float32)
    head = cuda.blockIdx.x
    for i in range(PER_LANE):
        dim = cuda.threadIdx.x % WARP + WARP * i
        q_lane[i] = q[head, dim] * scale if dim < head_dim else float32(0)
        acc[i] = float32(0)
    largest, total = attend_tokens(q_lane, k, v, head, 0, n_tokens, head_dim, acc)
    largest, total, acc_sum = combine_warps(largest, total, acc, head_dim, warp_pairs, warp_sums)
    if cuda.threadIdx.x < head_dim:
        out[head, cuda.threadIdx.x] = acc_sum / total


@cuda.jit
def decode_v2_split_k(q, k, v, pairs, sums, n_tokens, head_dim, scale):
    """Attention of one query a head over part of the tokens: gridDim.x blocks a head take about equal parts.

    q, k, v, n_tokens, head_dim, scale as in :func:`decode_v1_block_per_head`. pairs: (n_head, n_split, 2), largest
    score and sum of exponentials; sums: (n_head, n_split, head_dim), the weighted sum of v, not yet divided; float32,
    written. A part may be empty: its pair is (LOWEST, 0), its sums are 0.
    Launch: ``decode_v2_split_k[decode_split_launch(n_tokens, n_head, head_dim, n_split)](…)``, then
    :func:`decode_combine`.
    """
    warp_pairs = cuda.shared.array((WARPS, 2), float32)
    warp_sums = cuda.shared.array((WARPS, HEAD_DIM_MAX), float32)
    q_lane = cuda.local.array(PER_LANE, float32)
    acc = cuda.local.array(PER_LANE, float32)
    split = cuda.blockIdx.x
    head = cuda.blockIdx.y
    for i in range(PER_LANE):
        dim = cuda.threadIdx.x % WARP + WARP * i
        q_lane[i] = q[head, dim] * scale if dim < head_dim else float32(0)
        acc[i] = float32(0)
    part = (n_tokens + cuda.gridDim.x - 1) // cuda.gridDim.x
    end = min((split + 1) * part, n_tokens)
    largest, total = attend_tokens(q_lane, k, v, head, split * part, end, head_dim, acc)
    largest, total, acc_sum = combine_warps(largest, total, acc, head_dim, warp_pairs, warp_sums)
    if cuda.threadIdx.x < head_dim:
        sums[head, split, cuda.threadIdx.x] = acc_sum
    if cuda.threadIdx.x == 0:
        pairs[head, split, 0] = largest
        pairs[head, split, 1] = total


def decode_combine_launch(n_rows):
    """Launch configuration of :func:`decode_combine`, one block a row: ``(grid, block)``.

    Raises ValueError if ``n_rows`` is not positive.
    """
    if n_rows <= 0:
        raise ValueError(f"n_rows = {n_rows}: a launch needs at least 1 row")
    return n_rows, HEAD_DIM_MAX


@cuda.jit
def decode_combine(pairs, sums, out, n_split, head_dim):
    """out[row] = the attention of a row from its splits: each weighs exp(its largest - the largest of all).

    pairs: (n_rows, n_split, 2), sums: (n_rows, n_split, head_dim), out: (n_rows, head_dim), all float32, C-contiguous.
    n_split, head_dim: int32. A row that saw no token at all becomes 0.
    Launch: ``decode_combine[decode_combine_launch(n_rows)](…)``.
    """
    row = cuda.blockIdx.x
    largest = LOWEST
    for split in range(n_split):
        largest = max(largest, pairs[row, split, 0])
    for dim in range(cuda.threadIdx.x, head_dim, cuda.blockDim.x):
        total = float32(0)
        acc = float32(0)
        for split in range(n_split):
            weight = math.exp(pairs[row, split, 0] - largest)
            total += weight * pairs[row, split, 1]
            acc += weight * sums[row, split, dim]
        out[row, dim] = acc / total if total != float32(0) else float32(0)


def decode_attention(q, k, v, pairs, sums, out, n_tokens, scale):
    """Attention of one query a head by splits, in two launches; n_split is ``pairs.shape[1]`` (:func:`decode_splits`).

    Arrays as in :func:`decode_v2_split_k`, shapes of pairs and sums from :func:`decode_workspace`. A host function: it
    returns when the kernels are launched, not when they are done. Raises ValueError for sizes that they do not take.
    """
    (n_head, head_dim), n_split = q.shape, pairs.shape[1]
    launch = decode_split_launch(n_tokens, n_head, head_dim, n_split)
    decode_v2_split_k[launch](q, k, v, pairs, sums, n_tokens, head_dim, np.float32(scale))
    decode_combine[decode_combine_launch(n_head)](pairs, sums, out, n_split, head_dim)


def decode_reference(q, k, v, scale):
    """NumPy reference: q (n_head, head_dim), k, v (n_head, n_tokens, head_dim) float32, computed in float64.

    Returns (n_head, head_dim) float32.
    """
    scores = np.einsum("hi,hki->hk", q.astype(np.float64), k.astype(np.float64)) * scale
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hk,hki->hi", e / e.sum(axis=1, keepdims=True), v.astype(np.float64)).astype(np.float32)
