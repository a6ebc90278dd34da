"""What every prompt must be, whatever reads it."""

from __future__ import annotations

from typing import Any

from pyengine.errors import PromptError

__all__ = ["check_text"]

LONGEST = 10_000  # characters: far beyond what any text encoder takes, and short enough for every tokenizer


def check_text(prompt: Any, example: str) -> None:
    """Raises PromptError unless it is text that says something and can be encoded."""
    if not isinstance(prompt, str):
        raise PromptError(f'expected a prompt as text, such as "{example}", but got {type(prompt).__name__}')
    if not prompt.strip():
        raise PromptError(f'expected a prompt such as "{example}" but got an empty one')
    if len(prompt) > LONGEST:
        raise PromptError(
            f"expected a prompt of at most {LONGEST} characters but got {len(prompt)}; shorten it"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"expected a prompt as text but it holds a byte that is no character, at position {error.start}; write it again"
        ) from error
