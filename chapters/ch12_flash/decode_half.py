"""Chapter 12, decoding in float16: one launch, whatever the length, and that length need not be known to the host.

=========================  ==================================================  ========================================
kernel                     what it changes                                     what it costs beside keys and values
=========================  ==================================================  ========================================
``decode_v2_split_k``      (``decode.py``, float32)                            a second launch, that combines the splits
``decode_v3_chunks``       float16; a block takes a chunk of fixed length and  a fence and an atomic for each block, if
                           loads it in one go; the last block of a head to     there is more than one chunk
                           arrive combines; the length is in device memory
=========================  ==================================================  ========================================

**A chunk is what a block can ask for at once**: each thread loads 4 pieces of 16 bytes of keys and 4 of values, and
waits for memory once. With head_dim 64 that is 128 tokens a chunk. The grid has blocks for the longest sequence; those
behind its end leave at once.

**The last one combines.** Each block leaves its pair and sum as a split of v2 does, then counts itself in. Who counts
last knows that all others are done, and combines their results, in the order of the chunks: the same bits in each run.

**The length is read, not passed**: ``pos[0]`` tokens came before this one. A CUDA graph replays a launch with the
arguments it was captured with; what is in memory may change. Keys and values of earlier tokens are there before the
kernel before has ended, so they are asked for before ``griddep_wait`` (see ``common.ptx``), this token's own after it.

Sources: Dao et al. 2023, "Flash-Decoding"; the counting: NVIDIA's CUDA sample threadFenceReduction.
"""

import numpy as np
from numba import cuda, float32, int32, uint32

from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP
from chapters.ch09_gemm.gemv_half import dot8
from chapters.ch10_softmax.kernels import LOWEST
from common.ptx import exp2_approx, griddep_launch, griddep_wait, load_half8, store_float4, unpack_half2

THREADS = 256
FOUR_BLOCKS = (THREADS, 4)  # on a multiprocessor: 64 registers a thread, so that blocks can wait there for their turn
WARPS = THREADS // WARP
PIECES = 4  # loads of 8 numbers of keys, and as many of values, that a lane has under way
PIECES_BITS = 10  # 2 ** 10 = THREADS * PIECES
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
    k = cuda.local.array((PIECES, 4), uint32)
    v = cuda.local.array((PIECES, 4), uint32)
    scores = cuda.local.array(PIECES, float32)
    acc = cuda.local.array(8, float32)  # this thread's elements of the weighted sum of values
    tid = cuda.threadIdx.x
    head = cuda.blockIdx.y
    bits = 28 - cuda.clz(int32(head_dim))  # with shifts and masks: a division takes a hundred instructions
    lanes = 1 << bits  # that share a key: head_dim // 8
    dim = (tid & (lanes - 1)) * 8  # the first of this thread's elements of a head
    together = THREADS >> bits  # keys that the block loads with one piece a thread
    before = pos[0]
    first = cuda.blockIdx.x * PIECES * together + (tid >> bits)
    n_active = (before >> (PIECES_BITS - bits)) + 1  # chunks that hold a token
    griddep_launch()
    for j in range(PIECES):
        token = first + j * together
        if token < before:
            k[j, 0], k[j, 1], k[j, 2], k[j, 3] = load_half8(k_cache, (head, token, dim))
            v[j, 0], v[j, 1], v[j, 2], v[j, 3] = load_half8(v_cache, (head, token, dim))
        else:
            k[j, 0] = k[j, 1] = k[j, 2] = k[j, 3] = v[j, 0] = v[j, 1] = v[j, 2] = v[j, 3] = uint32(0)
    griddep_wait()
    if cuda.blockIdx.x >= n_active:
        return
    q0, q1, q2, q3 = load_half8(q, head * head_dim + dim)
    factor = scale * float32(LOG2_E)
    for j in range(PIECES):
        if first + j * together == before:
            k[j, 0], k[j, 1], k[j, 2], k[j, 3] = load_half8(k_cache, (head, before, dim))
            v[j, 0], v[j, 1], v[j, 2], v[j, 3] = load_half8(v_cache, (head, before, dim))
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


def decode_half_reference(q, k_cache, v_cache, n_tokens, scale):
    """NumPy reference: q (n_head, head_dim), caches (n_head, max_tokens, head_dim) float16, in float64 inside.

    Returns (n_head, head_dim) float16.
    """
    k, v = k_cache[:, :n_tokens].astype(np.float64), v_cache[:, :n_tokens].astype(np.float64)
    scores = np.einsum("hi,hki->hk", q.astype(np.float64), k) * scale
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hk,hki->hi", e / e.sum(axis=1, keepdims=True), v).astype(np.float16)
