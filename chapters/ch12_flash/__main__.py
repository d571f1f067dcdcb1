"""The chapter's demo: ``make ch12``."""

import math

import numpy as np
from numba import cuda

from chapters.ch11_attention.kernels import attention_scores_bytes
from chapters.ch12_flash.bench import LADDERS, QUICK
from chapters.ch12_flash.decode import decode_splits
from chapters.ch12_flash.kernels import flash_attention, flash_extra_bytes, flash_launch
from chapters.ch12_flash.paged import paged_slots
from common import bench

print("the output of one query, carried along: scores 2, 4, 3 and values 10, 20, 30")
largest, total, acc = -math.inf, 0.0, 0.0
for score, value in ((2, 10), (4, 20), (3, 30)):
    shrink = math.exp(largest - max(largest, score))
    largest = max(largest, score)
    p = math.exp(score - largest)
    total, acc = total * shrink + p, acc * shrink + p * value
    print(f"  largest {largest}, total {total:.3f}, acc {acc:5.2f}: so far {acc / total:.2f}")

scores, values = np.array([2, 4, 3], np.float32), np.array([10, 20, 30], np.float32)
q, k, v = np.zeros((3, 1, 3, 4), np.float32)
q[..., 0], k[0, :, 0], v[0, :, 0] = 1, scores, values
out, lse = cuda.device_array((3, 4), np.float32), cuda.device_array((1, 3), np.float32)
flash_attention[flash_launch(3, 1, 4)](*map(cuda.to_device, (q, k, v)), out, lse, 3, 4, np.float32(1), 1)
print(f"flash_attention, causal, for three such queries: {out.copy_to_host()[:, 0].round(2)}")

print("\nstored beside q, k, v and the output, 12 heads:")
for n_tokens in (1024, 16384):
    there, here = attention_scores_bytes(12, n_tokens) / 2**20, flash_extra_bytes(12, n_tokens) / 2**20
    print(f"  {n_tokens:6} tokens: mha_naive {there:8.1f} MiB, flash_attention {here:5.2f} MiB")

print("\none query a head, 12 heads: blocks of a launch")
for n_tokens in (64, 1024, 16384):
    print(f"  {n_tokens:6} tokens: a block a head {12:4}, split-K {12 * decode_splits(n_tokens, 12):4}")

block_table, context_lens = np.array([[3, 0, -1], [1, -1, -1], [4, 2, 5]]), np.array([6, 3, 9])
print(f"\npages of 4 tokens, block_table {block_table.tolist()}, context_lens {context_lens.tolist()}")
print(f"slots of the next token of each sequence: {paged_slots(block_table, [0, 1, 2], context_lens, 4).tolist()}")
bench.show(LADDERS, QUICK)
