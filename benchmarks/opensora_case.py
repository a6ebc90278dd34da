"""STDiT3 at its real widths with random weights, as pyengine and PyTorch run it: what `benchmarks/opensora.py` measures on a
processor and `benchmarks/gpu/opensora.py` on a GPU. Needs torch and onnx, and no backend.

One call is a full window of PA-VDM: 35 latent frames (5 clean, 30 at six rising levels), prompt and null text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyengine.build.builder import build
from pyengine.bundle.bundle import Bundle, Latent, write_manifest
from pyengine.bundle.variant import Variant
from pyengine.export.deferred import Deferred
from pyengine.export.families.opensora import STDiT3, VideoAutoencoder
from pyengine.export.families.opensora.checkpoint import empty
from pyengine.export.families.opensora.export import Options, components
from pyengine.export.families.opensora.streaming import StreamingSTDiT3, TextProjector
from pyengine.export.graph import export_component
from pyengine.export.peers.stream import COMPILERS
from pyengine.export.runs import decode, encode
from pyengine.export.weights import WeightStore
from pyengine.runtime.open import load_program
from pyengine.schedule.progressive import noise_levels
from pyengine.schedule.warp import rflow_warp

BRANCHES = 2  # prompt and null
CHUNK, NOISY, STEPS = 5, 30, 30
CADENCE = STEPS * CHUNK // NOISY
FPS, GUIDANCE = 24.0, 7.0
VELOCITY = math.sqrt(2)  # root mean square of x0 - eps where both have variance 1
Arrays = dict[str, np.ndarray]


def random_model(depth: int, seed: int = 0, **config: Any) -> STDiT3:
    """bf16, all weights random; the last layer is scaled so that velocities have the size of real ones."""
    torch.manual_seed(seed)
    model = STDiT3(depth=depth, **config).eval().requires_grad_(False)
    for table in [
        model.final_layer.scale_shift_table,
        *(b.scale_shift_table for p in model.pairs() for b in p),
    ]:
        table.normal_(std=0.3)
    # PyTorch's own init leaves a third of the variance.
    model.final_layer.linear.weight.mul_(VELOCITY / 0.577)
    return model.bfloat16()


@dataclass
class Case:
    """The network, the size of the video and the prompt."""

    model: STDiT3
    size: tuple[int, int]
    words: int

    def __post_init__(self) -> None:
        config = self.model.config
        self.latent = (config.in_channels, self.size[0] // 8, self.size[1] // 8)
        rows, columns = config.grid(*self.latent[1:])
        self.tokens = rows * columns
        generator = torch.Generator().manual_seed(1)
        self.states = torch.randn(1, 1, self.words, config.caption_channels, generator=generator).bfloat16()
        self.noise = torch.randn(NOISY + CHUNK, *self.latent, generator=generator)
        self.tau = noise_levels(STEPS, rflow_warp(*self.size, 119, "released"))

    @property
    def text(self) -> Tensor:
        """Prompt and null text, [branches, 1, words, caption channels]."""
        null = self.model.y_embedder.y_embedding[None, None, : self.words]
        return torch.cat((self.states, null))

    def levels(self, stage: int) -> Tensor:
        """Of a full window in that stage: the clean chunk, then the noisy ones, oldest first."""
        rows = [self.tau[(chunk + 1) * CADENCE - stage] for chunk in range(NOISY // CHUNK)]
        return torch.tensor([0.0, *rows]).repeat_interleave(CHUNK)

    def features(self) -> Arrays:
        """Keys and values of the text for every block, by input name."""
        text = TextProjector(self.model, self.words)
        mask, *rest = text(self.states[0, 0], torch.ones(self.words, dtype=torch.int64))
        half = len(rest) // 2
        named = {
            f"text_{kind}.{i}": t
            for k, kind in enumerate(("key", "value"))
            for i, t in enumerate(rest[k * half : (k + 1) * half])
        }
        # Of one stream.
        return {name: value[:, None].float().numpy() for name, value in {"text_mask": mask, **named}.items()}

    def calls(self, frames: int, count: int) -> list[Arrays]:
        """Inputs of windows of so many frames at levels from clean to noise, for calibration."""
        made = []
        for call in range(count):
            level = torch.linspace(0, 1, frames).sub(call / (count * frames)).clamp(min=0)
            latents = self.noise[torch.arange(call, call + frames) % len(self.noise)]
            made.append(window_of(latents, level))
        return [{**call, **self.features()} for call in made]

    def products(self) -> list[tuple[int, int, int]]:
        """The linear layers over all tokens of one block, as (rows, inputs, outputs)."""
        width, rows = self.model.config.hidden_size, BRANCHES * (NOISY + CHUNK) * self.tokens
        hidden = int(width * self.model.config.mlp_ratio)
        pairs = (
            (width, 3 * width),
            (width, width),
            (width, width),
            (width, width),
            (width, hidden),
            (hidden, width),
        )
        return [(rows, *pair) for pair in pairs]

    def flops(self, *, shared_first: bool) -> float:
        """Products of one call. `shared_first`: what comes before the first text attention is done once for both branches."""
        width, frames = self.model.config.hidden_size, NOISY + CHUNK
        rows = BRANCHES * frames * self.tokens
        linear = sum(2.0 * m * k * n for m, k, n in self.products())
        spatial, temporal, text = (4.0 * rows * n * width for n in (self.tokens, frames, self.words))
        once = (2.0 * rows * width * 4 * width + spatial) / 2 if shared_first else 0.0
        return self.model.config.depth * (2 * (linear + text) + spatial + temporal) - once


def export_case(case: Case, folder: Path) -> Bundle:
    """The denoiser as a bundle, weights read from the model one by one."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = case.model.state_dict()
    config = {name: getattr(case.model.config, name) for name in ("depth", "hidden_size", "num_heads")}
    model = empty(STDiT3, config)
    deferred = Deferred.of(model, lambda name: weights[name].float().numpy(), bfloat16=True)
    part = components(model, empty(VideoAutoencoder, {}), Options(size=case.size, fps=FPS, words=case.words))[
        "denoiser"
    ]
    store = WeightStore(folder)
    component = export_component(
        part.module,
        part.inputs,
        folder=folder,
        name="denoiser",
        store=store,
        outputs=part.outputs,
        dynamic=part.dynamic,
        working=part.working,
        deferred=deferred,
    )
    store.write(folder)
    latent = Latent(*case.latent)
    return write_manifest(
        folder,
        name="stdit3",
        family="opensora",
        version="1",
        components={"denoiser": component},
        latent=latent,
    )


