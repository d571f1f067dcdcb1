"""Chapter 13, the key-value cache: what attention needs of earlier tokens is computed once and kept.

A token's key and value never change once it is written, since no token looks ahead. So each step computes them for the
new tokens alone, and puts them behind those of the tokens before.

================  ==================================================  ==========================================
kernel            what it does                                        bytes an element moved (float32)
================  ==================================================  ==========================================
``kv_append``     new keys and values to the end of the cache         16 (key and value, each read and written)
``kv_advance``    the end moves by the number of new tokens           none to speak of
``kv_read``       the cache's first tokens, packed                    8
``kv_gather``     any of its tokens, in any order                     8
================  ==================================================  ==========================================

A cache is (n_head, T_max, head_dim): a head's tokens lie together, in their order, as attention reads them, with room
for T_max. Where the end is, ``pos``, is a number in the device's memory and not an argument: the host can then replay
the same launches, arguments and all, for every step (a CUDA graph), and the position still moves on.

**When the cache is full**, tokens past T_max are not stored, and nothing else is overwritten. ``pos`` counts them all
the same: ``pos > T_max`` says that tokens were lost. The host, which knows how many it has sent, should not get there.
"""

import numpy as np
from numba import cuda, float32

from chapters.ch03_indexing.kernels import blocks_3d


def kv_launch(n_head, T, head_dim):
    """Launch of the copying kernels, one thread for each element (x), token (y), head (z): ``(grid, block)``.

    Raises ValueError if a size is not positive, or if the grid would be too large.
    """
    return blocks_3d(n_head, T, head_dim)


@cuda.jit
def kv_append(k, v, k_cache, v_cache, pos, T, T_max, head_dim):
    """k_cache[head, pos[0] + t] = k[head, t] and v_cache[head, pos[0] + t] = v[head, t], for the T new tokens.

    k, v: (n_head, T, head_dim) float32. k_cache, v_cache: (n_head, T_max, head_dim) float32. All C-contiguous, no
    overlap. pos: (1,) int32, the tokens in the cache so far; :func:`kv_advance` moves it afterwards, in a launch of its
    own, for other blocks may still be reading it. T, T_max, head_dim: int32. Tokens that would come to lie outside
    0 … T_max - 1 are not stored. Launch: ``kv_append[kv_launch(n_head, T, head_dim)](…)``.
    """
    i, t, head = cuda.grid(3)
    if i < head_dim and t < T:
        slot = pos[0] + t
        if 0 <= slot < T_max:
            k_cache[head, slot, i] = k[head, t, i]
            v_cache[head, slot, i] = v[head, t, i]


def kv_append_reference(k, v, k_cache, v_cache, pos):
    """NumPy reference of :func:`kv_append`: returns the caches afterwards, as new arrays."""
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    slots = pos + np.arange(k.shape[1])
    fits = (slots >= 0) & (slots < k_cache.shape[1])
    k_cache[:, slots[fits]], v_cache[:, slots[fits]] = k[:, fits], v[:, fits]
    return k_cache, v_cache


def kv_advance_launch():
    """Launch configuration of :func:`kv_advance`: ``(grid, block)``, a single thread."""
    return 1, 1


@cuda.jit
def kv_advance(pos, T):
    """pos[0] += T. pos: (1,) int32. T: int32. Launch: ``kv_advance[kv_advance_launch()](…)``, one thread."""
    pos[0] += T


@cuda.jit
def kv_read(cache, out, T, T_max, head_dim):
    """out[head, t] = cache[head, t] for the first T tokens, packed for kernels that know no T_max.

    cache: (n_head, T_max, head_dim) float32. out: (n_head, T, head_dim) float32. Both C-contiguous, no overlap.
    T, T_max, head_dim: int32. Where T > T_max, the tokens that the cache cannot hold read as 0.
    Launch: ``kv_read[kv_launch(n_head, T, head_dim)](…)``.
    """
    i, t, head = cuda.grid(3)
    if i < head_dim and t < T:
        out[head, t, i] = cache[head, t, i] if t < T_max else float32(0)


def kv_read_reference(cache, T):
    """NumPy reference of :func:`kv_read`: (n_head, T_max, head_dim) float32, returns (n_head, T, head_dim)."""
    return kv_gather_reference(cache, np.arange(T))


@cuda.jit
def kv_gather(cache, slots, out, T, T_max, head_dim):
    """out[head, t] = cache[head, slots[t]]: tokens picked one by one, as beam search or a sliding window needs them.

    cache: (n_head, T_max, head_dim) float32. slots: (T,) int32; outside 0 … T_max - 1 reads as 0. out: (n_head, T,
    head_dim) float32. All C-contiguous, no overlap. T, T_max, head_dim: int32.
    Launch: ``kv_gather[kv_launch(n_head, T, head_dim)](…)``.
    """
    i, t, head = cuda.grid(3)
    if i < head_dim and t < T:
        slot = slots[t]
        out[head, t, i] = cache[head, slot, i] if 0 <= slot < T_max else float32(0)


def kv_gather_reference(cache, slots):
    """NumPy reference of :func:`kv_gather`: (n_head, T_max, head_dim) and (T,) integers; (n_head, T, head_dim)."""
    slots = np.asarray(slots)
    inside = (slots >= 0) & (slots < cache.shape[1])
    return np.where(inside[:, None], cache[:, np.where(inside, slots, 0)], np.float32(0))
