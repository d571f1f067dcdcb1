"""The engine: requests in, tokens out, many at a time.

    engine = Engine.from_file("data/tiny-gpt2.bin")
    for result in engine.run([Request([15496, 11], max_new=20), Request([1169], max_new=5)]):
        print(result.tokens)

or, a step at a time, while requests come and go (`submit` and `abort` may be called from other threads):

    id = engine.submit(Request(tokens, max_new=100))
    while not engine.idle:
        for output in engine.step():
            print(output.id, output.tokens, output.finish_reason)
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import common  # picks the backend, so before numba.cuda

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.cache.pages import PagedCache, block_bytes
from ch14_mini_llm.cache.pool import BlockPool
from ch14_mini_llm.cache.radix import RadixCache
from ch14_mini_llm.engine.plan import Output, Plan
from ch14_mini_llm.engine.request import Request, RequestError, check_request, check_tokens
from ch14_mini_llm.engine.runner import ModelRunner
from ch14_mini_llm.engine.scheduler import Scheduler
from ch14_mini_llm.engine.sequence import ENDED
from ch14_mini_llm.engine.sequence import Sequence as Running
from ch14_mini_llm.engine.static import StaticScheduler
from ch14_mini_llm.model.gpt2 import gpt2
from ch14_mini_llm.model.roles import Model
from ch14_mini_llm.model.weights import load_weights

CPU_BYTES = 1 << 30  # for keys and values, unless num_blocks says otherwise
GPU_SHARE = 0.85  # of the memory that is free on a GPU


@dataclass
class Result:
    """What became of a request. tokens: the new ones. finish_reason: "stop", "length", "abort", "error". error: a text.

    cached_tokens: of the prompt, found in the prefix cache. preemptions: how often it was computed anew.
    """

    id: int | None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0
    preemptions: int = 0


class Engine:
    """A model with a scheduler, a block pool and a prefix cache.

    num_blocks: of the pool, of ``block_size`` tokens; None: 0.85 of a GPU's free memory, on a CPU 1 GB at most. Block 0
    comes on top. max_batch: sequences that run at a time. max_rows: tokens of a step, by default max_batch + 64.
    """

    def __init__(
        self,
        model: Model,
        num_blocks: int | None = None,
        block_size: int = 16,
        max_batch: int = 32,
        max_rows: int | None = None,
        prefix_cache: bool = True,
        static: bool = False,
    ) -> None:
        for name, value, low in ("block_size", block_size, 4), ("max_batch", max_batch, 1):
            if value < low:
                raise RequestError(f"{name} is {value}; it must be at least {low}")
        if block_size % 4 or block_size > 256:
            raise RequestError(f"block_size is {block_size}; it must be a multiple of 4, up to 256")
        max_rows = max_batch + 64 if max_rows is None else max_rows
        if max_rows <= max_batch:
            raise RequestError(f"max_rows is {max_rows}; it must be above max_batch, {max_batch}, or no prompt gets on")
        self.model, self.block_size = model, block_size
        longest = -(-model.n_ctx // block_size)
        n_blocks = default_blocks(model, block_size, max_batch * longest) if num_blocks is None else num_blocks
        if n_blocks < 1:
            raise RequestError(f"num_blocks is {n_blocks}; it must be at least 1")
        self.pool = BlockPool(n_blocks)
        self.prefix_cache = RadixCache(self.pool, block_size) if prefix_cache and not static else None
        kind = StaticScheduler if static else Scheduler
        self.scheduler = kind(self.pool, self.prefix_cache, block_size, max_batch, max_rows)
        pages = PagedCache(model, n_blocks, block_size)
        most_parts = 2 * max_batch if static else max_batch  # a static batch's sequence may be padding and prompt
        self.runner = ModelRunner(model, pages, most_parts, max_rows, longest)
        self.on_step: Callable[[Plan | None, list[Output]], None] | None = None  # called at the end of each step
        self._lock = threading.Lock()  # of the next three, which other threads write
        self._numbers = itertools.count()
        self._submitted: list[Running] = []
        self._aborted: list[int] = []
        self._alive: dict[int, Running] = {}
        self._counts = dict.fromkeys(("steps", "prompt_tokens", "generation_tokens", "preemptions"), 0)
        self._counts |= dict.fromkeys(("prefix_cache_queries", "prefix_cache_hits", "rows", "padding_rows"), 0)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike,
        level: str = "kv",
        on_tensor: Callable[[str, int], None] | None = None,
        **options,
    ) -> Engine:
        """An engine for a weight file; options as for the class. Raises `WeightsError`, and `RequestError` for another
        level than ``kv``: ``fast`` runs one sequence at a time so far."""
        if level != "kv":
            raise RequestError(f"level is {level!r}; batches run on the level kv")
        return cls.of(*load_weights(path), on_tensor, **options)

    @classmethod
    def of(cls, config, tensors, on_tensor: Callable[[str, int], None] | None = None, **options) -> Engine:
        """An engine for the sizes and tensors that `load_weights` gives; options as for the class."""
        upload = lambda array: cuda.to_device(np.ascontiguousarray(array, dtype=np.float32))
        return cls(gpt2(config, tensors, upload, on_tensor), **options)

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Take a request in; returns its id. Raises `RequestError` for one that can never be fulfilled."""
        self._check(request)
        with self._lock:
            number = next(self._numbers)
            sequence = Running(
                number, list(map(int, request.tokens)), request.max_new, number, request.priority,
                sampling=request.sampling, stop_tokens=frozenset(map(int, request.stop_tokens)),
            )  # fmt: skip
            self._alive[number] = sequence
            self._submitted.append(sequence)
        return number

    def abort(self, id: int) -> None:
        """End a request: an Output "abort" follows. Nothing happens if it has ended, or never was."""
        with self._lock:
            if id in self._alive:
                self._aborted.append(id)

    def _check(self, request: Request) -> None:
        check_request(self.model, request.tokens, request.max_new, request.sampling, least_new=0)
        check_tokens([*request.stop_tokens] or [0], self.model.vocab_size)
        n, room = len(request.tokens), self.pool.n_blocks * self.block_size
        if n > room:
            raise RequestError(
                f"the prompt has {n} tokens, but the pool has room for {room}: num_blocks is {self.pool.n_blocks}, of "
                f"{self.block_size} tokens each; use a shorter prompt or more blocks"
            )

    # --- steps -------------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether all requests have ended."""
        with self._lock:
            return not self._alive

    def step(self) -> list[Output]:
        """Run one step, if there is one to run; returns what is new since the last call."""
        with self._lock:
            submitted, self._submitted = self._submitted, []
            aborted, self._aborted = self._aborted, []
        for sequence in submitted:
            self.scheduler.add(sequence)
        for id in aborted:
            if id in self._alive:  # it may have ended since
                self.scheduler.abort(self._alive[id])
        plan = self.scheduler.next()
        if plan is not None:
            self._count(plan)
            try:
                tokens = self.runner.launch(plan).tokens()
            except Exception as error:  # a fault of ours or of the device: it ends these requests, not the engine
                self.scheduler.failed(plan, f"{type(error).__name__}: {error}")
            else:
                self.scheduler.done(plan, tokens)
        outputs, self.scheduler.outputs = self.scheduler.outputs, []
        self._counts["generation_tokens"] += sum(len(output.tokens) for output in outputs)
        with self._lock:
            for output in outputs:
                if output.finish_reason is not None:
                    self._counts["preemptions"] += self._alive.pop(output.id).preemptions
        if self.on_step is not None:
            self.on_step(plan, outputs)
        return outputs

    def run(self, requests: Sequence[Request], on_output: Callable[[Output], None] | None = None) -> list[Result]:
        """Run requests to their ends; their results, in order. One that cannot be fulfilled has an error, alone.

        on_output: called with each Output as it comes.
        """
        results, running = [], {}
        for request in requests:
            try:
                id = self.submit(request)
            except RequestError as error:
                results.append(Result(None, finish_reason="error", error=str(error)))
            else:
                results.append(Result(id))
                running[id] = results[-1], self._alive[id]
        while any(sequence.state != ENDED for _, sequence in running.values()):
            for output in self.step():
                if on_output is not None:
                    on_output(output)
                if output.id in running:
                    result, sequence = running[output.id]
                    result.tokens += output.tokens
                    result.finish_reason, result.error = output.finish_reason, output.error
                    result.cached_tokens, result.preemptions = sequence.n_cached or 0, sequence.preemptions
        return results

    # --- what is going on --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises AssertionError unless every block is accounted for: free, cached or owned, as all tables say."""
        self.scheduler.check()

    def stats(self) -> dict[str, int]:
        """Counts since the engine was made, and how many requests and blocks are in which state now."""
        owned = self.pool.n_blocks - self.pool.free - self.pool.cached
        return {
            "num_requests_running": len(self.scheduler.running), "num_requests_waiting": len(self.scheduler.waiting),
            "blocks_free": self.pool.free, "blocks_cached": self.pool.cached, "blocks_owned": owned, **self._counts,
        }  # fmt: skip

    def _count(self, plan) -> None:
        for name, value in ("steps", 1), ("rows", plan.rows), ("padding_rows", plan.padding_rows):
            self._counts[name] += value
        for part in plan.parts:
            sequence = part.sequence
            if part.start == sequence.n_cached and not sequence.preemptions:  # its first part
                self._counts["prefix_cache_queries"] += sequence.n_prompt
                self._counts["prefix_cache_hits"] += sequence.n_cached
            self._counts["prompt_tokens"] += max(0, min(part.start + part.count, sequence.n_prompt) - part.start)


def default_blocks(model: Model, block_size: int, most: int) -> int:
    """How many blocks there is memory for, ``most`` at most."""
    room = GPU_SHARE * cuda.current_context().get_memory_info()[0] if common.BACKEND == "gpu" else CPU_BYTES
    return max(1, min(most, int(room // block_bytes(model, block_size))))
