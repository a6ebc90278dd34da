"""Jobs, as the real `openai` package asks for them, and as raw requests for the day it no longer does."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import httpx
import pytest
from fake_batch import CHUNK, FakeEngine, FakeStream
from serving import PATIENCE, Server, served

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("videos"), FakeEngine(seconds=0.0005), frames=2000) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(autouse=True)
def sound(server: Server) -> Iterator[None]:
    yield
    server.service.engine.fails = lambda stream: False  # type: ignore[attr-defined]


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def decoded(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_video_is_made_polled_downloaded_listed_and_deleted(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    video = client.videos.create_and_poll(
        prompt="a red circle",
        model="fake",
        seconds="2",
        size="16x16",
        extra_body={"seed": "7", "guidance_scale": "3"},
    )
    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "2", "16x16")
    assert video.model_extra["ignored"] == ["guidance_scale"]
    assert video.model_extra["seed"] == 7
    assert decoded(client.videos.download_content(video.id).read()) == 48
    assert client.videos.retrieve(video.id).id == video.id
    others = [
        client.videos.create(prompt="red", model="fake", extra_body={"num_frames": "12"}).id for _ in range(3)
    ]
    listed = [one.id for one in client.videos.list(limit=2, order="asc")]  # page by page
    assert set(listed) == {video.id, *others}
    assert len(listed) == 4
    until(lambda: all(client.videos.retrieve(name).status == "completed" for name in others))
    for name in (video.id, *others):
        assert client.videos.delete(name).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(name)
    assert server.service.store.list("jobs") == []
    assert server.service.store.list("sessions") == []
    assert server.service.admission.bytes == 0


def test_a_remix_goes_on_where_the_video_ended(server: Server, client: openai.OpenAI) -> None:
    source = client.videos.create_and_poll(
        prompt="a red circle", model="fake", extra_body={"num_frames": "20"}
    )
    remix = client.videos.remix(source.id, prompt="a blue square")
    assert remix.remixed_from_video_id == source.id
    remix = client.videos.poll(remix.id)
    assert remix.status == "completed", remix
    assert decoded(client.videos.download_content(remix.id).read()) == 20
    session = server.service.store.list("sessions")
    assert len([key for key in session if key.endswith("record.json")]) == 2
    body = {"video": {"id": remix.id}, "prompt": "green"}
    again = httpx.post(f"{server.url}/v1/videos/extensions", json=body).json()
    assert client.videos.poll(again["id"]).status == "completed"
    client.videos.delete(source.id)


def test_a_video_that_is_deleted_is_no_longer_made(server: Server, client: openai.OpenAI) -> None:
    video = client.videos.create(prompt="a red circle", model="fake", extra_body={"num_frames": "2000"})
    until(lambda: client.videos.retrieve(video.id).progress > 0)
    with pytest.raises(openai.ConflictError, match="in_progress"):
        client.videos.download_content(video.id)
    client.videos.delete(video.id)
    until(lambda: not server.service.batch.members)
    calls = server.service.batch.calls
    time.sleep(0.1)
    assert server.service.batch.calls == calls
    assert not list(Path(server.service.store.root).parent.glob(f"videos/{video.id}*"))


def test_a_job_that_fails_says_why(server: Server, client: openai.OpenAI) -> None:
    def fails(stream: FakeStream) -> bool:
        return stream.calls_made > 8

    server.service.engine.fails = fails  # type: ignore[attr-defined]
    video = client.videos.create_and_poll(prompt="a red circle", model="fake")
    assert (video.status, video.error.code) == ("failed", "py_engine_error")
    assert video.error.message == "the network has failed"
    assert client.videos.retrieve(video.id).status == "failed"
    with pytest.raises(openai.BadRequestError, match="expected a video that is completed"):
        client.videos.remix(video.id, prompt="red")


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"prompt": "an elephant"}, openai.BadRequestError, "does not know"),
        ({"prompt": "a " * 300}, openai.BadRequestError, "at most 500"),
        ({"model": "sora-2"}, openai.NotFoundError, "expected the model 'fake'"),
        ({"size": "720x1280"}, openai.BadRequestError, "expected the size 16x16"),
        ({"seconds": "0"}, openai.BadRequestError, "at least one frame"),
        ({"seconds": "nan"}, openai.BadRequestError, "seconds as a number"),
        ({"seconds": "1000"}, openai.BadRequestError, "at most 2000 frames"),
        ({"extra_body": {"seed": "x"}}, openai.BadRequestError, "seed as a whole number"),
    ],
)
def test_what_cannot_be_made_is_refused(client: openai.OpenAI, fields: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        client.videos.create(**{"prompt": "a red circle", "model": "fake", **fields})


def test_the_wire_by_itself(server: Server) -> None:
    """What the package sends and reads, without it."""
    with httpx.Client(base_url=server.url) as raw:
        made = raw.post("/v1/videos", files={"prompt": (None, "red"), "seconds": (None, "1")})
        assert made.status_code == 200
        assert 100 <= int(made.headers["openai-poll-after-ms"]) <= 5000
        video = made.json()
        assert {"id", "object", "created_at", "model", "progress", "seconds", "size", "status"} <= set(video)
        assert (video["object"], video["seconds"]) == ("video", "1")
        until(lambda: raw.get(f"/v1/videos/{video['id']}").json()["status"] == "completed")
        content = raw.get(f"/v1/videos/{video['id']}/content", headers={"range": "bytes=0-3"})
        assert (content.status_code, len(content.content)) == (206, 4)
        whole = raw.post("/v1/videos/sync", files={"prompt": (None, "red"), "num_frames": (None, "20")})
        assert (whole.headers["content-type"], whole.headers["x-model"]) == ("video/mp4", "fake")
        assert float(whole.headers["x-inference-time-s"]) > 0
        assert decoded(whole.content) == 20
        for name in ("../../etc/passwd", "..%2f..%2fetc", "a" * 26, "%00", "A" * 26):
            for method, end in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
                assert raw.request(method, f"/v1/videos/{name}{end}").status_code in (404, 405)
        assert (
            raw.post(
                "/v1/videos", content=b"{" * 100, headers={"content-type": "application/json"}
            ).status_code
            == 400
        )
        cut = b"--x\r\ncontent-disposition: form-data; name=prompt\r\n\r\nre"
        form = {"content-type": "multipart/form-data; boundary=x"}
        assert raw.post("/v1/videos", content=cut, headers=form).status_code in (200, 400)
        many = {f"f{number}": (None, "x") for number in range(40)}
        assert raw.post("/v1/videos", files=many).status_code == 400


def test_a_client_that_leaves_a_sync_request_ends_its_job(server: Server) -> None:
    before = len(server.service.store.list("jobs"))

    def ask() -> None:
        fields = {"prompt": (None, "red"), "num_frames": (None, "2000")}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/videos/sync", files=fields, timeout=0.3)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(PATIENCE)
    until(lambda: not server.service.batch.members and len(server.service.store.list("jobs")) == before)


def test_jobs_of_a_server_that_stopped_are_made_by_the_next(tmp_path: Path) -> None:
    with served(tmp_path, FakeEngine(seconds=0.01)) as first:
        fields = {"prompt": (None, "a red circle"), "num_frames": (None, "160"), "seed": (None, "3")}
        video = httpx.post(f"{first.url}/v1/videos", files=fields).json()
        until(lambda: httpx.get(f"{first.url}/v1/videos/{video['id']}").json()["progress"] > 0)
    assert not list((tmp_path / "videos").glob("*.mp4")) or decoded(
        next((tmp_path / "videos").glob("*.mp4")).read_bytes()
    )
    with served(tmp_path) as second:
        until(lambda: httpx.get(f"{second.url}/v1/videos/{video['id']}").json()["status"] == "completed")
        assert decoded(httpx.get(f"{second.url}/v1/videos/{video['id']}/content").content) == 160


def test_jobs_wait_for_room(tmp_path: Path) -> None:
    with served(tmp_path, FakeEngine(seconds=0.002), streams=1) as one:
        fields = {"prompt": (None, "a red circle"), "num_frames": (None, f"{40 * CHUNK}")}
        names = [httpx.post(f"{one.url}/v1/videos", files=fields).json()["id"] for _ in range(2)]
        until(lambda: httpx.get(f"{one.url}/v1/videos/{names[0]}").json()["progress"] > 0)
        assert httpx.get(f"{one.url}/v1/videos/{names[1]}").json()["status"] == "queued"
        until(lambda: httpx.get(f"{one.url}/v1/videos/{names[1]}").json()["status"] == "completed")
