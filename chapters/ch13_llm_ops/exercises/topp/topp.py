"""Exercise ch13/topp: keep the smallest set of tokens that holds a share p of the probability, and draw one of them.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch13/topp
"""

import math

import numpy as np
from numba import cuda, float32, float64, int32, uint64

from chapters.ch07_warp_reduce.kernels import WARP, block_max
from chapters.ch13_llm_ops.sampling import uniform

THREADS = 256  # of a block, for all kernels

# --- your code begins (optional) ---
# --- your code ends ---


@cuda.jit
def weigh(logits, weights, n, temperature):
    """weights[i] = exp((logits[i] - largest logit) / temperature); 0 where the logit is NaN or -inf.

    logits: (n,) float32, none of them +inf. weights: (n,) float64. temperature: float64 > 0. Launched as one block of
    THREADS, and n may be less or more than that.
    """
    # --- your code begins ---
    raise NotImplementedError("your code")
    # --- your code ends ---


@cuda.jit
def keep_top_p(logits, weights, keep, n, p):
    """keep[i] = 1 where token i belongs to the smallest set of likeliest tokens that holds a share p of all weight.

    logits: (n,) float32. weights: (n,) float64, from weigh. keep: (n,) int32. p: float64 in (0, 1]. Launched with one
    thread a token, in blocks of THREADS. Of equal logits, those with the lower index come first. NaN and -inf never
    stay; with p = 1 all others do.
    """
    # --- your code begins ---
    raise NotImplementedError("your code")
    # --- your code ends ---


@cuda.jit
def draw(weights, keep, tokens, n, seed, first_step, steps):
    """tokens[s] = a token drawn from those that are kept, with a chance in proportion to its weight.

    weights: (n,) float64. keep: (n,) int32. tokens: (steps,) int32. Launched with one thread a step, in blocks of
    THREADS; thread s draws step ``first_step + s`` by ``uniform(uint64(seed), uint64(step), uint64(0))``, a float64 in
    [0, 1). If nothing is kept, the token is -1.
    """
    # --- your code begins ---
    raise NotImplementedError("your code")
    # --- your code ends ---


# What follows is given: it launches your kernels.


def filtered(logits, temperature, p):
    """Launch the first two kernels: the weights and which tokens stay, on the device."""
    n = len(logits)
    on_device = cuda.to_device(logits)
    weights, keep = cuda.to_device(np.full(n, 7, np.float64)), cuda.to_device(np.full(n, 7, np.int32))
    weigh[1, THREADS](on_device, weights, n, float(temperature))
    keep_top_p[(n + THREADS - 1) // THREADS, THREADS](on_device, weights, keep, n, float(p))
    return weights, keep


def weigh_all(logits, temperature):
    """The weights of ``logits`` (n,) float32: (n,) float64."""
    return filtered(logits, temperature, 1)[0].copy_to_host()


def top_p(logits, temperature, p):
    """Which of ``logits`` (n,) float32 stay: (n,) int32 of 0 and 1."""
    return filtered(logits, temperature, p)[1].copy_to_host()


def sample(logits, temperature, p, seed, first_step, steps):
    """Tokens drawn in ``steps`` steps, (steps,) int32."""
    weights, keep = filtered(logits, temperature, p)
    tokens = cuda.to_device(np.full(steps, -7, np.int32))
    draw[(steps + THREADS - 1) // THREADS, THREADS](weights, keep, tokens, len(logits), seed, first_step, steps)
    return tokens.copy_to_host()
