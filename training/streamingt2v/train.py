"""Train `shapes-streamingt2v`: `python -m training.streamingt2v.train --help`.

    python -m training.streamingt2v.train --folder runs/streamingt2v --stage base --minutes 60
    python -m training.streamingt2v.train --folder runs/streamingt2v --stage stream --minutes 60
    python -m training.streamingt2v.train --folder runs/streamingt2v --stage stream --conditioning add --steps 4000

`base` is a text-to-video model of windows of 16 latents: the first stage and the enhancer. `stream` goes on from it with the module that
reads the frames before and the one that reads the anchor; one step in four remains text-to-video, so that one set of weights serves
all. The recipe is the paper's: the condition is the window's first 8 frames, the anchor any frame of the 16 before, and text, anchor
and both are left out in one clip of twenty each. Other than there, nothing is frozen, the networks predict v, and condition and anchor
carry a little noise, since at inference they were generated. Every stage resumes from its files, which are saved every two minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyengine.export.families.shapes.text_encoder import null_ids
from pyengine.export.families.streamingt2v.small import BETAS, CONDITION_FRAMES, FRAMES, TIMESTEPS
from pyengine.schedule.samplers import alphas_cumprod
from training.shapes.trainer import WARM_UP_STEPS, Clock, Trainer
from training.streamingt2v.corpus import load_corpus
from training.streamingt2v.model import CONDITIONINGS, Model

STAGES = ("base", "stream")
DROPOUT = 0.05  # of the text, of the anchor, and of both
TEXT_ALONE = 4  # of so many steps of `stream` one has no condition
GIVEN_NOISE = 0.15  # most noise of condition and anchor
ANCHOR_FRAMES = 16  # before the window, any of which may be the anchor
COOLING = 0.4  # share of the time in which the rate falls


def rate_at(progress: float, step: int) -> float:
    """Fraction of the peak rate: linear warm-up, constant, and at the end of the given time a linear fall to 3 %."""
    cooled = min(1.0, max(0.0, (1 - progress) / COOLING))
    return min(1.0, (step + 1) / WARM_UP_STEPS) * max(0.03, cooled)


def velocity_loss(
    model: Model, clean: Tensor, context: Tensor, condition: Tensor | None, alpha_bar: Tensor
) -> Tensor:
    """Squared error of v = sqrt(abar) eps - sqrt(1 - abar) x0 (arXiv:2202.00512) over all frames of windows [n, 16, 8, 8, 8]."""
    t = torch.randint(TIMESTEPS, (len(clean),))
    level = alpha_bar[t].reshape(-1, 1, 1, 1, 1)
    noise = torch.randn_like(clean)
    noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
    predicted = model.predict(noisy, t, context, condition)
    return (predicted.float() - (level.sqrt() * noise - (1 - level).sqrt() * clean)).square().mean()


def noised(given: Tensor) -> Tensor:
    """Condition or anchor with a little noise of its own strength per clip."""
    share = GIVEN_NOISE * torch.rand(len(given), *[1] * (given.ndim - 1))
    return given + share * torch.randn_like(given)


def draw(latents: Tensor, tokens: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random windows [batch, 16, 8, 8, 8], an anchor [batch, 8, 8, 8] from the frames before each, and captions [batch, 20]."""
    pick = torch.randint(len(latents), (batch, 1))
    start = torch.randint(CONDITION_FRAMES, latents.shape[1] - FRAMES + 1, (batch, 1))
    window = latents[pick, start + torch.arange(FRAMES)].float()
    back = (torch.rand(batch, 1) * start.clamp(max=ANCHOR_FRAMES)).long() + 1
    return window, latents[pick, start - back].squeeze(1).float(), tokens[pick.squeeze(1)]


def stage_loss(
    model: Model, stage: str, step: int, data: tuple[Tensor, Tensor], batch: int, alpha_bar: Tensor
) -> Tensor:
    """The loss of one step of a stage."""
    clean, anchor, tokens = draw(*data, batch)
    drop = torch.rand(batch, 1)
    tokens = torch.where(drop < 2 * DROPOUT, null_ids(), tokens)
    if stage == "base" or step % TEXT_ALONE == 0:
        return velocity_loss(model, clean, model.context(tokens), None, alpha_bar)
    hidden = ((drop > DROPOUT) & (drop < 3 * DROPOUT))[..., None, None]
    anchor = torch.where(hidden, 0.0, noised(anchor))
    condition = noised(clean[:, :CONDITION_FRAMES])
    return velocity_loss(model, clean, model.context(tokens, anchor), condition, alpha_bar)


def begin(model: Model, folder: Path) -> None:
    """The weights of stage `base`, and an extractor that is a copy of its encoder."""
    found = load_file(folder / "average.safetensors")
    model.load_state_dict(
        model.state_dict() | {name: value for name, value in found.items() if name in model.state_dict()}
    )
    model.begin_extractor()


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(1)
    folder = arguments.folder / stage_name(arguments.stage, arguments.conditioning)
    data = load_corpus(arguments.corpus or arguments.folder / "corpus")
    model = Model(arguments.conditioning)
    if arguments.stage == "stream" and not (folder / "optimiser.safetensors").exists():
        begin(model, arguments.folder / "base")
    trainer = Trainer(model, folder, peak_rate=arguments.rate, ema=arguments.ema, muon=True)
    torch.manual_seed(trainer.step + 2)
    alpha_bar = torch.from_numpy(alphas_cumprod(BETAS[0], BETAS[1], TIMESTEPS)).float()
    clock = Clock(arguments.steps, arguments.minutes)
    with sdpa_kernel(SDPBackend.MATH):  # much quicker than the flash kernel for so few tokens
        while (progress := clock.progress(trainer.step)) < 1:
            with torch.autocast("cpu", torch.bfloat16):
                loss = stage_loss(model, arguments.stage, trainer.step, data, arguments.batch, alpha_bar)
            trainer.update(loss, rate_at(progress, trainer.step))
    trainer.save()


def stage_name(stage: str, conditioning: str) -> str:
    """Folder of a stage."""
    return stage if stage == "base" or conditioning == "cam" else f"{stage}-{conditioning}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/streamingt2v"), help="a folder per stage, and the corpus"
    )
    parser.add_argument("--corpus", type=Path, help="encoded clips; FOLDER/corpus unless given")
    parser.add_argument("--stage", choices=STAGES, default="base")
    parser.add_argument(
        "--conditioning",
        choices=CONDITIONINGS,
        default="cam",
        help="cam ships, the others are compared with it",
    )
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps in all")
    parser.add_argument("--minutes", type=float, help="stop after so long; the rate then follows the clock")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments)


if __name__ == "__main__":
    main()
