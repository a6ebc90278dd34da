"""The processor that kernels run on."""

from __future__ import annotations

from pyengine import _C
from pyengine.errors import ConfigError

__all__ = ["instruction_set"]


def instruction_set() -> str:
    """The instruction set of our kernels: the best of this processor, or PYENGINE_CPU_ISA. Raises ConfigError for an unknown one."""
    try:
        return str(_C.cpu_isa())
    except ValueError as error:
        raise ConfigError(f"{error}; unset PYENGINE_CPU_ISA for the best of this processor") from error
