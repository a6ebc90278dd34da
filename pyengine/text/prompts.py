"""From a prompt to word ids, with refusals that say what would work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pyengine.bundle.bundle import Bundle
from pyengine.errors import BundleError, PromptError
from pyengine.text.checks import check_text
from pyengine.text.t5 import MODELS, T5Prompts

__all__ = ["PromptTokenizer", "prompts_of"]

PAD_ID = 0
NAMED = 10  # unknown words in one sentence


def prompts_of(bundle: Bundle) -> PromptTokenizer | T5Prompts:
    """What turns prompts into inputs of the bundle's text encoder."""
    text = bundle.text
    assert text is not None
    if text.kind in MODELS:
        return T5Prompts(
            str(text.source), text.max_tokens, text.dtype, text.words, text.cleaning, MODELS[text.kind]
        )
    return PromptTokenizer(bundle.path(text.tokenizer), text.max_tokens)


class PromptTokenizer:
    """The bundle's tokenizer. `max_tokens` is the length that the text encoder takes."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(
                f"{path} is not a readable tokenizer ({error}); export the bundle again"
            ) from error
        self.max_tokens = max_tokens
        self._unknown = self._tokenizer.token_to_id("[unknown]")

    @property
    def words(self) -> list[str]:
        """Every word it knows, sorted, without the special tokens."""
        return sorted(word for word in self._tokenizer.get_vocab() if not word.startswith("["))

    def inputs(self, prompt: str) -> dict[str, np.ndarray]:
        """What the text encoder takes."""
        return {"ids": self.encode(prompt)}

    def encode(self, prompt: str) -> np.ndarray:
        """Ids of a prompt, padded. int64 [max_tokens]. Raises PromptError if it is empty, too long or has unknown words."""
        check_text(prompt, "a red circle bounces over a blue background")
        encoding = self._tokenizer.encode(prompt)
        # Special tokens, such as the padding, are no words.
        unknown = [
            prompt[start:end] if id == self._unknown else word
            for word, (start, end), id in zip(encoding.tokens, encoding.offsets, encoding.ids, strict=True)
            if id == self._unknown or word.startswith("[")
        ]
        if not encoding.ids:
            raise PromptError(f"expected a prompt with words but got {prompt.strip()[:40]!r}")
        if unknown:
            unknown = [word if len(word) <= 40 else f"{word[:40]}..." for word in unknown]
            raise PromptError(
                f"the prompt has words this model does not know: {', '.join(unknown[:NAMED])}; it knows {', '.join(self.words)}"
            )
        if len(encoding.ids) > self.max_tokens:
            raise PromptError(
                f"expected a prompt of at most {self.max_tokens} words but got {len(encoding.ids)}; shorten it"
            )
        return np.array(encoding.ids + [PAD_ID] * (self.max_tokens - len(encoding.ids)), np.int64)
