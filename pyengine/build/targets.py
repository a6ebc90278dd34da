"""Plans for GPUs that are not here, made on a machine that needs none: `pyengine build shapes --target sm89,sm120`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyengine.build.builder import build
from pyengine.build.progress import Progress
from pyengine.build.variants import all_variants, second_stage_of
from pyengine.bundle.bundle import Bundle
from pyengine.errors import ConfigError
from pyengine.options import EngineOptions
from pyengine.plans.plan import Plan

__all__ = ["build_targets"]


def build_targets(
    bundle: str | Path, targets: Sequence[str], options: EngineOptions, progress: Progress | None = None
) -> list[Plan]:
    """Every part that the bundle's own method needs, per target. Copied to the cache folder of a machine with such a
    GPU, it is found there by `load(bundle, backend="tensorrt")` with the same options and versions.

    targets  compute capabilities, as `sm89`

    Raises ConfigError, BackendUnavailable, PlanError.
    """
    if options.backend != "tensorrt":
        raise ConfigError(f"a build for other GPUs needs backend tensorrt but got {options.backend}")
    if options.refit:
        raise ConfigError(
            "engines that take new weights can only be built beside their GPU: leave out the targets or refit"
        )
    if not targets or len(set(targets)) != len(targets):
        raise ConfigError(
            f"expected one or more different targets such as sm89,sm120 but got {','.join(targets)!r}"
        )
    loaded = Bundle.load(bundle)
    stages = [(loaded, tuple(all_variants(loaded)))]
    second = second_stage_of(loaded)
    stages += [] if second is None else [second]
    return [
        build(stage, variants=variants, options=options, target=target, progress=progress)
        for target in targets
        for stage, variants in stages
    ]
