"""Reads frozen dataclasses from mappings that anybody may have written: a manifest, a caller's override, a command line.

    @dataclass(frozen=True, kw_only=True)
    class Context:
        kind: Literal["ring", "recompute"] = "ring"
        recent_frames: Annotated[int, Range(0, 65536)]

    read(Context, {"kind": "ring", "recent_frames": "6"}, "method.context")
    # ConfigError: [method.context.recent_frames] expected a whole number from 0 to 65536 but got '6' (str)

Whatever the mapping holds, the result is the dataclass or a ConfigError of one sentence that names the setting by its dotted path, says
what was expected and what came. Text is never taken for a number, a bool never for an int; numbers of numpy become those of Python.

Types of fields: bool, int, float (finite), str, Path, Literal of strings, None, `tuple[X, ...]`, `tuple[X, Y]`, other such dataclasses,
unions of these, and `Annotated[number, Range(...)]`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from pyengine.errors import ConfigError

__all__ = ["Range", "check_fields", "names", "read", "read_mapping", "read_value", "shown"]

T = TypeVar("T")
SHOWN_CHARACTERS = 60  # of a refused value


class Range(NamedTuple):
    """Bounds of a number. Both ends belong to it, but for `least` where `above` is True."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    def holds(self, number: float) -> bool:
        return self.least <= number <= self.most and not (self.above and number == self.least)

    def __str__(self) -> str:
        least, most = (str(end) if isinstance(end, int) else f"{end:.10g}" for end in (self.least, self.most))
        if math.isinf(self.most):
            return f"above {least}" if self.above else f"of at least {least}"
        return f"above {least} and up to {most}" if self.above else f"from {least} to {most}"


def read(kind: type[T], values: Any, where: str) -> T:
    """The dataclass `kind` from a mapping. `where` is the dotted path of the mapping itself, for messages.

    Raises ConfigError for what is no mapping, for unknown, missing and bad settings, and what `kind` itself refuses.
    """
    mapping = read_mapping(values, where)
    fields = _fields(kind)  # type: ignore[arg-type]
    if unknown := [name for name in mapping if name not in fields]:
        raise ConfigError(
            f"[{where}] expected settings out of {', '.join(fields)} but got {', '.join(sorted(map(_word, unknown)))}"
        )
    if missing := [name for name, field in fields.items() if field.is_required and name not in mapping]:
        wanted = ", ".join(f"{where}.{name} ({_expected(fields[name].type)})" for name in missing)
        raise ConfigError(
            f"[{where}] expected {wanted} but {'it is' if len(missing) == 1 else 'they are'} missing"
        )
    return kind(
        **{name: read_value(fields[name].type, value, f"{where}.{name}") for name, value in mapping.items()}
    )


def read_mapping(values: Any, where: str) -> dict[Any, Any]:
    """A copy of a mapping. Raises ConfigError for anything else."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"[{where}] expected a mapping of settings but got {shown(values)}")
    return dict(values)


def read_value(kind: Any, value: Any, where: str) -> Any:
    """One value of a type that the module's docstring lists, converted to that very type. Raises ConfigError."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return _read_union(kind, value, where)
    if origin is tuple:
        return _read_tuple(kind, value, where)
    if dataclasses.is_dataclass(kind):
        return read(kind, value, where)  # type: ignore[arg-type]
    plain, limits = kind, Range()
    if origin is Annotated:
        plain, *notes = get_args(kind)
        limits = next((note for note in notes if isinstance(note, Range)), limits)
    found = _plain(plain, value)
    if found is _REFUSED or (isinstance(found, int | float) and not limits.holds(found)):
        raise ConfigError(f"[{where}] expected {_expected(kind)} but got {shown(value)}")
    return found


def check_fields(made: Any) -> None:
    """Reads every field of a frozen dataclass that is being made, for its `__post_init__`: so it cannot hold anything else.

    Raises ConfigError.
    """
    kind: Any = type(made)
    for name, field in _fields(kind).items():
        object.__setattr__(made, name, read_value(field.type, getattr(made, name), name))


def names(kind: type) -> tuple[str, ...]:
    """The settings that a dataclass has."""
    return tuple(_fields(kind))


