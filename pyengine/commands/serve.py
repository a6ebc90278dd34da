"""Serve live sessions, jobs and a web page on this machine.

Prints its address; open it in a browser. Sessions survive the process: they are kept in --store, and a client that comes back to another
process with the same store goes on with the next frame. Stopping it (Ctrl-C, or TERM) loses nothing. Needs the extra 'serve'.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from platformdirs import user_state_path

from pyengine.arguments import finite, whole
from pyengine.commands.engine_options import add_engine_options, load_engine, say
from pyengine.errors import BackendUnavailable

PORT = 8008


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", nargs="?", default="shapes", help="a bundled name or a folder (default: shapes)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"port; 0 takes a free one (default: {PORT})")
    parser.add_argument(
        "--store", default=None, help="folder of sessions and videos (default: the user's state folder)"
    )
    parser.add_argument(
        "--streams", type=int, default=4, help="sessions and jobs on the device at a time (default: 4)"
    )
    parser.add_argument(
        "--live",
        type=int,
        default=None,
        help="of them live sessions (default: as many as are kept in real time)",
    )
    parser.add_argument(
        "--memory", type=int, default=None, metavar="BYTES", help="that they may reserve (default: no limit)"
    )
    parser.add_argument(
        "--keep-hours",
        type=float,
        default=24.0,
        help="how long what nobody comes back to is kept (default: 24)",
    )
    group = parser.add_argument_group("safety")
    group.add_argument(
        "--token", default=None, help="what clients must show (default: PYENGINE_TOKEN, or none on loopback)"
    )
    group.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name by which it may be asked"
    )
    group.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="another page that may ask it"
    )
    group.add_argument("--insecure", action="store_true", help="listen for others without a token")
    add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    try:
        from pyengine.serve.safety import Gate
        from pyengine.serve.server import listen, run_server
        from pyengine.serve.service import Options
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"serving needs the package '{error.name}'; install it with pip install 'pyengine-video[serve]'"
        ) from error
    gate = Gate(
        arguments.host,
        arguments.token or os.environ.get("PYENGINE_TOKEN") or None,
        hosts=tuple(arguments.allow_host),
        origins=tuple(arguments.allow_origin),
        insecure=arguments.insecure,
    )
    options = Options(
        streams=whole("streams", arguments.streams, 1, 64),
        live=None if arguments.live is None else whole("live", arguments.live, 1, 64),
        memory=None if arguments.memory is None else whole("memory", arguments.memory, 1),
        keep=3600 * finite("keep-hours", arguments.keep_hours, 0.01, 10**6),
    )
    root = Path(arguments.store) if arguments.store else user_state_path("pyengine") / "serve"
    if arguments.insecure:
        say("warning: anybody who reaches this address can use the server (--insecure)")
    # Before anything is built, so that a port that is taken is told at once.
    at = listen(arguments.host, whole("port", arguments.port, 0, 65535))
    with at, load_engine(arguments, arguments.bundle) as engine:
        try:
            run_server(
                engine,
                root,
                gate,
                options,
                at,
                lambda address: say(f"serving {engine.bundle.name} at {address}"),
            )
        except KeyboardInterrupt:
            say("stopped: every session is parked")
    return 0
