"""Train the denoiser: `python -m training.shapes.train_denoiser --help`.

Each clip is one window of a stream as inference will see it: clean frames (seen block-causally), then noisy frames that attend to
frames no noisier than themselves. Most clips carry the progressive levels of PA-VDM (arXiv 2410.08151, section 3.3): a common stage
with shared jitter, windows of variable length as in start-up and termination, clean frames in front. The rest carry one level for all
noisy frames behind clean ones, which is what the replacement baselines need.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.shapes.captions import build_tokenizer
from pyengine.export.families.shapes.denoiser import Denoiser
from pyengine.export.families.shapes.modules import load_modules
from pyengine.export.families.shapes.recipe import CHUNK, CHUNKS, STEPS, WARP
from pyengine.export.families.shapes.text_encoder import TextEncoder, null_ids
from training.shapes.corpus import load_corpus
from training.shapes.trainer import Clock, Trainer, join_processes, learning_rate

CLIP_LATENTS = 14
JITTER = 0.4  # standard deviation of the shared jitter, in steps of the ladder
PROGRESSIVE_SHARE, SINGLE_FRAME_SHARE, SHARED_SHARE = 0.75, 0.1, 0.5
LEAST_WEIGHT = 0.15  # of a frame at level 0 or 1 in the loss; one at level 0.5 counts 1
CAPTION_DROPOUT = 0.1
CONTEXT_NOISE = 0.12  # clean frames are never quite clean at inference: they were generated


@dataclass
class Window:
    """The plan of a batch. All [batch, 14]: level in [0, 1], chunk number, whether the frame is present at all, and which of two
    windows that share a clip it belongs to."""

    level: Tensor
    chunk: Tensor
    present: Tensor
    part: Tensor

    @property
    def allowed(self) -> Tensor:
        """Which frame (row) sees which (column): [batch, 14, 14] bool. Noise-causal; equally clean frames see each other block-causally."""
        row, column = self.level[:, :, None], self.level[:, None, :]
        earlier = self.chunk[:, None, :] <= self.chunk[:, :, None]
        seen = (column < row) | ((column == row) & ((row > 0) | earlier))
        seen &= self.present[:, None, :] & (self.part[:, None, :] == self.part[:, :, None])
        # An absent row must see something.
        return seen | torch.eye(CLIP_LATENTS, dtype=torch.bool, device=seen.device)


def sample_windows(batch: int) -> Window:
    """Draw the batch's windows."""
    place = torch.arange(CLIP_LATENTS)[None]  # [1, 14]
    chunk_frames = torch.where(torch.rand(batch, 1) < SINGLE_FRAME_SHARE, 1, CHUNK)
    chunk = place // chunk_frames
    chunks = CHUNKS * CHUNK // chunk_frames  # noisy chunks of a full window
    # Variable-length windows: full, starting up (the noisiest part of the ladder) or draining (its cleanest part).
    phase = torch.rand(batch, 1)
    starting, draining = phase < 0.2, phase > 0.92
    some = (torch.rand(batch, 1) * (chunks - 1)).long() + 1
    noisy_chunks = torch.where(starting | draining, some, chunks)
    room = CLIP_LATENTS // chunk_frames - noisy_chunks
    clean_chunks = (torch.rand(batch, 1) * (room.clamp(max=chunks) + 1)).long()
    clean_chunks = torch.where(torch.rand(batch, 1) < 0.5, room.clamp(max=chunks), clean_chunks)
    clean_chunks = torch.where(starting & (torch.rand(batch, 1) < 0.7), 0, clean_chunks)
    part = torch.zeros_like(chunk)
    first = torch.zeros_like(chunk)  # chunk with which a frame's window begins
    # Two windows in one clip: a start from text alone, which fills few frames, and behind it a later window of the same video.
    shared = (torch.rand(batch, 1) < SHARED_SHARE) & (chunk_frames == CHUNK)
    front = (torch.rand(batch, 1) * CHUNKS).long() + 1  # chunks of the first window
    behind = CLIP_LATENTS // CHUNK - front
    in_front = chunk < front
    part = torch.where(shared & ~in_front, 1, part)
    first = torch.where(shared & ~in_front, front, first)
    noisy_chunks = torch.where(shared, torch.where(in_front, front, behind.clamp(max=CHUNKS)), noisy_chunks)
    clean_chunks = torch.where(shared, torch.where(in_front, 0, (behind - CHUNKS).clamp(min=0)), clean_chunks)
    position = chunk - first - clean_chunks  # 0 = oldest noisy chunk
    offset = torch.where(starting | shared, chunks - noisy_chunks, 0)
    stage = torch.rand(batch, 2) + JITTER * torch.randn(batch, 2) / STEPS * chunks  # of either window
    progressive = ((position + offset + 1 - stage.gather(1, part)) / chunks).clamp(0.002, 1)
    # One level for every noisy frame behind 0 to 6 clean ones.
    clean_frames = (torch.rand(batch, 1) * 7).long()
    common = torch.rand(batch, 1).expand(-1, CLIP_LATENTS).clamp(0.002, 1)
    is_progressive = torch.rand(batch, 1) < PROGRESSIVE_SHARE
    level = torch.where(is_progressive, progressive, common)
    clean = torch.where(is_progressive, position < 0, place < clean_frames)
    present = torch.where(is_progressive, position < noisy_chunks, place < clean_frames + 10)
    level = WARP * level / (1 + (WARP - 1) * level)
    return Window(level.masked_fill(clean, 0.0), chunk, present, torch.where(is_progressive, part, 0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=Path("runs/corpus"))
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/denoiser"), help="checkpoints and log; resumes from here"
    )
    parser.add_argument("--steps", type=int, default=40000)
    parser.add_argument("--batch", type=int, default=32, help="clips of 14 latents per step and process")
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="stop after this long; the learning rate then follows the clock",
    )
    parser.add_argument(
        "--bundle", default=None, help="begin from the weights of this bundle instead of random ones"
    )
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument(
        "--emphasise",
        nargs="*",
        default=[],
        metavar="WORD",
        help="draw a clip twice as often for each of these words in its caption: what is not learned yet",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    process = join_processes(arguments.device)
    torch.manual_seed(0)
    latents, tokens = (part.to(arguments.device) for part in load_corpus(arguments.corpus))
    if arguments.bundle is None:
        denoiser = Denoiser()
        text = TextEncoder(denoiser.config.depth, denoiser.config.width, denoiser.config.heads)
    else:
        modules = load_modules(Bundle.load(arguments.bundle))
        denoiser, text = modules.denoiser, modules.text_encoder
    model = torch.nn.ModuleDict({"denoiser": denoiser, "text": text}).to(arguments.device)
    trainer = Trainer(model, arguments.folder, peak_rate=arguments.rate, ema=0.999, muon=True)
    torch.manual_seed(trainer.step + 1 + 1_000_003 * process)
    denoiser.over_clip = torch.compile(denoiser.over_clip)  # type: ignore[method-assign]
    # On a CPU plain matrix products are several times faster than the flash kernel for sequences this short.
    attention = (
        [SDPBackend.MATH] if arguments.device == "cpu" else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    weight = emphasis(tokens, arguments.emphasise)
    clock = Clock(arguments.steps, arguments.minutes)
    with sdpa_kernel(attention):
        while (progress := clock.progress(trainer.step)) < 1:
            loss = clip_loss(model, *draw(latents, tokens, weight, arguments.batch))
            trainer.update(loss, learning_rate(progress, trainer.step))
    trainer.save()


def emphasis(tokens: Tensor, words: list[str]) -> Tensor:
    """How often each caption of `tokens` [clips, 20] is drawn: doubled for every one of `words` in it. [clips] float32."""
    tokenizer = build_tokenizer()
    known = tokenizer.get_vocab()
    unknown = [word for word in words if word not in known]
    if unknown:
        raise SystemExit(
            f"[train_denoiser] expected words of the captions but got {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    named = [tokens.eq(known[word]).any(1).float() for word in words]
    return torch.exp2(torch.stack(named).sum(0)) if named else torch.ones(len(tokens), device=tokens.device)


def draw(latents: Tensor, tokens: Tensor, weight: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Random clips [batch, 14, 8, 8, 8] float32 and their captions [batch, 20], some of them dropped; clips come by `weight`."""
    device = latents.device
    pick = torch.multinomial(weight, batch, replacement=True)
    start = torch.randint(latents.shape[1] - CLIP_LATENTS + 1, (batch, 1), device=device)
    clips = latents[pick[:, None], start + torch.arange(CLIP_LATENTS, device=device)]
    dropped = torch.rand(batch, 1, device=device) < CAPTION_DROPOUT
    return clips.float(), torch.where(dropped, null_ids().to(device), tokens[pick])


def clip_loss(model: torch.nn.ModuleDict, clips: Tensor, tokens: Tensor) -> Tensor:
    """Mean squared velocity error over the noisy frames that are present."""
    window = sample_windows(len(clips))
    level, present = window.level.to(clips.device), window.present.to(clips.device)
    t = level[..., None, None, None]
    noise = torch.randn_like(clips)
    context = clips + CONTEXT_NOISE * torch.rand(
        len(clips), 1, 1, 1, 1, device=clips.device
    ) * torch.randn_like(clips)
    noisy = torch.where(t > 0, (1 - t) * clips + t * noise, context)
    with torch.autocast(clips.device.type, torch.bfloat16):
        velocity = cast(Denoiser, model["denoiser"]).over_clip(
            noisy, level, model["text"](tokens), window.allowed.to(clips.device)
        )
    error = (velocity.float() - (clips - noise)).square().mean((2, 3, 4))
    # Middling levels decide what is seen: near 1 most of the error is chance, near 0 it is too small to see.
    counted = ((level > 0) & present) * (LEAST_WEIGHT + (1 - LEAST_WEIGHT) * 4 * level * (1 - level))
    return (error * counted).sum() / counted.sum()


if __name__ == "__main__":
    main()
