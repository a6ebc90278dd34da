"""Who may ask the server, how much of it, and whether it says truly how it is."""

from __future__ import annotations

import json
import logging
import socket
import sys
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from fake_batch import CHUNK, FakeEngine, expected
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import PATIENCE, Client, Server, Viewer, begin, served, service
from websockets.exceptions import ConnectionClosed, InvalidStatus

from pyengine.errors import ConfigError
from pyengine.serve import scheduler
from pyengine.serve.admission import Admission, Busy, real_time_capacity
from pyengine.serve.ids import is_id, new_id
from pyengine.serve.limits import Bucket
from pyengine.serve.pacing import Pace, chosen
from pyengine.serve.safety import Gate
from pyengine.serve.server import JsonLines, listen
from pyengine.serve.store import FileStore, MemoryStore, Store
from pyengine.serve.timeline import Timeline

TOKEN = "a-long-secret"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for a token."""
    with served(tmp_path_factory.mktemp("guarded"), gate=Gate(token=TOKEN)) as started:
        yield started


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 200),
        ("GET", "/health", {}, 200),
        ("GET", "/ready", {}, 200),
        ("GET", "/static/app.js", {}, 200),
        ("GET", "/static/%2e%2e/app.py", {}, 404),
        ("GET", "/metrics", {}, 401),
        ("GET", "/v1/models", {}, 401),
        ("GET", "/v1/models", {"authorization": "Bearer wrong-secret"}, 401),
        ("GET", "/v1/models", {"authorization": f"Basic {TOKEN}"}, 401),
        ("GET", "/v1/models", {"authorization": f"Bearer {TOKEN}"}, 200),
        ("GET", "/v1/sessions", {"authorization": f"Bearer {TOKEN}"}, 200),
        ("GET", "/v1/sessions/..%2f..%2fx", {"authorization": f"Bearer {TOKEN}"}, 404),
        ("POST", "/v1/videos", {"authorization": f"Bearer {TOKEN}", "origin": "https://evil.example"}, 403),
        ("POST", "/v1/videos", {"authorization": f"Bearer {TOKEN}", "origin": "null"}, 403),
        ("GET", "/v1/models", {"authorization": f"Bearer {TOKEN}", "host": "evil.example"}, 400),
        ("GET", "/", {"host": "evil.example"}, 400),
        ("GET", "/", {"host": "["}, 400),
        ("PUT", "/v1/videos", {"authorization": f"Bearer {TOKEN}"}, 405),
    ],
)
def test_requests_are_let_in_or_refused(
    guarded: Server, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    answer = httpx.request(method, f"{guarded.url}{path}", headers=headers)
    assert answer.status_code == status, answer.text
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    if status >= 400 and path.startswith("/v1"):
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_socket_needs_a_token_and_a_page_of_this_server(guarded: Server) -> None:
    with pytest.raises(InvalidStatus) as refused:
        Client(guarded, origin="https://evil.example")
    assert refused.value.response.status_code == 403
    for token in ({}, {"token": "wrong-secret"}):
        with Client(guarded) as client:
            client.send("session.start", prompt="red", **token)
            with pytest.raises(ConnectionClosed) as closed:
                client.receive()
            assert closed.value.rcvd.code == 4401
    with Client(guarded, origin=guarded.url) as client:
        start = client.start(token=TOKEN)
        headers = {"authorization": f"Bearer {TOKEN}"}
        listed = httpx.get(f"{guarded.url}/v1/sessions", headers=headers).json()["data"]
        assert [session["id"] for session in listed] == [start["session_id"]]
        name = f"{guarded.url}/v1/sessions/{start['session_id']}"
        assert httpx.get(name, headers=headers).json()["state"] == "playing"
        assert httpx.get(f"{name}/snapshot", headers=headers).content.startswith(b"{")
        assert httpx.delete(name, headers=headers).json()["deleted"]
        assert httpx.get(name, headers=headers).status_code == 404


def test_a_server_for_others_needs_a_token() -> None:
    with pytest.raises(ConfigError, match="give a token"):
        Gate("0.0.0.0")
    with pytest.raises(ConfigError, match="at least 8"):
        Gate("0.0.0.0", "short")
    Gate("0.0.0.0", insecure=True)
    one, other = Gate("0.0.0.0", TOKEN), Gate("0.0.0.0", TOKEN, hosts=("video.example",))
    assert one.knows_host("anything:80")
    assert other.knows_host("video.example:8000")
    assert not other.knows_host("evil.example")
    assert not one.admits(None)
    assert not one.admits("a-long-secreT")
    assert one.admits(TOKEN)
    assert Gate(origins=("https://page.example/",)).knows_origin("https://page.example", "localhost:1")
    taken = listen("127.0.0.1", 0)
    taken.listen()
    with pytest.raises(ConfigError, match="choose another with --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    taken.close()


def test_a_body_that_is_too_large_is_refused_before_it_is_read(guarded: Server) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), PATIENCE) as raw:
        head = f"POST /v1/sessions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: {2**40}\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")


def test_health_is_true(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "STUCK", 0.8)
    engine = FakeEngine()
    with served(tmp_path, engine) as server, Client(server) as client:
        assert httpx.get(f"{server.url}/health").status_code == 200
        client.start()
        client.frames(8)
        engine.seconds = 3.0  # a call that does not come back
        time.sleep(1.5)
        answer = httpx.get(f"{server.url}/health")
        assert answer.status_code == 503
        assert "silent" in answer.json()["reason"]
        engine.seconds = 0.0
        time.sleep(2.5)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_nothing_is_admitted_before_the_warm_up_is_done(tmp_path) -> None:
    with served(tmp_path, FakeEngine(seconds=0.02), warm=False) as server:
        answer = httpx.get(f"{server.url}/ready")
        assert (answer.status_code, answer.json()["stage"]) == (503, "warming up")
        with Client(server) as client:
            client.send("session.start", prompt="red")
            assert client.until("error")["code"] == "not_ready"
        server.service.warm_up_beside().join(PATIENCE)
        assert httpx.get(f"{server.url}/ready").status_code == 200
        measured = server.service.measured
        assert measured is not None
        assert set(measured.seconds) == {1, 2, 4}
        assert all(seconds >= 0.02 for seconds in measured.seconds.values())
        assert (measured.chunk, measured.calls_per_frame) == (CHUNK, 0.5)


def test_metrics_follow_the_naming_rules_and_count(tmp_path) -> None:
    with served(tmp_path) as server:
        with Client(server) as client:
            client.start(num_frames=24)
            client.until("session.done")
            text = httpx.get(f"{server.url}/metrics").text
        assert 'pyengine_frames_sent_total{format="raw"} 24.0' in text
        assert "pyengine_sessions_started_total 1.0" in text
        assert "pyengine_first_frame_seconds_count 1.0" in text
        assert "pyengine_ready 1.0" in text
        names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
        assert all(name.startswith("pyengine_") for name in names)
        assert "red" not in text


WORDS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["frame", "seconds", "mode", "interaction", "prompt", "event", "event_id", "store", "format"]
)
TYPES = st.sampled_from(
    [
        f"session.{name}"
        for name in ["start", "resume", "interaction", "ack", "pause", "play", "seek", "snapshot", "stats"]
    ]
)
MESSAGES = st.builds(
    lambda kind, fields: json.dumps({"type": kind, **fields}),
    TYPES,
    st.dictionaries(FIELDS, WORDS, max_size=3),
) | st.text(max_size=40)


@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_whatever_is_said_beside_it_a_session_gives_its_frames(tmp_path, examples: int) -> None:
    said = 0
    with served(tmp_path, FakeEngine(seconds=0.001)) as server, Client(server) as steady:
        steady.start(seed=1)

        @settings(max_examples=examples, deadline=None)
        @given(st.lists(MESSAGES, max_size=8))
        def babble(sayings: list[str]) -> None:
            nonlocal said
            server.app.state.live.starts._buckets.clear()
            with Client(server) as client:
                client.send("session.start", prompt="red", format="raw")
                for saying in sayings:
                    said += 1
                    client.socket.send(saying)
                client.send("session.ping")
            for _ in range(CHUNK):
                steady.receive()

        babble()
        frames = steady.frames(max(80, len(steady.messages)))
        assert np.array_equal(frames, expected(1, [(0, "a red circle")], len(frames)))
        assert httpx.get(f"{server.url}/health").status_code == 200
    assert said > 3 * examples / 2


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_stores_keep_what_they_are_given(tmp_path, kind: str) -> None:
    store: Store = FileStore(tmp_path / "store") if kind == "file" else MemoryStore()
    assert store.get("a/b") is None
    store.put("a/b.json", b"1")
    store.put("a/b.json", b"2")
    store.append("a/log", b"x")
    store.append("a/log", b"y")
    assert (store.get("a/b.json"), store.get("a/log")) == (b"2", b"xy")
    assert store.put_if_absent("a/c", b"1")
    assert not store.put_if_absent("a/c", b"2")
    assert store.list("a") == ["a/b.json", "a/c", "a/log"]
    store.delete("a")
    store.delete("a")
    assert store.list("a") == []
    if kind == "file":
        for key in ("../x", "/etc/passwd", "a/../../x", "A", "", "a//b", ".hidden"):
            with pytest.raises(ConfigError):
                store.put(key, b"")
        assert (tmp_path / "store").stat().st_mode & 0o077 == 0
        FileStore(tmp_path / "store").claim()  # let go at once
        store.claim()  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match="another server keeps its sessions"):
            FileStore(tmp_path / "store").claim()


def test_a_log_that_was_cut_amid_a_line_is_read_up_to_there() -> None:
    store = MemoryStore()
    timeline = Timeline(store, "s")
    timeline.write("prompt", call=3, prompt="red", event_id="e1")
    timeline.write("prompt", call=9, prompt="blue", event_id="e2")
    whole = store.get("s/log.jsonl")
    for cut in range(1, 40):
        store.put("s/log.jsonl", whole[:-cut])
        again = Timeline(store, "s")
        assert [entry.event_id for entry in again.entries] == ["e1"] if cut > 1 else ["e1", "e2"]
        again.write("prompt", call=11, prompt="green", event_id="e3")
        assert [entry.event_id for entry in Timeline(store, "s").story()][-1] == "e3"
        assert len(Timeline(store, "s").entries) == (2 if cut > 1 else 3)


def test_pace_and_admission() -> None:
    pace = Pace(fps=10.0, lead=4)
    assert (pace.wait(0, 0.0), pace.wait(3, 0.0), pace.wait(4, 0.0)) == (0.0, 0.0, float("inf"))
    pace.hand_out(100.0)
    assert pace.wait(4, 100.0) == pytest.approx(0.1)
    assert pace.wait(4, 100.2) == 0.0
    assert pace.deadline(20, 100.0) == pytest.approx(102.0)
    pace.shown = 9
    assert (pace.wait(13, 100.0), pace.wait(14, 100.0)) == (0.0, float("inf"))
    assert chosen([], 2, 0.0, 1, 0.1) == (False, True)
    assert chosen([5.0], 2, 0.0, 1, 0.1) == (True, True)
    assert chosen([0.1], 2, 0.0, 1, 0.1) == (True, False)
    assert chosen([0.1], 2, 0.0, 10, 0.1) == (True, True)
    assert real_time_capacity({1: 0.01, 2: 0.016, 4: 0.03}, 50.0, 4) == 2
    assert real_time_capacity({1: 9.0}, 50.0, 4) == 1
    admission = Admission(4, 100)
    admission.reserve("a", 60, live=True)
    admission.reserve("a", 60, live=True)
    with pytest.raises(Busy, match="60 are reserved"):
        admission.reserve("b", 60, live=True)
    admission.release("a")
    admission.release("a")
    assert admission.bytes == 0
    now = 0.0
    bucket = Bucket(2.0, 3, clock=lambda: now)
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 0.5]
    now = 0.5
    assert bucket.take() == 0
    assert is_id(new_id())
    assert not any(is_id(text) for text in ("", "../", "A" * 26, "a" * 25 + "\n", "a" * 27, 5))


def test_log_lines_are_json() -> None:
    try:
        raise ValueError("x")
    except ValueError:
        record = logging.getLogger("pyengine.serve").makeRecord(
            "pyengine.serve", logging.ERROR, "f", 1, "a %s", ("b",), sys.exc_info(), extra={"session": "s"}
        )
    line = json.loads(JsonLines().format(record))
    assert (line["message"], line["level"], line["session"]) == ("a b", "error", "s")
    assert "ValueError: x" in line["trace"]


def test_closing_parks_every_session_with_its_snapshot() -> None:
    store = MemoryStore()
    with service(store, interval=10_000) as made:
        viewer = Viewer()
        session, _ = begin(made, viewer)
        viewer.until(lambda: viewer.count >= 16)
    (keyframe,) = Timeline(store, session.record.folder).keyframes
    assert keyframe.frame == session.frame
