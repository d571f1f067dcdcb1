"""Chapter 12, decoding in float16: one launch, whatever the length, and that length need not be known to the host.

=========================  ==================================================  ========================================
kernel                     what it changes                                     what it costs beside keys and values
=========================  ==================================================  ========================================
``decode_v2_split_k``      (``decode.py``, float32)                            a second launch, that combines the splits
``decode_v3_chunks``       float16; a block takes a chunk of fixed length and  a fence and an atomic for each block, if
                           loads it in one go; the last block of a head to     there is more than one chunk
                           arrive combines; the length is in device memory
``decode_v4_parts``        nobody combines: the matrix product behind it does  each of its blocks reads all parts
                           as it loads its input
=========================  ==================================================  ========================================

**A chunk is what a block can ask for at once**: each thread loads 4 pieces of 16 bytes of keys and 4 of values, and
waits for memory once. With head_dim 64 that is 128 tokens a chunk. The grid has blocks for the longest sequence; those
behind its end leave at once.

**The last one combines.** Each block of v3 leaves its pair and sum as a split of v2 does, then counts itself in. Who
counts last knows that all others are done, and combines their results, in the order of the chunks: the same bits in
each run. But to be sure that the others' results are there, it waits for a fence, an atomic and two trips to memory,
one after the other.

**Or the next kernel does.** Behind attention stands a matrix product, whose blocks read all of its result anyway. v4
leaves each chunk's result as it is, with the logarithm of its sum of weights, and :func:`load_combined` weighs the
chunks together where they are loaded.

**The length is read, not passed**: ``pos[0]`` tokens came before this one. A CUDA graph replays a launch with the
arguments it was captured with; what is in memory may change. Keys and values of earlier tokens are there before the
kernel before has ended, so they are asked for before ``griddep_wait`` (see ``common.ptx``), this token's own after it.

Sources: Dao et al. 2023, "Flash-Decoding"; the counting: NVIDIA's CUDA sample threadFenceReduction.
"""

import math

import numpy as np
from numba import cuda, float32, int32, uint32

from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP
from chapters.ch09_gemm.gemv_half import dot8
from chapters.ch10_softmax.kernels import LOWEST
from common.ptx import (
    exp2_approx,
    griddep_launch,
    griddep_wait,
    load_float4,
    load_half8,
    pack_half2,
    store_float4,
    unpack_half2,
)

THREADS = 256
FOUR_BLOCKS = (THREADS, 4)  # on a multiprocessor: 64 registers a thread, so that blocks can wait there for their turn
WARPS = THREADS // WARP
PIECES = 4  # loads of 8 numbers of keys, and as many of values, that a lane has under way
CHUNK_BITS = 13  # 2 ** 13 = 8 * THREADS * PIECES, the numbers that a chunk has of keys
TOGETHER = 4  # chunks that load_combined loads at a time
LOG2_E = 1.4426950408889634
HEAD_DIMS = (8, 16, 32, 64, 128, 256)
HEAD_DIM_MAX = 256


