"""Chapter 12, steps of many sequences: a block walks over a text, and the copies run ahead of it.

``paged_v4_parts`` has a block ask for 128 tokens at once, wait, and be done: right for one sequence, where nothing but
waiting is to be had. With 64 sequences there are 1536 such blocks, and each begins by waiting: for its pages, then for
its keys. Memory is idle half of the time.

=======================  =============================================  ===============================================
kernel                   what it changes                                when it loses
=======================  =============================================  ===============================================
``paged_v4_parts``       (``paged_half.py``) 128 tokens at once; parts  many rows
                         that the next kernel combines
``paged_v6_segments``    a block takes 256 tokens in four portions,     few rows with long texts: half of the blocks; a
                         two of them on their way; one result a row     text of several segments waits for its last
=======================  =============================================  ===============================================

(Figures for heads of 64 elements. v5 is for prompts.)

**Each thread fetches for itself.** A thread copies 16 bytes of a key to shared memory and later reads these same 16
bytes: a waiting room with a seat for each thread. So there is no barrier between a copy and its use, and none in the
whole loop; and what is on its way takes no register.

**Each group keeps its own score.** The 8 lanes that share a key keep a running largest score, sum and weighted values
over the keys that they meet, every sixteenth; groups and warps are combined once, at the end of the segment.

**A segment is a unit.** Its result depends on its tokens alone. The last block to arrive combines the segments of a
text in order, as in ``decode_v3_chunks``: so a row's bits do not depend on how many rows there are, or on how long the
longest text is. Most texts of a batch have one segment, and their blocks write the result at once.

Sources: as ``decode_half.py`` and ``paged_half.py``.
"""

import numpy as np
from numba import cuda, float32, int32, int64, uint32
from numba.types import float16

from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP
from chapters.ch10_softmax.kernels import LOWEST
from chapters.ch12_flash.decode_half import HEAD_DIMS, LOG2_E
from chapters.ch12_flash.paged_half import check_block_size, kv_head_of, place_in
from chapters.ch12_flash.tensor_core import GRID_Y_MAX
from common.ptx import (
    cp_async_commit,
    cp_async_half8,
    cp_async_wait,
    exp2_approx,
    griddep_launch,
    griddep_wait,
    load_half8,
    unpack_half2,
)

THREADS = 128
WARPS = THREADS // WARP
FOUR_BLOCKS = (THREADS, 4)  # on a multiprocessor, with 48 KiB of shared memory each
PIECES = 4  # of 8 numbers of keys, and as many of values, that a thread has in a portion
PORTIONS = 4  # of a segment
STAGES = 3
TILE = THREADS * PIECES * 8  # numbers of keys in a portion
SHARED_BYTES = 2 * STAGES * 2 * TILE


def segment_tokens(head_dim):
    """Tokens of a segment: 128 threads, four times with 4 pieces of 8 numbers. Raises ValueError as the launch does."""
    if head_dim not in HEAD_DIMS or head_dim > THREADS:
        known = ", ".join(str(size) for size in HEAD_DIMS if size <= THREADS)
        raise ValueError(f"head_dim = {head_dim}: lanes take 8 numbers each and share a key, so it is one of {known}")
    return PORTIONS * TILE // head_dim


