"""load() and Engine: a bundle with its plan, from which streams are started."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from pyengine.arguments import check_guidance, check_length, check_seed
from pyengine.build.library import VariantLibrary
from pyengine.build.progress import Progress
from pyengine.build.variants import TEXT, codec_variants, denoiser_variants, stream_variants
from pyengine.bundle.bundle import Bundle
from pyengine.bundle.second import second_stage
from pyengine.bundle.variant import Variant
from pyengine.errors import (
    BundleError,
    ConfigError,
    InputError,
    PromptError,
    PyEngineError,
    StreamClosed,
)
from pyengine.methods import (
    check_presets,
    make_method,
    method_settings,
)
from pyengine.options import EngineOptions
from pyengine.plans.plan import Plan
from pyengine.processor import cores
from pyengine.runtime.program import Program
from pyengine.runtime.prompt_encoder import PromptEncoder
from pyengine.schedule.call import Schedule
from pyengine.settings import shown
from pyengine.streaming import snapshot
from pyengine.streaming.batch import Batch
from pyengine.streaming.enhanced import EnhancedStream, enhancer_of
from pyengine.streaming.second_stage import SecondStage
from pyengine.streaming.starts import chunks_for, start_of
from pyengine.streaming.stream import Stream
from pyengine.text.prompts import PromptTokenizer, prompts_of
from pyengine.text.t5 import T5Prompts

__all__ = ["Engine", "load"]

Started = TypeVar("Started", Stream, Batch)


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
    memory_budget: int | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Load a bundle, a folder or the name of one that ships, and find its plan or build it. Close it, or use it in a `with`.

    backend    "openvino" (CPU), "onnxruntime" (CPU, or CUDA with device="cuda") or "tensorrt" (CUDA)
    device     "auto" (the backend's own), "cpu" or "cuda"
    precision  "auto" (bf16 where the processor has it), "bf16" or "fp32"; on CUDA also "fp16"
    choice     "auto" times our kernels against the backend's own and keeps the faster; "cut" or "inline" forces one
    cache_dir  where plans are kept; default PYENGINE_CACHE or the user's cache folder
    threads    of the backend and of our kernels; default all cores
    refit      TensorRT engines that take the weights of another bundle with the same graphs without a rebuild
    ring       "auto", or "fp8": keys and values of the context in 8 bits, half the memory, an error of about 3 % per attention; CUDA
    memory_budget  bytes that compiled networks and the buffers of open streams may take together before networks that no stream uses
               are dropped, the least recently used first; default None, no limit. An estimate by their files and
               buffers: on a CPU OpenVINO was measured to hold `shapes` in 3.4 times the bytes of its engine files
    progress   called as progress(done, total, what) while a plan is built

    Raises BundleError, BackendUnavailable, ConfigError, PlanError.
    """
    options: dict[str, Any] = {
        "backend": backend,
        "device": device,
        "precision": precision,
        "choice": choice,
        "cache_dir": cache_dir,
        "threads": threads,
        "refit": refit,
        "ring": ring,
        "memory_budget": memory_budget,
    }
    return Engine(Bundle.load(bundle), EngineOptions(**options), progress)


