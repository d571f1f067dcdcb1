"""Chapter 12, ragged attention: the tokens of several sequences side by side, prompts and single steps alike.

A batch of paged attention has one query a sequence. A serving step has more: a prompt of 5 tokens here, one token there
and the next 3 of a long prompt behind them. Laid one behind the other they are *rows*, without any padding:

    row        0  1  2  3  4    5    6  7  8
    sequence   A  A  A  A  A    B    C  C  C        row_seq
    position   0  1  2  3  4   41   16 17 18        positions

Each row brings its key and value to its place in the pages, and then asks the keys of its own sequence up to its own
position. That is all a causal mask says, so a row of a prompt and a step's only row need not be told apart.

===========================  ============================================  ==========================================
kernel                       what it does                                  blocks
===========================  ============================================  ==========================================
``split_qkv_pages``          cuts rows of qkv into heads; keys and values  a thread an element of a query, and of a
                             go to their pages                             key and a value
``paged_v3_rows``            attention, 8 warps a head of a row            n_head * rows
``paged_v7_key_per_lane``    the same with one warp, for a processor's     n_head * rows
                             vectors
``paged_v8_query_per_lane``  v7's sums for 32 queries at once that read    n_kv_head, times the queries of one / 32
                             one key head: prompts above all
===========================  ============================================  ==========================================

v3 adds one look-up to v1: which sequence's table. Every row reads its keys itself, also those that its neighbour has
just read: right for steps, wasteful for long prompts, where tiles of queries share them (``flash_v3``). In return a
row's sum has one order, whoever else is in the batch and however its prompt was cut: its bits are always the same. v8
lets queries share them and keeps v7's order, so that a row may take either.

``n_kv_head`` key heads may serve more query heads (grouped-query attention): query head h reads key head
h * n_kv_head // n_head. GPT-2 has as many of both.
Source: Kwon et al. 2023 (pages); Yu et al. 2022, "Orca" (rows without padding); Ainslie et al. 2023, "GQA".
"""

import math

import numpy as np
from numba import cuda, float32, int32, uint32

from chapters.ch03_indexing.kernels import blocks_2d
from chapters.ch07_warp_reduce.kernels import warp_max, warp_sum
from chapters.ch12_flash.decode import LOWEST, THREADS, WARPS, combine_warps, decode_reference
from chapters.ch12_flash.kernels import HEAD_DIM_MAX, PER_LANE, WARP
from chapters.ch12_flash.paged import attend_pages, require_block_size

HALF_WARP = WARP // 2

# --- writing ---------------------------------------------------------------------------------------------------------


def split_qkv_pages_launch(n_rows, n_head, n_kv_head, head_dim):
    """Launch configuration of :func:`split_qkv_pages`: elements of the queries along x, rows along y.

    Raises ValueError if a size is not positive, or n_head not a multiple of n_kv_head.
    """
    if n_kv_head <= 0 or n_head % n_kv_head:
        raise ValueError(f"{n_head} heads cannot share {n_kv_head} key heads evenly; n_head must be a multiple of it")
    return blocks_2d(n_rows, n_head * head_dim)


