"""A request's choices as they come: tokens in, pieces of text out, whether anybody streams them or not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from ch14_mini_llm.engine.plan import Output
from ch14_mini_llm.engine.request import Request
from ch14_mini_llm.server.answers import Piece, Usage
from ch14_mini_llm.server.errors import ApiError
from ch14_mini_llm.server.prompts import Asked
from ch14_mini_llm.server.remote import GONE, RemoteEngine
from ch14_mini_llm.server.text import TextStream
from ch14_mini_llm.server.tools import CallReader
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer

ABORTED = 409  # the status of a request that another one has ended


class Choice:
    """One choice: the engine's outputs, and the text that has left.

    echo: the prompt's text, which goes in front; None for none. continues: the answer goes on with the prompt. calls:
    as `Asked` has it.
    """

    def __init__(
        self, request: Request, tokenizer: GPT2Tokenizer, stops, echo: str | None, continues: bool, calls: str = "none",
        session: str | None = None,
    ) -> None:  # fmt: skip
        self.request, self.tokenizer, self.echo, self.session = request, tokenizer, echo, session
        self.calls = CallReader(calls == "required") if calls != "none" else None
        self.text = TextStream(tokenizer, stops, len(echo or ""), continues)
        self.cached = 0
        self.times: list[float] = []  # at which tokens came

    async def pieces(self, remote: RemoteEngine) -> AsyncIterator[Piece]:
        """Run it; the last piece has a finish_reason. Raises `ApiError`. Whoever stops listening ends the request."""
        stream = remote.submit(self.request, self.session)
        try:
            if self.echo is not None and self.request.prompt_logprobs is None:
                yield Piece(self.echo)
            while True:
                piece, ended = Piece(), None
                for output in await stream.get():
                    if output.prompt_logprobs is not None:
                        piece.add(self._echoed(output))
                    self._take(output, piece)
                    ended = output if output.finish_reason is not None else None
                if ended is None and self.text.stopped:
                    remote.abort(stream, whole=True)
                    yield piece
                    piece, ended = Piece(), await _last(stream)
                if ended is not None:
                    self.cached = ended.cached_tokens
                    piece.finish_reason = self._finish(ended, piece)
                yield piece
                if ended is not None:
                    return
        finally:
            remote.abort(stream)

    def _take(self, output: Output, piece: Piece) -> None:
        if output.tokens and not output.logprobs and not self.text.stopped:
            self._add(piece, *self.text.push_all(output.tokens))
        for token, known in zip(output.tokens, output.logprobs):
            if self.text.stopped:
                return
            self._add(piece, *self.text.push(token, (token, known)))
        if output.tokens:
            self.times.append(time.perf_counter())

    def _add(self, piece: Piece, text: str, entries: list, last: bool = False) -> None:
        """What has left the text goes into a piece, calls apart."""
        calls = []
        if self.calls is not None:
            entries = entries if self.request.logprobs is not None else []  # a tag alone is nothing to send
            text, calls = self.calls.push(text)
            if last:
                rest, more = self.calls.finish()
                text, calls = text + rest, calls + more
        piece.add(Piece(text, entries, calls=calls))

    def _finish(self, ended: Output, piece: Piece) -> str:
        """What OpenAI calls the reason; the rest of the text is in the piece then. Raises `ApiError`."""
        if self.text.stopped:
            self._add(piece, "", [], last=True)
            return "stop"
        if ended.finish_reason == "error":
            raise ApiError(503 if ended.error == GONE else 500, str(ended.error), code="engine_error")
        if ended.finish_reason == "abort":
            raise ApiError(ABORTED, "the request was aborted", code="aborted")
        self._add(piece, *self.text.finish(), last=True)
        called = self.calls is not None and self.calls.n_whole and ended.finish_reason == "stop"
        return "tool_calls" if called else ended.finish_reason

    def _echoed(self, output: Output) -> Piece:
        """The prompt, with the log-probabilities of its tokens; the first has none."""
        text = TextStream(self.tokenizer)
        entries = []
        for token, known in zip(self.request.tokens, output.prompt_logprobs):
            entries += text.push(token, (token, known))[1]
        return Piece(self.echo or "", entries + text.finish()[1])


async def _last(stream) -> Output:
    """The output with which a stream ends."""
    while True:
        for output in await stream.get():
            if output.finish_reason is not None:
                return output


class Generation:
    """All choices of a request, at the same time. on_end(choice, reason): called as each ends as it should."""

    def __init__(
        self, asked: Asked, tokenizer: GPT2Tokenizer, echoes: list[str | None], continues: bool, on_end
    ) -> None:
        self.choices = [
            Choice(request, tokenizer, asked.stops, echoes[number // asked.n], continues, asked.calls, asked.session)
            for number, request in enumerate(asked.requests)
        ]
        self.session, self._prompts, self._on_end = asked.session, asked.prompts, on_end
        self._new: dict[int, Piece] = {}
        self._there, self._error = asyncio.Event(), None
        self._heard, self._timer = 0.0, None  # when there was something new; wakes whoever listens if there is nothing

    async def pieces(self, remote: RemoteEngine, patience: float) -> AsyncIterator[dict[int, Piece]]:
        """What is new, {number of the choice: piece}, until all have ended; {} after so many seconds with nothing new.
        What comes while nobody listens is joined. Raises `ApiError`."""
        tasks = [asyncio.create_task(self._run(number, remote)) for number in range(len(self.choices))]
        left, loop = len(tasks), asyncio.get_running_loop()
        self._heard = loop.time()
        self._wake(loop, patience)
        try:
            while left:
                await self._there.wait()
                self._there.clear()
                self._heard, new, self._new = loop.time(), self._new, {}
                left -= sum(piece.finish_reason is not None for piece in new.values())
                if new or self._error is None:
                    yield dict(sorted(new.items()))
                if self._error is not None:
                    raise self._error
        finally:
            self._timer.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _wake(self, loop, patience: float) -> None:
        """Have `pieces` go on if nothing was new for so long. One timer for all, where `asyncio.wait_for` has one for
        each of thousands of pieces."""
        rest = self._heard + patience - loop.time()
        if rest <= 0:
            self._there.set()
        self._timer = loop.call_later(rest if rest > 0 else patience, self._wake, loop, patience)

    def abort(self) -> None:
        """End it: `pieces` raises."""
        self._error = ApiError(ABORTED, "the request was aborted", code="aborted")
        self._there.set()

    async def _run(self, number: int, remote: RemoteEngine) -> None:
        pieces = self.choices[number].pieces(remote)
        try:
            async for piece in pieces:
                if piece.finish_reason is not None:
                    self._on_end(self.choices[number], piece.finish_reason)
                if piece.text or piece.entries or piece.calls or piece.finish_reason:
                    self._new.setdefault(number, Piece()).add(piece)
                    self._there.set()
        except Exception as error:
            self._error = error
            self._there.set()
        finally:
            await pieces.aclose()

    @property
    def usage(self) -> Usage:
        """Tokens so far. A prompt counts once, whatever n."""
        n = len(self.choices) // len(self._prompts)
        cached = sum(self.choices[number * n].cached for number in range(len(self._prompts)))
        return Usage(sum(map(len, self._prompts)), cached, sum(choice.text.n_tokens for choice in self.choices))
