"""Stream: one running generation, frame by frame."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine.arguments import check_length
from pyengine.bundle.bundle import Latent
from pyengine.device.array import joined
from pyengine.errors import InputError, OutputError, StreamClosed
from pyengine.methods import Hierarchical, Method, make_method
from pyengine.runtime.executor import Executor
from pyengine.runtime.host.decoder import Clip
from pyengine.schedule.samplers import make_sampler
from pyengine.streaming.clips import Clips
from pyengine.streaming.window import Window

if TYPE_CHECKING:
    from pyengine.engine import Engine

__all__ = ["Stream", "check_length"]

SNAPSHOT_FORMAT = 1
# Calls of the next chunk that run while a finished chunk is decoded. A fixed number, so that what a prompt set between two clips
# changes never depends on timing.
CALLS_DURING_DECODE = 1


class Stream:
    """Frames of one generation, made as they are asked for. Get one from `engine.stream(...)`; close it or use it in a `with`.

    Iterating gives frames, uint8 [height, width, 3]; `clips()` gives them as they leave the decoder, uint8 [frames, height, width, 3].
    With `device_frames` both are DeviceArrays that stay on the card.

    A stream is used from one thread at a time; several streams of one engine may run in several threads.
    """

    def __init__(self, engine: Engine, settings: dict[str, Any], given: np.ndarray | None = None) -> None:
        """`settings` as `Engine.stream` makes them; `given` are clean latents that the video continues [frames, c, h, w]."""
        bundle = engine.bundle
        assert bundle.video is not None  # Engine refuses other bundles
        assert bundle.latent is not None
        self._engine, self._settings, self._video = engine, settings, bundle.video
        self.frames: int | None = settings["frames"]
        self._method = make_method(settings["method"], settings["chunks"], settings["given_chunks"])
        program = engine.program(self._method, settings["guidance"])
        self._executor: Executor | None = program.executor()
        self._window = _open_window(self._executor, bundle.latent, self._method, settings)
        if isinstance(self._method, Hierarchical):
            self.frames = self._method.shortened(self.frames, bundle.video.frames_per_latent)
        self._decoder = self._executor.decoder(device_frames=settings.get("device_frames", False))
        self._clips: deque[Clip] = deque()
        self._rest: deque[Any] = deque()  # frames of a clip that the caller has not taken yet
        self.frames_made = 0  # frames handed out so far
        self._features: dict[str, np.ndarray] = {}
        self._prompt = settings["prompt"]
        self._set_text(self._prompt)
        if given is not None:
            self._window.give(given)
            for start in range(0, len(given), self._method.chunk_frames):
                # Fills the decoder's memory; the caller has the frames.
                self._decoder.submit(given[start : start + self._method.chunk_frames]).result()

    @property
    def prompt(self) -> str:
        """What the video shows. Setting it re-caches the context, so that the change shows within one window."""
        return str(self._prompt)

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self._open()
        self._engine.check_prompt(prompt)  # refuses a bad prompt before anything changes
        self._settle()
        if isinstance(self._window, Clips):
            self._window.recache()  # refuses on the way
        self._prompt = self._settings["prompt"] = prompt
        self._set_text(prompt)
        if isinstance(self._window, Window):
            self._window.recache()

    @property
    def fps(self) -> float:
        """Frames per second of the finished video."""
        return self._video.fps

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._open()
        if self.frames is not None and self.frames_made >= self.frames:
            raise StopIteration
        if not self._rest:
            self._rest.extend(self._next_clip())
        self.frames_made += 1
        return self._rest.popleft()

    def clips(self) -> Iterator[Any]:
        """Frames as they become ready, one chunk at a time. uint8 [frames, height, width, 3]"""
        while True:
            self._open()
            left = None if self.frames is None else self.frames - self.frames_made
            if left == 0:
                return
            clip = joined(self._rest) if self._rest else self._next_clip()
            self._rest.clear()
            if left is not None and len(clip) > left:
                clip = clip[:left]
            self.frames_made += len(clip)
            yield clip

    def snapshot(self, path: str | Path | None = None) -> bytes:
        """All that the stream depends on, as bytes and, with `path`, to a file. Raises OutputError.

        `engine.resume` continues bit-identically on the same plan.
        """
        executor = self._open()
        self._settle()
        clips = [future.result() for future in self._clips]
        pending = [*self._rest, *(frame for clip in clips for frame in clip)]
        video = self._video
        arrays = {f"window/{name}": value for name, value in self._window.state().items()}
        arrays |= {f"executor/{name}": value for name, value in executor.state().items()}
        arrays["pending"] = (
            np.stack([np.asarray(frame) for frame in pending])
            if pending
            else np.zeros((0, video.height, video.width, 3), np.uint8)
        )
        header = {
            "format": SNAPSHOT_FORMAT,
            "bundle": self._engine.bundle.digest,
            "settings": self._settings,
            "frames_made": self.frames_made,
        }
        buffer = io.BytesIO()
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        data = buffer.getvalue()
        if path is not None:
            try:
                Path(path).write_bytes(data)
            except OSError as error:
                raise OutputError(
                    f"cannot write the snapshot '{path}': {error.strerror}; choose another place"
                ) from error
        return data

    @classmethod
    def restore(cls, engine: Engine, data: bytes) -> Stream:
        """The stream that `snapshot` saved. Raises InputError if the bytes are not a snapshot of this engine's bundle."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            header = json.loads(arrays.pop("header").tobytes())
        except Exception as error:
            raise InputError(
                f"expected a snapshot that Stream.snapshot made but cannot read this one ({error})"
            ) from error
        if header.get("format") != SNAPSHOT_FORMAT:
            raise InputError(
                f"expected a snapshot of format {SNAPSHOT_FORMAT} but got {header.get('format')!r}; make it again"
            )
        if header["bundle"] != engine.bundle.digest:
            raise InputError(
                f"the snapshot is of another bundle than '{engine.bundle.name}' as loaded; load the one it was made with"
            )
        stream = cls(engine, header["settings"])
        try:
            executor = stream._open()
            executor.load_state(
                {name[9:]: value for name, value in arrays.items() if name.startswith("executor/")}
            )
            stream._window.load_state(
                {name[7:]: value for name, value in arrays.items() if name.startswith("window/")}
            )
        except Exception:
            stream.close()
            raise
        stream._rest.extend(stream._decoder.own(arrays["pending"]))
        stream.frames_made = header["frames_made"]
        return stream

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far, in seconds: `segments` (the backend), `ops` (our kernels), `runs` (both and the walk between them)."""
        return self._open().seconds

    @property
    def calls_made(self) -> int:
        """Calls of the network so far."""
        return self._window.call - self._method.first_call

    def close(self) -> None:
        """Free every buffer. A closed stream raises StreamClosed; the engine goes on."""
        if self._executor is None:
            return
        self._decoder.close()
        self._executor.close()
        self._executor = None
        self._clips.clear()
        self._rest.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Executor:
        if self._executor is None:
            raise StreamClosed(
                "the stream is closed; start another with engine.stream(...), or engine.resume(...) a snapshot"
            )
        return self._executor

    def _set_text(self, prompt: str) -> None:
        self._window.set_text(self._engine.encode_prompt(prompt))

    def _next_clip(self) -> Any:
        """Run calls until a clip is on its way, a little further while it is decoded, and wait for it."""
        while not self._clips:
            self._call()
        if not self._clips[0].done():
            for _ in range(CALLS_DURING_DECODE):
                self._call()
        return self._clips.popleft().result()

    def _call(self) -> None:
        calls = self._method.calls
        if calls is not None and self._window.call >= calls:
            return
        for chunk, latents in self._window.advance():
            if isinstance(self._method, Hierarchical):
                kept = self._method.kept(len(latents), chunk == 0)
                self._clips.append(self._decoder.submit(latents, kept))
            else:
                self._clips.append(self._decoder.submit(latents))

    def _settle(self) -> None:
        """Wait for every decode under way."""
        for clip in self._clips:
            clip.result()


def _open_window(
    executor: Executor, latent: Latent, method: Method, settings: dict[str, Any]
) -> Window | Clips:
    """What obeys the method's schedule."""
    guidance, seed = settings["guidance"], settings["seed"]
    if isinstance(method, Hierarchical):
        return Clips(executor, latent, method, guidance=guidance, seed=seed)
    sampler = make_sampler(settings["method"]["sampler"])
    return Window(executor, latent, method, sampler, guidance=guidance, seed=seed)
