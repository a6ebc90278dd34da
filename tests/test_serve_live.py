"""The live socket, with real clients over loopback."""

from __future__ import annotations

import gc
import io
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from fake_batch import CHUNK, FakeEngine, expected
from PIL import Image
from serving import PATIENCE, Client, Server, served
from websockets.exceptions import ConnectionClosed

from pyengine.errors import InputError
from pyengine.serve import messages
from pyengine.serve.encoding import Fragments, encoder
from pyengine.serve.wire import Codec, Flag, Kind, Message

RED = [(0, "a red circle")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("live"), FakeEngine(seconds=0.001), interval=24) as started:
        yield started


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
    ]
    return int(line.split()[1]) * 1024


def until(done) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_vllm_omni_client_gets_a_playable_mp4(server: Server) -> None:
    """As their example: start, metadata before each binary frame, an interaction, done, trailer."""
    with Client(server) as client:
        client.send(
            "session.start",
            prompt="a red circle",
            format="m4s",
            num_frames=40,
            guidance_scale=3.0,
            size="16x16",
        )
        start = client.until("video.start")
        assert start["ignored"] == ["guidance_scale"]
        video, counted, done = b"", 0, None
        client.send(
            "session.interaction", interaction={"event_id": "e1", "event": {"prompt": "a blue square"}}
        )
        while done is None:
            data = json.loads(client.socket.recv(PATIENCE))
            if data["type"] == "video.chunk_metadata":
                part = client.socket.recv(PATIENCE)
                assert isinstance(part, bytes)
                assert len(part) == data["byte_length"]
                video, counted = video + part, counted + data["num_frames"]
            elif data["type"] == "session.done":
                done = data
        assert done == {
            "type": "session.done",
            "request_id": start["request_id"],
            "chunks": 5,
            "stopped": False,
        }
    assert counted == 40
    with av.open(io.BytesIO(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 40


def test_frames_number_themselves_and_prompts_say_what_they_touched(server: Server) -> None:
    with Client(server) as client:
        start = client.start(seed=4, lead_frames=8)
        assert (start["frames_per_chunk"], start["width"], start["exact"]) == (CHUNK, 16, True)
        client.frames(16)
        client.send(
            "session.interaction", interaction={"event_id": "e1", "event": {"prompt": "a blue square"}}
        )
        assert client.until("session.interaction.queued")["event_id"] == "e1"
        applied = client.until("session.interaction.applied")
        completed = client.until("session.interaction.completed")
        assert completed["frame"] == applied["complete"] == applied["frame"] + 2 * CHUNK
        client.send("session.interaction", interaction={"event_id": "e1", "event": {"prompt": "red"}})
        assert client.until("error")["code"] == "event_id_conflict"
        frames = client.frames(applied["frame"] + CHUNK)
        plain = expected(4, RED, len(frames))
        assert np.array_equal(frames[: applied["frame"]], plain[: applied["frame"]])
        assert not np.array_equal(frames[applied["frame"] :], plain[applied["frame"] :])
        touched = [message.events for message in client.messages if message.kind == Kind.FRAME]
        assert touched[: len(frames)] == [int(frame >= applied["frame"]) for frame in range(len(frames))]
        last = [message for message in client.messages if message.flags & Flag.LAST_OF_CHUNK]
        assert all(message.frame % CHUNK == CHUNK - 1 for message in last)


def test_pause_play_seek_and_a_snapshot(server: Server) -> None:
    with Client(server) as client:
        client.start(pace="realtime", lead_frames=16)
        client.frames(16)
        client.send("session.pause")
        paused = client.until("session.state")
        while paused["state"] != "paused":
            paused = client.until(
                "session.state", after=len([n for n in client.news if n["type"] == "session.state"])
            )
        client.send("session.stats")
        stats = client.until("session.stats")
        assert (stats["state"], stats["frame"]) == ("paused", paused["frame"])
        client.send("session.snapshot")
        while not any(message.kind == Kind.SNAPSHOT for message in client.messages):
            client.receive()
        client.send("session.play")
        client.send("session.seek", frame=5, mode="branch")
        frames = client.frames(20, epoch=2)
        assert np.array_equal(frames, expected(0, RED, 25)[5:])
        client.send("session.seek", seconds=0.25)
        assert np.array_equal(client.frames(10, epoch=3), expected(0, RED, 16)[6:])
        client.send("session.seek")
        assert "one of the two" in client.until("error")["message"]
        client.send("session.ping")
        client.until("session.pong")


def test_a_snapshot_leaves_as_bytes_and_enters_as_a_session(server: Server) -> None:
    with Client(server) as client:
        client.start(seed=2, pace="realtime")
        client.send("session.snapshot")
        while not (saved := [message for message in client.messages if message.kind == Kind.SNAPSHOT]):
            client.receive()
        (message,) = saved
    made = httpx.post(f"{server.url}/v1/sessions", content=message.payload)
    assert made.status_code == 200, made.text
    start = {"session_id": made.json()["id"], "resume_token": made.json()["resume_token"]}
    frame = made.json()["frame"]
    with Client(server) as client:
        client.resume(start, frame)
        frames = client.frames(40)
        assert np.array_equal(frames, expected(2, RED, frame + 40)[frame:])
        client.send("session.seek", frame=frame)
        assert np.array_equal(client.frames(8), frames[:8])
        if frame:
            client.send("session.seek", frame=frame - 1)
            assert f"from {frame} on" in client.until("error")["message"]
    assert httpx.get(f"{server.url}/v1/sessions/{start['session_id']}").json()["state"] in (
        "playing",
        "parked",
    )
    assert httpx.delete(f"{server.url}/v1/sessions/{start['session_id']}").json()["deleted"]
    for broken in (b"", b"{", message.payload[:-5], b"PK" * 100):
        assert httpx.post(f"{server.url}/v1/sessions", content=broken).status_code == 400


def test_a_client_that_comes_back_gets_the_next_frame(server: Server) -> None:
    with Client(server) as client:
        start = client.start(seed=9)
        client.frames(30)
        count = len([message for message in client.messages if message.kind == Kind.FRAME])
        client.socket.socket.shutdown(socket.SHUT_RDWR)  # no goodbye
    with Client(server) as client:
        assert client.resume(start, count)["epoch"] == 2
        frames = client.frames(20)
        assert client.messages[0].frame == count
        assert np.array_equal(frames, expected(9, RED, count + 20)[count:])
        with Client(server) as other:
            assert other.resume(start, None)["epoch"] == 3
            client.until("session.moved")
            other.frames(8)
    with Client(server) as client:
        client.send("session.resume", session_id=start["session_id"], resume_token="guessed")
        assert "no such session" in client.until("error")["message"]
        with pytest.raises(ConnectionClosed):
            client.receive()


def test_who_acknowledges_is_paced_by_that(server: Server) -> None:
    with Client(server) as client:
        client.start(pace="realtime", lead_frames=8)
        client.frames(8)
        client.send("session.ack", frame=0)
        time.sleep(0.8)  # by the clock 19 more frames
        client.send("session.stats")
        stats = client.until("session.stats")
        assert stats["frame"] <= 24
        client.send("session.ack", frame=stats["frame"] - 1)
        client.frames(stats["frame"] + 8)


def test_what_cannot_be_understood_is_answered_and_the_session_goes_on(server: Server) -> None:
    bad = [
        "{",
        '{"type": "session.dance"}',
        '{"type": "session.seek", "frame": -1}',
        '{"type": "session.seek", "frame": 1e400}',
        '{"type": "session.interaction", "interaction": {"event": {"prompt": "an elephant"}}}',
        '{"type": "session.interaction", "interaction": {"event": {"prompt": "' + "a " * 300 + '"}}}',
        '{"type": "session.ack", "frame": NaN}',
        '{"type": "session.pause", "why": 1}',
        "[" * 10_000,
    ]
    with Client(server) as client:
        client.start(num_frames=40)
        for number, message in enumerate(bad):
            client.socket.send(message)
            error = client.until("error", after=number)
            assert error["code"] == ("unknown_type" if "dance" in message else "invalid_request"), message
        assert np.array_equal(client.frames(40), expected(0, RED, 40))
    for first in ('{"type": "session.pause"}', "x", '{"type": "session.start", "prompt": "an elephant"}'):
        with Client(server) as client:
            client.socket.send(first)
            assert client.until("error")["code"] == "invalid_request"


def test_a_client_that_does_not_read_stops_only_itself(server: Server) -> None:
    """Its frames fill the buffers of the kernel and of the server, and then its stream stands; another one's goes on."""
    big = FakeEngine(seconds=0.0005, size=256)
    folder = Path(server.service.store.root).parent / "slow"  # type: ignore[attr-defined]
    with served(folder, big) as started, Client(started, max_queue=1) as slow, Client(started) as fast:
        slow.start(seed=1)
        fast.start(seed=2)
        for _ in range(3):
            fast.messages.clear()
            fast.frames(80)
        session = next(one for one in started.service.scheduler.sessions.values() if one.record.seed == 1)
        until(lambda: session.unsent >= CHUNK)
        stood = session.frame
        for _ in range(2):
            fast.messages.clear()
            fast.frames(80)
        assert session.frame <= stood + 2 * CHUNK
        assert session.unsent <= 2 * CHUNK
        slow.frames(stood + CHUNK)  # once it reads, it goes on


def test_who_wants_the_latest_gets_it_when_it_reads_again(server: Server) -> None:
    """What was not sent gives way to what is newer; numbers show the gap, and the frames are those of the seed."""
    folder = Path(server.service.store.root).parent / "latest"  # type: ignore[attr-defined]
    with (
        served(folder, FakeEngine(seconds=0.0005, size=192)) as started,
        Client(started, max_queue=1) as client,
    ):
        start = client.start(seed=6, delivery="latest")
        session = started.service.scheduler.sessions[start["session_id"]]
        until(lambda: session.frame > 600)
        while not any(message.frame > 600 for message in client.messages):
            client.receive()
        numbers = [message.frame for message in client.messages]
        assert numbers == sorted(set(numbers))
        assert len(numbers) < numbers[-1]
        whole = expected(6, RED, numbers[-1] + 1, size=192)
        for message in client.messages[:: len(client.messages) // 8]:
            assert message.payload == whole[message.frame].tobytes()


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_sessions_that_come_and_go_leave_nothing(server: Server, count: int) -> None:
    """At the start, amid frames, amid a seek, without a goodbye, by a stop."""
    service = server.service

    def cycle(way: int) -> None:
        with Client(server) as client:
            if way % 5 == 0:
                client.send("session.start", prompt="a red circle", format="raw")
                return
            client.start()
            if way % 5 == 1:
                client.frames(8)
            elif way % 5 == 2:
                client.send("session.seek", frame=3)
            elif way % 5 == 3:
                client.socket.socket.shutdown(socket.SHUT_RDWR)
            else:
                client.send("session.stop")
                assert client.until("session.done")["stopped"]

    server.app.state.live.starts._buckets.clear()
    for way in range(5):
        cycle(way)
    until(lambda: not service.scheduler.sessions)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for way in range(count):
        server.app.state.live.starts._buckets.clear()
        cycle(way)
        if way == 100:
            memory = resident()
    until(lambda: not service.scheduler.sessions and not server.app.state.live.sockets)
    assert service.admission.bytes == 0
    assert service.batch.members == []
    assert threading.active_count() <= threads + 1
    until(lambda: len(os.listdir("/proc/self/fd")) <= files + 2)
    if count > 100:
        assert resident() - memory < 8e6  # server and clients together


@pytest.mark.parametrize("name", ["jpeg", "webp", "h264", "raw"])
def test_pictures_come_back_as_they_were(name: str) -> None:
    frames = np.zeros((6, 32, 48, 3), np.uint8)
    frames[:, :, :24] = (200, 30, 60)
    frames[:, 16:] = np.arange(0, 120, 20)[:, None, None, None]
    made = encoder(name, 24.0, 95)
    encoded = made.encode(frames)
    if name == "h264":
        decoder = av.CodecContext.create("h264", "r")
        pictures = [picture for one in encoded for picture in decoder.decode(av.Packet(one.data))]
        pictures += decoder.decode(None)
        back = [picture.to_ndarray(format="rgb24") for picture in pictures]
        assert [one.is_key for one in encoded] == [True] + [False] * 5
        made.restart()
        assert made.encode(frames[:1])[0].is_key
    elif name == "raw":
        back = [np.frombuffer(one.data, np.uint8).reshape(32, 48, 3) for one in encoded]
    else:
        back = [np.asarray(Image.open(io.BytesIO(one.data)).convert("RGB")) for one in encoded]
    assert len(back) == 6
    assert np.abs(np.stack(back).astype(int) - frames).mean() < 6


def test_fragments_of_an_odd_size_play() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (10, 15, 17, 3), np.uint8)
    made = Fragments(24.0, 90)
    parts = [made.encode(frames[:4]), made.encode(frames[4:]), made.finish()]
    assert [count for _, count in parts] == [3, 6, 1]
    with av.open(io.BytesIO(b"".join(data for data, _ in parts))) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10


def test_a_message_is_what_it_says() -> None:
    message = Message(Kind.FRAME, b"abc", 3, Codec.JPEG, 2**40, 7, 2, 640, 480)
    data = message.pack()
    assert Message.read(data) == message
    assert data[:6] == b"PYE1\x01\x03"
    assert len(data) == 35
    for broken in (data[:-1], b"X" + data[1:], b"", data + b"x"):
        with pytest.raises(InputError):
            Message.read(broken)


def test_every_message_of_the_protocol_is_read() -> None:
    assert {
        f"session.{name}"
        for name in [
            "start",
            "resume",
            "interaction",
            "ack",
            "pause",
            "play",
            "seek",
            "snapshot",
            "stats",
            "stop",
            "ping",
        ]
    } == messages.TYPES
