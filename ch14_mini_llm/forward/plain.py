"""The verbs in float32, a kernel or two behind each: the level ``kv``. Weights may be float16, int8 or int4.

Rows are independent: a row's bits depend on its own sequence and on nothing else in the batch, and every product adds
over K in one order. So a request has the same tokens alone, in any batch, however its prompt is cut, and when keys and
values come from the prefix cache.
"""

from __future__ import annotations

from types import SimpleNamespace

import common  # picks the backend, so before numba.cuda

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.forward.batch import Batch, last_embedding
from ch14_mini_llm.forward.shapes import Shape
from ch14_mini_llm.model.roles import FewBits, Layer, Linear, Model, Norm
from chapters.ch03_indexing.kernels import blocks_2d
from chapters.ch07_warp_reduce.argmax import argmax_launch, argmax_row
from chapters.ch07_warp_reduce.norms import layernorm_launch, layernorm_row
from chapters.ch07_warp_reduce.rmsnorm import rmsnorm_launch, rmsnorm_row
from chapters.ch09_gemm.panels import linear
from chapters.ch09_gemm.quantized import quantized_linear
from chapters.ch12_flash.kernels import WARP
from chapters.ch12_flash.ragged import (
    paged_lanes_launch,
    paged_rows_launch,
    paged_tiles_launch,
    paged_v3_rows,
    paged_v7_key_per_lane,
    paged_v8_query_per_lane,
    split_qkv_pages,
    split_qkv_pages_launch,
)
from chapters.ch13_llm_ops.batch import embed_rows, embed_tokens, take_rows
from chapters.ch13_llm_ops.fused import append_rows, append_rows_launch
from chapters.ch13_llm_ops.kernels import activation_launch, gelu_kernel, swiglu_fused, swiglu_fused_launch
from chapters.ch13_llm_ops.rope_rows import split_qkv_rope_launch, split_qkv_rope_pages


def rows_attention(n_rows: int, n_head: int, n_kv_head: int, *sizes: int, single: bool) -> tuple:
    """Chapter 12's kernel for the rows of any sequences, and its launch: the one that suits the backend, and a step in
    which each sequence has a row (``single``) or one with prompts."""
    if common.BACKEND == "gpu":
        return paged_v3_rows, paged_rows_launch(n_rows, n_head, *sizes)
    if single or n_head > WARP * n_kv_head:
        return paged_v7_key_per_lane, paged_lanes_launch(n_rows, n_head, *sizes)
    return paged_v8_query_per_lane, paged_tiles_launch(n_rows, n_head, n_kv_head, *sizes)


