"""What both trainings share: optimiser step, moving average, log and resume."""

from __future__ import annotations

import copy
import csv
import math
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

WARM_UP_STEPS = 100
SAVE_SECONDS = 120.0
LOG_STEPS = 20


def learning_rate(progress: float, step: int) -> float:
    """Fraction of the peak rate: linear warm-up, then a cosine to 2 %. `progress` is the share of the training that is done."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    )


class Clock:
    """How much of a training is done: its share of the steps or, where `minutes` are given, of that time.

    Under `torchrun` process 0 decides, so that all of them stop at the same step.
    """

    def __init__(self, steps: int, minutes: float | None) -> None:
        self.steps, self.minutes, self._started = steps, minutes, time.perf_counter()

    def progress(self, step: int) -> float:
        """In [0, 1); 1 or more when the training is over."""
        if self.minutes is None or step >= self.steps:
            return step / self.steps
        return agreed((time.perf_counter() - self._started) / 60 / self.minutes)


def agreed(value: float) -> float:
    """The value of process 0, so that all of them decide alike."""
    shared = torch.tensor(value, dtype=torch.float64)
    if distributed.is_initialized():
        distributed.broadcast(shared, 0)
    return float(shared)


def is_first() -> bool:
    """Whether this process is number 0, the one that logs and saves."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def join_processes(device: str) -> int:
    """Meet the other processes that `torchrun` started, if it did; the number of this one, 0 where it is alone."""
    if "WORLD_SIZE" not in os.environ:
        return 0
    distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    return distributed.get_rank()


class Trainer:
    """An optimiser, a moving average of the weights, a CSV log, and checkpoints in `folder` from which a new run resumes.

    AdamW throughout or, with `muon`, Muon for the matrices (Jordan 2024; update scaled to AdamW's size) and AdamW for the rest. A
    kernel of a convolution is a matrix of its output channels. Under `torchrun` the gradients of all processes are averaged; the first
    process logs and saves.

    The folder holds `model.safetensors` (raw), `average.safetensors` (what is shipped), `optimiser.safetensors` and `loss.csv`.
    """

    def __init__(
        self, model: nn.Module, folder: Path, *, peak_rate: float, ema: float, muon: bool = False
    ) -> None:
        self.model, self.folder, self.peak_rate, self.ema = model, folder, peak_rate, ema
        self.average = copy.deepcopy(model).requires_grad_(False)
        kernels = [
            p
            for name, p in model.named_parameters()
            if muon and p.ndim >= 2 and not any(word in name for word in ("table", "place", "label"))
        ]
        rest = [p for p in model.parameters() if all(p is not kernel for kernel in kernels)]
        # Muon takes matrices only: views that share their storage with the kernels.
        matrices = [p if p.ndim == 2 else nn.Parameter(p.data.flatten(1)) for p in kernels]
        self._kernels = list(zip(kernels, matrices, strict=True))
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
        ]
        if matrices:
            self.optimisers.append(
                torch.optim.Muon(matrices, lr=peak_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            )
        self.parameters = rest + matrices
        self.step, self._saved = 0, time.monotonic()
        self._losses: list[Tensor] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "optimiser.safetensors").exists():
            self._resume()

    def update(self, loss: Tensor, rate: float, also: dict[str, Tensor] | None = None) -> None:
        """One optimiser step at `rate` times the peak rate; logs every 20 steps, saves every two minutes. `also`: parts of the loss
        and other figures to print beside it."""
        self.model.zero_grad()
        loss.backward()
        self._share_gradients()
        for kernel, matrix in self._kernels:
            # None: the loss of this step has no use for it, and it stays as it is.
            matrix.grad = None if kernel.grad is None else kernel.grad.reshape(matrix.shape)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.peak_rate * rate
            optimiser.step()
        self.step += 1
        decay = min(self.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
            for kept, latest in zip(self.average.buffers(), self.model.buffers(), strict=True):
                kept.copy_(latest)
        self._losses.append(loss.detach())  # read when logged: a GPU need not wait for every step
        if self.step % LOG_STEPS == 0 and is_first():
            self._log(
                self.peak_rate * rate, {name: float(value.detach()) for name, value in (also or {}).items()}
            )
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write everything a later run needs to go on."""
        if not is_first():
            return
        self._write(_flat(self.model), "model")
        self._write(_flat(self.average), "average")
        moments = {"step": torch.tensor(self.step)}
        for index, parameter in enumerate(self.parameters):
            for name, value in self._state(parameter).items():
                moments[f"{index}.{name}"] = value.contiguous()
        self._write(moments, "optimiser")
        self._saved = time.monotonic()

    def _write(self, tensors: dict[str, Tensor], name: str) -> None:
        """A file that is whole whenever the process ends."""
        path = self.folder / f"{name}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        os.replace(partial, path)

    def _share_gradients(self) -> None:
        """Average the gradients over the processes, all of them in one message."""
        if not distributed.is_initialized():
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        message = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(message)
        message /= distributed.get_world_size()
        for gradient, shared in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(shared.view_as(gradient))

    def _resume(self) -> None:
        self.model.load_state_dict(load_file(self.folder / "model.safetensors"))
        self.average.load_state_dict(load_file(self.folder / "average.safetensors"))
        moments = load_file(self.folder / "optimiser.safetensors")
        self.step = int(moments.pop("step"))
        for key, value in moments.items():
            index, name = key.split(".", 1)
            parameter = self.parameters[int(index)]
            self._state(parameter)[name] = value.to(parameter.device if value.ndim else "cpu")

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        owner = next(
            o for o in self.optimisers if any(parameter is p for g in o.param_groups for p in g["params"])
        )
        return owner.state[parameter]

    def _log(self, rate: float, also: dict[str, float]) -> None:
        loss = torch.stack(self._losses).mean().item()
        self._losses.clear()
        path = self.folder / "loss.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["step", "loss", "rate", "time"])
            writer.writerow([self.step, f"{loss:.6f}", f"{rate:.3e}", int(time.time())])
        parts = "".join(f"  {name} {value:.4f}" for name, value in also.items())
        print(f"step {self.step:6d}  loss {loss:.5f}  rate {rate:.2e}{parts}", flush=True)


def _flat(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in module.state_dict().items()}
