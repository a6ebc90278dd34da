"""A bundle: a folder with `manifest.json`, portable `.onnx` files that share one `weights.bin`, and a tokenizer. Data only, no code.

    bundle = Bundle.load("shapes")                       # a bundled name or a folder; every file is checked against its sha256
    bundle.components["denoiser"].inputs["latents"]      # TensorSpec(shape=("frames", 8, 8, 8), dtype="float32")

dtype names are numpy's, and `working`: float32 in an fp32 plan, bf16 (numpy uint16) in a bf16 plan.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import BundleError

FORMAT = 1
MANIFEST = "manifest.json"
BUNDLED = Path(__file__).parent / "bundles"
DTYPES = frozenset({"working", "float32", "int64", "uint8", "bool"})
Symbols = Mapping[str, int]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor. A dim is an int, a symbol (`frames`) or a sum of products (`2*frames+ring`)."""

    shape: tuple[int | str, ...]
    dtype: str

    def resolve(self, symbols: Symbols) -> tuple[int, ...]:
        """The shape in numbers. Raises BundleError for a symbol without a value."""
        return tuple(_dim(dim, symbols) for dim in self.shape)


@dataclass(frozen=True)
class Constant:
    """A weight that an op reads: raw bytes at `offset` of `file`."""

    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int


@dataclass(frozen=True)
class Step:
    """One step of a graph. `kind`: `segment` (an .onnx file), `op` (a kernel of ours), `append` (of two outputs to a ring), or `copy`
    (broadcasts an input). `precision` is set where a segment must keep it in every plan.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    file: str | None = None
    precision: str | None = None
    op: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """The steps of a component. `tensors` are those that cross a border between steps, `constants` the weights that ops read."""

    tensors: Mapping[str, TensorSpec]
    constants: Mapping[str, Constant]
    steps: tuple[Step, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(step.file for step in self.steps if step.file)


@dataclass(frozen=True)
class Component:
    """A network of the bundle, in three forms: `portable` ONNX for any runtime, `inline` with our ops as plain ONNX that a backend
    compiles whole, and `cut` at our ops (None without any). `state` maps an input to the output that replaces it after a run;
    `ring` maps an input to the output that is appended to it. `symbols` are the symbolic dims, with the sizes of the example.
    """

    name: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    symbols: Mapping[str, int]
    state: Mapping[str, str]
    ring: Mapping[str, str]
    portable: str
    inline: Graph
    cut: Graph | None = None

    @property
    def append_spec(self) -> TensorSpec | None:
        """`append_slot`: the ring slot that each active frame is written to after the run, -1 for none. None without a ring."""
        if not self.ring:
            return None
        frames = self.outputs[next(iter(self.ring.values()))].shape[1]
        return TensorSpec((frames,), "int64")


@dataclass(frozen=True)
class Video:
    height: int
    width: int
    fps: float
    frames_per_latent: int


@dataclass(frozen=True)
class Latent:
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Text:
    tokenizer: str
    max_tokens: int


@dataclass(frozen=True)
class Bundle:
    """A loaded manifest. `files` maps every other file to its sha256; `method` is read by `pyengine.methods`."""

    folder: Path
    name: str
    family: str
    version: str
    video: Video | None
    latent: Latent | None
    text: Text | None
    method: Mapping[str, Any]
    components: Mapping[str, Component]
    files: Mapping[str, str]

    @classmethod
    def load(cls, source: str | Path, *, verify: bool = True) -> Bundle:
        """Reads a folder, or a bundle that ships with pyengine by its name. Raises BundleError in one sentence."""
        folder = _locate(source)
        manifest = _read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise BundleError(
                f"{folder / MANIFEST}: expected format {FORMAT} but got {manifest.get('format')!r}; export the bundle again or "
                "install the pyengine that made it"
            )
        try:
            bundle = _parse(folder, manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise BundleError(f"{folder / MANIFEST} is not a valid manifest ({what}); export the bundle again") from error
        if verify:
            bundle.verify()
        return bundle

    def path(self, name: str) -> Path:
        """The path of a file that the manifest lists."""
        if name not in self.files:
            raise BundleError(f"bundle '{self.name}' lists no file {name!r} in its manifest; export the bundle again")
        return self.folder / name

    def verify(self) -> None:
        """Compares every file with its sha256 in the manifest. Raises BundleError that names the file."""
        for name, expected in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise BundleError(f"bundle '{self.name}' is incomplete: {path} is missing; copy or export the bundle again")
            if sha256(path) != expected:
                raise BundleError(
                    f"bundle '{self.name}' is corrupt: the sha256 of {path} is not the one in its manifest (the file is truncated "
                    "or was changed); copy or export the bundle again"
                )

    def component(self, name: str) -> Component:
        if name not in self.components:
            raise BundleError(f"bundle '{self.name}' has no component {name!r}, only {', '.join(sorted(self.components))}")
        return self.components[name]

    @property
    def digest(self) -> str:
        """sha256 over the manifest, and through its file hashes over all content."""
        return sha256(self.folder / MANIFEST)


def bundled_names() -> list[str]:
    """Names that `Bundle.load` knows without a path."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{MANIFEST}"))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path,
    *,
    name: str,
    family: str,
    version: str,
    components: Mapping[str, Component],
    video: Video | None = None,
    latent: Latent | None = None,
    text: Text | None = None,
    method: Mapping[str, Any] | None = None,
) -> Bundle:
    """Writes `manifest.json` with the hash of every other file in `folder`, and loads it back."""
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(MANIFEST, None)
    described = {key: _describe(component) for key, component in sorted(components.items())}
    manifest: dict[str, Any] = {"format": FORMAT, "name": name, "family": family, "version": version}
    for key, part in (("video", video), ("latent", latent), ("text", text)):
        manifest[key] = None if part is None else asdict(part)
    manifest |= {"method": dict(method or {}), "components": described, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return Bundle.load(folder)


def _locate(source: str | Path) -> Path:
    folder = Path(source)
    if isinstance(source, str) and "/" not in source and (BUNDLED / source / MANIFEST).is_file():
        return BUNDLED / source
    if (folder / MANIFEST).is_file():
        return folder
    known = ", ".join(bundled_names()) or "none"
    if folder.is_dir():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with `pyengine export`")
    raise BundleError(f"there is no bundle {str(source)!r}: expected a folder with {MANIFEST} or a bundled name ({known})")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({error}); copy or export the bundle again") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{path} is not a valid manifest (expected an object but got {type(manifest).__name__})")
    return manifest


