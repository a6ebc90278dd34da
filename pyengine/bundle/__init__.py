"""Folders of data: manifests, and the files that they describe."""
