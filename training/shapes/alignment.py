"""Latents that say plainly what is drawn: a loss that aligns the encoder with the world's ground truth.

Pixels hold little of what makes a star a star, so an encoder that is trained on pixels alone gives its points little room, and the
denoiser, whose loss follows the latents' variance, learns colours long before shapes. Aligning latents with features that name the
content makes such models converge many times faster (Yao et al. 2025, arXiv 2501.01423). There the features are a vision model's; here
the renderer knows the truth: which shape lies over each cell of the latent, how far it is turned and how fast it turns. A linear head
must read that from the latent under as much noise as halfway through denoising, so it has to be written large.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyengine.export.families.shapes.autoencoder import FRAMES_PER_LATENT, LATENT_CHANNELS, SPATIAL_FACTOR
from pyengine.export.families.shapes.captions import SHAPES
from pyengine.export.families.shapes.recipe import HEIGHT
from training.shapes.templates import SYMMETRY
from training.shapes.world import Scene, coverage

CELLS = HEIGHT // SPATIAL_FACTOR
LEAST_SHARE = 0.1  # of a cell that a shape must cover to count as lying there
EMPTY_WEIGHT = 0.1  # of a cell without a shape, against 1 for one that is full of it
LEVELS = (0.1, 0.6)  # noise levels that the reading must survive
FAST_TURN = 0.5  # radians of the shape's pattern per frame that count as a rate of 1


class CellLabels(NamedTuple):
    """What lies over each cell of each latent. N latents."""

    kind: Tensor  # [N, 8, 8] int64: 0 = nothing, else 1 + index in SHAPES of the shape that covers most of the cell
    share: Tensor  # [N, 8, 8] float32: how much of the cell that shape covers
    pose: Tensor  # [N, 3, 8, 8] float32: cosine and sine of its turn times its symmetry, and how fast that turns


def label_cells(scene: Scene, frames: np.ndarray | range) -> CellLabels:
    """The truth about a scene at the given frame numbers, four to a latent."""
    frames = np.asarray(frames)
    count = len(frames) // FRAMES_PER_LATENT
    share = np.zeros((count, CELLS, CELLS), np.float32)
    kind = np.zeros((count, CELLS, CELLS), np.int64)
    pose = np.zeros((count, 3, CELLS, CELLS), np.float32)
    for shape in scene.shapes:  # the later shape is in front
        area = coverage(shape, frames).reshape(
            count, FRAMES_PER_LATENT, CELLS, SPATIAL_FACTOR, CELLS, SPATIAL_FACTOR
        )
        covered = area.mean((1, 3, 5))
        share *= 1 - covered  # what the shapes behind keep, about
        mine = covered > share
        symmetry = SYMMETRY[shape.kind]
        middle = frames.reshape(count, FRAMES_PER_LATENT).mean(1)
        angle = symmetry * shape.rotation(middle)
        rate = symmetry * shape.turn / FAST_TURN if shape.motion == "spin" else 0.0
        turned = np.stack([np.cos(angle), np.sin(angle), np.full(count, rate)], 1).astype(np.float32)
        kind[mine] = 1 + SHAPES.index(shape.kind)
        pose = np.where(mine[:, None], turned[:, :, None, None], pose)
        share = np.maximum(share, covered)
    kind[share < LEAST_SHARE] = 0
    return CellLabels(torch.from_numpy(kind), torch.from_numpy(share), torch.from_numpy(pose))


class Alignment(nn.Module):
    """The linear head. It serves training alone and is not shipped."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Conv2d(LATENT_CHANNELS, 1 + len(SHAPES) + 3, 3, padding=1)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents [N, 8, 8, 8] -> logits of the kinds [N, 5, 8, 8] and poses [N, 3, 8, 8]."""
        kinds, poses = self.read(latents).split([1 + len(SHAPES), 3], 1)
        return kinds, poses

    def loss(self, latents: Tensor, labels: CellLabels) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the kinds plus squared error of the poses, of latents [N, 8, 8, 8]; and the share of the shapes' cells
        whose kind is read correctly."""
        level = torch.empty(len(latents), 1, 1, 1, device=latents.device).uniform_(*LEVELS)
        kinds, poses = self(torch.lerp(latents, torch.randn_like(latents), level))
        shown = labels.kind > 0
        weight = torch.where(shown, labels.share, EMPTY_WEIGHT)
        error = F.cross_entropy(kinds.float(), labels.kind, reduction="none")
        # A circle looks the same however it is turned.
        turns = labels.share * (shown & (labels.kind != 1 + SHAPES.index("circle")))
        apart = (poses.float() - labels.pose).square().mean(1)
        loss = (error * weight).sum() / weight.sum() + (apart * turns).sum() / turns.sum().clamp(min=1)
        # Of the cells that are known to lie under a shape, "nothing" is no answer.
        right = (kinds[:, 1:].argmax(1) + 1 == labels.kind)[shown & (labels.share > 0.5)].float().mean()
        return loss, right.detach()