@cuda.jit
def split_qkv_pages(qkv, q, k_cache, v_cache, slot_mapping, n_rows, n_head, n_kv_head, head_dim, block_size):
    """q[r] = row r's queries, head by head; its keys and values go to slot ``slot_mapping[r]`` of the pages.

    qkv: (n_rows, (n_head + 2 * n_kv_head) * head_dim), each row its queries, keys, values. q: (n_rows, n_head *
    head_dim). k_cache, v_cache: (num_blocks, n_kv_head, block_size, head_dim), but flat; only the rows' slots are
    written. All four float32, or all float16. slot_mapping: (n_rows,) int32, page * block_size + row in it, no two
    alike; -1 is padding, whose key and value are not stored. All C-contiguous. Sizes: int32.
    Launch: ``split_qkv_pages[split_qkv_pages_launch(n_rows, n_head, n_kv_head, head_dim)](…)``.
    """
    col, r = cuda.grid(2)
    q_width = n_head * head_dim
    kv_width = n_kv_head * head_dim
    if r < n_rows and col < q_width:
        q[r, col] = qkv[r, col]
        slot = slot_mapping[r]
        if col < kv_width and slot >= 0:
            head = int32(uint32(col) // uint32(head_dim))  # signed, or of 64 bits, a division is several times as long
            page = int32(uint32(slot) // uint32(block_size))
            place = (page * n_kv_head + head) * block_size + (slot - page * block_size)
            at = place * head_dim + (col - head * head_dim)
            k_cache[at] = qkv[r, q_width + col]
            v_cache[at] = qkv[r, q_width + kv_width + col]


def split_qkv_pages_reference(qkv, k_cache, v_cache, slot_mapping, n_head):
    """NumPy reference of :func:`split_qkv_pages`: writes to the caches, of four axes here, and returns q."""
    _, n_kv_head, block_size, head_dim = k_cache.shape
    q, k, v = np.split(qkv, [n_head * head_dim, (n_head + n_kv_head) * head_dim], axis=1)
    for r, slot in enumerate(slot_mapping):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = k[r].reshape(n_kv_head, head_dim)
            v_cache[slot // block_size, :, slot % block_size] = v[r].reshape(n_kv_head, head_dim)
    return q


# --- reading ---------------------------------------------------------------------------------------------------------


def paged_rows_launch(n_rows, n_head, head_dim, block_size):
    """Launch configuration of :func:`paged_v3_rows`: heads along x, rows along y: ``(grid, block)``.

    Raises ValueError if a size is not positive, head_dim above 128, block_size no multiple of 4, or n_rows above 65535.
    """
    if n_rows <= 0 or n_head <= 0 or head_dim <= 0:
        raise ValueError(f"{n_rows} rows, {n_head} heads of {head_dim}: attention needs at least 1 of each")
    if head_dim > HEAD_DIM_MAX:
        raise ValueError(f"head_dim = {head_dim}: a warp holds at most {HEAD_DIM_MAX}; split the head's elements")
    if n_rows > 65535:
        raise ValueError(f"{n_rows} rows: a grid takes 65535 along y; launch fewer at a time")
    require_block_size(block_size)
    return (n_head, n_rows), THREADS


@cuda.jit
def paged_v3_rows(q, k_cache, v_cache, block_table, row_seq, positions, out, n_kv_head, head_dim, block_size, scale):
    """out[r, head] = softmax(scale * q[r, head] · keys) @ values, over tokens 0 … positions[r] of r's sequence.

    q, out: (n_rows, n_head, head_dim) float32. k_cache, v_cache: (num_blocks, n_kv_head, block_size, head_dim) float32.
    block_table: (num_seqs, max_blocks) int32. row_seq, positions: (n_rows,) int32, a row's line of block_table and its
    place in the sequence, whose keys up to there have been written. All C-contiguous. n_kv_head, head_dim, block_size:
    int32; head_dim at most 128, block_size a multiple of 4. scale: float32, 1 / sqrt(head_dim) in GPT-2.
    Launch: ``paged_v3_rows[paged_rows_launch(n_rows, n_head, head_dim, block_size)](…)``, 256 threads exactly.
    """
    warp_pairs = cuda.shared.array((WARPS, 2), float32)
    warp_sums = cuda.shared.array((WARPS, HEAD_DIM_MAX), float32)
    q_lane = cuda.local.array(PER_LANE, float32)
    acc = cuda.local.array(PER_LANE, float32)
    head = cuda.blockIdx.x
    row = cuda.blockIdx.y
    kv_head = head * n_kv_head // cuda.gridDim.x
    for i in range(PER_LANE):
        dim = cuda.threadIdx.x % WARP + WARP * i
        q_lane[i] = q[row, head, dim] * scale if dim < head_dim else float32(0)
        acc[i] = float32(0)
    end = positions[row] + 1
    largest, total = attend_pages(
        q_lane, k_cache, v_cache, block_table, row_seq[row], kv_head, 0, end, head_dim, block_size, acc
    )
    largest, total, acc_sum = combine_warps(largest, total, acc, head_dim, warp_pairs, warp_sums)
    if cuda.threadIdx.x < head_dim:
        out[row, head, cuda.threadIdx.x] = acc_sum / total if total != float32(0) else float32(0)


def paged_lanes_launch(n_rows, n_head, head_dim, block_size):
    """Launch configuration of :func:`paged_v7_key_per_lane`; ValueError as :func:`paged_rows_launch`."""
    return paged_rows_launch(n_rows, n_head, head_dim, block_size)[0], WARP


@cuda.jit
def paged_v7_key_per_lane(
    q, k_cache, v_cache, block_table, row_seq, positions, out, n_kv_head, head_dim, block_size, scale
):  # fmt: skip
    """:func:`paged_v3_rows` by a single warp: a key a lane while scores are made, an element a lane for their sum.

    There all lanes share each key, and five shuffles add up what they have of its score. Here a lane has a key to
    itself; a shuffle is needed for the largest of 32 scores and for their sum, not for each. Where a warp is a loop
    over vectors, this is most of the time. On a GPU the lanes' keys are head_dim elements apart, and one warp a head
    is few. Arguments as there. Launch: ``paged_v7_key_per_lane[paged_lanes_launch(…)](…)``, 32 threads exactly.
    """
    query = cuda.shared.array(HEAD_DIM_MAX, float32)
    weights = cuda.shared.array(WARP, float32)
    acc = cuda.local.array(PER_LANE, float32)
    head, row, lane = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    kv_head = head * n_kv_head // cuda.gridDim.x
    seq = row_seq[row]
    end = positions[row] + 1
    for dim in range(lane, head_dim, WARP):
        query[dim] = q[row, head, dim] * scale
    for i in range(PER_LANE):
        acc[i] = float32(0)
    cuda.syncthreads()
    largest = LOWEST
    total = float32(0)
    for first in range(0, end, WARP):
        key = min(first + lane, end - 1)
        page = block_table[seq, key // block_size]
        place = key % block_size
        score = float32(0)
        for dim in range(head_dim):
            score = cuda.fma(query[dim], k_cache[page, kv_head, place, dim], score)
        before = largest
        largest = max(largest, warp_max(score))  # behind the end the last key is asked again, and has no weight
        weight = math.exp(score - largest) if first + lane < end else float32(0)
        shrink = math.exp(before - largest)
        total = cuda.fma(total, shrink, warp_sum(weight))
        weights[lane] = weight
        for i in range(PER_LANE):
            acc[i] *= shrink
        cuda.syncthreads()
        for j in range(min(end - first, WARP)):
            page_j = block_table[seq, (first + j) // block_size]
            place_j = (first + j) % block_size
            for i in range(PER_LANE):
                if WARP * i + lane < head_dim:
                    acc[i] = cuda.fma(weights[j], v_cache[page_j, kv_head, place_j, WARP * i + lane], acc[i])
        cuda.syncthreads()
    for i in range(PER_LANE):
        if WARP * i + lane < head_dim:
            out[row, head, WARP * i + lane] = acc[i] / total if total != float32(0) else float32(0)


def paged_tiles_launch(n_rows, n_head, n_kv_head, head_dim, block_size):
    """Launch configuration of :func:`paged_v8_query_per_lane`: key heads along x, 32 queries of one along y.

    ValueError as :func:`paged_rows_launch`, and if more than 32 heads read a key head, or not all as many.
    """
    paged_rows_launch(n_rows, n_head, head_dim, block_size)
    if n_kv_head <= 0 or n_head % n_kv_head or n_head // n_kv_head > WARP:
        raise ValueError(f"{n_head} heads that read {n_kv_head}: a multiple of them, and at most {WARP} each")
    rows = WARP // (n_head // n_kv_head)
    return (n_kv_head, -(-n_rows // rows)), WARP


@cuda.jit
def paged_v8_query_per_lane(
    q, k_cache, v_cache, block_table, row_seq, positions, out, n_kv_head, head_dim, block_size, scale
):  # fmt: skip
    """:func:`paged_v7_key_per_lane` with a lane for a query: a group's heads, of as many rows as a warp has room for.

    A key that has been read serves 32 queries, and a query two keys, since loads are what takes time here. Nothing is
    shuffled: each lane has its own largest score and sum.
    They are made in v7's order, 32 keys at a time with their weights added as its butterfly adds them, and every
    product is rounded once, so the bits are v7's. Where rows of a block belong to several sequences it goes through
    them one after the other, and most lanes look on: for steps v7 is faster. On a GPU queries and sums have no room in
    registers, and one warp a block is few. Arguments as there, n_head at most 32 times n_kv_head.
    Launch: ``paged_v8_query_per_lane[paged_tiles_launch(…)](…)``, 32 threads exactly.
    """
    query = cuda.shared.array((HEAD_DIM_MAX, WARP), float32)
    acc = cuda.shared.array((HEAD_DIM_MAX, WARP), float32)
    weights = cuda.shared.array((WARP, WARP), float32)  # of a key along the first axis, for a query along the second
    sums = cuda.shared.array((HALF_WARP, WARP), float32)
    lane, kv_head = cuda.threadIdx.x, cuda.blockIdx.x
    group = q.shape[1] // n_kv_head
    first_row = cuda.blockIdx.y * (WARP // group)
    end_row = min(first_row + WARP // group, q.shape[0])
    used = lane < (end_row - first_row) * group
    row = min(first_row + lane // group, end_row - 1)
    head = kv_head * group + lane % group
    begin = first_row  # of the rows of the same sequence
    for r in range(first_row + 1, end_row):
        begin = r if r <= row and row_seq[r] != row_seq[r - 1] else begin
    for dim in range(head_dim):
        query[dim, lane] = q[row, head, dim] * scale
        acc[dim, lane] = float32(0)
    largest = LOWEST
    total = float32(0)
    for r in range(first_row, end_row):
        seq = row_seq[r]
        if r == first_row or row_seq[max(r - 1, 0)] != seq:
            longest = 0
            for other in range(r, end_row):
                longest = max(longest, positions[other] + 1 if row_seq[other] == seq else 0)
            end = positions[row] + 1 if used and begin == r else 0
            for first in range(0, longest, WARP):
                count = min(longest - first, WARP)
                best = LOWEST
                for j in range(0, count, 2):  # two keys at a time, of one page: a query is loaded once for both
                    page = block_table[seq, (first + j) // block_size]
                    place = (first + j) % block_size
                    beside = place + min(count - j - 1, 1)  # behind the last key, that one again
                    score = float32(0)
                    score_beside = float32(0)
                    for dim in range(head_dim):
                        score = cuda.fma(query[dim, lane], k_cache[page, kv_head, place, dim], score)
                        score_beside = cuda.fma(query[dim, lane], k_cache[page, kv_head, beside, dim], score_beside)
                    weights[j, lane] = score
                    weights[j + 1, lane] = score_beside
                    best = max(best, score) if first + j < end else best
                    best = max(best, score_beside) if first + j + 1 < end else best
                before = largest
                largest = max(largest, best)
                shrink = math.exp(before - largest)
                for j in range(WARP):
                    counts = j < count and first + j < end
                    weights[j, lane] = math.exp(weights[j, lane] - largest) if counts else float32(0)
                for j in range(16):
                    sums[j, lane] = weights[j, lane] + weights[j + 16, lane]
                for j in range(8):
                    sums[j, lane] += sums[j + 8, lane]
                for j in range(4):
                    sums[j, lane] += sums[j + 4, lane]
                pair = (sums[0, lane] + sums[2, lane]) + (sums[1, lane] + sums[3, lane])
                total = cuda.fma(total, shrink, pair)
                for dim in range(head_dim):
                    acc[dim, lane] *= shrink
                for j in range(0, count, 2):
                    page = block_table[seq, (first + j) // block_size]
                    place = (first + j) % block_size
                    beside = place + min(count - j - 1, 1)
                    weight = weights[j, lane]
                    weight_beside = weights[j + 1, lane]
                    counts = first + j < end  # or a value that is no number would be everybody's
                    counts_beside = j + 1 < count and first + j + 1 < end
                    for dim in range(head_dim):
                        more = cuda.fma(weight, v_cache[page, kv_head, place, dim], acc[dim, lane])
                        more = more if counts else acc[dim, lane]
                        both = cuda.fma(weight_beside, v_cache[page, kv_head, beside, dim], more)
                        acc[dim, lane] = both if counts_beside else more
    if used:
        for dim in range(head_dim):
            out[row, head, dim] = acc[dim, lane] / total if total != float32(0) else float32(0)


def paged_rows_reference(q, k_cache, v_cache, block_table, row_seq, positions, scale):
    """NumPy reference of :func:`paged_v3_rows`, in float64; returns (n_rows, n_head, head_dim) float32."""
    out, n_head, block_size = np.zeros(q.shape, np.float32), q.shape[1], k_cache.shape[2]
    for row, (seq, position) in enumerate(zip(row_seq, positions)):
        pages = block_table[seq, : position // block_size + 1]
        k, v = (np.concatenate(cache[pages], axis=1)[:, : position + 1] for cache in (k_cache, v_cache))
        groups = np.arange(n_head) * k.shape[0] // n_head
        out[row] = decode_reference(q[row], k[groups], v[groups], scale)
    return out
