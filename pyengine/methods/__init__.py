"""How each system uses the schedule. A method turns a bundle's settings into the records that a window obeys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyengine.errors import BundleError
from pyengine.methods.hierarchical import Hierarchical
from pyengine.methods.progressive import Progressive
from pyengine.methods.replacement import Replacement
from pyengine.methods.rflow import rflow
from pyengine.schedule.samplers import Sampler, alphas_cumprod, make_sampler

__all__ = ["Hierarchical", "Method", "Progressive", "Replacement", "make_method", "sampler_of"]

Method = Progressive | Replacement | Hierarchical


def make_method(settings: Mapping[str, Any], chunks: int | None, given_chunks: int) -> Method:
    """The method that a manifest (or a caller's override of it) names. `chunks` to generate, None = endless."""
    name = settings.get("name")
    if name == "progressive":
        return Progressive.from_settings(settings, chunks, given_chunks)
    if name == "replacement":
        return Replacement.from_settings(settings, chunks, given_chunks)
    if name == "rflow":
        return rflow(settings, chunks, given_chunks)
    if name in ("hierarchical", "clip"):
        return Hierarchical.from_settings(settings, chunks, given_chunks)
    raise BundleError(
        f"expected a method out of progressive, replacement, rflow, hierarchical, clip but got {name!r}; "
        "install the pyengine that made the bundle"
    )


def sampler_of(settings: Mapping[str, Any]) -> Sampler:
    """The sampler of a method's settings: the named one, or DDIM where there are betas."""
    if "betas" not in settings:
        return make_sampler(settings["sampler"])
    first, last = settings["betas"]
    table = alphas_cumprod(first, last, settings["timesteps"])
    predicts = settings.get("predicts", "epsilon")
    return make_sampler("ddim", alpha_bar=table, eta=settings["eta"], predicts=predicts)
