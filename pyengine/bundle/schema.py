"""What a manifest may say. A bundle is untrusted input: this is checked once, when it is read, before anything uses a name or a size.

    check_manifest(manifest)        # types, ranges, names, and that what is named is there
    check_constants(folder, parts)  # that every constant lies inside its file

Both raise ValueError in one sentence that names the entry by its dotted path. Entries that are not listed here are left to the
dataclasses of `manifest.py`, which refuse those that they do not have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pyengine.bundle.manifest import CLEANING_RULES, Component

__all__ = ["check_constants", "check_manifest", "is_inside"]

Check = Callable[[Any, str], None]
NAME = re.compile(r"[^\W_][\w.+ -]{0,99}")  # also the name of a folder of plans
WORD = re.compile(r"\w[\w.-]{0,99}")  # of a component, also a part of the names of its plans
DIM = re.compile(r"(\d{1,9}|[a-z]\w{0,40})([+*](\d{1,9}|[a-z]\w{0,40})){0,8}")
MOST_SIDE = 16384  # rows or columns of a frame
MOST_SIZE = 2**31 - 1  # of one dim
MOST_ELEMENTS = 2**36  # of one tensor, at the sizes of the example
MOST_DIMS = 8
MOST_BRANCHES = 16
MOST_DEPTH = 8  # of settings within settings
MOST_SETTING = 1e9
MOST_COUNT = 65536  # of steps, or of latent frames in one window
BYTES = {"working": 4, "float32": 4, "float16": 2, "int64": 8, "uint8": 1, "bool": 1}
KINDS = ("segment", "op", "append")


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raises ValueError for the first entry that cannot be."""
    for key in ("name", "family", "version", "branches", "method", "components", "files"):
        _present(manifest, key, "")
    _name(manifest["name"], "name")
    for key in ("family", "version"):
        _text(manifest[key], key)
    _files(manifest["files"])
    _optional(manifest, "video", VIDEO)
    _optional(manifest, "latent", LATENT)
    _optional(manifest, "text", TEXT)
    _list(manifest["branches"], "branches", _text)
    if not 1 <= len(manifest["branches"]) <= MOST_BRANCHES:
        _fail("branches", f"1 to {MOST_BRANCHES} names", manifest["branches"])
    _method(manifest["method"])
    _mapping(manifest["components"], "components", _component)
    text = manifest.get("text")
    if text is not None and text.get("kind", "words") == "words":
        _listed(text["tokenizer"], "text.tokenizer", manifest["files"])
    for name, entry in manifest["components"].items():
        for path, file in _named_files(entry):
            _listed(file, f"components.{name}.{path}", manifest["files"])


def check_constants(folder: Path, components: Mapping[str, Component]) -> None:
    """Raises ValueError for a constant that does not lie inside its file. Files that are missing are reported elsewhere."""
    sizes: dict[str, int] = {}
    for component in components.values():
        for graph in (component.inline, component.cut):
            for name, constant in (graph.constants if graph else {}).items():
                path = folder / constant.file
                if not path.is_file():
                    continue
                size = sizes.setdefault(constant.file, path.stat().st_size)
                end = constant.offset + math.prod(constant.shape) * BYTES[constant.dtype]
                if end > size:
                    raise ValueError(
                        f"constant {name!r} of component {component.name!r} ends at byte {end} of {constant.file}, which has {size}"
                    )


def is_inside(name: str) -> bool:
    """Whether a file of that name lies inside its bundle: relative, and no step out."""
    path = PurePosixPath(name)
    is_plain = not path.is_absolute() and ".." not in path.parts and not re.search(r"[\0\\]", name)
    return is_plain and 0 < len(path.parts) < 20 and all(len(part) <= 200 for part in path.parts)


# ---- values


def _fail(path: str, expected: str, value: Any) -> None:
    text = repr(value)
    raise ValueError(f"{path} must be {expected} but is {text if len(text) <= 60 else type(value).__name__}")


