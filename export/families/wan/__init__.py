"""Causal Wan 2.1 (Self-Forcing, CausVid, Rolling Forcing, LongLive): transformer, autoencoder, text encoder.

    CausalWan(**config)          sizes by the original's names; forward(...) a whole clip, step(...) a few frames beside a cache
    VideoAutoencoder(**config)   encode(x), decode(z), and the same in chunks with explicit memory
    TextEncoder(**config)        the encoder of UMT5; forward(ids, mask)

Parameters keep the names of the released checkpoints. Specification and files: docs/wan.md.
"""

from __future__ import annotations

from .causal_wan import CausalWan
from .umt5 import TextEncoder
from .vae import VideoAutoencoder

__all__ = ["CausalWan", "TextEncoder", "VideoAutoencoder"]
