"""The original's numbers through portable ONNX and every CPU plan, fp32, to the stated tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import opensora_golden as golden
import pytest
import torch
from test_opensora_sampler import check_calls, pa_method, run
from torch import nn

from pyengine.build.builder import build
from pyengine.bundle.bundle import Bundle, write_manifest
from pyengine.bundle.variant import Variant
from pyengine.export.families.opensora.export import Options, Plan, components
from pyengine.export.families.opensora.streaming import StreamingSTDiT3, TextProjector
from pyengine.export.families.opensora.vae_components import ChunkDecoder, ChunkEncoder, FrameDecoder
from pyengine.export.graph import export_component
from pyengine.export.weights import WeightStore
from pyengine.runtime.open import load_program

pytestmark = pytest.mark.slow

Arrays = dict[str, np.ndarray]
Network = Callable[[Arrays], Arrays]


def exported(plans: dict[str, Plan], folder: Path) -> Bundle:
    folder.mkdir()
    store = WeightStore()
    parts = {
        name: export_component(
            plan.module,
            plan.inputs,
            folder=folder,
            name=name,
            store=store,
            outputs=plan.outputs,
            dynamic=plan.dynamic,
            working=plan.working,
        )
        for name, plan in plans.items()
    }
    store.write(folder)
    return write_manifest(folder, name="golden", family="opensora", version="1", components=parts)


def networks(bundle: Bundle, name: str, cache: Path, **sizes: int) -> Iterator[tuple[str, Network]]:
    """A component in portable ONNX, and in the plans of both backends and both forms."""
    component = bundle.component(name)
    session = ort.InferenceSession(bundle.path(component.portable))
    yield "portable", lambda feeds: dict(zip(component.outputs, session.run(None, feeds), strict=True))
    for backend in ("openvino", "onnxruntime"):
        for choice in ("cut", "inline") if component.cut else ("inline",):
            variant = Variant.of(name, **sizes)
            options = {"backend": backend, "precision": "fp32", "choice": choice, "cache_dir": cache}
            executor = load_program(build(bundle, variants=[variant], **options)).executor()

            def network(feeds: Arrays) -> Arrays:
                for key, array in feeds.items():
                    executor.input(variant, key)[...] = array  # noqa: B023 (called before the next one is made)
                executor.run(variant)  # noqa: B023
                return {key: executor.output(variant, key) for key in component.outputs}  # noqa: B023

            yield f"{backend} {choice}", network


def denoiser(case: Arrays, folder: Path) -> tuple[Bundle, Arrays]:
    """The golden STDiT3 at a case's size, and the text inputs of its prompt beside the null text."""
    model = golden.stdit3()
    latent = case["in_x" if "in_x" in case else "in_z_given"].shape[-2:]
    options = Options(size=(8 * latent[0], 8 * latent[1]))
    plan = components(model, golden.autoencoder(), options)["denoiser"]
    size = tuple(
        int(case[key].flat[0])
        for key in (("in_height", "in_width") if "in_height" in case else ("height", "width"))
    )
    fps = float(case["in_fps" if "in_fps" in case else "fps"].flat[0])
    plan = Plan(
        StreamingSTDiT3(model, latent, size, fps).eval(),
        plan.inputs,
        plan.outputs,
        plan.dynamic,
        {},
        plan.working,
    )
    words = torch.from_numpy(case["in_mask" if "in_mask" in case else "in_text_mask"][0])
    mask, *rest = TextProjector(model, len(words))(torch.from_numpy(case["in_y"][0, 0]), words)
    half = len(rest) // 2
    text = {"text_mask": mask} | {
        f"text_{kind}.{i}": rest[k * half + i] for k, kind in enumerate(("key", "value")) for i in range(half)
    }
    return exported({"denoiser": plan}, folder), {key: value[:, None].numpy() for key, value in text.items()}


