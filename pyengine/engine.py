"""load() and Engine: a bundle with its plan, from which streams are started."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.arguments import check_guidance, check_length, check_seed
from pyengine.build.builder import Progress, build
from pyengine.bundle.bundle import Bundle
from pyengine.errors import BundleError, ConfigError, InputError, PromptError, ShapeError
from pyengine.methods import Method, make_method
from pyengine.methods.variants import TEXT, stream_variants
from pyengine.plans.plan import Plan, Variant
from pyengine.runtime.codec import encode_chunk, encoder_variants
from pyengine.runtime.executor import Executor, Program
from pyengine.runtime.open import load_program
from pyengine.streaming.stream import Stream
from pyengine.text.prompts import PromptTokenizer, prompts_of
from pyengine.text.t5 import T5Prompts

__all__ = ["Engine", "load"]

NOT_OVERRIDABLE = ("name", "context")


def load(
    bundle: str | Path = "shapes",
    *,
    backend: str = "openvino",
    device: str = "auto",
    precision: str = "auto",
    choice: str = "auto",
    cache_dir: str | Path | None = None,
    threads: int | None = None,
    refit: bool = False,
    ring: str = "auto",
    progress: Progress | None = None,
) -> Engine:
    """Load a bundle, a folder or the name of one that ships, and find its plan or build it.

    backend    "openvino" (CPU), "onnxruntime" (CPU, or CUDA with device="cuda") or "tensorrt" (CUDA)
    device     "auto" (the backend's own), "cpu" or "cuda"
    precision  "auto" (bf16 where the processor has it), "bf16" or "fp32"; on CUDA also "fp16"
    choice     "auto" times our kernels against the backend's own and keeps the faster; "cut" or "inline" forces one
    cache_dir  where plans are kept; default PYENGINE_CACHE or the user's cache folder
    threads    of the backend and of our kernels; default all cores
    refit      TensorRT engines that take the weights of another bundle with the same graphs without a rebuild
    ring       "auto", or "fp8": keys and values of the context in 8 bits, half the memory, an error of about 3 % per attention; CUDA
    progress   called as progress(done, total, what) while a plan is built

    Raises BundleError, BackendUnavailable, ConfigError, PlanError.
    """
    return Engine(
        Bundle.load(bundle),
        {
            "backend": backend,
            "device": device,
            "precision": precision,
            "choice": choice,
            "cache_dir": cache_dir,
            "threads": threads,
            "refit": refit,
            "ring": ring,
            "progress": progress,
        },
    )


class Engine:
    """Compiled engines and weights of one bundle. Safe to share between threads; streams carry all that changes."""

    def __init__(self, bundle: Bundle, options: dict[str, Any]) -> None:
        if bundle.video is None or bundle.latent is None:
            raise BundleError(
                f"bundle '{bundle.name}' describes no video or latent, so it cannot be streamed; export it again"
            )
        self.bundle = bundle
        self._tokenizer = prompts_of(bundle) if bundle.text is not None else None  # None: it takes no prompt
        self._options = options
        self._lock = threading.Lock()
        self._programs: dict[tuple[Variant, ...], Program] = {}
        self._text_executor: Executor | None = None
        self.program(make_method(bundle.method, None, 0))  # so that the first stream starts at once

    @property
    def tokenizer(self) -> PromptTokenizer | T5Prompts:
        """The bundle's tokenizer. Raises PromptError where the model takes no prompt."""
        if self._tokenizer is None:
            raise PromptError(f"the model '{self.bundle.name}' takes no prompt; leave it out")
        return self._tokenizer

    def check_prompt(self, prompt: str) -> None:
        """Raises PromptError for a prompt that this model cannot follow."""
        # A model without text takes the empty prompt alone.
        if self._tokenizer is not None or not isinstance(prompt, str) or prompt:
            self.tokenizer.encode(prompt)

    @property
    def fps(self) -> float:
        """Frames per second of the videos it makes."""
        assert self.bundle.video is not None
        return self.bundle.video.fps

    def stream(
        self,
        prompt: str = "",
        *,
        seed: int = 0,
        frames: int | None = None,
        seconds: float | None = None,
        start: np.ndarray | None = None,
        guidance: float | None = None,
        method: Mapping[str, Any] | None = None,
        device_frames: bool = False,
    ) -> Stream:
        """Start a video, endless unless `frames` or `seconds` is given.

        prompt    words that the bundle's tokenizer knows; none for a model without text
        seed      the same seed, prompt and plan give the same video
        start     frames to continue, uint8 [frames, height, width, 3]; the last whole chunks that the context can hold are used,
                  and a start shorter than a chunk is held still in front
        guidance  of classifier-free guidance; 1 = none, default the bundle's
        method    settings that replace the bundle's, such as {"steps": 8}; sizes that were not prepared are built first.
                  {"preset": "rflow"} takes one of the bundle's presets, and changes that
        device_frames  frames stay on the card, as DeviceArrays for DLPack and `__cuda_array_interface__`; device cuda only

        Raises PromptError, ConfigError, ShapeError.
        """
        self.check_prompt(prompt)
        length = check_length(frames, seconds, self.fps)
        merged = self._settings(method)
        if merged["name"] == "clip" and length is None:
            length = merged["clip_frames"] * self.bundle.video.frames_per_latent  # type: ignore[union-attr]
        given = self._encode_start(start, merged) if start is not None else None
        chunk_frames = merged["chunk_frames"]
        video_frames = self.bundle.video.frames(chunk_frames)  # type: ignore[union-attr]
        settings = {
            "prompt": prompt,
            "seed": check_seed(seed),
            "frames": length,
            "chunks": None if length is None else -(-length // video_frames),
            "given_chunks": 0 if given is None else len(given) // chunk_frames,
            "guidance": check_guidance(merged["guidance"] if guidance is None else guidance),
            "method": merged,
            "device_frames": device_frames,
        }
        return Stream(self, settings, given)

    def resume(self, state: bytes | str | Path) -> Stream:
        """Continue a stream from `Stream.snapshot`, bit-identically on the same plan. Raises InputError."""
        if isinstance(state, bytes):
            return Stream.restore(self, state)
        try:
            data = Path(state).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the snapshot '{state}': {error.strerror}") from error
        return Stream.restore(self, data)

    def encode_prompt(self, prompt: str) -> dict[str, np.ndarray]:
        """What the denoiser reads of a prompt: the outputs of the text encoder, for every guidance branch."""
        if self._tokenizer is None:
            return {}
        inputs = self._tokenizer.inputs(prompt)
        with self._lock:
            if self._text_executor is None:
                self._text_executor = self._program((TEXT,)).executor()
            for name, value in inputs.items():
                self._text_executor.input(TEXT, name)[...] = value
            self._text_executor.run(TEXT)
            names = self.bundle.component("text_encoder").outputs
            return {name: self._text_executor.output(TEXT, name).copy() for name in names}

    def program(self, method: Method, guidance: float | None = None) -> Program:
        """The compiled denoiser and decoder that a method's windows need, built the first time."""
        with self._lock:
            if self._tokenizer is not None:
                self._program((TEXT,))
            return self._program(stream_variants(self.bundle, method, guidance))

    @property
    def plans(self) -> list[Plan]:
        """Every plan built or found so far, with the measured times of its choices."""
        return [program.plan for program in self._programs.values()]

    def close(self) -> None:
        """Let go of every compiled engine. Streams that run keep theirs."""
        with self._lock:
            if self._text_executor is not None:
                self._text_executor.close()
                self._text_executor = None
            self._programs.clear()

    def _program(self, variants: tuple[Variant, ...]) -> Program:
        if variants not in self._programs:
            self._programs[variants] = load_program(build(self.bundle, variants=variants, **self._options))
        return self._programs[variants]

    def _settings(self, override: Mapping[str, Any] | None) -> dict[str, Any]:
        """The bundle's method with the caller's changes. Another method's name brings its own settings along."""
        own = dict(self.bundle.method)
        changes = dict(override or {})
        presets = own.pop("presets", {})
        if "preset" in changes:
            name = changes.pop("preset")
            if name not in presets:
                raise ConfigError(
                    f"expected a preset out of {', '.join(sorted(presets)) or 'none'} but got {name!r}; see `pyengine info`"
                )
            own |= presets[name]
        if changes.get("name", own["name"]) == own["name"]:
            unknown = set(changes) - set(own) - {"row_counts"}
            if unknown:
                raise ConfigError(
                    f"expected method settings out of {', '.join(sorted(own))} but got {', '.join(sorted(unknown))}"
                )
        return own | changes

    def _encode_start(self, start: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        """The last whole chunks of a start, as many as the context holds, as latents [frames, channels, height, width]."""
        video = self.bundle.video
        assert video is not None
        if "context" not in settings:
            raise ShapeError("[start] expected no start frames: this model makes videos from noise alone")
        start = np.asarray(start)
        if (
            start.ndim != 4
            or start.shape[1:] != (video.height, video.width, 3)
            or start.dtype != np.uint8
            or not len(start)
        ):
            raise ShapeError(
                f"[start] expected uint8 [frames, {video.height}, {video.width}, 3] but got {start.dtype} {list(start.shape)}"
            )
        size = video.frames(settings["chunk_frames"])
        if len(start) < size:
            start = np.concatenate([np.repeat(start[:1], size - len(start), 0), start])
        context = settings["context"]
        room = max(1, (context["sink_frames"] + context["recent_frames"]) // settings["chunk_frames"])
        chunks = min(len(start) // size, room)
        start = start[len(start) - chunks * size :]
        with self._lock:
            executor = self._program(encoder_variants(self.bundle, settings["chunk_frames"])).executor()
        try:
            parts = (start[index * size : (index + 1) * size] for index in range(chunks))
            return np.concatenate(
                [encode_chunk(executor, self.bundle, part, settings["chunk_frames"]) for part in parts]
            )
        finally:
            executor.close()
