"""Frames in and out of files."""
