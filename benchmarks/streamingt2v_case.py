"""StreamingT2V's second half of a step, extractor and denoiser, at chosen widths with random weights: plain modules, cached components, a
bundle of them, and what each thing that is kept saves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyengine.build.builder import build
from pyengine.bundle.bundle import Bundle
from pyengine.bundle.variant import Variant
from pyengine.export.families.streamingt2v import build as build_networks
from pyengine.export.families.streamingt2v.appearance import IMAGE_TOKENS, TEXT_TOKENS
from pyengine.export.families.streamingt2v.assembly import Networks, Part, Sizes, assemble
from pyengine.export.families.streamingt2v.cached import fill
from pyengine.export.families.streamingt2v.export import write_bundle
from pyengine.export.families.streamingt2v.modelscope import ModelScopeTrunk
from pyengine.export.families.streamingt2v.trunk import Walk, per_frame
from pyengine.export.runs import decode, encode, flat
from pyengine.runtime.open import load_program

BRANCHES, TIMESTEP, STEPS = 2, 741, 50
VARIANT = Variant.of("denoiser", branches=BRANCHES, streams=1)
LEVELS = (1, 2, 4, 4)  # widths of the released UNet in those of its first level


@dataclass
class Case:
    """The networks and one step of one stream: both branches of guidance, all frames of a window.

    channels  of the first level, a multiple of 64; 320 is the release
    """

    sizes: Sizes
    networks: Networks
    parts: dict[str, Part]
    latents: Tensor  # [1, frames, 4, h, w]
    context: Tensor  # [branches, text and image tokens, channels]
    pixels: Tensor  # [condition frames, 3, H, W]

    @classmethod
    def random(cls, channels: int, latent: tuple[int, int], frames: int) -> Case:
        torch.manual_seed(0)
        config: dict[str, Any] = {"base_unet": {"block_out_channels": [channels * each for each in LEVELS]}}
        if channels < 320:  # for a quick look, all of it is smaller
            config["image_encoder"] = {"width": 320, "layers": 8}
            config["vae"] = {"block_out_channels": [channels // 2 * each for each in LEVELS]}
        made = {name: module for name, module in build_networks(config).items() if name != "enhancer"}
        for module in made.values():
            module.eval().requires_grad_(False)
        sizes = Sizes(latent, frames, frames // 2)
        networks = Networks(**made)  # type: ignore[arg-type]
        root, parts = assemble(networks, sizes)
        root.requires_grad_(False)
        fill(root)
        high, wide = latent
        width = networks.base_model.widths.text_channels
        return cls(
            sizes,
            networks,
            parts,
            torch.randn(1, frames, 4, high, wide),
            torch.randn(BRANCHES, TEXT_TOKENS + IMAGE_TOKENS, width),
            torch.randn(frames // 2, 3, 8 * high, 8 * wide).clamp(-1, 1),
        )

    def to(self, dtype: torch.dtype) -> None:
        """The networks, which their components share, in another type."""
        for module in (*self.networks.parts().values(), *(part.module for part in self.parts.values())):
            module.to(dtype)

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """What the cached denoiser reads, made by the components that run once per prompt or chunk."""
        text, anchor = self.context.to(dtype).split([TEXT_TOKENS, IMAGE_TOKENS], 1)
        keys = self.parts["appearance"].module(text, anchor)
        count = len(self.networks.base_model.cross_attentions())
        own, cam = keys[: 2 * count], keys[2 * count :]
        lists = {"text": own, "cam_text": cam}
        found: dict[str, Any] = {
            "latents": self.latents.to(dtype),
            "level": torch.full((1, self.sizes.frames), (TIMESTEP + 1) / 1000),
            "condition": self.parts["condition"].module(self.pixels[None].to(dtype)),
        }
        for name, values in lists.items():
            found[f"{name}_key"] = [each[:, None] for each in values[::2]]
            found[f"{name}_value"] = [each[:, None] for each in values[1::2]]
        return found

    def bundle(self, folder: Path) -> Bundle:
        """The cached denoiser alone."""
        folder.mkdir(parents=True)
        return write_bundle(folder, self.parts, self.sizes, self.networks, only=("denoiser",))


class Plain:
    """One step as the release makes it: extractor, with the encoder of the condition frames, and denoiser, each with its time embedding
    and the keys and values of its text.
    """

    def __init__(self, case: Case, dtype: torch.dtype, compiled: bool) -> None:
        base, extractor, seen = case.networks.base_model, case.networks.unet, case.sizes.condition_frames
        x = case.latents.to(dtype).transpose(1, 2).expand(BRANCHES, -1, -1, -1, -1).contiguous()
        context, pixels = case.context.to(dtype), case.pixels.to(dtype)
        t = torch.full((BRANCHES,), TIMESTEP)

        def step(x: Tensor, t: Tensor, context: Tensor, pixels: Tensor) -> Tensor:
            features = extractor(x[:, :, :seen], t, context, pixels)
            return base(x, t, context, features)

        run = torch.compile(step, dynamic=False) if compiled else step
        self._run: Callable[[], Tensor] = lambda: run(x, t, context, pixels)

    def __call__(self) -> None:
        self._run()

    def prediction(self) -> np.ndarray:
        return self._run().transpose(1, 2)[:, None].float().numpy()


class Cached:
    """The same step by the cached denoiser in PyTorch: the work that a plan has."""

    def __init__(self, case: Case, dtype: torch.dtype, compiled: bool) -> None:
        module, inputs = case.parts["denoiser"].module, case.inputs(dtype)
        run = torch.compile(module, dynamic=False) if compiled else module
        self._run: Callable[[], Tensor] = lambda: run(**inputs)

    def __call__(self) -> None:
        self._run()

    def prediction(self) -> np.ndarray:
        return self._run().float().numpy()


class Planned:
    """The cached denoiser as a plan."""

    def __init__(
        self, inputs: Mapping[str, Any], bundle: Bundle, backend: str, precision: str, cache: Path
    ) -> None:
        plan = build(bundle, variants=[VARIANT], backend=backend, precision=precision, cache_dir=cache)
        self.part = plan.part(VARIANT)
        self.executor = load_program(plan).executor()
        for name, array in flat(inputs).items():
            target = self.executor.input(VARIANT, name)
            target[...] = encode(array, target.dtype)

    def __call__(self) -> None:
        self.executor.run(VARIANT)

    def prediction(self) -> np.ndarray:
        self()
        return decode(self.executor.output(VARIANT, "prediction").copy())


class Saving(NamedTuple):
    """Work that is done `before` times per chunk of 50 steps by the release, and `after` times here."""

    name: str
    run: Callable[[], object]
    before: float
    after: float
    instead: Callable[[], object] | None = None  # what is done in its place as often as before


def savings(case: Case, dtype: torch.dtype) -> list[Saving]:
    """Every thing that is kept or left out, as a run in PyTorch of the work that it is about."""
    networks, sizes = case.networks, case.sizes
    base, extractor = networks.base_model, networks.unet
    seen, new = sizes.condition_frames, sizes.frames - sizes.condition_frames
    context, pixels = case.context.to(dtype), case.pixels.to(dtype)
    text, t = context[:, :TEXT_TOKENS], torch.full((BRANCHES,), TIMESTEP)
    rows = case.latents.to(dtype).flatten(0, 1)
    both = rows.repeat(BRANCHES, 1, 1, 1)
    cam = Walk(per_frame(extractor.embed(t), seen), extractor.text_keys(text), seen)
    y = extractor.features(both[: BRANCHES * seen], cam, torch.zeros(1, dtype=dtype))
    x = [torch.randn(BRANCHES * sizes.frames, *each.shape[1:], dtype=dtype) for each in y]
    denoiser: Any = case.parts["denoiser"].module

    def merge(mergers: Any) -> Callable[[], object]:
        return lambda: [each(a, b, sizes.frames) for each, a, b in zip(mergers, x, y, strict=True)]

    def prefixes(count: int) -> Callable[[], object]:
        def run() -> None:
            for trunk, frames in ((base, sizes.frames), (extractor, seen)):
                prefix(trunk, both[: count * frames], t[:count], frames)

        return run

    def each(function: Callable[[Tensor], object], frames: Tensor) -> Callable[[], object]:
        return lambda: [function(frame[None]) for frame in frames]  # as released, one by one

    vae = networks.vae
    return [
        Saving("keys and values of text and anchor", lambda: case.parts["appearance"].module(text, context[:, TEXT_TOKENS:]), STEPS, 0),
        Saving("tokens of the anchor and of a grey picture", lambda: case.parts["image_encoder"].module(pixels[0]), 1, 0),
        Saving("condition frames encoded", lambda: extractor.controlnet_cond_embedding(pixels), 2 * STEPS, 1),
        Saving("time embeddings and their projections", lambda: (base.embed(t), extractor.embed(t)), STEPS, 0),
        Saving("mergers fused", merge(base.mergers()), STEPS, 0, merge(denoiser.mergers)),
        Saving("prefix shared by both branches", prefixes(BRANCHES), STEPS, 0, prefixes(1)),
        Saving("frames decoded that are not shown", each(vae.decode, rows[:seen]), 1, 0),
        Saving("frames encoded that nobody reads", each(vae.moments, pixels), (sizes.frames + seen) / new, 0),
    ]  # fmt: skip


def prefix(trunk: ModelScopeTrunk, x: Tensor, t: Tensor, frames: int) -> Tensor:
    """What comes before the first cross-attention."""
    level: Any = trunk.down_blocks[0]
    layers = [trunk.conv_in, trunk.transformer_in, level.resnets[0], level.temp_convs[0]]
    walk = Walk(per_frame(trunk.embed(t), frames), [], frames)
    return level.attentions[0].before_text(walk.run(layers, x))


def seconds_of(run: Callable[[], object], rounds: int) -> float:
    """Median of so many runs behind one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def relative_error(value: np.ndarray, exact: np.ndarray) -> float:
    """Root of the mean square of the difference over that of the exact value."""
    apart = (value - exact).ravel().astype(np.float64)
    return float(np.linalg.norm(apart) / np.linalg.norm(exact.ravel().astype(np.float64)))
