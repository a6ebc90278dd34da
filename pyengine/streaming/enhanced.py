"""A stream whose frames go through a second stage: a wavefront of chunks that reads the frames of a stream of the first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine.bundle.bundle import Bundle, Video
from pyengine.bundle.second import second_stage
from pyengine.errors import ConfigError, InputError, PromptError
from pyengine.methods import MethodSettings, StreamingT2VSettings, method_settings
from pyengine.methods.enhancement import Enhancement, EnhancerSettings
from pyengine.settings import shown
from pyengine.streaming import snapshot
from pyengine.streaming.driver import Driver
from pyengine.streaming.starts import chunks_for
from pyengine.streaming.stream import Stream, open_state

if TYPE_CHECKING:
    from pyengine.engine import Engine
    from pyengine.streaming.batch import Batch

__all__ = ["EnhancedStream", "enhancer_of", "shown_video"]

SOURCE = "source"  # the snapshot of the first stage, as bytes, inside that of the whole
MOST_PROMPTS = 4096  # that a snapshot may name: those of chunks in flight are a few


class EnhancedStream(Stream):
    """As `Stream`, of frames that the second stage made of the first one's.

    The first stage is asked for frames when a chunk of the second begins and no earlier, so it is always a fixed number of frames
    ahead of what leaves. A video is completed to whole chunks and cut. A prompt holds for the frames that the first stage makes from
    then on, and for the chunks of the second whose middle they are.
    """

    def __init__(
        self,
        engine: Engine,
        settings: dict[str, Any],
        given: Any = None,
        source: Stream | None = None,
    ) -> None:
        """`given`: what the first stage begins with. `source`: the first stage, where it is there already."""
        how = enhancer_of(settings["method"])
        assert how is not None
        stage = self._stage = engine.second_stage()
        video, latent = stage.bundle.video, stage.bundle.latent
        assert video is not None
        assert latent is not None
        frames, exported = settings["frames"], stage.bundle.components["enhancer"].inputs["latents"].shape
        for name, got, want in (
            ("clip_frames", [how.clip_frames], [*exported[1:2]]),
            ("latent", [*how.latent], [*exported[-2:]]),
        ):
            if got != want:
                raise ConfigError(f"[method.enhancer.{name}] expected {want}, as exported, but got {got}")
        schedule = Enhancement(how, None if frames is None else how.chunks_of(frames), settings["seed"])
        self._wave = schedule.wave
        self._given = 0  # frames of the first stage so far
        self._prompts = [(0, str(settings["prompt"]))]  # from which of them on which prompt holds
        self._suffix = how.suffix
        self._features(self._prompts[0][1])  # refuses a prompt before anything is opened
        self._source = Stream(engine, first_stage(engine, settings), given) if source is None else source
        try:
            executor = stage.program(schedule).executor()
            driver = Driver(executor, stage.bundle)
            own = {**settings, "guidance": how.guidance}
            state = open_state(driver, schedule, schedule.sampler, own, {}, executor, latent)
        except BaseException:
            self._source.close()
            raise
        self._begin(engine, settings, video, driver, executor, state)

    @property
    def prompt(self) -> str:
        """What the video shows. Set, it holds for the frames that the first stage makes from then on."""
        return str(self._prompt)

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        with self._lock:
            self._open()
            self._features(prompt)
            self._source.prompt = prompt
            self._prompt = self._settings["prompt"] = prompt
            if self._prompts[-1][0] == self._given:
                self._prompts.pop()
            self._prompts.append((self._given, prompt))

    def close(self) -> None:
        """Free every buffer of both stages, once the call under way is done."""
        super().close()
        self._source.close()

    def _advance(self, calls: int = 1) -> None:
        for _ in range(calls):
            if self._state.ended:
                return
            at = self._wave.step_at(self._state.call)
            if at is not None:
                self._feed(self._wave.needs(self._state.call))
                self._tell(at.frames)
            self._driver.step([self._state])

    def _feed(self, needed: int) -> None:
        """Gives the second stage so many frames of the first, or some more."""
        while self._given < needed:
            frames = next(self._source.clips())
            for latent in self._stage.latents(self._open(), frames):
                self._state.store.give(self._given, latent)
                self._given += 1

    def _tell(self, frames: range) -> None:
        """The prompt of the frame in the middle of a chunk, for the call that comes next."""
        middle = frames[len(frames) // 2]
        (prompt,) = [text for first, text in self._prompts if first <= middle][-1:]
        self._give_text(self._features(prompt))
        oldest = self._wave.first_in_flight(self._state.call)
        past = [index for index, (first, _) in enumerate(self._prompts) if first <= oldest]
        self._prompts = self._prompts[past[-1] :]

    def _features(self, prompt: str) -> dict[str, np.ndarray]:
        return self._stage.features(prompt + self._suffix)

    def _saved(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        header, arrays = super()._saved()
        arrays[SOURCE] = np.frombuffer(self._source.snapshot(), np.uint8)
        return {**header, "given": self._given, "prompts": self._prompts}, arrays

    @classmethod
    def _opened(
        cls,
        engine: Engine,
        settings: dict[str, Any],
        batch: Batch | None,
        header: Mapping[str, Any],
        data: bytes,
    ) -> EnhancedStream:
        source = Stream.restore(engine, snapshot.read_inner(data, SOURCE))
        try:
            expected = {**first_stage(engine, settings), "prompt": source.prompt}
            if source._settings != expected:
                raise InputError(
                    "expected a snapshot whose two stages belong together but they do not; make it again"
                )
            return cls(engine, settings, source=source)
        except BaseException:
            source.close()
            raise

    def _load(
        self,
        header: Mapping[str, Any],
        data: bytes,
        given: int | None = None,
        others: Collection[str] = (),
    ) -> None:
        self._given, self._prompts = self._progress(header)
        super()._load(header, data, self._given, {SOURCE})
        made = self._state.call
        if self._prompts[0][0] > self._wave.first_in_flight(made):
            raise InputError(
                "expected the prompt of every frame in flight in the snapshot but the first ones have none; make it again"
            )
        if made and self._given < self._wave.needs(made - 1):
            raise InputError(
                f"expected a snapshot with {self._wave.needs(made - 1)} frames of the first stage but it says {self._given}; make it again"
            )

    def _progress(self, header: Mapping[str, Any]) -> tuple[int, list[tuple[int, str]]]:
        """Frames given and prompts of a header. Raises InputError, PromptError."""
        given, prompts = header.get("given"), header.get("prompts")
        if type(given) is not int or given != self._source.frames_made:
            raise InputError(
                f"expected 'given' of the snapshot's header to be {self._source.frames_made}, the frames of its first stage, but got "
                f"{shown(given)}; make it again"
            )
        if not isinstance(prompts, list) or not 0 < len(prompts) <= MOST_PROMPTS:
            raise InputError(
                f"expected 'prompts' of the snapshot's header as a list but got {shown(prompts)}"
            )
        found = []
        for entry in prompts:
            if not isinstance(entry, list) or [type(part) for part in entry] != [int, str]:
                raise InputError(
                    f"expected frames and prompts in the snapshot's header but got {shown(entry)}"
                )
            try:
                self._features(entry[1])
            except PromptError as error:
                raise InputError(
                    f"the prompts in the snapshot cannot be used ({error}); make it again"
                ) from error
            found.append((entry[0], entry[1]))
        if any(now[0] < before[0] for before, now in pairwise(found)):
            raise InputError(f"expected 'prompts' of the snapshot's header in order but got {shown(prompts)}")
        return given, found


def enhancer_of(method: Mapping[str, Any] | MethodSettings) -> EnhancerSettings | None:
    """How the frames of a stream with these settings are enhanced; None: they are not. Raises ConfigError."""
    how = method_settings(method) if isinstance(method, Mapping) else method
    return how.enhancer if isinstance(how, StreamingT2VSettings) and how.enhance else None


def shown_video(bundle: Bundle, method: Mapping[str, Any] | MethodSettings) -> Video:
    """Size and rate of the frames of a stream with these settings. Raises BundleError, ConfigError."""
    video = bundle.video if enhancer_of(method) is None else second_stage(bundle).video
    assert video is not None
    return video


def first_stage(engine: Engine, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the stream whose frames are enhanced. It makes whole chunks of the second stage, which are cut."""
    how, own = method_settings(settings["method"]), enhancer_of(settings["method"])
    video = engine.bundle.video
    assert video is not None
    assert own is not None
    frames = None if settings["frames"] is None else own.covered(settings["frames"])
    return {
        **settings,
        "frames": frames,
        "chunks": chunks_for(video, how, frames, settings["given_chunks"]),
        "method": {**settings["method"], "enhance": False},
        "device_frames": False,
    }
