"""Frames in and out of files."""

from pyengine.video.reader import read_image, read_video
from pyengine.video.writer import VideoWriter

__all__ = ["VideoWriter", "read_image", "read_video"]