def _present(entry: Mapping[str, Any], key: str, path: str) -> None:
    if key not in entry:
        raise ValueError(f"no '{key}'" + (f" in {path}" if path else ""))


def _text(value: Any, path: str) -> None:
    if not isinstance(value, str) or len(value) > 1000:
        _fail(path, "text", value)


def _name(value: Any, path: str) -> None:
    if not isinstance(value, str) or not NAME.fullmatch(value) or len(value.encode(errors="replace")) > 200:
        _fail(path, "a name of letters, digits and '._+-', at most 100 of them", value)


def _word(value: Any, path: str) -> None:
    if not isinstance(value, str) or not WORD.fullmatch(value):
        _fail(path, "a name of letters, digits and '._-'", value)


def _whole(least: int, most: int) -> Check:
    def check(value: Any, path: str) -> None:
        if type(value) is not int or not least <= value <= most:
            _fail(path, f"a whole number from {least} to {most}", value)

    return check


def _number(above: float, most: float) -> Check:
    def check(value: Any, path: str) -> None:
        if type(value) not in (int, float) or not above < value <= most:
            least = "finite number" if above == -math.inf else f"number above {above:g} and"
            _fail(path, f"a {least} at most {most:g}", value)

    return check


def _flag(value: Any, path: str) -> None:
    if type(value) is not bool:
        _fail(path, "true or false", value)


def _one_of(*words: str) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, str) or value not in words:
            _fail(path, f"one of {', '.join(words)}", value)

    return check


def _or_none(inner: Check) -> Check:
    return lambda value, path: None if value is None else inner(value, path)


def _list(value: Any, path: str, inner: Check) -> None:
    if not isinstance(value, list):
        _fail(path, "a list", value)
    for index, item in enumerate(value):
        inner(item, f"{path}[{index}]")


def _mapping(value: Any, path: str, inner: Check) -> None:
    if not isinstance(value, dict):
        _fail(path, "an object", value)
    for name, item in value.items():
        inner(item, f"{path}.{name}")


def _record(value: Any, path: str, needed: Mapping[str, Check], others: Mapping[str, Check]) -> None:
    if not isinstance(value, dict):
        _fail(path, "an object", value)
    for key in needed:
        _present(value, key, path)
    for key, check in {**needed, **others}.items():
        if key in value:
            check(value[key], f"{path}.{key}")


def _optional(
    manifest: Mapping[str, Any], key: str, checks: tuple[Mapping[str, Check], Mapping[str, Check]]
) -> None:
    if manifest.get(key) is not None:
        _record(manifest[key], key, *checks)


SIDE = _whole(1, MOST_SIDE)
PER_LATENT = _number(0, 1024)
VIDEO = (
    {"height": SIDE, "width": SIDE, "fps": _number(0, 1000), "frames_per_latent": PER_LATENT},
    {"first_frames": _or_none(PER_LATENT)},
)
LATENT: tuple[dict[str, Check], dict[str, Check]] = (
    {"channels": _whole(1, 65536), "height": SIDE, "width": SIDE},
    {},
)
CLEANING: tuple[dict[str, Check], dict[str, Check]] = (
    {},
    {
        "suffix": _text,
        "unless": _text,
        "rules": _one_of(*CLEANING_RULES),
        "passes": _whole(1, 16),
    },
)
TEXT = (
    {"tokenizer": _text, "max_tokens": _whole(1, 65536)},
    {
        "kind": _one_of("words", "t5", "umt5"),
        "source": _or_none(_text),
        "dtype": _one_of("float32", "float16", "bfloat16"),
        "words": _or_none(_whole(1, 65536)),
        "cleaning": _or_none(lambda value, path: _record(value, path, *CLEANING)),
        "example": _text,
    },
)


