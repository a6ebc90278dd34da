"""Runs a component of a bundle once, on given inputs: its torch module, its portable ONNX, or a plan.

Inputs and outputs are numpy arrays by graph name, float32 where a plan has bf16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from pyengine.bundle.bundle import Bundle, Component, TensorSpec
from pyengine.bundle.variant import Variant
from pyengine.runtime.executor import APPEND_SLOT, Executor
from pyengine.runtime.program import Program

from .graph import Inputs

ROWS = "branches*streams"
Arrays = dict[str, np.ndarray]


def run_torch(module: nn.Module, inputs: Inputs, names: Sequence[str]) -> Arrays:
    """Outputs of a module by name, as numpy; bf16 as float32."""
    with torch.no_grad():
        outputs = module(**inputs)
    flat: list[Tensor] = []
    for output in (outputs,) if isinstance(outputs, Tensor) else outputs:
        flat += [output] if isinstance(output, Tensor) else output
    plain = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in flat)
    return {name: tensor.numpy() for name, tensor in zip(names, plain, strict=True)}


def run_portable(bundle: Bundle, component: Component, arrays: Arrays) -> Arrays:
    """Outputs of the portable ONNX in ONNX Runtime on the CPU."""
    session = ort.InferenceSession(bundle.path(component.portable), providers=["CPUExecutionProvider"])
    return dict(zip(component.outputs, session.run(list(component.outputs), arrays), strict=True))


def run_plan(program: Program, variant: Variant, component: Component, arrays: Arrays) -> Arrays:
    """Outputs of one run of a plan. Those that go to a ring or a state are read there; a ring holds as many as it has slots."""
    executor = Executor(program)
    state = executor.state()
    for name, array in arrays.items():
        if name in component.state:
            state[f"{component.name}/{name}"] = encode(array, state[f"{component.name}/{name}"].dtype)
        elif name not in component.ring:
            target = executor.input(variant, name)
            target[...] = encode(array, target.dtype)
    executor.load_state(state)
    slots = 0
    rings: list[Mapping[str, np.ndarray]] = []
    if component.ring:
        append = executor.input(variant, APPEND_SLOT)
        streams, frames = append.shape
        slots = min(frames, arrays[next(iter(component.ring))].shape[1])
        append[...] = -1
        append[:, :slots] = np.arange(slots)
        rings = [executor.rings if streams == 1 else executor.new_rings() for _ in range(streams)]
        for stream, ring in enumerate(rings):
            for name in component.ring:
                given = arrays[name].reshape(-1, streams, *arrays[name].shape[1:])[:, stream]
                ring[name][...] = encode(given, ring[name].dtype)
            if streams > 1:
                executor.attach(variant, stream, ring)
    executor.run(variant)
    state = executor.state()
    outputs: Arrays = {}
    for name in component.outputs:
        source = next(
            (key for key, target in {**component.state, **component.ring}.items() if target == name), None
        )
        if source is None:
            outputs[name] = decode(executor.output(variant, name)).copy()
        elif source in component.state:
            outputs[name] = decode(state[f"{component.name}/{source}"])
        elif slots:
            # [branches, streams, ...]
            kept = np.stack([decode(ring[source])[:, :slots] for ring in rings], 1)
            outputs[name] = kept.reshape(-1, *kept.shape[2:])
    executor.close()
    return outputs


def of_streams(arrays: Arrays, specs: Mapping[str, TensorSpec], count: int, streams: int) -> Arrays:
    """The part of the first so many of `count` streams."""
    if streams == count:
        return arrays
    found = {}
    for name, array in arrays.items():
        axis = specs[name].axis("streams")
        if axis is not None:
            found[name] = array.take(range(streams), axis)
        elif specs[name].axis(ROWS) == 0:
            kept = array.reshape(-1, count, *array.shape[1:])[:, :streams]
            found[name] = kept.reshape(-1, *array.shape[1:])
        else:
            found[name] = array
    return found


def sizes_of(component: Component, arrays: Arrays) -> dict[str, int]:
    """Sizes of a component\'s symbols that inputs of these shapes have."""
    pairs = (
        (dim, size)
        for name, spec in component.inputs.items()
        for dim, size in zip(spec.shape, arrays[name].shape, strict=True)
    )
    return {str(dim): size for dim, size in pairs if dim in component.symbols}


def flat(inputs: Inputs) -> Arrays:
    """A module's arguments as arrays by graph name: entry i of the list `name` is `name.i`."""
    arrays: Arrays = {}
    for key, value in inputs.items():
        listed = (
            [(key, value)]
            if isinstance(value, Tensor)
            else [(f"{key}.{i}", tensor) for i, tensor in enumerate(value)]
        )
        arrays |= {name: tensor.numpy() for name, tensor in listed}
    return arrays


def in_dtype(value: Tensor | Sequence[Tensor], dtype: torch.dtype) -> Tensor | list[Tensor]:
    """Floats in that dtype; other tensors as they are."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return [tensor.to(dtype) for tensor in value]


def encode(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 as bf16 bit patterns where uint16 is asked for, rounded to nearest even; others are cast."""
    if dtype != np.uint16:
        return array.astype(dtype)
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).bfloat16().view(torch.uint16).numpy()


def decode(array: np.ndarray) -> np.ndarray:
    """bf16 bit patterns as float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array
