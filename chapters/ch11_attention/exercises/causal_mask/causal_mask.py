"""Exercise ch11/causal_mask: attention weights, scaled and masked, so that no token looks ahead.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch11/causal_mask
"""

import math

import numpy as np
from numba import cuda, float32

from chapters.ch07_warp_reduce.kernels import WARP, warp_max, warp_sum

# --- your code begins (optional) ---
# --- your code ends ---


@cuda.jit
def causal_weights(q, k, weights, n_tokens, head_dim):
    """weights[head, query, key] = softmax over key <= query of q[head, query] · k[head, key] / sqrt(head_dim); else 0.

    q, k: (n_head, n_tokens, head_dim) float32. weights: (n_head, n_tokens, n_tokens) float32, its elements NaN before
    the launch. n_tokens, head_dim: int32. Launched with one warp a row: a grid of (n_tokens, n_head), blocks of WARP.
    """
    # --- your code begins ---
    raise NotImplementedError("your code")
    # --- your code ends ---


# What follows is given: it launches your kernel.


def attention_weights(q, k):
    """The weights (n_head, n_tokens, n_tokens) for queries and keys (n_head, n_tokens, head_dim); all float32."""
    n_head, n_tokens, head_dim = q.shape
    weights = cuda.to_device(np.full((n_head, n_tokens, n_tokens), np.nan, np.float32))
    causal_weights[(n_tokens, n_head), WARP](cuda.to_device(q), cuda.to_device(k), weights, n_tokens, head_dim)
    return weights.copy_to_host()
