"""The picture in the README: `python benchmarks/strip.py` makes 60-second videos and lays out one frame every five seconds."""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np

import pyengine

PROMPTS = (
    "a red circle bounces over a blue background",
    "a small green star orbits over a grey background",
    "a large yellow square spins over a purple gradient background",
    "a cyan triangle drifts over a black background",
    "an orange circle drifts and a blue triangle spins over a grey background",
)
COLUMNS = 12
GAP = 2  # pixels between frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="shapes")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path, default=Path("docs/images/strip.png"))
    arguments = parser.parse_args()
    engine = pyengine.load(arguments.bundle)
    rows = []
    for seed, prompt in enumerate(PROMPTS):
        with engine.stream(prompt, seed=seed, seconds=arguments.seconds) as stream:
            frames = list(stream)
        kept = [frames[round(place)] for place in np.linspace(0, len(frames) - 1, COLUMNS + 1)[1:]]
        rows.append(
            np.concatenate(
                [np.pad(frame, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for frame in kept], 1
            )
        )
    picture = np.concatenate(rows).repeat(2, 0).repeat(2, 1)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(arguments.output), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = picture.shape[0], picture.shape[1], "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")))
        container.mux(stream.encode(None))
    print(f"{arguments.output}: {len(PROMPTS)} prompts, a frame every {arguments.seconds / COLUMNS:g} s")


if __name__ == "__main__":
    main()
