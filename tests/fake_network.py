"""Networks that are Python functions behind the interface of an Executor: the driver and streams run on them without a compiled plan.

Inputs and outputs are described as in a manifest, with the symbolic dims `branches`, `streams`, `frames`, `ring` and so on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from pyengine.bundle.bundle import Latent, Video
from pyengine.bundle.manifest import TensorSpec
from pyengine.bundle.variant import Variant
from pyengine.methods import make_method, method_settings
from pyengine.runtime.host.latents import HostCallBuffers, HostLatentStore
from pyengine.streaming.driver import Driver
from pyengine.streaming.state import StreamState
from pyengine.streaming.stream import open_state

Arrays = dict[str, np.ndarray]
Decode = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class FakeNetwork:
    """A component. `run` takes its inputs and the rings of each lane, which it may write, and gives its outputs."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    run: Callable[[Arrays, Sequence[Arrays]], Arrays]
    rings: Mapping[str, TensorSpec] = field(default_factory=dict)


class FakeDecoder:
    """A decoder in a thread of its own that first sleeps, or, with `seconds` None, one that is done at once.

    `decode(latents, memory)` gives frames and may write the memory, which is the executor's state.
    """

    def __init__(self, decode: Decode, memory: np.ndarray, seconds: float | None) -> None:
        self._decode, self._memory, self._seconds = decode, memory, seconds
        self._thread = ThreadPoolExecutor(1)

    def submit(self, latents: np.ndarray, kept: slice = slice(None), lead: int = 0) -> Future[np.ndarray]:
        clip = self._thread.submit(self._frames, latents, kept, lead)
        if self._seconds is None:
            clip.result()
        return clip

    def outputs(self, latents: int, names: Sequence[str]) -> Arrays:
        return {"pixels": self._pixels}

    def own(self, frames: np.ndarray) -> np.ndarray:
        return frames

    def close(self) -> None:
        self._thread.shutdown()

    def _frames(self, latents: np.ndarray, kept: slice, lead: int) -> np.ndarray:
        time.sleep(self._seconds or 0)
        frames = self._decode(latents, self._memory)
        self._pixels = np.moveaxis(frames, -1, 1) / np.float32(128)
        return frames[kept][lead:]


