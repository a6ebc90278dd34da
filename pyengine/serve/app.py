"""The app: every route, for uvicorn or any other ASGI server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles

from pyengine.errors import PyEngineError
from pyengine.serve.admission import Busy
from pyengine.serve.jobs import Jobs
from pyengine.serve.limits import Buckets
from pyengine.serve.live import Live
from pyengine.serve.safety import Gate, Safety, failure
from pyengine.serve.scheduler import sentence
from pyengine.serve.service import Service
from pyengine.serve.sessions import Sessions
from pyengine.serve.videos import Videos

__all__ = ["make_app"]

log = logging.getLogger("pyengine.serve")
PAGE = Path(__file__).parent / "page"
MOST_BODY = 64 * 2**20  # a snapshot
STARTS_PER_MINUTE = 60


def make_app(service: Service, gate: Gate, videos: Path) -> Starlette:
    """`videos` is the folder of the files that jobs make. When the app stops, every session is parked."""
    pool = ThreadPoolExecutor(2, "pyengine-encode")
    jobs = Jobs(service, videos)
    live = Live(service, gate, pool, Buckets(STARTS_PER_MINUTE / 60, STARTS_PER_MINUTE))

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def health(request: Request) -> Response:
        problem = service.failure or service.scheduler.stuck
        if problem is not None:
            return JSONResponse({"status": "unhealthy", "reason": problem}, 503)
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        if service.ready:
            return JSONResponse({"status": "ready"})
        done, total = service.progress
        stage = "draining" if service.draining else "warming up"
        return JSONResponse({"status": stage, "stage": stage, "done": done, "total": total}, 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.draining = True
        await live.drain()
        await asyncio.to_thread(jobs.close)
        await asyncio.to_thread(service.close)
        pool.shutdown()

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", metrics),
            WebSocketRoute("/v1/realtime/video", live.serve),
            *Sessions(service, gate).routes(),
            *Videos(jobs, gate).routes(),
            Mount("/static", StaticFiles(directory=PAGE)),
        ],
        middleware=[
            Middleware(Safety, gate=gate),
            Middleware(RequestBodyLimitMiddleware, max_body_size=MOST_BODY),
        ],
        exception_handlers={
            Busy: _busy,
            PyEngineError: _refused,
            HTTPException: _http,
            Exception: _internal,
        },
        lifespan=lifespan,
    )
    app.state.live = live
    return app


async def _busy(request: Request, error: Exception) -> Response:
    assert isinstance(error, Busy)
    return failure(
        429 if error.reason != "not_ready" else 503,
        str(error),
        error.reason,
        **{"retry-after": str(max(1, round(error.retry_after)))},
    )


async def _refused(request: Request, error: Exception) -> Response:
    return failure(400, str(error), "invalid_request")


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code, _, detail = error.detail.partition(": ") if ": " in error.detail else ("", "", error.detail)
    return failure(
        error.status_code, detail, code or {404: "not_found", 413: "too_large"}.get(error.status_code, "http")
    )


async def _internal(request: Request, error: Exception) -> Response:
    number = uuid.uuid4().hex[:12]
    log.error("a request failed", exc_info=error, extra={"error": number})
    return failure(500, sentence(error, number), "internal_error")
