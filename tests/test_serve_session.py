"""Sessions without HTTP: what each gives follows from its seed and log alone, whatever happens to the process, the device or its viewer."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from fake_batch import CHUNK, FakeEngine, expected
from serving import PATIENCE, Viewer, again, begin, say, service

from pyengine.errors import InputError, PromptError
from pyengine.serve.admission import Busy
from pyengine.serve.service import Service, Start
from pyengine.serve.session import Interaction, Session
from pyengine.serve.store import MemoryStore
from pyengine.serve.timeline import Timeline

RED = [(0, "a red circle")]


def prompts(session: Session) -> list[tuple[int, str]]:
    """The prompts of a session, with the call at which each took effect."""
    return RED + [(entry.call, entry.prompt) for entry in session.timeline.story()]


def test_a_session_gives_the_frames_of_its_seed_and_its_end_is_told() -> None:
    with service() as made:
        viewer = Viewer()
        begin(made, viewer, seed=3, frames=20)
        viewer.until(lambda: bool(viewer.said("ended")))
        assert np.array_equal(viewer.frames(), expected(3, RED, 20))
        assert [piece.epoch for piece in viewer.pieces] == [1, 1, 1]


def test_a_prompt_says_which_frames_it_touches_first_and_which_it_shapes_alone() -> None:
    with service() as made:
        viewer = Viewer()
        session, _ = begin(made, viewer, frames=20 * CHUNK, lead=1)
        viewer.until(lambda: viewer.count >= 2 * CHUNK)
        assert say(made, session, "a blue square", "e1")
        assert not say(made, session, "a green square", "e1")
        viewer.until(lambda: bool(viewer.said("ended")))
        (applied,) = viewer.said("applied")
        assert applied["event_id"] == "e1"
        assert applied["complete"] == applied["frame"] + 2 * CHUNK
        plain = expected(0, RED, 20 * CHUNK)
        got = viewer.frames()
        assert np.array_equal(got, expected(0, prompts(session), 20 * CHUNK))
        touched = applied["frame"]
        assert np.array_equal(got[:touched], plain[:touched])
        assert not np.array_equal(got[touched : touched + CHUNK], plain[touched : touched + CHUNK])
        assert [piece.events for piece in viewer.pieces] == [
            int(piece.first >= touched) for piece in viewer.pieces
        ]


@pytest.mark.parametrize("interval", [8, 40, 10_000])
def test_resuming_at_any_frame_goes_on_with_that_frame(interval: int) -> None:
    """From keyframes and from the log alone; before and after prompts."""
    store = MemoryStore()
    with service(store, interval=interval) as made:
        viewer = Viewer()
        session, token = begin(made, viewer)
        for number, prompt in enumerate(("a blue square", "a green circle", "red")):
            viewer.until(lambda: viewer.count >= 3 * CHUNK * (number + 1))  # noqa: B023
            say(made, session, prompt, f"e{number}")
        viewer.until(lambda: len(viewer.said("applied")) == 3 and viewer.count >= 14 * CHUNK)
    name = session.record.id
    with service(store, interval=interval) as made:
        for frame in (0, 1, 7, 8, 23, 30, 61, 90):
            other = Viewer()
            resumed = again(made, other, name, token, frame)
            other.until(lambda: other.count >= 40)  # noqa: B023
            made.detach(resumed, other).result(PATIENCE)
            assert other.pieces[0].first == frame
            whole = expected(0, prompts(session), frame + other.count)
            assert np.array_equal(other.frames(), whole[frame:])
        assert resumed.epoch == 9
        with pytest.raises(InputError, match="no such session"):
            made.resume(name, token + "x", None, None, Start())


def test_view_shows_what_was_made_and_a_branch_makes_it_anew() -> None:
    with service(interval=16) as made:
        viewer = Viewer()
        session, _ = begin(made, viewer, lead=1)
        viewer.until(lambda: viewer.count >= 4 * CHUNK)
        say(made, session, "a blue square", "e1")
        viewer.until(lambda: bool(viewer.said("applied")))
        touched = viewer.said("applied")[0]["frame"]
        viewer.until(lambda: viewer.count >= touched + 4 * CHUNK)
        told = prompts(session)
        view, start = touched - 5, len(viewer.pieces)
        made.seek(session, view, branch=False).result(PATIENCE)
        viewer.until(lambda: viewer.pieces[-1].first >= touched + 2 * CHUNK and viewer.pieces[-1].epoch == 2)
        seen = [piece for piece in viewer.pieces[start:] if piece.epoch == 2]
        assert seen[0].first == view
        assert seen[0].replayed
        frames = np.concatenate([piece.frames for piece in seen])
        assert np.array_equal(frames, expected(0, told, view + len(frames))[view:])
        made.seek(session, view, branch=True).result(PATIENCE)
        viewer.until(lambda: viewer.pieces[-1].epoch == 3 and viewer.pieces[-1].first >= touched + 2 * CHUNK)
        anew = np.concatenate([piece.frames for piece in viewer.pieces if piece.epoch == 3])
        assert np.array_equal(anew, expected(0, RED, view + len(anew))[view:])
        assert session.timeline.story() == []


def test_a_prompt_while_the_past_is_shown_branches_off_there() -> None:
    with service(interval=16) as made:
        viewer = Viewer()
        session, _ = begin(made, viewer, lead=1)
        viewer.until(lambda: viewer.count >= 4 * CHUNK)
        say(made, session, "a blue square", "e1")
        viewer.until(lambda: bool(viewer.said("applied")) and viewer.count >= 12 * CHUNK)
        done = threading.Event()

        def fork(piece: object) -> None:  # in the scheduler's thread, so it is in time
            if not done.is_set() and session.epoch == 2:
                session.interact(Interaction("e2", "green"))
                done.set()

        viewer.on_piece = fork
        made.seek(session, 8, branch=False).result(PATIENCE)
        viewer.until(lambda: viewer.pieces[-1].epoch == 2 and viewer.pieces[-1].first >= 10 * CHUNK)
        assert [entry.prompt for entry in session.timeline.story()] == ["green"]
        anew = np.concatenate([piece.frames for piece in viewer.pieces if piece.epoch == 2])
        assert np.array_equal(anew, expected(0, prompts(session), 8 + len(anew))[8:])
        assert not viewer.pieces[-1].replayed


def test_who_does_not_read_stops_only_itself() -> None:
    with service() as made:
        slow, fast = Viewer(takes=False), Viewer()
        begin(made, slow, seed=1)
        begin(made, fast, seed=2, frames=400)
        fast.until(lambda: bool(fast.said("ended")))
        assert slow.count == CHUNK  # the lead, and no more
        slow.session.unsent = 0
        made.scheduler.wake()
        slow.until(lambda: slow.count == 2 * CHUNK)


def test_in_real_time_a_session_is_never_further_ahead_than_its_lead() -> None:
    with service(engine=FakeEngine(fps=200.0)) as made:
        viewer = Viewer()
        session, _ = begin(made, viewer, realtime=True, lead=16)
        viewer.until(lambda: viewer.count >= 80)
        # Within a chunk: the one that the last frame of the lead begins.
        assert session.frame <= session.pace.limit(time.monotonic()) + CHUNK


def test_one_that_fails_ends_and_the_others_give_what_they_would_have() -> None:
    engine = FakeEngine()
    with service(engine=engine) as made:
        good, bad = Viewer(), Viewer()
        engine.fails = lambda stream: stream.seed == 13 and stream.calls_made >= 10
        session, _ = begin(made, bad, seed=13)
        begin(made, good, seed=5, frames=400)
        bad.until(lambda: bool(bad.said("failed")))
        good.until(lambda: bool(good.said("ended")))
        assert bad.said("failed") == [{"message": "the network has failed"}]
        assert np.array_equal(np.concatenate([p.frames for p in good.pieces]), expected(5, RED, 400))
        assert session.state == "failed"


def test_one_that_cannot_be_decoded_ends_while_others_wait_or_play() -> None:
    engine = FakeEngine()
    with service(engine=engine) as made:
        slow, good, bad = Viewer(takes=False), Viewer(), Viewer()
        begin(made, slow, seed=1)
        slow.until(lambda: slow.count == CHUNK)
        engine.fails_to_decode = lambda stream: stream.seed == 13 and stream.frames_made >= 16
        begin(made, bad, seed=13)
        begin(made, good, seed=5, frames=400)
        bad.until(lambda: bool(bad.said("failed")))
        good.until(lambda: bool(good.said("ended")))
        assert bad.said("failed") == [{"message": "the decoder has failed"}]
        assert bad.count == 16
        assert np.array_equal(good.frames(), expected(5, RED, 400))
        assert not slow.said("failed")
        assert [piece.epoch for piece in slow.pieces] == [1]


def test_what_a_session_reserves_comes_back_from_every_exit() -> None:
    with service(park_after=0.0) as made:
        assert made.admission.bytes == 0
        viewer = Viewer()
        session, token = begin(made, viewer)
        assert made.admission.bytes == made.measured.bytes_per_stream
        made.scheduler.ask(session.pause).result(PATIENCE)
        viewer.until(lambda: {"state": "parked", "frame": session.frame} in viewer.said("state"))
        assert session.stream is None
        frame = session.frame
        made.play(session).result(PATIENCE)
        viewer.until(lambda: bool(viewer.pieces) and viewer.pieces[-1].first > frame)
        made.detach(session, viewer).result(PATIENCE)
        assert (made.admission.bytes, made.batch.members) == (0, [])
        again(made, viewer, session.record.id, token, None)
        made.end(session.record.id).result(PATIENCE)
        assert (made.admission.bytes, made.batch.members, made.store.list("sessions")) == (0, [], [])
        with pytest.raises(PromptError):
            made.start(Start(prompt="an elephant"), viewer)
        assert made.admission.bytes == 0


def test_a_full_server_refuses_and_says_when_to_come_again() -> None:
    with service(streams=3, live=1) as made:
        begin(made, Viewer())
        with pytest.raises(Busy, match="at most 1 live sessions") as refused:
            made.start(Start(prompt="red"), None)
        assert refused.value.retry_after > 0
        made.start(Start(prompt="red", live=False), Viewer()).result(PATIENCE)
    made = Service(FakeEngine(), MemoryStore())
    with pytest.raises(Busy, match="not ready"):
        made.start(Start(prompt="red"), None)
    made.close()


def test_what_nobody_comes_back_to_is_removed_and_what_somebody_has_is_not() -> None:
    with service(keep=0.0) as made:
        gone, here = Viewer(), Viewer()
        first, _ = begin(made, gone)
        second, _ = begin(made, here)
        made.detach(first, gone).result(PATIENCE)
        time.sleep(0.01)
        made.scheduler.background(made._old, made._remove)
        made.scheduler._pool.submit(int).result(PATIENCE)
        made.scheduler.ask(int).result(PATIENCE)
        kept = {key.split("/")[1] for key in made.store.list("sessions")}
        assert kept == {second.record.id}


def test_keyframes_are_few_and_densest_near_the_end() -> None:
    store = MemoryStore()
    with service(store, interval=8) as made:
        viewer = Viewer()
        session, _ = begin(made, viewer, frames=1600)
        viewer.until(lambda: bool(viewer.said("ended")))
        made.scheduler._pool.submit(int).result(PATIENCE)
        made.scheduler.ask(int).result(PATIENCE)
        frames = [keyframe.frame for keyframe in Timeline(store, session.record.folder).keyframes]
    assert 16 < len(frames) <= 32
    assert frames[-1] - frames[-2] < frames[1] - frames[0]
