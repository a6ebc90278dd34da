"""Train `shapes-artv`: `python -m training.artv.train --help`.

One frame at a time, as it will be made: from the K latents before it, the scene's first latent and the caption, by the recipe of ART-V
(arXiv:2311.18834) as far as that is known. References are noised to a random level that the network is told; references, anchor and
caption are left out now and then; the mask head mixes the newest reference into the prediction. `--without` leaves one of these out, for
the comparison, with all else the same. `--plain` keeps to scenes of one colour behind a shape that is not small, which are learned sooner.

    python -m training.artv.corpus --folder runs/artv/corpus
    python -m training.artv.train --corpus runs/artv/corpus --folder runs/artv/full --minutes 60

It resumes from its folder. The loss is the squared error of the velocity, of the mixed prediction and, at half its weight, of the network's
own, so that what the mask does not cover is learned as fast as without it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyengine.export.families.artv.config import REFERENCES
from pyengine.export.families.artv.denoiser import Denoiser
from pyengine.export.families.artv.layers import Context
from pyengine.export.families.artv.small import TextTower, small_denoiser
from pyengine.export.families.shapes.captions import build_tokenizer
from pyengine.export.families.shapes.text_encoder import null_ids
from training.artv.corpus import CLIP_LATENTS, SWITCH, load_corpus
from training.shapes.trainer import Clock, Trainer, join_processes, learning_rate

WITHOUT = ("mask", "noise", "anchor")
# Of frames: the first of a video, which has neither references nor anchor; the second, whose references are the same; those at which the
# prompt changes; those whose anchor is from before it changed.
FIRST_SHARE, SECOND_SHARE, SWITCH_SHARE, OLD_ANCHOR_SHARE = 0.12, 0.06, 0.08, 0.1
CAPTION_DROPOUT, REFERENCE_DROPOUT, ANCHOR_DROPOUT = 0.1, 0.04, 0.1
MAX_AUGMENTATION = 250  # timesteps, exclusive
CLEAN_SHARE = 0.2  # of references that are not noised
COPY_NOISE = 0.12  # most noise on what the mask copies and on the anchor: at inference they were generated
ALONE_WEIGHT = 0.5


class Batch(NamedTuple):
    """Frames with their conditions."""

    target: Tensor  # [B, 8, 8, 8]
    references: Tensor  # [B, K, 8, 8, 8], the newest first
    anchor: Tensor  # [B, 8, 8, 8]
    tokens: Tensor  # [B, 20]
    referenced: Tensor  # [B] float: 0 = has no references
    anchored: Tensor  # [B] float: 0 = has no anchor


def draw(corpus: dict[str, Tensor], batch: int) -> Batch:
    """Random frames of random clips in the shares above."""
    latents = corpus["latents"]
    pick, side = torch.randint(len(latents), (batch,)), torch.randint(2, (batch,))
    place = torch.randint(REFERENCES, CLIP_LATENTS, (batch,))
    kind = torch.rand(batch)
    bounds = torch.tensor([FIRST_SHARE, SECOND_SHARE, SWITCH_SHARE, OLD_ANCHOR_SHARE]).cumsum(0)
    first, second, switches, old = (
        (kind < high) & (kind >= low) for low, high in zip([0.0, *bounds[:-1]], bounds, strict=True)
    )
    # The second scene of a clip takes over at SWITCH; one frame later only the older reference is of the first one.
    later = torch.randint(2, (batch,))
    side = torch.where(switches, 1, side)
    place = torch.where(switches, SWITCH + later, place)
    of_first = torch.stack([switches & (later == 0), switches], 1)
    reference_side = torch.where(of_first, 0, side[:, None])
    back = torch.arange(1, REFERENCES + 1).expand(batch, -1)
    back = torch.where(second[:, None], 1, back)
    anchor_side = torch.where(old | switches, 1 - side, side)
    references = latents[pick[:, None], reference_side, place[:, None] - back].float()
    anchor = corpus["anchors"][pick, anchor_side].float()
    dropped = torch.rand(batch, 1) < CAPTION_DROPOUT
    return Batch(
        target=latents[pick, side, place].float(),
        references=references,
        anchor=torch.where(second[:, None, None, None], references[:, 0], anchor),
        tokens=torch.where(dropped, null_ids(), corpus["tokens"][pick, side]),
        referenced=(~first & (torch.rand(batch) >= REFERENCE_DROPOUT)).float(),
        anchored=(~first & (torch.rand(batch) >= ANCHOR_DROPOUT)).float(),
    )


def frame_loss(model: nn.ModuleDict, batch: Batch, without: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of the velocity, and what is worth printing beside it."""
    denoiser, size = cast(Denoiser, model["denoiser"]), len(batch.target)
    timesteps = torch.randint(denoiser.config.timesteps, (size,))
    signal, noise = denoiser.table.at(timesteps)
    augmentation = torch.randint(MAX_AUGMENTATION, (size,)) * (torch.rand(size) >= CLEAN_SHARE)
    references, reference, anchor = batch.references, batch.references[:, 0], batch.anchor
    if without == "noise":
        augmentation = torch.zeros_like(augmentation)
    else:
        kept, added = (part[:, None] for part in denoiser.table.at(augmentation))
        spoiled = kept * references + added * torch.randn_like(references)
        references = torch.where(augmentation[:, None, None, None, None] > 0, spoiled, references)
        reference, anchor = (
            x + COPY_NOISE * torch.rand(size, 1, 1, 1) * torch.randn_like(x) for x in (reference, anchor)
        )
    anchored = torch.zeros_like(batch.anchored) if without == "anchor" else batch.anchored
    fresh = torch.randn_like(batch.target)
    noisy = signal * batch.target + noise * fresh
    velocity = signal * fresh - noise * batch.target
    with torch.autocast("cpu", torch.bfloat16):
        texts = denoiser.unet.of_text(model["text"](batch.tokens))
        anchors = denoiser.anchors(anchor, anchored)
        predicted = denoiser.predict(
            noisy,
            timesteps,
            augmentation,
            reference,
            batch.referenced,
            denoiser.references(references.flatten(1, 2), batch.referenced),
            [Context(text, other) for text, other in zip(texts, anchors, strict=True)],
        )
    alone = (predicted.alone.float() - velocity).square().mean()
    if without == "mask":
        return alone, {}
    mixed = (predicted.mixed.float() - velocity).square().mean()
    share = (predicted.mask.float().mean((1, 2, 3)) * batch.referenced).sum() / batch.referenced.sum()
    return mixed + ALONE_WEIGHT * alone, {"mixed": mixed, "alone": alone, "mask": share}