def window_of(latents: Tensor, level: Tensor) -> Arrays:
    """Inputs of one stream's window: latents [frames, c, h, w] at level [frames]."""
    index = np.arange(len(latents))
    return {"latents": latents.numpy()[None], "level": level.numpy()[None], "frame_index": index[None]}


class PlanRunner:
    """A plan of the case. Calling it is one call of the network on a full window."""

    def __init__(
        self,
        case: Case,
        bundle: Bundle,
        cache: Path,
        frames: tuple[int, ...] = (NOISY + CHUNK,),
        **options: Any,
    ) -> None:
        self.case, self.variants = (
            case,
            [Variant.of("denoiser", branches=BRANCHES, streams=1, frames=n) for n in frames],
        )
        plan = build(bundle, variants=self.variants, cache_dir=cache, **options)
        self.part = plan.part(self.variants[0])
        self.executor = load_program(plan).executor()
        features = case.features()
        for variant in self.variants:
            for name, array in features.items():
                self._set(variant, name, array)
        self.velocity()

    def __call__(self) -> None:
        """On a GPU it is only enqueued."""
        self.executor.run(self.variants[0])

    def velocity(self) -> np.ndarray:
        """Of the full window. [branches, frames, c, h, w] float32"""
        return self.predict(self.case.noise, self.case.levels(0)).numpy()

    def predict(self, latents: Tensor, level: Tensor) -> Tensor:
        """[branches, frames, c, h, w] float32"""
        variant = next(v for v in self.variants if v.symbols["frames"] == len(latents))
        for name, array in window_of(latents, level).items():
            self._set(variant, name, array)
        self.executor.run(variant)
        return torch.from_numpy(decode(self.executor.output(variant, "prediction").copy()[:, 0]))

    def _set(self, variant: Variant, name: str, array: np.ndarray) -> None:
        target = self.executor.input(variant, name)
        target[...] = encode(array, np.dtype(getattr(target, "host_dtype", target.dtype)))


