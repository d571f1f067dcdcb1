"""Exercise ch14/fp16: the capstone with its matrices in float16, half the bytes, and all sums in float32.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch14/fp16
"""

import common  # picks the backend, so before numba.cuda

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.naive.gpt2 import EPS, GPT2
from chapters.ch03_indexing.kernels import bias_add, blocks_1d, blocks_2d, embed, residual_add
from chapters.ch04_memory.kernels import split_qkv, split_qkv_launch
from chapters.ch07_warp_reduce.argmax import greedy_argmax, greedy_argmax_launch
from chapters.ch07_warp_reduce.norms import layernorm_launch, layernorm_row
from chapters.ch09_gemm.gemv import gemv_logits, gemv_logits_launch
from chapters.ch09_gemm.kernels import gemm_launch
from chapters.ch09_gemm.tensor_core import gemm_v4_half_storage
from chapters.ch11_attention.kernels import mha_naive
from chapters.ch13_llm_ops.kernels import activation_launch, gelu_kernel

MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # of each block


class HalfGPT2(GPT2):
    """A GPT-2 whose matrix products read float16. ``weights`` and ``layers`` hold the matrices in that form only."""

    def __init__(self, config, tensors, max_length=None):
        # --- your code begins ---
        others = {name: tensor for name, tensor in tensors.items() if not name.endswith(MATRICES)}
        super().__init__(config, others, max_length)
        for name, tensor in tensors.items():
            if name.endswith(MATRICES):
                self.weights[name] = cuda.to_device(np.ascontiguousarray(tensor, np.float16))
        self.layers = [self._layer(layer) for layer in range(config.n_layer)]
        widths = {"h": config.d_model, "att": config.d_model, "ff": config.d_ff}
        self._half = {name: cuda.device_array(self.max_length * width, np.float16) for name, width in widths.items()}
        # --- your code ends ---

    def forward(self, tokens, choose=None):
        """As `GPT2.forward`, but for the lines between the marks."""
        T, d, vocab_size = self.put(tokens), self.config.d_model, self.config.vocab_size
        w, b = self.weights, self.views(T)

        embed[blocks_2d(T, d)](b.tokens, w["wte.weight"], w["wpe.weight"], b.x, T, d)
        # --- your code begins ---
        d_ff, n_head, head_dim = self.config.d_ff, self.config.n_head, self.config.head_dim
        h16, att16 = (self._half[name][: T * d].reshape(T, d) for name in ("h", "att"))
        ff16_flat = self._half["ff"][: T * d_ff]
        ff16 = ff16_flat.reshape(T, d_ff)
        for h in self.layers:
            layernorm_row[layernorm_launch(T, d)](b.x, h["ln_1.weight"], h["ln_1.bias"], h16, d, EPS)
            gemm_v4_half_storage[gemm_launch(T, 3 * d)](h16, h["attn.c_attn.weight"], b.qkv, T, 3 * d, d)
            bias_add[blocks_2d(T, 3 * d)](b.qkv, h["attn.c_attn.bias"], b.qkv, T, 3 * d)
            split_qkv[split_qkv_launch(T, d)](b.qkv, b.q, b.k, b.v, T, n_head, head_dim)
            mha_naive(b.q, b.k, b.v, b.scores, att16, T, n_head, head_dim)
            gemm_v4_half_storage[gemm_launch(T, d)](att16, h["attn.c_proj.weight"], b.h, T, d, d)
            bias_add[blocks_2d(T, d)](b.h, h["attn.c_proj.bias"], b.h, T, d)
            residual_add[blocks_1d(T * d)](b.x_flat, b.h_flat, b.x_flat, T * d)

            layernorm_row[layernorm_launch(T, d)](b.x, h["ln_2.weight"], h["ln_2.bias"], h16, d, EPS)
            gemm_v4_half_storage[gemm_launch(T, d_ff)](h16, h["mlp.c_fc.weight"], b.ff, T, d_ff, d)
            bias_add[blocks_2d(T, d_ff)](b.ff, h["mlp.c_fc.bias"], b.ff, T, d_ff)
            gelu_kernel[activation_launch(T * d_ff)](b.ff_flat, ff16_flat, T * d_ff)
            gemm_v4_half_storage[gemm_launch(T, d)](ff16, h["mlp.c_proj.weight"], b.h, T, d, d_ff)
            bias_add[blocks_2d(T, d)](b.h, h["mlp.c_proj.bias"], b.h, T, d)
            residual_add[blocks_1d(T * d)](b.x_flat, b.h_flat, b.x_flat, T * d)
        # --- your code ends ---

        layernorm_row[layernorm_launch(T, d)](b.x, w["ln_f.weight"], w["ln_f.bias"], b.h, d, EPS)
        gemv_logits[gemv_logits_launch(vocab_size)](b.h[T - 1], w["wte.weight"], self.logits, vocab_size, d)
        if choose is None:
            greedy_argmax[greedy_argmax_launch()](self.logits, self.next_token, vocab_size)
        else:
            choose(self.logits, self.next_token)
        return int(self.next_token.copy_to_host()[0])


# What follows is given: it makes models of weights in memory, asks them for logits, and looks at what they hold.

MODELS = {}


def make(name, config, tensors):
    """Make the model that the functions below know by ``name``."""
    MODELS[name] = HalfGPT2(GPT2Config(**config), tensors)


def forward(name, tokens):
    """`HalfGPT2.forward`: the id that follows, and how many elements came to the host for it."""
    model, copied = MODELS[name], []
    kind = type(model.logits)
    original = kind.copy_to_host

    def copy_to_host(array, *args, **options):
        copied.append(array.size)
        return original(array, *args, **options)

    kind.copy_to_host = copy_to_host
    try:
        return model.forward(tokens), sum(copied)
    finally:
        kind.copy_to_host = original


def logits_all(name, tokens):
    """The logits at every position, (T, vocab_size)."""
    return MODELS[name].logits_all(tokens)


def generate(name, tokens, max_new):
    """Greedy tokens."""
    made = []
    while len(made) < max_new:
        made.append(MODELS[name].forward([*tokens, *made]))
    return made


def matrices(name):
    """The matrices of each block as the forward finds them, in `layers`: a list of {name: array}."""
    return [{key: layer[key].copy_to_host() for key in MATRICES} for layer in MODELS[name].layers]


def held(name):
    """Every array that the model holds, each once: a list of (where, type, elements)."""
    found, seen, places = [], set(), [("model", vars(MODELS[name]))]
    while places:
        place, value = places.pop()
        if hasattr(value, "copy_to_host") or isinstance(value, np.ndarray):
            if id(value) not in seen:
                found.append((place, str(value.dtype), int(value.size)))
            seen.add(id(value))
        elif isinstance(value, dict):
            places += [(f"{place}[{key!r}]", one) for key, one in value.items()]
        elif isinstance(value, (list, tuple)):
            places += [(f"{place}[{i}]", one) for i, one in enumerate(value)]
    return found
