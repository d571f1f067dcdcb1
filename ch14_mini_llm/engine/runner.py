"""Runs plans on the device: from the scheduler's words to arrays, launches, and the tokens they make."""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.cache.pages import PagedCache
from ch14_mini_llm.engine.logprobs import PromptScores
from ch14_mini_llm.engine.plan import Plan, Scores
from ch14_mini_llm.engine.sampler import RowSampler
from ch14_mini_llm.forward.batch import Batch
from ch14_mini_llm.forward.forward import forward
from ch14_mini_llm.forward.plain import Plain
from ch14_mini_llm.model.roles import Model


class ModelRunner:
    """A model, its pages, and the buffers of a step. max_blocks: of a sequence."""

    def __init__(self, model: Model, cache: PagedCache, max_batch: int, max_rows: int, max_blocks: int) -> None:
        self.model, self.cache = model, cache
        self.batch = Batch(max_rows, max_batch, max_blocks)
        self.ops = Plain(model, max_rows, max_batch)
        self._chosen = cuda.device_array(max_batch, np.int32)
        self.sampler = RowSampler(max_batch, model.vocab_size)
        self.prompt_scores = PromptScores(max_rows, model.vocab_size)

    def launch(self, plan: Plan) -> Ticket:
        """Launch a step; returns at once on a GPU."""
        self.batch.fill(plan, self.cache.block_size)
        self.ops.cut(self.batch.rows, self.batch.n_logits)
        forward(self.model, self.batch, self.cache, self.ops)
        parts = [part for part in plan.parts if part.samples]
        self._choose(parts)
        new = self.sampler.logprobs(self.ops.logits_of_rows, self._chosen, parts)
        return Ticket(plan, self._chosen, self.batch.n_logits, new, self.prompt_scores.launch(plan, self.ops))

    def _choose(self, parts) -> None:
        """A new token for each row of logits."""
        self.sampler.set(parts)
        if parts:
            self.sampler.choose(self.ops.logits_of_rows, self._chosen, len(parts))


class Ticket:
    """A step under way. new, prompt: log-probabilities that were launched with it, or None."""

    def __init__(self, plan: Plan, chosen, n: int, new=None, prompt=None) -> None:
        self.plan, self._chosen, self._n, self._new, self._prompt = plan, chosen, n, new, prompt

    def tokens(self) -> list[int]:
        """Wait for the step; its new tokens, in the order of the parts that sample."""
        return self._chosen[: self._n].copy_to_host().tolist() if self._n else []

    def scores(self) -> Scores | None:
        """Wait for the step; its log-probabilities, None if no part asks for some."""
        if self._new is None and self._prompt is None:
            return None
        new = self._new.read() if self._new is not None else [None] * self._n
        return Scores(new, self._prompt.read() if self._prompt is not None else {})
