"""What StreamingT2V's enhancer saves per step of a chunk: `python benchmarks/enhancer.py [--time] [--json FILE]`.

    released   two forwards, one per branch of guidance; hooks repeat every temporal attention, to the same result
    once       two forwards, every temporal attention once
    together   both branches in one forward, as the exported component: what comes before the first text is computed once, keys and values
               of the text and what noise levels add are given

Multiply-adds are counted at full size (24 frames of 90 x 160 latents), nothing is computed. --time runs real widths in fp32 on a grid that
a CPU can do, contenders in turn; read the ratios.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pyengine.export.families.streamingt2v.components import GuidedDenoiser
from pyengine.export.families.streamingt2v.enhancer import Enhancer
from pyengine.export.families.streamingt2v.layers import TemporalTransformer
from pyengine.measure.probe import machine

TOKENS, CHANNELS = 77, 1024
Contenders = dict[str, Callable[[], Tensor]]


def contenders(frames: int, high: int, wide: int, device: str) -> Contenders:
    """Each does one step of one chunk, guidance included."""
    with torch.device(device):
        network = Enhancer().eval().requires_grad_(False)
        guided = GuidedDenoiser(network).eval().requires_grad_(False)
        latents = torch.randn(1, frames, 4, high, wide)
        text = torch.randn(2, TOKENS, CHANNELS)
        keys = [tuple(each[:, None] for each in pair) for pair in network.text_keys(text)]
        given: dict[str, Any] = {
            "latents": latents,
            "level": torch.full((1, frames), 0.6),
            "guidance": torch.tensor([[7.5], [-6.5]]),
            "rescale": torch.tensor([0.2]),
            "text_key": [key for key, _ in keys],
            "text_value": [value for _, value in keys],
        }
        t = torch.tensor([599])
    attentions = [
        attention
        for layer in network.modules()
        if isinstance(layer, TemporalTransformer)
        for attention in (layer.block.attn1, layer.block.attn2)
    ]

    def once() -> Tensor:
        x = latents.transpose(1, 2)
        cond, uncond = (network(x, t, text[branch : branch + 1]) for branch in range(2))
        out = uncond + 7.5 * (cond - uncond)
        return out * (0.2 * cond.std() / out.std() + 0.8)

    def released() -> Tensor:
        plain = {attention: attention.over_time for attention in attentions}
        for attention, run in plain.items():
            attention.over_time = twice(run)
        try:
            return once()
        finally:
            for attention in attentions:
                del attention.over_time

    return {"released": released, "once": once, "together": lambda: guided(**given)}


def twice(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def both(x: Tensor) -> Tensor:
        run(x)
        return run(x)

    return both


def counted(frames: int, high: int, wide: int) -> dict[str, float]:
    """TFLOP of each, two for a multiply-add."""
    found = {}
    for name, run in contenders(frames, high, wide, "meta").items():
        with FlopCounterMode(display=False) as counter:
            run()
        found[name] = counter.get_total_flops() / 1e12
    return found


@torch.no_grad()
def timed(frames: int, high: int, wide: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, in turn. Weights are small, so that nothing overflows."""
    torch.manual_seed(0)
    found = contenders(frames, high, wide, "cpu")
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for index in range(rounds + 1):
        for name, run in found.items():
            start = time.perf_counter()
            run()
            if index:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--grid", default="10x16", help="height x width of the latents that are timed")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    high, wide = map(int, arguments.grid.split("x"))
    record: dict[str, Any] = {"machine": machine(), "counted_tflop": counted(24, 90, 160)}
    if arguments.time:
        record["grid"], record["frames"] = [high, wide], arguments.frames
        record["counted_tflop_of_timed"] = counted(arguments.frames, high, wide)
        record["seconds"] = timed(arguments.frames, high, wide, arguments.rounds)
    first = record["counted_tflop"]["released"]
    for name, count in record["counted_tflop"].items():
        line = f"{name:10} {count:7.1f} TFLOP at full size, {100 * (1 - count / first):4.1f} % less"
        if arguments.time:
            line += f"; timed {median(record['seconds'][name]):.2f} s"
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