def chunk_tokens(head_dim):
    """Tokens of a chunk: 256 threads with 4 pieces of 8 numbers each. Raises ValueError as :func:`chunks_launch`."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"head_dim = {head_dim}: lanes take 8 numbers each and share a key evenly, so it must be one of "
            f"{', '.join(map(str, HEAD_DIMS))}; decode_v2_split_k takes any up to 128"
        )
    return THREADS * PIECES * 8 // head_dim


def chunks_launch(max_tokens, n_head, head_dim):
    """Launch configuration of :func:`decode_v3_chunks`: ``(grid, block)``, chunks along x, heads along y.

    Raises ValueError if a size is not positive, or head_dim is not 8, 16, 32, 64, 128 or 256.
    """
    if max_tokens <= 0 or n_head <= 0:
        raise ValueError(f"{max_tokens} tokens, {n_head} heads: attention needs at least 1 of each")
    chunk = chunk_tokens(head_dim)
    return ((max_tokens + chunk - 1) // chunk, n_head), THREADS


def chunks_workspace(max_tokens, n_head, head_dim):
    """Shapes of ``pairs`` (float32), ``sums`` (float32) and ``arrived`` (int32, zeros at first) that the kernel needs.

    Raises ValueError as :func:`chunks_launch`.
    """
    (n_chunks, _), _ = chunks_launch(max_tokens, n_head, head_dim)
    return (n_head, n_chunks, 2), (n_head, n_chunks, head_dim), (n_head,)


@cuda.jit(device=True, forceinline=True)
def whole_fours(n_chunks):
    """n_chunks rounded up to whole groups of chunks that are loaded together."""
    return (n_chunks + TOGETHER - 1) // TOGETHER * TOGETHER


def lse_stride_of(n_chunks):
    """Places of a head in ``lse``: :func:`whole_fours`."""
    return whole_fours.py_func(n_chunks)


def parts_workspace(max_tokens, n_head, head_dim):
    """Lengths of ``parts`` (float16) and ``lse`` (float32, filled with anything) of :func:`decode_v4_parts`.

    Raises ValueError as :func:`chunks_launch`.
    """
    (n_chunks, _), _ = chunks_launch(max_tokens, n_head, head_dim)
    return n_chunks * n_head * head_dim, n_head * lse_stride_of(n_chunks)


@cuda.jit(device=True, forceinline=True)
def active_chunks(before, head_dim):
    """Chunks that hold one of the first before + 1 tokens."""
    return (before * head_dim >> CHUNK_BITS) + 1


@cuda.jit(device=True, forceinline=True)
def attend_to_chunk(q, k_cache, v_cache, before, head_dim, scale, warp_pairs, warp_sums):
    """Attention of head blockIdx.y over chunk blockIdx.x, which holds a token: what :func:`weigh_chunk` returns.

    Before it reads q and token number ``before`` it calls ``griddep_wait``. warp_pairs: (8, 2), warp_sums: (8, 256)
    float32, shared.
    """
    k = cuda.local.array((PIECES, 4), uint32)
    v = cuda.local.array((PIECES, 4), uint32)
    head = cuda.blockIdx.y
    first, together, dim = chunk_share(head_dim)
    for j in range(PIECES):
        token = first + j * together
        if token < before:
            k[j, 0], k[j, 1], k[j, 2], k[j, 3] = load_half8(k_cache, (head, token, dim))
            v[j, 0], v[j, 1], v[j, 2], v[j, 3] = load_half8(v_cache, (head, token, dim))
        else:
            k[j, 0] = k[j, 1] = k[j, 2] = k[j, 3] = v[j, 0] = v[j, 1] = v[j, 2] = v[j, 3] = uint32(0)
    griddep_wait()
    q0, q1, q2, q3 = load_half8(q, head * head_dim + dim)
    for j in range(PIECES):
        if first + j * together == before:
            k[j, 0], k[j, 1], k[j, 2], k[j, 3] = load_half8(k_cache, (head, before, dim))
            v[j, 0], v[j, 1], v[j, 2], v[j, 3] = load_half8(v_cache, (head, before, dim))
    return weigh_chunk(k, v, q0, q1, q2, q3, first, before, head_dim, scale, warp_pairs, warp_sums)


@cuda.jit(device=True, forceinline=True)
def chunk_share(head_dim):
    """This thread's share of chunk blockIdx.x: its first token, how far apart its tokens are, its first element."""
    bits = 28 - cuda.clz(int32(head_dim))  # with shifts and masks: a division takes a hundred instructions
    lanes = 1 << bits  # that share a key: head_dim // 8
    together = THREADS >> bits  # keys that the block loads with one piece a thread
    first = cuda.blockIdx.x * PIECES * together + (cuda.threadIdx.x >> bits)
    return first, together, (cuda.threadIdx.x & (lanes - 1)) * 8


