"""Causal Wan's transformer behind the real driver, as torch runs it, with the noise that the reference drew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from fake_network import Arrays, FakeExecutor, FakeNetwork, fake_bundle, stream_settings
from torch import Tensor

from pyengine.bundle.manifest import Component, Latent, TensorSpec
from pyengine.export.families.wan import CausalWan
from pyengine.export.families.wan.causal_wan import WanConfig
from pyengine.export.families.wan.streaming import StreamingWan, Tables, TextProjector
from pyengine.methods import make_method, method_settings
from pyengine.methods.causal import Causal
from pyengine.runtime.executor import Executor
from pyengine.streaming.driver import Driver
from pyengine.streaming.state import StreamState
from pyengine.streaming.stream import open_state

Noise = Callable[
    [int, int, int | None], np.ndarray
]  # (stream, frame, denoising call or None at birth) -> a latent


def exported_module(
    model: CausalWan, levels: Sequence[float], timesteps: Sequence[float], latent: tuple[int, int], mask: str
) -> StreamingWan:
    """The module that is exported, with its weights."""
    tables = Tables.of(model.state_dict().__getitem__, model.config, timesteps)
    return StreamingWan(model, tables, latent, levels, mask).eval()


def portable(component: Component, path: Path) -> Callable[..., list[Tensor]]:
    """The exported module again, as portable ONNX runs it."""
    session = ort.InferenceSession(path)
    outputs = list(component.outputs)

    def run(*inputs: Tensor | list[Tensor]) -> list[Tensor]:
        flat = [part for given in inputs for part in ([given] if isinstance(given, Tensor) else given)]
        feeds = {name: part.numpy() for name, part in zip(component.inputs, flat, strict=True)}
        return [torch.from_numpy(value) for value in session.run(outputs, feeds)]

    return run


def denoiser(
    config: WanConfig, latent: tuple[int, int], module: Callable[..., Sequence[Tensor]]
) -> FakeNetwork:
    """The exported module, or what takes its arguments, as a network of a fake plan."""
    rows, columns = config.grid(*latent)
    kept: tuple[int | str, ...] = (1, "ring", rows * columns, config.num_heads, config.head_size)
    window: tuple[int | str, ...] = ("streams", "frames")
    text = ("branches", "streams", config.num_heads, config.text_len, config.head_size)
    layers = range(config.num_layers)
    inputs = {
        "latents": TensorSpec((*window, config.in_dim, *latent), "float32"),
        "level": TensorSpec(window, "float32"),
        "frame_index": TensorSpec(window, "int64"),
        "ring_index": TensorSpec(("streams", "ring"), "int64"),
        "append_slot": TensorSpec(window, "int64"),
        **{
            f"text_{kind}.{index}": TensorSpec(text, "float32")
            for kind in ("key", "value")
            for index in layers
        },
    }
    outputs = {"prediction": TensorSpec(("branches", *window, config.in_dim, *latent), "float32")}
    rings = {
        f"ring_{kind}.{index}": TensorSpec(kept, "float32") for kind in ("key", "value") for index in layers
    }

    def run(given: Arrays, lanes: Sequence[Arrays]) -> Arrays:
        def listed(name: str) -> list[Tensor]:
            return [torch.from_numpy(given[f"{name}.{index}"]) for index in layers]

        def ring(name: str) -> list[Tensor]:
            return [
                torch.from_numpy(np.concatenate([lane[f"{name}.{index}"] for lane in lanes]))
                for index in layers
            ]

        numbers = (
            torch.from_numpy(given[name]) for name in ("latents", "level", "frame_index", "ring_index")
        )
        velocity, *made = module(
            *numbers, ring("ring_key"), ring("ring_value"), listed("text_key"), listed("text_value")
        )
        for place, lane in enumerate(lanes):
            for row, slot in enumerate(given["append_slot"][place]):
                if slot >= 0:
                    for index in layers:
                        lane[f"ring_key.{index}"][0, slot] = made[2 * index][place, row]
                        lane[f"ring_value.{index}"][0, slot] = made[2 * index + 1][place, row]
        return {"prediction": velocity.numpy()}

    return FakeNetwork(inputs, outputs, run, rings)


def text_features(model: CausalWan, context: Tensor) -> dict[str, np.ndarray]:
    """What the text encoder gives for states [words, text_dim]."""
    words = torch.ones(len(context), dtype=torch.int64)
    values = TextProjector(model)(context, words)
    layers = range(model.config.num_layers)
    names = [f"text_{kind}.{index}" for kind in ("key", "value") for index in layers]
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


class Streams:
    """Streams of one method on one fake plan; stream b has seed b."""

    def __init__(
        self,
        model: CausalWan,
        method: Mapping[str, Any],
        timesteps: Sequence[float],
        latent: tuple[int, int],
        *,
        chunks: int | None,
        given_chunks: int = 0,
        streams: int = 1,
        mask: str = "noise_causal",
        module: Callable[..., Sequence[Tensor]] | None = None,
        plan: Callable[[Causal, int], Executor] | None = None,
    ) -> None:
        """The network is the exported module in torch, or `module`, or what `plan` gives for a schedule and a number of streams."""
        self.model = model
        how = method_settings(method)
        schedule = make_method(how, chunks, given_chunks)
        assert isinstance(schedule, Causal)
        self.schedule = schedule
        if module is None:
            module = exported_module(model, schedule.config.levels, timesteps, latent, mask)
        networks = {"denoiser": denoiser(model.config, latent, module)}
        fake = FakeExecutor(networks, ring=schedule.config.ring_frames)
        executor: Any = fake if plan is None else plan(schedule, streams)
        size = Latent(model.config.in_dim, *latent)
        self.driver = Driver(executor, fake_bundle(networks, size), (streams,))
        settings = stream_settings(method, chunks=chunks, given_chunks=given_chunks)
        self.states = [
            open_state(
                self.driver,
                schedule,
                how.make_sampler(),
                settings | {"seed": seed},
                executor.rings if streams == 1 else executor.new_rings(),
                fake.codec(),  # type: ignore[arg-type]
                size,
                how.numbering,
            )
            for seed in range(streams)
        ]

    def say(self, state: StreamState, context: Tensor) -> None:
        """Sets a text."""
        state.text = text_features(self.model, context)

    def run(self, calls: int | None = None) -> None:
        """So many calls of every stream, or all that are left."""
        while not self.states[0].ended and calls != 0:
            self.driver.step(self.states)
            calls = None if calls is None else calls - 1

    def latents(self) -> np.ndarray:
        """All frames that were finished, in order. [streams, frames, c, h, w]"""
        return np.stack([np.concatenate([clip.result() for clip in state.clips]) for state in self.states])


def draw_as(monkeypatch: pytest.MonkeyPatch, noise: Noise) -> None:
    """Replaces the driver's noise by what `noise` gives for (stream, frame, denoising call or None at birth)."""

    def drawn(
        seed: int, frame: int, shape: Any, call: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        value = noise(seed, frame, call)
        if out is None:
            return value
        out[...] = value
        return out

    monkeypatch.setattr("pyengine.streaming.driver.frame_noise", drawn)
