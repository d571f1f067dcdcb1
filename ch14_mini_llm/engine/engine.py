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
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import common  # picks the backend, so before numba.cuda

# isort: split
from ch14_mini_llm.cache.pool import BlockPool
from ch14_mini_llm.cache.radix import RadixCache
from ch14_mini_llm.engine.constraint import guarded
from ch14_mini_llm.engine.counts import Counts
from ch14_mini_llm.engine.drafts import Speculation
from ch14_mini_llm.engine.interrupts import Interrupts
from ch14_mini_llm.engine.models import model_of
from ch14_mini_llm.engine.plan import Output, Plan, Result
from ch14_mini_llm.engine.request import Request, RequestError, check_request, check_rest, check_tokens
from ch14_mini_llm.engine.run_all import run_all
from ch14_mini_llm.engine.scheduler import Scheduler
from ch14_mini_llm.engine.sequence import Sequence as Running
from ch14_mini_llm.engine.sizes import choose_sizes
from ch14_mini_llm.engine.static import StaticScheduler
from ch14_mini_llm.forward.runner import ModelRunner, Ticket
from ch14_mini_llm.model.roles import Model
from ch14_mini_llm.model.weights import load_weights


class Engine:
    """A model with a scheduler, a block pool and a prefix cache.

    level: "kv" (float32) or "fast" (float16, tensor cores, CUDA graphs); ``model`` is made for it. num_blocks: of the
    pool, of ``block_size`` tokens; None: 0.85 of a GPU's free memory, on a CPU 1 GB at most. Block 0 comes on top.
    max_batch: sequences that run at a time. max_rows: tokens of a step, by default max_batch + 64, or + 1024 on the
    level ``fast``. deterministic: a request's tokens are the same in any company, bit by bit; always so on ``kv``.
    look_ahead: launch the next step before the tokens of the last are read; by default on a GPU. static: padded batches
    that begin and end together, to compare with (`engine.static`); without a prefix cache. speculate: who guesses
    tokens, where sequences leave places of the batch free: one of `speculate.HOW`, or the engine of a draft model.
    """

    def __init__(
        self,
        model: Model,
        level: str = "kv",
        num_blocks: int | None = None,
        block_size: int = 16,
        max_batch: int = 32,
        max_rows: int | None = None,
        prefix_cache: bool = True,
        deterministic: bool | None = None,
        look_ahead: bool | None = None,
        static: bool = False,
        speculate: str | Engine | None = None,
    ) -> None:
        sizes = choose_sizes(model, level, num_blocks, block_size, max_batch, max_rows)
        self.model, self.level, self.sizes, self.block_size = model, level, sizes, block_size
        self.speculation = Speculation(speculate, model, level, max_batch, static)
        self.pool = BlockPool(sizes.num_blocks)
        self.prefix_cache = RadixCache(self.pool, block_size) if prefix_cache and not static else None
        kind = StaticScheduler if static else Scheduler
        self.scheduler = kind(self.pool, self.prefix_cache, block_size, max_batch, sizes.max_rows)
        parts = 2 * max_batch if static else max_batch  # of a step
        self.runner = ModelRunner(model, replace(sizes, max_batch=parts), level, bool(deterministic))
        self.on_step: Callable[[Plan | None, list[Output]], None] | None = None  # called at the end of each step
        self.failure: BaseException | None = None  # the last that a step has raised
        self._interrupts = Interrupts()
        self._ahead = int(common.BACKEND == "gpu" if look_ahead is None else look_ahead)
        self._under_way: deque[Ticket] = deque()
        self._lock = threading.Lock()  # of the next three, which other threads write
        self._numbers = itertools.count()
        self._submitted: list[Running] = []
        self._aborted: list[int] = []
        self._alive: dict[int, Running] = {}
        self._counts = Counts()

    @classmethod
    def from_file(cls, path: str | os.PathLike, level: str = "kv", **options) -> Engine:
        """An engine for a weight file; options as for `of`. Raises `WeightsError`, and `RequestError`."""
        return cls.of(*load_weights(path), level, **options)

    @classmethod
    def of(
        cls, config, tensors, level: str = "kv", on_tensor: Callable | None = None, dtype: str | None = None, **options
    ) -> Engine:
        """An engine for the sizes and tensors that `load_weights` gives; other options as for the class.

        on_tensor(name, n_values): called after each upload. dtype: of the weights on the level ``kv``, "float32" or
        "float16", which is half the bytes (sums are float32); None: float32. Raises `RequestError`.
        """
        return cls(model_of(config, tensors, level, on_tensor, dtype), level, **options)

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Take a request in; returns its id. Raises `RequestError` for one that can never be fulfilled."""
        self._check(request)
        return self.enter(request)

    def enter(self, request: Request) -> int:
        """`submit` for a request that has been checked. Raises `RequestError` if its constraint fails at once."""
        sampling, guard = request.sampling and request.sampling.seeded(), guarded(request, self.model.vocab_size)
        with self._lock:
            number = next(self._numbers)
            sequence = Running(
                number, list(map(int, request.tokens)), request.max_new, number, request.priority,
                sampling=sampling, stop_tokens=frozenset(map(int, request.stop_tokens)),
                logprobs=request.logprobs, prompt_logprobs=request.prompt_logprobs,
                reads_cache=request.prompt_logprobs is None, guard=guard, guesser=self.speculation.guesser(request),
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
        check_tokens([*request.stop_tokens] or [0], self.model.vocab_size, "stop_tokens")
        check_rest(request, isinstance(self.scheduler, StaticScheduler))
        n, room = len(request.tokens), self.pool.n_blocks * self.block_size
        if n > room:
            raise RequestError(
                f"the prompt has {n} tokens, but the pool has room for {room}: num_blocks is {self.pool.n_blocks}, of "
                f"{self.block_size} tokens each; use a shorter prompt or more blocks",
                "tokens",
            )

    # --- steps -------------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether all requests have ended; then no step is under way, and no block owned."""
        with self._lock:
            return not self._alive

    @property
    def alive(self) -> list[int]:
        """The ids of requests that have not ended."""
        with self._lock:
            return list(self._alive)

    def sequence(self, id: int) -> Running:
        """What the scheduler knows of a request that has not ended. Raises KeyError for another."""
        return self._alive[id]

    def step(self) -> list[Output]:
        """Run one step, if there is one to run; returns what is new since the last call. Ctrl-C is raised when a step
        has ended, or in the middle of its launches, which ends its requests."""
        with self._interrupts:
            return self._step()

    def _step(self) -> list[Output]:
        with self._lock:
            submitted, self._submitted = self._submitted, []
            aborted, self._aborted = self._aborted, []
        for sequence in submitted:
            self.scheduler.add(sequence)
        for id in aborted:
            if id in self._alive:  # it may have ended since
                self.scheduler.abort(self._alive[id])
        while self._under_way and self.speculation.on and self.scheduler.wants_tokens:
            self._read()
        plan = self.scheduler.next()
        if plan is not None:
            self._counts.add(plan)
            self._launch(plan)
        while len(self._under_way) > (self._ahead if plan is not None else 0):
            self._read()
        outputs, self.scheduler.outputs = self.scheduler.outputs, []
        self._counts["generation_tokens"] += sum([len(output.tokens) for output in outputs])
        for output in [output for output in outputs if output.finish_reason is not None]:
            with self._lock:
                self._counts["preemptions"] += self._alive.pop(output.id).preemptions
        while self._under_way and self.idle:  # planned before its sequences ended: their blocks wait for it
            self._read()
        if self.on_step is not None:
            self.on_step(plan, outputs)
        return outputs

    def _launch(self, plan: Plan) -> None:
        try:
            with self._interrupts.let_through():
                ticket = self.runner.launch(plan)
        except BaseException as error:  # a fault of ours or of the device: it ends these requests, not the engine
            while self._under_way:  # steps end in their order
                self._read()
            self._failed(plan, error)
            if not isinstance(error, Exception):
                raise
        else:
            self._under_way.append(ticket)

    def _read(self) -> None:
        """Wait for the oldest step under way."""
        ticket = self._under_way.popleft()
        try:
            tokens, scores = ticket.tokens(), ticket.scores()
        except Exception as error:
            self._failed(ticket.plan, error)
        else:
            self.scheduler.done(ticket.plan, tokens, scores)

    def _failed(self, plan: Plan, error: BaseException) -> None:
        self.failure = error
        self.scheduler.failed(plan, f"{type(error).__name__}: {error}")

    def run(self, requests: Sequence[Request], on_output: Callable[[Output], None] | None = None) -> list[Result]:
        """Run requests to their ends; their results, in order. One that cannot be fulfilled has an error, alone.
        on_output: called with each Output as it comes."""
        return run_all(self, requests, on_output)

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
            **self.scheduler.counts,
        }  # fmt: skip
