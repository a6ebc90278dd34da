"""WS /v1/realtime/video: one socket, one session. vLLM-Omni's protocol, and ours beside it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from pyengine.errors import InputError, PyEngineError
from pyengine.serve import messages
from pyengine.serve.admission import Busy
from pyengine.serve.encoding import MIMES
from pyengine.serve.ids import is_id, new_id
from pyengine.serve.limits import Bucket, Buckets
from pyengine.serve.messages import Interact, Resume, Seek, StartSession, UnknownType
from pyengine.serve.outbox import Outbox
from pyengine.serve.safety import Gate
from pyengine.serve.scheduler import sentence
from pyengine.serve.sender import Sender, Stalled
from pyengine.serve.service import Service, Start
from pyengine.serve.session import Interaction
from pyengine.serve.wire import Kind, Message

__all__ = ["Live"]

log = logging.getLogger("pyengine.serve")
FIRST_MESSAGE = 10.0  # seconds that a client has to say what it wants
UNAUTHORIZED, MOVED, TRY_AGAIN, BROKEN, RESTART, RULES = 4401, 4409, 1013, 1011, 1012, 1008
HONOURED = {"prompt", "seed", "num_frames", "seconds"}


class Live:
    """Serves sockets. `starts` bounds how often a client may start a session."""

    def __init__(self, service: Service, gate: Gate, pool: ThreadPoolExecutor, starts: Buckets) -> None:
        self.service, self.gate, self.pool, self.starts = service, gate, pool, starts
        self.sockets: set[Connection] = set()

    async def serve(self, socket: WebSocket) -> None:
        await socket.accept()
        connection = Connection(self, socket)
        self.sockets.add(connection)
        try:
            await connection.serve()
        finally:
            self.sockets.discard(connection)

    async def drain(self) -> None:
        """Tells every client that the server goes, so that it comes back and goes on."""
        for connection in list(self.sockets):
            await connection.close(RESTART, "the server restarts; resume")


class Connection:
    """One client. Whatever ends it, its session is parked or removed, and what it held is freed."""

    def __init__(self, live: Live, socket: WebSocket) -> None:
        self._live, self._socket, self._service = live, socket, live.service
        self._sender: Sender | None = None
        self._outbox: Outbox | None = None
        self._bucket = Bucket(20, 40)

    async def serve(self) -> None:
        try:
            first = await self._first()
            if first is None:
                return
            await self._begin(first)
            await self._both()
        except (WebSocketDisconnect, ConnectionError, RuntimeError):  # RuntimeError: sent after a close
            pass
        except Stalled:
            await self.close(TRY_AGAIN, "nothing was read for too long")
        except Busy as busy:
            await self._refuse(str(busy), busy.reason, TRY_AGAIN, retry_after=busy.retry_after)
        except PyEngineError as error:
            await self._refuse(str(error), "invalid_request", RULES)
        except Exception as error:
            number = uuid.uuid4().hex[:12]
            log.exception("a socket failed", extra={"error": number})
            await self._refuse(sentence(error, number), "internal_error", BROKEN)
        finally:
            if self._sender is not None and self._sender.session is not None:
                await self._done(self._service.detach(self._sender.session, self._outbox))

    async def close(self, code: int, reason: str) -> None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2):
                await self._socket.close(code, reason)

    async def _first(self) -> StartSession | Resume | None:
        """What the client wants; None where it was refused."""
        try:
            async with asyncio.timeout(FIRST_MESSAGE):
                message = messages.read(await self._text())
        except TimeoutError:
            await self.close(RULES, "no session.start came")
            return None
        token = getattr(message, "token", None) or self._live.gate.bearer(self._socket.headers)
        if not self._live.gate.admits(token):
            await self.close(UNAUTHORIZED, "a valid token is needed")
            return None
        if not isinstance(message, StartSession | Resume):
            raise InputError("expected session.start or session.resume first")
        client = self._live.gate.client(token, self._socket.client)
        wait = self._live.starts.take(client)
        if wait:
            raise Busy("too many starts; wait a moment", "rate", wait)
        self._owner = self._live.gate.owner(token)
        return message

    async def _begin(self, first: StartSession | Resume) -> None:
        service, latest = self._service, first.delivery == "latest"
        self._outbox = Outbox(asyncio.get_running_loop(), latest)
        sender = Sender(self._socket, service, self._live.pool, self._outbox, first.format, first.quality)
        way: dict[str, Any] = {
            "lead": first.lead_frames,
            "realtime": first.pace == "realtime",
            "latest": latest,
            "owner": self._owner,
        }
        ignored: list[str] = []
        if isinstance(first, StartSession):
            self._check_model(first)
            ignored = self._ignored(first)
            frames = first.num_frames
            if frames is None and first.seconds is not None:
                frames = max(1, round(first.seconds * service.fps))
            start = Start(prompt=first.prompt, seed=first.seed or 0, frames=frames, **way)
            future = service.start(start, self._outbox)
        else:
            if not is_id(first.session_id):
                raise InputError("there is no such session, or the token is another's; start a new one")
            future = service.resume(
                first.session_id, first.resume_token, self._outbox, first.from_frame, Start(**way)
            )
        session, token = await self._done(future)
        sender.session, self._sender = session, sender
        self._interval = first.stats_interval_s
        await sender.json(
            "video.start",
            request_id=session.record.id,
            session_id=session.record.id,
            resume_token=token,
            format=first.format,
            mime=MIMES[first.format],
            fps=service.fps,
            width=service.width,
            height=service.height,
            frames_per_chunk=service.chunk,
            lead_frames=session.pace.lead,
            epoch=session.epoch,
            frame=session.record.first if isinstance(first, StartSession) else first.from_frame,
            prompt=session.record.prompt,
            seed=session.record.seed,
            exact=service.batch.exact,
            config={name: getattr(first, name) for name in ("format", "pace", "delivery", "quality")}
            | {"prompt": session.record.prompt, "seed": session.record.seed},
            ignored=ignored,
        )

    async def _both(self) -> None:
        """Receives and sends until either ends."""
        assert self._sender is not None
        sending = asyncio.create_task(self._sender.run())
        receiving = asyncio.create_task(self._receive())
        tasks = {sending, receiving}
        if self._interval is not None:
            tasks.add(asyncio.create_task(self._tell_stats(self._interval)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        if sending.done() and not sending.cancelled() and sending.exception() is None:
            moved = sending.result() == "moved"
            await self.close(
                MOVED if moved else BROKEN, "resumed elsewhere" if moved else "the session failed"
            )
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _receive(self) -> None:
        """Does what the client says, until it stops or leaves."""
        assert self._sender is not None
        while True:
            text = await self._text()
            if self._bucket.take():
                self._service.metrics.refused.labels("rate").inc()
                await self._sender.json("error", code="rate_limited", message="at most 20 messages a second")
                continue
            try:
                message = messages.read(text)
                if await self._obey(message):
                    return
            except Busy as busy:
                await self._sender.json(
                    "error", code=busy.reason, message=str(busy), retry_after=busy.retry_after
                )
            except PyEngineError as error:
                code = "unknown_type" if isinstance(error, UnknownType) else "invalid_request"
                self._service.metrics.refused.labels(code).inc()
                await self._sender.json("error", code=code, message=str(error))

    async def _obey(self, message: messages.Incoming) -> bool:
        """Whether that was the last."""
        sender, service = self._sender, self._service
        assert sender is not None
        session = sender.session
        assert session is not None
        ask = service.scheduler.ask
        match message:
            case Interact():
                await self._interact(message)
            case messages.Ack(frame=frame):
                await self._done(ask(lambda: session.show(frame)))
            case messages.Pause():
                await self._done(ask(session.pause))
            case messages.Play():
                await self._done(service.play(session))
            case Seek():
                await self._seek(message)
            case messages.Snapshot(store=store):
                await self._snapshot(store)
            case messages.Stats():
                await sender.json("session.stats", **sender.stats())
            case messages.Ping():
                await sender.json("session.pong")
            case messages.Stop():
                # First, since a client may be gone before it is told.
                await self._done(service.end(session.record.id))
                await sender.finish()
                await sender.json(
                    "session.done", request_id=session.record.id, chunks=sender.chunks, stopped=True
                )
                await self.close(1000, "stopped")
                return True
            case _:
                raise InputError("a session has begun; open another socket for another")
        return False

    async def _interact(self, message: Interact) -> None:
        sender, session = self._sender, self._sender.session if self._sender else None
        assert sender is not None
        assert session is not None
        wanted = message.interaction
        if wanted.event.multi_modal_data is not None:
            raise InputError("multi_modal_data cannot be honoured; leave it out")
        self._service.engine.check_prompt(wanted.event.prompt)
        await asyncio.get_running_loop().run_in_executor(
            self._live.pool, self._service.engine.encode_prompt, wanted.event.prompt
        )
        interaction = Interaction(wanted.event_id or new_id(), wanted.event.prompt)
        ignored = ["transition_chunks"] if wanted.transition_chunks else []
        # Before it is taken: its effects are told after.
        if await self._done(self._service.scheduler.ask(lambda: session.knows(interaction.event_id))):
            await sender.json(
                "error",
                code="event_id_conflict",
                message="this event_id was used before",
                event_id=interaction.event_id,
                request_id=session.record.id,
            )
            return
        await sender.json(
            "session.interaction.queued",
            request_id=session.record.id,
            event_id=interaction.event_id,
            **({"ignored": ignored} if ignored else {}),
        )
        await self._done(self._service.scheduler.ask(lambda: session.interact(interaction)))

    async def _seek(self, message: Seek) -> None:
        session = self._sender.session if self._sender else None
        assert session is not None
        if (message.frame is None) == (message.seconds is None):
            raise InputError("expected a frame or seconds, one of the two")
        frame = (
            message.frame if message.frame is not None else round((message.seconds or 0) * self._service.fps)
        )
        await self._done(self._service.seek(session, frame, message.mode == "branch"))

    async def _snapshot(self, store: bool) -> None:
        sender = self._sender
        assert sender is not None
        assert sender.session is not None
        session = sender.session
        if store:
            await self._done(self._service.scheduler.ask(session.store_now))
            await sender.json("session.snapshot", frame=session.frame, session_id=session.record.id)
            return
        pack = await self._done(self._service.snapshot(session.record.id))
        data = await asyncio.get_running_loop().run_in_executor(self._live.pool, pack)
        message = Message(Kind.SNAPSHOT, data, frame=session.frame, epoch=session.epoch)
        await sender.binary(message.pack())

    async def _tell_stats(self, interval: float) -> None:
        assert self._sender is not None
        while True:
            await asyncio.sleep(interval)
            await self._sender.json("session.stats", **self._sender.stats())

    def _check_model(self, first: StartSession) -> None:
        name = self._service.engine.bundle.name
        if first.model not in (None, "", name):
            raise InputError(f"expected the model '{name}' but got '{first.model}'")

    def _ignored(self, first: StartSession) -> list[str]:
        """Fields of vLLM-Omni that were given and cannot be honoured here."""
        service = self._service
        native: dict[str, Any] = {"fps": service.fps, "width": service.width, "height": service.height}
        native |= {"size": f"{service.width}x{service.height}", "model": first.model}
        own = set(messages.Resume.__struct_fields__) | HONOURED
        return [
            name
            for name in first.__struct_fields__
            if name not in own and (value := getattr(first, name)) is not None and value != native.get(name)
        ]

    async def _refuse(self, message: str, code: str, close: int, **more: Any) -> None:
        self._service.metrics.refused.labels(code).inc()
        with contextlib.suppress(Exception):
            data = {"type": "error", "code": code, "message": message, **more}
            async with asyncio.timeout(5):
                await self._socket.send_json(data)
        await self.close(close, message[:100])

    async def _text(self) -> str:
        """The next text message. Raises WebSocketDisconnect."""
        received = await self._socket.receive()
        if received["type"] != "websocket.receive":
            raise WebSocketDisconnect(received.get("code", 1000))
        if received.get("text") is None:
            raise InputError("expected a text message with JSON but got bytes")
        return str(received["text"])

    async def _done(self, future: Future[Any]) -> Any:
        return await asyncio.wrap_future(future)
