"""A folder of this run of the tests, which all its workers share, so that what is expensive is made once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

__all__ = ["RUN_FOLDER", "made_once", "new_run_folder"]

RUN_FOLDER = (
    "PYENGINE_TESTS_FOLDER"  # the variable that names it; the first process of a run sets it for its workers
)


def new_run_folder() -> tempfile.TemporaryDirectory[str] | None:
    """Makes the folder, and names it to the processes that are started from here. None in a worker, which has it already."""
    if RUN_FOLDER in os.environ:
        return None
    folder = tempfile.TemporaryDirectory(prefix="pyengine-tests-")
    os.environ[RUN_FOLDER] = folder.name
    return folder


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder of this name, filled by whoever asks first; the others wait. Not to be changed."""
    folder = Path(os.environ[RUN_FOLDER]) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            # Renamed when it is whole: one that failed half way is made again.
            part = Path(f"{folder}.part{os.getpid()}")
            part.mkdir(parents=True, exist_ok=True)
            make(part)
            part.rename(folder)
    return folder
