"""/v1/sessions: what a client has running, and snapshots that leave and enter as files."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pyengine.serve.ids import is_id
from pyengine.serve.safety import Gate
from pyengine.serve.service import Service, Start
from pyengine.serve.session import Record, Session

__all__ = ["Sessions"]


class Sessions:
    """The routes. A client sees its own sessions alone."""

    def __init__(self, service: Service, gate: Gate) -> None:
        self._service, self._gate = service, gate

    def routes(self) -> list[Route]:
        return [
            Route("/v1/sessions", self.all),
            Route("/v1/sessions", self.adopt, methods=["POST"]),
            Route("/v1/sessions/{name}", self.show),
            Route("/v1/sessions/{name}", self.delete, methods=["DELETE"]),
            Route("/v1/sessions/{name}/snapshot", self.snapshot),
        ]

    async def all(self, request: Request) -> Response:
        owner = self._owner(request)
        sessions = [
            one for one in list(self._service.scheduler.sessions.values()) if one.record.owner == owner
        ]
        return JSONResponse(
            {"object": "list", "data": [self._shown(one) for one in sessions if one.record.live]}
        )

    async def show(self, request: Request) -> Response:
        session = self._service.scheduler.sessions.get(self._record(request).id)
        if session is None:
            return JSONResponse({"id": request.path_params["name"], "object": "session", "state": "parked"})
        return JSONResponse(self._shown(session))

    async def delete(self, request: Request) -> Response:
        record = self._record(request)
        await asyncio.wrap_future(self._service.end(record.id, "deleted"))
        return JSONResponse({"id": record.id, "object": "session.deleted", "deleted": True})

    async def snapshot(self, request: Request) -> Response:
        pack = await asyncio.wrap_future(self._service.snapshot(self._record(request).id))
        data = await asyncio.to_thread(pack)
        headers = {"content-disposition": 'attachment; filename="session.npz"'}
        return Response(data, media_type="application/octet-stream", headers=headers)

    async def adopt(self, request: Request) -> Response:
        """A session from the bytes of a snapshot. It is parked at once; a socket resumes it."""
        data = await request.body()
        start = Start(owner=self._owner(request))
        session, token = await asyncio.wrap_future(
            await asyncio.to_thread(self._service.adopt, data, start, None)
        )
        await asyncio.wrap_future(self._service.detach(session, None))
        return JSONResponse({"id": session.record.id, "resume_token": token, "frame": session.record.first})

    def _shown(self, session: Session) -> dict[str, Any]:
        return {
            "id": session.record.id,
            "object": "session",
            "state": session.state,
            "frame": session.frame,
            "epoch": session.epoch,
            "prompt": session.prompt,
            "seed": session.record.seed,
            "created_at": int(session.record.created),
            "lead_frames": session.pace.lead,
            "unsent": session.unsent,
        }

    def _owner(self, request: Request) -> str:
        return self._gate.owner(self._gate.bearer(request.headers))

    def _record(self, request: Request) -> Record:
        name = request.path_params["name"]
        record = Record.read(self._service.store, name) if is_id(name) else None
        if record is None or record.owner != self._owner(request) or not record.live:
            raise HTTPException(404, "there is no such session")
        return record
