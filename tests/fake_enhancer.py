"""The stand-in for a network of the golden blending case as an enhancer on a FakeExecutor: it guides itself, as an exported one does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fake_network import Arrays, FakeExecutor, FakeNetwork, fake_bundle, open_state, stream_settings
from streamingt2v_golden import CONFIG, array

from pyengine.bundle.bundle import Latent
from pyengine.bundle.manifest import TensorSpec
from pyengine.methods.enhancement import Enhancement, EnhancerSettings
from pyengine.schedule.refinement import guided
from pyengine.streaming.driver import Driver
from pyengine.streaming.state import StreamState

GOLDEN: dict[str, Any] = CONFIG["blending"]
LATENT = Latent(4, 5, 7)
SHAPE = (4, 5, 7)


def golden_settings(**changes: Any) -> EnhancerSettings:
    released = {
        "steps": GOLDEN["steps"],
        "levels": GOLDEN["total_noise_levels"],
        "guidance": float(GOLDEN["guide"]),
        "rescale": GOLDEN["rescale"],
        "clip_frames": GOLDEN["chunk"],
        "overlap": GOLDEN["overlap"],
        "latent": (5, 7),
    }
    return EnhancerSettings(**(released | changes))


def model(x: np.ndarray, t: int, p: np.ndarray) -> np.ndarray:
    """Of one chunk [4, frames, h, w]."""
    c, f, h, w = np.indices(x.shape)
    wave = np.sin(0.01 * t + 0.7 * f + 1.3 * c + 0.11 * h + 0.05 * w)
    return p[2] * x - 0.3 * x.mean(1, keepdims=True) + p[0] * wave + p[1] * np.tanh(x)


def _run(given: Arrays, rings: Sequence[Arrays]) -> Arrays:
    out = np.empty((1, *given["latents"].shape), np.float32)
    text = given["text"]  # [branches, lanes, 3]: parameters of the stand-in
    for lane, latents in enumerate(given["latents"]):
        x = np.ascontiguousarray(latents.swapaxes(0, 1))
        (level,) = set(given["level"][lane].tolist())
        t = round(level * 1000) - 1
        cond, uncond = (model(x, t, words[lane].astype(np.float64)).astype(np.float32) for words in text)
        scale = float(given["guidance"][0, lane])
        assert given["guidance"][1, lane] == np.float32(1 - scale)
        out[0, lane] = guided(cond, uncond, scale, float(given["rescale"][lane])).swapaxes(0, 1)
    return {"prediction": out}


def enhancer(frames: int, shape: tuple[int, ...] = SHAPE) -> FakeNetwork:
    rows, lanes = ("streams", frames), ("streams",)
    return FakeNetwork(
        {
            "latents": TensorSpec((*rows, *shape), "float32"),
            "level": TensorSpec(rows, "float32"),
            "guidance": TensorSpec(("branches", "streams"), "float32"),
            "rescale": TensorSpec(lanes, "float32"),
            "text": TensorSpec(("branches", "streams", 3), "float32"),
        },
        {"prediction": TensorSpec((1, *rows, *shape), "float32")},
        _run,
    )


def golden_text() -> Arrays:
    return {"text": np.concatenate([array(f"blending_loop/{name}") for name in ("y", "u")])}


def opened(
    schedule: Enhancement, given: np.ndarray, seed: int = 5, sizes: tuple[int, ...] = (1,)
) -> tuple[Driver, StreamState]:
    """A stream of a schedule that has been given all its latents, [frames, 4, 5, 7]."""
    networks = {"enhancer": enhancer(schedule.settings.clip_frames)}
    executor: Any = FakeExecutor(networks)
    driver = Driver(executor, fake_bundle(networks, LATENT), sizes)
    state = open_state(
        driver,
        schedule,
        schedule.sampler,
        stream_settings({}, seed=seed, guidance=schedule.settings.guidance),
        {},
        executor.codec(),
        LATENT,
    )
    state.text = golden_text()
    for frame, latent in enumerate(given):
        state.store.give(frame, latent)
    return driver, state
