"""The original's numbers through portable ONNX and CPU plans: a UNet of either kind, exported with its weights as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from lvdm_golden import CASES, MANIFEST, error, model, tensors

from pyengine.build.builder import build
from pyengine.bundle.variant import Variant
from pyengine.export.families.lvdm.export import Modules, clip_method, export_bundle
from pyengine.runtime.executor import Executor
from pyengine.runtime.program import Program

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["unet_a_pred_cond", "unet_t2v_base"])
@torch.no_grad()
def test_a_bundle_predicts_what_the_original_predicts(name: str, tmp_path: Path) -> None:
    case, given = CASES[name], tensors(name)
    unet = model(case["spec"]["model"])
    latents = given["in_x"].clone()
    if "in_cond" in given:
        latents[:, :, case["spec"]["cond_frames"]] = given["in_cond"]
    rows, _, frames, height, width = latents.shape
    betas = tuple(MANIFEST["schedules"]["A"][key] for key in ("linear_start", "linear_end"))
    modules = Modules(
        {"prediction": unet}, model("ae_tiny"), {"prediction": frames}, (height, width), 1.0, 0.0, betas, 8.0
    )  # type: ignore[arg-type]
    if unet.context_dim is not None:
        _fit_context(given, unet.context_dim)
    bundle = export_bundle(
        modules, tmp_path / "bundle", "golden", clip_method(modules, 1.0), only=("prediction",)
    )
    # Its rows are streams of one branch.
    inputs = {
        "latents": latents.transpose(1, 2),
        "embedding": unet.project(unet.embed(given["in_t"], given.get("in_s")))[None],
    }
    if "in_mask" in given:
        inputs["mask"] = given["in_mask"][None, :, 0, :, 0, 0]
    if unet.context_dim is not None:
        for i, text in enumerate(unet.text_keys(given["in_context"])):
            inputs[f"text_{'value' if i % 2 else 'key'}.{i // 2}"] = text[None]
    wanted = given["out_eps"].transpose(1, 2)[None]
    feeds = {key: value.contiguous().numpy() for key, value in inputs.items()}
    session = ort.InferenceSession(bundle.path(bundle.component("prediction").portable))
    assert error(session.run(["prediction"], feeds)[0], wanted) < case["tolerance"]
    variant = Variant.of("prediction", branches=1, streams=rows)
    for choice in ("cut", "inline"):
        plan = build(
            bundle, variants=[variant], precision="fp32", choice=choice, cache_dir=tmp_path / "plans"
        )
        executor = Executor(Program(plan))
        for key, value in feeds.items():
            executor.input(variant, key)[...] = value
        executor.run(variant)
        got = np.array(executor.output(variant, "prediction"))
        executor.close()
        assert error(got, wanted) < case["tolerance"], choice


def _fit_context(given: dict[str, torch.Tensor], width: int) -> None:
    """Bundles take 77 tokens. Repeating every token equally often changes no attention: 7 tokens 11 times."""
    context = given["in_context"]
    assert context.shape[2] == width
    assert 77 % context.shape[1] == 0
    given["in_context"] = context.repeat(1, 77 // context.shape[1], 1)
