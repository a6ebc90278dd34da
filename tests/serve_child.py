"""A process that serves one session and is killed: prints every frame it hands out, number and sha256, as `FRAME 12 ab..`.

    serve_child.py STORE ENGINE start SEED            a new session; prints `SESSION id token`
    serve_child.py STORE ENGINE resume ID TOKEN FRAME

ENGINE is `fake` or a folder of plans for the bundled model. A line `PROMPT id words` on stdin is a prompt; `APPLIED id` is printed when it
has taken effect.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from typing import Any

import numpy as np
from fake_batch import FakeEngine

from pyengine.serve.service import Options, Service, Start
from pyengine.serve.session import Interaction, Piece
from pyengine.serve.store import FileStore


def tell(text: str) -> None:
    """One write, so that a kill cannot cut a line in two."""
    os.write(1, f"{text}\n".encode())


class Out:
    session: Any = None

    def piece(self, piece: Piece) -> None:
        lines = [
            f"FRAME {piece.first + index} {hashlib.sha256(np.ascontiguousarray(frame)).hexdigest()}"
            for index, frame in enumerate(piece.frames)
        ]
        tell("\n".join(lines))
        self.session.unsent = 0

    def notice(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "applied":
            tell(f"APPLIED {data['event_id']}")
        elif kind == "failed":
            tell(f"FAILED {data}")


def main() -> None:
    root, engine, what, *rest = sys.argv[1:]
    if engine == "fake":
        loaded: Any = FakeEngine(seconds=0.0005)
    else:
        import pyengine

        loaded = pyengine.load("shapes", cache_dir=engine, choice="cut")
    service = Service(loaded, FileStore(root), Options(streams=1, live=1, interval=24))
    service.warm_up()
    out = Out()
    hold = threading.Event()
    service.scheduler.ask(hold.wait)
    if what == "start":
        start = Start(prompt="a red circle", seed=int(rest[0]), realtime=False)
        future = service.start(start, out)
    else:
        future = service.resume(rest[0], rest[1], out, int(rest[2]), Start(realtime=False))
    service.scheduler.ask(lambda: setattr(out, "session", future.result()[0]))
    service.scheduler.ask(lambda: tell(f"SESSION {future.result()[0].record.id} {future.result()[1]}"))
    hold.set()
    for line in sys.stdin:
        _, name, prompt = line.strip().split(" ", 2)
        service.scheduler.ask(
            lambda name=name, prompt=prompt: out.session.interact(Interaction(name, prompt))
        )


if __name__ == "__main__":
    main()
