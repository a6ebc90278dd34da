"""Frames brought to another size with black bars."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pyengine.video.letterbox import content, letterboxed


def test_the_released_sizes() -> None:
    """256 x 256 to 720 x 720 by Pillow's default, 280 black columns on either side."""
    frame = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    got = letterboxed(frame, 720, 1280)[0]
    assert np.array_equal(got[:, 280:1000], np.asarray(Image.fromarray(frame[0]).resize((720, 720))))
    assert not got[:, :280].any()
    assert not got[:, 1000:].any()


def test_a_frame_of_the_size_stays_as_it_is() -> None:
    frames = np.random.default_rng(1).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    assert np.array_equal(letterboxed(frames, 8, 6), frames)


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((10, 10), (0, 40), (12, 52)),
        ((10, 20), (4, 36), (0, 64)),
        ((1, 100), (19, 20), (0, 64)),
        ((80, 64), (0, 40), (16, 48)),
    ],
)
def test_where_the_picture_lies(
    size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    assert content(size, (40, 64)) == (slice(*rows), slice(*columns))


@given(*[st.integers(1, 50)] * 4)
def test_a_picture_fills_one_side_and_is_in_the_middle(h: int, w: int, high: int, wide: int) -> None:
    rows, columns = content((h, w), (high, wide))
    assert (rows.stop - rows.start == high) or (columns.stop - columns.start == wide)
    for part, whole in ((rows, high), (columns, wide)):
        assert 0 <= part.start < part.stop <= whole
        assert abs(part.start - (whole - part.stop)) <= 1
