"""/v1/videos and /v1/models, as the `openai` package speaks them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from pyengine.errors import ConfigError, InputError
from pyengine.serve.ids import is_id
from pyengine.serve.jobs import Job, Jobs
from pyengine.serve.messages import MOST_PROMPT
from pyengine.serve.safety import Gate, failure

__all__ = ["Videos"]

DEFAULT_SECONDS = "4"
MOST_FIELDS = 32
MOST_UPLOAD = 8 * 2**20


class Videos:
    """The routes. A client sees its own jobs alone."""

    def __init__(self, jobs: Jobs, gate: Gate) -> None:
        self._jobs, self._gate, self._service = jobs, gate, jobs.service

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models),
            Route("/v1/videos", self.create, methods=["POST"]),
            Route("/v1/videos", self.page),
            Route("/v1/videos/sync", self.sync, methods=["POST"]),
            Route("/v1/videos/extensions", self.extend, methods=["POST"]),
            Route("/v1/videos/{name}", self.retrieve),
            Route("/v1/videos/{name}", self.delete, methods=["DELETE"]),
            Route("/v1/videos/{name}/content", self.content),
            Route("/v1/videos/{name}/remix", self.remix, methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        service = self._service
        words = (
            getattr(service.engine.tokenizer, "words", None)
            if service.engine.bundle.text is not None
            else None
        )
        model = {
            "id": service.engine.bundle.name,
            "object": "model",
            "created": 0,
            "owned_by": "pyengine",
            "fps": service.fps,
            "size": f"{service.width}x{service.height}",
            "frames_per_chunk": service.chunk,
            "prompt_words": words if isinstance(words, list) else None,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def create(self, request: Request) -> Response:
        return self._answer(await self._add(request))

    async def sync(self, request: Request) -> Response:
        """Waits for the video and answers with it. A client that leaves ends the job."""
        job = await self._add(request)
        while not (job := self._jobs.get(job.id, job.owner) or job).is_over:
            if await request.is_disconnected():
                await asyncio.to_thread(self._jobs.delete, job)
                return Response(status_code=499)
            await asyncio.sleep(0.05)
        if job.error is not None:
            return failure(500, job.error["message"], job.error["code"])
        headers = {"x-request-id": job.id, "x-model": self._service.engine.bundle.name}
        headers["x-inference-time-s"] = f"{job.took or 0:.3f}"
        return FileResponse(self._jobs.file(job), media_type="video/mp4", headers=headers)

    async def page(self, request: Request) -> Response:
        query = request.query_params
        try:
            limit = int(query.get("limit", "20"))
        except ValueError:
            raise InputError("expected limit as a whole number") from None
        order = query.get("order", "desc")
        if order not in ("asc", "desc") or not 1 <= limit <= 100:
            raise InputError("expected order as asc or desc, and limit from 1 to 100")
        jobs = self._jobs.all(self._owner(request))
        jobs = jobs[::-1] if order == "desc" else jobs
        if (after := query.get("after")) is not None:
            places = [place for place, job in enumerate(jobs) if job.id == after]
            jobs = jobs[places[0] + 1 :] if places else []
        page = jobs[:limit]
        body = {"object": "list", "data": [self._video(job) for job in page], "has_more": len(jobs) > limit}
        body |= {"first_id": page[0].id if page else None, "last_id": page[-1].id if page else None}
        return JSONResponse(body)

    async def retrieve(self, request: Request) -> Response:
        return self._answer(self._job(request))

    async def delete(self, request: Request) -> Response:
        job = self._job(request)
        await asyncio.to_thread(self._jobs.delete, job)
        return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})

    async def content(self, request: Request) -> Response:
        job = self._job(request)
        if request.query_params.get("variant", "video") != "video":
            raise InputError("expected the variant video; there are no others")
        if job.status != "completed":
            return failure(409, f"the video is {job.status}; wait until it is completed", "not_completed")
        return FileResponse(self._jobs.file(job), media_type="video/mp4")

    async def remix(self, request: Request) -> Response:
        body = await _json(request)
        job = await asyncio.to_thread(self._jobs.remix, self._job(request), _prompt(body.get("prompt")))
        return self._answer(job)

    async def extend(self, request: Request) -> Response:
        """As `remix`, with the video's id in the body."""
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise InputError(
                'expected JSON such as {"video": {"id": ...}, "prompt": ...}; uploaded videos are not continued'
            )
        body = await _json(request)
        video = body.get("video")
        source = self._find(video.get("id") if isinstance(video, dict) else None, request)
        return self._answer(await asyncio.to_thread(self._jobs.remix, source, _prompt(body.get("prompt"))))

    async def _add(self, request: Request) -> Job:
        service = self._service
        fields, ignored = await self._fields(request)
        name = service.engine.bundle.name
        if (model := fields.pop("model", None)) not in (None, "", name):
            raise HTTPException(
                404, f"model_not_found: expected the model '{name}' but got '{str(model)[:80]}'"
            )
        native = f"{service.width}x{service.height}"
        if (size := fields.pop("size", None)) not in (None, "", native):
            raise ConfigError(f"expected the size {native} but got '{str(size)[:40]}'")
        prompt, seconds = (
            _prompt(fields.pop("prompt", "")),
            str(fields.pop("seconds", None) or DEFAULT_SECONDS),
        )
        frames, seed = fields.pop("num_frames", None), fields.pop("seed", None)
        count = (
            _whole("num_frames", frames)
            if frames is not None
            else round(_number("seconds", seconds) * service.fps)
        )
        if count < 1:
            raise ConfigError(f"expected a length of at least one frame but got {count}")
        if frames is not None:
            seconds = f"{count / service.fps:g}"
        job = Job(
            prompt=prompt,
            seed=0 if seed is None else _whole("seed", seed),
            frames=count,
            seconds=seconds,
            owner=self._owner(request),
            ignored=tuple(sorted({*ignored, *(str(name)[:64] for name in fields)})),
        )
        return await asyncio.to_thread(self._jobs.add, job)

    async def _fields(self, request: Request) -> tuple[dict[str, Any], list[str]]:
        """Text parts by name, and the names of files, which cannot be honoured."""
        if request.headers.get("content-type", "").startswith("application/json"):
            return await _json(request), []
        fields: dict[str, Any] = {}
        files = []
        async with request.form(max_files=1, max_fields=MOST_FIELDS, max_part_size=MOST_UPLOAD) as form:
            for name, value in form.multi_items():
                if isinstance(value, str):
                    fields[name] = value
                else:
                    files.append(name[:64])
        return fields, files

    def _answer(self, job: Job) -> Response:
        wait = max(100, min(5000, round(1000 * self._jobs.remaining(job))))
        return JSONResponse(self._video(job), headers={"openai-poll-after-ms": str(wait)})

    def _video(self, job: Job) -> dict[str, Any]:
        service = self._service
        return {
            "id": job.id,
            "object": "video",
            "created_at": job.created_at,
            "completed_at": job.completed_at,
            "expires_at": job.created_at + round(service.options.keep),
            "model": service.engine.bundle.name,
            "progress": self._jobs.progress(job),
            "prompt": job.prompt,
            "seconds": job.seconds,
            "size": f"{service.width}x{service.height}",
            "status": job.status,
            "error": job.error,
            "remixed_from_video_id": job.remixed_from,
            "fps": service.fps,
            "num_frames": job.frames,
            "seed": job.seed,
            "inference_time_s": job.took,
            "ignored": list(job.ignored),
        }

    def _owner(self, request: Request) -> str:
        return self._gate.owner(self._gate.bearer(request.headers))

    def _job(self, request: Request) -> Job:
        return self._find(request.path_params["name"], request)

    def _find(self, name: object, request: Request) -> Job:
        job = self._jobs.get(name, self._owner(request)) if is_id(name) and isinstance(name, str) else None
        if job is None:
            raise HTTPException(404, "there is no such video")
        return job


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise InputError("expected JSON in the body") from None
    if not isinstance(body, Mapping):
        raise InputError("expected an object in the body")
    return dict(body)


def _prompt(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MOST_PROMPT:
        raise InputError(f"expected a prompt of at most {MOST_PROMPT} characters")
    return value


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number <= 10**9:
        raise ConfigError(f"expected {name} as a number but got {str(value)[:40]!r}")
    return number


def _whole(name: str, value: Any) -> int:
    try:
        return int(str(value)[:40])
    except ValueError:
        raise ConfigError(f"expected {name} as a whole number but got {str(value)[:40]!r}") from None
