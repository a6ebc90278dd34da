"""StreamingT2V's networks as small functions, and a stream of them written out as a loop: what its driver must give, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fake_methods import LATENT, decode
from fake_network import Arrays, FakeNetwork

from pyengine import _C
from pyengine.bundle.manifest import TensorSpec
from pyengine.methods import method_settings, sampler_of
from pyengine.methods.streamingt2v import REGENERATED
from pyengine.schedule.samplers import frame_noise

WINDOW, CONDITION = 4, 2
FRAME = (LATENT.channels, LATENT.height, LATENT.width)
TEXTS = ("text_key.0", "text_value.0")
CAM_TEXTS = ("cam_text_key.0", "cam_text_value.0")
METHOD: dict[str, Any] = {
    "name": "streamingt2v", "steps": 3, "betas": [0.00085, 0.012], "guidance": 7.5, "clip_frames": WINDOW,
    "condition_frames": CONDITION, "attentions": [1, 1], "first": {"steps": 2, "guidance": 3.0},
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


def by_hand(
    texts: Sequence[np.ndarray],
    seed: int,
    guidance: float,
    given: np.ndarray | None = None,
    method: dict[str, Any] = METHOD,
) -> np.ndarray:
    """The frames of a stream as the paper has it, no call or record in it: uint8 [frames, h, w, 3].

    texts  of each later chunk; before it, without `given` frames, that of the first clip
    """
    settings = method_settings(method)
    sampler = sampler_of(settings)

    def clip(predict: Any, steps: int, numbers: Sequence[int], weights: list[float]) -> np.ndarray:
        x = np.stack([frame_noise(seed, number, FRAME) for number in numbers])[None]
        times = [1 + (1000 // steps) * step for step in range(steps)][::-1]
        for step, time in enumerate(times):
            now, then = (time + 1) / 1000, (times[step + 1] + 1) / 1000 if step + 1 < steps else 0.0
            scales = sampler([now] * WINDOW, [then] * WINDOW)
            noise = np.stack([frame_noise(seed, number, FRAME, step) for number in numbers])[None]
            given = {"latents": x, "level": np.full((1, WINDOW), now, np.float32)}
            noised = np.empty_like(x)
            _C.denoise_step(
                x,
                np.ascontiguousarray(predict(given)["prediction"][: len(weights)]),
                np.array(weights, np.float32)[:, None],
                *(scale[None] for scale in scales),
                noise=noise,
                out=noised,
            )
            x = noised
        return x[0]

    def by_branch(values: Arrays) -> Arrays:
        return {name: value[:, None] for name, value in values.items()}

    def weights(scale: float) -> list[float]:
        return [1.0] if scale == 1 else [scale, 1 - scale]

    shown, texts = [], list(texts)
    memory = np.zeros(3)
    if given is None:
        keys = by_branch(first_text({"text": texts.pop(0)}))
        first: Any = settings.first  # type: ignore[union-attr]
        latents = clip(
            lambda x: first_denoiser({**x, **keys}), first.steps, range(WINDOW), weights(first.guidance)
        )
        shown.append(plain(latents, memory))
        pixels = pixels_of(shown[0])
        anchor = image_encoder({"pixels": pixels[0]})["anchor"]
    else:
        made = settings.pixels_of(given)  # type: ignore[union-attr]
        pixels, anchor = made["pixels"], image_encoder({"pixels": made["anchor_pixels"]})["anchor"]
    born = sum(map(len, shown))
    for chunk, text in enumerate(texts):
        keys = by_branch(appearance({"text": text, "anchor": anchor}))
        seen = condition({"pixels": pixels[-CONDITION:]})["condition"][None]
        numbers = [REGENERATED + chunk * CONDITION + row for row in range(CONDITION)]
        numbers += range(born, born + WINDOW - CONDITION)
        latents = clip(
            lambda x, keys=keys, seen=seen: denoiser({**x, **keys, "condition": seen}),
            settings.steps,
            numbers,
            weights(guidance),
        )
        shown.append(plain(latents[CONDITION:], memory))
        pixels = pixels_of(shown[-1])
        born += WINDOW - CONDITION
    return np.concatenate(shown)
