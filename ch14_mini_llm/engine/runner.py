"""Runs a plan on the device: the only part of the engine that touches arrays, besides the forward.

A step is launched and not waited for; its tokens are read later, by way of its `Ticket`. On the level ``fast`` the
launches of a step of some size are recorded the second time that it occurs, as a CUDA graph, and replayed from then on:
the sizes are buckets, with padding up to the next (1, 2, 4, 8 … sequences; 64, 128, 192, 256, 384 … rows of prompts), so
that few graphs serve all batches.
"""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
from numba import cuda

from ch14_mini_llm.cache.pages import PagedCache
from ch14_mini_llm.engine.plan import Plan, Scores
from ch14_mini_llm.engine.sizes import LEVELS, Sizes
from ch14_mini_llm.forward.batch import PLACES, Batch, Shape
from ch14_mini_llm.forward.few import Few
from ch14_mini_llm.forward.forward import forward
from ch14_mini_llm.forward.half import Buffers
from ch14_mini_llm.forward.logprobs import PromptScores
from ch14_mini_llm.forward.many import Many
from ch14_mini_llm.forward.plain import Plain
from ch14_mini_llm.forward.sampler import LIKELIEST, RowSampler
from ch14_mini_llm.model.roles import Model
from chapters.ch12_flash.paged_steps import segment_tokens
from chapters.ch12_flash.tensor_core import queries_of
from common.graph import Graph

FEW_ROWS = 8  # of a group, whose weights `Few` reads once
GROUP, TILE = 8, 64  # rows that a mixed step is padded to some number of


