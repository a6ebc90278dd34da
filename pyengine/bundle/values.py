"""Checks of single values in a manifest, from which `pyengine.bundle.schema` is put together.

Each takes a value and the dotted path of its entry, and raises ValueError in one sentence that names the entry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "NAME",
    "WORD",
    "Check",
    "entries",
    "fail",
    "flag",
    "items",
    "name",
    "number",
    "one_of",
    "or_none",
    "present",
    "record",
    "text",
    "whole",
    "word",
]

Check = Callable[[Any, str], None]
NAME = re.compile(r"[^\W_][\w.+ -]{0,99}")  # also the name of a folder of plans
WORD = re.compile(r"\w[\w.-]{0,99}")  # of a component, also a part of the names of its plans


def fail(path: str, expected: str, value: Any) -> None:
    shown = repr(value)
    raise ValueError(
        f"{path} must be {expected} but is {shown if len(shown) <= 60 else type(value).__name__}"
    )


def present(entry: Mapping[str, Any], key: str, path: str) -> None:
    if key not in entry:
        raise ValueError(f"no '{key}'" + (f" in {path}" if path else ""))


def text(value: Any, path: str) -> None:
    if not isinstance(value, str) or len(value) > 1000:
        fail(path, "text", value)


def name(value: Any, path: str) -> None:
    if not isinstance(value, str) or not NAME.fullmatch(value) or len(value.encode(errors="replace")) > 200:
        fail(path, "a name of letters, digits and '._+-', at most 100 of them", value)


def word(value: Any, path: str) -> None:
    if not isinstance(value, str) or not WORD.fullmatch(value):
        fail(path, "a name of letters, digits and '._-'", value)


def whole(least: int, most: int) -> Check:
    def check(value: Any, path: str) -> None:
        if type(value) is not int or not least <= value <= most:
            fail(path, f"a whole number from {least} to {most}", value)

    return check


def number(above: float, most: float) -> Check:
    def check(value: Any, path: str) -> None:
        if type(value) not in (int, float) or not above < value <= most:
            least = "finite number" if above == -math.inf else f"number above {above:g} and"
            fail(path, f"a {least} at most {most:g}", value)

    return check


def flag(value: Any, path: str) -> None:
    if type(value) is not bool:
        fail(path, "true or false", value)


def one_of(*words: str) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, str) or value not in words:
            fail(path, f"one of {', '.join(words)}", value)

    return check


def or_none(inner: Check) -> Check:
    return lambda value, path: None if value is None else inner(value, path)


def items(value: Any, path: str, inner: Check) -> None:
    if not isinstance(value, list):
        fail(path, "a list", value)
    for index, item in enumerate(value):
        inner(item, f"{path}[{index}]")


def entries(value: Any, path: str, inner: Check) -> None:
    if not isinstance(value, dict):
        fail(path, "an object", value)
    for name, item in value.items():
        inner(item, f"{path}.{name}")


def record(value: Any, path: str, needed: Mapping[str, Check], others: Mapping[str, Check]) -> None:
    if not isinstance(value, dict):
        fail(path, "an object", value)
    for key in needed:
        present(value, key, path)
    for key, check in {**needed, **others}.items():
        if key in value:
            check(value[key], f"{path}.{key}")
