"""A bundle: a folder with `manifest.json`, portable `.onnx` files that share one `weights.bin`, and a
tokenizer. Data only, no code.

    bundle = Bundle.load("shapes")                   # a bundled name or a folder; checks every file's sha256
    bundle.components["denoiser"].inputs["latents"]  # TensorSpec(("frames", 8, 8, 8), "float32")
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyengine.arguments import printable
from pyengine.bundle.manifest import (
    Cleaning,
    Component,
    Constant,
    Graph,
    Latent,
    Step,
    TensorSpec,
    Text,
    Video,
    describe_component,
    parse_branches,
    parse_component,
    parse_text,
)
from pyengine.bundle.schema import check_constants, check_manifest
from pyengine.errors import BundleError
from pyengine.settings import shown

__all__ = [
    "Bundle",
    "Cleaning",
    "Component",
    "Constant",
    "Graph",
    "Latent",
    "Step",
    "TensorSpec",
    "Text",
    "Video",
    "bundled_names",
    "listed_files",
    "sha256",
    "write_manifest",
]

FORMAT = 2
BRANCHES = ("prompt", "null")
MANIFEST = "manifest.json"
MOST_MANIFEST = 64 * 2**20  # bytes
BUNDLED = Path(__file__).parents[1] / "bundles"


@dataclass(frozen=True)
class Bundle:
    """A loaded manifest. `files` maps every other file to its sha256; `pyengine.methods` reads `method`. `branches` names the guidance
    branches of the denoisers, in order: a network that runs fewer runs the first ones.
    """

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
    branches: tuple[str, ...] = BRANCHES

    @classmethod
    def load(cls, source: str | Path, *, verify: bool = True) -> Bundle:
        """Reads a folder, or a bundle that ships with pyengine by its name. Raises BundleError in one
        sentence.
        """
        folder = _locate(source)
        manifest = _read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise BundleError(
                f"{folder / MANIFEST}: expected format {FORMAT} but got {manifest.get('format')!r}; "
                "export the bundle again or "
                "install the pyengine that made it"
            )
        try:
            check_manifest(manifest)
            bundle = _parse(folder, manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise BundleError(
                f"{folder / MANIFEST} is not a valid manifest ({what}); export the bundle again"
            ) from error
        if verify:
            bundle.verify()
        try:
            check_constants(folder, bundle.components)
        except ValueError as error:
            raise BundleError(
                f"{folder / MANIFEST} is not a valid manifest ({error}); export the bundle again"
            ) from error
        return bundle

    def path(self, name: str) -> Path:
        """The path of a file that the manifest lists."""
        if name not in self.files:
            raise BundleError(
                f"bundle '{self.name}' lists no file {name!r} in its manifest; export the bundle again"
            )
        return self.folder / name

    def verify(self) -> None:
        """Compares every file with its sha256 in the manifest. Raises BundleError that names the file."""
        for name, expected in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise BundleError(
                    f"bundle '{self.name}' is incomplete: {path} is missing; copy or export the bundle again"
                )
            if sha256(path) != expected:
                raise BundleError(
                    f"bundle '{self.name}' is corrupt: the sha256 of {path} is not the one in its "
                    "manifest (the file is truncated "
                    "or was changed); copy or export the bundle again"
                )

    def component(self, name: str) -> Component:
        if name not in self.components:
            raise BundleError(
                f"bundle '{self.name}' has no component {name!r}, only {', '.join(sorted(self.components))}"
            )
        return self.components[name]

    @property
    def digest(self) -> str:
        """sha256 over the manifest, and through its file hashes over all content."""
        return sha256(self.folder / MANIFEST)


def bundled_names() -> list[str]:
    """Names that `Bundle.load` knows without a path."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{MANIFEST}"))


def listed_files(folder: Path) -> list[str]:
    """Names of the files that a folder's manifest lists, of whatever format it is. Raises BundleError."""
    path = folder / MANIFEST
    files = _read_json(path).get("files")
    if not isinstance(files, dict):
        raise BundleError(f"{path} is not a valid manifest (no 'files'); move the folder away")
    for name in files:
        _check_inside(name)
    return list(files)


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
    branches: tuple[str, ...] = BRANCHES,
) -> Bundle:
    """Writes `manifest.json` with the hash of every other file in `folder`, and loads it back."""
    files = {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    files.pop(MANIFEST, None)
    described = {key: describe_component(component) for key, component in sorted(components.items())}
    manifest: dict[str, Any] = {"format": FORMAT, "name": name, "family": family, "version": version}
    for key, part in (("video", video), ("latent", latent), ("text", text)):
        manifest[key] = None if part is None else asdict(part)
    manifest["branches"] = list(branches)
    manifest |= {"method": dict(method or {}), "components": described, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return Bundle.load(folder)


def _locate(source: str | Path) -> Path:
    if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str):
        raise BundleError(f"expected a bundle as a name or a folder but got {shown(source)}")
    folder = Path(source)
    if isinstance(source, str) and "/" not in source and _is_file(BUNDLED / source / MANIFEST):
        return BUNDLED / source
    if _is_file(folder / MANIFEST):
        return folder
    known = ", ".join(bundled_names()) or "none"
    if os.path.isdir(folder):
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with `pyengine export`")
    raise BundleError(
        f"there is no bundle '{printable(str(source)[:200])}': expected a folder with {MANIFEST} or a bundled name ({known})"
    )


def _is_file(path: Path) -> bool:
    # Unlike Path.is_file it takes a name that no file can have, such as one too long.
    return os.path.isfile(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > MOST_MANIFEST:
            raise ValueError(f"it must have at most {MOST_MANIFEST} bytes but has {size}")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise BundleError(
            f"{path} cannot be read as JSON (nested too deep); copy or export the bundle again"
        ) from error
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path} cannot be read as JSON ({error}); copy or export the bundle again"
        ) from error
    if not isinstance(manifest, dict):
        raise BundleError(
            f"{path} is not a valid manifest (expected an object but got {type(manifest).__name__})"
        )
    return manifest


def _check_inside(name: str) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BundleError(
            f"a manifest lists the file {name!r}, which lies outside the bundle; export the bundle again"
        )


def _parse(folder: Path, manifest: dict[str, Any]) -> Bundle:
    components = {name: parse_component(name, entry) for name, entry in manifest["components"].items()}
    bundle = Bundle(
        folder=folder,
        name=str(manifest["name"]),
        family=str(manifest["family"]),
        version=str(manifest["version"]),
        video=Video(**manifest["video"]) if manifest.get("video") else None,
        latent=Latent(**manifest["latent"]) if manifest.get("latent") else None,
        text=parse_text(manifest["text"]) if manifest.get("text") else None,
        method=dict(manifest["method"]),
        components=components,
        files={str(name): str(digest) for name, digest in manifest["files"].items()},
        branches=parse_branches(manifest["branches"]),
    )
    for name in bundle.files:
        _check_inside(name)
    for component in components.values():
        for name in (
            component.portable,
            *component.inline.files,
            *(component.cut.files if component.cut else ()),
        ):
            bundle.path(name)
    return bundle
