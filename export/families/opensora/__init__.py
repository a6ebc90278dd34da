"""Open-Sora v1.2, the model behind PA-VDM's released result: STDiT3, its two-stage video autoencoder and its text encoder."""

from .checkpoint import load_autoencoder, load_stdit3
from .stdit3 import STDiT3
from .vae import VideoAutoencoder

__all__ = ["STDiT3", "VideoAutoencoder", "load_autoencoder", "load_stdit3"]
