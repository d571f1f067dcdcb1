"""The verbs in float32, a kernel of the listing (`naive.gpt2`) or two behind each: the level ``kv``.

Rows are independent: a row's bits depend on its own sequence and on nothing else in the batch, and every product adds
over K in one order. So a request has the same tokens alone, in any batch, however its prompt is cut, and when keys and
values come from the prefix cache.
"""

from __future__ import annotations

from types import SimpleNamespace

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.forward.batch import Batch
from ch14_mini_llm.model.roles import Layer, Linear, Model, Norm
from chapters.ch03_indexing.kernels import bias_add, blocks_1d, blocks_2d, residual_add
from chapters.ch06_shared_tile.kernels import matmul_kernel, matmul_launch
from chapters.ch07_warp_reduce.norms import layernorm_launch, layernorm_row
from chapters.ch09_gemm.gemv import gemv_rows, gemv_rows_launch
from chapters.ch12_flash.ragged import (
    paged_rows_launch,
    paged_v3_rows,
    split_qkv_pages,
    split_qkv_pages_launch,
)
from chapters.ch13_llm_ops.batch import embed_rows
from chapters.ch13_llm_ops.kernels import activation_launch, gelu_kernel


class Plain:
    """Buffers ``b`` for ``max_rows`` rows, of which ``max_logits`` are sampled from, and the verbs over them."""

    def __init__(self, model: Model, max_rows: int, max_logits: int) -> None:
        q_width = model.n_head * model.head_dim
        widths = {
            "x": model.d_model, "h": model.d_model, "q": q_width, "att": q_width, "ff": model.d_ff,
            "qkv": (model.n_head + 2 * model.n_kv_head) * model.head_dim,
        }  # fmt: skip
        self._flat = {name: cuda.device_array(max_rows * width, np.float32) for name, width in widths.items()}
        self._widths = widths
        self._logits = cuda.device_array(max_logits * model.vocab_size, np.float32)
        self.model, self.rows, self.b = model, 0, SimpleNamespace()

    def cut(self, rows: int, n_logits: int) -> None:
        """Cut the buffers to a step's rows; views are made only when their number changes."""
        if rows != self.rows:
            self.rows = rows
            for name, width in self._widths.items():
                flat = self._flat[name][: rows * width]
                setattr(self.b, name, flat.reshape(rows, width))
                setattr(self.b, f"{name}_flat", flat)
        vocab_size = self.model.vocab_size
        self.logits_of_rows = self._logits[: n_logits * vocab_size].reshape(n_logits, vocab_size) if n_logits else None

    def embed(self, embedding: tuple, batch: Batch) -> None:
        """x = token embedding + position embedding."""
        n, d = self.rows, self.model.d_model
        embed_rows[blocks_2d(n, d)](batch.tokens, batch.positions, *embedding, self.b.x, n, d)

    def qkv(self, layer: Layer, cache, batch: Batch) -> None:
        """q = queries of norm(x); keys and values go to the rows' slots."""
        n, m = self.rows, self.model
        self._norm(layer.norm_1)
        self._product(self.b.h, layer.qkv, self.b.qkv)
        k, v, q = *cache.layers[layer.index], self.b.q.reshape(n, m.n_head, m.head_dim)
        split_qkv_pages[split_qkv_pages_launch(n, m.n_head, m.n_kv_head, m.head_dim)](
            self.b.qkv, q, k, v, batch.slot_mapping, n, m.n_head, m.n_kv_head, m.head_dim, cache.block_size
        )

    def attend(self, layer: Layer, cache, batch: Batch) -> None:
        """att = attention of each row over its own sequence up to its own position."""
        n, m = self.rows, self.model
        q, att = (one.reshape(n, m.n_head, m.head_dim) for one in (self.b.q, self.b.att))
        paged_v3_rows[paged_rows_launch(n, m.n_head, m.head_dim, cache.block_size)](
            q, *cache.layers[layer.index], batch.block_table, batch.row_seq, batch.positions, att, m.n_kv_head,
            m.head_dim, cache.block_size, np.float32(m.head_dim**-0.5),
        )  # fmt: skip

    def residual(self, linear: Linear, inputs, batch: Batch) -> None:
        """x += inputs @ weight + bias."""
        self._product(inputs, linear, self.b.h)
        size = self.rows * self.model.d_model
        residual_add[blocks_1d(size)](self.b.x_flat, self.b.h_flat, self.b.x_flat, size)

    def up(self, layer: Layer, batch: Batch) -> None:
        """ff = gelu(norm(x) @ weight + bias)."""
        self._norm(layer.norm_2)
        self._product(self.b.h, layer.up, self.b.ff)
        size = self.rows * self.model.d_ff
        gelu_kernel[activation_launch(size)](self.b.ff_flat, self.b.ff_flat, size)

    def logits(self, model: Model, batch: Batch) -> None:
        """logits_of_rows[i] = head @ norm(x) of row ``batch.logits_rows[i]``."""
        if not batch.n_logits:
            return
        self.logits_at(batch.logits_rows, batch.n_logits, self.logits_of_rows)

    def logits_at(self, rows, n: int, out) -> None:
        """out[i] = head @ norm(x) of row rows[i], for i < n, after the layers. rows: int32, on the device."""
        model = self.model
        self._norm(model.norm)
        sizes = model.vocab_size, model.d_model
        gemv_rows[gemv_rows_launch(n, sizes[0])](self.b.h, rows, model.head, out, n, *sizes)

    def _norm(self, norm: Norm) -> None:
        d = self.model.d_model
        eps = np.float32(norm.eps)
        layernorm_row[layernorm_launch(self.rows, d)](self.b.x, norm.weight, norm.bias, self.b.h, d, eps)

    def _product(self, inputs, linear: Linear, out) -> None:
        n, n_in, n_out = self.rows, linear.n_in, linear.n_out
        matmul_kernel[matmul_launch(n, n_out)](inputs, linear.weight, out, n, n_out, n_in)
        if linear.bias is not None:
            bias_add[blocks_2d(n, n_out)](out, linear.bias, out, n, n_out)
