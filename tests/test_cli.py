"""The command line as a user meets it: files, exit codes, one-sentence refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import pyengine
from pyengine.cli import main
from pyengine.commands import info

PROMPT = "a red circle bounces over a blue background"


@pytest.fixture(autouse=True)
def _cache(plan_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENGINE_CACHE", str(plan_cache))


def generate(*words: str) -> int:
    return main(["generate", PROMPT, "--choice", "cut", *words])


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_generate_writes_a_playable_file(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"video{suffix}"
    assert generate("--frames", "20", "--output", str(path), "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["frames"] == 20
    assert pyengine.read_video(path).shape == (20, 256, 256, 3)


def test_generate_writes_a_folder_of_pictures(tmp_path: Path) -> None:
    assert generate("--frames", "5", "--output", str(tmp_path / "frames") + "/", "--upscale", "1") == 0
    pictures = sorted((tmp_path / "frames").glob("*.png"))
    assert len(pictures) == 5
    assert pyengine.read_image(pictures[0]).shape == (1, 64, 64, 3)


def test_generate_is_what_the_stream_gives(tmp_path: Path, engine: pyengine.Engine) -> None:
    assert (
        generate("--frames", "6", "--seed", "5", "--upscale", "1", "--output", str(tmp_path / "f") + "/") == 0
    )
    written = np.concatenate([pyengine.read_image(path) for path in sorted((tmp_path / "f").glob("*.png"))])
    with engine.stream(PROMPT, seed=5, frames=6) as stream:
        assert np.array_equal(written, np.stack(list(stream)))


def test_generate_continues_a_video(tmp_path: Path) -> None:
    first, second = tmp_path / "first.mp4", tmp_path / "second.mp4"
    assert generate("--frames", "24", "--output", str(first)) == 0
    assert generate("--frames", "48", "--video", str(first), "--output", str(second)) == 0
    one, two = pyengine.read_video(first).astype(int), pyengine.read_video(second).astype(int)
    assert len(two) == 48
    assert np.abs(two[:24] - one).mean() < 8  # the given frames open the video, encoded once more


def test_generate_starts_from_a_picture(tmp_path: Path) -> None:
    assert generate("--frames", "1", "--upscale", "1", "--output", str(tmp_path / "f") + "/") == 0
    picture = next((tmp_path / "f").glob("*.png"))
    assert generate("--frames", "9", "--image", str(picture), "--output", str(tmp_path / "v.mp4")) == 0
    assert len(pyengine.read_video(tmp_path / "v.mp4")) == 9


REFUSED = [
    (["generate", ""], "empty"),
    (["generate", "a red dragon bounces"], "dragon"),
    (["generate", PROMPT, "--seconds", "-1"], "[seconds] expected a finite number from 0"),
    (["generate", PROMPT, "--output", "/proc/no/video.mp4"], "/proc/no/video.mp4"),
    (["generate", PROMPT, "--output", "video.xyz"], ".mp4"),
    (["generate", PROMPT, "--output", ""], "must be the name of a file"),
    (["generate", PROMPT, "--output", "-"], "standard output"),
    (["generate", PROMPT, "--output", "a" * 300 + ".mp4"], "File name too long"),
    (["generate", PROMPT, "--seconds", "nan"], "[seconds] expected a finite number from 0 to"),
    (["generate", PROMPT, "--seconds", "inf"], "[seconds] expected a finite number from 0 to"),
    (["generate", PROMPT, "--seconds", "1e300"], "[seconds] expected a finite number from 0 to"),
    (["generate", PROMPT, "--guidance", "nan"], "[guidance] expected a finite number from"),
    (["generate", PROMPT, "--guidance", "1e39"], "[guidance] expected a finite number from"),
    (["generate", PROMPT, "--seed", str(2**64)], "[seed] expected a whole number from"),
    (["generate", PROMPT, "--preset", "nope"], "expected a preset"),
    (["generate", "[pad]"], "[pad]"),
    (["generate", "..."], "expected a prompt with words"),
    (["generate", "a red \udcff circle"], "no character"),
    (["generate", PROMPT, "--bundle", "shapes-lvdm"], "takes no prompt"),
    (["generate", PROMPT, "--backend", "abacus"], "abacus"),
    (["generate", PROMPT, "--precision", "int3"], "int3"),
    (["generate", PROMPT, "--bundle", "nothing-here"], "nothing-here"),
    (["generate", PROMPT, "--image", "missing.png"], "missing.png"),
    (["generate", PROMPT, "--upscale", "0"], "upscale"),
    (["info", "nothing-here"], "shapes"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert message in printed[-1]
    assert not any("Traceback" in line for line in printed)


def test_ctrl_c_closes_the_file_and_exits_130(tmp_path: Path, plan_cache: Path) -> None:
    path = tmp_path / "video.mp4"
    command = [
        sys.executable,
        "-P",
        "-m",
        "pyengine",
        "generate",
        PROMPT,
        "--choice",
        "cut",
        "--seconds",
        "3000",
        "--output",
        str(path),
    ]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYENGINE_CACHE": str(plan_cache)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and what they start does too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while (not path.exists() or path.stat().st_size < 150_000) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        said = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "made so far" in said
    assert len(pyengine.read_video(path)) > 24


def test_refusals_come_before_a_build_and_keep_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*arguments: object, **options: object) -> None:
        raise AssertionError("something was built")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyengine.build.library.VariantLibrary.program", built)
    Path("mine.mp4").write_bytes(b"an earlier video")
    for words, _ in REFUSED:
        is_of_the_engine = {"--backend", "--precision"} & set(words)
        if words[0] == "generate" and not is_of_the_engine and "--output" not in words:
            assert main([*words, "--output", "mine.mp4"]) == 2
    assert Path("mine.mp4").read_bytes() == b"an earlier video"
    assert os.listdir() == ["mine.mp4"]


def test_a_start_as_long_as_the_video_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pyengine.VideoWriter(tmp_path / "sixty.mp4", height=64, width=64, fps=60) as writer:
        for _ in range(60):
            writer.write(np.zeros((64, 64, 3), np.uint8))
    assert (
        generate(
            "--video", str(tmp_path / "sixty.mp4"), "--frames", "24", "--output", str(tmp_path / "a.mp4")
        )
        == 2
    )
    assert "24 frames or more, but got 24" in capsys.readouterr().err
    words = ("--video", str(tmp_path / "sixty.mp4"), "--upscale", "1", "--output", str(tmp_path / "a.gif"))
    assert generate("--frames", "26", *words) == 0
    assert len(pyengine.read_video(tmp_path / "a.gif")) == 26


@pytest.mark.parametrize("name", ["take [red].mp4", "a:star:b.gif", "two  spaces " * 8 + ".gif"])
def test_names_are_told_as_they_are(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--frames", "2", "--output", str(tmp_path / name)) == 0
    assert str(tmp_path / name) in capsys.readouterr().err
    assert (tmp_path / name).is_file()


def test_without_arguments_it_says_what_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["generate", "doctor", "--help"]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pyengine 0.")


def test_doctor_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["doctor", "--json"]) == 0
    found = {entry["what"]: entry for entry in json.loads(capsys.readouterr().out)["findings"]}
    assert found["backend openvino"]["state"] == found["bundle shapes"]["state"] == "ok"
    assert "shapes-lvdm" in " ".join(found)
    monkeypatch.setenv("PYENGINE_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr("pyengine.commands.doctor.NEEDED_BYTES", 2**70)
    monkeypatch.setattr("pyengine.commands.doctor.find_spec", lambda name: None)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "broken   backend openvino: pip install openvino" in said
    assert "free some space or set PYENGINE_CACHE" in said
    assert said.splitlines()[-1].startswith("not ready")
    assert "missing  kernels" not in said
    monkeypatch.setattr("pyengine._C.left_out_isas", lambda: ["avx512", "amx"])
    main(["doctor"])
    said = capsys.readouterr().out
    assert (
        "missing  kernels: this processor has amx, which this build left out; install again with PYENGINE_BUILD_ISAS=all"
        in said
    )


def test_an_unknown_instruction_set_is_one_sentence(tmp_path: Path) -> None:
    for words in (
        ["info"],
        ["doctor"],
        ["generate", PROMPT, "--frames", "2", "--output", str(tmp_path / "a.mp4")],
    ):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pyengine", *words],
            env=os.environ | {"PYENGINE_CPU_ISA": "nope"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == (1 if words == ["doctor"] else 2)
        assert "Traceback" not in done.stderr
        assert "got 'nope'; unset PYENGINE_CPU_ISA" in done.stderr + done.stdout


def test_info_and_build_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "shapes", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bundle"]["name"] == "shapes"
    assert facts["bundle"]["megabytes"] < 25
    assert main(["build", "shapes", "--choice", "cut", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert {part["choice"] for part in parts if part["variant"].startswith("denoiser")} == {"cut"}


@pytest.mark.parametrize("command", ["", "generate", "build", "info", "bench", "export"])
def test_help_is_worth_reading(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([*command.split(), "--help"])
    assert done.value.code == 0
    assert len(capsys.readouterr().out) > 300


def test_info_tells_a_setting_that_is_none_from_a_backend_that_is_missing() -> None:
    console = Console(file=StringIO())
    info._print(console, {"backends": {"tensorrt": None}, "method": {"perturbation": None}})
    assert console.file.getvalue().split("\n")[1::2] == ["  tensorrt: not installed", "  perturbation: none"]
