"""The networks in training: what each kind of conditioning does to a window, and how it begins.

    cam      as published: features of an extractor, read by attention across frames
    add      the same extractor, its features added to the skip tensors of the same frames (ControlNet's way)
    concat   no extractor: the condition frames beside the noisy ones along the channels, with a mask

The last two are what the paper compares with.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pyengine.export.families.shapes.autoencoder import LATENT_CHANNELS
from pyengine.export.families.streamingt2v.small import CONDITION_FRAMES, SmallNetworks
from pyengine.export.families.streamingt2v.trunk import Walk, per_frame, rows_of, video_of

Conditioning = Literal["cam", "add", "concat"]
CONDITIONINGS: tuple[str, ...] = get_args(Conditioning)


class Adder(nn.Module):
    """In the place of a merger: y of the condition frames, through a matrix that begins as zero, is added to the same frames of x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out = nn.Conv2d(channels, channels, 1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, y: Tensor, frames: int) -> Tensor:
        video, added = (
            part.unflatten(0, (-1, count)) for part, count in ((x, frames), (self.out(y), CONDITION_FRAMES))
        )
        return torch.cat([video[:, :CONDITION_FRAMES] + added, video[:, CONDITION_FRAMES:]], 1).flatten(0, 1)


class Model(SmallNetworks):
    """The networks of one kind of conditioning. `predict` is a whole window at one level."""

    def __init__(self, conditioning: str = "cam") -> None:
        super().__init__()
        if conditioning not in CONDITIONINGS:
            raise ValueError(
                f"expected conditioning out of {', '.join(CONDITIONINGS)} but got {conditioning!r}"
            )
        self.conditioning = conditioning
        base = self.base_model
        ends = [merger.temporal_transformer.proj_out for merger in base.mergers()]
        for layer in (*ends, self.unet.controlnet_cond_embedding.conv_out, base.conv_out):
            for parameter in layer.parameters():  # as published: new layers change nothing at first
                nn.init.zeros_(parameter)
        self.adders = nn.ModuleList()
        self.beside: nn.Module | None = None
        if conditioning == "add":
            self.adders.extend(Adder(channels) for channels in base.skip_channels())
        if conditioning == "concat":
            self.beside = nn.Conv2d(LATENT_CHANNELS + 1, base.widths.channels[0], 3, padding=1, bias=False)
            nn.init.zeros_(self.beside.weight)

    def begin_extractor(self) -> None:
        """Makes the extractor a copy of the denoiser's encoder, as published."""
        known = self.base_model.state_dict()
        own = self.unet.state_dict()
        self.unet.load_state_dict({name: known.get(name, value) for name, value in own.items()})

    def context(self, tokens: Tensor, anchor: Tensor | None = None) -> Tensor:
        """tokens [n, 20] and perhaps the anchor's latents [n, 8, 8, 8] -> [n, 20 or 24, width]."""
        text = self.text_encoder.words(tokens)
        if anchor is None:
            return text
        return torch.cat([text, self.resampler(self.image_encoder(anchor))], 1)

    def predict(
        self, x: Tensor, timestep: Tensor, context: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """v of windows x [n, frames, 8, 8, 8] at timesteps [n].

        condition [n, 8, 8, 8, 8]: the latents before; without them the networks are a text-to-video model.
        """
        base, frames = self.base_model, x.shape[1]
        walk = Walk(per_frame(base.embed(timestep), frames), base.text_keys(context), frames)
        rows = rows_of(x.transpose(1, 2))
        if condition is None:
            return video_of(base.denoise(rows, walk), frames).transpose(1, 2)
        if self.beside is not None:
            return self._beside(x, walk, condition)
        seen = condition.shape[1]
        text = context[:, : base.widths.text_tokens]
        cam = Walk(per_frame(self.unet.embed(timestep), seen), self.unet.text_keys(text), seen)
        encoded = self.unet.controlnet_cond_embedding(condition.flatten(0, 1))
        features = self.unet.features(x[:, :seen].flatten(0, 1), cam, encoded)
        mergers = list(self.adders) if self.conditioning == "add" else None
        return video_of(base.denoise(rows, walk, features, mergers), frames).transpose(1, 2)

    def _beside(self, x: Tensor, walk: Walk, condition: Tensor) -> Tensor:
        """The stem sees the condition frames as further channels."""
        given = torch.cat([condition, torch.ones_like(condition[:, :, :1])], 2)
        given = torch.cat(
            [given, given.new_zeros(given.shape[0], x.shape[1] - given.shape[1], *given.shape[2:])], 1
        )
        assert self.beside is not None
        added = self.beside(given.flatten(0, 1))
        handle = self.base_model.conv_in.register_forward_hook(lambda _m, _i, out: out + added)
        try:
            out = self.base_model.denoise(x.flatten(0, 1), walk)
        finally:
            handle.remove()
        return out.unflatten(0, x.shape[:2])