def _dim(dim: int | str, symbols: Symbols) -> int:
    return sum(math.prod(_factor(factor, symbols) for factor in term.split("*")) for term in str(dim).split("+"))


def _factor(factor: str, symbols: Symbols) -> int:
    if factor.isdigit():
        return int(factor)
    if factor not in symbols:
        raise BundleError(f"a dimension has no size: give {factor!r} in the variant (given: {', '.join(symbols) or 'none'})")
    return symbols[factor]


def _parse(folder: Path, manifest: dict[str, Any]) -> Bundle:
    components = {name: _parse_component(name, entry) for name, entry in manifest["components"].items()}
    bundle = Bundle(
        folder=folder,
        name=str(manifest["name"]),
        family=str(manifest["family"]),
        version=str(manifest["version"]),
        video=Video(**manifest["video"]) if manifest.get("video") else None,
        latent=Latent(**manifest["latent"]) if manifest.get("latent") else None,
        text=Text(**manifest["text"]) if manifest.get("text") else None,
        method=dict(manifest["method"]),
        components=components,
        files={str(name): str(digest) for name, digest in manifest["files"].items()},
    )
    for name in bundle.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"file {name!r} lies outside the bundle")
    for component in components.values():
        for name in (component.portable, *component.inline.files, *(component.cut.files if component.cut else ())):
            bundle.path(name)
    return bundle


def _parse_component(name: str, entry: dict[str, Any]) -> Component:
    inputs, outputs = _parse_specs(entry["inputs"]), _parse_specs(entry["outputs"])
    state, ring = dict(entry.get("state", {})), dict(entry.get("ring", {}))
    for source, target in (state | ring).items():
        if source not in inputs or target not in outputs:
            raise ValueError(f"component {name!r} pairs {source!r} with {target!r}, which are not an input and an output of it")
    return Component(
        name=name,
        inputs=inputs,
        outputs=outputs,
        symbols={key: int(value) for key, value in entry.get("symbols", {}).items()},
        state=state,
        ring=ring,
        portable=entry["portable"],
        inline=_parse_graph(entry["inline"]),
        cut=_parse_graph(entry["cut"]) if entry.get("cut") else None,
    )


def _parse_specs(entries: dict[str, Any]) -> dict[str, TensorSpec]:
    specs = {name: TensorSpec(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}
    for name, spec in specs.items():
        if spec.dtype not in DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {spec.dtype!r}, expected one of {', '.join(sorted(DTYPES))}")
    return specs


def _parse_graph(entry: dict[str, Any]) -> Graph:
    constants = {name: Constant(**{**fields, "shape": tuple(fields["shape"])}) for name, fields in entry["constants"].items()}
    steps = tuple(
        Step(**{**fields, "inputs": tuple(fields["inputs"]), "outputs": tuple(fields["outputs"])}) for fields in entry["steps"]
    )
    return Graph(_parse_specs(entry["tensors"]), constants, steps)


def _describe(component: Component) -> dict[str, Any]:
    entry = asdict(component)
    del entry["name"]
    for graph in (entry["inline"], entry["cut"]):
        for step in graph["steps"] if graph else ():
            for key in ("file", "precision", "op", "attributes"):
                if not step[key]:
                    del step[key]
    return entry
