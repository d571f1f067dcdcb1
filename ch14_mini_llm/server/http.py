"""What HTTP asks of us and Starlette does not do: bodies with a limit, clients that go away, events, keys.

All of it is plain ASGI. Starlette's own class for middleware, which hands responses through a queue, hides from a
handler that its client has gone; servers that use it go on making tokens for nobody.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ch14_mini_llm.engine.request import shown
from ch14_mini_llm.server.errors import ApiError

OPEN = {"/", "/health", "/ready"}  # paths that need no key; lessons need none either
DRAINED = 8  # times the limit of a body that are read, and thrown away, before it is refused
DONE = "data: [DONE]\n\n"  # the last event of a stream that ended as it should
GONE = 499  # as nginx logs it: nobody reads the answer


class ClientGone(Exception):
    """Whoever asked has closed the connection."""


def json_of(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def read_json(request: Request, limit: int) -> object:
    """A request's body. limit: bytes. Raises `ApiError` and `ClientGone`."""
    body, length = bytearray(), 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        length += len(message.get("body", b""))
        if length <= limit:
            body += message.get("body", b"")
        elif length > DRAINED * limit:
            break
        if not message.get("more_body"):
            break
    if length > limit:  # most clients read no answer before they have sent everything
        raise ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        message = "it is empty" if not body else "it is nested too deep" if isinstance(error, RecursionError) else error
        raise ApiError(400, f"the body is not JSON: {message}", code="invalid_json") from None


def _refuse(word: str):
    raise ValueError(f"{shown(word)} is no number of JSON")


async def while_there(request: Request, work: Awaitable):
    """The result of ``work``, which is cancelled when the client goes away. Raises `ClientGone`."""
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Server-sent events. events: texts as they go on the wire; closed if the client goes away.

    ``await response.begin()`` first: what fails before the first event still has a status.
    """

    def __init__(self, request: Request, events: AsyncIterator[str]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._request, self._events, self._first = request, events, None

    async def begin(self) -> Events:
        """Wait for the first event. Raises what its maker raises, and `ClientGone`."""
        try:
            self._first = await while_there(self._request, anext(self._events))
        except BaseException:
            await self._events.aclose()
            raise
        return self

    async def __call__(self, scope, receive, send) -> None:
        try:
            await while_there(self._request, self._send(send))
        except (ClientGone, OSError):
            pass
        finally:
            await self._events.aclose()

    async def _send(self, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first.encode(), "more_body": True})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": event != DONE})
            if event == DONE:  # the end in the same breath: some clients read no further, and use the connection again
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))  # `dumps` makes one a call


def event(value: object) -> str:
    """A value as an event."""
    return f"data: {_ENCODER.encode(value)}\n\n"


def check_key(given: bytes, keys: Sequence[bytes]) -> None:
    """Raises `ApiError` unless ``given``, a header Authorization, has one of the keys, or none is asked for."""
    kind, _, key = given.partition(b" ")
    if keys and (kind.lower() != b"bearer" or not any([hmac.compare_digest(key.strip(), one) for one in keys])):
        what = "the key is wrong" if given else "there is no key"
        raise ApiError(401, f"{what}: send the header Authorization: Bearer KEY", code="invalid_api_key")


class Keys:
    """ASGI middleware: without one of the keys, only `OPEN` paths are answered. OPTIONS never needs one."""

    def __init__(self, app, keys: tuple[str, ...]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    @staticmethod
    def guards(path: str) -> bool:
        return path not in OPEN and not path.startswith("/lesson/")

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and self.keys and self.guards(scope["path"]) and scope["method"] != "OPTIONS":
            given = dict(scope["headers"]).get(b"authorization", b"")
            try:
                check_key(given, self.keys)
            except ApiError as error:
                response = json_of(error)
                response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)
