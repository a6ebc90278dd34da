"""Opens plans on the device that they were built for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyengine.backends.base import Engine
from pyengine.bundle.variant import Variant
from pyengine.plans.plan import Part, Plan
from pyengine.runtime.program import LoadedVariant, Program

__all__ = ["load_program", "load_variant"]


def load_program(source: Plan, loaded: Mapping[Variant, LoadedVariant] | None = None) -> Program:
    """The program of a plan, made of variants that are `loaded` or of all its parts. Raises BackendUnavailable, PlanError."""
    return _program_type(source)(source, loaded)


def load_variant(source: Plan, part: Part, engines: Sequence[Engine] | None = None) -> LoadedVariant:
    """One part in memory; `engines` where they are there already. Raises BackendUnavailable, PlanError."""
    return _program_type(source).variant_type.load(source, part, engines)


def _program_type(source: Plan) -> type[Program]:
    if source.device == "cuda":
        from pyengine.runtime.cuda.executor import CudaProgram

        return CudaProgram
    return Program
