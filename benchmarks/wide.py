"""A larger denoiser of the `shapes` family with random weights: `python benchmarks/wide.py [--json FILE]`.

Width 1152 (16 heads of 72), 4 spatial and 4 temporal attention blocks, 105 tokens per frame, a window of 30
active frames before a ring of 5 clean ones, both guidance branches. The bundle is exported, partitioned and
built like any other. Its plan is compared with the bf16 matrix rate of this machine, measured in the same
rounds on the same shapes, with PyTorch, and with an INT8 plan.

  dense TFLOP/s  products in the segments (linear layers, spatial and text attention) over their time
  matrix rate    the linear layers alone, one after another: the better of PyTorch and OpenVINO
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from torch import Tensor, nn
from torch.nn import functional as F

from pyengine.bench_probe import cores, machine, peak_memory_mb
from pyengine.build import build
from pyengine.bundle import Bundle, write_manifest
from pyengine.executor import Executor, Program
from pyengine.export.families.shapes.denoiser import Denoiser, DenoiserConfig
from pyengine.export.families.shapes.text_encoder import TextFeatures
from pyengine.export.graph import export_component, round_weights
from pyengine.export.parity import decode, encode
from pyengine.export.peers.ring_denoiser import RingDenoiser, angles, visible
from pyengine.export.peers.stream import COMPILERS
from pyengine.export.quantise import quantise
from pyengine.export.weights import WeightStore
from pyengine.plan import Variant

ROWS, COLUMNS = 7, 15  # tokens of a frame
BRANCHES, WORDS, RING = 2, 20, 5
CALIBRATION_FRAMES, CALIBRATION_CALLS = 6, 3
GOAL_MATRIX, GOAL_INT8, GOAL_MEMORY_MB = 0.9, 1.5, 12000
PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class WideConfig(DenoiserConfig):
    """Frames of 7 x 15 tokens."""

    width: int = 1152
    depth: int = 4
    heads: int = 16
    mlp_ratio: int = 4

    @property
    def tokens_per_frame(self) -> int:
        return ROWS * COLUMNS

    @property
    def latent(self) -> tuple[int, int, int]:
        return self.latent_channels, ROWS * self.patch, COLUMNS * self.patch


class WideDenoiser(Denoiser):
    """The denoiser for oblong frames."""

    def patchify(self, latents: Tensor) -> Tensor:
        p = self.config.patch
        split = latents.unflatten(-1, (COLUMNS, p)).unflatten(-3, (ROWS, p))
        return split.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)

    def unpatchify(self, values: Tensor) -> Tensor:
        p, c = self.config.patch, self.config.latent_channels
        split = values.unflatten(-1, (c, p, p)).unflatten(2, (ROWS, COLUMNS))
        return split.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)


@dataclass
class Case:
    """The network and how it is called."""

    config: WideConfig
    frames: int
    module: WideDenoiser
    text: TextFeatures

    @classmethod
    def random(cls, config: WideConfig, frames: int) -> Case:
        torch.manual_seed(0)
        module = WideDenoiser(config).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any():  # gates and heads start at zero: give every path a share
                    nn.init.normal_(parameter, std=0.02)
        round_weights(module)
        shape = (config.depth, BRANCHES, config.heads, WORDS, config.head_size)
        mask = torch.zeros(BRANCHES, WORDS)
        mask[:, 12:] = -1e4
        return cls(
            config,
            frames,
            module,
            TextFeatures(torch.randn(shape), torch.randn(shape), mask, torch.randn(BRANCHES, config.width)),
        )

    @property
    def variant(self) -> Variant:
        return Variant.of("denoiser", frames=self.frames, ring=RING)

    def calls(self, frames: int, count: int) -> list[dict[str, np.ndarray]]:
        """Inputs of a little stream: in the first call the oldest frames are clean and enter the ring."""
        rng = np.random.default_rng(1)
        clean = min(RING, frames)
        calls = []
        for call in range(1 + count):
            level = np.linspace(1 / frames, 1, frames, dtype=np.float32)
            slots = np.full(frames, -1)
            if call == 0:
                level[:clean], slots[:clean] = 0, np.arange(clean)
            filled = call > 0
            calls.append(
                {
                    "latents": rng.standard_normal((frames, *self.config.latent), np.float32),
                    "level": level,
                    "frame_index": np.arange(frames) + (RING if filled else 0),
                    "ring_index": np.where(np.arange(RING) < clean, np.arange(RING), -1)
                    if filled
                    else np.full(RING, -1),
                    "append_slot": slots,
                    **{f"text_{name}": value.numpy() for name, value in self.text._asdict().items()},
                }
            )
        return calls

    def products(self) -> list[tuple[int, int, int]]:
        """The linear layers over all tokens of one call, as (rows, inputs, outputs)."""
        width, rows = self.config.width, BRANCHES * self.frames * self.config.tokens_per_frame
        hidden = self.config.mlp_ratio * width
        block = [
            (width, 3 * width),
            (width, width),
            (width, width),
            (width, width),
            (width, 3 * width),
            (width, width),
        ]
        return [(rows, *pair) for pair in (*block, (width, hidden), (hidden, width))] * self.config.depth

    def dense_flops(self) -> float:
        """Products in the segments: linear layers, modulation, attention within a frame and to the text."""
        config = self.config
        frames = BRANCHES * self.frames
        linear = sum(2.0 * m * k * n for m, k, n in self.products())
        modulation = 2.0 * frames * config.width * (9 + 2) * config.width
        keys = config.tokens_per_frame + WORDS
        return (
            linear + modulation + 4.0 * config.depth * frames * config.tokens_per_frame * keys * config.width
        )


def export_bundle(case: Case, folder: Path) -> Bundle:
    """The case as a bundle with one component."""
    folder.mkdir(parents=True, exist_ok=True)
    config, frames, ring = case.config, 3, 2
    names = [f"{kind}.{index}" for index in range(config.depth) for kind in ("key", "value")]
    cached = (BRANCHES, ring, config.tokens_per_frame, config.heads, config.head_size)
    inputs: dict[str, Any] = {
        "latents": torch.randn(frames, *config.latent),
        "level": torch.linspace(0.1, 1, frames),
        "frame_index": torch.arange(ring, ring + frames),
        "ring_index": torch.arange(ring),
        **{f"text_{name}": value for name, value in case.text._asdict().items()},
        "ring_key": [torch.randn(cached) for _ in range(config.depth)],
        "ring_value": [torch.randn(cached) for _ in range(config.depth)],
    }
    store = WeightStore()
    dynamic = {name: {0: "frames"} for name in ("latents", "level", "frame_index")}
    dynamic |= {"ring_index": {0: "ring"}, "ring_key": {1: "ring"}, "ring_value": {1: "ring"}}
    component = export_component(
        case.module,
        inputs,
        folder=folder,
        name="denoiser",
        store=store,
        outputs=["velocity", *names],
        dynamic=dynamic,
        ring={f"ring_{name}": name for name in names},
    )
    store.write(folder)
    return write_manifest(
        folder, name="wide", family="shapes", version="1", components={"denoiser": component}
    )


class PlanRunner:
    """A plan of the case on the inputs of its last call, behind a ring filled by the first."""

    def __init__(self, case: Case, bundle: Bundle, cache: Path, **options: Any) -> None:
        self.variant = case.variant
        plan = build(bundle, variants=[self.variant], cache_dir=cache, **options)
        self.part = plan.part(self.variant)
        self.executor = Executor(Program(plan))
        for call in case.calls(case.frames, 1):
            for name, array in call.items():
                target = self.executor.input(self.variant, name)
                target[...] = encode(array, target.dtype)
            self()

    def __call__(self) -> None:
        self.executor.run(self.variant)

    def velocity(self) -> np.ndarray:
        self()
        return decode(self.executor.output(self.variant, "velocity")).copy()


class TorchRunner:
    """The same calls in PyTorch bf16 with a ring."""

    def __init__(self, case: Case, module: WideDenoiser, compiled: bool) -> None:
        network = RingDenoiser(
            module, ring=RING, rows=case.frames, branches=BRANCHES, dtype=torch.bfloat16
        ).eval()
        text = TextFeatures(*(value.bfloat16() for value in case.text))
        forward = (
            torch.compile(network.forward, dynamic=False, options=COMPILERS["frozen"])
            if compiled
            else network.forward
        )
        for call in case.calls(case.frames, 1):
            frame, level = torch.from_numpy(call["frame_index"]), torch.from_numpy(call["level"])
            cosine, sine = angles(frame, case.config.head_size, case.config.rope_theta, torch.bfloat16)
            seen = visible(level, frame, frame, torch.from_numpy(call["ring_index"]))
            mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -1e9)
            inputs = (torch.from_numpy(call["latents"]).bfloat16(), level, cosine, sine, mask, text)
            forward(*inputs)
            slots = [int(slot) for slot in call["append_slot"] if slot >= 0]
            if slots:
                network.append(0, slots)
        self._run: Callable[[], Tensor] = lambda: forward(*inputs)

    def __call__(self) -> None:
        self._run()

    def velocity(self) -> np.ndarray:
        return self._run().float().numpy()


def torch_products(shapes: list[tuple[int, int, int]]) -> Callable[[], None]:
    """Linear layers of these shapes in PyTorch bf16, one after another."""
    pairs = [(torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()) for m, k, n in shapes]

    def run() -> None:
        for x, weight in pairs:
            F.linear(x, weight)

    return run


def openvino_products(shapes: list[tuple[int, int, int]]) -> Callable[[], None]:
    """The same in OpenVINO, each a compiled model of its own with constant weights."""
    core, requests = ov.Core(), []
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16",
        "ENABLE_CPU_PINNING": False,
    }
    for m, k, n in shapes:
        x = ops.parameter([m, k], ov.Type.bf16)
        weight = ops.constant(np.random.default_rng(0).standard_normal((k, n), np.float32))
        product = ops.matmul(ops.convert(x, "f32"), weight, False, False)
        model = ov.Model([ops.result(ops.convert(product, "bf16"))], [x], "product")
        request = core.compile_model(model, "CPU", options).create_infer_request()
        request.infer()
        requests.append(request)

    def run() -> None:
        for request in requests:
            request.infer()

    return run


def relative_error(value: np.ndarray, exact: np.ndarray) -> float:
    """Relative L2."""
    return float(
        np.linalg.norm((value - exact).ravel().astype(np.float64))
        / np.linalg.norm(exact.ravel().astype(np.float64))
    )


def measure(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one run, in turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def benchmark(config: WideConfig, frames: int, rounds: int, compiled: bool, int8: bool) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    torch.set_num_threads(cores())
    case = Case.random(config, frames)
    with tempfile.TemporaryDirectory(prefix="pyengine-wide-") as scratch:
        folder = Path(scratch)
        cache = folder / "plans"
        print("exporting", flush=True)
        bundle = export_bundle(case, folder / "bundle")
        print("building", flush=True)
        runners: dict[str, Any] = {
            "pyengine_bf16": PlanRunner(case, bundle, cache, precision="bf16", choice="auto")
        }
        exact = PlanRunner(case, bundle, cache, precision="fp32", choice="cut").velocity()
        if int8:
            print("quantising", flush=True)
            small = Variant.of("denoiser", frames=min(CALIBRATION_FRAMES, frames), ring=RING)
            calls = case.calls(small.symbols["frames"], CALIBRATION_CALLS)
            lean = quantise(bundle, "denoiser", small, calls, folder / "int8", cache_dir=cache)
            runners["pyengine_int8"] = PlanRunner(case, lean, cache, precision="bf16", choice="cut")
        print("PyTorch", flush=True)
        module = case.module  # becomes bf16, and is shared by both
        runners["torch_eager_bf16"] = TorchRunner(case, module, compiled=False)
        if compiled:
            runners["torch_compile_bf16"] = TorchRunner(case, module, compiled=True)
        shapes = case.products()[: len(case.products()) // config.depth]
        matrix = {"torch": torch_products(shapes), "openvino": openvino_products(shapes)}
        # Only the cut form separates dense algebra from attention over the ring.
        cut = runners["pyengine_bf16"]
        if cut.part.choice != "cut":
            cut = runners["pyengine_bf16_cut"] = PlanRunner(
                case, bundle, cache, precision="bf16", choice="cut"
            )
        before = cut.executor.seconds
        products = {f"matrix_{name}": run for name, run in matrix.items()}
        times = measure({**runners, **products}, rounds)
        after = cut.executor.seconds
        spent = {key: (after[key] - before[key]) / (rounds + 1) for key in after}
        errors = {name: relative_error(runner.velocity(), exact) for name, runner in runners.items()}
        part = runners["pyengine_bf16"].part
        return report(case, part, times, spent, errors, shapes)


def report(
    case: Case,
    part: Any,
    times: dict[str, list[float]],
    spent: dict[str, float],
    errors: dict[str, float],
    shapes: list[tuple[int, int, int]],
) -> dict[str, Any]:
    middle = {name: median(values) for name, values in times.items()}
    flops = sum(2.0 * m * k * n for m, k, n in shapes)
    rates = {
        name.removeprefix("matrix_"): flops / seconds / 1e12
        for name, seconds in middle.items()
        if name.startswith("matrix_")
    }
    runners = {name: seconds for name, seconds in middle.items() if not name.startswith("matrix_")}
    ours = runners["pyengine_bf16"]
    dense = case.dense_flops() / spent["segments"] / 1e12
    result: dict[str, Any] = {
        "machine": machine(),
        "width": case.config.width,
        "depth": case.config.depth,
        "frames": case.frames,
        "ring": RING,
        "choice": part.choice,
        "choice_ms": {name: value and round(value * 1e3, 1) for name, value in part.seconds.items()},
        "ms": {name: round(seconds * 1e3, 1) for name, seconds in runners.items()},
        "ms_spread": {
            name: [round(min(times[name]) * 1e3, 1), round(max(times[name]) * 1e3, 1)] for name in runners
        },
        "times_faster": {
            name: round(seconds / ours, 3) for name, seconds in runners.items() if name != "pyengine_bf16"
        },
        "segments_ms": round(spent["segments"] * 1e3, 1),
        "ops_ms": round(spent["ops"] * 1e3, 1),
        "dense_tflops": round(dense, 3),
        "matrix_tflops": {name: round(rate, 3) for name, rate in rates.items()},
        "dense_share_of_matrix_rate": round(dense / max(rates.values()), 3),
        "relative_error": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "peak_memory_mb": round(peak_memory_mb()),
        "goals": {
            "dense_share_of_matrix_rate": GOAL_MATRIX,
            "int8_times_faster_than_bf16": GOAL_INT8,
            "peak_memory_mb": GOAL_MEMORY_MB,
        },
    }
    if "pyengine_int8" in runners:
        result["int8_times_faster_than_bf16"] = round(ours / runners["pyengine_int8"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=30, help="active frames (default 30)")
    parser.add_argument(
        "--width", type=int, default=1152, help="smaller ones are for a quick look; heads stay 16"
    )
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--no-int8", action="store_true", help="leave out quantisation")
    options = parser.parse_args()
    config = replace(WideConfig(), width=options.width, depth=options.depth)
    result = benchmark(config, options.frames, options.rounds, not options.no_compile, not options.no_int8)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
