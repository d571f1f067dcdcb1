"""Chapter 13, rotary positions where rows are cut into heads: two kernels that a Llama has in place of GPT-2's splits.

Queries and keys are turned by their positions, values are not (``rope.py``), and key heads may be fewer than query
heads (grouped-query attention). Turning takes no pass over memory of its own where numbers are moved anyway:

========================  =====================================================  ======================================
kernel                    what it does                                           instead of
========================  =====================================================  ======================================
``split_qkv_rope_pages``  chapter 12's ``split_qkv_pages``, turning on the way   a launch for the queries, one for keys
``split_heads``           rows to heads, each source head to a group of heads    chapter 4's ``split_qkv``, for a text
========================  =====================================================  ======================================

The pairs are (i, i + head_dim / 2), as in every published Llama's weights for transformers. llama.cpp's files have the
rows of q and k in another order, such that the pairs are neighbours: who reads them has to put the rows back.
"""

import numpy as np
from numba import cuda, int32, uint32

from chapters.ch03_indexing.kernels import blocks_2d, blocks_3d
from chapters.ch12_flash.ragged import split_qkv_pages_launch, split_qkv_pages_reference
from chapters.ch13_llm_ops.rope import require_even, rope_halves_reference


def split_qkv_rope_launch(n_rows, n_head, n_kv_head, head_dim):
    """Launch configuration of :func:`split_qkv_rope_pages`: pairs of the queries along x, rows along y.

    Raises ValueError if a size is not positive, head_dim odd, or n_head not a multiple of n_kv_head.
    """
    require_even(head_dim)
    split_qkv_pages_launch(n_rows, n_head, n_kv_head, head_dim)
    return blocks_2d(n_rows, n_head * head_dim // 2)


@cuda.jit
def split_qkv_rope_pages(
    qkv, q, k_cache, v_cache, slot_mapping, positions, cos, sin, n_rows, n_head, n_kv_head, head_dim, block_size
):  # fmt: skip
    """q[r] = row r's queries, turned by positions[r]; its keys, turned, and values go to slot_mapping[r] of the pages.

    positions: (n_rows,) int32; -1, padding, turns as 0. cos, sin: of ``rope_tables``, with a line for each position.
    All else as in ``split_qkv_pages``, but float32 only.
    Launch: ``split_qkv_rope_pages[split_qkv_rope_launch(n_rows, n_head, n_kv_head, head_dim)](…)``.
    """
    pair, r = cuda.grid(2)
    half = head_dim // 2
    if r < n_rows and pair < n_head * half:
        head = int32(uint32(pair) // uint32(half))
        point = pair - head * half
        position = max(positions[r], 0)
        c, s = cos[position, point], sin[position, point]
        at = head * head_dim + point
        a, b = qkv[r, at], qkv[r, at + half]
        q[r, at] = a * c - b * s
        q[r, at + half] = a * s + b * c
        slot = slot_mapping[r]
        if head < n_kv_head and slot >= 0:
            page = int32(uint32(slot) // uint32(block_size))
            place = (page * n_kv_head + head) * block_size + (slot - page * block_size)
            to = place * head_dim + point
            key = n_head * head_dim + at
            a, b = qkv[r, key], qkv[r, key + half]
            k_cache[to] = a * c - b * s
            k_cache[to + half] = a * s + b * c
            value = key + n_kv_head * head_dim
            v_cache[to] = qkv[r, value]
            v_cache[to + half] = qkv[r, value + half]


def split_heads_launch(n_tokens, n_head, head_dim):
    """Launch configuration of :func:`split_heads`. Raises ValueError if a size is not positive."""
    return blocks_3d(n_head, n_tokens, head_dim)


@cuda.jit
def split_heads(x, out, n_tokens, n_head, n_source, head_dim):
    """out[h, t] = x[t, head h * n_source // n_head of n_source]: rows to heads, each repeated for its group.

    x: (n_tokens, n_source * head_dim), out: (n_head, n_tokens, head_dim), float32, C-contiguous. Sizes: int32, n_head a
    multiple of n_source. Launch: ``split_heads[split_heads_launch(n_tokens, n_head, head_dim)](…)``. Source: Ainslie et
    al. 2023, "GQA".
    """
    dim, t, head = cuda.grid(3)
    if dim < head_dim and t < n_tokens:
        out[head, t, dim] = x[t, head * n_source // n_head * head_dim + dim]


# --- references ------------------------------------------------------------------------------------------------------


def split_qkv_rope_pages_reference(qkv, k_cache, v_cache, slot_mapping, positions, n_head, base):
    """NumPy reference of :func:`split_qkv_rope_pages`: writes to the caches, of four axes here, and returns q."""
    _, n_kv_head, _, head_dim = k_cache.shape
    turned = qkv.copy()
    width = (n_head + n_kv_head) * head_dim
    heads = qkv[:, :width].reshape(len(qkv), n_head + n_kv_head, head_dim).transpose(1, 0, 2)
    heads = rope_halves_reference(heads, np.maximum(positions, 0), base)
    turned[:, :width] = heads.transpose(1, 0, 2).reshape(-1, width)
    return split_qkv_pages_reference(turned, k_cache, v_cache, slot_mapping, n_head)


def split_heads_reference(x, n_head, n_source):
    """NumPy reference of :func:`split_heads`."""
    heads = x.reshape(len(x), n_source, -1).transpose(1, 0, 2)
    return np.repeat(heads, n_head // n_source, axis=0)
