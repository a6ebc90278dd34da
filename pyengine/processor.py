"""The processor that kernels run on."""

from __future__ import annotations

import os

from pyengine import _C
from pyengine.errors import ConfigError

__all__ = ["cores", "instruction_set"]


def instruction_set() -> str:
    """The instruction set of our kernels: the best of this processor, or PYENGINE_CPU_ISA. Raises ConfigError for an unknown one."""
    try:
        return str(_C.cpu_isa())
    except ValueError as error:
        raise ConfigError(f"{error}; unset PYENGINE_CPU_ISA for the best of this processor") from error


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
