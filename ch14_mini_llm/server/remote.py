"""The engine's process as the server's event loop sees it: requests go in, what comes back wakes whoever waits."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable

from ch14_mini_llm.engine.plan import Output
from ch14_mini_llm.engine.request import Request
from ch14_mini_llm.server import worker
from ch14_mini_llm.server.errors import ApiError

STARTING, READY, FAILED, CLOSED = "starting", "ready", "failed", "closed"
MOST_STARTS = 3  # of the engine's process in a row that do not get as far as to be ready
GONE = "the engine's process has ended; it is being started again"


class Stream:
    """What comes of one request. Outputs that nobody has fetched yet are kept: a slow reader gets them together."""

    def __init__(self, key: int) -> None:
        self.key, self.ended = key, False
        self._new: list[Output] = []
        self._there = asyncio.Event()

    def put(self, output: Output) -> None:
        self._new.append(output)
        self.ended |= output.finish_reason is not None
        self._there.set()

    async def get(self) -> list[Output]:
        """What is new; waits until there is something."""
        await self._there.wait()
        self._there.clear()
        new, self._new = self._new, []
        return new


class Watcher:
    """Views of the engine, for one who watches: the newest only, but what a view leaves out stays as it was."""

    def __init__(self) -> None:
        self._newest: dict = {}
        self._there = asyncio.Event()

    def put(self, view: dict) -> None:
        self._newest |= view
        self._there.set()

    async def get(self) -> dict:
        """The newest; waits until there is one that has not been fetched."""
        await self._there.wait()
        self._there.clear()
        newest, self._newest = self._newest, {}
        return newest


class RemoteEngine:
    """The engine's process. All methods are for the event loop's thread.

    arguments: of `worker.main`, behind the pipe. say(text): called with what the process has to say as it starts.
    """

    def __init__(self, *arguments, say: Callable[[str], None] = lambda text: None) -> None:
        self.state, self.problem, self.facts, self.stats = STARTING, "", {}, {}
        self._arguments, self._say = arguments, say
        self._streams: dict[int, Stream] = {}
        self._watchers: set[Watcher] = set()
        self._keys, self._starts, self._changed = itertools.count(), 0, asyncio.Event()
        self._outgoing: list[tuple] = []

    @property
    def load(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def start(self) -> None:
        """Start the process; `ready` waits until it takes requests."""
        context = multiprocessing.get_context("spawn")  # a fork would take this process's threads and locks along
        self._loop, (self._pipe, theirs) = asyncio.get_running_loop(), context.Pipe()
        sys.setswitchinterval(worker.SWITCH)
        self.state, self._starts, self._outgoing = STARTING, self._starts + 1, []
        self.process = context.Process(target=worker.main, args=(theirs, *self._arguments), daemon=True)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C in a terminal is for this process
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()
        threading.Thread(target=self._listen, args=(self._pipe,), daemon=True).start()

    async def ready(self) -> bool:
        """Wait until the process takes requests; False if it cannot."""
        while self.state == STARTING:
            self._changed.clear()
            await self._changed.wait()
        return self.state == READY

    def check_ready(self) -> None:
        """Raises `ApiError` while there is no engine."""
        if self.state != READY:
            raise ApiError(503, self.problem or "the model is being loaded", code="not_ready", retry_after=5)

    def submit(self, request: Request, session: str | None = None) -> Stream:
        """Hand a request in, a turn of a session perhaps. Raises `ApiError` while there is no engine."""
        self.check_ready()
        stream = Stream(next(self._keys))
        self._streams[stream.key] = stream
        self._send("submit", stream.key, request, session)
        return stream

    def abort(self, stream: Stream, whole: bool = False) -> None:
        """End a request, if it has not ended; its last Output comes when the engine has given its blocks back. whole:
        its answer is all that there should be, as behind a stop text."""
        if not stream.ended:
            self._send("end" if whole else "abort", stream.key)

    def command(self, kind: str, value=None) -> None:
        """A command of `glass.Glass`. Raises `ApiError` while there is no engine."""
        self.check_ready()
        self._send(kind, value)

    def watch(self, watcher: Watcher, whether: bool) -> None:
        """Have the engine's views put to a watcher, or no more."""
        (self._watchers.add if whether else self._watchers.discard)(watcher)
        self._send("watch", bool(self._watchers))

    def close(self) -> None:
        """End the process."""
        self.state = CLOSED
        self._send("stop", None)  # to close the pipe would not wake the thread that reads from it
        self._flush()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _send(self, *command) -> None:
        """Commands leave together, when all that is due now has been done: each message costs the thread that reads it
        Python's lock twice, which the engine needs."""
        self._outgoing.append(command)
        if len(self._outgoing) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        commands, self._outgoing = self._outgoing, []
        try:
            if commands:
                self._pipe.send(commands)
        except OSError:
            pass  # the process has ended; `_listen` says so

    def _listen(self, pipe) -> None:
        """In a thread: messages of the process, until it ends."""
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                message = ("ended",)
            try:
                self._loop.call_soon_threadsafe(self._take, pipe, *message)
            except RuntimeError:
                return  # the loop has been closed
            if message[0] == "ended":
                return

    def _take(self, pipe, kind, *rest) -> None:
        if self.state == CLOSED or pipe is not self._pipe:
            return
        if kind == "step":
            outputs, stats = rest
            self.stats = stats or self.stats
            for key, output in outputs:
                stream = self._streams.get(key)
                if stream is not None:
                    stream.put(output)
                    if stream.ended:
                        del self._streams[key]
        elif kind == "view":
            for watcher in self._watchers:
                watcher.put(rest[0])
        elif kind == "progress":
            self._say(rest[0])
        elif kind == "ready":
            self.state, self.facts, self._starts, self.problem = READY, rest[0], 0, ""
            self._send("watch", bool(self._watchers))
        elif kind == "failed":
            self.state, self.problem = FAILED, rest[0]
        elif self.state != FAILED:
            self._ended()
        self._changed.set()

    def _ended(self) -> None:
        """The process is gone: its requests fail, and another one is started."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put(Output(-1, (), "error", GONE))
        self.process.join(1)
        if self._starts >= MOST_STARTS:
            self.state, self.problem = FAILED, f"the engine's process ends as it starts ({self.process.exitcode})"
            return
        self.problem = GONE
        self._say(GONE)
        self.start()
