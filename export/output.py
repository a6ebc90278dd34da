"""The folder that a bundle is written into."""

from __future__ import annotations

from pathlib import Path

from pyengine.bundle.bundle import MANIFEST, listed_files
from pyengine.errors import OutputError


def prepared(folder: Path) -> Path:
    """A new or empty folder; of an earlier bundle the files that its manifest lists are removed, and no others.

    Raises OutputError for a folder that holds anything else, BundleError for a manifest that cannot be read.
    """
    try:
        if (folder / MANIFEST).is_file():
            for name in listed_files(folder):
                (folder / name).unlink(missing_ok=True)
            (folder / MANIFEST).unlink()
        folder.mkdir(parents=True, exist_ok=True)
        taken = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise OutputError(
            f"cannot make a bundle in '{folder}': {error.strerror}; choose another place"
        ) from error
    if taken:
        raise OutputError(f"expected {folder} to be empty but it holds {taken[0]}; choose another folder")
    return folder