class FakeExecutor:
    """An Executor on `networks` by component. `sizes` are those of the rings; `calls` has every run with copies of its inputs."""

    device = "cpu"

    def __init__(
        self,
        networks: Mapping[str, FakeNetwork],
        *,
        decode: Decode = lambda latents, memory: latents,
        seconds: float | None = None,
        **sizes: int,
    ) -> None:
        self.networks, self._sizes = networks, sizes
        self.calls: list[tuple[Variant, Arrays]] = []
        self.rings = self.new_rings()
        self.seconds = {"segments": 0.0, "ops": 0.0, "runs": 0.0}
        self._decode, self._seconds = decode, seconds
        self._memory = np.zeros(3, np.float64)
        self._inputs: dict[tuple[str, str, tuple[int, ...]], np.ndarray] = {}
        self._outputs: dict[Variant, Arrays] = {}
        self._attached: dict[Variant, dict[int, Mapping[str, np.ndarray]]] = {}

    def inputs(self, variant: Variant) -> Arrays:
        """As of a plan, variants of a component share an input of equal shape."""
        made, sizes = {}, self._sizes | variant.symbols
        for name, spec in self.networks[variant.component].inputs.items():
            shape = spec.resolve(sizes)
            place = (variant.component, name, shape)
            made[name] = self._inputs.setdefault(place, np.zeros(shape, spec.dtype))
        return made

    def output(self, variant: Variant, name: str) -> np.ndarray:
        if variant not in self._outputs:
            sizes, specs = self._sizes | variant.symbols, self.networks[variant.component].outputs
            self._outputs[variant] = {key: np.zeros(s.resolve(sizes), s.dtype) for key, s in specs.items()}
        return self._outputs[variant][name]

    def run(self, variant: Variant) -> None:
        network, given = self.networks[variant.component], self.inputs(variant)
        self.calls.append((variant, {name: array.copy() for name, array in given.items()}))
        rings = [dict(ring) for _, ring in sorted(self._attached.get(variant, {}).items())]
        for name, value in network.run(given, rings).items():
            output = self.output(variant, name)
            assert output.shape == value.shape, (str(variant), name, output.shape, value.shape)
            output[...] = value

    def new_rings(self) -> Arrays:
        specs = {name: spec for network in self.networks.values() for name, spec in network.rings.items()}
        return {name: np.zeros(spec.resolve(self._sizes), np.float32) for name, spec in specs.items()}

    def attach(self, variant: Variant, lane: int, rings: Mapping[str, np.ndarray]) -> None:
        self._attached.setdefault(variant, {})[lane] = rings

    def latent_store(self, frame_shape: tuple[int, ...], places: int) -> HostLatentStore:
        return HostLatentStore(frame_shape, places)

    def call_buffers(self, variant: Variant) -> HostCallBuffers:
        return HostCallBuffers(self, variant)  # type: ignore[arg-type]

    def codec(self) -> FakeExecutor:
        """Another one with a decoder of its own, for one more stream."""
        return FakeExecutor(self.networks, decode=self._decode, seconds=self._seconds, **self._sizes)

    def decoder(self, *, device_frames: bool = False) -> FakeDecoder:
        assert not device_frames
        return FakeDecoder(self._decode, self._memory, self._seconds)

    def state(self) -> Arrays:
        return {"decoder/memory": self._memory.copy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._memory[...] = state["decoder/memory"]

    def close(self) -> None:
        self._inputs.clear()


def fake_bundle(networks: Mapping[str, FakeNetwork], latent: Latent, frames_per_latent: float = 1) -> Any:
    """What the driver and streams read of a bundle; a picture has a pixel per latent value."""
    return SimpleNamespace(
        name="fake",
        digest="fake",
        latent=latent,
        video=Video(latent.height, latent.width, 8.0, frames_per_latent),
        components={name: SimpleNamespace(inputs=network.inputs) for name, network in networks.items()},
    )


class FakeEngine:
    """What a Stream needs of an engine. Each stream has an executor of its own, made by `executor()`; `encode` reads prompts."""

    def __init__(
        self, bundle: Any, executor: Callable[[], FakeExecutor], encode: Callable[[str], Arrays]
    ) -> None:
        self.bundle, self._executor, self.encode_prompt = bundle, executor, encode

    def check_prompt(self, prompt: str) -> None:
        self.encode_prompt(prompt)

    def program(self, schedule: Any, guidance: float) -> Any:
        return SimpleNamespace(executor=self._executor)

    def restored_settings(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        return dict(saved)


def stream_settings(method: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """What `Engine.stream_settings` makes of arguments."""
    defaults = {"prompt": "", "seed": 0, "frames": None, "chunks": None, "given_chunks": 0, "guidance": 1.0}
    return {**defaults, **options, "method": dict(method)}


def open_stream(
    driver: Driver, latent: Latent, settings: Mapping[str, Any], schedule: Any = None
) -> StreamState:
    """A stream of a driver on a FakeExecutor, prepared for its first call; by default of the schedule that the settings name."""
    executor: Any = driver.executor
    how = method_settings(settings["method"])
    if schedule is None:
        schedule = make_method(how, settings["chunks"], settings["given_chunks"])
    rings, codec = executor.new_rings(), executor.codec()
    sampler, numbered = how.make_sampler(), how.numbering
    state = open_state(driver, schedule, sampler, settings, rings, codec, latent, numbered)
    driver.prepare(state)
    return state


def finish(driver: Driver, state: StreamState, calls: int | None = None) -> list[np.ndarray]:
    """What the decoder gives of each clip, after so many calls or all that are left."""
    while not state.ended and (calls is None or calls > 0):
        driver.step([state])
        calls = None if calls is None else calls - 1
    return [clip.result() for clip in state.clips]
