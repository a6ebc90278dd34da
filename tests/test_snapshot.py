"""Snapshots from elsewhere: what does not fit the plan is an InputError before anything large is unpacked; nothing else comes out."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyengine
from pyengine.engine import Engine
from pyengine.methods import make_method
from pyengine.streaming import snapshot
from pyengine.streaming.archive import read_archive
from pyengine.streaming.fitting import missing_latents, most_clean
from pyengine.video import target

PROMPT = "a red circle bounces over a blue background"
RING = "executor/denoiser/ring_key.0"
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def saved(engine: Engine) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of a stream in its fifth second, of 200 frames."""
    with engine.stream(PROMPT, frames=200) as stream:
        list(islice(stream, 101))
        data = stream.snapshot()
    arrays = read_archive(data, max_bytes=1 << 30)
    arrays.pop("header")
    return snapshot.read_header(data), arrays


def signed(header: Mapping[str, Any], arrays: Arrays) -> bytes:
    """As somebody makes it who knows how snapshots are made."""
    return snapshot.pack(
        {name: value for name, value in header.items() if name not in ("digest", "format")}, arrays
    )


def refused(engine: Engine, data: bytes, match: str) -> None:
    with pytest.raises(pyengine.InputError, match=match) as caught:
        engine.resume(data)
    assert "\n" not in str(caught.value)


def test_what_was_saved_is_taken(engine: Engine, saved: tuple[dict[str, Any], Arrays]) -> None:
    with engine.resume(signed(*saved)) as stream:
        assert len(list(stream)) == 99


HEADERS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda h: h["settings"].update(chunks=5), r"has others \(chunks\)"),
    (lambda h: h["settings"].update(frames=10**6), r"has others \(chunks\)"),
    (lambda h: h["settings"].update(frames="200"), "frames"),
    (lambda h: h["settings"].update(seed=None), "seed"),
    (lambda h: h["settings"].update(method=3), "expected a mapping"),
    (lambda h: h["settings"]["method"].update(steps="x"), r"\[method.steps\]"),
    (lambda h: h["settings"].update(device_frames="yes"), "device_frames as true or false"),
    (lambda h: h["settings"].update(device_frames=True), "needs an engine on device cuda"),
    (lambda h: h["settings"].update(given_chunks=-1), "given_chunks"),
    (lambda h: h["settings"].update(other=1), "more of them"),
    (lambda h: h["settings"].update(prompt="a red unicorn"), "unicorn"),
    (lambda h: h["settings"].pop("guidance"), "guidance"),
    (lambda h: h.update(settings=[]), "'settings' of the snapshot's header as dict"),
    (lambda h: h.update(bundle="0" * 64), "of another bundle"),
    (lambda h: h.update(frames_made=-1), "'frames_made'"),
    (lambda h: h.update(frames_made=True), "'frames_made'"),
    (lambda h: h.update(frames_made=201), "at most 200 frames made"),
    (lambda h: h.update(clips=[0]), "'clips'"),
    (lambda h: h.update(clips=[8, 10**9]), "clips of .* pending frames"),
]


@pytest.mark.parametrize(("change", "match"), HEADERS)
def test_headers_that_cannot_be(
    engine: Engine,
    saved: tuple[dict[str, Any], Arrays],
    change: Callable[[dict[str, Any]], object],
    match: str,
) -> None:
    header = json.loads(json.dumps(saved[0]))
    change(header)
    refused(engine, signed(header, saved[1]), match)


ARRAYS: list[tuple[Callable[[Arrays], object], str]] = [
    (lambda a: a.pop("window/call"), "window/call as one whole number"),
    (lambda a: a.update({"window/call": np.array([3])}), "window/call as one whole number"),
    (lambda a: a.update({"window/call": np.array(3.0)}), "window/call as one whole number"),
    (lambda a: a.update({"window/call": np.array(-1)}), "at a call from 0 to"),
    (lambda a: a.update({"window/call": np.array(10**6)}), "at a call from 0 to"),
    (lambda a: a.pop("pending"), "has no 'pending'"),
    (lambda a: a.update(pending=a["pending"].reshape(-1)), "pending of the snapshot as uint8"),
    (lambda a: a.update(pending=a["pending"].astype(np.int16)), "pending of the snapshot as uint8"),
    (lambda a: a.update(pending=np.array(3, np.uint8)), "pending of the snapshot as uint8"),
    (lambda a: a.update(pending=np.zeros((400, 64, 64, 3), np.uint8)), "at most 320 pending|does not fit"),
    (lambda a: a.pop(RING), f"has no '{RING}'"),
    (lambda a: a.update({RING: a[RING].astype(np.float64)}), f"expected {RING} of the snapshot as"),
    (lambda a: a.update({RING: a[RING][:, :2]}), f"expected {RING} of the snapshot as"),
    (lambda a: a.update({RING: not_a_number(a[RING])}), f"finite numbers in {RING}"),
    (lambda a: a.update({"executor/denoiser/other": np.zeros(3)}), "has also 'executor/denoiser/other'"),
    (lambda a: a.update({"kept/other": np.zeros(3)}), "has also 'kept/other'"),
    (lambda a: a.update({"../other": np.zeros(3)}), "has also '../other'"),
    (lambda a: a.update({"window/latents": a["window/latents"][1:]}), "window/latents of the snapshot"),
    (lambda a: a["window/latents"].fill(np.inf), "finite numbers in window/latents"),
    (lambda a: a["window/clean"].fill(np.nan), "finite numbers in window/clean"),
    (lambda a: a.update({"window/clean": a["window/clean"][1:]}), "window/clean of the snapshot"),
    (lambda a: a.update({"window/clean_index": a["window/clean_index"][::-1]}), "rising frame numbers"),
    (lambda a: a.update({"window/clean_index": a["window/clean_index"] * 0}), "rising frame numbers"),
    (lambda a: a.update({"window/clean_index": a["window/clean_index"] - 1000}), "rising frame numbers"),
    (lambda a: a.update({"window/clean_index": a["window/clean_index"] + 1000}), "has none of frame"),
    (lambda a: a.update({"window/clean_index": a["window/clean_index"] * 1.0}), "window/clean_index of"),
    (lambda a: no_clean(a), "has none of frame"),
    (lambda a: many_clean(a), "at most .* clean latents|does not fit"),
]  # fmt: skip


