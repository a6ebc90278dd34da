"""Plans for cards that are not here, made on a machine that needs none: `pyengine build shapes --target sm89,sm120`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyengine.build.builder import build
from pyengine.bundle.bundle import Bundle
from pyengine.errors import ConfigError
from pyengine.methods.variants import all_variants
from pyengine.plans.plan import Plan

__all__ = ["build_targets"]


def build_targets(bundle: str | Path, targets: Sequence[str], **options: Any) -> list[Plan]:
    """Every part that the bundle's own method needs, per target. Copied to the cache folder of a machine with such a
    card, it is found there by `load(bundle, backend="tensorrt")` with the same options and versions.

    targets  compute capabilities, as `sm89`
    options  of `build`: precision, choice, cache_dir, threads, progress

    Raises ConfigError, BackendUnavailable, PlanError.
    """
    if not targets or len(set(targets)) != len(targets):
        raise ConfigError(
            f"expected one or more different targets such as sm89,sm120 but got {','.join(targets)!r}"
        )
    loaded = Bundle.load(bundle)
    variants = all_variants(loaded)
    return [
        build(loaded, variants=variants, backend="tensorrt", target=target, **options) for target in targets
    ]
