"""The chapter's demo: ``make ch13``."""

import numpy as np
from numba import cuda

from chapters.ch13_llm_ops import kernels as ch13
from chapters.ch13_llm_ops import rope, sampling
from chapters.ch13_llm_ops.bench import LADDERS, QUICK
from common import bench

x = np.array([-3, -1, -0.5, 0, 0.5, 1, 3], np.float32)
print(f"{'x':12}" + " ".join(f"{value:8.4f}" for value in x))
for kernel in (ch13.gelu_kernel, ch13.gelu_erf, ch13.silu):
    out = cuda.device_array(len(x), np.float32)
    kernel[ch13.activation_launch(len(x))](cuda.to_device(x), out, len(x))
    print(f"{kernel.__name__:12}" + " ".join(f"{value:8.4f}" for value in out.copy_to_host()))

head_dim, n_positions = 64, 6
cos, sin = (cuda.to_device(table) for table in rope.rope_tables(n_positions, head_dim))
positions = cuda.to_device(np.arange(n_positions, dtype=np.int32))
query, key = np.random.default_rng(0).standard_normal((2, 1, 1, head_dim), dtype=np.float32)
turned = []
for vector in (query, key):
    everywhere = cuda.to_device(np.repeat(vector, n_positions, axis=1))
    launch = rope.rope_launch(1, n_positions, head_dim)
    rope.rope_halves[launch](everywhere, positions, cos, sin, everywhere, n_positions, head_dim)
    turned.append(everywhere.copy_to_host()[0])
print(f"\none query (row) and one key (column), rotated to positions 0 … {n_positions - 1}: their products")
for row in turned[0] @ turned[1].T:
    print("  " + " ".join(f"{value:7.2f}" for value in row))

logits = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05])).astype(np.float32)
n_draws = 1000
weights, out = cuda.device_array(len(logits), np.int64), cuda.device_array(n_draws, np.int32)
print(f"\nfive tokens, {n_draws} draws each, in percent (and what they should come to)")
for settings in ({}, {"temperature": 0.5}, {"k": 3}, {"p": 0.6}):
    sampling.sample(cuda.to_device(logits), weights, out, len(logits), seed=1, **settings)
    found = np.bincount(out.copy_to_host(), minlength=len(logits)) / n_draws
    should = sampling.probabilities_reference(logits, **settings)
    cells = "  ".join(f"{100 * a:4.1f} ({100 * b:4.1f})" for a, b in zip(found, should))
    print(f"  {', '.join(f'{name} {value}' for name, value in settings.items()) or 'as they are':16} {cells}")
bench.show(LADDERS, QUICK)