class Plain:
    """Buffers ``b`` for ``max_rows`` rows, of which ``max_logits`` are sampled from, and the verbs over them.

    logits: (max_logits, vocab_size) float32, those of the last step in front.
    """

    def __init__(self, model: Model, max_rows: int, max_logits: int) -> None:
        q_width = model.n_head * model.head_dim
        widths = {
            "x": model.d_model, "h": model.d_model, "q": q_width, "att": q_width, "ff": model.d_ff,
            "qkv": (model.n_head + 2 * model.n_kv_head) * model.head_dim,
        }  # fmt: skip
        if model.gated:
            widths["gate_up"] = 2 * model.d_ff
        self._flat = {name: cuda.device_array(max_rows * width, np.float32) for name, width in widths.items()}
        self._widths = widths
        self.logits = cuda.device_array((max_logits, model.vocab_size), np.float32)
        self.model, self.rows, self.b = model, 0, SimpleNamespace()
        self._ends_with = *last_embedding(model), self._flat["x"]
        self.n_logits, self.single, self.best = 0, False, None  # its product of the logits leaves no largest ones

    def cut(self, shape: Shape) -> None:
        """Cut the buffers to a step's rows; views are made only when their number changes."""
        if shape.rows != self.rows:
            self.rows = rows = shape.rows
            for name, width in self._widths.items():
                flat = self._flat[name][: rows * width]
                setattr(self.b, name, flat.reshape(rows, width))
                setattr(self.b, f"{name}_flat", flat)
        self.n_logits, self.single = shape.n_logits, shape.single

    def embed(self, embedding: tuple, batch: Batch) -> None:
        """x = token embedding + position embedding, if there is one."""
        n, d, (wte, wpe) = self.rows, self.model.d_model, embedding
        tokens = batch.tokens, batch.source, batch.chosen
        if wpe is None:
            embed_tokens[blocks_2d(n, d)](*tokens, wte, self.b.x, n, d)
        else:
            embed_rows[blocks_2d(n, d)](*tokens, batch.positions, wte, wpe, self.b.x, n, d)

    def qkv(self, layer: Layer, cache, batch: Batch) -> None:
        """q = queries of norm(x); keys and values go to the rows' slots."""
        n, m = self.rows, self.model
        self._norm(layer.norm_1)
        self._product(self.b.h, layer.qkv, self.b.qkv)
        sizes = n, m.n_head, m.n_kv_head, m.head_dim
        places = self.b.qkv, self.b.q, *cache.flat[layer.index], batch.slot_mapping
        if m.rotary is None:
            split_qkv_pages[split_qkv_pages_launch(*sizes)](*places, *sizes, cache.block_size)
        else:
            launch = split_qkv_rope_launch(*sizes)
            split_qkv_rope_pages[launch](*places, batch.positions, *m.rotary, *sizes, cache.block_size)

    def attend(self, layer: Layer, cache, batch: Batch) -> None:
        """att = attention of each row over its own sequence up to its own position."""
        n, m = self.rows, self.model
        q, att = (one.reshape(n, m.n_head, m.head_dim) for one in (self.b.q, self.b.att))
        sizes = n, m.n_head, m.n_kv_head, m.head_dim, cache.block_size
        kernel, launch = rows_attention(*sizes, single=self.single)
        kernel[launch](
            q, *cache.layers[layer.index], batch.block_table, batch.row_seq, batch.positions, att, m.n_kv_head,
            m.head_dim, cache.block_size, np.float32(m.head_dim**-0.5),
        )  # fmt: skip

    def residual(self, linear: Linear, inputs, batch: Batch) -> None:
        """x += inputs @ weight + bias."""
        self._product(inputs, linear, self.b.x, add=1)

    def up(self, layer: Layer, batch: Batch) -> None:
        """ff = gelu(norm(x) @ weight + bias), or silu(gate) · value of the two halves of the product."""
        self._norm(layer.norm_2)
        if self.model.gated:
            self._product(self.b.h, layer.up, self.b.gate_up)
            sizes = self.rows, self.model.d_ff
            swiglu_fused[swiglu_fused_launch(*sizes)](self.b.gate_up, self.b.ff, *sizes)
            return
        self._product(self.b.h, layer.up, self.b.ff)
        size = self.rows * self.model.d_ff
        gelu_kernel[activation_launch(size)](self.b.ff_flat, self.b.ff_flat, size)

    def head(self, model: Model, batch: Batch) -> None:
        """logits[i] = head @ norm(x) of row ``batch.logits_rows[i]``."""
        if self.single:
            self._norm(model.norm)
            self._product(self.b.h, model.head, self.logits)
        elif self.n_logits:
            self.logits_at(batch.logits_rows, self.n_logits, self.logits)

    def logits_at(self, rows, n: int, out) -> None:
        """out[i] = head @ norm(x) of row rows[i], for i < n, after the layers. rows: int32, on the device."""
        d, h = self.model.d_model, self.b.h
        take_rows[blocks_2d(n, d)](self.b.x, rows, h, n, d)
        self._norm(self.model.norm, h, n)
        self._product(h, self.model.head, out, n)

    def pick(self, model: Model, batch: Batch) -> None:
        """The likeliest token of each row of logits, and the rows that have one are a token longer."""
        n, vocab_size = self.n_logits, model.vocab_size
        argmax_row[argmax_launch(n, vocab_size)](self.logits, batch.chosen, vocab_size)
        self.append(model, batch)

    def append(self, model: Model, batch: Batch) -> None:
        """The chosen tokens become the rows' newest."""
        append_rows[append_rows_launch(self.n_logits)](*batch.ends, *self._ends_with)

    def _norm(self, norm: Norm, x=None, n: int = 0) -> None:
        """h = norm(x), of the first ``n`` rows, by default all; x: by default the residual stream."""
        n, x, d, eps = n or self.rows, self.b.x if x is None else x, self.model.d_model, np.float32(norm.eps)
        if norm.bias is None:
            rmsnorm_row[rmsnorm_launch(n, d)](x, norm.weight, self.b.h, d, eps)
        else:
            layernorm_row[layernorm_launch(n, d)](x, norm.weight, norm.bias, self.b.h, d, eps)

    def _product(self, inputs, layer: Linear, out, n: int = 0, add: int = 0) -> None:
        """out = inputs @ weight + bias, for the first ``n`` rows, by default all; add: on top of what is there."""
        n, n_in, n_out = n or self.rows, layer.n_in, layer.n_out
        if isinstance(layer.weight, FewBits):
            (kernel, launch), weights = quantized_linear(layer.weight.bits, n, n_out), layer.weight.arrays
        else:
            (kernel, launch), weights = linear(n, n_out), (layer.weight,)
        kernel[launch](inputs, *weights, layer.bias, out, n, n_out, n_in, add)
