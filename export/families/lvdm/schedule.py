"""The noise schedule of the released configurations: betas linear in their square root, which the yaml calls `linear`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """`linear_start` and `linear_end` are the first and last beta. Tables are float64 [timesteps]."""

    linear_start: float
    linear_end: float
    timesteps: int = 1000

    @cached_property
    def betas(self) -> np.ndarray:
        return np.linspace(self.linear_start**0.5, self.linear_end**0.5, self.timesteps) ** 2

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1 - self.betas)
