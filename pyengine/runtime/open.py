"""Opens a plan on the device that it was built for."""

from __future__ import annotations

from pyengine.plans.plan import Plan
from pyengine.runtime.executor import Program

__all__ = ["load_program"]


def load_program(source: Plan) -> Program:
    """The program of a plan, on the device that it was built for. Raises BackendUnavailable, PlanError."""
    if source.device == "cuda":
        from pyengine.runtime.cuda.executor import CudaProgram

        return CudaProgram(source)
    return Program(source)
