"""The methods by name, and their settings. A method turns a bundle's settings into a schedule, whose calls the driver makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyengine.errors import ConfigError
from pyengine.methods.artv import Artv, ArtvSettings
from pyengine.methods.causal import Causal, CausalSettings
from pyengine.methods.hierarchical import Hierarchical, HierarchicalSettings
from pyengine.methods.progressive import Progressive, ProgressiveSettings
from pyengine.methods.replacement import Replacement, ReplacementSettings
from pyengine.methods.rflow import RflowSettings, rflow
from pyengine.methods.shared import WindowSettings
from pyengine.methods.streamingt2v import StreamingT2V, StreamingT2VSettings
from pyengine.schedule.positions import PositionPolicy
from pyengine.schedule.progressive import noise_levels
from pyengine.schedule.samplers import Sampler, alphas_cumprod, make_sampler
from pyengine.schedule.timesteps import with_first_alpha
from pyengine.schedule.unipc import unipc
from pyengine.schedule.warp import resolve_warp
from pyengine.settings import names, read, read_mapping, shown

__all__ = [
    "SETTINGS",
    "Artv",
    "ArtvSettings",
    "Causal",
    "CausalSettings",
    "Hierarchical",
    "HierarchicalSettings",
    "MethodSettings",
    "Progressive",
    "ProgressiveSettings",
    "Replacement",
    "ReplacementSettings",
    "RflowSettings",
    "StreamingT2V",
    "StreamingT2VSettings",
    "check_presets",
    "first_chunk_of",
    "make_method",
    "method_settings",
    "positions_of",
    "sampler_of",
]

Method = Progressive | Replacement | Hierarchical | StreamingT2V | Artv | Causal
MethodSettings = (
    ProgressiveSettings
    | ReplacementSettings
    | RflowSettings
    | HierarchicalSettings
    | StreamingT2VSettings
    | ArtvSettings
    | CausalSettings
)
# By the name that a manifest gives the method.
SETTINGS: dict[str, type[MethodSettings]] = {
    "progressive": ProgressiveSettings,
    "causal": CausalSettings,
    "replacement": ReplacementSettings,
    "rflow": RflowSettings,
    "hierarchical": HierarchicalSettings,
    "clip": HierarchicalSettings,
    "streamingt2v": StreamingT2VSettings,
    "artv": ArtvSettings,
}


def method_settings(own: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> MethodSettings:
    """The settings of a manifest's `method`, with the changes of a caller. Both may be any mappings at all.

    `changes` may name one of the manifest's presets, {"preset": "rflow"}, and change that. Where they name another method, what the two
    methods have in common stays as it is in the manifest. `dataclasses.asdict` of the result is a mapping that reads back as the same.

    Raises ConfigError that names the setting.
    """
    settings = read_mapping(own, "method")
    presets = read_mapping(settings.pop("presets", {}), "method.presets")
    changed = read_mapping({} if changes is None else changes, "method")
    if "preset" in changed:
        name = changed.pop("preset")
        if not isinstance(name, str) or name not in presets:
            known = ", ".join(sorted(map(str, presets))) or "none"
            raise ConfigError(
                f"[method.preset] expected a preset out of {known} but got {shown(name)}; see `pyengine info`"
            )
        changed = read_mapping(presets[name], f"method.presets.{name}") | changed
    kind = _kind(changed.get("name", settings.get("name")))
    if "name" in settings and kind is not _kind(settings["name"]):
        settings = {name: value for name, value in settings.items() if name in names(kind)}
    return read(kind, settings | changed, "method")


def check_presets(own: Mapping[str, Any]) -> None:
    """Reads every preset of a manifest's `method`. Raises ConfigError that names the preset."""
    for name in read_mapping(own.get("presets", {}), "method.presets"):
        try:
            method_settings(own, {"preset": name})
        except ConfigError as error:
            raise ConfigError(f"{error}, in the preset {name}") from error


def make_method(
    settings: MethodSettings | Mapping[str, Any], chunks: int | None, given_chunks: int
) -> Method:
    """The method of these settings, or of a mapping that `method_settings` reads. `chunks` to generate, None = endless.

    Raises ConfigError.
    """
    if isinstance(settings, Mapping):
        settings = method_settings(settings)
    if isinstance(settings, ProgressiveSettings):
        return Progressive.from_settings(settings, chunks, given_chunks)
    if isinstance(settings, CausalSettings):
        return Causal.from_settings(settings, chunks, given_chunks)
    if isinstance(settings, ReplacementSettings):
        return Replacement.from_settings(settings, chunks, given_chunks)
    if isinstance(settings, RflowSettings):
        return rflow(settings, chunks, given_chunks)
    if isinstance(settings, StreamingT2VSettings):
        return StreamingT2V.from_settings(settings, chunks, given_chunks)
    if isinstance(settings, ArtvSettings):
        return Artv.from_settings(settings, chunks, given_chunks)
    return Hierarchical.from_settings(settings, chunks, given_chunks)


def sampler_of(settings: MethodSettings) -> Sampler:
    """How latents go from level to level: by the sampler that the settings name, or DDIM where they say betas."""
    if isinstance(settings, (HierarchicalSettings, ArtvSettings)):
        table = alphas_cumprod(*settings.betas, settings.timesteps)
        return make_sampler("ddim", alpha_bar=table, eta=settings.eta, predicts=settings.predicts)
    if isinstance(settings, StreamingT2VSettings):
        table = alphas_cumprod(*settings.betas, settings.timesteps)
        return make_sampler(
            "ddim", alpha_bar=with_first_alpha(table), eta=settings.eta, predicts=settings.predicts
        )
    if isinstance(settings, CausalSettings) and settings.sampler == "unipc":
        return unipc(noise_levels(settings.steps, resolve_warp(settings.warp, 0), settings.ladder, top=None))
    return make_sampler(settings.sampler)


def first_chunk_of(settings: MethodSettings) -> int:
    """Latent frames of the first chunk of a video."""
    if isinstance(settings, CausalSettings) and settings.first_chunk is not None:
        return settings.first_chunk
    return settings.chunk_frames


def positions_of(settings: MethodSettings) -> tuple[PositionPolicy, int]:
    """How frames are numbered for the rotary embedding, and how many of them are pinned at the start of the stream."""
    if not isinstance(settings, WindowSettings):
        return "local", 0
    if isinstance(settings, CausalSettings):
        return settings.positions, settings.sink_frames
    return settings.positions, settings.context.sink_frames if settings.context else 0


def _kind(name: Any) -> type[MethodSettings]:
    if isinstance(name, str) and name in SETTINGS:
        return SETTINGS[name]
    raise ConfigError(f"[method.name] expected a method out of {', '.join(SETTINGS)} but got {shown(name)}")
