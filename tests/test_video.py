"""Video files: what was written comes back, at every moment, whatever goes wrong."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

av = pytest.importorskip("av")

from pyengine.errors import ConfigError, InputError, OutputError, ShapeError  # noqa: E402
from pyengine.video.reader import read_image, read_video  # noqa: E402
from pyengine.video.writer import VideoWriter  # noqa: E402

SIZE = 32
NAMES = ["video.mp4", "video.webm", "video.gif", "frames/"]


def clip(count, height=SIZE, width=SIZE):
    """A red square that moves over blue."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 2] = 200
    for number, frame in enumerate(frames):
        left = number % (width // 2)
        frame[height // 4 : height // 2, left : left + width // 4] = (255, 0, 0)
    return frames


def write(path, frames, **options):
    with VideoWriter(path, height=frames.shape[1], width=frames.shape[2], **options) as writer:
        for frame in frames:
            writer.write(frame)
    return writer


def read_back(path):
    if os.path.isdir(path):
        return np.concatenate([read_image(os.path.join(path, name)) for name in sorted(os.listdir(path))])
    return read_video(path)


@pytest.mark.parametrize("upscale", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_comes_back(tmp_path, name, upscale):
    path, frames = f"{tmp_path}/{name}", clip(30)
    writer = write(path, frames, upscale=upscale)
    assert writer.frames_written == 30
    got = read_back(path)
    assert got.shape == (30, SIZE * upscale, SIZE * upscale, 3)
    middle = got[:, upscale // 2 :: upscale, upscale // 2 :: upscale].astype(int)
    is_exact = name in ("video.gif", "frames/")
    assert np.abs(middle - frames).max() == 0 if is_exact else np.abs(middle - frames).mean() < 6
    ground = np.median(middle[:, SIZE // 2 + 8 :], axis=(0, 1, 2))
    assert np.abs(ground - [0, 0, 200]).max() <= 3  # the colour space is tagged as it was converted


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("fps", [24, 12.5])
def test_duration_is_frames_by_rate(tmp_path, name, fps):
    write(tmp_path / name, clip(25), fps=fps)
    with av.open(str(tmp_path / name)) as container:
        assert container.duration / av.time_base == pytest.approx(25 / fps, abs=0.03)


def test_a_finished_mp4_knows_its_length_and_is_h264(tmp_path):
    write(tmp_path / "video.mp4", clip(30))
    with av.open(str(tmp_path / "video.mp4")) as container:
        stream = container.streams.video[0]
        if "libx264" in av.codecs_available:
            assert stream.codec_context.name == "h264"
        assert stream.frames in (30, 0)  # 0: FFmpeg before 7.1 leaves it fragmented
        assert stream.codec_context.pix_fmt == "yuv420p"


@pytest.mark.parametrize("name", ["video.mp4", "video.webm", "video.gif"])
def test_a_single_frame_and_none_at_all(tmp_path, name):
    write(tmp_path / name, clip(1))
    assert read_video(tmp_path / name).shape == (1, SIZE, SIZE, 3)
    with VideoWriter(tmp_path / f"none-{name}", height=SIZE, width=SIZE):
        pass


@pytest.mark.parametrize("name", ["video.mp4", "video.webm"])
def test_odd_sizes_repeat_the_last_row_and_column(tmp_path, name):
    frames = clip(3, 33, 31)
    write(tmp_path / name, frames)
    got = read_video(tmp_path / name)
    assert got.shape == (3, 34, 32, 3)
    assert np.abs(got[:, 33].astype(int) - got[:, 32]).mean() < 3
    write(tmp_path / "odd.gif", frames)
    assert read_video(tmp_path / "odd.gif").shape == (3, 33, 31, 3)


def test_frames_reach_the_disk_while_writing(tmp_path):
    for name, enough in [("video.mp4", 12), ("video.webm", 12), ("video.gif", 12), ("frames/", 24)]:
        path = f"{tmp_path}/{name}"
        with VideoWriter(path, height=SIZE, width=SIZE) as writer:
            for frame in clip(25):
                writer.write(frame)
            assert len(read_back(path) if name == "frames/" else _readable(path)) >= enough


def _readable(path):
    """Frames before the end or the first damage."""
    frames = []
    with av.open(str(path)) as container:
        try:
            for frame in container.decode(video=0):
                frames.append(frame)
        except av.error.FFmpegError:
            pass
    return frames


WRITE_AND_BE_KILLED = """
import os, signal, sys
import numpy as np
from pyengine.video.writer import VideoWriter
writer = VideoWriter(sys.argv[1], height=32, width=32)
for number in range(40):
    writer.write(np.full((32, 32, 3), number, np.uint8))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["video.mp4", "video.webm", "video.gif"])
def test_a_killed_process_leaves_a_playable_file(tmp_path, name):
    arguments = [str(tmp_path / name)]
    ended = subprocess.run(
        [sys.executable, "-P", "-c", WRITE_AND_BE_KILLED, *arguments], capture_output=True, text=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(_readable(tmp_path / name)) >= 24


WRITE_UNTIL_FULL = """
import resource, sys
import numpy as np
from pyengine.errors import OutputError
from pyengine.video.writer import VideoWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
random = np.random.default_rng(0)
writer = VideoWriter(sys.argv[1], height=64, width=64)
try:
    for _ in range(2000):
        writer.write(random.integers(0, 255, (64, 64, 3), np.uint8))
except OutputError as error:
    print(writer.frames_written, str(error), sep="|")
    try:
        writer.write(np.zeros((64, 64, 3), np.uint8))
    except OutputError as again:
        assert str(again) == str(error)
    writer.close()
    writer.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the file size by a Linux call")
@pytest.mark.parametrize("name", ["video.mp4", "video.webm", "video.gif"])
def test_what_was_written_before_the_disk_was_full_stays_playable(tmp_path, name):
    """The limit on file size stands for the disk: the same error path, and part of the data is written."""
    arguments = [str(tmp_path / name)]
    ended = subprocess.run(
        [sys.executable, "-P", "-c", WRITE_UNTIL_FULL, *arguments], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    written, _, message = ended.stdout.strip().partition("|")
    assert message.startswith(f"cannot write '{tmp_path / name}' after {written} frames, which stay playable")
    assert "File too large" in message
    assert 0 < os.path.getsize(tmp_path / name) <= 200_000
    readable = len(_readable(tmp_path / name))
    assert readable == int(written)
    assert readable > 12


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device /dev/full")
@pytest.mark.parametrize("name", ["video.mp4", "video.webm", "video.gif"])
def test_a_full_disk_is_said_in_one_sentence(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"No space left on device; free some space") as caught:
        write(tmp_path / name, clip(48))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupt_closes_the_file_properly(tmp_path, name):
    path = f"{tmp_path}/{name}"

    def interrupted():
        with VideoWriter(path, height=SIZE, width=SIZE) as writer:
            for frame in clip(20):
                writer.write(frame)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(read_back(path)) == 20


def test_an_interrupt_during_the_write_itself_is_not_swallowed(tmp_path, monkeypatch):
    """The muxer calls our file from C, which would drop the exception."""
    path = tmp_path / "video.mp4"
    writer = VideoWriter(path, height=SIZE, width=SIZE)
    for frame in clip(30):
        writer.write(frame)

    class Interrupted:
        def __init__(self, raw):
            self._raw = raw
            self.tell, self.truncate, self.close = raw.tell, raw.truncate, raw.close

        def write(self, data):
            raise KeyboardInterrupt

    tap = writer._sink._tap
    monkeypatch.setattr(tap, "_raw", Interrupted(tap._raw))

    def go_on():
        for frame in clip(30):
            writer.write(frame)

    with pytest.raises(KeyboardInterrupt):
        go_on()
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert len(_readable(path)) >= 24


def test_bad_outputs_are_refused_at_once(tmp_path):
    def refused(path, match):
        with pytest.raises(OutputError, match=match) as caught:
            VideoWriter(path, height=8, width=8)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "video.avi", r"must end in .mp4, .webm, .gif or, .* but is '.*video.avi'")
    refused(
        tmp_path / "no" / "video.mp4", "cannot write '.*video.mp4': No such file or directory; choose another"
    )
    refused(f"{tmp_path}/no/frames/", "No such file or directory")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder.mp4" / "000000.png").touch()
    refused(tmp_path / "folder.mp4", "it already holds PNG files; choose another place")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "File exists")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may write anywhere"
)
def test_an_unwritable_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        VideoWriter(tmp_path / "video.mp4", height=8, width=8)


def test_bad_frames_and_settings_are_refused_and_lose_nothing(tmp_path):
    path = tmp_path / "video.mp4"
    with VideoWriter(path, height=SIZE, width=SIZE) as writer:
        writer.write(clip(1)[0])
        with pytest.raises(ShapeError, match=r"expected uint8 \[32, 32, 3\] but got float32 \[32, 32, 3\]"):
            writer.write(np.zeros((SIZE, SIZE, 3), np.float32))
        with pytest.raises(ShapeError, match=r"but got uint8 \[16, 32, 3\]"):
            writer.write(np.zeros((16, SIZE, 3), np.uint8))
        writer.write(clip(2)[1])
    assert len(read_video(path)) == 2
    with pytest.raises(OutputError, match="is closed after 2 frames"):
        writer.write(clip(1)[0])
    for options in ({"height": 0}, {"upscale": 0}, {"fps": 0}, {"fps": float("nan")}):
        with pytest.raises(ConfigError, match=r"expected a (whole|finite) number|fps must be above"):
            VideoWriter(path, **{"height": 8, "width": 8, **options})
    assert len(read_video(path)) == 2  # refused before the file was opened


def test_png_names_are_in_order_and_nothing_else_is_left(tmp_path):
    write(tmp_path / "frames", clip(3))
    assert sorted(os.listdir(tmp_path / "frames")) == ["000000.png", "000001.png", "000002.png"]


# ---- reading ---------------------------------------------------------------------------------------


def test_first_and_last_frames(tmp_path):
    frames = clip(10)
    write(tmp_path / "video.gif", frames)
    assert np.array_equal(read_video(tmp_path / "video.gif", 4), frames[:4])
    assert np.array_equal(read_video(tmp_path / "video.gif", 4, tail=True), frames[-4:])
    with pytest.raises(InputError, match="must hold at least 11 readable frames but holds 10"):
        read_video(tmp_path / "video.gif", 11)


def test_resizing_keeps_the_aspect_by_cutting_the_sides(tmp_path):
    wide = np.zeros((1, 20, 60, 3), np.uint8)
    wide[:, :, 20:40] = 255  # the middle square
    write(tmp_path / "frames/", wide)
    path = tmp_path / "frames" / "000000.png"
    assert read_image(path, (10, 10)).shape == (1, 10, 10, 3)
    assert read_image(path, (10, 10)).min() >= 254
    assert read_image(path, (20, 60)).mean() == pytest.approx(85, abs=1)
    assert read_image(path, (40, 20)).min() >= 254
    assert read_image(path).shape == (1, 20, 60, 3)


def test_a_damaged_end_matters_only_if_it_is_needed(tmp_path):
    path = tmp_path / "video.mp4"
    random = np.random.default_rng(0).integers(0, 255, (40, SIZE, SIZE, 3), np.uint8)
    writer = VideoWriter(path, height=SIZE, width=SIZE)
    for frame in random:
        writer.write(frame)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(path.read_bytes()[: os.path.getsize(path) * 6 // 10])
    assert len(read_video(damaged, 4)) == 4
    with pytest.raises(InputError, match=r"readable frames but holds|cannot read"):
        read_video(damaged, 40)
    with pytest.raises(InputError, match="cannot read"):
        read_video(damaged, 4, tail=True)
    writer.close()


def test_unreadable_inputs_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "text.mp4").write_text("no video at all " * 100)
    (tmp_path / "empty.png").touch()
    for name in ("text.mp4", "empty.png", "missing.mp4", ""):
        for read in (read_video, read_image):
            with pytest.raises(InputError, match="cannot read") as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"\[frames\] expected a whole number from 1 to"):
        read_video(tmp_path / "text.mp4", 0)
    with pytest.raises(ConfigError, match="size must be at least 1 x 1 but is 0 x 4"):
        read_image(tmp_path / "text.mp4", (0, 4))
