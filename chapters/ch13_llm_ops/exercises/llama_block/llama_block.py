"""Exercise ch13/llama_block: a block of a Llama, of the kernels of chapters 3 to 13 and one of your own.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch13/llama_block
"""

import common  # picks the backend, so before numba.cuda

# isort: split
from types import SimpleNamespace

import numpy as np
from numba import cuda

from chapters.ch03_indexing.kernels import blocks_1d, blocks_2d, blocks_3d, residual_add
from chapters.ch06_shared_tile.kernels import matmul_kernel, matmul_launch
from chapters.ch07_warp_reduce.rmsnorm import rmsnorm_launch, rmsnorm_row
from chapters.ch11_attention.kernels import mha_naive
from chapters.ch13_llm_ops.kernels import activation_launch, swiglu
from chapters.ch13_llm_ops.rope import rope_halves, rope_launch, rope_tables


@cuda.jit
def grouped_heads(x, out, n_tokens, n_head, n_kv_head, head_dim):
    """out[h, t] = the head of x[t] that head h reads: neighbouring heads share one, n_head / n_kv_head of them each.

    x: (n_tokens, n_kv_head * head_dim), out: (n_head, n_tokens, head_dim), float32. With n_kv_head = n_head each head
    has its own. Launch: ``grouped_heads[blocks_3d(n_head, n_tokens, head_dim)](…)``: heads along z.
    """
    # --- your code begins ---
    raise NotImplementedError("your code")
    # --- your code ends ---


def block(w, b, s):
    """One block: b.x += attention(norm(b.x)), then b.x += mlp(norm(b.x)).

    w: weights by their names, matrices as (in, out). b: the buffers of `buffers`. s: the sizes, ``s.n_tokens`` rows,
    ``s.n_head`` heads of queries and ``s.n_kv_head`` of keys and values, ``s.head_dim``, ``s.d_model``, ``s.d_ff``,
    ``s.eps``.
    """
    # --- your code begins ---
    raise NotImplementedError("your code")
    # --- your code ends ---


# What follows is given: it puts weights and rows on the device, and calls your functions.


def buffers(x, positions, s):
    """All that a block writes to, on the device, and the tables of cosines and sines for positions up to 255."""
    T, q, kv = s.n_tokens, s.n_head * s.head_dim, s.n_kv_head * s.head_dim
    shapes = {
        "h": (T, s.d_model), "q_rows": (T, q), "k_rows": (T, kv), "v_rows": (T, kv), "att": (T, q),
        "gate": (T, s.d_ff), "up": (T, s.d_ff), "scores": (s.n_head, T, T),
        **dict.fromkeys("qkv", (s.n_head, T, s.head_dim)),
    }  # fmt: skip
    made = {name: cuda.to_device(np.full(shape, np.nan, np.float32)) for name, shape in shapes.items()}
    made |= {"x": cuda.to_device(x), "positions": cuda.to_device(positions)}
    made["cos"], made["sin"] = map(cuda.to_device, rope_tables(256, s.head_dim, s.rotary_base))
    flat = {f"{name}_flat": made[name].reshape(made[name].size) for name in ("x", "h", "gate", "up")}
    return SimpleNamespace(**made, **flat)


PLACED = {}


def place(sizes, weights, x, positions):
    """Put a block's weights and buffers on the device, for `run`."""
    sizes = SimpleNamespace(**{**sizes, "n_tokens": len(x), "eps": np.float32(sizes["eps"])})
    on_device = {name: cuda.to_device(np.ascontiguousarray(array)) for name, array in weights.items()}
    PLACED["block"] = on_device, buffers(x, positions, sizes), sizes


def run():
    """`block` over what was placed."""
    block(*PLACED["block"])


def result():
    """The rows behind the block, and the weights, which should be as they were."""
    weights, made, _ = PLACED["block"]
    return made.x.copy_to_host(), {name: array.copy_to_host() for name, array in weights.items()}


def heads(x, n_head, n_kv_head):
    """`grouped_heads` over rows of n_kv_head heads: (n_head, n_tokens, head_dim)."""
    T, head_dim = len(x), x.shape[1] // n_kv_head
    out = cuda.to_device(np.full((n_head, T, head_dim), np.nan, np.float32))
    grouped_heads[blocks_3d(n_head, T, head_dim)](cuda.to_device(x), out, T, n_head, n_kv_head, head_dim)
    return out.copy_to_host()
