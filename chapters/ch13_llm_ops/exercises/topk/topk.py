"""Exercise ch13/topk: keep the k most likely tokens, and draw one of them, on the device.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch13/topk
"""

import math

import numpy as np
from numba import cuda, float32, float64, int32, uint64

from chapters.ch07_warp_reduce.kernels import WARP, block_max
from chapters.ch13_llm_ops.sampling import uniform

THREADS = 256  # of a block, for both kernels

# --- your code begins (optional) ---
# --- your code ends ---


@cuda.jit
def keep_top_k(logits, keep, n, k):
    """keep[i] = 1 where logits[i] is among the k largest, else 0.

    logits: (n,) float32. keep: (n,) int32. Launched with one thread a token, in blocks of THREADS. Of equal logits at
    the edge, those with the lower index stay. NaN and -inf never stay, so fewer than k may; k may be larger than n.
    """
    # --- your code begins ---
    raise NotImplementedError("your code")
    # --- your code ends ---


@cuda.jit
def draw_kept(logits, keep, tokens, n, temperature, seed, first_step):
    """tokens[b] = a token drawn from the softmax of logits / temperature over the tokens that are kept.

    logits: (n,) float32. keep: (n,) int32. tokens: (steps,) int32. Launched with one block of THREADS a step; block b
    draws step ``first_step + b`` by the number ``uniform(uint64(seed), uint64(step), uint64(0))``, a float64 in [0, 1).
    If nothing is kept, the token is -1.
    """
    # --- your code begins ---
    raise NotImplementedError("your code")
    # --- your code ends ---


# What follows is given: it launches your kernels.


def top_k(logits, k):
    """Which of ``logits`` (n,) float32 stay among the k largest: (n,) int32 of 0 and 1."""
    n = len(logits)
    keep = cuda.to_device(np.full(n, 7, np.int32))
    keep_top_k[(n + THREADS - 1) // THREADS, THREADS](cuda.to_device(logits), keep, n, k)
    return keep.copy_to_host()


def sample(logits, k, temperature, seed, first_step, steps):
    """Tokens drawn in ``steps`` steps, (steps,) int32."""
    n = len(logits)
    on_device, keep = cuda.to_device(logits), cuda.to_device(np.zeros(n, np.int32))
    tokens = cuda.to_device(np.full(steps, -7, np.int32))
    keep_top_k[(n + THREADS - 1) // THREADS, THREADS](on_device, keep, n, k)
    draw_kept[steps, THREADS](on_device, keep, tokens, n, np.float32(temperature), seed, first_step)
    return tokens.copy_to_host()
