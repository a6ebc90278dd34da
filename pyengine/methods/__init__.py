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
from pyengine.methods.rflow import RflowSettings
from pyengine.methods.shared import MethodSettings
from pyengine.methods.streamingt2v import StreamingT2V, StreamingT2VSettings
from pyengine.schedule.call import Schedule
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
    "make_method",
    "method_settings",
]

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
) -> Schedule:
    """The schedule of these settings, or of a mapping that `method_settings` reads. `chunks` to generate, None = endless.

    Raises ConfigError.
    """
    how = method_settings(settings) if isinstance(settings, Mapping) else settings
    return how.schedule(chunks, given_chunks)


def _kind(name: Any) -> type[MethodSettings]:
    if isinstance(name, str) and name in SETTINGS:
        return SETTINGS[name]
    raise ConfigError(f"[method.name] expected a method out of {', '.join(SETTINGS)} but got {shown(name)}")
