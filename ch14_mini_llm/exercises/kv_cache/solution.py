"""Exercise ch14/kv_cache: one token a step, with the keys and values of earlier tokens kept.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch14/kv_cache
"""

import common  # picks the backend, so before numba.cuda

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.engine.request import RequestError
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.naive.gpt2 import EPS, GPT2
from chapters.ch03_indexing.kernels import bias_add, blocks_1d, blocks_2d, embed, residual_add
from chapters.ch04_memory.kernels import split_qkv, split_qkv_launch
from chapters.ch06_shared_tile.kernels import matmul_kernel, matmul_launch
from chapters.ch07_warp_reduce.argmax import greedy_argmax, greedy_argmax_launch
from chapters.ch07_warp_reduce.norms import layernorm_launch, layernorm_row
from chapters.ch09_gemm.gemv import gemv_logits, gemv_logits_launch
from chapters.ch11_attention.kernels import mha_naive
from chapters.ch12_flash.decode import decode_attention, decode_splits, decode_workspace
from chapters.ch13_llm_ops.kernels import activation_launch, gelu_kernel
from chapters.ch13_llm_ops.kv_cache import kv_append, kv_launch


class CachedGPT2(GPT2):
    """A GPT-2 that runs over each token once.

    K_cache, V_cache: (n_layer, n_head, T_max, head_dim) float32 on the device, T_max = self.max_length; the token at
    position t has its keys and values at [:, :, t]. length: how many tokens are in the cache.
    """

    def __init__(self, config, tensors, max_length=None):
        super().__init__(config, tensors, max_length)
        self.length = 0
        # --- your code begins ---
        shape = (config.n_layer, config.n_head, self.max_length, config.head_dim)
        self.K_cache, self.V_cache = (cuda.to_device(np.zeros(shape, np.float32)) for _ in range(2))
        self.pos = cuda.to_device(np.zeros(1, np.int32))
        self.n_split = decode_splits(self.max_length, config.n_head)
        pairs, sums = decode_workspace(config.n_head, self.n_split, config.head_dim)
        self.pairs, self.sums = cuda.device_array(pairs, np.float32), cuda.device_array(sums, np.float32)
        # --- your code ends ---

    def prefill(self, tokens):
        """Forget what is in the cache, run over a whole prompt, and return the token that follows it."""
        # --- your code begins ---
        self.length = 0
        return self.run(tokens)
        # --- your code ends ---

    def decode(self, token):
        """Run over one more token, behind those in the cache, and return the token that follows it.

        Raises `RequestError`, and changes nothing, if the cache is full.
        """
        # --- your code begins ---
        if self.length == self.max_length:
            raise RequestError(f"the cache is full: it holds {self.length} of {self.max_length} tokens; start again")
        return self.run([token])
        # --- your code ends ---

    # --- your code begins (optional) ---
    def run(self, tokens):
        T, first, d, d_ff = self.put(tokens), self.length, self.config.d_model, self.config.d_ff
        n_head, head_dim, vocab_size = self.config.n_head, self.config.head_dim, self.config.vocab_size
        w, b = self.weights, self.views(T)
        self.pos.copy_to_device(np.array([first], np.int32))

        embed[blocks_2d(T, d)](b.tokens, w["wte.weight"], w["wpe.weight"][first : first + T], b.x, T, d)
        for layer, h in enumerate(self.layers):
            layernorm_row[layernorm_launch(T, d)](b.x, h["ln_1.weight"], h["ln_1.bias"], b.h, d, EPS)
            matmul_kernel[matmul_launch(T, 3 * d)](b.h, h["attn.c_attn.weight"], b.qkv, T, 3 * d, d)
            bias_add[blocks_2d(T, 3 * d)](b.qkv, h["attn.c_attn.bias"], b.qkv, T, 3 * d)
            split_qkv[split_qkv_launch(T, d)](b.qkv, b.q, b.k, b.v, T, n_head, head_dim)
            k_cache, v_cache = self.K_cache[layer], self.V_cache[layer]
            stored = b.k, b.v, k_cache, v_cache, self.pos
            kv_append[kv_launch(n_head, T, head_dim)](*stored, T, self.max_length, head_dim)
            if first == 0:
                mha_naive(b.q, b.k, b.v, b.scores, b.att, T, n_head, head_dim)
            else:
                q, att = b.q.reshape(n_head, head_dim), b.att.reshape(n_head, head_dim)
                decode_attention(q, k_cache, v_cache, self.pairs, self.sums, att, first + 1, head_dim**-0.5)
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
        greedy_argmax[greedy_argmax_launch()](self.logits, self.next_token, vocab_size)
        self.length = first + T
        return int(self.next_token.copy_to_host()[0])

    # --- your code ends ---


# What follows is given: it makes a model of weights in memory and calls your methods.

MODELS = {}


def make(name, config, tensors, max_length):
    """Make the model that the functions below know by ``name``."""
    MODELS[name] = CachedGPT2(GPT2Config(**config), tensors, max_length)


def prefill(name, tokens):
    """`CachedGPT2.prefill`; returns (next token, K_cache, V_cache, length)."""
    return told(MODELS[name], MODELS[name].prefill(tokens))


def decode(name, token):
    """`CachedGPT2.decode`; returns (next token, or the error's text, K_cache, V_cache, length)."""
    try:
        return told(MODELS[name], MODELS[name].decode(token))
    except RequestError as error:
        return told(MODELS[name], str(error))


def told(model, value):
    return value, model.K_cache.copy_to_host(), model.V_cache.copy_to_host(), model.length


def generate(name, tokens, max_new):
    """Greedy tokens, `max_new` of them, by one prefill and then decode steps."""
    made = [MODELS[name].prefill(tokens)]
    while len(made) < max_new:
        made.append(MODELS[name].decode(made[-1]))
    return made


def generate_without(name, tokens, max_new):
    """The same by the capstone's own forward, over the whole sequence at each step."""
    made = []
    while len(made) < max_new:
        made.append(MODELS[name].forward([*tokens, *made]))
    return made
