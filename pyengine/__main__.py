"""The command `pyengine`, also as `python -m pyengine`. Signals are looked after before anything else is imported."""

from __future__ import annotations

import sys

from pyengine import signals

__all__ = ["main"]


def main() -> int:
    """Run the command and return its exit code."""
    signals.install()
    try:
        from pyengine.cli import main as run

        return run()
    except BaseException:
        # Whatever an interrupted import or library has made of it.
        if signals.pending() is None:
            raise
        print("pyengine: interrupted", file=sys.stderr)
        return signals.exit_code()
    finally:
        signals.restore()


if __name__ == "__main__":
    sys.exit(main())
