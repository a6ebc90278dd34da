"""DenoiseStep: guidance over any number of branches, the sampler update of each frame, optional re-noise, and the operand of
multistep solvers: what was kept of the step before.

    sample            [S, F, ...]      float32; streams, frames
    prediction        [G, S, F, ...]   one per guidance branch
    weights           [G, S]           float32
    sample_scale, prediction_scale, noise_scale [S, F]  float32
    noise             [S, F, ...]      optional
    history           [S, F, ...]      optional, with its scale
    history_scale     [S, F]           float32
 -> out               [S, F, ...] = sample_scale * sample + prediction_scale * (sum_g weights_g prediction_g)
                                    + noise_scale * noise + history_scale * history

Frames whose scales are (1, 0, 0, 0) are copied bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.parser
import torch

from .spec import DOMAIN, VERSION, OpSpec

INPUTS = (
    "sample", "prediction", "weights", "sample_scale", "prediction_scale", "noise_scale", "noise", "history", "history_scale",
)  # fmt: skip


def reference(
    sample: torch.Tensor,
    prediction: torch.Tensor,
    weights: torch.Tensor,
    sample_scale: torch.Tensor,
    prediction_scale: torch.Tensor,
    noise_scale: torch.Tensor,
    noise: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    history_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor]:
    """(out,) in the dtype of `sample`; see the module's docstring."""
    per_frame = (..., *(None,) * (sample.dim() - 2))
    a, b, c = (s.to(sample.dtype)[per_frame] for s in (sample_scale, prediction_scale, noise_scale))
    guided = torch.einsum("gs,gs...->s...", weights.to(sample.dtype), prediction.to(sample.dtype))
    out = a * sample + b * guided
    if noise is not None:
        out = out + c * noise
    copied = (a == 1) & (b == 0) & (c == 0)
    if history is not None:
        assert history_scale is not None
        d = history_scale.to(sample.dtype)[per_frame]
        out, copied = out + d * history, copied & (d == 0)
    return (torch.where(copied, sample, out),)


