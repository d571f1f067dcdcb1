"""Chapter 4, memory: a layout is index arithmetic, and the arithmetic decides what neighbouring threads touch.

GPT-2 computes query, key and value with one matrix product, so each token's row of the result holds all three, and in
each of them the heads lie side by side. Attention works head by head and wants one ``(n_tokens, head_dim)`` matrix a
head. With ``d_model = n_head * head_dim``, element ``i`` of ``head`` of token ``t`` lies at these flat addresses:

=============  ================================  ===========================================================
array          shape                             flat address
=============  ================================  ===========================================================
``qkv`` (q)    (n_tokens, 3 * d_model)           t * 3 * d_model + 0 * d_model + head * head_dim + i
``qkv`` (k)    the same array                    t * 3 * d_model + 1 * d_model + head * head_dim + i
``qkv`` (v)    the same array                    t * 3 * d_model + 2 * d_model + head * head_dim + i
``q, k, v``    (n_head, n_tokens, head_dim)      head * n_tokens * head_dim + t * head_dim + i
=============  ================================  ===========================================================

``i`` has stride 1 on both sides. So if neighbouring threads take neighbouring ``i``, the 32 threads of a warp read
and write runs of consecutive floats, which the memory system serves in few transactions: the access is *coalesced*.

===============  ==================================================  =====================================
kernel           reads and writes                                    bytes a token moved (float32)
===============  ==================================================  =====================================
``split_qkv``    both coalesced, in runs of ``head_dim`` floats      24 * d_model (3 reads, 3 writes)
===============  ==================================================  =====================================
"""

import numpy as np
from numba import cuda

from chapters.ch03_indexing.kernels import blocks_2d


def split_qkv_launch(n_tokens, d_model):
    """Launch configuration of :func:`split_qkv`, one thread for each (token, column): ``(grid, block)``.

    Raises ValueError if a size is not positive.
    """
    return blocks_2d(n_tokens, d_model)


@cuda.jit
def split_qkv(qkv, q, k, v, n_tokens, n_head, head_dim):
    """q[head, t, i], k[head, t, i], v[head, t, i] = the three thirds of row t of qkv, cut into heads.

    qkv: (n_tokens, 3 * n_head * head_dim) float32, C-contiguous, each row query, key, value of one token.
    q, k, v: (n_head, n_tokens, head_dim) float32, C-contiguous, none of them overlapping ``qkv``.
    n_tokens, n_head, head_dim: int32.
    Launch: ``split_qkv[split_qkv_launch(n_tokens, n_head * head_dim)](…)``. Source: Radford et al. 2019 (GPT-2).
    """
    col, t = cuda.grid(2)  # neighbouring threads, neighbouring columns: coalesced
    d_model = n_head * head_dim
    if t < n_tokens and col < d_model:
        head = col // head_dim  # which head this column of the third belongs to
        i = col % head_dim  # and which of its elements it is
        q_col = col
        k_col = d_model + col
        v_col = 2 * d_model + col
        q[head, t, i] = qkv[t, q_col]
        k[head, t, i] = qkv[t, k_col]
        v[head, t, i] = qkv[t, v_col]


def split_qkv_reference(qkv, n_head):
    """NumPy reference of :func:`split_qkv`: (n_tokens, 3 * d_model) float32 and the number of heads.

    Returns float32 (3, n_head, n_tokens, head_dim): query, key and value.
    """
    n_tokens, width = qkv.shape
    head_dim = width // (3 * n_head)
    return np.ascontiguousarray(qkv.reshape(n_tokens, 3, n_head, head_dim).transpose(1, 2, 0, 3), dtype=np.float32)
