"""CLIP's text side: the tower of `transformers`, and its tokenizer from a local folder, as a bundle holds it: one file of JSON that pads to
the length that the tower takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyengine.errors import BackendUnavailable


def clip_tokenizer(folder: str | Path, tokens: int, null: str = "") -> tuple[str, Tensor]:
    """The tokenizer as JSON, which pads to so many tokens with its own pad token, and the ids of `null`, the prompt of the null branch.

    Raises OSError, ValueError and ImportError as `transformers` does.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(null, padding="max_length", max_length=tokens, truncation=True)["input_ids"]
    rules = tokenizer.backend_tokenizer
    rules.no_truncation()  # a prompt that is too long is refused rather than cut
    rules.enable_padding(length=tokens, pad_id=tokenizer.pad_token_id, pad_token=str(tokenizer.pad_token))
    return str(rules.to_str()), torch.tensor(ids)


def text_tower(config: Mapping[str, Any]) -> nn.Module:
    """A CLIP text model of `transformers` without memory for its parameters. Raises BackendUnavailable."""
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError as error:
        raise BackendUnavailable(
            f"the text tower is CLIP's by transformers ({error}): pip install 'pyengine-video[lvdm]'"
        ) from error
    with torch.device("meta"):
        tower = CLIPTextModel(CLIPTextConfig(**config))
    for module in tower.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == "position_ids":  # the one that no checkpoint has
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
    return tower
