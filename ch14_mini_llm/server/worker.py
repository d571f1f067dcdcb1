"""The engine's process: requests come in through a pipe, tokens leave through it, and nothing else happens here.

So HTTP never waits for a device, and the device never for a socket. Messages are tuples, the first item says which:

    to the worker    lists of ("submit", key, Request, session or None) · ("abort", key) · ("end", key) ·
                     ("stop", None), and of commands of `glass.Glass`
    from it          ("progress", text) · ("ready", facts) · ("failed", text) · ("step", [(key, Output), …], stats)
                     ("view", what there is to be seen)

A closed pipe ends the process as well: it never outlives the one that started it. What a request asks for has been
checked on the other side; `Engine.submit` checks it again, and answers that request alone.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

from ch14_mini_llm.cache.store import BlockStore
from ch14_mini_llm.engine.counts import NAMES
from ch14_mini_llm.engine.plan import Output
from ch14_mini_llm.engine.request import Request, Sampling
from ch14_mini_llm.server.glass import Glass, kernels_of
from ch14_mini_llm.server.grammar import Grammars
from ch14_mini_llm.server.outbox import Outbox
from ch14_mini_llm.server.sessions import Sessions

OFTEN = 0.05  # seconds between two reports of the engine's state, while it works
WARM_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)  # sequences at a time, as far as the engine takes so many
LONG = 600  # tokens of a long prompt
SWITCH = 2e-4  # seconds after which a thread gives Python's lock to one that waits, such as that which reads the pipe


def main(pipe, path: str, options: dict) -> None:
    """Load a model, warm up, and serve until the pipe is closed. options: `Engine.of`'s, level and dtype among them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # who started this process decides when it ends
    sys.setswitchinterval(SWITCH)
    try:
        loaded = _load(pipe, Path(path), options)
    except EOFError:
        return
    except Exception as error:
        known = isinstance(error, (ValueError, RuntimeError, OSError, MemoryError))
        pipe.send(("failed", str(error) if known else f"{type(error).__name__}: {error}"))
        return
    try:
        Worker(pipe, *loaded).run()
    except (BrokenPipeError, EOFError, ConnectionResetError):
        pass  # nobody is there any more


def _load(pipe, path, options):
    from ch14_mini_llm.model.weights import load_weights, weights_digest
    from ch14_mini_llm.start import best_level, loading, pick_backend
    from ch14_mini_llm.tokenizer.own import tokenizer_of

    config, tensors = load_weights(path)
    grammars = Grammars(tokenizer_of(config, tensors))
    backend, device, reason = pick_backend()
    from ch14_mini_llm.engine.engine import Engine  # late: numba.cuda comes with it
    kept = options.pop("kept", None)
    level = options.pop("level") or best_level(config, backend, options["dtype"])
    pipe.send(("progress", f"{backend}, {device} ({reason}), engine {level}"))
    with loading(config) as on_tensor:
        engine = Engine.of(config, tensors, level, on_tensor, **options)
    kernels = warm_up(engine, lambda text: pipe.send(("progress", text)))
    facts = {
        "backend": backend, "device": device, "level": level, "n_ctx": engine.model.n_ctx,
        "vocab_size": engine.model.vocab_size, "num_blocks": engine.pool.n_blocks, "block_size": engine.block_size,
        "max_batch": engine.sizes.max_batch, "kernels": kernels,
    }  # fmt: skip
    sessions = None
    if kept is not None:
        sessions = keep(engine, f"{weights_digest(path)} {level} {options.get('dtype')}", kept)
        facts["kept"] = {**kept, "model": sessions.store.model, "shape": sessions.store.shape,
                         "dtype": sessions.store.dtype.str}  # fmt: skip
    pipe.send(("ready", facts))
    return engine, grammars, sessions


def keep(engine, model: str, kept: dict) -> Sessions:
    """Put a `BlockStore` below an engine. kept: its folder, host_bytes and disk_bytes. Raises `FileError`."""
    pages = engine.runner.cache
    store = BlockStore(model, pages.block_shape, pages.dtype, memory=pages.host, **kept)
    pages.read([0], store.memory, store.passing[:1])  # compiles; page 0 is nobody's
    pages.write(store.memory, store.passing[:1], [0])
    engine.prefix_cache.attach(store, pages)
    return Sessions(store)


def warm_up(engine, progress=lambda text: None) -> list[list]:
    """Run what compiles the kernels that requests will need, so that the first client does not wait for them. Returns
    the kernels of the first request, see `kernels_of`."""
    n_ctx, room = engine.model.n_ctx, engine.pool.n_blocks * engine.block_size
    length = max(1, min(24, n_ctx - 8, room - 8))
    new = max(0, min(6, n_ctx - length, room - length))
    settings = [
        None, Sampling(0.8, seed=1, top_k=5), Sampling(0.8, seed=1, top_p=0.9, min_p=0.01),
        Sampling(1.0, seed=1, repetition_penalty=1.1, presence_penalty=0.1, logit_bias={0: 0.1}),
    ]  # fmt: skip
    tokens = [number % engine.model.vocab_size for number in range(length)]
    jobs = [[Request(tokens, new, setting)] for setting in settings]
    jobs += [[Request(tokens, new, logprobs=1)], [Request(tokens, 0, prompt_logprobs=1)]]
    most = engine.sizes.max_batch
    jobs += [[Request(tokens, new)] * n for n in sorted({*WARM_BATCHES, most}) if 1 < n <= most]
    if engine.level == "fast" and (long := min(n_ctx - 2, room - 2, LONG)) > length:  # it has kernels of its own
        jobs += [[Request((tokens * long)[:long], 2)] * 2]
    from common.trace import trace  # late: it picks the backend

    with trace() as launches:  # a prompt and a step: what comes a second time is recorded, which is not to be traced
        engine.run([Request(tokens, min(2, new))])
    for number, requests in enumerate(jobs):
        progress(f"warming up, {number + 1} of {len(jobs)}")
        for result in engine.run(requests):
            if result.finish_reason == "error":
                raise RuntimeError(f"the engine cannot run its first request: {result.error}")
    if engine.prefix_cache is not None:
        engine.prefix_cache.evict(engine.pool.cached)  # nobody asked for that
    blocks = engine.pool.take(min(engine.pool.free, engine.sizes.max_blocks))
    engine.runner.cache.touch(blocks)
    engine.pool.drop(blocks)  # they are taken first, again
    return kernels_of(launches)


