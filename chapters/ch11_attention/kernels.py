"""Chapter 11, attention: three kernels, and between them the matrix of all scores.

For every head: scores = scale * q @ k^T, probs = softmax(scores) row by row, out = probs @ v. A token must not look at
later ones (*causal* attention), so scores above the diagonal are -inf, and softmax makes them exactly 0. The two
products are chapter 6's, with a head along the grid's z axis and blocks above the diagonal left out.

================================  ======================================  =============================================
kernel                            what it changes                         floats a block reads for its tile, if all of
                                                                          it lies below the diagonal (n = n_tokens)
================================  ======================================  =============================================
``attention_scores_v1_naive``     one thread a score                      512 * head_dim, those of k not coalesced
``attention_scores_v2_tiled``     16 x 16 tiles of q and k^T              32 * head_dim, coalesced
``softmax_row``                   (chapter 10, a block a row)             n, written back as n
``attention_values_v1_naive``     one thread an element of the output     512 * n at the last row, half that on average
``attention_values_v2_tiled``     16 x 16 tiles of probs and v            32 * n at the last row, half that on average
================================  ======================================  =============================================

``attention_scores`` and ``attention_values`` are the last versions; ``mha_naive`` launches the three stages. It is
naive because of what lies between them: n_head * n * n scores, 48 MiB for 12 heads and 1024 tokens
(``attention_scores_bytes``), are written, read and written by softmax, and read again. Chapter 12 does without them.
"""

import math

import numpy as np
from numba import cuda, float32

from chapters.ch10_softmax.kernels import softmax_launch, softmax_reference, softmax_row

TILE = 16
PADDED = TILE + 1  # a shape in shared memory must be a constant: Numba takes a name, not a sum


def attention_scores_launch(n_tokens, n_head):
    """Launch configuration for all scores: keys along x, queries along y, heads along z: ``(grid, block)``.

    Raises ValueError if a size is not positive.
    """
    if n_tokens <= 0 or n_head <= 0:
        raise ValueError(f"{n_tokens} tokens, {n_head} heads: attention needs at least 1 token and 1 head")
    tiles = (n_tokens + TILE - 1) // TILE
    return (tiles, tiles, n_head), (TILE, TILE)


