"""Exercise ch14/flash: the capstone with FlashAttention, and without the matrix of all scores.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch14/flash
"""

import common  # picks the backend, so before numba.cuda

# isort: split
from types import SimpleNamespace

import numpy as np
from numba import cuda

from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.naive.gpt2 import EPS, GPT2
from chapters.ch03_indexing.kernels import bias_add, blocks_1d, blocks_2d, embed, residual_add
from chapters.ch04_memory.kernels import split_qkv, split_qkv_launch
from chapters.ch06_shared_tile.kernels import matmul_kernel, matmul_launch
from chapters.ch07_warp_reduce.argmax import greedy_argmax, greedy_argmax_launch
from chapters.ch07_warp_reduce.norms import layernorm_launch, layernorm_row
from chapters.ch09_gemm.gemv import gemv_logits, gemv_logits_launch
from chapters.ch12_flash.kernels import flash_attention, flash_launch
from chapters.ch13_llm_ops.kernels import activation_launch, gelu_kernel


class FlashGPT2(GPT2):
    """A GPT-2 whose attention is one kernel a layer and keeps one float32 a row where there were n_tokens."""

    def __init__(self, config, tensors, max_length=None):
        super().__init__(config, tensors, max_length)
        # --- your code begins ---
        raise NotImplementedError("your code")
        # --- your code ends ---

    def views(self, T):
        """The buffers cut to T tokens, under the names that ``forward`` uses: see `GPT2.views`."""
        # --- your code begins ---
        raise NotImplementedError("your code")
        # --- your code ends ---

    def forward(self, tokens, choose=None):
        """As `GPT2.forward`, but for the lines between the marks."""
        T, d, d_ff = self.put(tokens), self.config.d_model, self.config.d_ff
        n_head, head_dim, vocab_size = self.config.n_head, self.config.head_dim, self.config.vocab_size
        w, b = self.weights, self.views(T)

        embed[blocks_2d(T, d)](b.tokens, w["wte.weight"], w["wpe.weight"], b.x, T, d)
        for h in self.layers:
            layernorm_row[layernorm_launch(T, d)](b.x, h["ln_1.weight"], h["ln_1.bias"], b.h, d, EPS)
            matmul_kernel[matmul_launch(T, 3 * d)](b.h, h["attn.c_attn.weight"], b.qkv, T, 3 * d, d)
            bias_add[blocks_2d(T, 3 * d)](b.qkv, h["attn.c_attn.bias"], b.qkv, T, 3 * d)
            split_qkv[split_qkv_launch(T, d)](b.qkv, b.q, b.k, b.v, T, n_head, head_dim)
            # here stood mha_naive(b.q, b.k, b.v, b.scores, b.att, T, n_head, head_dim)
            # --- your code begins ---
            raise NotImplementedError("your code")
            # --- your code ends ---
            matmul_kernel[matmul_launch(T, d)](b.att, h["attn.c_proj.weight"], b.h, T, d, d)
            bias_add[blocks_2d(T, d)](b.h, h["attn.c_proj.bias"], b.h, T, d)
            residual_add[blocks_1d(T * d)](b.x_flat, b.h_flat, b.x_flat, T * d)

            layernorm_row[layernorm_launch(T, d)](b.x, h["ln_2.weight"], h["ln_2.bias"], b.h, d, EPS)
            matmul_kernel[matmul_launch(T, d_ff)](b.h, h["mlp.c_fc.weight"], b.ff, T, d_ff, d)
            bias_add[blocks_2d(T, d_ff)](b.ff, h["mlp.c_fc.bias"], b.ff, T, d_ff)
            gelu_kernel[activation_launch(T * d_ff)](b.ff_flat, b.ff_flat, T * d_ff)
            matmul_kernel[matmul_launch(T, d)](b.ff, h["mlp.c_proj.weight"], b.h, T, d, d_ff)
            bias_add[blocks_2d(T, d)](b.h, h["mlp.c_proj.bias"], b.h, T, d)
            residual_add[blocks_1d(T * d)](b.x_flat, b.h_flat, b.x_flat, T * d)

        layernorm_row[layernorm_launch(T, d)](b.x, w["ln_f.weight"], w["ln_f.bias"], b.h, d, EPS)
        gemv_logits[gemv_logits_launch(vocab_size)](b.h[T - 1], w["wte.weight"], self.logits, vocab_size, d)
        if choose is None:
            greedy_argmax[greedy_argmax_launch()](self.logits, self.next_token, vocab_size)
        else:
            choose(self.logits, self.next_token)
        return int(self.next_token.copy_to_host()[0])


# What follows is given: it makes models of weights in memory, and asks them for logits.

MODELS = {}


def make(name, config, tensors, max_length):
    """Make the model that the functions below know by ``name``."""
    MODELS[name] = FlashGPT2(GPT2Config(**config), tensors, max_length)


def forward(name, tokens):
    """`FlashGPT2.forward`: the id that follows, and the logits of the last position."""
    return MODELS[name].forward(tokens), MODELS[name].logits.copy_to_host()


def logits_all(name, tokens):
    """The logits at every position, (T, vocab_size)."""
    return MODELS[name].logits_all(tokens)


def held(name):
    """Every array that the model holds, as {name: number of elements}."""
    found, places = {}, [("model", vars(MODELS[name]))]
    while places:
        place, value = places.pop()
        if hasattr(value, "copy_to_host") or isinstance(value, np.ndarray):
            found[place] = int(value.size)
        elif isinstance(value, dict):
            places += [(f"{place}.{key}", one) for key, one in value.items()]
        elif isinstance(value, (list, tuple)):
            places += [(f"{place}[{i}]", one) for i, one in enumerate(value)]
        elif isinstance(value, SimpleNamespace):
            places.append((place, vars(value)))
    return found