def not_a_number(ring: np.ndarray) -> np.ndarray:
    return np.full_like(ring, 0x7FC0 if ring.dtype == np.uint16 else np.nan)


def no_clean(arrays: Arrays) -> None:
    arrays["window/clean"], arrays["window/clean_index"] = arrays["window/clean"][:0], np.zeros(0, np.int64)


def many_clean(arrays: Arrays) -> None:
    arrays["window/clean_index"] = np.arange(5000)
    arrays["window/clean"] = np.zeros((5000, *arrays["window/clean"].shape[1:]), np.float32)


@pytest.mark.parametrize(("change", "match"), ARRAYS)
def test_arrays_that_cannot_be(
    engine: Engine,
    saved: tuple[dict[str, Any], Arrays],
    change: Callable[[Arrays], object],
    match: str,
) -> None:
    header, arrays = saved
    arrays = {name: array.copy() for name, array in arrays.items()}
    change(arrays)
    refused(engine, signed(header, arrays), match)


def test_a_change_that_fits_is_noticed(engine: Engine, saved: tuple[dict[str, Any], Arrays]) -> None:
    header, arrays = saved
    arrays = arrays | {RING: np.zeros_like(arrays[RING])}
    buffer = io.BytesIO()
    np.savez(buffer, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    refused(engine, buffer.getvalue(), "changed since")


def test_a_stream_that_has_ended_must_have_its_frames(engine: Engine) -> None:
    with engine.stream(PROMPT, frames=24) as stream:
        list(islice(stream, 20))
        data = stream.snapshot()
    arrays = read_archive(data, max_bytes=1 << 30)
    arrays.pop("header")
    header = snapshot.read_header(data)
    with engine.resume(signed(header, arrays)) as stream:
        assert len(list(stream)) == 4
    arrays["pending"] = arrays["pending"][:3]
    refused(engine, signed(header | {"clips": []}, arrays), "the rest of 24 frames")


def with_entry(data: bytes, name: str, content: bytes) -> bytes:
    """The archive with one entry more."""
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_bombs_are_not_unpacked(engine: Engine, saved: tuple[dict[str, Any], Arrays]) -> None:
    header, arrays = saved
    large = npy(np.zeros(600 << 20, np.uint8))
    rest = {name: array for name, array in arrays.items() if name != "pending"}
    cases = {
        "does not fit this plan": with_entry(signed(header, arrays), "kept/other", large),
        "does not fit": with_entry(signed(header, rest), "pending", large),
        "cannot read this one": with_entry(b"", "header", large),
    }
    del large
    tracemalloc.start()
    for match, data in cases.items():
        assert len(data) < 4 << 20
        refused(engine, data, match)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "nested too deep"),
        ("{" * 10, "cannot read this one"),
        ("3", "of format 3 but got 3"),
        ("{}", "of format 3 but got [Nn]one"),
        ('{"format": 1e999}', "of format 3 but got inf"),
        ('{"format": NaN}', "NaN is no number"),
        ('{"format": ' + "9" * 5000 + "}", "cannot read this one"),
    ],
)
def test_headers_that_are_none(engine: Engine, text: str, match: str) -> None:
    refused(engine, with_entry(b"", "header", npy(np.frombuffer(text.encode(), np.uint8))), match)
    refused(engine, with_entry(b"", "other", npy(np.zeros(3))), "it has no header")


def test_cut_snapshots(engine: Engine, saved: tuple[dict[str, Any], Arrays]) -> None:
    data = signed(*saved)
    for part in (0.0, 0.1, 0.5, 0.9, 0.999):
        refused(engine, data[: int(part * len(data))], "snapshot")