def test_velocities_are_the_originals(tmp_path: Path) -> None:
    """Sample 0 has the prompt and sample 1 the null text: the two branches of a call, each with its own latents here."""
    case = golden.case("stdit3_perframe_odd")
    bundle, text = denoiser(case, tmp_path / "bundle")
    frames = case["in_x"].shape[2]
    sizes = {"branches": 2, "streams": 1, "frames": frames}
    for name, network in networks(bundle, "denoiser", tmp_path / "plans", **sizes):
        for branch in (0, 1):
            latents = np.ascontiguousarray(case["in_x"][branch].swapaxes(0, 1))[None]
            level = (case["in_timestep"][branch] / 1000).astype(np.float32)[None]
            index = np.arange(frames)[None]
            out = network({"latents": latents, "level": level, "frame_index": index, **text})
            got, wanted = out["prediction"][branch, 0].swapaxes(0, 1), case["out"][branch, :4]
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4, err_msg=f"{name}, sample {branch}")


def test_a_generated_video_is_the_originals(tmp_path: Path) -> None:
    """60 calls of the compiled network inside the window: what the original code generated with the same noise."""
    case = golden.case("pa_e2e")
    bundle, text = denoiser(case, tmp_path / "bundle")
    rows = int(case["window_len"].max())
    sizes = {"branches": 2, "streams": 1, "frames": rows}
    for name, network in networks(bundle, "denoiser", tmp_path / "plans", **sizes):

        def padded(latents: np.ndarray, level: np.ndarray) -> np.ndarray:
            count, missing = len(latents), rows - len(latents)
            feeds = {
                "latents": np.concatenate([latents, np.zeros((missing, *latents.shape[1:]), np.float32)]),
                "level": np.concatenate([level, np.zeros(missing, np.float32)]),
                "frame_index": np.concatenate([np.arange(count), np.full(missing, -1)]),
            }
            given = {key: array[None] for key, array in feeds.items()}
            return network({**given, **text})["prediction"][:, 0, :count]  # noqa: B023

        out, executor = run(case, pa_method(case), padded, case["in_z_given"][0], case["in_noise"][0])
        check_calls(case, executor)
        np.testing.assert_allclose(out, case["out"][0], rtol=0, atol=1e-4, err_msg=name)


def test_decoded_and_encoded_chunks_are_the_originals(tmp_path: Path) -> None:
    decoding, encoding, vae = (
        golden.case("vae_decode_17f"),
        golden.case("vae_encode_17f"),
        golden.autoencoder(),
    )

    def frames_first(values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values[0].swapaxes(0, 1))

    def one(module: nn.Module, name: str, value: np.ndarray, output: str) -> Plan:
        return Plan(module.eval(), {name: torch.from_numpy(value)}, [output], {}, {}, [])

    latents, planes = frames_first(decoding["in_z"]), frames_first(decoding["dbg_temporal_out"])
    given = frames_first(encoding["dbg_temporal_in"])
    plans = {
        "decoder": one(ChunkDecoder(vae), "latents", latents, "planes"),
        "frame_decoder": one(FrameDecoder(vae), "planes", planes[:1], "frames"),
        "encoder": one(ChunkEncoder(vae), "planes", given, "latents"),
    }
    bundle = exported(plans, tmp_path / "bundle")
    exact = {
        "decoder": (latents, "planes", planes),
        "encoder": (given, "latents", frames_first(encoding["out_mean"])),
        "frame_decoder": (
            planes[:1],
            "frames",
            (frames_first(decoding["out"])[:1].transpose(0, 2, 3, 1).clip(-1, 1) + 1) * 127.5,
        ),
    }
    for component, (value, output, wanted) in exact.items():
        (key,) = plans[component].inputs
        for name, network in networks(bundle, component, tmp_path / "plans"):
            bound = 0.51 if output == "frames" else 5e-5  # pixels are rounded to one of 255 levels
            got = network({key: value})[output].astype(np.float64)
            np.testing.assert_allclose(got, wanted, rtol=0, atol=bound, err_msg=f"{component}, {name}")