def denoise_step(
    sample: torch.Tensor,
    prediction: torch.Tensor,
    weights: torch.Tensor,
    sample_scale: torch.Tensor,
    prediction_scale: torch.Tensor,
    noise_scale: torch.Tensor,
    noise: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    history_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference`'s out, or one opaque DenoiseStep node while `torch.onnx.export` is running."""
    if not torch.onnx.is_in_onnx_export():
        return reference(
            sample,
            prediction,
            weights,
            sample_scale,
            prediction_scale,
            noise_scale,
            noise,
            history,
            history_scale,
        )[0]
    inputs = [sample, prediction, weights, sample_scale, prediction_scale, noise_scale]
    if history is not None and noise is None:
        noise = torch.zeros_like(sample)  # an optional input in the middle is not passed over here
    inputs += [each for each in (noise, history, history_scale) if each is not None]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::DenoiseStep", inputs, dtype=sample.dtype, shape=sample.shape, version=VERSION
    )


def onnx_function(
    attributes: Any = None, node_inputs: Sequence[str] | None = None, opset: int = 18
) -> onnx.FunctionProto:
    """The body; arithmetic is float32 whatever the dtype of `prediction`."""
    given = {name for name, value in zip(INPUTS, node_inputs or (), strict=False) if value}
    noise = """
        noise_flat = Reshape(noise, flat)
        noise_part = Mul(c, noise_flat)
        without_history = Add(without_noise, noise_part)
    """
    history = """
        d = Unsqueeze(history_scale, ax2)
        history_flat = Reshape(history, flat)
        history_part = Mul(d, history_flat)
        updated = Add(without_history, history_part)
        is_zero_d = Equal(d, zero)
        is_zero = And(is_zero_bc, is_zero_d)
    """
    no_history = "updated = Identity(without_history) is_zero = Identity(is_zero_bc)"
    return onnx.parser.parse_function(f"""
    <opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}">
    DenoiseStep ({", ".join(INPUTS)}) => (out) {{
        flat = Constant<value = int64[3] {{0, 0, -1}}>()
        flat_branches = Constant<value = int64[4] {{0, 0, 0, -1}}>()
        ax0 = Constant<value = int64[1] {{0}}>()
        ax2 = Constant<value = int64[1] {{2}}>()
        ax23 = Constant<value = int64[2] {{2, 3}}>()
        x = Reshape(sample, flat)
        prediction_flat = Reshape(prediction, flat_branches)
        prediction_wide = Cast<to = 1>(prediction_flat)
        weights_column = Unsqueeze(weights, ax23)
        weighted = Mul(weights_column, prediction_wide)
        guided = ReduceSum<keepdims = 0>(weighted, ax0)
        a = Unsqueeze(sample_scale, ax2)
        b = Unsqueeze(prediction_scale, ax2)
        c = Unsqueeze(noise_scale, ax2)
        sample_part = Mul(a, x)
        guided_part = Mul(b, guided)
        without_noise = Add(sample_part, guided_part)
        {noise if "noise" in given else "without_history = Identity(without_noise)"}
        one = Constant<value = float {{1.0}}>()
        zero = Constant<value = float {{0.0}}>()
        is_one = Equal(a, one)
        is_zero_b = Equal(b, zero)
        is_zero_c = Equal(c, zero)
        is_zero_bc = And(is_zero_b, is_zero_c)
        {history if "history" in given else no_history}
        is_copy = And(is_one, is_zero)
        chosen = Where(is_copy, x, updated)
        shape = Shape(sample)
        out = Reshape(chosen, shape)
    }}""")


@dataclass(frozen=True)
class StepCase:
    """Shapes, and how many of the leading frames of every stream are copies."""

    name: str
    streams: int = 1
    frames: int = 8
    values: tuple[int, ...] = (16, 8, 8)
    branches: int = 2
    copies: int = 1
    noise: bool = False
    history: bool = False

    def __str__(self) -> str:
        return self.name

    def make_inputs(
        self, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> dict[str, torch.Tensor | None]:
        """Inputs by name, with the values of float32 (`prediction`: of bfloat16)."""
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random).to(dtype)

        frames = (self.streams, self.frames)
        scales = [normal(*frames) for _ in range(4)]
        for scale, value in zip(scales, (1.0, 0.0, 0.0, 0.0), strict=True):
            scale[:, : self.copies] = value
        if not self.noise:
            scales[2].zero_()
        return {
            "sample": normal(*frames, *self.values),
            "prediction": normal(self.branches, *frames, *self.values).bfloat16().to(dtype),
            "weights": normal(self.branches, self.streams),
            "sample_scale": scales[0],
            "prediction_scale": scales[1],
            "noise_scale": scales[2],
            "noise": normal(*frames, *self.values) if self.noise else None,
            "history": normal(*frames, *self.values) if self.history else None,
            "history_scale": scales[3] if self.history else None,
        }


SPEC = OpSpec(
    name="DenoiseStep",
    inputs=INPUTS[:6],
    optional_inputs=INPUTS[6:],
    working=("prediction",),
    outputs=("out",),
    attributes={},
    reference=reference,
    entry=denoise_step,
    onnx_function=onnx_function,
    cases=(
        StepCase("guided"),
        StepCase("one_branch", branches=1, copies=0),
        StepCase("three_branches", branches=3, noise=True),
        StepCase("one_frame_one_value", frames=1, values=(1,), copies=0),
        StepCase("all_copies", frames=5, copies=5, noise=True),
        StepCase("no_inner_axes", frames=7, values=()),
        StepCase("odd", frames=35, values=(3, 7, 11), noise=True),
        StepCase("parallel", frames=9, values=(16, 32, 33), noise=True),
        StepCase("two_streams", streams=2, frames=5, values=(4, 9)),
        StepCase("three_streams", streams=3, frames=3, values=(2, 7, 5), branches=3, noise=True),
        StepCase("streams_of_one_value", streams=3, frames=1, values=(), branches=1, copies=0),
        StepCase("history", branches=1, history=True),
        StepCase("history_and_noise", streams=2, frames=5, values=(3, 7, 11), noise=True, history=True),
        StepCase("streams_parallel", streams=2, frames=5, values=(16, 32, 33), noise=True),
    ),
    bench_cases=(StepCase("shapes", frames=8), StepCase("wide", frames=35, values=(4, 40, 64))),
)
