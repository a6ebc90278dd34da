"""Plausible inputs of a component, from what its manifest says of them alone."""

from __future__ import annotations

import numpy as np

from pyengine.bundle.bundle import Component, TensorSpec

__all__ = ["example_inputs"]


def example_inputs(component: Component, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays by input name, at the sizes of the exported example; `working` tensors in float32.

    A full ring of earlier frames, a window behind it at rising levels, nothing masked, and row 1 of every table.
    """
    rng = np.random.default_rng(seed)
    slots = component.symbols.get("ring", 0)
    return {name: _example(name, spec, component, slots, rng) for name, spec in component.inputs.items()}


def _example(
    name: str, spec: TensorSpec, component: Component, slots: int, rng: np.random.Generator
) -> np.ndarray:
    shape = spec.resolve(component.symbols)
    dtype = np.dtype("float32" if spec.dtype == "working" else spec.dtype)
    if dtype.kind == "f" and not name.endswith("mask"):
        if name == "level":
            return np.broadcast_to(np.linspace(0, 1, shape[-1], dtype=dtype), shape).copy()
        return rng.standard_normal(shape).astype(dtype)
    if name == "ring_index":
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    if name == "frame_index":
        return np.broadcast_to(slots + np.arange(shape[-1], dtype=dtype), shape).copy()
    if dtype == np.uint8:
        return rng.integers(0, 256, shape, dtype)
    return np.ones(shape, dtype)