def attention_values_launch(n_tokens, n_head, head_dim):
    """Launch configuration for the output: a head's elements along x, tokens along y, heads along z: ``(grid, block)``.

    Raises ValueError if a size is not positive.
    """
    if n_tokens <= 0 or n_head <= 0 or head_dim <= 0:
        raise ValueError(f"{n_tokens} tokens, {n_head} heads of {head_dim}: attention needs at least 1 of each")
    return ((head_dim + TILE - 1) // TILE, (n_tokens + TILE - 1) // TILE, n_head), (TILE, TILE)


@cuda.jit
def attention_scores_v1_naive(q, k, scores, n_tokens, head_dim, scale):
    """scores[head, query, key] = scale * sum over i of q[head, query, i] * k[head, key, i]; -inf where key > query.

    q, k: (n_head, n_tokens, head_dim) float32, C-contiguous. scores: (n_head, n_tokens, n_tokens) float32,
    C-contiguous. n_tokens, head_dim: int32. scale: float32, 1 / sqrt(head_dim) in GPT-2.
    Launch: ``attention_scores_v1_naive[attention_scores_launch(n_tokens, n_head)](…)``.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
    """
    key, query = cuda.grid(2)
    head = cuda.blockIdx.z
    if query < n_tokens and key < n_tokens:
        score = float32(-math.inf)
        if key <= query:
            acc = float32(0)
            for i in range(head_dim):
                acc += q[head, query, i] * k[head, key, i]  # neighbouring threads read k a whole row apart
            score = acc * scale
        scores[head, query, key] = score


@cuda.jit
def attention_scores_v2_tiled(q, k, scores, n_tokens, head_dim, scale):
    """scores[head, query, key] = scale * sum over i of q[head, query, i] * k[head, key, i]; -inf where key > query.

    Arguments as in :func:`attention_scores_v1_naive`. Tiles of 16 keys are read along their rows (coalesced) and
    turned round on the way into shared memory.
    Launch: ``attention_scores_v2_tiled[attention_scores_launch(n_tokens, n_head)](…)``.
    """
    q_tile = cuda.shared.array((TILE, TILE), float32)
    k_tile = cuda.shared.array((TILE, PADDED), float32)  # one column more: writes down a column meet all banks
    tx = cuda.threadIdx.x
    ty = cuda.threadIdx.y
    key, query = cuda.grid(2)
    head = cuda.blockIdx.z
    key_read = cuda.blockIdx.x * TILE + ty  # the key whose row this thread helps to bring in
    acc = float32(0)
    if cuda.blockIdx.x <= cuda.blockIdx.y:  # else all keys of the block are later than all its queries
        for i0 in range(0, head_dim, TILE):
            if query < n_tokens and i0 + tx < head_dim:
                q_tile[ty, tx] = q[head, query, i0 + tx]
            else:
                q_tile[ty, tx] = float32(0)
            if key_read < n_tokens and i0 + tx < head_dim:
                k_tile[tx, ty] = k[head, key_read, i0 + tx]
            else:
                k_tile[tx, ty] = float32(0)
            cuda.syncthreads()
            for i in range(TILE):
                acc += q_tile[ty, i] * k_tile[i, tx]
            cuda.syncthreads()
    if query < n_tokens and key < n_tokens:
        if key <= query:
            scores[head, query, key] = acc * scale
        else:
            scores[head, query, key] = float32(-math.inf)


attention_scores = attention_scores_v2_tiled


@cuda.jit
def attention_values_v1_naive(probs, v, out, n_tokens, n_head, head_dim):
    """out[t, head * head_dim + i] = sum over j <= t of probs[head, t, j] * v[head, j, i]: the heads side by side again.

    probs: (n_head, n_tokens, n_tokens) float32, not read where j > t. v: (n_head, n_tokens, head_dim) float32.
    out: (n_tokens, n_head * head_dim) float32. All C-contiguous. n_tokens, n_head, head_dim: int32.
    Launch: ``attention_values_v1_naive[attention_values_launch(n_tokens, n_head, head_dim)](…)``.
    Source: Vaswani et al. 2017, section 3.2.
    """
    i, t = cuda.grid(2)
    head = cuda.blockIdx.z
    if t < n_tokens and i < head_dim:
        acc = float32(0)
        for j in range(t + 1):  # later tokens do not count
            acc += probs[head, t, j] * v[head, j, i]
        out[t, head * head_dim + i] = acc


@cuda.jit
def attention_values_v2_tiled(probs, v, out, n_tokens, n_head, head_dim):
    """out[t, head * head_dim + i] = sum over j <= t of probs[head, t, j] * v[head, j, i]: the heads side by side again.

    Arguments as in :func:`attention_values_v1_naive`.
    Launch: ``attention_values_v2_tiled[attention_values_launch(n_tokens, n_head, head_dim)](…)``.
    """
    p_tile = cuda.shared.array((TILE, TILE), float32)
    v_tile = cuda.shared.array((TILE, TILE), float32)
    tx = cuda.threadIdx.x
    ty = cuda.threadIdx.y
    i, t = cuda.grid(2)
    head = cuda.blockIdx.z
    acc = float32(0)
    for j0 in range(0, (cuda.blockIdx.y + 1) * TILE, TILE):  # up to the tile that holds the block's own tokens
        if t < n_tokens and j0 + tx <= t:  # the diagonal runs through the last tile
            p_tile[ty, tx] = probs[head, t, j0 + tx]
        else:
            p_tile[ty, tx] = float32(0)
        if j0 + ty < n_tokens and i < head_dim:
            v_tile[ty, tx] = v[head, j0 + ty, i]
        else:
            v_tile[ty, tx] = float32(0)
        cuda.syncthreads()
        for j in range(TILE):
            acc += p_tile[ty, j] * v_tile[j, tx]
        cuda.syncthreads()
    if t < n_tokens and i < head_dim:
        out[t, head * head_dim + i] = acc


attention_values = attention_values_v2_tiled


def mha_naive(q, k, v, scores, out, n_tokens, n_head, head_dim):
    """Causal multi-head attention in three launches: scores, softmax in place, values.

    q, k, v: (n_head, n_tokens, head_dim) float32. scores: (n_head, n_tokens, n_tokens) float32, overwritten with the
    probabilities. out: (n_tokens, n_head * head_dim) float32. All C-contiguous device arrays; sizes are ints.
    A host function: it returns when the stages are launched, not when they are done.
    Raises ValueError if a size is not positive. Source: Vaswani et al. 2017, section 3.2.
    """
    scores_launch = attention_scores_launch(n_tokens, n_head)
    values_launch = attention_values_launch(n_tokens, n_head, head_dim)
    scale = np.float32(1 / math.sqrt(head_dim))
    rows = scores.reshape(n_head * n_tokens, n_tokens)  # the same memory: one row a (head, query)
    attention_scores[scores_launch](q, k, scores, n_tokens, head_dim, scale)
    softmax_row[softmax_launch(n_head * n_tokens)](rows, rows, n_tokens)
    attention_values[values_launch](scores, v, out, n_tokens, n_head, head_dim)


def attention_scores_bytes(n_head, n_tokens, dtype=np.float32):
    """Bytes of the matrix of scores, one for each pair of tokens of each head: twice the tokens, four times the bytes.

    dtype: of a score; the kernels here write float32. Raises ValueError if a size is not positive.
    """
    if n_tokens <= 0 or n_head <= 0:
        raise ValueError(f"{n_tokens} tokens, {n_head} heads: attention needs at least 1 token and 1 head")
    return n_head * n_tokens * n_tokens * np.dtype(dtype).itemsize


def attention_scores_reference(q, k, scale):
    """NumPy reference of the scores: q, k (n_head, n_tokens, head_dim) float32, computed in float64.

    Returns (n_head, n_tokens, n_tokens) float32 with -inf above the diagonal.
    """
    scores = np.einsum("hqi,hki->hqk", q.astype(np.float64), k.astype(np.float64)) * scale
    later = np.triu(np.ones(scores.shape[1:], dtype=bool), 1)
    return np.where(later, -np.inf, scores).astype(np.float32)


def attention_values_reference(probs, v):
    """NumPy reference of the output: probs (n_head, n_tokens, n_tokens), v (n_head, n_tokens, head_dim), float32.

    Returns (n_tokens, n_head * head_dim) float32, computed in float64.
    """
    out = np.einsum("htj,hji->thi", np.tril(probs).astype(np.float64), v.astype(np.float64))
    return out.reshape(len(out), -1).astype(np.float32)


def mha_reference(q, k, v):
    """NumPy reference of :func:`mha_naive`: q, k, v (n_head, n_tokens, head_dim) float32.

    Returns (n_tokens, n_head * head_dim) float32.
    """
    n_head, n_tokens, head_dim = q.shape
    scores = attention_scores_reference(q, k, 1 / math.sqrt(head_dim))
    probs = softmax_reference(scores.reshape(-1, n_tokens)).reshape(n_head, n_tokens, n_tokens)
    return attention_values_reference(probs, v)
