"""GPT-2, made of the kernels of chapters 3 to 13 and nothing else: this file defines no kernel.

`GPT2.forward` is the whole network, one line a kernel. Each step runs it over the whole sequence again and keeps
nothing but the last token's logits: the level ``naive`` of ``--engine``, which the others are compared with.

Source: Radford et al. 2019 (GPT-2); Vaswani et al. 2017 (the transformer block, here with layer norm in front).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.model.config import LAYER_NORM_EPS
from ch14_mini_llm.naive.base import Listing
from chapters.ch03_indexing.kernels import bias_add, blocks_1d, blocks_2d, embed, residual_add
from chapters.ch04_memory.kernels import split_qkv, split_qkv_launch
from chapters.ch06_shared_tile.kernels import matmul_kernel, matmul_launch
from chapters.ch07_warp_reduce.argmax import greedy_argmax, greedy_argmax_launch
from chapters.ch07_warp_reduce.norms import layernorm_launch, layernorm_row
from chapters.ch09_gemm.gemv import gemv_logits, gemv_logits_launch
from chapters.ch11_attention.kernels import mha_naive
from chapters.ch13_llm_ops.kernels import activation_launch, gelu_kernel

EPS = np.float32(LAYER_NORM_EPS)


class GPT2(Listing):
    """A GPT-2 on the device, with every activation buffer allocated once.

    Arguments, and the `RequestError` raised, are those of `Listing`. Attention scores take n_head * max_length ** 2 * 4
    bytes.
    """

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        config, T, d = self.config, self.max_length, self.config.d_model
        # one name a role in the forward pass; `views` cuts them to the length of the sequence
        widths = {"x": d, "h": d, "qkv": 3 * d, "q": d, "k": d, "v": d, "att": d, "ff": config.d_ff}
        self._flat = {name: cuda.device_array(T * width, np.float32) for name, width in widths.items()}
        self._flat["scores"] = cuda.device_array(config.n_head * T * T, np.float32)
        self.logits = cuda.device_array(config.vocab_size, np.float32)
        self.next_token = cuda.device_array(1, np.int32)

    def forward(self, tokens: Sequence[int], choose: Callable | None = None) -> int:
        """The token id that follows `tokens`: the most likely one, or what `choose` makes of the logits.

        tokens: 1 to max_length ids. choose(logits, next_token): launches kernels that read logits (vocab_size,)
        float32 and write next_token (1,) int32, both on the device; None is `greedy_argmax`. Afterwards
        `self.logits` holds the logits of the last position. Raises `RequestError`.
        """
        T = self.put(tokens)
        d, d_ff, vocab_size = self.config.d_model, self.config.d_ff, self.config.vocab_size
        n_head, head_dim = self.config.n_head, self.config.head_dim
        w, b = self.weights, self.views(T)

        embed[blocks_2d(T, d)](b.tokens, w["wte.weight"], w["wpe.weight"], b.x, T, d)
        for h in self.layers:
            layernorm_row[layernorm_launch(T, d)](b.x, h["ln_1.weight"], h["ln_1.bias"], b.h, d, EPS)
            matmul_kernel[matmul_launch(T, 3 * d)](b.h, h["attn.c_attn.weight"], b.qkv, T, 3 * d, d)
            bias_add[blocks_2d(T, 3 * d)](b.qkv, h["attn.c_attn.bias"], b.qkv, T, 3 * d)
            split_qkv[split_qkv_launch(T, d)](b.qkv, b.q, b.k, b.v, T, n_head, head_dim)
            mha_naive(b.q, b.k, b.v, b.scores, b.att, T, n_head, head_dim)
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

    def logits_all(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits at every position, (n_tokens, vocab_size) float32 on the host; for tests, one GEMV a position."""
        self.forward(tokens)
        T, d, vocab_size = len(tokens), self.config.d_model, self.config.vocab_size
        hidden = self.views(T).h  # the final layer norm of every position, as forward left it
        out = np.empty((T, vocab_size), np.float32)
        for t in range(T):
            gemv_logits[gemv_logits_launch(vocab_size)](
                hidden[t], self.weights["wte.weight"], self.logits, vocab_size, d
            )
            self.logits.copy_to_host(out[t])
        return out

    def views(self, T: int) -> SimpleNamespace:
        """The buffers cut to T tokens: views, made once a forward because a slice takes as long as a launch."""
        n_head, head_dim = self.config.n_head, self.config.head_dim
        flat = {name: buffer[: buffer.size // self.max_length * T] for name, buffer in self._flat.items()}
        scores = self._flat["scores"][: n_head * T * T].reshape(n_head, T, T)
        heads = {name: flat[name].reshape(n_head, T, head_dim) for name in "qkv"}
        rows = {name: flat[name].reshape(T, flat[name].size // T) for name in ("x", "h", "qkv", "att", "ff")}
        return SimpleNamespace(
            tokens=self._tokens[:T], scores=scores, **heads, **rows,
            x_flat=flat["x"], h_flat=flat["h"], ff_flat=flat["ff"],
        )  # fmt: skip
