"""The chapter's demo: ``make ch11``."""

import numpy as np
from numba import cuda

from chapters.ch11_attention.bench import LADDERS, QUICK
from chapters.ch11_attention.kernels import attention_scores_bytes, mha_naive
from common import bench

n_head, n_tokens, head_dim = 1, 6, 4
q, k, v = np.random.default_rng(3).standard_normal((3, n_head, n_tokens, head_dim), dtype=np.float32)
scores = cuda.device_array((n_head, n_tokens, n_tokens), np.float32)
out = cuda.device_array((n_tokens, n_head * head_dim), np.float32)
mha_naive(cuda.to_device(q), cuda.to_device(k), cuda.to_device(v), scores, out, n_tokens, n_head, head_dim)
print(f"{n_tokens} tokens, one head: row t says how token t divides its attention, in percent")
for row in scores.copy_to_host()[0]:
    print("  " + " ".join(f"{100 * p:4.0f}" if p else "   ·" for p in row) + f"   sum {row.sum():.2f}")

print("\nthe matrix of scores of one layer, 12 heads, float32:")
for n_tokens in (64, 1024, 16384):
    print(f"  {n_tokens:6} tokens {attention_scores_bytes(12, n_tokens) / 2**20:10.1f} MiB")
bench.show(LADDERS, QUICK)
