"""How a module takes the keys of a released yaml: reads what it knows, ignores what only training reads, refuses the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyengine.errors import ConfigError


def refuse_unknown(where: str, given: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Raises ConfigError for keys that would change the network but are not built here."""
    odd = sorted(set(given) - set(ignored))
    if odd:
        raise ConfigError(
            f"[{where}] expected keys of the released configurations but got {', '.join(odd)}; leave them out"
        )


def refuse_value(where: str, key: str, value: Any, expected: Any) -> None:
    """Raises ConfigError where a key that is read has a value that no released configuration uses."""
    if value != expected:
        raise ConfigError(f"[{where}] expected {key} {expected!r} but got {value!r}; only that is built")
