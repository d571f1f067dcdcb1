"""The verbs for more than a few rows: prompts, and batches of sequences. Products and prompts' attention in tiles.

Seven launches a layer. A product that ends in the residual stream leaves its sums in parts, and the norm behind it adds
them: so each verb but the first begins by finishing the one before.
"""

from __future__ import annotations

from types import SimpleNamespace

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np

from ch14_mini_llm.forward.batch import Batch
from ch14_mini_llm.forward.half import Buffers, Half
from ch14_mini_llm.forward.shapes import Shape
from ch14_mini_llm.model.roles import Layer, Linear, Model, Norm
from chapters.ch09_gemm.gemv_tensor import ROWS_MAX
from chapters.ch09_gemm.skinny import gemm_parts, parts_of, skinny_launch, tile_of
from chapters.ch12_flash.paged_half import (
    combine_segments,
    combine_segments_launch,
    flash_v5_launch,
    flash_v5_pages,
)
from chapters.ch12_flash.paged_steps import paged_v6_segments, segments_launch
from chapters.ch13_llm_ops.fused_llama import gemm_qkv_rope, gemm_swiglu, parts_rms, parts_rms_of
from chapters.ch13_llm_ops.fused_rows import (
    gemm_gelu,
    gemm_logits,
    gemm_qkv_pages,
    parts_norm,
    parts_norm_launch,
    parts_norm_of,
)

FUSED_SMALL_ROWS = 128  # small tiles pay up to more rows where a norm in front leaves time to ask for weights
LOGITS_SMALL_ROWS = 32  # and up to fewer where there are a thousand blocks anyway


