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
    dim, t, head = cuda.grid(3)
    if dim < head_dim and t < n_tokens:
        out[head, t, dim] = x[t, head // (n_head // n_kv_head) * head_dim + dim]
    # --- your code ends ---


def block(w, b, s):
    """One block: b.x += attention(norm(b.x)), then b.x += mlp(norm(b.x)).

    w: weights by their names, matrices as (in, out). b: the buffers of `buffers`. s: the sizes, ``s.n_tokens`` rows,
    ``s.n_head`` heads of queries and ``s.n_kv_head`` of keys and values, ``s.head_dim``, ``s.d_model``, ``s.d_ff``,
    ``s.eps``.
    """
    # --- your code begins ---
    T, d, d_ff, n_head, n_kv_head, hd = s.n_tokens, s.d_model, s.d_ff, s.n_head, s.n_kv_head, s.head_dim
    q, kv = n_head * hd, n_kv_head * hd
    rmsnorm_row[rmsnorm_launch(T, d)](b.x, w["input_layernorm.weight"], b.h, d, s.eps)
    matmul_kernel[matmul_launch(T, q)](b.h, w["self_attn.q_proj.weight"], b.q_rows, T, q, d)
    matmul_kernel[matmul_launch(T, kv)](b.h, w["self_attn.k_proj.weight"], b.k_rows, T, kv, d)
    matmul_kernel[matmul_launch(T, kv)](b.h, w["self_attn.v_proj.weight"], b.v_rows, T, kv, d)
    grouped_heads[blocks_3d(n_head, T, hd)](b.q_rows, b.q, T, n_head, n_head, hd)
    grouped_heads[blocks_3d(n_head, T, hd)](b.k_rows, b.k, T, n_head, n_kv_head, hd)
    grouped_heads[blocks_3d(n_head, T, hd)](b.v_rows, b.v, T, n_head, n_kv_head, hd)
    rope_halves[rope_launch(n_head, T, hd)](b.q, b.positions, b.cos, b.sin, b.q, T, hd)
    rope_halves[rope_launch(n_head, T, hd)](b.k, b.positions, b.cos, b.sin, b.k, T, hd)
    mha_naive(b.q, b.k, b.v, b.scores, b.att, T, n_head, hd)
    matmul_kernel[matmul_launch(T, d)](b.att, w["self_attn.o_proj.weight"], b.h, T, d, q)
    residual_add[blocks_1d(T * d)](b.x_flat, b.h_flat, b.x_flat, T * d)

    rmsnorm_row[rmsnorm_launch(T, d)](b.x, w["post_attention_layernorm.weight"], b.h, d, s.eps)
    matmul_kernel[matmul_launch(T, d_ff)](b.h, w["mlp.gate_proj.weight"], b.gate, T, d_ff, d)
    matmul_kernel[matmul_launch(T, d_ff)](b.h, w["mlp.up_proj.weight"], b.up, T, d_ff, d)
    swiglu[activation_launch(T * d_ff)](b.gate_flat, b.up_flat, b.up_flat, T * d_ff)
    matmul_kernel[matmul_launch(T, d)](b.up, w["mlp.down_proj.weight"], b.h, T, d, d_ff)
    residual_add[blocks_1d(T * d)](b.x_flat, b.h_flat, b.x_flat, T * d)
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
