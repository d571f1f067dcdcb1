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
        raise NotImplementedError("your code")
        # --- your code ends ---

    def prefill(self, tokens):
        """Forget what is in the cache, run over a whole prompt, and return the token that follows it."""
        # --- your code begins ---
        raise NotImplementedError("your code")
        # --- your code ends ---

    def decode(self, token):
        """Run over one more token, behind those in the cache, and return the token that follows it.

        Raises `RequestError`, and changes nothing, if the cache is full.
        """
        # --- your code begins ---
        raise NotImplementedError("your code")
        # --- your code ends ---

    # --- your code begins (optional) ---
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