class ModelRunner:
    """A model, its pages, and the buffers of a step.

    level: "kv" or "fast". deterministic: on the level ``fast``, `Few` runs all rows, so that a row's bits are the same
    in steps and in prompts.
    """

    def __init__(self, model: Model, sizes: Sizes, level: str = "kv", deterministic: bool = False) -> None:
        max_batch, max_rows = sizes.max_batch, sizes.max_rows
        self.model, self.max_batch, self.max_rows = model, max_batch, max_rows
        self.max_tokens = sizes.max_blocks * sizes.block_size
        self.batch = Batch(max_rows, max_batch, sizes.max_blocks, sizes.block_size, model.head_dim)
        self.max_few = 0
        if level == "fast":
            self.max_few = max_rows if deterministic else min(FEW_ROWS, max_rows)
            buffers = Buffers(model, max_rows, self.max_few, max_batch, self.max_tokens)
            self.ops = {"few": Few(model, buffers), "many": Many(model, buffers)}
        else:
            self.ops = {"plain": Plain(model, max_rows, max_batch)}
        self.cache = PagedCache(model, sizes.num_blocks, sizes.block_size, LEVELS[level])
        self._graphs: dict[Shape, Graph | None] = {}  # None: launched once
        self._events = [cuda.event(timing=False) for _ in range(PLACES)]
        self.sampler = RowSampler(max_batch, model.vocab_size)
        self.prompt_scores = PromptScores(max_rows, model.vocab_size)

    def launch(self, plan: Plan) -> Ticket:
        """Launch a step; returns at once on a GPU."""
        shape = self.prepare(plan)
        prompts = self.prompt_scores.wanted(plan)
        scored, replayed = None, False
        if prompts:
            scored = self._launches(shape, prompts)
        else:
            replayed = self.run(shape)
        new = self.sampler.logprobs(self.ops[shape.ops].logits, self.batch.chosen, plan.sampling)
        place, count = self.batch.launched(plan)
        self._events[place].record(self.batch.stream if replayed and new is None else 0)
        return Ticket(plan, self.batch, place, count, self._events[place], new, scored)

    def prepare(self, plan: Plan) -> Shape:
        """Bring what the host knows of a plan's rows to the device."""
        self.sampler.set(plan.sampling)
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

    def run(self, shape: Shape, record: bool = True) -> bool:
        """Launch a step, or replay it; returns whether it was a replay."""
        if not record or shape.ops == "plain" or shape not in self._graphs:
            self._launches(shape)
            self._graphs.setdefault(shape, None)
            return False
        if self._graphs[shape] is None:
            self._graphs[shape] = Graph(lambda: self._launches(shape), warm=True, stream=self.batch.stream)
        self._graphs[shape].replay()
        return True

    def _launches(self, shape: Shape, prompts: tuple | None = None):
        """A step's launches. Where each sequence has a row, the embeddings are there: the step before ends with them.

        prompts: of `PromptScores.wanted`; their log-probabilities are taken before the choice, which the rows do not
        survive, and returned.
        """
        ops = self.ops[shape.ops]
        ops.cut(shape)
        if not shape.single:
            ops.embed(self.model.embedding, self.batch)
        forward(self.model, self.batch, self.cache, ops)
        scored = self.prompt_scores.launch(prompts, ops) if prompts else None
        if shape.n_logits and shape.draws == LIKELIEST and not prompts:
            ops.pick(self.model, self.batch)
        elif shape.n_logits:
            best = None if prompts else ops.best  # a prompt's scores have overwritten it
            self.sampler.choose(ops.logits, self.batch.chosen, ops.n_logits, best)
            ops.append(self.model, self.batch)
        return scored

    def _shape(self, plan: Plan) -> Shape:
        rows, n_logits, draws = plan.rows, len(plan.sampling), self.sampler.draws
        single = n_logits == rows
        if "plain" in self.ops:
            return Shape("plain", rows, n_logits, single=single, draws=draws)
        few = rows <= self.max_few
        if single:
            rows = n_logits = self._bucket(rows)
        else:
            step, most = (GROUP, self.max_few) if few else (TILE, self.max_rows)
            rows, n_logits = min(rounded(-(-rows // step)) * step, most), self._bucket(n_logits, coarse=not few)
        if few:
            return Shape("few", rows, n_logits, single=single, draws=draws)
        n_prompts, n_tiles, n_tokens = len(plan.parts) - plan.n_steps, 0, 0
        n_steps = self._bucket(plan.n_steps, coarse=not single)
        if plan.n_steps:
            n_tokens = self._context(max(part.start for part in plan.parts[: plan.n_steps]) + 1)
        if n_prompts:
            n_prompts = self._bucket(n_prompts, coarse=True)
            n_tiles = min(rows // queries_of(self.model.head_dim) + n_prompts, self.batch.max_tiles)
        return Shape("many", rows, n_logits, n_tiles, min(n_steps, rows), n_tokens, single, draws)

    def _context(self, longest: int) -> int:
        """Tokens of the longest text that a step has room for: a segment, two, four …"""
        segment = segment_tokens(self.model.head_dim)
        return min(segment << (-(-longest // segment) - 1).bit_length(), self.max_tokens)

    def _bucket(self, n: int, coarse: bool = False) -> int:
        """The next power of two, but no more than there can be. coarse: of 8, 32, 128 …; a mixed step has three such
        numbers, and each trio is a graph."""
        bits = (n - 1).bit_length()
        return min(1 << (max(3, bits + 1 - bits % 2) if coarse else bits), self.max_batch) if n else 0


def rounded(n: int) -> int:
    """The next power of two, or three quarters of it: 1, 2, 3, 4, 6, 8, 12 …"""
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


class Ticket:
    """A step under way. new, prompts: log-probabilities that were launched with it, or None."""

    def __init__(self, plan: Plan, batch: Batch, place: int, count: int, event, new=None, prompts=None) -> None:
        self.plan, self._batch, self._place, self._count, self._event = plan, batch, place, count, event
        self._new, self._prompts = new, prompts

    def tokens(self) -> list[int]:
        """Wait for the step; its new tokens, in the order of the parts that sample."""
        self._event.synchronize()
        return self._batch.read(self._place, self._count)

    def scores(self) -> Scores | None:
        """Wait for the step; its log-probabilities, None if no part asks for some."""
        if self._new is None and self._prompts is None:
            return None
        new = self._new.read() if self._new is not None else [None] * self._count
        return Scores(new, self._prompts.read() if self._prompts is not None else {})
