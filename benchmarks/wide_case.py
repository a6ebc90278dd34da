"""What benchmarks of the 1152-wide denoiser have in common, on a processor (wide.py) and on a GPU (gpu/wide.py): the network with
random weights, how it is called, its bundle, and the same calls in PyTorch. Needs torch and onnx, and no backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyengine.build.builder import build
from pyengine.bundle.bundle import Bundle, write_manifest
from pyengine.bundle.variant import Variant
from pyengine.export.families.shapes.denoiser import Denoiser, DenoiserConfig
from pyengine.export.families.shapes.text_encoder import TextFeatures
from pyengine.export.graph import export_component, round_weights
from pyengine.export.peers.ring_denoiser import MASKED, RingDenoiser, angles, visible
from pyengine.export.peers.stream import COMPILERS
from pyengine.export.runs import decode, encode
from pyengine.export.weights import WeightStore
from pyengine.runtime.open import load_program

ROWS, COLUMNS = 7, 15  # tokens of a frame
BRANCHES, WORDS, RING = 2, 20, 5


@dataclass(frozen=True)
class WideConfig(DenoiserConfig):
    """Frames of 7 x 15 tokens."""

    width: int = 1152
    depth: int = 4
    heads: int = 16
    mlp_ratio: int = 4

    @property
    def tokens_per_frame(self) -> int:
        return ROWS * COLUMNS

    @property
    def latent(self) -> tuple[int, int, int]:
        return self.latent_channels, ROWS * self.patch, COLUMNS * self.patch


class WideDenoiser(Denoiser):
    """The denoiser for oblong frames."""

    def patchify(self, latents: Tensor) -> Tensor:
        p = self.config.patch
        split = latents.unflatten(-1, (COLUMNS, p)).unflatten(-3, (ROWS, p))
        return split.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)

    def unpatchify(self, values: Tensor) -> Tensor:
        p, c = self.config.patch, self.config.latent_channels
        split = values.unflatten(-1, (c, p, p)).unflatten(-4, (ROWS, COLUMNS))
        lead = split.dim() - 5
        order = (*range(lead), lead + 2, lead, lead + 3, lead + 1, lead + 4)
        return split.permute(order).flatten(-2).flatten(-3, -2)


@dataclass
class Case:
    """The network and how it is called."""

    config: WideConfig
    frames: int
    module: WideDenoiser
    text: TextFeatures

    @classmethod
    def random(cls, config: WideConfig, frames: int) -> Case:
        torch.manual_seed(0)
        module = WideDenoiser(config).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any():  # gates and heads start at zero: give every path a share
                    nn.init.normal_(parameter, std=0.02)
        round_weights(module)
        shape = (config.depth, BRANCHES, config.heads, WORDS, config.head_size)
        mask = torch.zeros(BRANCHES, WORDS)
        mask[:, 12:] = -1e4
        return cls(
            config,
            frames,
            module,
            TextFeatures(torch.randn(shape), torch.randn(shape), mask, torch.randn(BRANCHES, config.width)),
        )

    @property
    def variant(self) -> Variant:
        return Variant.of("denoiser", branches=BRANCHES, streams=1, frames=self.frames, ring=RING)

    def calls(self, frames: int, count: int) -> list[dict[str, np.ndarray]]:
        """Inputs of a little stream: in the first call the oldest frames are clean and enter the ring."""
        rng = np.random.default_rng(1)
        clean = min(RING, frames)
        calls = []
        for call in range(1 + count):
            level = np.linspace(1 / frames, 1, frames, dtype=np.float32)
            slots = np.full(frames, -1)
            if call == 0:
                level[:clean], slots[:clean] = 0, np.arange(clean)
            filled = call > 0
            calls.append(
                {
                    "latents": rng.standard_normal((1, frames, *self.config.latent), np.float32),
                    "level": level[None],
                    "frame_index": np.arange(frames)[None] + (RING if filled else 0),
                    "ring_index": np.where(filled & (np.arange(RING) < clean), np.arange(RING), -1)[None],
                    "append_slot": slots[None],
                    **{name: value.numpy() for name, value in inputs_of(self.text, streams=1).items()},
                }
            )
        return calls

    def products(self) -> list[tuple[int, int, int]]:
        """The linear layers over all tokens of one call, as (rows, inputs, outputs)."""
        width, rows = self.config.width, BRANCHES * self.frames * self.config.tokens_per_frame
        hidden = self.config.mlp_ratio * width
        block = [
            (width, 3 * width),
            (width, width),
            (width, width),
            (width, width),
            (width, 3 * width),
            (width, width),
        ]
        return [(rows, *pair) for pair in (*block, (width, hidden), (hidden, width))] * self.config.depth

    def dense_flops(self) -> float:
        """Products in the segments: linear layers, modulation, attention within a frame and to the text."""
        config = self.config
        frames = BRANCHES * self.frames
        linear = sum(2.0 * m * k * n for m, k, n in self.products())
        modulation = 2.0 * frames * config.width * (9 + 2) * config.width
        keys = config.tokens_per_frame + WORDS
        return (
            linear + modulation + 4.0 * config.depth * frames * config.tokens_per_frame * keys * config.width
        )


def inputs_of(text: TextFeatures, streams: int) -> dict[str, torch.Tensor]:
    """The denoiser's inputs of a prompt that every stream shares."""
    axes = {"key": 2, "value": 2, "mask": 1, "vector": 1}
    return {f"text_{name}": torch.stack([getattr(text, name)] * streams, axis) for name, axis in axes.items()}