def shown(value: Any) -> str:
    """A value for a message, shortened, with its type: `'8' (str)`."""
    if value is None:
        return "none"
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = SHOWN_CHARACTERS
    try:
        text = " ".join(brief.repr(value).split())
    except Exception:  # a repr of its own that fails, or an integer of more digits than Python prints
        return f"a value of type {type(value).__name__}"
    return f"{text[: 2 * SHOWN_CHARACTERS]} ({type(value).__name__})"


_REFUSED = object()


class _Field(NamedTuple):
    type: Any
    is_required: bool


@lru_cache(maxsize=64)
def _fields(kind: Any) -> dict[str, _Field]:
    types = get_type_hints(kind, include_extras=True)
    nothing = dataclasses.MISSING
    return {
        field.name: _Field(types[field.name], field.default is nothing and field.default_factory is nothing)
        for field in dataclasses.fields(kind)
    }


def _plain(kind: Any, value: Any) -> Any:
    """The value as `kind`, or _REFUSED."""
    is_bool = isinstance(value, bool | np.bool_)
    if kind is NoneType:
        return None if value is None else _REFUSED
    if kind is bool:
        return bool(value) if is_bool else _REFUSED
    if kind is int:
        return int(value) if isinstance(value, Integral) and not is_bool else _REFUSED
    if kind is float:
        return _finite(value) if isinstance(value, Real) and not is_bool else _REFUSED
    if kind is Path:
        return (
            Path(value) if isinstance(value, str | os.PathLike) and "\0" not in os.fspath(value) else _REFUSED
        )
    if kind is str:
        return str(value) if isinstance(value, str) else _REFUSED
    if get_origin(kind) is Literal:
        return str(value) if isinstance(value, str) and value in get_args(kind) else _REFUSED
    raise TypeError(f"settings cannot be of type {kind}")


def _finite(value: Real) -> Any:
    try:
        number = float(value)
    except OverflowError:
        return _REFUSED
    return number if math.isfinite(number) else _REFUSED


def _read_tuple(kind: Any, value: Any, where: str) -> tuple[Any, ...]:
    members = get_args(kind)
    items = list(value) if isinstance(value, list | tuple) or _is_row(value) else None
    is_open = members[-1] is Ellipsis
    if items is None or (not is_open and len(items) != len(members)):
        raise ConfigError(f"[{where}] expected {_expected(kind)} but got {shown(value)}")
    kinds = members[:1] * len(items) if is_open else members
    return tuple(
        read_value(member, item, f"{where}[{index}]")
        for index, (member, item) in enumerate(zip(kinds, items, strict=True))
    )


def _read_union(kind: Any, value: Any, where: str) -> Any:
    members = get_args(kind)
    if isinstance(value, Mapping):
        likely = [member for member in members if dataclasses.is_dataclass(member)]
    elif isinstance(value, list | tuple) or _is_row(value):
        likely = [member for member in members if get_origin(member) is tuple]
    else:
        likely = []
    if len(likely) == 1:
        return read_value(likely[0], value, where)  # whose message says which part is wrong
    for member in members:
        try:
            return read_value(member, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"[{where}] expected {_expected(kind)} but got {shown(value)}")


def _is_row(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1


def _expected(kind: Any, plural: bool = False) -> str:
    """What a type is called in a message."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [str(note) for note in members[1:] if isinstance(note, Range) and note != Range()]
        return " ".join([_expected(members[0], plural), *limits])
    if origin is Literal:
        return f"one of {', '.join(members)}" if len(members) > 1 else repr(members[0])
    if origin in (Union, UnionType):
        return " or ".join(_expected(member) for member in members)
    if origin is tuple:
        if members[-1] is Ellipsis:
            return f"a list of {_expected(members[0], plural=True)}"
        return f"a list of {' and '.join(_expected(member) for member in members)}"
    if dataclasses.is_dataclass(kind):
        return f"a mapping of {', '.join(names(kind))}"  # type: ignore[arg-type]
    one, many = {
        NoneType: ("none", "none"),
        bool: ("true or false", "true or false"),
        int: ("a whole number", "whole numbers"),
        float: ("a finite number", "finite numbers"),
        str: ("text", "texts"),
        Path: ("a path", "paths"),
    }[kind]
    return many if plural else one


def _word(name: Any) -> str:
    """The name of a setting that nobody knows."""
    plain = isinstance(name, str) and len(name) < SHOWN_CHARACTERS and name.isidentifier()
    return name if plain else shown(name)