class TorchRunner:
    """The same module in PyTorch, called as the released sampler calls it; everything is on `device` before. `compiled` is a key of
    COMPILERS, or None for eager.
    """

    def __init__(
        self,
        case: Case,
        compiled: str | None,
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        there = (device, dtype) == ("cpu", torch.bfloat16)
        forward = (case.model if there else copy.deepcopy(case.model).to(device, dtype)).forward
        if compiled:
            forward = torch.compile(forward, dynamic=False, options=COMPILERS[compiled])
        height, width = map(float, case.size)
        x = case.noise.transpose(0, 1).expand(BRANCHES, -1, -1, -1, -1).to(device, dtype)
        level = (case.levels(0) * 1000).expand(BRANCHES, -1).to(device)
        text, fps = case.text.to(device, dtype), torch.tensor([FPS], device=device)
        self._run: Callable[[], Tensor] = lambda: forward(x, level, text, fps=fps, height=height, width=width)
        self._graphs = compiled == "max-autotune"
        self.channels = case.latent[0]

    def __call__(self) -> Tensor:
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self._run()

    def velocity(self) -> np.ndarray:
        """[branches, frames, c, h, w] float32"""
        return self()[:, : self.channels].transpose(1, 2).cpu().numpy()


def sample(runner: PlanRunner, steps: int) -> Tensor:
    """One chunk by the ordinary sampler from the case's noise. [frames, c, h, w]"""
    tau = noise_levels(steps, rflow_warp(*runner.case.size, 17, "released"))
    x = runner.case.noise[:CHUNK]
    for step in range(steps, 0, -1):
        prompt, null = runner.predict(x, torch.full((CHUNK,), tau[step]))
        x = x + (tau[step] - tau[step - 1]) * (null + GUIDANCE * (prompt - null))
    return x


def cached_context_error(case: Case) -> Iterator[tuple[int, float]]:
    """What `context: ring` changes: (stage, relative error of the noisy frames' velocity).

    The clean chunk's keys and values are those of stage 0, when it rides along; in later stages of the same shift they stay, while
    recomputation would see the frames around it move on. float32, PyTorch.
    """
    model = empty(STDiT3, {"depth": case.model.config.depth}).to_empty(device="cpu")
    model.load_state_dict({name: value.float() for name, value in case.model.state_dict().items()})
    make = {
        kind: StreamingSTDiT3(model, case.latent[1:], case.size, FPS, ring=kind) for kind in (False, True)
    }
    features = {name: torch.from_numpy(value) for name, value in case.features().items()}
    count = 2 * model.config.depth
    text = {"text_mask": features["text_mask"]}
    text |= {
        f"text_{kind}": [features[f"text_{kind}.{i}"] for i in range(count)] for kind in ("key", "value")
    }
    window, index = case.noise.clone(), torch.arange(CHUNK + NOISY)
    cache = (BRANCHES, CHUNK, case.tokens, model.config.num_heads, model.config.head_size)
    hidden = {"ring_index": torch.full((1, CHUNK), -1)}
    rings = {
        f"ring_{kind}": [torch.zeros(cache) for _ in range(model.config.depth)] for kind in ("key", "value")
    }
    index = index[None]
    velocity, *made = make[True](window[None], case.levels(0)[None], index, **text, **hidden, **rings)
    hidden = {"ring_index": torch.arange(CHUNK)[None]}
    rings = {f"ring_{kind}": [t[:, :CHUNK] for t in made[k::2]] for k, kind in enumerate(("key", "value"))}
    for stage in range(1, CADENCE):
        moved = (case.levels(stage - 1) - case.levels(stage))[CHUNK:, None, None, None]
        prompt, null = velocity[:, 0, -NOISY:]
        window[CHUNK:] += moved * (null + GUIDANCE * (prompt - null))
        level = case.levels(stage)[None]
        (velocity,) = make[False](window[None], level, index, **text)
        noisy = (window[None, CHUNK:], level[:, CHUNK:], index[:, CHUNK:])
        cached, *_ = make[True](*noisy, **text, **hidden, **rings)
        exact = velocity[:, :, CHUNK:]
        yield stage, float((cached - exact).norm() / exact.norm())
