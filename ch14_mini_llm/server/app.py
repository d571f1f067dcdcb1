"""The server's endpoints, as an ASGI application.

What a handler raises as `ApiError` is answered in OpenAI's shape; so is what no handler takes (404, 405), and a fault
of ours (500), which is printed.
"""

from __future__ import annotations

import asyncio
import re
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ch14_mini_llm.engine.request import shown
from ch14_mini_llm.server import http, kinds
from ch14_mini_llm.server.errors import ApiError, refused
from ch14_mini_llm.server.openapi import description
from ch14_mini_llm.server.remote import Watcher
from ch14_mini_llm.server.session_routes import SessionEndpoints
from ch14_mini_llm.server.tokens import Server
from ch14_mini_llm.tokenizer.bpe import TokenizerError

PAGE = Path(__file__).with_name("page.html")
CHAPTERS = PAGE.parents[2] / "chapters"


class Endpoints:
    """Whatever makes no tokens."""

    def __init__(self, server: Server) -> None:
        self.server, self.settings, self.remote = server, server.settings, server.remote

    def _model(self) -> dict:
        return {
            "id": self.settings.name, "object": "model", "created": self.server.started,
            "owned_by": "kernel-by-kernel", "max_model_len": self.remote.facts.get("n_ctx"),
        }  # fmt: skip

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.settings.name:
            raise ApiError(404, f"there is no model {shown(name)} here", "model", "model_not_found")
        return JSONResponse(self._model())

    async def tokenize(self, request: Request) -> Response:
        body = await self._object(request, {"prompt", "messages", "model"})
        self.server.check_ready()
        if ("prompt" in body) == ("messages" in body):
            raise refused("prompt", "give a prompt or messages, one of them", "missing_required_parameter")
        if "messages" in body:
            ids = await asyncio.to_thread(self.server.reader.conversation, body["messages"])
        else:
            ids = await asyncio.to_thread(self.server.reader.encode, kinds.text("prompt", body["prompt"]), "prompt")
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.remote.facts["n_ctx"]})

    async def detokenize(self, request: Request) -> Response:
        body = await self._object(request, {"tokens", "model"})
        ids = kinds.token_ids("tokens", body.get("tokens"))
        try:
            return JSONResponse({"prompt": self.server.tokenizer.decode(ids)})
        except TokenizerError as error:
            raise refused("tokens", str(error)) from None

    async def abort(self, request: Request) -> Response:
        body = await self._object(request, {"id"})
        name = kinds.text("id", body.get("id"))
        generation = self.server.running.get(name)
        if generation is not None:
            generation.abort()
        return JSONResponse({"id": name, "aborted": generation is not None})

    async def _object(self, request: Request, known: set[str]) -> dict:
        body = await http.read_json(request, self.settings.max_body)
        if not isinstance(body, dict):
            raise ApiError(400, f"the body is {shown(body)}; it must be a JSON object", code="invalid_body")
        for name in body:
            if name not in known:
                message = f"there is no field {shown(name)} here; there are {', '.join(sorted(known))}"
                raise refused(name[:60], message, "unknown_parameter")
        return body

    # --- the engine behind glass ------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def lesson(self, request: Request) -> Response:
        path = CHAPTERS / request.path_params["name"] / "README.md"
        if not re.fullmatch(r"ch\d\d_\w+", request.path_params["name"]) or not path.exists():
            raise ApiError(404, f"there is no lesson {shown(request.path_params['name'])} here", code="not_found")
        return PlainTextResponse(path.read_text(encoding="utf-8"))

    async def events(self, request: Request) -> Response:
        self.server.check_ready()
        return await http.Events(request, self._views()).begin()

    async def _views(self) -> AsyncIterator[str]:
        watcher = Watcher()
        self.remote.watch(watcher, True)
        try:
            while not self.server.draining:
                try:
                    yield http.event(await asyncio.wait_for(watcher.get(), 1.0))
                except TimeoutError:
                    yield ": nothing new\n\n"
        finally:
            self.remote.watch(watcher, False)

    async def pause(self, request: Request) -> Response:
        return await self._command(request, "pause")

    async def resume(self, request: Request) -> Response:
        return await self._command(request, "resume")

    async def steps(self, request: Request) -> Response:
        return await self._command(request, "steps", 1)

    async def pace(self, request: Request) -> Response:
        """Steps a second; 0: as fast as it can."""
        return await self._command(request, "pace", 0)

    async def _command(self, request: Request, kind: str, least: int | None = None) -> Response:
        body = await self._object(request, set() if least is None else {"n"})
        n = None if least is None else kinds.whole(least, 1000).check("n", body.get("n", least))
        self.remote.command(kind, n)
        return JSONResponse({"done": kind})

    # --- what can be seen from outside ------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        self.server.check_ready()
        return JSONResponse({"status": "ready", **self.remote.facts})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(description(self.settings.name, self.remote.facts.get("vocab_size", 1 << 31)))


def guarded(handler: Callable) -> Callable:
    """A handler whose errors are answers."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except http.ClientGone:
            return Response(status_code=http.GONE)  # to nobody
        except ApiError as error:
            return http.json_of(error)
        except Exception:
            traceback.print_exc()
            return http.json_of(
                ApiError(500, "a fault of the server's own; it has printed where", code="internal_error")
            )

    return endpoint


async def _not_taken(request: Request, error: HTTPException) -> Response:
    """What no route takes: 404 and 405."""
    what = f"there is no {request.url.path[:200]} here" if error.status_code == 404 else error.detail
    if error.status_code == 405:
        what = f"{request.url.path[:200]} does not take {request.method}"
    response = http.json_of(ApiError(error.status_code, what, code="not_found" if error.status_code == 404 else None))
    response.headers.update(error.headers or {})
    return response


def application(server: Server) -> Starlette:
    """The ASGI application."""
    get = lambda path, handler: Route(path, guarded(handler), methods=["GET"])
    post = lambda path, handler: Route(path, guarded(handler), methods=["POST"])
    others, kept = Endpoints(server), SessionEndpoints(server)
    routes = [
        post("/v1/completions", server.completions), post("/v1/chat/completions", server.chat),
        get("/v1/models", others.models), get("/v1/models/{name:path}", others.model),
        post("/tokenize", others.tokenize), post("/detokenize", others.detokenize), post("/abort", others.abort),
        get("/health", others.health), get("/ready", others.ready), get("/metrics", others.show_metrics),
        get("/openapi.json", others.openapi), get("/", others.page), get("/lesson/{name}", others.lesson),
        get("/v1/sessions", kept.list),
        Route("/v1/sessions/{name}", guarded(kept.one), methods=["GET", "POST", "DELETE"]),
        get("/engine/events", others.events), post("/engine/pause", others.pause),
        post("/engine/resume", others.resume), post("/engine/steps", others.steps),
        post("/engine/pace", others.pace),
    ]  # fmt: skip
    cors = Middleware(
        CORSMiddleware, allow_origins=["*"], allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"],
        expose_headers=["Retry-After"],
    )  # fmt: skip
    keys = Middleware(http.Keys, keys=server.settings.api_keys)
    return Starlette(routes=routes, middleware=[cors, keys], exception_handlers={HTTPException: _not_taken})
