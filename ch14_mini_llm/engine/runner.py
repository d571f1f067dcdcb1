"""Runs plans on the device: from the scheduler's words to arrays, launches, and the tokens they make."""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.cache.pages import PagedCache
from ch14_mini_llm.engine.plan import Plan
from ch14_mini_llm.forward.batch import Batch
from ch14_mini_llm.forward.forward import forward
from ch14_mini_llm.forward.plain import Plain
from ch14_mini_llm.model.roles import Model
from chapters.ch07_warp_reduce.argmax import argmax_launch, argmax_row
from chapters.ch13_llm_ops.sampling import sample


class ModelRunner:
    """A model, its pages, and the buffers of a step. max_blocks: of a sequence."""

    def __init__(self, model: Model, cache: PagedCache, max_batch: int, max_rows: int, max_blocks: int) -> None:
        self.model, self.cache = model, cache
        self.batch = Batch(max_rows, max_batch, max_blocks)
        self.ops = Plain(model, max_rows, max_batch)
        self._chosen = cuda.device_array(max_batch, np.int32)
        self._shares = None  # of tokens in a draw; only sampling needs them

    def launch(self, plan: Plan) -> Ticket:
        """Launch a step; returns at once on a GPU."""
        self.batch.fill(plan, self.cache.block_size)
        self.ops.cut(self.batch.rows, self.batch.n_logits)
        forward(self.model, self.batch, self.cache, self.ops)
        self._choose([part for part in plan.parts if part.samples])
        return Ticket(plan, self._chosen, self.batch.n_logits)

    def _choose(self, parts) -> None:
        """The most likely token of each row of logits; where a request draws, chapter 13's ``sample`` in its place."""
        if not parts:
            return
        n, vocab_size, logits = len(parts), self.model.vocab_size, self.ops.logits_of_rows
        argmax_row[argmax_launch(n, vocab_size)](logits, self._chosen[:n], vocab_size)
        for i, part in enumerate(parts):
            s = part.sequence.sampling
            if s is None:
                continue
            if self._shares is None:
                self._shares = cuda.device_array(vocab_size, np.int64)
            made = part.start + part.count - part.sequence.n_prompt  # the number of the new token
            chosen = self._chosen[i : i + 1]
            sample(logits[i], self._shares, chosen, vocab_size, s.temperature, s.top_k, s.top_p, s.seed, made)


class Ticket:
    """A step under way."""

    def __init__(self, plan: Plan, chosen, n: int) -> None:
        self.plan, self._chosen, self._n = plan, chosen, n

    def tokens(self) -> list[int]:
        """Wait for the step; its new tokens, in the order of the parts that sample."""
        return self._chosen[: self._n].copy_to_host().tolist() if self._n else []