class Worker:
    """An engine at one end of a pipe. grammars: for requests whose constraint is a `Grammar`."""

    def __init__(self, pipe, engine, grammars: Grammars | None = None, sessions: Sessions | None = None) -> None:
        self.pipe, self.engine, self.grammars, self.sessions = pipe, engine, grammars, sessions
        self._turns: dict[int, tuple[str, list[int]]] = {}  # key → (session, its tokens so far)
        self.commands: deque[tuple] = deque()
        self.awake, self.closed = threading.Event(), False
        self._ids: dict[int, int] = {}  # key → the engine's id
        self._keys: dict[int, int] = {}
        self._outbox = Outbox()
        self.glass = Glass(engine, self._keys, self.stats)
        self._reported, self._before = 0.0, {name: engine.stats()[name] for name in NAMES}  # of the warm-up

    def run(self) -> None:
        """Serve until the pipe is closed."""
        threading.Thread(target=self._listen, daemon=True).start()
        while not self.closed:
            self.awake.clear()
            refused = self._obey()
            rest = math.inf if self.engine.idle else self.glass.rest()
            if rest:
                self._send(refused, now=True)
                self._show(now=rest == math.inf)
                self.awake.wait(None if rest == math.inf else rest)
            else:
                outputs = self.engine.step()
                for output in outputs if self._turns else ():
                    self._note(self._keys[output.id], output)
                self._send(refused + [(self._keys[output.id], output) for output in outputs])
                for output in outputs:
                    if output.finish_reason is not None:
                        self._ids.pop(self._keys.pop(output.id), None)
                self._show()

    def stats(self) -> dict[str, int]:
        """The engine's, without those of the warm-up."""
        stats = self.engine.stats()
        stats |= {name: stats[name] - before for name, before in self._before.items()}
        return stats | {f"kv_{name}": n for name, n in (self.sessions.store.counts if self.sessions else {}).items()}

    def _note(self, key: int, output: Output) -> None:
        """What is new of a session's turn. A whole one is in its file before anybody hears of its end."""
        if key in self._turns:
            self._turns[key][1].extend(output.tokens)
            if output.finish_reason in ("stop", "length"):
                self._commit(key)
            elif output.finish_reason is not None:
                del self._turns[key]

    def _commit(self, key: int) -> None:
        name, tokens = self._turns.pop(key)
        if not self.sessions.turn(name, tokens, self.engine.prefix_cache.save(tokens)):
            self.sessions.store.counts["failed"] += 1

    def _show(self, now: bool = False) -> None:
        if (view := self.glass.view(now)) is not None:
            self.pipe.send(("view", view))

    def _listen(self) -> None:
        try:
            while True:
                for command in self.pipe.recv():
                    if command[0] == "stop":
                        raise EOFError
                    self.commands.append(self._ready(command))
                    self.awake.set()
        except (EOFError, OSError):
            pass
        self.closed = True
        self.awake.set()

    def _ready(self, command: tuple) -> tuple:
        """A command whose request has what it needs: a grammar is compiled here, while the engine goes on. An error
        takes the place of a request that cannot have it."""
        kind, key, *rest = command
        if kind != "submit" or rest[0].constraint is None:
            return command
        try:
            return kind, key, replace(rest[0], constraint=self.grammars.matcher(rest[0].constraint)), *rest[1:]
        except Exception as error:
            return kind, key, error

    def _obey(self) -> list[tuple[int, Output]]:
        """Do what has been asked for; returns the answers to requests that cannot be fulfilled."""
        refused = []
        while self.commands:
            kind, key, *rest = self.commands.popleft()
            if kind in ("abort", "end"):
                if kind == "end" and key in self._turns:
                    self._commit(key)
                if key in self._ids:
                    self.engine.abort(self._ids[key])
                continue
            if kind != "submit":
                self.glass.command(kind, key)
                continue
            try:
                if isinstance(rest[0], Exception):
                    raise rest[0]
                id = self.engine.submit(rest[0])
            except Exception as error:  # of one request, whatever it is
                refused.append((key, Output(-1, (), "error", str(error))))
            else:
                self._ids[key], self._keys[id] = id, key
                if rest[1] is not None:
                    self._turns[key] = rest[1], list(map(int, rest[0].tokens))
        return refused

    def _send(self, outputs: list[tuple[int, Output]], now: bool = False) -> None:
        for key, output in outputs:
            self._outbox.add(key, output)
        outputs = self._outbox.take(len(self._ids), now)
        due = now or time.monotonic() - self._reported > OFTEN or any(output.finish_reason for _, output in outputs)
        if outputs or due:
            stats = None
            if due:
                self._reported, stats = time.monotonic(), self.stats()
            self.pipe.send(("step", outputs, stats))
