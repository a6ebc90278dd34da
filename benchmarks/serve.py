"""How does the server feel? `python benchmarks/serve.py [--sessions 1,2,4] [--seconds 30]` starts `pyengine serve` and is its client.

start      seconds from the command to `/ready`, with its plans cached
first      seconds from `session.start` to the first frame, on a warm server, alone
intervals  milliseconds between frames that N sessions get at the model's rate, and whether each kept it up
prompt     seconds from a prompt to the first frame that it touches
recovery   seconds from `kill -9` to the next frame, through a restart of the process; what of them the process took to be ready

The clients are threads of this process, on the same machine: what they take counts against the server. Writes serve.json. Run it while
nothing else runs. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from websockets.sync.client import ClientConnection, connect

from pyengine.measure.probe import machine
from pyengine.serve.wire import Kind, Message

PROMPTS = ("a red circle bounces over a blue background", "a green star orbits over a grey background")
PATIENCE = 120.0


@contextlib.contextmanager
def server(store: Path, streams: int) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    """A process that is ready, its host and port, and the seconds that took."""
    started = time.perf_counter()
    command = [sys.executable, "-P", "-m", "pyengine", "serve", "--port", "0", "--store", str(store)]
    process = subprocess.Popen(
        [*command, "--streams", str(streams), "--live", str(streams)], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        found = next(filter(None, (re.search(r"http://(\S+?)/", line) for line in process.stderr)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{found[1]}/ready"):
                break
            time.sleep(0.02)
        yield process, found[1], time.perf_counter() - started
    finally:
        process.kill()
        process.wait()


def opened(host: str) -> ClientConnection:
    return connect(f"ws://{host}/v1/realtime/video", compression=None, max_size=2**26, close_timeout=1)


def say(socket: ClientConnection, kind: str, **data: Any) -> None:
    socket.send(json.dumps({"type": kind, **data}))


def until(socket: ClientConnection, kind: str) -> dict[str, Any]:
    """The next news of a kind."""
    while True:
        data = socket.recv(PATIENCE)
        if isinstance(data, str):
            news = json.loads(data)
            if news["type"] == kind:
                return dict(news)
            if news["type"] == "error":
                raise SystemExit(news["message"])


def frame(socket: ClientConnection, least: int = 0) -> Message:
    """The next frame that is not before `least`."""
    while True:
        data = socket.recv(PATIENCE)
        if isinstance(data, bytes):
            message = Message.read(data)
            if message.kind == Kind.FRAME and message.frame >= least:
                return message


def start(socket: ClientConnection, seed: int) -> None:
    say(socket, "session.start", prompt=PROMPTS[0], seed=seed, format="jpeg")


def first_frame(host: str, seed: int) -> float:
    with opened(host) as socket:
        began = time.perf_counter()
        start(socket, seed)
        frame(socket)
        took = time.perf_counter() - began
        say(socket, "session.stop")
        until(socket, "session.done")
        return took


def watched(host: str, seed: int, seconds: float, out: list[dict[str, Any]]) -> None:
    """A viewer for so long. Frames leave in chunks, so intervals are those between chunks, per frame."""
    with opened(host) as socket:
        start(socket, seed)
        size = until(socket, "video.start")["frames_per_chunk"]
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            if frame(socket).flags & 2:
                times.append(time.perf_counter())
        gaps = np.diff(times)[2:] * 1000 / size
        say(socket, "session.stop")
        out.append({"gaps": gaps.tolist(), "frames": len(times) * size})


def intervals(host: str, count: int, seconds: float) -> dict[str, Any]:
    out: list[dict[str, Any]] = []
    threads = [threading.Thread(target=watched, args=(host, seed, seconds, out)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gaps = [gap for one in out for gap in one["gaps"]]
    if not gaps:
        raise SystemExit(f"{count} sessions gave too few frames in {seconds:g} s; raise --seconds")
    p50, p95, p99 = np.percentile(gaps, [50, 95, 99])
    rate = sum(one["frames"] for one in out) / seconds / count
    shares = {"p50_ms": round(p50, 1), "p95_ms": round(p95, 1), "p99_ms": round(p99, 1)}
    return {"sessions": count, "frames_per_second_each": round(rate, 1), **shares}


def switched(host: str) -> float:
    """From a prompt to the first frame that it touches."""
    with opened(host) as socket:
        start(socket, 1)
        frame(socket, 40)
        began = time.perf_counter()
        say(socket, "session.interaction", interaction={"event_id": "e", "event": {"prompt": PROMPTS[1]}})
        applied = until(socket, "session.interaction.applied")
        frame(socket, applied["frame"])
        took = time.perf_counter() - began
        say(socket, "session.stop")
        return took


def recovery(store: Path, streams: int) -> dict[str, float]:
    with server(store, streams) as (process, host, _), opened(host) as socket:
        start(socket, 3)
        names = until(socket, "video.start")
        last = frame(socket, 100).frame
        os.kill(process.pid, signal.SIGKILL)
        killed = time.perf_counter()
    with server(store, streams) as (_, host, ready), opened(host) as socket:
        ids = {name: names[name] for name in ("session_id", "resume_token")}
        say(socket, "session.resume", **ids, from_frame=last + 1, format="jpeg")
        number = frame(socket).frame
        if number != last + 1:
            raise SystemExit(f"expected frame {last + 1} after the restart but got {number}")
        return {"to_next_frame": time.perf_counter() - killed, "of_them_until_ready": ready}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", default="1,2,4")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="of prompts and recoveries")
    parser.add_argument("--output", type=Path, default=Path("serve.json"))
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.sessions.split(",")]
    report: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        with server(store, max(counts)):
            pass  # so that its plans are cached
        with server(store, max(counts)) as (_, host, ready):
            report["start_s"] = round(ready, 2)
            firsts = [first_frame(host, seed) for seed in range(arguments.starts)]
            report["first_frame_s"] = {
                f"p{share}": round(float(np.percentile(firsts, share)), 3) for share in (50, 95)
            }
            report["prompt_s"] = [round(switched(host), 3) for _ in range(arguments.rounds)]
            report["intervals"] = [intervals(host, count, arguments.seconds) for count in counts]
        report["recovery_s"] = [
            {name: round(value, 2) for name, value in recovery(store, max(counts)).items()}
            for _ in range(arguments.rounds)
        ]
    print(json.dumps(report, indent=2))
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
