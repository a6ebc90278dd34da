"""What may be fed anything at all: each target draws an input and raises where it gets anything but a result or a PyEngineError."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import strategies as st

import pyengine
from pyengine import PyEngineError
from pyengine.bundle.bundle import BUNDLED, Bundle
from pyengine.streaming import snapshot
from pyengine.streaming.archive import read_archive
from pyengine.video.reader import read_video
from pyengine.video.writer import VideoWriter

__all__ = ["TARGETS", "fed", "prepare"]

HOME = TemporaryDirectory(prefix="pyengine-fuzz-")
FOLDER = Path(HOME.name)
RED = "a red circle bounces over a blue background"

ANY: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 40), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=8),
    st.sampled_from([10**400, -0.0, np.int64(3), np.float32(1.5), np.nan, np.array([1, 2]), "8", "nan", "\udcff", object()]),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


def changed(data: st.DataObject, whole: bytes) -> bytes:
    """Some bytes of it changed, left out, or doubled."""
    found = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, max(0, len(found) - 1)))
        how = data.draw(st.sampled_from(["byte", "four", "cut", "drop", "double"]))
        if how == "byte":
            found[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
        elif how == "four":
            found[place : place + 4] = data.draw(
                st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1"])
            )
        elif how == "cut":
            del found[place:]
        elif how == "drop":
            del found[place : place + data.draw(st.integers(1, 64))]
        else:
            found[place:place] = found[place : place + data.draw(st.integers(1, 64))]
    return bytes(found)


@cache
def files() -> list[bytes]:
    """Small pictures and videos of every kind."""
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 255, (6, 16, 24, 3), np.uint8)
    tags = Image.Exif()
    tags[0x0112] = 6
    found = []
    for suffix in ("jpg", "png", "gif", "webp", "tif", "bmp", "avif", "ppm"):
        path = FOLDER / f"a.{suffix}"
        Image.fromarray(frames[0]).save(path, **({} if suffix == "ppm" else {"exif": tags}))
        found.append(path.read_bytes())
    for suffix in ("png", "gif", "webp"):
        pictures = [Image.fromarray(frame) for frame in frames]
        pictures[0].save(
            path := FOLDER / f"b.{suffix}", save_all=True, append_images=pictures[1:], duration=80
        )
        found.append(path.read_bytes())
    for suffix in ("mp4", "webm"):
        with VideoWriter(path := FOLDER / f"c.{suffix}", height=16, width=24) as writer:
            for frame in frames:
                writer.write(frame)
        found.append(path.read_bytes())
    return found


def pictures(data: st.DataObject) -> None:
    path = FOLDER / "picture"
    path.write_bytes(changed(data, data.draw(st.sampled_from(files()))))
    options = data.draw(st.sampled_from([{}, {"fps": 24.0}, {"frames": 2}, {"frames": 2, "tail": True}]))
    frames = read_video(path, size=(8, 8), **{"at_most": 50, **options})  # type: ignore[arg-type]
    assert frames.shape[1:] == (8, 8, 3)


def reader_arguments(data: st.DataObject) -> None:
    (FOLDER / "good").write_bytes(data.draw(st.sampled_from(files())))
    names = data.draw(st.lists(st.sampled_from(["frames", "size", "tail", "fps", "at_most"]), max_size=3))
    path = data.draw(st.sampled_from([FOLDER / "good", ANY]))
    read_video(data.draw(path) if path is ANY else path, **{name: data.draw(ANY) for name in names})  # type: ignore[arg-type]


def archives(data: st.DataObject) -> None:
    import io

    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, a=np.arange(50), b=np.ones((3, 4), np.float32), header=np.frombuffer(b"{}", np.uint8)
    )
    found = read_archive(changed(data, buffer.getvalue()), max_bytes=1 << 16)
    assert sum(array.nbytes for array in found.values()) <= 1 << 16


@cache
def manifest() -> dict[str, Any]:
    folder = FOLDER / "bundle"
    folder.mkdir()
    for path in (BUNDLED / "shapes").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "manifest.json").unlink()
    return dict(json.loads((BUNDLED / "shapes" / "manifest.json").read_text()))


def manifests(data: st.DataObject) -> None:
    changing = copy.deepcopy(manifest())
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = changing
        for _ in range(data.draw(st.integers(0, 6))):
            inner = (
                place if isinstance(place, list) else list(place.values()) if isinstance(place, dict) else []
            )
            inner = [item for item in inner if isinstance(item, list | dict) and item]
            if not inner:
                break
            place = data.draw(st.sampled_from(inner))
        if not place or not isinstance(place, dict | list):
            continue
        key: Any = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(
                st.one_of(
                    st.none(), st.integers(), st.floats(), st.text(max_size=9), st.just([]), st.just({})
                )
            )
    (FOLDER / "bundle" / "manifest.json").write_text(json.dumps(changing))
    Bundle.load(FOLDER / "bundle", verify=False)


@cache
def engine() -> pyengine.Engine:
    return pyengine.load(
        "shapes", choice="inline", cache_dir=os.environ.get("PYENGINE_CACHE") or FOLDER / "plans"
    )


def prompts(data: st.DataObject) -> None:
    words = st.sampled_from(["a", "red", "circle", "[pad]", "[unknown]", ".", ",", "\0", "\udcff", "é", " "])
    prompt = data.draw(st.one_of(ANY, st.text(), st.lists(words, max_size=30).map(" ".join)))
    engine().check_prompt(prompt)


def stream_arguments(data: st.DataObject) -> None:
    names = data.draw(
        st.lists(st.sampled_from(["frames", "seconds", "seed", "guidance", "start"]), min_size=1, max_size=2)
    )
    options: dict[str, Any] = {name: data.draw(ANY) for name in names}
    with engine().stream(RED, **options) as stream:
        frame = next(stream)
        assert frame.shape == (64, 64, 3)


@cache
def saved() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a snapshot."""
    with engine().stream(RED, frames=60) as stream:
        for _ in range(21):
            next(stream)
        whole = stream.snapshot()
    arrays = read_archive(whole, max_bytes=1 << 30)
    arrays.pop("header")
    return snapshot.read_header(whole), arrays


