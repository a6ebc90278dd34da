"""INT8 segments by post-training quantisation of weights and activations, calibrated on real float32 calls.

    int8 = quantise(bundle, "denoiser", variant, calls, folder)      # a bundle like the given one
    plan = build(int8, variants=[variant], precision="bf16", choice="cut")

Our ops, the ring and what crosses between segments stay as they are; only the dense algebra inside the cut
segments changes, so the new bundle is built, cached and run like any other. Its segments are OpenVINO IR:
only the backend `openvino` reads them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.backends.base import Arrays, Engine
from pyengine.build.builder import build
from pyengine.bundle.bundle import MANIFEST, Bundle, Component, Step, write_manifest
from pyengine.bundle.variant import Variant
from pyengine.errors import BackendUnavailable, BundleError
from pyengine.runtime.executor import Executor
from pyengine.runtime.program import Program

Sample = dict[str, np.ndarray]


def quantise(
    bundle: Bundle,
    component: str,
    variant: Variant,
    calls: Sequence[Mapping[str, np.ndarray]],
    folder: Path,
    *,
    cache_dir: Path | None = None,
) -> Bundle:
    """Writes a bundle into `folder` whose `component` has INT8 segments in its cut form.

    variant  sizes of the calibration; a small window measures the same ranges in less time
    calls    inputs of the component by name, in the order of a stream. What a call appends to the ring stays
             there for the next

    Raises BundleError for a component without a cut form, BackendUnavailable without nncf.
    """
    target = bundle.component(component)
    if target.cut is None:
        raise BundleError(
            f"component '{component}' of bundle '{bundle.name}' has no cut segments to quantise"
        )
    samples = record(bundle, variant, calls, cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in bundle.files:
        shutil.copyfile(bundle.path(name), folder / name)
    steps = tuple(_quantised(bundle, step, samples, folder) for step in target.cut.steps)
    changed: Component = replace(target, cut=replace(target.cut, steps=steps))
    (folder / MANIFEST).unlink(missing_ok=True)
    return write_manifest(
        folder,
        name=f"{bundle.name}-int8",
        family=bundle.family,
        version=bundle.version,
        components={**bundle.components, component: changed},
        video=bundle.video,
        latent=bundle.latent,
        text=bundle.text,
        method=bundle.method,
    )


def record(
    bundle: Bundle, variant: Variant, calls: Sequence[Mapping[str, np.ndarray]], cache_dir: Path | None = None
) -> dict[str, list[Sample]]:
    """What every segment reads during these calls, by file name, from the float32 plan."""
    plan = build(bundle, variants=[variant], precision="fp32", choice="cut", cache_dir=cache_dir)
    files = [str(step.file) for step in plan.graph(variant).steps if step.kind == "segment"]
    samples: dict[str, list[Sample]] = {file: [] for file in files}
    plan.loaded[variant] = [
        _Recorder(engine, samples[file]) for engine, file in zip(plan.engines(variant), files, strict=True)
    ]
    executor = Executor(Program(plan))
    for call in calls:
        for name, array in call.items():
            executor.input(variant, name)[...] = array
        executor.run(variant)
    executor.close()
    return samples


class _Recorder:
    """An engine that keeps a copy of what it reads."""

    def __init__(self, engine: Engine, samples: list[Sample]) -> None:
        self._engine, self._samples = engine, samples

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], object]:
        run = self._engine.bind(inputs, outputs)

        def recorded() -> object:
            self._samples.append({name: array.copy() for name, array in inputs.items()})
            return run()

        return recorded


def _quantised(bundle: Bundle, step: Step, samples: Mapping[str, list[Sample]], folder: Path) -> Step:
    """The step with an INT8 file; ops, copies and what must stay float32 are returned as they are."""
    if step.kind != "segment" or step.precision == "fp32":
        return step
    nncf, ov = _libraries()
    model = ov.Core().read_model(bundle.path(str(step.file)))
    names = [port.get_names() for port in model.inputs]
    items = [
        {index: _pick(sample, aliases) for index, aliases in enumerate(names)}
        for sample in samples[str(step.file)]
    ]
    quantised = nncf.quantize(
        model,
        nncf.Dataset(items),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(items),
        ignored_scope=nncf.IgnoredScope(names=_selections(model)),
    )
    file = f"{Path(str(step.file)).stem}.int8.xml"
    ov.save_model(quantised, folder / file, compress_to_fp16=True)
    return replace(step, file=file)


def _selections(model: Any) -> list[str]:
    """Matrix products with a constant of zeros and ones: they sum or spread statistics, which eight bits would spoil for no gain."""
    names = []
    for op in model.get_ops():
        if op.get_type_name() != "MatMul":
            continue
        sources = [op.input_value(port).get_node() for port in (0, 1)]
        sources = [s.input_value(0).get_node() if s.get_type_name() == "Convert" else s for s in sources]
        constants = [s.get_data() for s in sources if s.get_type_name() == "Constant"]
        if any(np.isin(values, (0, 1)).all() for values in constants):
            names.append(op.get_friendly_name())
    return names


def _libraries() -> tuple[Any, Any]:
    try:
        import nncf
        import openvino as ov
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"quantising needs the package {error.name}: pip install nncf openvino"
        ) from error
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf, ov


def _pick(sample: Sample, aliases: set[str]) -> np.ndarray:
    """The array of a port, which may go by several names."""
    return next(sample[name] for name in aliases if name in sample)
