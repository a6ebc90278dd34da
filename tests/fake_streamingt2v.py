"""StreamingT2V's networks as small functions, and a stream of them written out as a loop: what its driver must give, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from fake_methods import LATENT, decode
from fake_network import Arrays, FakeNetwork

from pyengine import _C
from pyengine.bundle.manifest import TensorSpec
from pyengine.methods import method_settings
from pyengine.methods.streamingt2v import REGENERATED
from pyengine.schedule.dpm_solver import dpm_solver
from pyengine.schedule.samplers import Multistep, frame_noise

WINDOW, CONDITION = 4, 2
FRAME = (LATENT.channels, LATENT.height, LATENT.width)
TEXTS = ("text_key.0", "text_value.0")
CAM_TEXTS = ("cam_text_key.0", "cam_text_value.0")
METHOD: dict[str, Any] = {
    "name": "streamingt2v", "steps": 3, "betas": [0.00085, 0.012], "guidance": 7.5, "clip_frames": WINDOW,
    "condition_frames": CONDITION, "attentions": [1, 1], "first": {"steps": 3, "guidance": 3.0},
}  # fmt: skip


def plain(latents: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """`decode` of a decoder that remembers nothing."""
    return decode(latents, np.zeros_like(memory))


def pixels_of(frames: np.ndarray) -> np.ndarray:
    """What the fake decoder gives beside its frames. [frames, 3, h, w]"""
    return np.moveaxis(frames, -1, 1) / np.float32(128)


def image_encoder(given: Arrays, rings: Any = None) -> Arrays:
    tokens = given["pixels"].mean((1, 2))
    return {"anchor": np.stack([tokens, np.zeros_like(tokens)])}


def first_text(given: Arrays, rings: Any = None) -> Arrays:
    text = given["text"]
    return {"text_key.0": text * np.float32(0.7), "text_value.0": text + np.float32(0.1)}


def appearance(given: Arrays, rings: Any = None) -> Arrays:
    text, anchor = given["text"], given["anchor"]
    return {
        "text_key.0": text + np.float32(0.5) * anchor,
        "text_value.0": 2 * text + anchor,
        "cam_text_key.0": text,
        "cam_text_value.0": -text,
    }


def condition(given: Arrays, rings: Any = None) -> Arrays:
    return {"condition": np.tanh(given["pixels"])}


def first_denoiser(given: Arrays, rings: Any = None) -> Arrays:
    """Each stream and branch by itself."""
    x, level = given["latents"], given["level"]
    key, value = (given[name][..., None, :, None, None] for name in TEXTS)
    mean = x.mean(1, keepdims=True)
    each = np.float32(0.4) * x + np.float32(0.2) * mean + np.float32(0.1) * level[..., None, None, None]
    return {"prediction": each[None] + np.float32(0.1) * key * value}


def denoiser(given: Arrays, rings: Any = None) -> Arrays:
    seen = given["condition"]
    key, value = (given[name][..., None, :, None, None] for name in CAM_TEXTS)
    prediction = first_denoiser(given)["prediction"] + np.float32(0.05) * (key - value * value)
    prediction = prediction + np.float32(0.1) * seen.mean(1, keepdims=True)
    prediction[:, :, :CONDITION] += np.float32(0.2) * seen
    return {"prediction": prediction}


def networks() -> dict[str, FakeNetwork]:
    """What the schedule runs; a decoder is the executor's."""
    rows = ("streams", WINDOW)
    text, tokens = TensorSpec((2, 3), "float32"), TensorSpec(("branches", "streams", 3), "float32")
    prediction = {"prediction": TensorSpec(("branches", *rows, *FRAME), "float32")}
    frames: dict[str, Any] = {
        "latents": TensorSpec((*rows, *FRAME), "float32"),
        "level": TensorSpec(rows, "float32"),
    }
    seen = TensorSpec(("streams", CONDITION, *FRAME), "float32")
    texts, more = dict.fromkeys(TEXTS, tokens), dict.fromkeys(CAM_TEXTS, tokens)
    return {
        "first_text": FakeNetwork({"text": text}, dict.fromkeys(TEXTS, text), first_text),
        "first_denoiser": FakeNetwork({**frames, **texts}, prediction, first_denoiser),
        "image_encoder": FakeNetwork(
            {"pixels": TensorSpec(FRAME, "float32")}, {"anchor": text}, image_encoder
        ),
        "appearance": FakeNetwork(
            {"text": text, "anchor": text}, dict.fromkeys((*TEXTS, *CAM_TEXTS), text), appearance
        ),
        "condition": FakeNetwork({"pixels": seen}, {"condition": seen}, condition),
        "denoiser": FakeNetwork({**frames, **texts, **more, "condition": seen}, prediction, denoiser),
        # Its outputs alone are asked for; it runs in the executor.
        "decoder": FakeNetwork(
            {}, {"pixels": TensorSpec(("chunk", *FRAME), "float32")}, lambda given, rings: {}
        ),
    }


