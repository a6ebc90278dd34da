"""Prompts for models that read T5 or UMT5: caption cleaning, tokens, and the states of T5's encoder, run by `transformers`.

T5-v1.1-XXL is four times the size of the denoiser and is needed once per prompt, so it is loaded for that and let go: no stream pays for
it. The bundle's `text_encoder` takes it from there.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.bundle.manifest import Cleaning
from pyengine.errors import BackendUnavailable, BundleError, PromptError
from pyengine.text.captions import cleaned_prompt
from pyengine.text.checks import check_text

__all__ = ["MODELS", "T5Prompts"]

SOURCE_VARIABLE = "PYENGINE_TEXT_ENCODER"
# The class of transformers by a manifest's kind of text.
MODELS = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
REMEMBERED = 16  # prompts whose states are kept: 5 MB each for T5-XXL


class T5Prompts:
    """`source` is a folder or a name that transformers finds; PYENGINE_TEXT_ENCODER replaces it on another machine."""

    def __init__(
        self,
        source: str,
        max_tokens: int,
        dtype: str = "float32",
        words: int | None = None,
        cleaning: Cleaning | None = None,
        model: str = MODELS["t5"],
    ) -> None:
        """max_tokens: the length that T5 is run at; words: how many of them the text encoder takes (default all); cleaning: of prompts;
        model: its class in transformers.
        """
        self.source = os.environ.get(SOURCE_VARIABLE) or source
        self.max_tokens, self.dtype, self.words = max_tokens, dtype, words or max_tokens
        self.cleaning, self.model = cleaning, model
        self._tokenizer: Any = None
        self._states: OrderedDict[str, dict[str, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, prompt: str) -> np.ndarray:
        """Token ids, padded. int64 [max_tokens]. Raises PromptError, BackendUnavailable, BundleError."""
        return self._tokens(prompt)[0]

    def inputs(self, prompt: str) -> dict[str, np.ndarray]:
        """What the text encoder takes: states [words, channels] float32 and words [words] int64."""
        with self._lock:
            ids, mask = self._tokens(prompt)
            if prompt not in self._states:
                states = self._run(ids, mask)
                self._states[prompt] = {"states": states[: self.words], "words": mask[: self.words]}
                while len(self._states) > REMEMBERED:
                    self._states.popitem(last=False)
            return dict(self._states[prompt])

    def _tokens(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        check_text(prompt, "waves roll over a sandy beach")
        if self._tokenizer is None:
            self._tokenizer = self._load("AutoTokenizer")
        found = self._tokenizer(
            cleaned_prompt(prompt, self.cleaning),
            max_length=self.max_tokens,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            add_special_tokens=True,
        )
        ids, mask = (np.asarray(found[name], np.int64) for name in ("input_ids", "attention_mask"))
        if mask.sum() > self.words:
            raise PromptError(
                f"expected a prompt of at most {self.words} tokens but got {mask.sum()}; shorten it, or export with more --words"
            )
        return ids, mask

    def _run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        import torch

        model = self._load(self.model, dtype=getattr(torch, self.dtype)).eval()
        with torch.inference_mode():
            out = model(input_ids=torch.from_numpy(ids)[None], attention_mask=torch.from_numpy(mask)[None])
            return np.asarray(out.last_hidden_state[0].float().numpy())

    def _place(self, kind: str) -> str:
        """`source`, or where a folder of diffusers keeps the tokenizer or the encoder."""
        part = Path(self.source) / ("tokenizer" if kind == "AutoTokenizer" else "text_encoder")
        return str(part) if part.is_dir() else self.source

    def _load(self, kind: str, **options: Any) -> Any:
        try:
            import google.protobuf  # noqa: F401 (reads spiece.model; without it transformers asks for tiktoken)
            import transformers

            return getattr(transformers, kind).from_pretrained(self._place(kind), **options)
        except ImportError as error:
            raise BackendUnavailable(
                f"encoding a prompt needs more packages ({error}): pip install 'pyengine-video[opensora]'"
            ) from error
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            name = self.model.removesuffix("EncoderModel")
            raise BundleError(
                f"expected the encoder of {name} at {self.source!r} but it cannot be read ({reason}); set {SOURCE_VARIABLE} to its folder"
            ) from error
