"""The verbs for few rows, five launches a layer: every product is a GEMV on tensor cores, eight rows at a time.

A row's bits depend on its own sequence alone, whatever rows are beside it: so `Few` is also what runs any number of
rows where an engine has to be deterministic.
"""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np

from ch14_mini_llm.forward.batch import Batch
from ch14_mini_llm.forward.half import Buffers, Half
from ch14_mini_llm.model.roles import Layer, Linear, Model
from chapters.ch09_gemm.gemv_tensor import gemv_bias_residual, gemv_residual_launch, gemv_tensor_launch
from chapters.ch12_flash.decode_half import lse_stride_of
from chapters.ch12_flash.paged_half import paged_parts_launch, paged_v4_parts
from chapters.ch13_llm_ops.fused import gemv_ln_gelu, gemv_ln_qkv, gemv_parts_residual


class Few(Half):
    """`Half` for a few rows, of any sequences."""

    def __init__(self, model: Model, buffers: Buffers) -> None:
        super().__init__(model, buffers)
        b, half = self.b, buffers.half
        b.q, b.ff, b.att = half["q"], half["ff"], buffers.parts  # attention stays in parts until it is multiplied

    def qkv(self, layer: Layer, cache, batch: Batch) -> None:
        """q = queries of norm(x); keys and values go to the rows' places."""
        m, linear, b = self.model, layer.qkv, self.b
        gemv_ln_qkv[gemv_tensor_launch(linear.n_out, linear.n_in, self.rows)](
            b.x, linear.weight, linear.row_sums, linear.bias, b.q, *cache.layers[layer.index], batch.slot_mapping,
            self.rows, m.d_model, m.n_head, m.n_kv_head, m.head_dim, cache.block_size, np.float32(layer.norm_1.eps),
        )  # fmt: skip

    def attend(self, layer: Layer, cache, batch: Batch) -> None:
        """Attention of each row over its own sequence, in parts."""
        m, b = self.model, self.b
        launch = paged_parts_launch(self.rows, self.buffers.max_tokens, m.n_head, m.head_dim, cache.block_size)
        paged_v4_parts[launch](
            b.q, *cache.flat[layer.index], batch.block_table, batch.row_seq, batch.positions, *b.att, m.n_kv_head,
            m.head_dim, cache.block_size, np.float32(m.head_dim**-0.5), int(self.shape.single),
        )  # fmt: skip
        self._n_chunks = launch[0][0]

    def residual(self, linear: Linear, inputs, batch: Batch) -> None:
        """x += inputs @ weight + bias."""
        m, launch = self.model, gemv_residual_launch(linear.n_out, linear.n_in, self.rows)
        if inputs is self.b.att:
            sizes = self.rows, linear.n_out, m.n_head, m.head_dim, self._n_chunks, lse_stride_of(self._n_chunks)
            gemv_parts_residual[launch](*inputs, linear.weight, linear.bias, self.b.x, batch.positions, *sizes)
        else:
            sizes = self.rows, linear.n_out, linear.n_in
            gemv_bias_residual[launch](inputs, linear.weight, linear.bias, self.b.x, *sizes)

    def up(self, layer: Layer, batch: Batch) -> None:
        """ff = gelu(norm(x) @ weight + bias)."""
        linear, b = layer.up, self.b
        gemv_ln_gelu[gemv_tensor_launch(linear.n_out, linear.n_in, self.rows)](
            b.x, linear.weight, linear.row_sums, linear.bias, b.ff, self.rows, linear.n_out, linear.n_in,
            np.float32(layer.norm_2.eps),
        )  # fmt: skip
