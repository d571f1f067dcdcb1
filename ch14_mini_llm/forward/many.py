"""The verbs for many rows, prompts above all: tiles of products and of attention on tensor cores."""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np

from ch14_mini_llm.forward.batch import Batch, Shape
from ch14_mini_llm.forward.half import Half
from ch14_mini_llm.model.roles import Layer, Linear, Norm
from chapters.ch07_warp_reduce.norms import layernorm_launch, layernorm_row
from chapters.ch09_gemm.pipeline import gemm_bias, gemm_bias_launch, gemm_bias_residual
from chapters.ch12_flash.paged_half import flash_v5_launch, flash_v5_pages
from chapters.ch12_flash.ragged import split_qkv_pages, split_qkv_pages_launch
from chapters.ch13_llm_ops.fused import gemm_bias_gelu


class Many(Half):
    """`Half` for many rows, of any sequences."""

    def cut(self, shape: Shape) -> None:
        """Cut the buffers to a step's rows."""
        if shape.rows != self.rows:
            m, n, b = self.model, shape.rows, self.b
            for name, buffer in self.buffers.half.items():
                width = buffer.size // self.buffers.max_rows
                setattr(b, name, buffer[: n * width].reshape(n, width))
            b.q_heads = b.q.reshape(n, m.n_head, m.head_dim)
            b.rows = b.x[: n * m.d_model].reshape(n, m.d_model)
            b.lse = self.buffers.lse[: m.n_head * n].reshape(m.n_head, n)
        super().cut(shape)

    def qkv(self, layer: Layer, cache, batch: Batch) -> None:
        """q = queries of norm(x); keys and values go to the rows' places."""
        m, n, b, linear = self.model, self.rows, self.b, layer.qkv
        self._norm(layer.norm_1)
        sizes = n, linear.n_out, linear.n_in
        gemm_bias[gemm_bias_launch(n, linear.n_out)](b.h, linear.weight, linear.bias, b.qkv, *sizes)
        split_qkv_pages[split_qkv_pages_launch(n, m.n_head, m.n_kv_head, m.head_dim)](
            b.qkv, b.q, *cache.flat[layer.index], batch.slot_mapping, n, m.n_head, m.n_kv_head, m.head_dim,
            cache.block_size,
        )  # fmt: skip

    def attend(self, layer: Layer, cache, batch: Batch) -> None:
        """att = attention of each row over its own sequence up to its own position."""
        m, b = self.model, self.b
        launch = flash_v5_launch(self.shape.n_tiles, m.n_head, m.head_dim, cache.block_size)
        flash_v5_pages(m.head_dim)[launch](
            b.q_heads, *cache.flat[layer.index], batch.block_table, batch.tiles, b.att, b.lse, m.n_kv_head,
            cache.block_size, np.float32(m.head_dim**-0.5),
        )  # fmt: skip

    def residual(self, linear: Linear, inputs, batch: Batch) -> None:
        """x += inputs @ weight + bias."""
        sizes = self.rows, linear.n_out, linear.n_in
        launch = gemm_bias_launch(self.rows, linear.n_out)
        gemm_bias_residual[launch](inputs, linear.weight, linear.bias, self.b.rows, *sizes)

    def up(self, layer: Layer, batch: Batch) -> None:
        """ff = gelu(norm(x) @ weight + bias)."""
        n, b, linear = self.rows, self.b, layer.up
        self._norm(layer.norm_2)
        sizes = n, linear.n_out, linear.n_in
        gemm_bias_gelu[gemm_bias_launch(n, linear.n_out)](b.h, linear.weight, linear.bias, b.ff, *sizes)

    def _norm(self, norm: Norm) -> None:
        n, d = self.rows, self.model.d_model
        launch, eps = layernorm_launch(n, d), np.float32(norm.eps)
        layernorm_row[launch](self.b.rows, norm.weight, norm.bias, self.b.h, d, eps)
