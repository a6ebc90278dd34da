"""Names that libraries changed in time, for tensors that are the same."""

from __future__ import annotations

import re

TEXT_MODEL = "text_model."  # which transformers 5 leaves out
_EARLY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def early_autoencoder(name: str) -> str:
    """Of diffusers before 0.17, whose attention had other names."""
    return re.sub(
        r"\.attentions\.0\.(query|key|value|proj_attn)\.", lambda f: f".attentions.0.{_EARLY[f[1]]}.", name
    )


def text_model(name: str) -> str:
    """A tensor of `CLIPTextModel`, as both lines of transformers agree to name it."""
    return name.removeprefix(TEXT_MODEL)