def segments_launch(n_rows, max_tokens, n_head, head_dim, block_size):
    """Launch configuration of :func:`paged_v6_segments`: segments along x, heads along y, rows along z: ``(grid, block,
    stream, shared bytes)``.

    max_tokens: of the longest text. Raises ValueError if a size is not positive, n_rows or n_head above 65535, head_dim
    not 8, 16, 32, 64 or 128, and as ``check_block_size``.
    """
    check_block_size(block_size)
    if max_tokens <= 0 or not 1 <= n_head <= GRID_Y_MAX or not 1 <= n_rows <= GRID_Y_MAX:
        raise ValueError(
            f"{n_rows} rows, {n_head} heads, {max_tokens} tokens: a launch takes 1 to {GRID_Y_MAX} rows and heads, and "
            "at least 1 token"
        )
    tokens = segment_tokens(head_dim)
    return ((max_tokens + tokens - 1) // tokens, n_head, n_rows), THREADS, 0, SHARED_BYTES


def segments_workspace(n_rows, max_tokens, n_head, head_dim):
    """Lengths of ``pairs``, ``sums`` (float32) and ``arrived`` (int32, zeros at first) of :func:`paged_v6_segments`."""
    tokens = segment_tokens(head_dim)
    n_heads = n_rows * n_head
    n_parts = n_heads * ((max_tokens + tokens - 1) // tokens)
    return 2 * n_parts, n_parts * head_dim, n_heads


# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit(device=True, forceinline=True)
def seat(portion, j):
    """Where this thread's piece ``j`` of a portion's keys lies in shared memory; its values' is TILE further."""
    return portion % STAGES * (2 * TILE) + (j * THREADS + cuda.threadIdx.x) * 8


@cuda.jit(device=True, forceinline=True)
def fetch(tiles, portion, j, k_cache, v_cache, place, head_dim, dim, inside):
    """Begin to copy a piece of a key and of a value to their seats; zeros if not ``inside``."""
    at = int64(place) * head_dim + dim
    cp_async_half8(tiles, seat(portion, j), k_cache, at, inside)
    cp_async_half8(tiles, seat(portion, j) + TILE, v_cache, at, inside)


@cuda.jit(device=True, forceinline=True)
def weigh_portion(
    tiles, portion, q, first, together, lanes, last, largest, total, scores, words, acc
):  # fmt: skip
    """Take this thread's pieces of a portion into its group's running attention: returns ``(largest, total)``.

    q: (8,) float32, this lane's part of the query, scaled, times log2(e). first: the group's first token of the
    portion, the next are ``together`` further; those behind token ``last`` do not count. acc: (8,) float32, updated.
    scores: (4,) float32, words: (4,) uint32; what they hold does not matter.
    """
    before = largest
    for j in range(PIECES):
        words[0], words[1], words[2], words[3] = load_half8(tiles, seat(portion, j))
        score = float32(0)
        for pair in range(4):
            low, high = unpack_half2(words[pair])
            score += q[2 * pair] * low + q[2 * pair + 1] * high
        step = 1
        while step < lanes:
            score += cuda.shfl_xor_sync(FULL_WARP, score, step)
            step *= 2
        scores[j] = score if first + j * together <= last else float32(-np.inf)
        largest = max(largest, scores[j])
    shrink = exp2_approx(before - largest)
    total *= shrink
    for e in range(8):
        acc[e] *= shrink
    for j in range(PIECES):
        p = exp2_approx(scores[j] - largest)
        total += p
        words[0], words[1], words[2], words[3] = load_half8(tiles, seat(portion, j) + TILE)
        for pair in range(4):
            low, high = unpack_half2(words[pair])
            acc[2 * pair] += p * low
            acc[2 * pair + 1] += p * high
    return largest, total


@cuda.jit(device=True, forceinline=True)
def take_portion(
    portion, tiles, k_cache, v_cache, places, q, token0, first, together, lanes, dim, before, head_dim, largest, total,
    scores, words, acc,
):  # fmt: skip
    """Wait for a portion, ask for the one after next, and weigh it: returns ``(largest, total)``.

    token0: the segment's first token, first: this group's. before: the row's position. All else as in the kernel.
    """
    start = portion * PIECES * together
    if token0 + start <= before:  # the same for the whole block
        cp_async_wait(1)  # my pieces are there; nobody else's are needed
        ahead = portion + STAGES - 1
        if ahead < PORTIONS:
            for j in range(PIECES):
                token = first + (ahead * PIECES + j) * together
                place = places[min(ahead, PORTIONS - 1), j]
                fetch(tiles, ahead, j, k_cache, v_cache, place, head_dim, dim, token <= before)
        cp_async_commit()
        largest, total = weigh_portion(
            tiles, portion, q, first + start, together, lanes, before, largest, total, scores, words, acc
        )
    return largest, total


@cuda.jit(device=True, forceinline=True)
def combine_groups(largest, total, acc, lanes, dim, head_dim, shared):
    """The running attention of all groups of the block as one: ``(largest, total, sum)``, the last of element
    threadIdx.x for those below head_dim. shared: float32, WARPS * (head_dim + 2) of it are written.
    """
    warp = cuda.threadIdx.x // WARP
    top = largest
    step = lanes
    while step < WARP:
        top = max(top, cuda.shfl_xor_sync(FULL_WARP, top, step))
        step *= 2
    shrink = exp2_approx(largest - top)
    total *= shrink
    for e in range(8):
        acc[e] *= shrink
    step = lanes
    while step < WARP:
        total += cuda.shfl_xor_sync(FULL_WARP, total, step)
        for e in range(8):
            acc[e] += cuda.shfl_xor_sync(FULL_WARP, acc[e], step)
        step *= 2
    cuda.syncthreads()  # all have left their seats
    at = warp * (head_dim + 2)
    if cuda.threadIdx.x % WARP < lanes:
        for e in range(8):
            shared[at + dim + e] = acc[e]
    if cuda.threadIdx.x % WARP == 0:
        shared[at + head_dim] = top
        shared[at + head_dim + 1] = total
    cuda.syncthreads()
    top = LOWEST
    for w in range(WARPS):
        top = max(top, shared[w * (head_dim + 2) + head_dim])
    total = float32(0)
    share = float32(0)
    for w in range(WARPS):
        at = w * (head_dim + 2)
        weight = exp2_approx(shared[at + head_dim] - top)
        total += weight * shared[at + head_dim + 1]
        share += weight * shared[at + min(cuda.threadIdx.x, head_dim - 1)]
    return top, total, share


# --- the kernel ------------------------------------------------------------------------------------------------------


@cuda.jit(launch_bounds=FOUR_BLOCKS)
def paged_v6_segments(
    q, k_cache, v_cache, block_table, row_seq, positions, n_steps, out, pairs, sums, arrived, n_kv_head, head_dim,
    block_size, scale,
):  # fmt: skip
    """out[r] = attention of row r over its own sequence up to its own position, for rows 0 … n_steps[0] - 1.

    Each of them is the only row of its sequence in this step. q, out: (n_rows * n_head * head_dim,) float16, flat.
    k_cache, v_cache, block_table, row_seq, positions: as ``paged_v4_parts`` has them. n_steps: (1,) int32. pairs, sums,
    arrived: of :func:`segments_workspace`; ``arrived`` is 0 before and after. All C-contiguous, q and the caches from a
    multiple of 16 bytes on. n_kv_head, head_dim, block_size: int32. scale: float32. Nothing is written for other rows,
    or for a row at position -1. In a graph of dependent launches none in front writes the int32 arrays but arrived.
    Launch: ``paged_v6_segments[segments_launch(n_rows, max_tokens, n_head, head_dim, block_size)](…)``, 128 threads.
    """
    tiles = cuda.shared.array(0, float16)
    shared = cuda.shared.array(0, float32)  # the same memory, once the last portion has been read
    places = cuda.local.array((PORTIONS, PIECES), int32)
    query = cuda.local.array(8, float32)
    acc = cuda.local.array(8, float32)
    scores = cuda.local.array(PIECES, float32)
    words = cuda.local.array(4, uint32)
    tid = cuda.threadIdx.x
    head, row, segment = cuda.blockIdx.y, cuda.blockIdx.z, cuda.blockIdx.x
    griddep_launch()
    before, seq = positions[row], row_seq[row]
    bits = 28 - cuda.clz(int32(head_dim))
    lanes = 1 << bits  # that share a key: head_dim // 8
    together = THREADS >> bits  # keys that the block has with one piece a thread
    dim = (tid & (lanes - 1)) * 8
    portion_tokens = PIECES * together
    token0 = segment * PORTIONS * portion_tokens
    if row >= n_steps[0] or token0 > before:
        return
    first = token0 + (tid >> bits)
    page_bits = 31 - cuda.clz(int32(block_size))
    for portion in range(PORTIONS):  # all pages are asked for at once
        for j in range(PIECES):
            token = min(first + portion * portion_tokens + j * together, before)
            places[portion, j] = block_table[seq, token >> page_bits]
    kv_head = kv_head_of(head, n_kv_head, cuda.gridDim.y)
    for portion in range(PORTIONS):
        for j in range(PIECES):
            token = first + portion * portion_tokens + j * together
            places[portion, j] = place_in(places[portion, j], token, kv_head, int32(n_kv_head), page_bits)
    for portion in range(STAGES - 1):
        for j in range(PIECES):  # older keys are there already
            token = first + portion * portion_tokens + j * together
            if token != before:
                fetch(tiles, portion, j, k_cache, v_cache, places[portion, j], head_dim, dim, token < before)
    griddep_wait()
    words[0], words[1], words[2], words[3] = load_half8(q, (row * cuda.gridDim.y + head) * head_dim + dim)
    for portion in range(STAGES - 1):
        for j in range(PIECES):
            if first + portion * portion_tokens + j * together == before:
                fetch(tiles, portion, j, k_cache, v_cache, places[portion, j], head_dim, dim, True)
        cp_async_commit()
    factor = scale * float32(LOG2_E)
    for pair in range(4):
        low, high = unpack_half2(words[pair])
        query[2 * pair], query[2 * pair + 1] = low * factor, high * factor
    for e in range(8):
        acc[e] = float32(0)
    largest = LOWEST
    total = float32(0)
    # one after the other, and no loop: a number of a portion that the compiler knows keeps the places in registers
    largest, total = take_portion(
        0, tiles, k_cache, v_cache, places, query, token0, first, together, lanes, dim, before, head_dim, largest,
        total, scores, words, acc,
    )  # fmt: skip
    largest, total = take_portion(
        1, tiles, k_cache, v_cache, places, query, token0, first, together, lanes, dim, before, head_dim, largest,
        total, scores, words, acc,
    )  # fmt: skip
    largest, total = take_portion(
        2, tiles, k_cache, v_cache, places, query, token0, first, together, lanes, dim, before, head_dim, largest,
        total, scores, words, acc,
    )  # fmt: skip
    largest, total = take_portion(
        3, tiles, k_cache, v_cache, places, query, token0, first, together, lanes, dim, before, head_dim, largest,
        total, scores, words, acc,
    )  # fmt: skip
    cp_async_wait(0)
    largest, total, share = combine_groups(largest, total, acc, lanes, dim, head_dim, shared)
    at = row * cuda.gridDim.y + head
    n_active = before // (PORTIONS * portion_tokens) + 1
    if n_active == 1:
        if tid < head_dim:
            out[at * head_dim + tid] = share / total
        return
    part = at * cuda.gridDim.x
    if tid < head_dim:
        sums[(part + segment) * head_dim + tid] = share
    if tid == 0:
        pairs[2 * (part + segment)] = largest
        pairs[2 * (part + segment) + 1] = total
    cuda.threadfence()  # each thread's results are on their way to everybody before the block is counted
    cuda.syncthreads()
    if tid == 0:
        shared[0] = cuda.atomic.add(arrived, at, 1)
    cuda.syncthreads()
    if shared[0] < n_active - 1:
        return
    cuda.threadfence()
    if tid == 0:
        arrived[at] = 0
    if tid < head_dim:
        largest = LOWEST
        for i in range(n_active):
            largest = max(largest, pairs[2 * (part + i)])
        total = float32(0)
        share = float32(0)
        for i in range(n_active):
            weight = exp2_approx(pairs[2 * (part + i)] - largest)
            total += weight * pairs[2 * (part + i) + 1]
            share += weight * sums[(part + i) * head_dim + tid]
        out[at * head_dim + tid] = share / total