def snapshots(data: st.DataObject) -> None:
    header, arrays = copy.deepcopy(saved()[0]), dict(saved()[1])
    places = [header, header["settings"], header["settings"]["method"]]
    for _ in range(data.draw(st.integers(0, 2))):
        place = places[data.draw(st.integers(0, 2))]
        # What JSON holds.
        value = data.draw(
            st.one_of(st.none(), st.booleans(), st.integers(-3, 70), st.integers(), st.floats(), st.text(max_size=5), st.just([]))
        )  # fmt: skip
        place[data.draw(st.sampled_from([*place, "other"]))] = value
    for name in data.draw(st.lists(st.sampled_from(sorted(arrays)), max_size=2, unique=True)):
        shape = data.draw(st.sampled_from([arrays[name].shape, (), (0,), (3, 2), None]))
        if shape is None:
            del arrays[name]
        else:
            dtype = data.draw(st.sampled_from(["u1", "i8", "f4", "f2", "u2", "?", arrays[name].dtype]))
            arrays[name] = np.full(shape, data.draw(st.integers(0, 100)), dtype)
    kept = {name: value for name, value in header.items() if name not in ("digest", "format")}
    whole = snapshot.pack(kept, arrays)
    if data.draw(st.booleans()):
        whole = changed(data, whole)
    with engine().resume(whole) as stream:
        for _ in range(12):
            if next(stream, None) is None:
                break


def outputs(data: st.DataObject) -> None:
    name = data.draw(
        st.one_of(
            st.text(max_size=20), st.sampled_from(["", "-", "a" * 300 + ".mp4", "a\0.gif", ".", "..", "/"])
        )
    )
    folder = FOLDER / "outputs"
    folder.mkdir(exist_ok=True)
    options = {
        key: data.draw(ANY) for key in data.draw(st.lists(st.sampled_from(["fps", "upscale"]), max_size=2))
    }
    inside = f"{folder}/{name.replace('/', '')}" if name.strip() else name  # nowhere else on this machine
    with VideoWriter(inside, height=8, width=8, **options) as writer:
        writer.write(np.zeros((8, 8, 3), np.uint8))


TARGETS: dict[str, Callable[[st.DataObject], None]] = {
    function.__name__: function
    for function in (
        pictures,
        reader_arguments,
        archives,
        manifests,
        prompts,
        stream_arguments,
        snapshots,
        outputs,
    )
}


def prepare() -> None:
    """Makes what inputs are made of and fed to, which takes far longer than an input."""
    files()
    manifest()
    engine()
    saved()


def fed(name: str, data: st.DataObject) -> None:
    """Runs a target on one input. A PyEngineError of one sentence is an answer."""
    try:
        TARGETS[name](data)
    except PyEngineError as error:
        if "\n" in str(error):
            raise ValueError("a refusal of more than one sentence") from error
