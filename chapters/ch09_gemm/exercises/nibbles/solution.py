"""Exercise ch09/nibbles: y = x @ W, where eight weights of 4 bits share an int32.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch09/nibbles
"""

import numpy as np
from numba import cuda, float32, int32, uint32

import common

THREADS = 128  # of a block
GROUP = 32  # weights along K that share a step and a least number
IN_WORD = 8  # weights of 4 bits in an int32


@cuda.jit
def gemv_q4(x, words, steps, least, y, N, K):
    """y[n] = the sum over k of x[k] * W[k, n], where W[k, n] = steps[k // 32, n] * q + least[k // 32, n].

    q, from 0 to 15: bits 4 j to 4 j + 3 of words[i, n], for k = 8 i + j. x: (K,) float16. words: (K // 8, N) int32.
    steps, least: (K // 32, N) float16. y: (N,) float32. N: at least 1. K: a multiple of 32. All C-contiguous.
    Launched with one thread a column, in blocks of THREADS; the last block may have fewer columns than threads.
    """
    # --- your code begins ---
    n = cuda.grid(1)
    if n < N:
        total = float32(0)
        for group in range(K // GROUP):
            step = float32(steps[group, n])
            low = float32(least[group, n])
            for i in range(group * GROUP // IN_WORD, (group + 1) * GROUP // IN_WORD):
                word = words[i, n]
                for j in range(IN_WORD):
                    q = (word >> 4 * j) & 15
                    total += float32(x[i * IN_WORD + j]) * (step * float32(q) + low)
        y[n] = total
    # --- your code ends ---


# What follows is given: it packs weights, and launches your kernel.


def pack(q):
    """Words of whole numbers q (K, N), each from 0 to 15: (K // 8, N) int32."""
    eight = q.astype(np.uint32).reshape(-1, IN_WORD, q.shape[1])
    shifts = 4 * np.arange(IN_WORD, dtype=np.uint32)
    return np.bitwise_or.reduce(eight << shifts[:, None], axis=1).view(np.int32)


def product(x, words, steps, least):
    """x @ W, for x (K,) float16, words (K // 8, N) int32, steps and least (K // 32, N) float16: (N,) float32."""
    K, N = len(x), words.shape[1]
    y = cuda.to_device(np.full(N, -7, np.float32))
    weights = map(cuda.to_device, (words, steps, least))
    gemv_q4[(N + THREADS - 1) // THREADS, THREADS](cuda.to_device(x), *weights, y, N, K)
    return y.copy_to_host()


def traffic(x, words, steps, least):
    """What `product` asks of memory and of arithmetic, counted on the CPU backend: see `common.memory_report`.

    y: the product. words, steps, least: how many elements of each threads read. operations: {"float32": n, …}.
    """
    with common.memory_report() as report:
        y = product(x, words, steps, least)
    read = {"words": 0, "steps": 0, "least": 0}
    for line in report.lines:
        if line.array in read and line.access == "read":
            read[line.array] += line.threads
    return {"y": y, **read, "operations": report.operations}
