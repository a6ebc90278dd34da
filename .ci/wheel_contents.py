"""Checks what a wheel and a source archive hold: python .ci/wheel_contents.py WHEEL SDIST

The wheel holds the tracked files of pyengine/ and export/ and the compiled module, the archive what it takes to make that;
neither holds anything else.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_SHIPPED = ("tests/", "training/", "benchmarks/", ".ci/")


def main(wheel: str, archive: str) -> int:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = listed.stdout.splitlines()
    modules = {name for name in tracked if name.startswith("pyengine/")}
    modules |= {f"pyengine/{name}" for name in tracked if name.startswith("export/")}
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    compiled = {name for name in held if re.fullmatch(r"pyengine/_C\.[\w.-]+\.so", name)}
    good = len(compiled) == 1 and _same("the wheel", held - compiled, modules)
    sources = {name for name in tracked if not name.startswith(NOT_SHIPPED)}
    with tarfile.open(archive) as unpacked:
        held = {member.name.split("/", 1)[1] for member in unpacked.getmembers() if member.isfile()}
    good &= _same("the source archive", held - {"PKG-INFO"}, sources)
    if not compiled:
        print("the wheel has no compiled module")
    size = Path(wheel).stat().st_size / 1e6
    print(f"{Path(wheel).name}: {len(modules) + len(compiled)} files, {size:.1f} MB")
    return 0 if good else 1


def _same(what: str, held: set[str], wanted: set[str]) -> bool:
    for name in sorted(wanted - held):
        print(f"{what} lacks {name}")
    for name in sorted(held - wanted):
        print(f"{what} should not hold {name}")
    return held == wanted


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
