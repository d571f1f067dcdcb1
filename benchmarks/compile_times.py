"""Seconds until each kernel of the capstone is ready to run, as one JSON object on stdout (used by bench_cpu.py).

Set MINI_CACHE_DIR to an empty folder for cold times; run again for those from the disk cache.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["MINI_BACKEND"] = "cpu"

import common  # noqa: F401  (before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from chapters.ch03_indexing import kernels as ch03
from chapters.ch04_memory import kernels as ch04
from chapters.ch06_shared_tile import kernels as ch06
from chapters.ch07_warp_reduce import argmax, norms
from chapters.ch09_gemm import gemv
from chapters.ch10_softmax import kernels as ch10
from chapters.ch11_attention import kernels as ch11
from chapters.ch13_llm_ops import kernels as ch13
from chapters.ch13_llm_ops import sampling


@cuda.jit
def first_kernel(x):
    """Compiled first, so that loading the compiler itself is not counted to any of the book's kernels."""
    x[cuda.grid(1)] = 0


def main():
    f = np.zeros
    x1, x2, x3 = f(64, np.float32), f((8, 64), np.float32), f((2, 8, 32), np.float32)
    square, i1 = f((2, 8, 8), np.float32), f(1, np.int32)
    first_kernel[1, 32](x1[:32])
    times = {}

    def take(kernel, launch, *args):
        start = time.perf_counter()
        kernel[launch](*args)
        times[kernel.__name__] = time.perf_counter() - start

    take(ch03.embed, ch03.blocks_2d(8, 64), f(8, np.int32), x2, x2, x2, 8, 64)
    take(ch03.bias_add, ch03.blocks_2d(8, 64), x2, x1, x2, 8, 64)
    take(ch03.residual_add, ch03.blocks_1d(64), x1, x1, x1, 64)
    take(ch04.split_qkv, ch04.split_qkv_launch(8, 64), f((8, 192), np.float32), x3, x3, x3, 8, 2, 32)
    take(ch06.matmul_kernel, ch06.matmul_launch(8, 64), x2, f((64, 64), np.float32), x2.copy(), 8, 64, 64)
    take(norms.layernorm_row, norms.layernorm_launch(8, 64), x2, x1, x1, x2, 64, np.float32(1e-5))
    take(gemv.gemv_logits, gemv.gemv_logits_launch(8), x1, x2, f(8, np.float32), 8, 64)
    take(argmax.greedy_argmax, argmax.greedy_argmax_launch(), x1, i1, 64)
    take(ch10.softmax_row, ch10.softmax_launch(8), x2, x2, 64)
    take(ch11.attention_scores, ch11.attention_scores_launch(8, 2), x3, x3, square, 8, 32, np.float32(1))
    take(ch11.attention_values, ch11.attention_values_launch(8, 2, 32), square, x3, x2, 8, 2, 32)
    take(ch13.gelu_kernel, ch13.activation_launch(64), x1, x1, 64)
    logits, weights = cuda.to_device(x1), cuda.device_array(64, np.int64)
    n, temperature, k, p, seed, step = sampling.check_sampling(64, 0.8, 5, 0.9)
    take(sampling.filter_logits, sampling.sample_launch(), logits, weights, n, temperature, k, p)
    take(sampling.draw_token, sampling.sample_launch(), weights, cuda.device_array(1, np.int32), n, seed, step)
    print(json.dumps(times, indent=1))


if __name__ == "__main__":
    main()
