"""What a stream begins with: given frames, checked and brought to what its method reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pyengine.arguments import as_array
from pyengine.bundle.bundle import Bundle, Video
from pyengine.bundle.variant import Variant
from pyengine.errors import ShapeError
from pyengine.methods import MethodSettings
from pyengine.runtime.codec import encode_chunk, encoder_variants
from pyengine.runtime.program import Program

__all__ = ["chunks_for", "start_of"]


def start_of(
    start: np.ndarray,
    bundle: Bundle,
    settings: MethodSettings,
    program: Callable[[tuple[Variant, ...]], Program],
) -> np.ndarray | Mapping[str, np.ndarray]:
    """The last whole chunks of a start, uint8 [frames, height, width, 3], as many as the context holds, as latents [frames, channels,
    height, width]; or, of methods that begin with pixels, what their calls read. Raises ShapeError.
    """
    video = bundle.video
    assert video is not None
    if not settings.start_chunks:
        raise ShapeError("[start] expected no start frames: this model makes videos from noise alone")
    start = as_array("start", start)
    if (
        start.ndim != 4
        or start.shape[1:] != (video.height, video.width, 3)
        or start.dtype != np.uint8
        or not len(start)
    ):
        raise ShapeError(
            f"[start] expected uint8 [frames, {video.height}, {video.width}, 3] but got {start.dtype} {list(start.shape)}"
        )
    first, later = settings.first_chunk_frames, settings.chunk_frames
    if len(start) < video.frames(first):
        start = np.concatenate([np.repeat(start[:1], video.frames(first) - len(start), 0), start])
    if settings.reads_pixels:
        return settings.pixels_of(start)
    # Latents, and frames, before each chunk and behind the last.
    latents = [0, *(first + index * later for index in range(settings.start_chunks))]
    ends = [video.frames(count) for count in latents]
    chunks = sum(end <= len(start) for end in ends[1:])
    start = start[len(start) - ends[chunks] :]
    sizes = dict.fromkeys((first, later) if chunks > 1 else (first,))
    variants = dict.fromkeys(part for size in sizes for part in encoder_variants(bundle, size))
    executor = program(tuple(variants)).executor()
    try:
        return np.concatenate(
            [
                encode_chunk(
                    executor,
                    bundle,
                    start[ends[index] : ends[index + 1]],
                    latents[index + 1] - latents[index],
                )
                for index in range(chunks)
            ]
        )
    finally:
        executor.close()


def chunks_for(video: Video, settings: MethodSettings, frames: int | None, given_chunks: int) -> int | None:
    """Chunks to make for so many frames behind given ones; None = endless."""
    first, later = settings.first_chunk_frames, settings.chunk_frames
    given = first + (given_chunks - 1) * later if given_chunks else 0
    return None if frames is None else video.chunks(frames, first, later, given)
