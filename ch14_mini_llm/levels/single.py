"""One sequence at a time through the engine: the levels ``kv`` and ``fast`` of ``--engine``.

A batch of one is a batch: its block table has one row, and its pool just the blocks that it may fill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import common  # picks the backend, so before numba.cuda

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.plan import Part, Plan
from ch14_mini_llm.engine.request import Request, Sampling, check_length, check_max_length, check_tokens
from ch14_mini_llm.engine.sequence import Sequence as Running
from ch14_mini_llm.engine.speculate import places_for_one
from ch14_mini_llm.model.config import GPT2Config
from common.trace import Launch, trace

BLOCK_SIZE = 16
NOT_A_NUMBER = -1


class Single:
    """A model that goes on with one text. level: "kv" or "fast".

    config, tensors: as `load_weights` gives them. max_length: the longest sequence in tokens, at most (and by default)
    config.n_ctx. on_tensor(name, n_values): called after each upload. speculate: as for `Engine`. Raises `RequestError`
    if max_length is not in 1 … n_ctx, or for sizes or a dtype (see `Engine.of`) that the level's kernels do not take.
    """

    def __init__(
        self,
        config: GPT2Config,
        tensors: dict[str, np.ndarray],
        max_length: int | None = None,
        on_tensor: Callable[[str, int], None] | None = None,
        level: str = "kv",
        dtype: str | None = None,
        speculate: str | None = None,
    ) -> None:
        self.config, self.level = config, level
        self.max_length = check_max_length(max_length, config.n_ctx)
        places = places_for_one(speculate)
        self.engine = Engine.of(
            config, tensors, level, on_tensor, num_blocks=-(-self.max_length // BLOCK_SIZE), block_size=BLOCK_SIZE,
            max_batch=places, max_rows=max(1 + places, self.max_length), prefix_cache=False, dtype=dtype,
            speculate=speculate,
        )  # fmt: skip

    @property
    def logits(self):
        """The logits of the last step, (vocab_size,) float32 on the device."""
        return next(iter(self.engine.runner.ops.values())).logits[0]

    def check_length(self, length: int) -> None:
        """Raises `RequestError` if a sequence of `length` tokens does not fit the buffers."""
        check_length(length, self.max_length, self.config.n_ctx)

    def prefill(self, tokens: Sequence[int]) -> int:
        """Run over a prompt and return the most likely token id after it; -1: all logits are NaN."""
        return next(self.stream(tokens, 1))

    def stream(self, tokens: Sequence[int], max_new: int, sampling: Sampling | None = None) -> Iterator[int]:
        """Yield `max_new` token ids that follow `tokens`, as soon as the host has them; -1: all logits are NaN.

        One stream at a time: another ends it.
        """
        check_tokens(tokens, self.config.vocab_size)
        self.check_length(len(tokens))
        self._end_all()
        engine = self.engine
        id = engine.enter(Request(tokens, max_new, sampling))
        try:
            while not engine.idle:
                for output in engine.step():
                    yield from output.tokens
                    if output.finish_reason == "error":
                        if engine.failure is not None:
                            raise engine.failure
                        yield NOT_A_NUMBER
        finally:
            engine.abort(id)
            self._end_all()

    def trace_step(self, tokens: Sequence[int], sampling: Sampling | None = None) -> list[Launch]:
        """Every kernel launch of the step over the last of `tokens`, those before it being in the cache."""
        check_tokens(tokens, self.config.vocab_size)
        self.check_length(len(tokens))
        self._end_all()
        runner, pool, before = self.engine.runner, self.engine.pool, len(tokens) - 1
        sequence = Running(-1, list(tokens), 1, 0, sampling=sampling)
        sequence.blocks = pool.take(-(-len(tokens) // BLOCK_SIZE))
        if before:
            runner.launch(Plan(0, (Part(sequence, 0, before, False, sequence.life),), False)).tokens()
        plan = Plan(0, (Part(sequence, before, 1, True, sequence.life),), False)
        shape = runner.prepare(plan)
        with trace() as launches:
            runner.run(shape, record=False)
        pool.drop(sequence.blocks)
        return launches

    @property
    def notes(self) -> list[str]:
        """What this device lacks and what is done instead, for people; empty if nothing is."""
        if self.level != "fast":
            return []
        if common.BACKEND != "gpu":
            return ["no GPU: steps are launched one by one, and the compiled CPU stands in for tensor cores"]
        cc = tuple(cuda.get_current_device().compute_capability)
        lacks = []
        if cc < (8, 0):
            lacks.append("no background copies before sm_80: tiles pass through registers, products of 16 x 8 x 8")
        if cc < (9, 0):
            lacks.append("no dependent launches before sm_90: each kernel of a step waits for the one before it")
        return lacks

    def _end_all(self) -> None:
        """End what is still running, of a stream that was left."""
        for id in self.engine.alive:
            self.engine.abort(id)
        while not self.engine.idle:
            self.engine.step()
