"""Decodes a chunk of clean latents to frames, and encodes frames: by one network, or by one over time and one per frame, a few at
a time.

Which it is, how many frames a run takes, and whether it takes them in tiles, the bundle's components say:

    decoder        latents [chunk, c, h, w] -> frames [chunk, frames per latent, H, W, 3] uint8         (its own memory, if any)
                                            or planes [frames, c, h, w], with
    frame_decoder  planes [batch, c, h', w'] -> frames [batch, 8 h', 8 w', 3] uint8; h' < h or w' < w: in tiles, blended where they overlap

`encoder` and `frame_encoder` (never tiled) are the reverse. This is the host's way; on a GPU `pyengine.runtime.cuda.decoder` does the
same without leaving it, but for tiles and for encoding, which come here: planes are a twelfth of the pixels' bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from pyengine.bundle.bundle import Bundle
from pyengine.bundle.variant import Variant

if TYPE_CHECKING:
    from pyengine.runtime.executor import Executor

__all__ = [
    "FRAME_DECODER",
    "decode_chunk",
    "decoded",
    "decoder_variants",
    "encode_chunk",
    "encoder_variants",
]

FRAME_DECODER, FRAME_ENCODER = Variant.of("frame_decoder"), Variant.of("frame_encoder")
OVERLAP = 0.25  # least share of a tile that the next one repeats


def decoder_variants(bundle: Bundle, chunk_frames: int) -> tuple[Variant, ...]:
    """The variants that decode a chunk of so many latent frames."""
    return (Variant.of("decoder", chunk=chunk_frames), *_with(bundle, FRAME_DECODER))


def encoder_variants(bundle: Bundle, chunk_frames: int) -> tuple[Variant, ...]:
    """The variants that encode a chunk of so many latent frames."""
    return (Variant.of("encoder", chunk=chunk_frames), *_with(bundle, FRAME_ENCODER))


def decode_chunk(
    executor: Executor, bundle: Bundle, latents: np.ndarray, kept: slice = slice(None), lead: int = 0
) -> np.ndarray:
    """latents [chunk, c, h, w] -> frames of the `kept` ones but the first `lead`, uint8 [frames, height, width, 3]. Advances the
    decoder's memory.
    """
    decoder, *per_frame = decoder_variants(bundle, len(latents))
    executor.input(decoder, "latents")[...] = latents
    executor.run(decoder)
    video = bundle.video
    assert video is not None
    if not per_frame:
        made = executor.output(decoder, "frames").copy()[kept].reshape(-1, video.height, video.width, 3)
        return made[lead:]
    planes = executor.output(decoder, "planes").copy()[lead:]
    frames = np.empty((len(planes), video.height, video.width, 3), np.uint8)
    rows, columns = executor.input(FRAME_DECODER, "planes").shape[2:]
    if (rows, columns) == planes.shape[2:]:
        for start, batch in _batches(executor, FRAME_DECODER, "planes", planes):
            frames[start : start + batch] = executor.output(FRAME_DECODER, "frames")[:batch].copy()
    else:
        _decode_tiles(executor, planes, frames)
    return frames


def decoded(
    executor: Executor, bundle: Bundle, chunk_frames: int, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Copies of further outputs of the decoder, as its last run on so many latents left them."""
    decoder, *_ = decoder_variants(bundle, chunk_frames)
    return {name: executor.output(decoder, name).copy() for name in names}


def encode_chunk(executor: Executor, bundle: Bundle, frames: np.ndarray, chunk_frames: int) -> np.ndarray:
    """frames, uint8 [frames, height, width, 3], of one chunk -> latents [chunk, c, h, w]."""
    encoder, *per_frame = encoder_variants(bundle, chunk_frames)
    if not per_frame:
        target = executor.input(encoder, "frames")
        missing = math.prod(target.shape) // math.prod(frames.shape[1:]) - len(frames)
        if missing:
            # The first chunk of a video may be shorter: what is in front is not looked at.
            frames = np.concatenate([np.zeros((missing, *frames.shape[1:]), frames.dtype), frames])
        target[...] = frames.reshape(target.shape)
    else:
        planes = executor.input(encoder, "planes")
        for start, batch in _batches(executor, FRAME_ENCODER, "frames", frames):
            planes[start : start + batch] = executor.output(FRAME_ENCODER, "planes")[:batch].copy()
    executor.run(encoder)
    return executor.output(encoder, "latents").copy()


def tile_starts(extent: int, tile: int) -> list[int]:
    """Where tiles of a size begin so that they cover an extent with even overlaps of at least OVERLAP."""
    if tile >= extent:
        return [0]
    step = max(1, int(tile * (1 - OVERLAP)))
    count = -(-(extent - tile) // step) + 1
    return [round(index * (extent - tile) / (count - 1)) for index in range(count)]


def _decode_tiles(executor: Executor, planes: np.ndarray, frames: np.ndarray) -> None:
    """Every tile of every frame, blended by weights that fall towards a tile's border."""
    rows, columns = executor.input(FRAME_DECODER, "planes").shape[2:]
    scale = frames.shape[1] // planes.shape[2]
    weight = _ramp(rows * scale)[:, None, None] * _ramp(columns * scale)[None, :, None]
    total = np.zeros((*frames.shape[1:3], 1), np.float32)
    sums = np.zeros(frames.shape, np.float32)
    places = product(tile_starts(planes.shape[2], rows), tile_starts(planes.shape[3], columns))
    for top, left in places:
        area = (slice(top * scale, (top + rows) * scale), slice(left * scale, (left + columns) * scale))
        total[area] += weight
        tile = planes[:, :, top : top + rows, left : left + columns]
        for start, batch in _batches(executor, FRAME_DECODER, "planes", tile):
            pixels = executor.output(FRAME_DECODER, "frames")[:batch].copy()
            sums[(slice(start, start + batch), *area)] += weight * pixels
    frames[...] = np.rint(sums / total)


def _ramp(size: int) -> np.ndarray:
    """Triangular weights, positive everywhere. [size] float32"""
    place = np.arange(size, dtype=np.float32)
    return np.minimum(place + 1, size - place)


def _batches(executor: Executor, variant: Variant, name: str, items: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs a network of fixed batch over all items: (first, how many) after each run."""
    target = executor.input(variant, name)
    for start in range(0, len(items), len(target)):
        part = items[start : start + len(target)]
        target[: len(part)] = part
        executor.run(variant)
        yield start, len(part)


def _with(bundle: Bundle, variant: Variant) -> tuple[Variant, ...]:
    return (variant,) if variant.component in bundle.components else ()