def test_what_is_no_file_of_a_snapshot(engine: Engine, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for state in (tmp_path / "pipe", tmp_path, "/dev/zero", 5, None, "a\0b", "x" * 5000):
        with pytest.raises(pyengine.InputError, match="snapshot"):
            engine.resume(state)  # type: ignore[arg-type]


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({})
)  # fmt: skip
DTYPES = st.sampled_from(["u1", "i8", "f4", "f2", "u2", "?", ">f4"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_snapshot_plays_or_is_refused(
    engine: Engine, saved: tuple[dict[str, Any], Arrays], data: st.DataObject
) -> None:
    header, arrays = json.loads(json.dumps(saved[0])), dict(saved[1])
    place = data.draw(st.sampled_from([header, header["settings"], header["settings"]["method"]]))
    place[data.draw(st.sampled_from([*place, "other"]))] = data.draw(VALUES)
    for name in data.draw(st.lists(st.sampled_from(sorted(arrays)), max_size=2)):
        if data.draw(st.booleans()):
            arrays.pop(name, None)
        else:
            shape = data.draw(
                st.sampled_from([arrays[name].shape if name in arrays else (), (), (0,), (3, 2)])
            )
            arrays[name] = np.full(shape, data.draw(st.integers(0, 100)), data.draw(DTYPES))
    try:
        with engine.resume(signed(header, arrays)) as stream:
            assert len(list(islice(stream, 20))) == 20
    except pyengine.PyEngineError as error:
        sentence = str(error)
    else:
        return
    assert "\n" not in sentence


PROGRESSIVE = {
    "name": "progressive",
    "steps": 6,
    "chunk_frames": 2,
    "cadence": 2,
    "context": {"kind": "ring", "sink_frames": 2, "recent_frames": 4},
}
HIERARCHICAL = {
    "name": "hierarchical",
    "steps": 2,
    "timesteps": 10,
    "chunk_frames": 3,
    "clip_frames": 5,
    "known": 2,
    "stride": 3,
    "eta": 1.0,
    "betas": [0.001, 0.02],
    "guidance": 0.0,
}
METHODS: list[tuple[dict[str, Any], int | None, int]] = [
    (PROGRESSIVE, None, 0),
    (PROGRESSIVE, 9, 0),
    (PROGRESSIVE, None, 3),
    (PROGRESSIVE | {"cadence": 1}, None, 0),
    (PROGRESSIVE | {"cadence": 6}, None, 3),
    (PROGRESSIVE | {"opening": "warm", "cadence": 1}, None, 8),
    (PROGRESSIVE | {"opening": "rflow"}, 9, 0),
    (PROGRESSIVE | {"context": {"kind": "recompute", "sink_frames": 2, "recent_frames": 4}}, None, 3),
    (PROGRESSIVE | {"context": {"kind": "none", "sink_frames": 0, "recent_frames": 0}}, None, 0),
    (
        PROGRESSIVE
        | {"name": "replacement", "clip_frames": 8, "overlap_frames": 4, "renoised": True, "ring_frames": 4},
        None,
        0,
    ),
    (PROGRESSIVE | {"name": "rflow", "frames_per_latent": 4.0}, 5, 0),
    *(
        (HIERARCHICAL | {"decode": decode, "known": known, "clips_per_round": clips, "left_context": left}, 30, 0)
        for decode in ("windowed", "whole", "streamed")
        for known, clips, left in ((1, 1, 2), (2, 1, 0), (4, 1, 3), (2, 3, 2))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("method", "chunks", "given"), METHODS)
def test_no_stream_keeps_more_than_a_snapshot_may_hold(
    method: dict[str, Any], chunks: int | None, given: int
) -> None:
    """Of every schedule, what the latent store keeps call after call: it fits the bound, and the next calls miss nothing of it."""
    if method["name"] in ("replacement", "rflow"):
        method = {name: value for name, value in method.items() if name != "cadence"}
    schedule = make_method(method, chunks, given)
    kept, most = set(range(given * schedule.chunk_frames)), most_clean(schedule)
    assert len(kept) <= most
    last = schedule.calls if schedule.calls is not None else schedule.first_call + 150
    for number in range(schedule.first_call, last):
        if number % 7 == 0 or number < 10:
            index = np.array(sorted(kept), np.int64)
            assert missing_latents(schedule, number, index) == []
        call = schedule.call(number)
        kept |= {row.frame for lane in call.lanes for row in lane.rows if row.done}
        assert len(kept) <= most
        if call.keeps is not None:
            kept = {frame for frame in kept if not call.keeps[0] <= frame < call.keeps[1]}
    assert kept or not any(schedule.call(last - 1).emit)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device /dev/full")
def test_a_snapshot_that_cannot_be_written_leaves_the_earlier_one(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.stream(PROMPT, frames=20) as stream:
        earlier = stream.snapshot(tmp_path / "state")
        next(stream)
        with pytest.raises(pyengine.OutputError, match="No space left on device"):
            stream.snapshot("/dev/full")
        limited = open
        monkeypatch.setattr(
            target, "open", lambda path, *a, **k: limited("/dev/full", *a, **k), raising=False
        )
        with pytest.raises(pyengine.OutputError, match="No space left on device"):
            stream.snapshot(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == earlier
    assert os.listdir(tmp_path) == ["state"]
