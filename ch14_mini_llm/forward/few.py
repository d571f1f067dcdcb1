"""The verbs for few rows, five launches a layer, or six in a wide model: every product is a GEMV on tensor cores, eight
rows at a time.

A row's bits depend on its own sequence alone, whatever rows are beside it: so `Few` is also what runs any number of
rows where an engine has to be deterministic.
"""

from __future__ import annotations

from types import SimpleNamespace

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np

from ch14_mini_llm.forward.batch import Batch
from ch14_mini_llm.forward.half import Half
from ch14_mini_llm.model.roles import Layer, Linear
from chapters.ch09_gemm.gemv_tensor import WIDE, gemv_residual_launch, gemv_tensor_launch, residual_product
from chapters.ch12_flash.decode_half import lse_stride_of
from chapters.ch12_flash.paged_half import combine_parts, combine_parts_launch, paged_parts_launch, paged_v4_parts
from chapters.ch13_llm_ops.fused import gemv_ln_gelu, gemv_ln_qkv, gemv_parts_residual
from chapters.ch13_llm_ops.fused_llama import gemv_rms_qkv_rope, gemv_rms_swiglu


class Few(Half):
    """`Half` for a few rows, of any sequences."""

    def _cut(self, n: int) -> SimpleNamespace:
        """Flat, as they are; attention stays in parts until it is multiplied."""
        b, half = super()._cut(n), self.buffers.half
        b.q, b.ff, b.att = half["q"], half["ff"], self.buffers.parts
        return b

    def qkv(self, layer: Layer, cache, batch: Batch) -> None:
        """q = queries of norm(x); keys and values go to the rows' places."""
        m, linear, b = self.model, layer.qkv, self.b
        launch, eps = gemv_tensor_launch(linear.n_out, linear.n_in, self.rows), np.float32(layer.norm_1.eps)
        places = b.q, *cache.layers[layer.index], batch.slot_mapping
        sizes = self.rows, m.d_model, m.n_head, m.n_kv_head, m.head_dim, cache.block_size, eps
        if m.rotary is None:
            gemv_ln_qkv[launch](b.x, linear.weight, linear.row_sums, linear.bias, *places, *sizes)
        else:
            gemv_rms_qkv_rope[launch](b.x, linear.weight, *places, batch.positions, *m.rotary, *sizes)

    def attend(self, layer: Layer, cache, batch: Batch) -> None:
        """Attention of each row over its own sequence, in parts."""
        m, b = self.model, self.b
        launch = paged_parts_launch(self.rows, self.shape.n_tokens, m.n_head, m.head_dim, cache.block_size)
        paged_v4_parts[launch](
            b.q, *cache.flat[layer.index], batch.block_table, batch.row_seq, batch.positions, *b.att, m.n_kv_head,
            m.head_dim, cache.block_size, np.float32(m.head_dim**-0.5), int(self.shape.single),
        )  # fmt: skip
        self._n_chunks = launch[0][0]

    def residual(self, linear: Linear, inputs, batch: Batch) -> None:
        """x += inputs @ weight + bias."""
        m, b, n = self.model, self.b, self.rows
        if inputs is b.att:
            chunks = self._n_chunks, lse_stride_of(self._n_chunks)
            if linear.n_out < WIDE:
                launch, sizes = gemv_residual_launch(linear.n_out, linear.n_in, n), (n, m.d_model, m.n_head, m.head_dim)
                gemv_parts_residual[launch](*inputs, linear.weight, linear.bias, b.x, batch.positions, *sizes, *chunks)
                return
            parts, inputs = inputs, self.buffers.half["att"]
            sizes = m.n_head, m.head_dim, *chunks
            combine_parts[combine_parts_launch(n, m.n_head, m.head_dim)](*parts, batch.positions, inputs, *sizes)
        kernel, launch = residual_product(linear.n_out, linear.n_in, n)
        kernel[launch](inputs, linear.weight, linear.bias, b.x, n, linear.n_out, linear.n_in)

    def up(self, layer: Layer, batch: Batch) -> None:
        """ff = gelu(norm(x) @ weight + bias), or silu(gate) · value of the two halves of the product."""
        linear, b = layer.up, self.b
        launch = gemv_tensor_launch(linear.n_out, linear.n_in, self.rows)
        sizes = self.rows, self.model.d_ff, linear.n_in, np.float32(layer.norm_2.eps)
        if self.model.gated:
            gemv_rms_swiglu[launch](b.x, linear.weight, b.ff, *sizes)
        else:
            gemv_ln_gelu[launch](b.x, linear.weight, linear.row_sums, linear.bias, b.ff, *sizes)