# Kinds of the settings that methods have in common, so that a manifest with another is refused when it is read, before anything is built
# for it. Which settings a method takes, their ranges and what they mean together is checked by the method.
_COUNT, _FRAMES = _whole(1, MOST_COUNT), _whole(0, MOST_COUNT)
SETTINGS: dict[str, Check] = {
    **dict.fromkeys(("steps", "timesteps", "chunk_frames", "stride", "known", "clips_per_round"), _COUNT),
    **dict.fromkeys(("cadence", "left_context", "sink_frames", "recent_frames", "ring_frames"), _FRAMES),
    "visible_frames": _COUNT,
    "first_chunk": _or_none(_COUNT),
    "known_levels": _or_none(lambda value, path: _list(value, path, _number(-1, 1))),
    **dict.fromkeys(("clip_frames", "overlap_frames"), _or_none(_COUNT)),
    **dict.fromkeys(("levels", "perturbation"), _or_none(_FRAMES)),
    **dict.fromkeys(("guidance", "eta"), _number(-math.inf, MOST_SETTING)),
    "frames_per_latent": PER_LATENT,
    "betas": lambda value, path: _list(value, path, _number(0, 1)),
    "ladder": _or_none(lambda value, path: _list(value, path, _number(-1, 1))),
    "row_counts": _or_none(lambda value, path: _list(value, path, _COUNT)),
    **dict.fromkeys(
        (
            "kind",
            "sampler",
            "positions",
            "predicts",
            "guidance_form",
            "decode",
            "behaviour",
            "clean_view",
            "recache",
        ),
        _text,
    ),
    "opening": _or_none(_text),
    "renoised": _flag,
}


def _method(method: Any) -> None:
    """Bounded data, whose common settings are of the right kind. A bundle that is not streamed has none."""
    if not isinstance(method, dict):
        _fail("method", "an object", method)
    if method:
        _present(method, "name", "method")
        _text(method["name"], "method.name")
    _setting(method, "method", MOST_DEPTH)
    presets = method.get("presets", {})
    _mapping(presets, "method.presets", lambda value, path: _mapping(value, path, lambda _value, _path: None))


def _setting(value: Any, path: str, depth: int) -> None:
    """A setting of any method: data of bounded size."""
    if depth < 0:
        raise ValueError(f"{path} is nested too deep")
    if isinstance(value, dict):
        for name, item in value.items():
            _setting(item, f"{path}.{name}", depth - 1)
            if name in SETTINGS and path != "method.presets":
                SETTINGS[name](item, f"{path}.{name}")
    elif isinstance(value, list):
        _list(value, path, lambda item, where: _setting(item, where, depth - 1))
    elif isinstance(value, str):
        _text(value, path)
    elif type(value) in (int, float) and not abs(value) <= MOST_SETTING:
        _fail(path, "a finite number", value)


# ---- files and components


def _files(files: Any) -> None:
    _mapping(files, "files", _text)
    for name in files:
        if not is_inside(name):
            raise ValueError(f"file {name!r} lies outside the bundle")


def _listed(name: str, path: str, files: Mapping[str, str]) -> None:
    if name not in files:
        raise ValueError(
            f"{path} lists no file {name!r}"
            if not name
            else f"'files' lists no file {name!r}, which {path} names"
        )


def _component(entry: Any, path: str) -> None:
    _word(path.removeprefix("components."), "the name of a component")
    specs = {"inputs": _specs, "outputs": _specs}
    _record(entry, path, {**specs, "portable": _text, "inline": _graph}, {"cut": _or_none(_graph)})
    for key in ("state", "ring"):
        _mapping(entry.get(key, {}), f"{path}.{key}", _text)
    symbols = entry.get("symbols", {})
    _mapping(symbols, f"{path}.symbols", _whole(1, 2**20))
    outer = {**entry["inputs"], **entry["outputs"]}
    _sizes(outer, path, symbols)
    for key in ("inline", "cut"):
        if entry.get(key) is not None:
            graph = entry[key]
            _sizes(graph["tensors"], f"{path}.{key}.tensors", symbols)
            _relations(graph, f"{path}.{key}", {*outer, *graph["tensors"], *graph["constants"], ""})


