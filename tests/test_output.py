"""Where an export writes: over its own earlier files, and over nobody else's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lvdm_family
import pytest
import toy_family as toy

from pyengine.errors import BundleError, OutputError
from pyengine.export.families.lvdm.export import export_bundle
from pyengine.export.output import prepared


def test_an_earlier_bundle_is_replaced(tmp_path: Path) -> None:
    folder = shutil.copytree(toy.bundle().folder, tmp_path / "bundle")
    assert prepared(folder) == folder
    assert list(folder.iterdir()) == []
    assert prepared(tmp_path / "new" / "deep").is_dir()


def test_a_bundle_of_an_earlier_format_is_replaced(tmp_path: Path) -> None:
    folder = shutil.copytree(toy.bundle().folder, tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": manifest["files"]}))
    assert prepared(folder) == folder
    assert list(folder.iterdir()) == []
    (tmp_path / "other").write_text("kept")
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": {"../other": "0"}}))
    with pytest.raises(BundleError, match="lies outside the bundle"):
        prepared(folder)
    assert (tmp_path / "other").read_text() == "kept"


def test_files_of_others_are_kept_and_named(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match=r"to be empty but it holds thesis\.tex; choose another folder"):
        prepared(tmp_path)
    with pytest.raises(OutputError, match=r"holds thesis\.tex"):
        export_bundle(lvdm_family.modules(), tmp_path, "tiny", {})
    shutil.copytree(toy.bundle().folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(OutputError, match=r"holds thesis\.tex"):
        prepared(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_places_that_are_no_folder_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot make a bundle in .*choose another place"):
        prepared(tmp_path / "file")
    (tmp_path / "manifest.json").write_text('{"format": 0}')
    with pytest.raises(BundleError, match=r"is not a valid manifest \(no 'files'\)"):
        prepared(tmp_path)
