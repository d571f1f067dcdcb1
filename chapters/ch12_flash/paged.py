"""Chapter 12, paged attention: decoding for many sequences at once, with keys and values in pages.

A sequence's length is not known before it ends. Room for the longest in one piece per sequence would stay mostly empty;
so tokens lie in pages of ``block_size``, handed out one at a time from a pool, and a table says which page holds which
tokens, as an operating system does with memory:

    token t of sequence s   lies in page   block_table[s, t // block_size]   at row   t % block_size

===========================  ===========================================  ==========================================
kernel                       what it does                                 blocks
===========================  ===========================================  ==========================================
``paged_kv_append``          writes new keys and values to their places   threads stride over all elements
``paged_v1_block_per_head``  attention, one block a head of a sequence    n_head * num_seqs
``paged_v2_split_k``         attention, several blocks a head of a        n_split * n_head * num_seqs, and those of a
                             sequence; then ``decode_combine``            second launch
===========================  ===========================================  ==========================================

A page is (n_head, block_size, head_dim): the rows that a warp reads one after the other, one head's, are neighbours.
The 4 keys of a group share a page, since block_size is a multiple of 4: one look into the table, one division, for 4
keys. All else is as in ``decode.py``. v2 is worth its second launch when n_head * num_seqs blocks do not fill the card.
Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention" (vLLM).
"""

import numpy as np
from numba import cuda, float32

from chapters.ch10_softmax.kernels import LOWEST
from chapters.ch12_flash.decode import (
    GROUP,
    SPLITS_MAX,
    THREADS,
    WARPS,
    attend_group,
    combine_warps,
    decode_combine,
    decode_combine_launch,
    decode_reference,
)
from chapters.ch12_flash.kernels import HEAD_DIM_MAX, PER_LANE, WARP

BLOCK_SIZE = 16  # tokens of a page, unless told otherwise
APPEND_THREADS = 256
APPEND_BLOCKS = 1024


# --- writing ---------------------------------------------------------------------------------------------------------