class Many(Half):
    """`Half` for many rows, of any sequences: those that decode in front, the parts of prompts behind them."""

    def __init__(self, model: Model, buffers: Buffers) -> None:
        super().__init__(model, buffers)
        self._parts = self._none = 0, model.layers[0].proj.bias  # that x still lacks: how many, and the bias to them

    def cut(self, shape: Shape) -> None:
        """Cut the buffers to a step's rows."""
        self._parts = self._none  # of a step without logits, the last parts are added to nothing
        super().cut(shape)

    def _cut(self, n: int) -> SimpleNamespace:
        """Matrices. segments: parts of att, by segments of keys; whole: att as the only part."""
        b, m, buffers = super()._cut(n), self.model, self.buffers
        for name, buffer in buffers.half.items():
            width = buffer.size // buffers.max_rows
            setattr(b, name, buffer[: n * width].reshape(n, width))
        parts, width = buffers.n_segments, m.n_head * m.head_dim
        b.q_heads, b.whole = b.q.reshape(n, m.n_head, m.head_dim), b.att.reshape(1, n, width)
        b.segments = buffers.att_segments[: parts * n * width].reshape(parts, n, width)
        b.lse = buffers.lse[: parts * m.n_head * n].reshape(parts, m.n_head, n)
        return b

    def qkv(self, layer: Layer, cache, batch: Batch) -> None:
        """q = queries of norm(x); keys and values go to the rows' places."""
        m, n, b, linear = self.model, self.rows, self.b, layer.qkv
        self._norm(layer.norm_1)
        tile = tile_of(n, FUSED_SMALL_ROWS)
        launch = skinny_launch(n, linear.n_out, tile)
        places = self.buffers.half["q"], *cache.flat[layer.index], batch.slot_mapping
        sizes = n, linear.n_in, m.n_head, m.n_kv_head, m.head_dim, cache.block_size
        if m.rotary is None:
            gemm_qkv_pages(tile)[launch](b.h, linear.weight, linear.bias, *places, *sizes)
        else:
            gemm_qkv_rope(tile)[launch](b.h, linear.weight, *places, batch.positions, *m.rotary, *sizes)

    def attend(self, layer: Layer, cache, batch: Batch) -> None:
        """att = attention of each row over its own sequence up to its own position."""
        m, b, half, shape = self.model, self.b, self.buffers.half, self.shape
        scale = np.float32(m.head_dim**-0.5)
        if shape.n_steps:
            launch = segments_launch(shape.n_steps, shape.n_tokens, m.n_head, m.head_dim, cache.block_size)
            paged_v6_segments[launch](
                half["q"], *cache.flat[layer.index], batch.block_table, batch.row_seq, batch.positions, batch.n_steps,
                half["att"], *self.buffers.segments, m.n_kv_head, m.head_dim, cache.block_size, scale,
            )  # fmt: skip
        if shape.n_tiles:  # afterwards: it writes rows that the other may have taken for steps
            launch = flash_v5_launch(shape.n_tiles, m.n_head, m.head_dim, cache.block_size)
            flash_v5_pages(m.head_dim)[launch](
                b.q_heads, *cache.flat[layer.index], batch.block_table, batch.tiles,
                b.segments if shape.split else b.whole, b.lse, m.n_kv_head, cache.block_size, scale,
            )  # fmt: skip
        if shape.split:
            combine_segments[combine_segments_launch(self.rows, m.n_head, m.head_dim)](
                b.segments, b.lse, batch.positions, batch.n_steps, b.att, m.head_dim, self.buffers.segment
            )

    def residual(self, linear: Linear, inputs, batch: Batch) -> None:
        """x += inputs @ weight + bias, once the next norm has added the parts up."""
        n, N, K = self.rows, linear.n_out, linear.n_in
        tile, n_parts = tile_of(n), parts_of(N, K, n)
        gemm_parts(tile)[skinny_launch(n, N, tile, n_parts)](inputs, linear.weight, self.buffers.sums, n, N, K)
        self._parts = n_parts, linear.bias

    def up(self, layer: Layer, batch: Batch) -> None:
        """ff = gelu(norm(x) @ weight + bias), or silu(gate) · value of the two halves of the product."""
        n, b, linear, ff = self.rows, self.b, layer.up, self.buffers.half["ff"]
        self._norm(layer.norm_2)
        tile = tile_of(n, FUSED_SMALL_ROWS)
        launch, sizes = skinny_launch(n, linear.n_out, tile), (n, self.model.d_ff, linear.n_in)
        if self.model.gated:
            gemm_swiglu(tile)[launch](b.h, linear.weight, ff, *sizes)
        else:
            gemm_gelu(tile)[launch](b.h, linear.weight, linear.bias, ff, *sizes)

    def logits_at(self, rows, n: int, out) -> None:
        """out[i] = head @ norm(x) of row rows[i], for i < n, after the layers. rows: int32, on the device. What `pick`
        reads is of these rows afterwards."""
        m, head = self.model, self.model.head
        if n <= ROWS_MAX:
            self._norm(m.norm)
            super().logits_at(rows, n, out)
            return
        n_parts, bias = self._parts
        h = self.buffers.half["h"]
        kernel = parts_rms_of if m.norm.bias is None else parts_norm_of
        kernel[parts_norm_launch(n, m.d_model)](
            self.b.x, self.buffers.sums, n_parts, bias, rows, h, self.rows, m.d_model, np.float32(m.norm.eps)
        )
        tile = tile_of(n, LOGITS_SMALL_ROWS)
        launch = skinny_launch(n, head.n_out, tile)
        self.n_best = 2 * launch[0][1]
        gemm_logits(tile)[launch](
            h[: n * m.d_model].reshape(n, m.d_model), head.weight, head.bias, out, *self.buffers.best, n, head.n_out,
            head.n_in,
        )  # fmt: skip

    def _norm(self, norm: Norm) -> None:
        """h = norm(x), when x has got the parts that it lacks."""
        n_parts, bias = self._parts
        n, d = self.rows, self.model.d_model
        kernel = parts_rms if norm.bias is None else parts_norm
        kernel[parts_norm_launch(n, d)](
            self.b.x, self.buffers.sums, n_parts, bias, self.buffers.half["h"], n, d, np.float32(norm.eps)
        )
        self._parts = 0, bias