@cuda.jit(device=True, forceinline=True)
def weigh_chunk(k, v, q0, q1, q2, q3, first, before, head_dim, scale, warp_pairs, warp_sums):
    """Attention over a chunk whose keys and values are in registers: (largest score, sum of weights, share).

    k, v: (4, 4) uint32, local, 8 numbers of a token each, of those that :func:`chunk_share` says; q0 … q3: the query's.
    Tokens behind number ``before`` do not count. Scores are scaled by log2(e), weights relative to the largest score;
    share: element threadIdx.x of the weighted sum of values. warp_pairs, warp_sums: as :func:`attend_to_chunk`.
    """
    scores = cuda.local.array(PIECES, float32)
    acc = cuda.local.array(8, float32)  # this thread's elements of the weighted sum of values
    tid = cuda.threadIdx.x
    bits = 28 - cuda.clz(int32(head_dim))
    lanes = 1 << bits
    dim = (tid & (lanes - 1)) * 8
    together = THREADS >> bits
    factor = scale * float32(LOG2_E)
    largest = LOWEST
    for j in range(PIECES):
        score = dot8(k[j, 0], k[j, 1], k[j, 2], k[j, 3], q0, q1, q2, q3)
        step = 1
        while step < lanes:
            score += cuda.shfl_xor_sync(FULL_WARP, score, step)
            step *= 2
        scores[j] = score * factor if first + j * together <= before else float32(-np.inf)
        largest = max(largest, scores[j])
    step = lanes
    while step < WARP:
        largest = max(largest, cuda.shfl_xor_sync(FULL_WARP, largest, step))
        step *= 2
    total = float32(0)
    for e in range(8):
        acc[e] = float32(0)
    for j in range(PIECES):
        p = exp2_approx(scores[j] - largest)
        total += p
        for e in range(0, 8, 2):
            v_low, v_high = unpack_half2(v[j, e // 2])
            acc[e] += p * v_low
            acc[e + 1] += p * v_high
    step = lanes
    while step < WARP:  # lanes with other keys of the same elements
        total += cuda.shfl_xor_sync(FULL_WARP, total, step)
        for e in range(8):
            acc[e] += cuda.shfl_xor_sync(FULL_WARP, acc[e], step)
        step *= 2
    warp = tid // WARP
    if tid % WARP < lanes:
        store_float4(warp_sums, (warp, dim), acc[0], acc[1], acc[2], acc[3])
        store_float4(warp_sums, (warp, dim + 4), acc[4], acc[5], acc[6], acc[7])
    if tid % WARP == 0:
        warp_pairs[warp, 0] = largest
        warp_pairs[warp, 1] = total
    cuda.syncthreads()

    # The block's own result: thread i has element i of the head.
    largest = LOWEST
    for w in range(WARPS):
        largest = max(largest, warp_pairs[w, 0])
    total = float32(0)
    share = float32(0)
    for w in range(WARPS):
        weight = exp2_approx(warp_pairs[w, 0] - largest)
        total += weight * warp_pairs[w, 1]
        share += weight * warp_sums[w, min(tid, head_dim - 1)]
    return largest, total, share


@cuda.jit(launch_bounds=FOUR_BLOCKS)
def decode_v3_chunks(q, k_cache, v_cache, out, pairs, sums, arrived, pos, head_dim, scale):
    """out[head] = softmax(scale * q[head] · k_cache[head, :n]) @ v_cache[head, :n] with n = pos[0] + 1 tokens.

    q, out: (n_head * head_dim,) float16. k_cache, v_cache: (n_head, max_tokens, head_dim) float16; nothing from token
    n on is read. pairs, sums, arrived: see :func:`chunks_workspace`; ``arrived`` is 0 before and after. pos: (1,)
    int32, from 0 to max_tokens - 1; in a graph of dependent launches, no kernel in front of this one writes it. All
    C-contiguous, from a multiple of 16 bytes on. head_dim: int32, one of HEAD_DIMS. scale: float32.
    Launch: ``decode_v3_chunks[chunks_launch(max_tokens, n_head, head_dim)](…)``, 256 threads exactly.
    """
    warp_pairs = cuda.shared.array((WARPS, 2), float32)
    warp_sums = cuda.shared.array((WARPS, HEAD_DIM_MAX), float32, alignment=16)
    last = cuda.shared.array(1, int32)
    tid = cuda.threadIdx.x
    head = cuda.blockIdx.y
    before = pos[0]
    n_active = active_chunks(before, head_dim)
    griddep_launch()
    if cuda.blockIdx.x >= n_active:
        return
    largest, total, share = attend_to_chunk(q, k_cache, v_cache, before, head_dim, scale, warp_pairs, warp_sums)
    if tid < head_dim:
        if n_active == 1:
            out[head * head_dim + tid] = share / total
        else:
            sums[head, cuda.blockIdx.x, tid] = share
    if n_active == 1:
        return
    if tid == 0:
        pairs[head, cuda.blockIdx.x, 0] = largest
        pairs[head, cuda.blockIdx.x, 1] = total
    cuda.threadfence()  # each thread's results are on their way to everybody before the block is counted
    cuda.syncthreads()
    if tid == 0:
        last[0] = cuda.atomic.add(arrived, head, 1)
    cuda.syncthreads()
    if last[0] < n_active - 1:
        return
    cuda.threadfence()
    if tid == 0:
        arrived[head] = 0
    if tid < head_dim:
        largest = LOWEST
        for chunk in range(n_active):
            largest = max(largest, pairs[head, chunk, 0])
        total = float32(0)
        share = float32(0)
        for chunk in range(n_active):
            weight = exp2_approx(pairs[head, chunk, 0] - largest)
            total += weight * pairs[head, chunk, 1]
            share += weight * sums[head, chunk, tid]
        out[head * head_dim + tid] = share / total


@cuda.jit(launch_bounds=FOUR_BLOCKS)
def decode_v4_parts(q, k_cache, v_cache, parts, lse, pos, head_dim, scale):
    """Attention over each chunk by itself: parts, chunk by chunk, as ``out`` of v3, and lse, which combines them.

    parts: (n_chunks * n_head * head_dim,) float16, flat. lse: float32, flat, head by head with
    ``lse_stride_of(n_chunks)`` places each: log2 of the sum of exp(scale * score) over the chunk. Only chunks with
    tokens are written, pos[0] * head_dim // 8192 + 1 of them. All else as v3. Who reads them: :func:`load_combined`.
    Launch: ``decode_v4_parts[chunks_launch(max_tokens, n_head, head_dim)](…)``, 256 threads exactly.
    """
    warp_pairs = cuda.shared.array((WARPS, 2), float32)
    warp_sums = cuda.shared.array((WARPS, HEAD_DIM_MAX), float32, alignment=16)
    tid = cuda.threadIdx.x
    head = cuda.blockIdx.y
    before = pos[0]
    griddep_launch()
    if cuda.blockIdx.x >= active_chunks(before, head_dim):
        return
    largest, total, share = attend_to_chunk(q, k_cache, v_cache, before, head_dim, scale, warp_pairs, warp_sums)
    if tid < head_dim:
        parts[(cuda.blockIdx.x * cuda.gridDim.y + head) * head_dim + tid] = share / total
    if tid == 0:
        lse[head * whole_fours(cuda.gridDim.x) + cuda.blockIdx.x] = largest + math.log2(total)


@cuda.jit(device=True, forceinline=True)
def load_combined(parts, lse, n_active, part0, col, head, lse_stride, width):
    """8 elements of the attention's result from column ``col`` on, of head ``head``, as 4 pairs: all chunks together.

    parts, lse: from :func:`decode_v4_parts`, n_active chunks of them from number ``part0`` on, width = n_head *
    head_dim, lse_stride: a head's places in lse. Four chunks are loaded at a time. (With a batch, part0 is the row's
    first chunk, and head counts on from row to row.)
    """
    p = cuda.local.array((TOGETHER, 4), uint32)
    tops = cuda.local.array(TOGETHER, float32)
    acc = cuda.local.array(8, float32)
    largest = LOWEST
    total = float32(0)
    for e in range(8):
        acc[e] = float32(0)
    chunk = 0
    while chunk < n_active:
        tops[0], tops[1], tops[2], tops[3] = load_float4(lse, head * lse_stride + chunk)
        for j in range(TOGETHER):
            place = part0 + min(chunk + j, n_active - 1)
            p[j, 0], p[j, 1], p[j, 2], p[j, 3] = load_half8(parts, int32(place * width + col))
            tops[j] = tops[j] if chunk + j < n_active else float32(-np.inf)
        before = largest
        for j in range(TOGETHER):
            largest = max(largest, tops[j])
        shrink = exp2_approx(before - largest)
        total *= shrink
        for e in range(8):
            acc[e] *= shrink
        for j in range(TOGETHER):
            weight = exp2_approx(tops[j] - largest)
            total += weight
            for e in range(0, 8, 2):
                low, high = unpack_half2(p[j, e // 2])
                acc[e] += weight * low
                acc[e + 1] += weight * high
        chunk += TOGETHER
    share = float32(1) / total
    p0, p1 = pack_half2(acc[0] * share, acc[1] * share), pack_half2(acc[2] * share, acc[3] * share)
    p2, p3 = pack_half2(acc[4] * share, acc[5] * share), pack_half2(acc[6] * share, acc[7] * share)
    return p0, p1, p2, p3


def decode_half_reference(q, k_cache, v_cache, n_tokens, scale):
    """NumPy reference: q (n_head, head_dim), caches (n_head, max_tokens, head_dim) float16, in float64 inside.

    Returns (n_head, head_dim) float16.
    """
    k, v = k_cache[:, :n_tokens].astype(np.float64), v_cache[:, :n_tokens].astype(np.float64)
    scores = np.einsum("hi,hki->hk", q.astype(np.float64), k) * scale
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hk,hki->hi", e / e.sum(axis=1, keepdims=True), v).astype(np.float16)