def paged_slots(block_table, seqs, positions, block_size):
    """Slots for :func:`paged_kv_append`: page * block_size + row of token positions[i] of sequence seqs[i].

    block_table: (num_seqs, max_blocks) integers. seqs, positions: (num_tokens,) integers. Returns (num_tokens,) int64.
    Raises ValueError if a token's page has not been handed out (-1 in the table).
    """
    seqs, positions = np.asarray(seqs), np.asarray(positions)
    pages = np.asarray(block_table)[seqs, positions // block_size].astype(np.int64)
    if (pages < 0).any():
        i = int(np.argmax(pages < 0))
        raise ValueError(f"token {positions[i]} of sequence {seqs[i]} has no page: enter one in block_table first")
    return pages * block_size + positions % block_size


def paged_kv_append_launch(num_tokens, n_head, head_dim):
    """Launch configuration of :func:`paged_kv_append`: ``(grid, block)``.

    Raises ValueError if a size is not positive.
    """
    n = num_tokens * n_head * head_dim
    if num_tokens <= 0 or n_head <= 0 or head_dim <= 0:
        raise ValueError(f"{num_tokens} tokens, {n_head} heads of {head_dim}: appending needs at least 1 of each")
    return min((n + APPEND_THREADS - 1) // APPEND_THREADS, APPEND_BLOCKS), APPEND_THREADS


@cuda.jit
def paged_kv_append(k_new, v_new, k_cache, v_cache, slot_mapping, num_tokens, n_head, head_dim, block_size):
    """Write new tokens' keys and values into their pages (vLLM's ``reshape_and_cache``).

    k_new, v_new: (num_tokens, n_head, head_dim) float32. k_cache, v_cache: (num_blocks, n_head, block_size, head_dim)
    float32, only the new tokens' rows are written. slot_mapping: (num_tokens,) int32 or int64, page * block_size + row,
    no two alike (:func:`paged_slots`); a token with -1 is left out. All C-contiguous. Sizes: int32.
    Launch: ``paged_kv_append[paged_kv_append_launch(num_tokens, n_head, head_dim)](…)``.
    """
    for i in range(cuda.grid(1), num_tokens * n_head * head_dim, cuda.gridsize(1)):
        token = i // (n_head * head_dim)
        head = i // head_dim % n_head
        dim = i % head_dim
        slot = slot_mapping[token]
        if slot >= 0:
            page = slot // block_size
            row = slot % block_size
            k_cache[page, head, row, dim] = k_new[token, head, dim]
            v_cache[page, head, row, dim] = v_new[token, head, dim]


# --- reading ---------------------------------------------------------------------------------------------------------


def require_block_size(block_size):
    """Raises ValueError unless ``block_size`` is a positive multiple of 4, so that a group of 4 keys shares a page."""
    if block_size <= 0 or block_size % GROUP:
        raise ValueError(f"block_size = {block_size} is not a positive multiple of {GROUP}; take 16, as vLLM does")


def paged_split_launch(num_seqs, n_head, head_dim, block_size, n_split):
    """Launch configuration of :func:`paged_v2_split_k`: splits along x, heads along y, sequences along z.

    Raises ValueError if a size is not positive, head_dim above 128, block_size no multiple of 4, n_split above 128, or
    n_head or num_seqs above 65535.
    """
    if num_seqs <= 0 or n_head <= 0 or head_dim <= 0:
        raise ValueError(f"{num_seqs} sequences, {n_head} heads of {head_dim}: attention needs at least 1 of each")
    if head_dim > HEAD_DIM_MAX:
        raise ValueError(f"head_dim = {head_dim}: a warp holds at most {HEAD_DIM_MAX}; split the head's elements")
    if n_head > 65535 or num_seqs > 65535:
        raise ValueError(f"{n_head} heads, {num_seqs} sequences: a grid takes 65535 along y and z; launch slices")
    if not 1 <= n_split <= SPLITS_MAX:
        raise ValueError(f"n_split = {n_split} is not from 1 to {SPLITS_MAX}; let decode_splits choose it")
    require_block_size(block_size)
    return (n_split, n_head, num_seqs), THREADS


def paged_launch(num_seqs, n_head, head_dim, block_size):
    """Launch configuration of :func:`paged_v1_block_per_head`: heads along y, sequences along z: ``(grid, block)``.

    Raises ValueError as :func:`paged_split_launch`.
    """
    return paged_split_launch(num_seqs, n_head, head_dim, block_size, 1)


@cuda.jit(device=True)
def attend_pages(q_lane, k_cache, v_cache, block_table, seq, head, start, end, head_dim, block_size, acc):
    """A warp's share of tokens start … end - 1 of a sequence: the pair ``(largest, total)``; acc is updated.

    Arrays as in :func:`paged_v1_block_per_head`, q_lane and acc as in ``attend_group``. start: a multiple of 4. As
    ``attend_tokens`` in ``decode.py``, but for where a group lies.
    """
    keys = cuda.local.array((GROUP, PER_LANE), float32)
    values = cuda.local.array((GROUP, PER_LANE), float32)
    largest = LOWEST
    total = float32(0)
    for of_block in range(start, end, WARPS * GROUP):  # all warps go round as often, at the end with no key
        first = of_block + cuda.threadIdx.x // WARP * GROUP
        page = block_table[seq, min(first, end - 1) // block_size]
        row = first % block_size
        for j in range(GROUP):
            for i in range(PER_LANE):
                dim = cuda.threadIdx.x % WARP + WARP * i
                if WARP * i < head_dim:
                    inside = first + j < end and dim < head_dim
                    keys[j, i] = k_cache[page, head, row + j, dim] if inside else float32(0)
                    values[j, i] = v_cache[page, head, row + j, dim] if inside else float32(0)
        largest, total = attend_group(q_lane, keys, values, end - first, head_dim, largest, total, acc)
    return largest, total


@cuda.jit
def paged_v1_block_per_head(q, k_cache, v_cache, block_table, context_lens, out, head_dim, block_size, scale):
    """out[s, head] = softmax(scale * q[s, head] · keys of s) @ values of s, for sequences of different lengths.

    q, out: (num_seqs, n_head, head_dim) float32. k_cache, v_cache: (num_blocks, n_head, block_size, head_dim) float32.
    block_table: (num_seqs, max_blocks) int32, pages in the order of their tokens; only the first
    ceil(context_lens[s] / block_size) of a row are read, -1 stands in the others. context_lens: (num_seqs,) int32,
    tokens of each sequence, the new one included; 0 gives out[s] = 0. All C-contiguous. head_dim, block_size: int32, at
    most 128, a multiple of 4. scale: float32, 1 / sqrt(head_dim) in GPT-2.
    Launch: ``paged_v1_block_per_head[paged_launch(num_seqs, n_head, head_dim, block_size)](…)``, 256 threads exactly.
    """
    warp_pairs = cuda.shared.array((WARPS, 2), float32)
    warp_sums = cuda.shared.array((WARPS, HEAD_DIM_MAX), float32)
    q_lane = cuda.local.array(PER_LANE, float32)
    acc = cuda.local.array(PER_LANE, float32)
    head = cuda.blockIdx.y
    seq = cuda.blockIdx.z
    for i in range(PER_LANE):
        dim = cuda.threadIdx.x % WARP + WARP * i
        q_lane[i] = q[seq, head, dim] * scale if dim < head_dim else float32(0)
        acc[i] = float32(0)
    largest, total = attend_pages(
        q_lane, k_cache, v_cache, block_table, seq, head, 0, context_lens[seq], head_dim, block_size, acc
    )
    largest, total, acc_sum = combine_warps(largest, total, acc, head_dim, warp_pairs, warp_sums)
    if cuda.threadIdx.x < head_dim:
        out[seq, head, cuda.threadIdx.x] = acc_sum / total if total != float32(0) else float32(0)


@cuda.jit
def paged_v2_split_k(q, k_cache, v_cache, block_table, context_lens, pairs, sums, head_dim, block_size, scale):
    """Paged attention over part of each sequence: gridDim.x blocks take about equal parts, whatever its length.

    Inputs as in :func:`paged_v1_block_per_head`. pairs: (num_seqs * n_head, n_split, 2), sums: (num_seqs * n_head,
    n_split, head_dim), float32, written as by ``decode_v2_split_k``; row s * n_head + head is sequence s, that head.
    Launch: ``paged_v2_split_k[paged_split_launch(num_seqs, n_head, head_dim, block_size, n_split)](…)``, then
    ``decode_combine``.
    """
    warp_pairs = cuda.shared.array((WARPS, 2), float32)
    warp_sums = cuda.shared.array((WARPS, HEAD_DIM_MAX), float32)
    q_lane = cuda.local.array(PER_LANE, float32)
    acc = cuda.local.array(PER_LANE, float32)
    split = cuda.blockIdx.x
    head = cuda.blockIdx.y
    seq = cuda.blockIdx.z
    for i in range(PER_LANE):
        dim = cuda.threadIdx.x % WARP + WARP * i
        q_lane[i] = q[seq, head, dim] * scale if dim < head_dim else float32(0)
        acc[i] = float32(0)
    context_len = context_lens[seq]
    groups = (context_len + GROUP - 1) // GROUP  # parts are whole groups: none lies in two pages
    part = (groups + cuda.gridDim.x - 1) // cuda.gridDim.x * GROUP
    end = min((split + 1) * part, context_len)
    largest, total = attend_pages(
        q_lane, k_cache, v_cache, block_table, seq, head, split * part, end, head_dim, block_size, acc
    )
    largest, total, acc_sum = combine_warps(largest, total, acc, head_dim, warp_pairs, warp_sums)
    row = seq * cuda.gridDim.y + head
    if cuda.threadIdx.x < head_dim:
        sums[row, split, cuda.threadIdx.x] = acc_sum
    if cuda.threadIdx.x == 0:
        pairs[row, split, 0] = largest
        pairs[row, split, 1] = total


def paged_attention(q, k_cache, v_cache, block_table, context_lens, pairs, sums, out, scale):
    """Paged attention by splits, in two launches; n_split is ``pairs.shape[1]`` (``decode_splits`` chooses well).

    Arrays as in :func:`paged_v2_split_k`, shapes of pairs and sums from ``decode_workspace(num_seqs * n_head, …)``.
    A host function: it returns when the kernels are launched. Raises ValueError for sizes that they do not take.
    """
    (num_seqs, n_head, head_dim), block_size, n_split = q.shape, k_cache.shape[2], pairs.shape[1]
    rows = num_seqs * n_head
    launch = paged_split_launch(num_seqs, n_head, head_dim, block_size, n_split)
    scale = np.float32(scale)
    paged_v2_split_k[launch](q, k_cache, v_cache, block_table, context_lens, pairs, sums, head_dim, block_size, scale)
    decode_combine[decode_combine_launch(rows)](pairs, sums, out.reshape(rows, head_dim), n_split, head_dim)


def paged_reference(q, k_cache, v_cache, block_table, context_lens, scale):
    """NumPy reference: arguments as in :func:`paged_v1_block_per_head`, computed in float64.

    Returns (num_seqs, n_head, head_dim) float32.
    """
    out = np.zeros(q.shape, np.float32)
    block_size = k_cache.shape[2]
    for seq, length in enumerate(context_lens):
        pages = block_table[seq, : -(-length // block_size)]
        if length:  # (pages, n_head, block_size, head_dim) to (n_head, tokens, head_dim)
            k, v = (np.concatenate(cache[pages], axis=1)[:, :length] for cache in (k_cache, v_cache))
            out[seq] = decode_reference(q[seq], k, v, scale)
    return out
