"""Runs a plan on the device: what the engine, which touches no array itself, asks for its steps.

A step is launched and not waited for; its tokens are read later, by way of its `Ticket`. On the level ``fast`` the
launches of a step of some shape (`forward.shapes`) are recorded the second time that it occurs, as a CUDA graph, and
replayed from then on.
"""

from __future__ import annotations

import common  # picks the backend, so before numba.cuda

# isort: split
from numba import cuda

from ch14_mini_llm.cache.pages import PagedCache
from ch14_mini_llm.engine.plan import Plan
from ch14_mini_llm.engine.sizes import LEVELS, Sizes
from ch14_mini_llm.forward.batch import PLACES, Batch, Ticket
from ch14_mini_llm.forward.few import Few
from ch14_mini_llm.forward.forward import forward
from ch14_mini_llm.forward.half import Buffers
from ch14_mini_llm.forward.logprobs import PromptScores
from ch14_mini_llm.forward.many import Many
from ch14_mini_llm.forward.plain import Plain
from ch14_mini_llm.forward.sampler import LIKELIEST, RowSampler
from ch14_mini_llm.forward.shapes import FEW_ROWS, Shape, Shapes
from ch14_mini_llm.model.roles import Model
from common.graph import Graph


class ModelRunner:
    """A model, its pages, and the buffers of a step.

    level: "kv" or "fast". deterministic: on the level ``fast``, `Few` runs all rows, so that a row's bits are the same
    in steps and in prompts.
    """

    def __init__(self, model: Model, sizes: Sizes, level: str = "kv", deterministic: bool = False) -> None:
        max_batch, max_rows = sizes.max_batch, sizes.max_rows
        max_few = max_rows if deterministic else min(FEW_ROWS, max_rows)
        max_tokens = sizes.max_blocks * sizes.block_size
        self.model = model
        self.batch = Batch(max_rows, max_batch, sizes.max_blocks, sizes.block_size, model.head_dim)
        max_tiles, head_dim = self.batch.max_tiles, model.head_dim
        self.shapes = Shapes(level, max_batch, max_rows, max_few, max_tiles, max_tokens, head_dim)
        if level == "fast":
            buffers = Buffers(model, max_rows, max_few, max_batch, max_tokens)
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
        new = None
        if plan.scored:
            new = self.sampler.logprobs(self.ops[shape.ops].logits, self.batch.chosen, plan.sampling)
        place, count = self.batch.launched(plan)
        self._events[place].record(self.batch.stream if replayed and new is None else 0)
        return Ticket(plan, self.batch, place, count, self._events[place], new, scored)

    def prepare(self, plan: Plan) -> Shape:
        """Bring what the host knows of a plan's rows to the device."""
        if not (plan.same_as_last and self.sampler.move_on()):
            self.sampler.set(plan.sampling)
        shape = self.shapes.of(plan, self.sampler.draws)
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
        small = shape.single or shape.rows <= FEW_ROWS  # `Plain` has as many shapes as steps have
        kept = shape.ops != "plain" or small and common.BACKEND == "cpu"
        if not record or not kept or shape not in self._graphs:
            self._launches(shape)
            if kept:
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