def plain(corpus: dict[str, Tensor]) -> dict[str, Tensor]:
    """The clips both of whose scenes are plain, known by their captions."""
    known = build_tokenizer().get_vocab()
    other = [corpus["tokens"].eq(known[word]).any(2).any(1) for word in ("gradient", "small")]
    keep = ~torch.stack(other).any(0)
    return {name: value[keep] for name, value in corpus.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=Path("runs/artv/corpus"))
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/artv/full"), help="checkpoints and log; resumes from here"
    )
    parser.add_argument("--without", choices=WITHOUT, default=None, help="leave this out of the recipe")
    parser.add_argument("--plain", action="store_true", help="no gradients and no small shapes")
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="stop after this long; the rate follows the clock"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    arguments = parser.parse_args()
    process = join_processes("cpu")
    torch.manual_seed(1)
    corpus = load_corpus(arguments.corpus)
    if arguments.plain:
        corpus = plain(corpus)
    model = nn.ModuleDict({"denoiser": small_denoiser(), "text": TextTower()})
    trainer = Trainer(model, arguments.folder, peak_rate=arguments.rate, ema=0.999, muon=True)
    torch.manual_seed(trainer.step + 2 + 1_000_003 * process)
    clock = Clock(arguments.steps, arguments.minutes)
    while (progress := clock.progress(trainer.step)) < 1:
        with sdpa_kernel(SDPBackend.MATH):  # much quicker than the flash kernel for so few tokens
            loss, also = frame_loss(model, draw(corpus, arguments.batch), arguments.without)
            trainer.update(loss, learning_rate(progress, trainer.step), also)
    trainer.save()


if __name__ == "__main__":
    main()
