"""A small network and a schedule that decodes what it made and reads it back, for tests of the driver without compiled plans."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fake_network import Arrays, FakeNetwork

from pyengine.bundle.bundle import Latent
from pyengine.bundle.manifest import TensorSpec
from pyengine.bundle.variant import Variant
from pyengine.schedule.call import Call, Emit, Key, Lane, Row
from pyengine.schedule.samplers import cfg

LATENT = Latent(3, 2, 2)
RING = 4


def _denoise(given: Arrays, rings: Sequence[Arrays]) -> Arrays:
    """Every lane by itself: rows see the mean of the present ones, the visible slots of the lane's ring, and the text. Rows that are
    absent predict NaN, and empty slots hold what they hold.
    """
    latents, text = given["latents"], given["text"]
    out = np.full((len(text), *latents.shape), np.nan, np.float32)
    for lane, x in enumerate(latents):
        index, level = given["frame_index"][lane], given["level"][lane]
        rows = index >= 0
        if not rows.any():
            continue
        for branch in range(len(text)):
            context = x[rows].mean(0)
            if "ring_index" in given:
                keys, places = rings[lane]["ring_key"][branch], given["ring_index"][lane]
                for slot in np.flatnonzero(places >= 0):
                    context = context + (keys[slot] * np.float32(0.1 * (1 + places[slot])))[:, None, None]
            bias = 0.1 * level + 0.01 * index
            words = text[branch, lane] + (0.3 * given["anchor"][branch, lane] if "anchor" in given else 0)
            predicted = 0.4 * x + 0.2 * context + bias[:, None, None, None] + 0.1 * words[:, None, None]
            out[branch, lane, rows] = predicted[rows]
            for row, slot in enumerate(given["append_slot"][lane] if "append_slot" in given else ()):
                if slot >= 0:
                    rings[lane]["ring_key"][branch, slot] = x[row].mean((1, 2)) + 0.2 * text[branch, lane]
    return {"prediction": out}


def denoiser(*, ring: bool, anchor: bool = False) -> FakeNetwork:
    """`ring`: with a ring of one key per frame; `anchor`: with an input of that name, [branches, streams, 3]."""
    rows, latent = ("streams", "frames"), (LATENT.channels, LATENT.height, LATENT.width)
    inputs = {
        "latents": TensorSpec((*rows, *latent), "float32"),
        "level": TensorSpec(rows, "float32"),
        "frame_index": TensorSpec(rows, "int64"),
        "text": TensorSpec(("branches", "streams", 3), "float32"),
    }
    if ring:
        inputs |= {
            "ring_index": TensorSpec(("streams", "ring"), "int64"),
            "append_slot": TensorSpec(rows, "int64"),
        }
    if anchor:
        inputs["anchor"] = inputs["text"]
    prediction = TensorSpec(("branches", *rows, *latent), "float32")
    rings = {"ring_key": TensorSpec((2, "ring", 3), "float32")} if ring else {}
    return FakeNetwork(inputs, {"prediction": prediction}, _denoise, rings)


def encode(prompt: str) -> Arrays:
    """Text of both branches, [2, 3]; the null text is of every prompt the same."""
    own = np.random.default_rng(zlib.crc32(prompt.encode())).standard_normal(3)
    return {"text": np.stack([own, np.ones(3)]).astype(np.float32)}


def decode(latents: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """A picture of each latent, uint8 [frames, h, w, 3], tinted by the latents that came before."""
    pixels = np.moveaxis(latents, 1, -1) + 0.2 * memory
    memory[...] = 0.5 * memory + latents.mean((0, 2, 3))
    return (128 + 40 * pixels).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Feedback:
    """Chunks of two latents, one after the other, each denoised in `steps` calls that read features of the pixels of the chunk
    before: a call decodes it, another makes an "anchor" of the pixels. The first chunk reads the anchor of no pixels.
    """

    chunks: int
    steps: int = 3
    first_call = 0
    chunk_frames = 2
    given_frames = 0
    places = 2
    period = 1
    decoder_sizes = (2,)

    @property
    def calls(self) -> int:
        return self.chunks * (self.steps + 2) - 2

    def call(self, index: int) -> Call:
        chunk, step = divmod(index + 2, self.steps + 2)
        frames = tuple(range(2 * chunk, 2 * chunk + 2))
        if step == 0:
            before = tuple(frame - 2 for frame in frames)
            return Call(Variant.of("decoder", chunk=2), latents=before, writes={"frames": "pixels"})
        if step == 1:
            return Call(
                Variant.of("features"), reads={"frames": Key("pixels")}, writes={"features": "anchor"}
            )
        now, then = (1 - (step - 2 + done) / self.steps for done in (0, 1))
        last = step == self.steps + 1
        rows = tuple(
            [
                Row(
                    frame,
                    now,
                    then if not last else 0.0,
                    "noise" if step == 2 else "carried",
                    place,
                    done=last,
                )
                for place, frame in enumerate(frames)
            ]
        )
        return Call(
            Variant.of("denoiser", frames=2),
            (Lane(rows),),
            reads={"anchor": Key("anchor")},
            emit=(Emit(frames),) if last else (),
            keeps=(0, frames[0]),
        )

    def prepare(self) -> Sequence[Call]:
        return (Call(Variant.of("nothing"), values={"label": (7,)}, writes={"features": "anchor"}),)

    def recache(self, index: int) -> Iterator[Call]:
        return iter(())

    def switched(self, index: int) -> Feedback:
        return self

    def weights(self, guidance: float) -> tuple[float, ...]:
        return tuple(cfg(guidance).tolist())

    def denoisers(self) -> tuple[tuple[Variant, int], ...]:
        return ((Variant.of("denoiser", frames=2), 1),)

    def others(self) -> tuple[Variant, ...]:
        return (Variant.of("features"), Variant.of("nothing"))

    def length(self, frames: int | None, frames_per_latent: float) -> int | None:
        return frames


def feedback_networks() -> dict[str, FakeNetwork]:
    """What `Feedback` runs; a decoder is the executor's."""
    pixels = TensorSpec((2, LATENT.height, LATENT.width, 3), "uint8")
    features = {"features": TensorSpec((3,), "float32")}

    def look(given: Arrays, rings: Any) -> Arrays:
        return {"features": (given["frames"] / np.float32(128)).mean((0, 1, 2), dtype=np.float32)}

    def nothing(given: Arrays, rings: Any) -> Arrays:
        return {"features": np.full(3, 0.5 * given["label"][0], np.float32)}

    return {
        "denoiser": denoiser(ring=False, anchor=True),
        "features": FakeNetwork({"frames": pixels}, features, look),
        "nothing": FakeNetwork({"label": TensorSpec((1,), "int64")}, features, nothing),
    }
