"""Folders of data: manifests, and the files that they describe."""

from pyengine.bundle.bundle import Bundle

__all__ = ["Bundle"]
