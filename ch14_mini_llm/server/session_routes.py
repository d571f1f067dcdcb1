"""/v1/sessions: what is kept of them can be listed, read, saved under another name, and deleted."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ch14_mini_llm.engine.request import shown
from ch14_mini_llm.server import http, kinds
from ch14_mini_llm.server.errors import ApiError, refused
from ch14_mini_llm.server.sessions import Session
from ch14_mini_llm.server.tokens import Server


class SessionEndpoints:
    """The sessions of a server. Files are read and written in threads: HTTP waits for no disk."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def list(self, request: Request) -> Response:
        found = await asyncio.to_thread(self.server.sessions.all)
        return JSONResponse({"object": "list", "data": [self._short(session) for session in found]})

    async def one(self, request: Request) -> Response:
        """What is asked of one session; HEAD as GET."""
        return await {"POST": self.save, "DELETE": self.delete}.get(request.method, self.read)(request)

    async def read(self, request: Request) -> Response:
        session = await self._session(self._name(request))
        text = await asyncio.to_thread(self.server.tokenizer.decode, session.tokens)
        return JSONResponse({**self._short(session), "tokens": session.tokens, "text": text})

    async def save(self, request: Request) -> Response:
        """Another session's state under a name that is free."""
        name, body = self._name(request), await http.read_json(request, self.server.settings.max_body)
        if not isinstance(body, dict) or set(body) != {"from"}:
            raise refused("from", f'the body is {shown(body)}; it must be {{"from": the name of a session}}')
        session = await self._session(kinds.session("from", body["from"]))
        sessions, now = self.server.sessions, int(time.time())
        self.server.check_idle(name)
        if await asyncio.to_thread(sessions.read, name) is not None:
            raise ApiError(409, f"there is a session {name!r} already: delete it first", "id", "session_exists")
        copy = replace(session, id=name, created=now, updated=now)
        if not await asyncio.to_thread(sessions.write, copy):
            raise ApiError(503, f"the session {name!r} cannot be written; is the disk full?", code="not_written")
        return JSONResponse(self._short(copy))

    async def delete(self, request: Request) -> Response:
        session = await self._session(self._name(request))
        self.server.check_idle(session.id)
        await asyncio.to_thread(self.server.sessions.delete, session, self.server.remote.facts["block_size"])
        return JSONResponse({"id": session.id, "object": "session.deleted", "deleted": True})

    def _name(self, request: Request) -> str:
        return kinds.session("id", request.path_params["name"])

    async def _session(self, name: str) -> Session:
        session = await asyncio.to_thread(self.server.sessions.read, name)
        if session is None:
            raise ApiError(404, f"there is no session {name!r} here", "id", "session_not_found")
        return session

    @staticmethod
    def _short(session: Session) -> dict:
        return {"object": "session", **asdict(session), "tokens": len(session.tokens)}
