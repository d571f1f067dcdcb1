"""Runs a plan on the device: the only part of the engine that touches arrays, besides the forward.

A step is launched and not waited for; its tokens are read later, by way of its `Ticket`. On the level ``fast`` the
launches of a step of some size are recorded the second time that it occurs, as a CUDA graph, and replayed from then on:
the sizes are buckets, with padding up to the next (1, 2, 4, 8 … sequences; 64, 128 … rows of prompts), so that few
graphs serve all batches.
"""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.cache.pages import PagedCache
from ch14_mini_llm.engine.plan import Plan
from ch14_mini_llm.engine.sizes import LEVELS, Sizes
from ch14_mini_llm.forward.batch import PLACES, Batch, Shape
from ch14_mini_llm.forward.few import Few
from ch14_mini_llm.forward.forward import forward
from ch14_mini_llm.forward.half import Buffers
from ch14_mini_llm.forward.many import Many
from ch14_mini_llm.forward.plain import Plain
from ch14_mini_llm.model.roles import Model
from chapters.ch07_warp_reduce.argmax import argmax_launch, argmax_row
from chapters.ch12_flash.paged_half import QUERIES_64, QUERIES_128
from chapters.ch13_llm_ops.sampling import sample
from common.graph import Graph

FEW_ROWS = 64  # up to so many rows, products read their weights again for each eight; above, tiles are faster
GROUP, TILE = 8, 64  # rows that a mixed step is padded to a multiple of


class ModelRunner:
    """A model, its pages, and the buffers of a step.

    level: "kv" or "fast". deterministic: on the level ``fast``, `Few` runs all rows, so that a row's bits are the same
    in steps and in prompts.
    """

    def __init__(self, model: Model, sizes: Sizes, level: str = "kv", deterministic: bool = False) -> None:
        max_batch, max_rows = sizes.max_batch, sizes.max_rows
        self.model, self.max_batch, self.max_rows = model, max_batch, max_rows
        self.batch = Batch(max_rows, max_batch, sizes.max_blocks, sizes.block_size, model.head_dim)
        self.max_few = 0
        if level == "fast":
            self.max_few = max_rows if deterministic else min(FEW_ROWS, max_rows)
            buffers = Buffers(model, max_rows, self.max_few, max_batch, sizes.max_blocks * sizes.block_size)
            self.ops = {"few": Few(model, buffers), "many": Many(model, buffers)}
        else:
            self.ops = {"plain": Plain(model, max_rows, max_batch)}
        self.cache = PagedCache(model, sizes.num_blocks, sizes.block_size, LEVELS[level])
        self._graphs: dict[Shape, Graph | None] = {}  # None: launched once
        self._events = [cuda.event(timing=False) for _ in range(PLACES)]
        self._shares = None  # of tokens in a draw; only sampling needs them

    def launch(self, plan: Plan) -> Ticket:
        """Launch a step; returns at once on a GPU."""
        shape = self.prepare(plan)
        replayed = self.run(plan, shape)
        place, count = self.batch.launched(plan)
        self._events[place].record(self.batch.stream if replayed else 0)
        return Ticket(plan, self.batch, place, count, self._events[place])

    def prepare(self, plan: Plan) -> Shape:
        """Bring what the host knows of a plan's rows to the device."""
        shape = self._shape(plan)
        if plan.same_as_last:
            self.batch.follow(plan)
        else:
            ops = self.ops[shape.ops]
            self.batch.fill(plan, shape)
            if shape.single:  # as after such a step, see `run`
                ops.cut(shape)
                ops.embed(self.model.embedding, self.batch)
        return shape

    def run(self, plan: Plan, shape: Shape, record: bool = True) -> bool:
        """Launch a step, or replay it; returns whether it was a replay.

        Where each sequence has a row, the embeddings are there: the step before ends with them.
        """

        def launches():
            ops = self.ops[shape.ops]
            ops.cut(shape)
            if not shape.single:
                ops.embed(self.model.embedding, self.batch)
            forward(self.model, self.batch, self.cache, ops)
            if shape.n_logits and not shape.draws:
                ops.pick(self.model, self.batch)

        replay = record and shape.ops != "plain" and shape in self._graphs
        if replay:
            if self._graphs[shape] is None:
                self._graphs[shape] = Graph(launches, warm=True, stream=self.batch.stream)
            self._graphs[shape].replay()
        else:
            launches()
            self._graphs.setdefault(shape, None)
        if shape.draws:
            self._draw(plan, self.ops[shape.ops])
        return replay and not shape.draws

    def _shape(self, plan: Plan) -> Shape:
        samples = [part.sequence.sampling for part in plan.parts if part.samples]
        rows, n_logits, draws = plan.rows, len(samples), any(one is not None for one in samples)
        single = n_logits == rows
        if "plain" in self.ops:
            return Shape("plain", rows, n_logits, single=single, draws=draws)
        few = rows <= self.max_few
        if single:
            rows = n_logits = self._bucket(rows)
        else:
            step, most = (GROUP, self.max_few) if few else (TILE, self.max_rows)
            rows, n_logits = min(-(-rows // step) * step, most), self._bucket(n_logits)
        if few:
            return Shape("few", rows, n_logits, single=single, draws=draws)
        queries = QUERIES_64 if self.model.head_dim <= 64 else QUERIES_128
        n_tiles = min(rows // queries + self._bucket(len(plan.parts)), self.batch.max_tiles)
        return Shape("many", rows, n_logits, n_tiles, single, draws)

    def _bucket(self, n: int) -> int:
        """The next power of two, but no more than there can be."""
        return min(1 << (n - 1).bit_length(), self.max_batch) if n else 0

    def _draw(self, plan: Plan, ops) -> None:
        """The likeliest token of each row of logits; where a request draws, chapter 13's ``sample`` in its place."""
        parts = [part for part in plan.parts if part.samples]
        n, vocab_size, chosen = len(parts), self.model.vocab_size, self.batch.chosen
        argmax_row[argmax_launch(n, vocab_size)](ops.logits, chosen, vocab_size)
        for i, part in enumerate(parts):
            s = part.sequence.sampling
            if s is None:
                continue
            if self._shares is None:
                self._shares = cuda.device_array(vocab_size, np.int64)
            number = part.start + part.count - part.sequence.n_prompt  # of the new token
            settings = s.temperature, s.top_k, s.top_p, s.seed, number
            sample(ops.logits[i], self._shares, chosen[i : i + 1], vocab_size, *settings)
        ops.append(self.model, self.batch)


class Ticket:
    """A step under way."""

    def __init__(self, plan: Plan, batch: Batch, place: int, count: int, event) -> None:
        self.plan, self._batch, self._place, self._count, self._event = plan, batch, place, count, event

    def tokens(self) -> list[int]:
        """Wait for the step; its new tokens, in the order of the parts that sample."""
        self._event.synchronize()
        return self._batch.read(self._place, self._count)