def _specs(value: Any, path: str) -> None:
    def spec(entry: Any, where: str) -> None:
        # dtypes are checked by `manifest.py`.
        _record(entry, where, {"shape": _shape, "dtype": _text}, {})

    _mapping(value, path, spec)


def _shape(value: Any, path: str) -> None:
    _list(value, path, _dim)
    if len(value) > MOST_DIMS:
        raise ValueError(f"{path} must have at most {MOST_DIMS} dims but has {len(value)}")


def _dim(value: Any, path: str) -> None:
    is_size = type(value) is int and 0 <= value <= MOST_SIZE
    is_sum = isinstance(value, str) and DIM.fullmatch(value)
    if not is_size and not is_sum:
        _fail(path, "a size, or a sum of products of symbols and sizes", value)


def _sizes(specs: Mapping[str, Any], path: str, symbols: Mapping[str, int]) -> None:
    """That every symbol has a size and every tensor could be held."""
    for name, spec in specs.items():
        elements = 1
        for dim in spec["shape"]:
            terms = [term.split("*") for term in str(dim).split("+")]
            lacking = {factor for term in terms for factor in term if not factor.isdigit()} - set(symbols)
            if lacking:
                raise ValueError(
                    f"{path}: tensor {name!r} has the symbol {sorted(lacking)[0]!r}, which has no size"
                )
            elements *= sum(math.prod(int(symbols.get(factor, factor)) for factor in term) for term in terms)
        if elements > MOST_ELEMENTS:
            raise ValueError(
                f"{path}: tensor {name!r} must have at most {MOST_ELEMENTS} elements but has {elements}"
            )


def _graph(value: Any, path: str) -> None:
    constant = {"shape": _constant_shape, "dtype": _one_of(*BYTES), "file": _text, "offset": _whole(0, 2**62)}
    step = {"kind": _one_of(*KINDS), "inputs": _names, "outputs": _names}
    others = {
        "file": _or_none(_text),
        "precision": _or_none(_one_of("fp32")),
        "op": _or_none(_text),
        "attributes": lambda entry, where: _mapping(
            entry, where, lambda item, inner: _setting(item, inner, 2)
        ),
    }
    _record(
        value,
        path,
        {
            "tensors": _specs,
            "constants": lambda entry, where: _mapping(
                entry, where, lambda item, inner: _record(item, inner, constant, {})
            ),
            "steps": lambda entry, where: _list(
                entry, where, lambda item, inner: _record(item, inner, step, others)
            ),
        },
        {},
    )


def _constant_shape(value: Any, path: str) -> None:
    _list(value, path, _whole(0, MOST_SIZE))
    if len(value) > MOST_DIMS:
        raise ValueError(f"{path} must have at most {MOST_DIMS} dims but has {len(value)}")


def _names(value: Any, path: str) -> None:
    _list(value, path, _text)


def _relations(graph: Mapping[str, Any], path: str, known: Iterable[str]) -> None:
    for index, step in enumerate(graph["steps"]):
        where = f"{path}.steps[{index}]"
        for name in (*step["inputs"], *step["outputs"]):
            if name not in known:
                raise ValueError(f"{where} names the tensor {name!r}, which is none of its component's")
        for kind, key in (("segment", "file"), ("op", "op")):
            if step["kind"] == kind and not step.get(key):
                raise ValueError(f"no '{key}' in {where}")


def _named_files(entry: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "portable", entry["portable"]
    for key in ("inline", "cut"):
        graph = entry.get(key) or {"steps": (), "constants": {}}
        for index, step in enumerate(graph["steps"]):
            if step.get("file"):
                yield f"{key}.steps[{index}]", step["file"]
        for name, constant in graph["constants"].items():
            yield f"{key}.constants.{name}", constant["file"]
