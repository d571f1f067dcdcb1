"""The same answers over gRPC: one method, which streams. ``generate.proto`` is its contract.

A request becomes the body that /v1/completions would have had, and goes the same way from there. So the limits, the
queue, the counts and the text are the same, and a client that cancels, or whose deadline passes, is one that has gone.
"""

from __future__ import annotations

import asyncio
import os
import time
import traceback

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a port that is taken is said once, by us
import grpc
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from ch14_mini_llm.engine.request import RequestError
from ch14_mini_llm.server import http
from ch14_mini_llm.server.answers import Piece
from ch14_mini_llm.server.contract import METHOD_NAME, SERVICE, GenerateReply, GenerateRequest, Usage
from ch14_mini_llm.server.errors import ApiError, refused
from ch14_mini_llm.server.fields import COMPLETIONS
from ch14_mini_llm.server.generate import Generation
from ch14_mini_llm.server.tokens import KEEPALIVE, Admitted, Server

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED, 404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ABORTED, 413: grpc.StatusCode.RESOURCE_EXHAUSTED, 429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL, 503: grpc.StatusCode.UNAVAILABLE, 504: grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip


class Rpc:
    """The service over a server's state, on a port of its own (0: any free one). address: numbers, not a name; gRPC
    takes 0.0.0.0 for all of IPv6 as well. Raises `RequestError` if the port cannot be had."""

    def __init__(self, server: Server, address: str, port: int) -> None:
        self.server, self.keys = server, [key.encode() for key in server.settings.api_keys]
        self._ending = asyncio.Event()
        self._grpc = grpc.aio.server(options=[
            ("grpc.so_reuseport", 0),  # or a second server would share the port, in silence
            ("grpc.max_receive_message_length", server.settings.max_body),
            ("grpc.keepalive_time_ms", round(KEEPALIVE * 1000)),  # a client that is cut off says nothing
        ])  # fmt: skip
        method = grpc.unary_stream_rpc_method_handler(
            self.generate, response_serializer=GenerateReply.SerializeToString
        )
        self._grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD_NAME: method}),))
        host = f"[{address}]" if ":" in address else address
        try:
            self.address = f"{host}:{self._grpc.add_insecure_port(f'{host}:{port}')}"
        except RuntimeError:
            raise RequestError(f"cannot listen on {address}, port {port}, for gRPC; try another --grpc_port") from None

    async def serve(self) -> None:
        """Serve until `end` is called, and then as long as calls are under way, but no longer than the grace."""
        await self._grpc.start()
        await self._ending.wait()
        await self._grpc.stop(self.server.settings.grace)

    def end(self) -> None:
        """Take no calls any more, and have `serve` return."""
        self._ending.set()

    async def generate(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        """The method. data: a `GenerateRequest`, as it came."""
        try:
            await self._generate(data, context)
        except grpc.aio.InternalError:  # something was sent to a client that had just gone, before we were cancelled
            pass

    async def _generate(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        try:
            http.check_key(dict(context.invocation_metadata() or ()).get("authorization", "").encode(), self.keys)
            admitted = await self.server.admit(COMPLETIONS, _body(data), len(data), time.perf_counter())
            await self._write(admitted, context)
            return
        except ApiError as error:
            failed = error
        except grpc.aio.InternalError:
            raise
        except Exception:
            traceback.print_exc()
            failed = ApiError(500, "a fault of the server's own; it has printed where", code="internal_error")
        facts = {"code": failed.code, "param": failed.param, "retry-after": failed.retry_after}
        trailing = tuple((name, str(value)) for name, value in facts.items() if value is not None)
        await context.abort(CODES.get(failed.status, grpc.StatusCode.UNKNOWN), str(failed), trailing)

    async def _write(self, admitted: Admitted, context: grpc.aio.ServicerContext) -> None:
        """The replies. ``write`` waits for a slow client, and what comes meanwhile is joined."""
        name = admitted.form.id
        pieces = self.server.pieces(admitted.generation, admitted.form)
        try:
            async for new in pieces:
                for piece in new.values():  # of one choice, or of none: nothing is new
                    await context.write(_reply(name, piece, admitted.generation))
                    name = ""
        finally:
            await pieces.aclose()


async def _body(data: bytes) -> dict:
    """What a request would be as JSON. Raises `ApiError`."""
    request = GenerateRequest()
    try:
        request.ParseFromString(data)
    except DecodeError:
        raise ApiError(400, "the message is not a GenerateRequest of generate.proto", code="invalid_message") from None
    for field in UnknownFieldSet(request):  # of a newer contract, or of another one
        message = f"there is no field with the number {field.field_number} here; see generate.proto"
        raise refused(str(field.field_number), message, "unknown_parameter")
    body = {}
    for field, value in request.ListFields():
        if field.message_type is not None:
            value = dict(value)  # a map
        body[field.name] = list(value) if field.is_repeated and not isinstance(value, dict) else value
    if "prompt_ids" in body:
        if "prompt" in body:
            raise refused("prompt_ids", "prompt and prompt_ids are both given: give one of them")
        body["prompt"] = body.pop("prompt_ids")
    return body


def _reply(name: str, piece: Piece, generation: Generation) -> GenerateReply:
    reply = GenerateReply(id=name, text=piece.text, token_ids=[token for _, (token, _) in piece.entries])
    if piece.finish_reason is not None:
        usage = generation.usage
        reply.finish_reason = piece.finish_reason
        reply.usage.CopyFrom(Usage(prompt_tokens=usage.prompt, completion_tokens=usage.new, cached_tokens=usage.cached))
    return reply
