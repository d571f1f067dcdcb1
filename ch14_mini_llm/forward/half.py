"""What `Few` and `Many` share: float16 between the kernels, the residual stream in float32, and the ends of a step."""

from __future__ import annotations

from types import SimpleNamespace

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.forward.batch import Batch, last_embedding
from ch14_mini_llm.forward.shapes import Shape
from ch14_mini_llm.model.roles import Model
from chapters.ch03_indexing.kernels import blocks_2d
from chapters.ch09_gemm.gemv_tensor import gemv_tensor_launch
from chapters.ch09_gemm.skinny import parts_of
from chapters.ch12_flash.paged_half import paged_parts_workspace, segment_keys
from chapters.ch12_flash.paged_steps import segments_workspace
from chapters.ch13_llm_ops.batch import embed_rows, embed_tokens
from chapters.ch13_llm_ops.fused import append_rows, append_rows_launch, gemv_ln_logits, pick_best, pick_best_launch
from chapters.ch13_llm_ops.fused_llama import gemv_rms_logits

PROMPT_ROWS = 16  # of a prompt, whose logits may be asked for at a time


class Buffers:
    """Room for ``max_rows`` rows, of which ``max_few`` at a time go through `Few`, and ``max_logits`` rows of logits.

    logits: (max_logits, vocab_size) float32, those of the last step in front. max_tokens: of a sequence. parts: of
    `Few`'s attention. segments, att_segments, sums: of `Many`'s attention of steps and of prompts, and of its products
    that end in the residual stream.
    """

    def __init__(self, model: Model, max_rows: int, max_few: int, max_logits: int, max_tokens: int) -> None:
        m, q_width = model, model.n_head * model.head_dim
        self.max_rows, self.max_few, self.max_tokens = max_rows, max_few, max_tokens
        self.x = cuda.device_array(max_rows * m.d_model, np.float32)
        widths = {"h": m.d_model, "q": q_width, "att": q_width, "ff": m.d_ff}
        zeros = lambda n: cuda.to_device(np.zeros(n, np.float16))  # padding's rows are multiplied, if read by no one
        self.half = {name: zeros(max_rows * n) for name, n in widths.items()}
        self.segment = segment_keys(max_tokens)
        self.n_segments = n_segments = -(-max_tokens // self.segment)
        self.lse = cuda.device_array(n_segments * m.n_head * max_rows, np.float32)
        self.att_segments = cuda.device_array(n_segments * max_rows * q_width, np.float16)
        parts, lse = paged_parts_workspace(max_few, max_tokens, m.n_head, m.head_dim)
        self.parts = cuda.device_array(parts, np.float16), cuda.to_device(np.zeros(lse, np.float32))
        n_pairs, n_sums, n_arrived = segments_workspace(max_logits, max_tokens, m.n_head, m.head_dim)
        self.segments = (
            cuda.device_array(n_pairs, np.float32), cuda.device_array(n_sums, np.float32),
            cuda.to_device(np.zeros(n_arrived, np.int32)),
        )  # fmt: skip
        sums = max(rows * parts_of(m.d_model, K, rows) for rows in range(1, max_rows + 1) for K in (q_width, m.d_ff))
        self.sums = cuda.device_array(sums * m.d_model, np.float32)
        self.logits = cuda.device_array((max_logits, m.vocab_size), np.float32)
        (blocks, _), _ = gemv_tensor_launch(m.vocab_size, m.d_model)
        shape = max(max_logits, PROMPT_ROWS), blocks + 2  # tiles of 32 columns leave two each
        self.best = cuda.device_array(shape, np.float32), cuda.device_array(shape, np.int32)


class Half:
    """The verbs that do not depend on the number of rows. ``b``: the buffers as `cut` has cut them to a step's rows."""

    def __init__(self, model: Model, buffers: Buffers) -> None:
        self.model, self.buffers = model, buffers
        self._cuts: dict[int, SimpleNamespace] = {}  # by rows: to cut an array takes numba-cuda 50 µs
        self.logits, self.rows, self.n_logits, self.n_best = buffers.logits, 0, 0, 0
        self._ends_with = *last_embedding(model), buffers.x

    def cut(self, shape: Shape) -> None:
        """Cut the buffers to a step's rows."""
        self.rows, self.n_logits, self.shape = shape.rows, shape.n_logits, shape
        if shape.rows not in self._cuts:
            self._cuts[shape.rows] = self._cut(shape.rows)
        self.b = self._cuts[shape.rows]

    def _cut(self, n: int) -> SimpleNamespace:
        """The buffers that the verbs read and write, for ``n`` rows. x: flat; x_rows: (n, d_model)."""
        d = self.model.d_model
        return SimpleNamespace(x=self.buffers.x, x_rows=self.buffers.x[: n * d].reshape(n, d))

    def embed(self, embedding: tuple, batch: Batch) -> None:
        """x = token embedding + position embedding, if there is one."""
        n, d, (wte, wpe) = self.rows, self.model.d_model, embedding
        tokens, x = (batch.tokens, batch.source, batch.chosen), self.b.x_rows
        if wpe is None:
            embed_tokens[blocks_2d(n, d)](*tokens, wte, x, n, d)
        else:
            embed_rows[blocks_2d(n, d)](*tokens, batch.positions, wte, wpe, x, n, d)

    def head(self, model: Model, batch: Batch) -> None:
        """logits[i] = head @ norm(x) of row ``batch.logits_rows[i]``."""
        if self.n_logits:
            self.logits_at(batch.logits_rows, self.n_logits, self.logits)

    def logits_at(self, rows, n: int, out) -> None:
        """out[i] = head @ norm(x) of row rows[i], for i < n, after the layers. rows: int32, on the device. What `pick`
        reads is of these rows afterwards."""
        m, head = self.model, self.model.head
        launch = gemv_tensor_launch(head.n_out, head.n_in, n)
        self.n_best = launch[0][0]
        sizes = n, head.n_out, head.n_in, np.float32(m.norm.eps)
        if m.norm.bias is None:
            gemv_rms_logits[launch](self.b.x, rows, head.weight, out, *self.buffers.best, *sizes)
        else:
            folded = head.weight, head.row_sums, head.bias
            gemv_ln_logits[launch](self.b.x, rows, *folded, out, *self.buffers.best, *sizes)

    def pick(self, model: Model, batch: Batch) -> None:
        """The likeliest token of each row of logits, and the rows that have one are a token longer."""
        pick_best[pick_best_launch(self.n_logits)](*self.best, model.vocab_size, *batch.ends, *self._ends_with)

    @property
    def best(self) -> tuple:
        """The largest logit of each part of a row, its token, and how many parts there are."""
        return *self.buffers.best, self.n_best

    def append(self, model: Model, batch: Batch) -> None:
        """The chosen tokens become the rows' newest."""
        append_rows[append_rows_launch(self.n_logits)](*batch.ends, *self._ends_with)
