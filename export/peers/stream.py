"""A stream in plain PyTorch: schedule, noise, guidance and decoder of the engine's stream, and no engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyengine.bundle.bundle import Bundle
from pyengine.methods import Progressive, ProgressiveSettings, method_settings
from pyengine.schedule.progressive import Step
from pyengine.schedule.samplers import frame_noise
from pyengine.text.prompts import PromptTokenizer

from ..families.shapes.modules import Modules
from ..families.shapes.text_encoder import PromptEncoder, TextFeatures
from .ring_denoiser import MASKED, RingDenoiser, angles, visible

# Options of torch.compile. Freezing packs the weights for this processor; only then does max-autotune without
# CUDA graphs find products to tune on a CPU.
COMPILERS: dict[str, dict[str, Any]] = {
    "default": {},
    "frozen": {"freezing": True},
    "autotune": {"freezing": True, "max_autotune": True, "coordinate_descent_tuning": True},
    # torch.compile(mode="max-autotune"), which also records CUDA graphs.
    "max-autotune": {"max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": True},
}
TRIALS = 5  # runs of each form of attention before the faster one is kept


@dataclass(frozen=True)
class TorchOptions:
    """How a torch peer runs.

    dtype      of weights, activations and ring
    compiled   None = eager, else how: a key of COMPILERS
    recompute  clean frames re-enter every call as rows at level 0, and there is no ring
    device     cpu or cuda; on cuda attention is always one fused call
    """

    dtype: torch.dtype = torch.bfloat16
    compiled: str | None = None
    recompute: bool = False
    device: str = "cpu"


class TorchStream:
    """Endless clips, uint8 [frames, height, width, 3]. Euler sampler. Not thread-safe."""

    def __init__(
        self,
        bundle: Bundle,
        modules: Modules,
        options: TorchOptions,
        *,
        prompt: str,
        seed: int,
        method: Mapping[str, Any] | None = None,
    ) -> None:
        settings = method_settings(bundle.method, method)
        assert isinstance(settings, ProgressiveSettings)
        if options.recompute:
            settings = replace(settings, context=replace(settings.context, kind="recompute"))
        self._method = Progressive.from_settings(settings, None, 0)
        self._options, self._seed, self._guidance = options, seed, settings.guidance
        config = modules.denoiser.config
        self._config = config
        self._shape = (config.latent_channels, config.latent_size, config.latent_size)
        with torch.no_grad():
            self._text = _features(bundle, modules, prompt, options)
            ring = 0 if options.recompute else self._method.ring_frames
            rows = max(self._method.row_counts)
            branches = len(self._text.vector)
            self._network = RingDenoiser(
                modules.denoiser, ring=ring, rows=rows, branches=branches, dtype=options.dtype
            ).eval()
            self._network.to(options.device)
            decoder = modules.decoder.to(options.device, options.dtype)
            self._decoder = decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._memory = [self._there(memory.to(options.dtype)) for memory in decoder.initial_memory()]
            self._network.fused = options.device != "cpu" or self._fused_is_faster(rows, ring)
        self._denoise, self._decode = self._network.forward, self._decoder.forward
        if options.compiled:
            how = COMPILERS[options.compiled]
            self._denoise = torch.compile(self._denoise, dynamic=False, options=how)
            self._decode = torch.compile(self._decode, dynamic=False, options=how)
        self._latents = torch.zeros(rows, *self._shape, device=options.device)
        self.call = self._method.first_call
        self.seconds = 0.0  # in calls of the network

    def clips(self) -> Iterator[np.ndarray]:
        """Chunk after chunk, decoded as soon as it is clean."""
        while True:
            for latents in self.advance():
                yield self.decode(latents)

    @torch.no_grad()
    def advance(self) -> list[Tensor]:
        """One call of the network, and the chunks [frames, channels, height, width] that became clean."""
        step = self._method.step_at(self.call)
        sample = self._gather(step)
        level, level_next = torch.tensor(step.level), torch.tensor(step.level_next)
        start = perf_counter()
        velocity = self._predict(step, sample, level)
        self.seconds += perf_counter() - start
        prompted, null = velocity.float()
        guided = null + self._guidance * (prompted - null)
        self._latents = sample + self._there(level - level_next)[:, None, None, None] * guided
        self.call += 1
        return [self._latents[step.rows(chunk)] for chunk in step.emit]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 [frames, height, width, 3]"""
        self._begin()
        pixels, *memory = self._decode(latents.to(self._options.dtype), *self._memory)
        if self._options.compiled == "max-autotune":
            memory = [tensor.clone() for tensor in memory]  # the next replay of its graph overwrites them
        self._memory = memory
        frames = ((pixels.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
        return frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def _predict(self, step: Step, sample: Tensor, level: Tensor) -> Tensor:
        frame, ring = torch.tensor(step.frame_index), torch.tensor(step.ring_index, dtype=torch.int64)
        dtype = self._options.dtype
        cosine, sine = angles(frame.clamp(min=0), self._config.head_size, self._config.rope_theta, dtype)
        seen = visible(level, frame, torch.tensor(step.chunk), ring)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, MASKED)
        self._begin()
        level, cosine, sine, mask = (self._there(tensor) for tensor in (level, cosine, sine, mask))
        velocity = self._denoise(sample.to(dtype), level, cosine, sine, mask, self._text)
        rows = [row for row, slot in enumerate(step.append_slot) if slot >= 0]
        if rows:
            self._network.append(rows[0], [step.append_slot[row] for row in rows])
        return velocity

    def _gather(self, step: Step) -> Tensor:
        """The latents of this call: moved up from the last one, or fresh noise."""
        sample = self._latents[self._there(torch.tensor(step.source).clamp(min=0))]
        for row in step.born:
            sample[row] = torch.from_numpy(frame_noise(self._seed, step.frame_index[row], self._shape))
        return sample

    def _there(self, tensor: Tensor) -> Tensor:
        """The tensor on the stream's device."""
        return tensor.to(self._options.device, non_blocking=True)

    def _begin(self) -> None:
        """Before a compiled function: what its CUDA graph returned last time is not read any more."""
        if self._options.compiled == "max-autotune":
            torch.compiler.cudagraph_mark_step_begin()

    def _fused_is_faster(self, rows: int, ring: int) -> bool:
        """Times attention as one fused call and as two products, and says which suits these shapes."""
        level = torch.linspace(0.1, 1, rows)
        cosine, sine = angles(
            torch.arange(rows), self._config.head_size, self._config.rope_theta, self._options.dtype
        )
        mask = torch.zeros(rows, ring + rows, dtype=self._options.dtype)
        sample = torch.randn(rows, *self._shape).to(self._options.dtype)
        best = {}
        for fused in (True, False):
            self._network.fused = fused
            times = []
            for _ in range(TRIALS):
                start = perf_counter()
                self._network(sample, level, cosine, sine, mask, self._text)
                times.append(perf_counter() - start)
            best[fused] = min(times)
        for tensor in self._network.buffers():
            tensor.zero_()
        return best[True] <= best[False]


def _features(bundle: Bundle, modules: Modules, prompt: str, options: TorchOptions) -> TextFeatures:
    """The prompt and the empty prompt, encoded once."""
    assert bundle.text is not None
    tokenizer = PromptTokenizer(bundle.path(bundle.text.tokenizer), bundle.text.max_tokens)
    features = TextFeatures(*PromptEncoder(modules.text_encoder)(torch.from_numpy(tokenizer.encode(prompt))))
    return TextFeatures(*(tensor.to(options.device, options.dtype) for tensor in features))
