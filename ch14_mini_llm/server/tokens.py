"""Answers to requests for tokens, from a request's body to the last event, over one engine.

Nothing is freed here: a client that goes away is an abort, and the engine does the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ch14_mini_llm.cache.store import BlockStore
from ch14_mini_llm.server import fields, http
from ch14_mini_llm.server.answers import Form, Piece
from ch14_mini_llm.server.errors import ApiError, refused
from ch14_mini_llm.server.fields import CHAT, COMPLETIONS
from ch14_mini_llm.server.generate import Generation
from ch14_mini_llm.server.metrics import Metrics
from ch14_mini_llm.server.prompts import Asked, Limits, Reader
from ch14_mini_llm.server.remote import RemoteEngine
from ch14_mini_llm.server.sessions import Sessions
from ch14_mini_llm.server.settings import Settings
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer

SMALL = 20_000  # bytes of a body that is turned into tokens at once; a larger one in a thread, or all would wait for it
FORMED = {"response_format", "tools"}  # fields of which a grammar is made: likewise in a thread
LEAST_OPEN = 256  # new tokens of an answer whose length is left open, however busy the pool is
KEEPALIVE = 15.0  # seconds with nothing to say, after which a comment keeps proxies from closing a stream


@dataclass(frozen=True)
class Admitted:
    """A request that is about to run. values: its checked fields."""

    values: dict
    asked: Asked
    generation: Generation
    form: Form


class Server:
    """The state behind the endpoints. settings: see there. remote: the engine's process."""

    def __init__(self, settings: Settings, tokenizer: GPT2Tokenizer, remote: RemoteEngine) -> None:
        self.settings, self.tokenizer, self.remote = settings, tokenizer, remote
        self.metrics = Metrics(lambda: remote.stats)
        self.started, self.draining = int(time.time()), False
        self.running: dict[str, Generation] = {}  # by the answer's id
        self.turns: set[str] = set()  # sessions that have a turn under way
        self._sessions: Sessions | None = None

    @property
    def sessions(self) -> Sessions:
        """Those of the engine's folder. Raises `ApiError` if it keeps none."""
        self.remote.check_ready()
        kept = self.remote.facts.get("kept")
        if kept is None:
            message = "this server keeps no sessions: start it with --kv_dir=FOLDER"
            raise refused("session_id", message, "unsupported_value")
        if self._sessions is None:
            self._sessions = Sessions(BlockStore(kept["model"], kept["shape"], kept["dtype"], kept["folder"]))
        return self._sessions

    def check_idle(self, session: str) -> None:
        """Raises `ApiError` while a session has a turn under way."""
        if session in self.turns:
            message = f"the session {session!r} has a turn under way: wait for its end, or abort it"
            raise ApiError(409, message, "session_id", "session_busy", retry_after=1)

    def _begin_turn(self, session: str | None) -> None:
        if session is not None and self.sessions is not None:
            self.check_idle(session)
            self.turns.add(session)

    @property
    def reader(self) -> Reader:
        facts = self.remote.facts
        spare = sum(self.remote.stats.get(name, 0) for name in ("blocks_free", "blocks_cached")) * facts["block_size"]
        share = max(LEAST_OPEN, spare // (1 + self.remote.load)) - facts["block_size"]
        limits = Limits(facts["n_ctx"], facts["vocab_size"], facts["num_blocks"] * facts["block_size"], share)
        return Reader(self.tokenizer, limits, self.settings.name)

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, COMPLETIONS)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, CHAT)

    async def _generate(self, request: Request, end: str) -> Response:
        started, body = time.perf_counter(), http.read_json(request, self.settings.max_body)
        one = await self.admit(end, body, int(request.headers.get("content-length") or SMALL), started)
        try:
            if one.values.get("stream"):
                response = await http.Events(request, self._events(one.values, one.generation, one.form)).begin()
            else:
                response = await http.while_there(request, self._whole(one.generation, one.form))
        except BaseException:  # it may not have come as far as `pieces`
            self.turns.discard(one.asked.session)
            raise
        if one.asked.shortened is not None:
            response.headers["X-Max-Tokens"] = f"{one.asked.shortened}, since others need the pool as well"
        return response

    async def admit(self, end: str, body: Awaitable[object], size: int, started: float) -> Admitted:
        """A request from its body to what makes its answer: counted as received, and as accepted or rejected. size: the
        body's bytes. started: when it came, by ``time.perf_counter``. Raises `ApiError`, and what ``body`` raises."""
        self.metrics.received.inc()
        try:
            values = fields.read(end, await body)
            self.check_ready()
            read = self.reader.asked
            large = size >= SMALL or not values.keys().isdisjoint(FORMED)
            asked = await asyncio.to_thread(read, end, values) if large else read(end, values)
            self._check_room(len(asked.requests))
            self._begin_turn(asked.session)
        except ApiError as error:
            self.metrics.rejected.labels(error.status).inc()
            raise
        except (http.ClientGone, asyncio.CancelledError):
            self.metrics.rejected.labels(http.GONE).inc()
            raise
        self.metrics.accepted.inc()
        echoes = [None] * len(asked.prompts)
        if values.get("echo"):
            texts = values["prompt"]
            echoes = [text if isinstance(text, str) else self.tokenizer.decode(text) for text in texts]
        ended = lambda choice, reason: self.metrics.ended(choice, started, reason)
        generation = Generation(asked, self.tokenizer, echoes, end == COMPLETIONS, ended)
        wanted = any(given is not None for given in Reader.logprobs(end, values))
        form = Form(end, self.settings.name, self.settings.fingerprint, self.tokenizer, wanted, asked.calls != "none")
        return Admitted(values, asked, generation, form)

    async def pieces(self, generation: Generation, form: Form) -> AsyncIterator[dict[int, Piece]]:
        """The pieces of an answer, which can be aborted by its id, and takes no longer than is allowed."""
        settings, begun = self.settings, False
        pieces = generation.pieces(self.remote, min(KEEPALIVE, settings.timeout, settings.max_wait))
        self.running[form.id] = generation
        start = time.monotonic()
        try:
            async for new in pieces:
                yield new
                begun, taken = begun or bool(new), time.monotonic() - start
                if not begun and taken > settings.max_wait:
                    message = f"the answer had not begun after {settings.max_wait:g} seconds: try again later"
                    raise ApiError(503, message, code="waited_too_long", retry_after=5)
                if taken > settings.timeout:
                    limit = f"{settings.timeout:g} seconds"
                    raise ApiError(504, f"the answer was not there after {limit}: ask for less", code="timeout")
        except ApiError as error:
            self.metrics.failed.labels(error.code).inc()
            raise
        except (asyncio.CancelledError, GeneratorExit):  # the client has gone
            self.metrics.aborted.inc()
            raise
        finally:
            self.turns.discard(generation.session)
            del self.running[form.id]
            await pieces.aclose()

    async def _whole(self, generation: Generation, form: Form) -> JSONResponse:
        answers = [Piece() for _ in generation.choices]
        pieces = self.pieces(generation, form)
        try:
            async for new in pieces:
                for index, piece in new.items():
                    answers[index].add(piece)
        finally:
            await pieces.aclose()
        return JSONResponse(form.whole(answers, generation.usage))

    async def _events(self, values: dict, generation: Generation, form: Form) -> AsyncIterator[str]:
        """The events of a stream. What fails before the first is raised, what fails later is the last event."""
        with_usage, begun, some = bool(values.get("stream_options", {}).get("include_usage")), set(), False
        pieces = self.pieces(generation, form)
        try:
            async for new in pieces:
                if not new:
                    yield ": nothing new\n\n"
                for index, piece in new.items():
                    yield http.event(form.chunk(index, piece, index not in begun, with_usage))
                    begun.add(index)
                some = True
            if with_usage:
                yield http.event(form.last_chunk(generation.usage))
        except ApiError as error:
            if not some:
                raise
            yield http.event(error.body)
            return
        finally:
            await pieces.aclose()
        yield http.DONE

    def check_ready(self) -> None:
        if self.draining:
            raise ApiError(503, "the server is about to end", code="draining", retry_after=10)
        self.remote.check_ready()

    def _check_room(self, n: int) -> None:
        """Raises `ApiError` where so many choices more would make the queue longer than it may be."""
        most = self.remote.facts["max_batch"] + self.settings.max_queue
        if n > most:
            raise refused("n", f"{n} choices are asked for; the server takes {most} at a time, in all")
        if self.remote.load + n > most:
            message = f"{self.remote.load} answers are under way or wait, of {most} at most: try again later"
            raise ApiError(429, message, code="queue_full", retry_after=1)