class Engine:
    """Compiled engines and weights of one bundle. Safe to share between threads; streams carry all that changes."""

    def __init__(self, bundle: Bundle, options: EngineOptions, progress: Progress | None = None) -> None:
        if bundle.video is None or bundle.latent is None:
            raise BundleError(
                f"bundle '{bundle.name}' describes no video or latent, so it cannot be streamed; export it again"
            )
        self.bundle, self.options = bundle, options
        self._tokenizer = prompts_of(bundle) if bundle.text is not None else None  # None: it takes no prompt
        self._prompts: PromptEncoder | None = None
        if self._tokenizer is not None:
            outputs = bundle.component(TEXT.component).outputs
            self._prompts = PromptEncoder(
                TEXT,
                outputs,
                self._tokenizer.inputs,
                lambda: self._program((TEXT,)),
                lambda: self._library.has_room(),
            )
        relieve = None if self._prompts is None else self._prompts.release
        self._library = VariantLibrary(bundle, options, progress=progress, relieve=relieve)
        self._lock = threading.Lock()
        self._running: weakref.WeakSet[Stream | Batch] = weakref.WeakSet()
        self._closed = False
        self._second: SecondStage | None = None
        try:
            method = make_method(bundle.method, None, 0)
            check_presets(bundle.method)
        except ConfigError as error:
            raise BundleError(
                f"the manifest of bundle '{bundle.name}' names no method that this pyengine can run ({error}); "
                "export it again, or install the pyengine that made it"
            ) from error
        # So that the first stream starts at once.
        text = () if self._prompts is None else (TEXT,)
        self._program((*text, *stream_variants(bundle, method)))

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
        start     frames to continue, uint8 [frames, height, width, 3]; the last whole chunks that the context can hold are used (of
                  StreamingT2V also the very first frame), and a start shorter than a chunk is held still in front
        guidance  of classifier-free guidance; 1 = none, default the bundle's
        method    settings that replace the bundle's, such as {"steps": 8}; sizes that were not prepared are built first.
                  {"preset": "rflow"} takes one of the bundle's presets, and changes that
        device_frames  frames stay on the GPU, as DeviceArrays for DLPack and `__cuda_array_interface__`; device cuda only

        Raises PromptError, ConfigError, ShapeError.
        """
        settings, given = self.stream_settings(
            prompt,
            seed=seed,
            frames=frames,
            seconds=seconds,
            start=start,
            guidance=guidance,
            method=method,
            device_frames=device_frames,
        )
        kind = Stream if enhancer_of(settings["method"]) is None else EnhancedStream
        return self._started(kind(self, settings, given))

    def batch(
        self,
        max_streams: int = 8,
        *,
        guidance: float | None = None,
        method: Mapping[str, Any] | None = None,
    ) -> Batch:
        """Several streams whose calls run together, up to `max_streams`; `guidance` and `method` as of `stream`, the same for all.

        Sizes of 1, 2, 4, 8, ... streams are prepared here, so that joining and leaving compiles nothing, and each is tried: `Batch.exact`
        says whether streams of one call are independent to the bit. Raises ConfigError.
        """
        how = method_settings(self.bundle.method, method)
        if enhancer_of(how) is not None:
            raise ConfigError(
                "[method.enhance] expected false for a batch, whose streams have one stage, but got true; use engine.stream"
            )
        scale = check_guidance(how.guidance if guidance is None else guidance, len(self.bundle.branches))
        chunks = None if how.clip_latents is None else 1
        settings = {"guidance": scale, "method": asdict(how), "chunks": chunks}
        return self._started(Batch(self, settings, max_streams))

    def stream_settings(
        self,
        prompt: str,
        *,
        seed: int,
        frames: int | None,
        seconds: float | None,
        start: np.ndarray | None,
        guidance: float | None,
        method: Mapping[str, Any] | None,
        device_frames: bool,
    ) -> tuple[dict[str, Any], np.ndarray | Mapping[str, np.ndarray] | None]:
        """Checks the arguments of `stream`; returns the settings that a stream keeps, and of its start the latents, or by name what its
        calls read. Raises as `stream`.
        """
        self.check_prompt(prompt)
        length = check_length(frames, seconds, self.fps)
        how = method_settings(self.bundle.method, method)
        scale = check_guidance(how.guidance if guidance is None else guidance, len(self.bundle.branches))
        given = None if start is None else start_of(start, self.bundle, how, self._program)
        given_latents = len(given) if isinstance(given, np.ndarray) else 0
        video = self.bundle.video
        assert video is not None  # refused by __init__
        if length is None and how.clip_latents is not None:
            length = video.frames(how.clip_latents - given_latents)
        first = how.first_chunk_frames
        given_chunks = 1 if isinstance(given, Mapping) else 0
        if given_latents:
            given_chunks = 1 + (given_latents - first) // how.chunk_frames
        settings = {
            "prompt": prompt,
            "seed": check_seed(seed),
            "frames": length,
            "chunks": chunks_for(video, how, length, given_chunks),
            "given_chunks": given_chunks,
            "guidance": scale,
            "method": asdict(how),
            "device_frames": device_frames,
        }
        return settings, given

    def restored_settings(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a snapshot, checked like those of a new stream. Raises InputError."""
        try:
            settings, _ = self.stream_settings(
                saved["prompt"],
                seed=saved["seed"],
                frames=saved["frames"],
                seconds=None,
                start=None,
                guidance=saved["guidance"],
                method=saved["method"],
                device_frames=saved["device_frames"],
            )
            given = saved["given_chunks"]
            if type(given) is not int or not 0 <= given <= 4096:
                raise ConfigError(f"expected given_chunks as a whole number but got {shown(given)}")
            if type(saved["device_frames"]) is not bool:
                raise ConfigError(
                    f"expected device_frames as true or false but got {shown(saved['device_frames'])}"
                )
        except (KeyError, TypeError, ValueError, PyEngineError) as error:
            raise InputError(
                f"the settings in the snapshot cannot be used ({error}); make it again"
            ) from error
        how = method_settings(self.bundle.method, saved["method"])
        assert self.bundle.video is not None
        chunks = chunks_for(self.bundle.video, how, settings["frames"], given)
        settings |= {"given_chunks": given, "chunks": chunks}
        # Of a snapshot lists are those of JSON.
        odd = [name for name, value in json.loads(json.dumps(settings)).items() if saved.get(name) != value]
        if odd or set(saved) - set(settings):
            raise InputError(
                f"expected the settings that a stream saves but the snapshot has others ({', '.join(odd) or 'more of them'}); "
                "make it again"
            )
        return settings

    def resume(self, state: bytes | str | Path) -> Stream:
        """Continue a stream from `Stream.snapshot`, bit-identically on the same plan. Raises InputError."""
        data = snapshot.read_bytes(state)
        saved = self.restored_settings(snapshot.read_header(data)["settings"])
        kind = Stream if enhancer_of(saved["method"]) is None else EnhancedStream
        return self._started(kind.restore(self, data))

    def encode_prompt(self, prompt: str) -> dict[str, np.ndarray]:
        """What the denoiser reads of a prompt: the outputs of the text encoder, read-only, for every guidance branch."""
        return {} if self._prompts is None else self._prompts.features(prompt)

    def program(self, method: Schedule, guidance: float | None = None) -> Program:
        """The compiled networks that a method's streams run, built the first time. Raises StreamClosed after `close`."""
        return self._program(stream_variants(self.bundle, method, guidance))

    def batch_program(
        self, schedule: Schedule, guidance: float, streams: tuple[int, ...], threads: int | None = None
    ) -> Program:
        """The denoisers of a batch at every number of streams, for so many threads. They are cut at our ops wherever they can be: a
        compiled segment cannot find the rings of several streams.
        """
        variants = denoiser_variants(schedule, guidance, streams)
        ringed = any(component.ring for component in self.bundle.components.values())
        return self._library.program(variants, choice="cut" if ringed else None, threads=threads)

    def try_streams(self, alone: Program, together: Program) -> bool:
        """Whether each stream of a batch gives, to the bit, what it gives alone: tried the first time, then known from the plan."""
        self._library.try_streams(alone, together)
        return all(part.exact is not False for part in together.plan.parts.values())

    @property
    def cores(self) -> int:
        """The cores that its networks may use; on a GPU one thread enqueues."""
        (plan, *_) = self._library.plans
        return 1 if plan.device != "cpu" else self.options.threads or cores()

    def workers(self, streams: int) -> int:
        """How many parts a call of so many streams is divided into, which run at the same time."""
        return min(streams, self.cores)

    def second_stage(self) -> SecondStage:
        """The networks that enhance frames, loaded when a stream first wants them. Raises BundleError, StreamClosed."""
        with self._lock:
            if self._closed:
                raise StreamClosed("the engine is closed; load another with pyengine.load(...)")
            if self._second is None:
                words = None if self._tokenizer is None else self._tokenizer.inputs
                bundle, progress = second_stage(self.bundle), self._library.progress
                self._second = SecondStage(bundle, self.options, words, self.encode_prompt, progress)
            return self._second

    def codec_program(self, schedule: Schedule) -> Program:
        """The decoder's networks, of which each stream of a batch gets an executor."""
        return self._program(codec_variants(self.bundle, schedule))

    @property
    def plans(self) -> list[Plan]:
        """Every plan built or found so far, with the measured times of its choices."""
        return [*self._library.plans, *(self._second.plans if self._second else ())]

    @property
    def nbytes(self) -> int:
        """An estimate of the bytes that compiled networks (their files and weights) and the buffers of open streams take."""
        return self._library.nbytes + (self._second.nbytes if self._second else 0)

    def close(self) -> None:
        """Close its streams and batches and let go of every compiled network; what any is asked afterwards raises StreamClosed.

        May be called from any thread, and again. A stream that another thread is asking for a frame is closed after that frame.
        """
        with self._lock:
            self._closed = True
            running = list(self._running)
        for stream in running:
            stream.close()
        if self._prompts is not None:
            self._prompts.close()
        self._library.close()
        if self._second is not None:
            self._second.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _started(self, stream: Started) -> Started:
        """Notes a stream or a batch, so that `close` finds it."""
        with self._lock:
            closed = self._closed
            self._running.add(stream)
        if closed:
            stream.close()
            raise StreamClosed(
                "the engine was closed while the stream started; load another with pyengine.load(...)"
            )
        return stream

    def _program(self, variants: tuple[Variant, ...]) -> Program:
        return self._library.program(variants)
