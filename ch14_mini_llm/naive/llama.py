"""A Llama, made of the kernels of chapters 3 to 13 and nothing else: this file defines no kernel.

`Llama.forward` is the whole network, one line a kernel, next to `naive.gpt2`: RMS norm for layer norm, positions by
rotating queries and keys, SwiGLU for GELU, fewer heads of keys than of queries, and no biases. Each step runs it over
the whole sequence again and keeps nothing but the last token's logits.

Source: Touvron et al. 2023 (Llama, Llama 2); Su et al. 2021 (rotary positions); Shazeer 2020 (SwiGLU); Ainslie et al.
2023 (grouped queries).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.model.llama import EMBEDDING, HEAD, LAST_NORM, llama_tensors
from ch14_mini_llm.model.quantize import unpacked
from ch14_mini_llm.naive.base import Listing
from chapters.ch03_indexing.kernels import blocks_1d, blocks_2d, residual_add
from chapters.ch06_shared_tile.kernels import matmul_kernel, matmul_launch
from chapters.ch07_warp_reduce.argmax import greedy_argmax, greedy_argmax_launch
from chapters.ch07_warp_reduce.rmsnorm import rmsnorm_launch, rmsnorm_row
from chapters.ch09_gemm.gemv import gemv_logits, gemv_logits_launch
from chapters.ch11_attention.kernels import mha_naive
from chapters.ch13_llm_ops.batch import take_rows
from chapters.ch13_llm_ops.kernels import activation_launch, swiglu
from chapters.ch13_llm_ops.rope import rope_halves, rope_launch, rope_tables
from chapters.ch13_llm_ops.rope_rows import split_heads, split_heads_launch


class Llama(Listing):
    """A Llama on the device, with every activation buffer allocated once; arguments and errors as `Listing`'s."""

    LAYER = "layers.{}."

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        c, T = self.config, self.max_length
        q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        widths = {"x": c.d_model, "h": c.d_model, "q_rows": q, "k_rows": kv, "v_rows": kv, "q": q, "k": q, "v": q,
                  "att": q, "gate": c.d_ff, "up": c.d_ff}  # fmt: skip
        self._flat = {name: cuda.device_array(T * width, np.float32) for name, width in widths.items()}
        self._flat["scores"] = cuda.device_array(c.n_head * T * T, np.float32)
        self._positions = cuda.to_device(np.arange(T, dtype=np.int32))
        self._rotary = tuple(map(cuda.to_device, rope_tables(T, c.head_dim, c.rotary_base)))
        self.logits = cuda.device_array(c.vocab_size, np.float32)
        self.next_token = cuda.device_array(1, np.int32)

    def arrays(self, tensors: dict) -> Iterator[tuple[str, np.ndarray]]:
        """Matrices as (in, out), so that y = x @ weight; the embedding and the head stay (vocab_size, d_model)."""
        for name, shape in llama_tensors(self.config):
            array = unpacked(tensors[name])
            yield name, array.T if len(shape) == 2 and name not in (EMBEDDING, HEAD) else array

    def forward(self, tokens: Sequence[int], choose: Callable | None = None) -> int:
        """The token id that follows `tokens`; as `GPT2.forward`. Afterwards `self.logits` holds the last logits."""
        T = self.put(tokens)
        c, w, b, eps = self.config, self.weights, self.views(T), np.float32(self.config.epsilon)
        d, d_ff, hd, n_head, n_kv_head = c.d_model, c.d_ff, c.head_dim, c.n_head, c.n_kv_head
        q, kv, cos_sin = n_head * hd, n_kv_head * hd, self._rotary

        take_rows[blocks_2d(T, d)](w[EMBEDDING], b.tokens, b.x, T, d)
        for h in self.layers:
            rmsnorm_row[rmsnorm_launch(T, d)](b.x, h["input_layernorm.weight"], b.h, d, eps)
            matmul_kernel[matmul_launch(T, q)](b.h, h["self_attn.q_proj.weight"], b.q_rows, T, q, d)
            matmul_kernel[matmul_launch(T, kv)](b.h, h["self_attn.k_proj.weight"], b.k_rows, T, kv, d)
            matmul_kernel[matmul_launch(T, kv)](b.h, h["self_attn.v_proj.weight"], b.v_rows, T, kv, d)
            split_heads[split_heads_launch(T, n_head, hd)](b.q_rows, b.q, T, n_head, n_head, hd)
            split_heads[split_heads_launch(T, n_head, hd)](b.k_rows, b.k, T, n_head, n_kv_head, hd)
            split_heads[split_heads_launch(T, n_head, hd)](b.v_rows, b.v, T, n_head, n_kv_head, hd)
            rope_halves[rope_launch(n_head, T, hd)](b.q, b.positions, *cos_sin, b.q, T, hd)
            rope_halves[rope_launch(n_head, T, hd)](b.k, b.positions, *cos_sin, b.k, T, hd)
            mha_naive(b.q, b.k, b.v, b.scores, b.att, T, n_head, hd)
            matmul_kernel[matmul_launch(T, d)](b.att, h["self_attn.o_proj.weight"], b.h, T, d, q)
            residual_add[blocks_1d(T * d)](b.x_flat, b.h_flat, b.x_flat, T * d)

            rmsnorm_row[rmsnorm_launch(T, d)](b.x, h["post_attention_layernorm.weight"], b.h, d, eps)
            matmul_kernel[matmul_launch(T, d_ff)](b.h, h["mlp.gate_proj.weight"], b.gate, T, d_ff, d)
            matmul_kernel[matmul_launch(T, d_ff)](b.h, h["mlp.up_proj.weight"], b.up, T, d_ff, d)
            swiglu[activation_launch(T * d_ff)](b.gate_flat, b.up_flat, b.up_flat, T * d_ff)
            matmul_kernel[matmul_launch(T, d)](b.up, h["mlp.down_proj.weight"], b.h, T, d, d_ff)
            residual_add[blocks_1d(T * d)](b.x_flat, b.h_flat, b.x_flat, T * d)

        rmsnorm_row[rmsnorm_launch(T, d)](b.x, w[LAST_NORM], b.h, d, eps)
        head = w[EMBEDDING if c.tied_head else HEAD]
        gemv_logits[gemv_logits_launch(c.vocab_size)](b.h[T - 1], head, self.logits, c.vocab_size, d)
        if choose is None:
            greedy_argmax[greedy_argmax_launch()](self.logits, self.next_token, c.vocab_size)
        else:
            choose(self.logits, self.next_token)
        return int(self.next_token.copy_to_host()[0])

    def views(self, T: int) -> SimpleNamespace:
        """The buffers cut to T tokens: views, made once a forward because a slice takes as long as a launch."""
        n_head, head_dim = self.config.n_head, self.config.head_dim
        flat = {name: buffer[: buffer.size // self.max_length * T] for name, buffer in self._flat.items()}
        scores = self._flat["scores"][: n_head * T * T].reshape(n_head, T, T)
        heads = {name: flat[name].reshape(n_head, T, head_dim) for name in "qkv"}
        names = "x", "h", "q_rows", "k_rows", "v_rows", "att", "gate", "up"
        rows = {name: flat[name].reshape(T, flat[name].size // T) for name in names}
        return SimpleNamespace(
            tokens=self._tokens[:T], positions=self._positions[:T], scores=scores, **heads, **rows, x_flat=flat["x"],
            h_flat=flat["h"], gate_flat=flat["gate"], up_flat=flat["up"],
        )  # fmt: skip
