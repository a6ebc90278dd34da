"""Parts of plans on disk: a folder each, `plan.json` and the compiled engines, named by a hash of everything that went into it.

A part that no longer fits is simply not found. What lies here may be damaged or stale: a part is checked against the
bundle before it is used, and one that does not fit is removed, so that it is built again.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyengine.bundle.bundle import Bundle, sha256
from pyengine.bundle.variant import Variant
from pyengine.errors import PlanError
from pyengine.plans.plan import Part, segments

__all__ = ["FILE", "KEPT_DAYS", "PlanCache", "cache_folder", "discard", "read"]

FORMAT = 1
FILE = "plan.json"
KEPT_DAYS = 60  # a part that no stream has asked for in so long is deleted by the next build
ABANDONED_DAYS = 1  # so old is a half-built part only when its builder was killed
Facts = Mapping[str, Any]
log = logging.getLogger("pyengine")


def cache_folder(given: str | Path | None) -> Path:
    """Where plans live: the argument, else PYENGINE_CACHE, else the user's cache folder."""
    if folder := given or os.environ.get("PYENGINE_CACHE"):
        return Path(folder)
    import platformdirs  # here, so that a machine that names its folder can do without

    return Path(platformdirs.user_cache_dir("pyengine"))


class PlanCache:
    """The parts of one bundle. Where the folder cannot be read or written a warning says so, and what is built goes to a temporary one."""

    def __init__(self, root: Path, bundle: Bundle) -> None:
        self._given, self._bundle = root, bundle
        self._refused = False  # the folder cannot be used

    @property
    def root(self) -> Path:
        """Where new parts go."""
        return _temporary_folder() if self._refused and _temporary else self._given

    def place(self, variant: Variant, facts: Facts, root: Path | None = None) -> Path:
        """The folder of a part that depends on these facts."""
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
        return (root or self.root) / self._bundle.name / f"{variant}-{key}"

    def has(self, variant: Variant, facts: Facts) -> bool:
        """Whether there is a part, be it usable or not."""
        return any(_exists(self.place(variant, facts, root)) for root in (self._given, *_temporary))

    def find(self, variant: Variant, facts: Facts) -> Part | None:
        """The part, checked, or None where it must be built."""
        for root in (self._given, *_temporary):
            folder = self.place(variant, facts, root)
            try:
                if not folder.exists():
                    continue
            except OSError as error:
                self._refuse(error)
                continue
            try:
                return read(self._bundle, variant, folder)
            except PlanError as error:
                log.warning("%s: building it again", error)
                discard(folder)
        return None

    def facts(self, variant: Variant) -> Iterator[Facts]:
        """What every part of a variant depends on, also of parts that are not wanted any more."""
        for path in _listed(self.root / self._bundle.name, f"{variant}-*/{FILE}"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                facts = json.loads(path.read_text())["facts"]
                if isinstance(facts, dict):
                    yield facts

    def publish(self, part: Part, facts: Facts, save: Callable[[Path], tuple[str | None, ...]]) -> Part:
        """Keeps a part. `save` writes its engines to the folder it is given and returns their names.

        Of two builders at once the first wins, and both get its part. A part that can be kept nowhere is returned as
        it came; a part that is not whole is never left behind.
        """
        folder = self.place(part.variant, facts)
        try:
            return self._publish(replace(part, folder=folder), facts, save)
        except OSError as error:
            if self._refuse(error):
                return self.publish(part, facts, save)
            log.warning("the plan for %s is not kept at all (%s)", part.variant, _reason(error))
            return replace(part, folder=folder)

    def note(self, part: Part) -> None:
        """Writes `exact`, which is found out after a part was kept, into its plan.json. A part that is kept nowhere stays as it is."""
        path = part.folder / FILE
        scratch = path.with_name(f".{FILE}.{uuid.uuid4().hex[:8]}")
        try:
            record = json.loads(path.read_text()) | {"exact": part.exact}
            scratch.write_text(json.dumps(record, indent=1) + "\n")
            scratch.replace(path)
        except (OSError, ValueError, TypeError) as error:
            log.info("nothing more is noted about the plan for %s (%s)", part.variant, error)
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)

    def expire(self, days: float = KEPT_DAYS) -> None:
        """Removes the parts that nobody read for `days`, those of earlier versions and other settings, and what builders that were
        killed have left.
        """
        folder, now = self.root / self._bundle.name, time.time()
        for path in _listed(folder, f"*/{FILE}"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < now - days * 86400:
                    discard(path.parent)
        for path in _listed(folder, ".*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < now - ABANDONED_DAYS * 86400:
                    shutil.rmtree(path, ignore_errors=True)

    def _publish(self, part: Part, facts: Facts, save: Callable[[Path], tuple[str | None, ...]]) -> Part:
        """Writes beside the part's folder and renames: nobody sees a part before it is whole. Raises OSError."""
        scratch = part.folder.with_name(f".{part.folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            scratch.mkdir(parents=True)
            files = save(scratch)
            record = {
                "format": FORMAT,
                "facts": dict(facts),
                "choice": part.choice,
                "seconds": dict(part.seconds),
                "exact": part.exact,
                "engines": [file and {"file": file, "sha256": sha256(scratch / file)} for file in files],
            }
            (scratch / FILE).write_text(json.dumps(record, indent=1) + "\n")
            try:
                scratch.rename(part.folder)
            except OSError as error:
                try:
                    # That of another process, which was first.
                    return read(self._bundle, part.variant, part.folder)
                except PlanError:
                    raise error from None
            return replace(part, engines=files)
        finally:
            with contextlib.suppress(OSError):
                if scratch.exists():
                    shutil.rmtree(scratch, ignore_errors=True)

    def _refuse(self, error: OSError) -> bool:
        """On to a temporary folder; False where that is used already or there is none."""
        if self._refused:
            return False
        self._refused = True
        try:
            _temporary_folder()
        except OSError:
            return False
        if self._given not in _told:
            _told.add(self._given)
            log.warning(
                "plans cannot be kept in %s (%s), so they are built again at the next start; set PYENGINE_CACHE to a folder "
                "that can be written",
                self._given,
                _reason(error),
            )
        return True


def read(bundle: Bundle, variant: Variant, folder: Path) -> Part:
    """The part in `folder`, checked against the bundle's component and every engine against its hash. Raises PlanError."""
    try:
        record = json.loads((folder / FILE).read_text())
        choice, entries, seconds = record["choice"], record["engines"], record["seconds"]
        exact = record.get("exact")
        if record["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT} but got {record['format']!r}")
        if choice not in ("cut", "inline"):
            raise ValueError(f"expected the choice cut or inline but got {choice!r}")
        expected = len(segments(bundle.component(variant.component), choice))
        if not isinstance(entries, list) or len(entries) != expected:
            raise ValueError(f"expected {expected} engines")
        if not all(value is None or isinstance(value, float | int) for value in seconds.values()):
            raise ValueError("expected numbers of seconds")
        if exact is not None and type(exact) is not bool:
            raise ValueError(f"expected exact as true, false or null but got {exact!r}")
        files = tuple(entry if entry is None else _engine_file(folder, entry) for entry in entries)
        with contextlib.suppress(OSError):  # a cache that others own may be read-only
            os.utime(folder / FILE)  # `expire` keeps what is used
        return Part(variant, choice, seconds, files, folder, exact)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, PlanError) as error:
        raise PlanError(f"the plan in {folder} is corrupt ({error})") from error


def _engine_file(folder: Path, entry: Mapping[str, str]) -> str:
    """The name of an engine's file in the part's own folder."""
    name = entry["file"]
    if Path(name).name != name:
        raise ValueError(f"the engine {name!r} lies outside")
    if sha256(folder / name) != entry["sha256"]:
        raise ValueError(f"the sha256 of {name} is not the recorded one")
    return name


def discard(folder: Path) -> None:
    """Removes a part, also while another process removes it. One that may not be removed stays."""
    doomed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        folder.rename(doomed)
    except OSError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _listed(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.glob(pattern))
    except OSError:
        return []


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


_told: set[Path] = set()  # folders of which a warning has been given
_temporary: list[Path] = []  # the folder of this process, once it is needed
_making = threading.Lock()


def _temporary_folder() -> Path:
    """A folder for the plans of this process, removed at its end. Raises OSError."""
    with _making:
        if not _temporary:
            folder = Path(tempfile.mkdtemp(prefix="pyengine-plans-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            _temporary.append(folder)
        return _temporary[0]
