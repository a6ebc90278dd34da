"""Sender: what a session gives, to one WebSocket, at the pace of whoever reads there."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from starlette.websockets import WebSocket

from pyengine.serve.encoding import Encoder, Fragments, encoder
from pyengine.serve.outbox import Notice, Outbox
from pyengine.serve.service import Service
from pyengine.serve.session import Piece, Session
from pyengine.serve.wire import Flag, Kind, Message

__all__ = ["Sender", "Stalled"]

STALL = 30.0  # seconds that one message may take to leave


class Stalled(Exception):
    """The client has not read for too long."""


@dataclass
class _Event:
    """A prompt on its way through the video."""

    name: str
    frame: int
    complete: int | None
    is_told: bool = False


class Sender:
    """Owns what leaves on a socket: every message goes through `json` or `binary`, one at a time."""

    def __init__(
        self,
        socket: WebSocket,
        service: Service,
        pool: ThreadPoolExecutor,
        outbox: Outbox,
        name: str,
        quality: int,
    ) -> None:
        self._socket, self._service, self._pool, self._outbox = socket, service, pool, outbox
        self.session: Session | None = None
        self.format = name
        self.started = time.monotonic()
        self._fragments = Fragments(service.fps, quality) if name == "m4s" else None
        self._encoder: Encoder | None = None if name == "m4s" else encoder(name, service.fps, quality)
        self._events: list[_Event] = []
        self._lock = asyncio.Lock()
        self._sent_at: deque[tuple[float, int]] = deque(maxlen=240)
        self._epoch = self._dropped = 0
        self.chunks = self.frames = self.bytes = 0
        self.switch: float | None = None

    async def json(self, kind: str, **data: Any) -> None:
        """A text message. Raises Stalled."""
        await self._send(msgspec.json.encode({"type": kind, **data}).decode(), None)

    async def binary(self, data: bytes) -> None:
        await self._send(None, data)

    async def run(self) -> str:
        """Sends until the session is over; returns why: "failed" or "moved"."""
        while True:
            item = await self._outbox.take()
            if isinstance(item, Piece):
                await self._piece(item)
            elif (reason := await self._notice(item)) is not None:
                return reason

    async def finish(self) -> None:
        """The rest of an MP4."""
        if self._fragments is not None:
            data, frames = await self._in_pool(self._fragments.finish)
            if data:
                await self._fragment("trailer", data, frames, {})

    def stats(self) -> dict[str, Any]:
        """Figures of this socket and its session."""
        session, service = self.session, self._service
        assert session is not None
        times, gaps = list(self._sent_at), []
        for (before, _), (after, frames) in itertools.pairwise(times):
            gaps += [(after - before) * 1000 / frames] * frames
        span = times[-1][0] - times[0][0] if len(times) > 1 else 0.0
        percentiles = np.percentile(gaps, [50, 95, 99]).round(1).tolist() if gaps else [None] * 3
        return {
            "state": session.state,
            "frame": session.frame,
            "fps": round(sum(frames for _, frames in times[1:]) / span, 1) if span else None,
            "lead_frames": session.pace.lead,
            "interval_ms": dict(zip(("p50", "p95", "p99"), percentiles, strict=True)),
            "prompt_ms": None if self.switch is None else round(self.switch * 1000, 1),
            "batch": sum(one.state == "playing" for one in list(service.scheduler.sessions.values())),
            "call_ms": round(service.scheduler.call_seconds * 1000, 1),
            "unsent": session.unsent,
            "dropped": self._outbox.dropped,
            "bytes": self.bytes,
        }

    async def _piece(self, piece: Piece) -> None:
        session = self.session
        assert session is not None
        if piece.epoch >= session.epoch:  # else it is of before a seek
            started = time.perf_counter()
            if self._fragments is not None:
                await self._media(piece)
            else:
                await self._pictures(piece)
            self._service.metrics.encode.labels(self.format).observe(time.perf_counter() - started)
            await self._completed(piece)
            self._count(piece)
        sent, epoch = len(piece.frames), piece.epoch
        self._service.scheduler.ask(lambda: session.sent(sent, epoch))

    async def _pictures(self, piece: Piece) -> None:
        encoder = self._encoder
        assert encoder is not None
        if piece.epoch != self._epoch:
            self._epoch = piece.epoch
            encoder.restart()
        height, width = piece.frames.shape[1:3]
        encoded = await self._in_pool(lambda: encoder.encode(piece.frames))
        for index, one in enumerate(encoded):
            flags = Flag.KEY if one.is_key else Flag(0)
            flags |= Flag.LAST_OF_CHUNK if index == len(encoded) - 1 else Flag(0)
            flags |= Flag.REPLAYED if piece.replayed else Flag(0)
            message = Message(
                Kind.FRAME,
                one.data,
                flags,
                encoder.codec,
                piece.first + index,
                piece.epoch,
                piece.events,
                width,
                height,
            )
            await self.binary(message.pack())

    async def _media(self, piece: Piece) -> None:
        fragments = self._fragments
        assert fragments is not None
        data, frames = await self._in_pool(lambda: fragments.encode(piece.frames))
        last = piece.first + len(piece.frames)
        started = [event for event in self._events if event.frame < last]
        news = {
            "started_event_ids": [event.name for event in started if event.frame >= piece.first],
            "active_event_ids": [
                event.name for event in started if event.complete is None or event.complete >= last
            ],
            "completed_event_ids": [
                event.name
                for event in started
                if event.complete is not None and piece.first <= event.complete < last
            ],
        }
        await self._fragment("media", data, frames, news)

    async def _fragment(self, kind: str, data: bytes, frames: int, news: dict[str, list[str]]) -> None:
        assert self.session is not None
        none: dict[str, list[str]] = {
            "started_event_ids": [],
            "active_event_ids": [],
            "completed_event_ids": [],
        }
        head = {
            "request_id": self.session.record.id,
            "kind": kind,
            "num_frames": frames,
            "byte_length": len(data),
            "generation_chunk_index": self.chunks,
            "transport_chunk_index": self.chunks,
            **(none | news),
        }
        text = msgspec.json.encode({"type": "video.chunk_metadata", **head}).decode()
        await self._send(text, data)

    async def _completed(self, piece: Piece) -> None:
        last = piece.first + len(piece.frames)
        for event in self._events:
            if event.complete is not None and event.complete < last and not event.is_told:
                event.is_told = True
                await self.json("session.interaction.completed", event_id=event.name, frame=event.complete)
        self._events = [event for event in self._events if not event.is_told][-64:]

    async def _notice(self, notice: Notice) -> str | None:
        data, session = notice.data, self.session
        assert session is not None
        if notice.kind == "applied":
            self._events = [known for known in self._events if known.name != data["event_id"]]
            self._events.append(_Event(data["event_id"], data["frame"], data["complete"]))
            await self.json("session.interaction.applied", **data)
        elif notice.kind == "refused":
            await self.json("error", code="interaction_failed", **data)
        elif notice.kind == "timed":
            self.switch = data["seconds"]
            self._service.metrics.switch.observe(data["seconds"])
        elif notice.kind == "state":
            await self.json("session.state", **data)
        elif notice.kind == "ended":
            await self.finish()
            await self.json("session.done", request_id=session.record.id, chunks=self.chunks, stopped=False)
        elif notice.kind == "failed":
            await self.json("error", code="session_failed", **data)
            return "failed"
        elif notice.kind == "moved":
            await self.json("session.moved", session_id=session.record.id)
            return "moved"
        return None

    def _count(self, piece: Piece) -> None:
        now, frames = time.monotonic(), len(piece.frames)
        metrics = self._service.metrics
        if not self.frames:
            metrics.first_frame.observe(now - self.started)
        elif self._sent_at:
            metrics.interval.observe((now - self._sent_at[-1][0]) / frames)
        self._sent_at.append((now, frames))
        if self._outbox.dropped > self._dropped:
            metrics.frames_dropped.inc(self._outbox.dropped - self._dropped)
            self._dropped = self._outbox.dropped
        self.chunks, self.frames = self.chunks + 1, self.frames + frames
        metrics.frames_sent.labels(self.format).inc(frames)

    async def _send(self, text: str | None, data: bytes | None) -> None:
        """A text, bytes, or both with nothing between them."""
        async with self._lock:
            try:
                async with asyncio.timeout(STALL):
                    if text is not None:
                        await self._socket.send_text(text)
                    if data is not None:
                        await self._socket.send_bytes(data)
            except TimeoutError:
                raise Stalled from None
        if data is not None:
            self.bytes += len(data)
            self._service.metrics.bytes_sent.labels(self.format).inc(len(data))

    async def _in_pool(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