def export_bundle(case: Case, folder: Path) -> Bundle:
    """The case as a bundle with one component."""
    folder.mkdir(parents=True, exist_ok=True)
    config, frames, ring, streams = case.config, 3, 2, 3
    names = [f"{kind}.{index}" for index in range(config.depth) for kind in ("key", "value")]
    cached = (BRANCHES * streams, ring, config.tokens_per_frame, config.heads, config.head_size)
    index = torch.arange(ring + frames).repeat(streams, 1)
    inputs: dict[str, Any] = {
        "latents": torch.randn(streams, frames, *config.latent),
        "level": torch.linspace(0.1, 1, frames).repeat(streams, 1),
        "frame_index": index[:, ring:],
        "ring_index": index[:, :ring],
        **inputs_of(case.text, streams),
        "ring_key": [torch.randn(cached) for _ in range(config.depth)],
        "ring_value": [torch.randn(cached) for _ in range(config.depth)],
    }
    store = WeightStore()
    kept = {0: "branches*streams", 1: "ring"}
    dynamic = {name: {0: "streams", 1: "frames"} for name in ("latents", "level", "frame_index")}
    dynamic |= {"ring_index": {0: "streams", 1: "ring"}, "ring_key": kept, "ring_value": kept}
    dynamic |= {f"text_{name}": {1: "branches", 2: "streams"} for name in ("key", "value")}
    dynamic |= {f"text_{name}": {0: "branches", 1: "streams"} for name in ("mask", "vector")}
    component = export_component(
        case.module,
        inputs,
        folder=folder,
        name="denoiser",
        store=store,
        outputs=["prediction", *names],
        dynamic=dynamic,
        ring={f"ring_{name}": name for name in names},
    )
    store.write(folder)
    return write_manifest(
        folder, name="wide", family="shapes", version="1", components={"denoiser": component}
    )


class PlanRunner:
    """A plan of the case on the inputs of its last call, behind a ring filled by the first. Options are those of `build`."""

    def __init__(self, case: Case, bundle: Bundle, cache: Path, **options: Any) -> None:
        self.variant = case.variant
        plan = build(bundle, variants=[self.variant], cache_dir=cache, **options)
        self.part, self.precision = plan.part(self.variant), plan.precision
        self.executor = load_program(plan).executor()
        for call in case.calls(case.frames, 1):
            for name, array in call.items():
                target = self.executor.input(self.variant, name)
                target[...] = encode(array, np.dtype(getattr(target, "host_dtype", target.dtype)))
            self()

    def __call__(self) -> None:
        """On a GPU it is only enqueued."""
        self.executor.run(self.variant)

    def velocity(self) -> np.ndarray:
        self()
        return decode(self.executor.output(self.variant, "prediction").copy())


class TorchRunner:
    """The inputs of the case's last call in PyTorch, behind a ring filled by the first. Calls return the velocity where it was
    made. `compiled` is a key of COMPILERS, or None for eager. The module goes to `device` and `dtype`.
    """

    def __init__(
        self,
        case: Case,
        compiled: str | None,
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        network = RingDenoiser(case.module, ring=RING, rows=case.frames, branches=BRANCHES, dtype=dtype)
        network = network.eval().to(device)
        text = TextFeatures(*(value.to(device, dtype) for value in case.text))
        forward = network.forward
        if compiled:
            forward = torch.compile(forward, dynamic=False, options=COMPILERS[compiled])
        for call in case.calls(case.frames, 1):
            stream = {
                name: torch.from_numpy(call[name][0])
                for name in ("latents", "level", "frame_index", "ring_index")
            }
            frame, level = stream["frame_index"], stream["level"]
            turns = angles(frame, case.config.head_size, case.config.rope_theta, dtype)
            seen = visible(level, frame, frame, stream["ring_index"])
            mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, MASKED)
            latents = stream["latents"].to(dtype)
            tensors = (tensor.to(device) for tensor in (latents, level, *turns, mask))
            inputs = (*tensors, text)
            forward(*inputs)
            slots = [int(slot) for slot in call["append_slot"][0] if slot >= 0]
            if slots:
                network.append(0, slots)
        self._run: Callable[[], Tensor] = lambda: forward(*inputs)
        self._graphs = compiled == "max-autotune"

    def __call__(self) -> Tensor:
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self._run()

    def velocity(self) -> np.ndarray:
        return self().float().cpu().numpy()[:, None]


def relative_error(value: np.ndarray, exact: np.ndarray) -> float:
    """Relative L2."""
    return float(
        np.linalg.norm((value - exact).ravel().astype(np.float64))
        / np.linalg.norm(exact.ravel().astype(np.float64))
    )
