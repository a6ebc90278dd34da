"""What a manifest may say. A bundle is untrusted input: this is checked once, when it is read, before anything uses a name or a size.

    check_manifest(manifest)        # types, ranges, names, and that what is named is there
    check_constants(folder, parts)  # that every constant lies inside its file

Both raise ValueError in one sentence that names the entry by its dotted path. Entries that are not listed here are left to the
dataclasses of `manifest.py`, which refuse those that they do not have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pyengine.bundle import values
from pyengine.bundle.manifest import CLEANING_RULES, Component
from pyengine.bundle.values import Check

__all__ = ["check_constants", "check_manifest", "is_inside"]

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
        values.present(manifest, key, "")
    values.name(manifest["name"], "name")
    for key in ("family", "version"):
        values.text(manifest[key], key)
    _files(manifest["files"])
    _optional(manifest, "video", VIDEO)
    _optional(manifest, "latent", LATENT)
    _optional(manifest, "text", TEXT)
    values.items(manifest["branches"], "branches", values.text)
    if not 1 <= len(manifest["branches"]) <= MOST_BRANCHES:
        values.fail("branches", f"1 to {MOST_BRANCHES} names", manifest["branches"])
    _method(manifest["method"])
    values.entries(manifest["components"], "components", _component)
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


def _optional(
    manifest: Mapping[str, Any], key: str, checks: tuple[Mapping[str, Check], Mapping[str, Check]]
) -> None:
    if manifest.get(key) is not None:
        values.record(manifest[key], key, *checks)


SIDE = values.whole(1, MOST_SIDE)
PER_LATENT = values.number(0, 1024)
VIDEO = (
    {"height": SIDE, "width": SIDE, "fps": values.number(0, 1000), "frames_per_latent": PER_LATENT},
    {"first_frames": values.or_none(PER_LATENT)},
)
LATENT: tuple[dict[str, Check], dict[str, Check]] = (
    {"channels": values.whole(1, 65536), "height": SIDE, "width": SIDE},
    {},
)
CLEANING: tuple[dict[str, Check], dict[str, Check]] = (
    {},
    {
        "suffix": values.text,
        "unless": values.text,
        "rules": values.one_of(*CLEANING_RULES),
        "passes": values.whole(1, 16),
    },
)
TEXT = (
    {"tokenizer": values.text, "max_tokens": values.whole(1, 65536)},
    {
        "kind": values.one_of("words", "t5", "umt5"),
        "source": values.or_none(values.text),
        "dtype": values.one_of("float32", "float16", "bfloat16"),
        "words": values.or_none(values.whole(1, 65536)),
        "cleaning": values.or_none(lambda value, path: values.record(value, path, *CLEANING)),
        "example": values.text,
    },
)


# Kinds of the settings that methods have in common, so that a manifest with another is refused when it is read, before anything is built
# for it. Which settings a method takes, their ranges and what they mean together is checked by the method.
_COUNT, _FRAMES = values.whole(1, MOST_COUNT), values.whole(0, MOST_COUNT)
SETTINGS: dict[str, Check] = {
    **dict.fromkeys(("steps", "timesteps", "chunk_frames", "stride", "known", "clips_per_round"), _COUNT),
    **dict.fromkeys(("cadence", "left_context", "sink_frames", "recent_frames", "ring_frames"), _FRAMES),
    "visible_frames": _COUNT,
    "first_chunk": values.or_none(_COUNT),
    "known_levels": values.or_none(lambda value, path: values.items(value, path, values.number(-1, 1))),
    **dict.fromkeys(("clip_frames", "overlap_frames"), values.or_none(_COUNT)),
    **dict.fromkeys(("levels", "perturbation"), values.or_none(_FRAMES)),
    **dict.fromkeys(("guidance", "eta"), values.number(-math.inf, MOST_SETTING)),
    "frames_per_latent": PER_LATENT,
    "betas": lambda value, path: values.items(value, path, values.number(0, 1)),
    "ladder": values.or_none(lambda value, path: values.items(value, path, values.number(-1, 1))),
    "row_counts": values.or_none(lambda value, path: values.items(value, path, _COUNT)),
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
        values.text,
    ),
    "opening": values.or_none(values.text),
    "renoised": values.flag,
}


def _method(method: Any) -> None:
    """Bounded data, whose common settings are of the right kind. A bundle that is not streamed has none."""
    if not isinstance(method, dict):
        values.fail("method", "an object", method)
    if method:
        values.present(method, "name", "method")
        values.text(method["name"], "method.name")
    _setting(method, "method", MOST_DEPTH)
    presets = method.get("presets", {})
    values.entries(
        presets, "method.presets", lambda value, path: values.entries(value, path, lambda _value, _path: None)
    )


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
        values.items(value, path, lambda item, where: _setting(item, where, depth - 1))
    elif isinstance(value, str):
        values.text(value, path)
    elif type(value) in (int, float) and not abs(value) <= MOST_SETTING:
        values.fail(path, "a finite number", value)


# ---- files and components


def _files(files: Any) -> None:
    values.entries(files, "files", values.text)
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
    values.word(path.removeprefix("components."), "the name of a component")
    specs = {"inputs": _specs, "outputs": _specs}
    values.record(
        entry, path, {**specs, "portable": values.text, "inline": _graph}, {"cut": values.or_none(_graph)}
    )
    for key in ("state", "ring"):
        values.entries(entry.get(key, {}), f"{path}.{key}", values.text)
    symbols = entry.get("symbols", {})
    values.entries(symbols, f"{path}.symbols", values.whole(1, 2**20))
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
        values.record(entry, where, {"shape": _shape, "dtype": values.text}, {})

    values.entries(value, path, spec)


def _shape(value: Any, path: str) -> None:
    values.items(value, path, _dim)
    if len(value) > MOST_DIMS:
        raise ValueError(f"{path} must have at most {MOST_DIMS} dims but has {len(value)}")


def _dim(value: Any, path: str) -> None:
    is_size = type(value) is int and 0 <= value <= MOST_SIZE
    is_sum = isinstance(value, str) and DIM.fullmatch(value)
    if not is_size and not is_sum:
        values.fail(path, "a size, or a sum of products of symbols and sizes", value)


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
    constant = {
        "shape": _constant_shape,
        "dtype": values.one_of(*BYTES),
        "file": values.text,
        "offset": values.whole(0, 2**62),
    }
    step = {"kind": values.one_of(*KINDS), "inputs": _names, "outputs": _names}
    others = {
        "file": values.or_none(values.text),
        "precision": values.or_none(values.one_of("fp32")),
        "op": values.or_none(values.text),
        "attributes": lambda entry, where: values.entries(
            entry, where, lambda item, inner: _setting(item, inner, 2)
        ),
    }
    values.record(
        value,
        path,
        {
            "tensors": _specs,
            "constants": lambda entry, where: values.entries(
                entry, where, lambda item, inner: values.record(item, inner, constant, {})
            ),
            "steps": lambda entry, where: values.items(
                entry, where, lambda item, inner: values.record(item, inner, step, others)
            ),
        },
        {},
    )


def _constant_shape(value: Any, path: str) -> None:
    values.items(value, path, values.whole(0, MOST_SIZE))
    if len(value) > MOST_DIMS:
        raise ValueError(f"{path} must have at most {MOST_DIMS} dims but has {len(value)}")


def _names(value: Any, path: str) -> None:
    values.items(value, path, values.text)


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