RUNS: dict[str, Callable[[Arrays], Arrays]] = {
    "first_text": first_text, "first_denoiser": first_denoiser, "image_encoder": image_encoder, "appearance": appearance,
    "condition": condition, "denoiser": denoiser,
}  # fmt: skip


def fake_decode(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames, uint8 [frames, h, w, 3], and their pixels [frames, 3, h, w]."""
    frames = plain(latents, np.zeros(3))
    return frames, pixels_of(frames)


def by_hand(
    texts: Sequence[np.ndarray],
    seed: int,
    guidance: float,
    given: np.ndarray | None = None,
    method: Mapping[str, Any] = METHOD,
    runs: Mapping[str, Callable[[Arrays], Arrays]] = RUNS,
    decode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = fake_decode,
    shape: tuple[int, ...] = FRAME,
) -> np.ndarray:
    """The frames of a stream as the paper has it, no call or record in it: uint8 [frames, h, w, 3].

    texts  of each later chunk; before it, without `given` frames, that of the first clip
    """
    settings: Any = method_settings(method)
    sampler, window, seen = settings.make_sampler(), settings.clip_frames, settings.condition_frames

    def clip(
        name: str, kept: Arrays, times: Sequence[int], numbers: Sequence[int], weights: list[float], by: Any
    ) -> np.ndarray:
        x = np.stack([frame_noise(seed, number, shape) for number in numbers])[None]
        scaled, before = np.array(weights, np.float32)[:, None], None
        for step, time in enumerate(times):
            now, then = (time + 1) / 1000, (times[step + 1] + 1) / 1000 if step + 1 < len(times) else 0.0
            scales = by([now] * window, [then] * window)
            noise = np.stack([frame_noise(seed, number, shape, step) for number in numbers])[None]
            level = np.full((1, window), now, np.float32)
            prediction = runs[name]({"latents": x, "level": level, **kept})["prediction"][: len(weights)]
            moved = (x, np.ascontiguousarray(prediction), scaled)
            more: dict[str, Any] = {"noise": noise}
            if isinstance(scales, Multistep):
                scales, past, *clean = scales.update, *map(np.ascontiguousarray, scales[1:4])
                more = {} if before is None else {"history": before, "history_scale": past[None]}
                before = np.empty_like(x)
                _C.denoise_step(
                    *moved, *(scale[None] for scale in clean), np.zeros_like(past)[None], out=before
                )
            noised = np.empty_like(x)
            _C.denoise_step(
                *moved, *(np.ascontiguousarray(scale)[None] for scale in scales), **more, out=noised
            )
            x = noised
        return x[0]

    def ddim(steps: int) -> list[int]:
        return [1 + (1000 // steps) * step for step in range(steps)][::-1]

    def by_branch(values: Arrays) -> Arrays:
        return {name: value[:, None] for name, value in values.items()}

    def weights(scale: float) -> list[float]:
        return [1.0] if scale == 1 else [scale, 1 - scale]

    shown, texts = [], list(texts)
    if given is None:
        keys, first = by_branch(runs["first_text"]({"text": texts.pop(0)})), settings.first
        times, by = ddim(first.steps), sampler
        if first.sampler != "ddim":
            times = np.linspace(999, 0, first.steps + 1).round().astype(int).tolist()[:-1]
            by = dpm_solver(settings.betas, first.steps)
        latents = clip("first_denoiser", keys, times, range(window), weights(first.guidance), by)
        frames, pixels = decode(latents)
        shown.append(frames)
        anchor = runs["image_encoder"]({"pixels": pixels[0]})["anchor"]
    else:
        made = settings.pixels_of(given)
        pixels, anchor = made["pixels"], runs["image_encoder"]({"pixels": made["anchor_pixels"]})["anchor"]
    born = sum(map(len, shown))
    for chunk, text in enumerate(texts):
        keys = by_branch(runs["appearance"]({"text": text, "anchor": anchor}))
        keys |= runs["condition"]({"pixels": pixels[None, -seen:]})
        numbers = [REGENERATED + chunk * seen + row for row in range(seen)]
        numbers += range(born, born + window - seen)
        latents = clip("denoiser", keys, ddim(settings.steps), numbers, weights(guidance), sampler)
        frames, pixels = decode(latents[seen:])
        shown.append(frames)
        born += window - seen
    return np.concatenate(shown)
