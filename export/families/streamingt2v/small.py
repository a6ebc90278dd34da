"""The small StreamingT2V that ships as `shapes-streamingt2v`: its networks, over the latents of `shapes`, and its noise schedule.

The modules are those of the release at small widths. A frame here is a latent frame of `shapes`, which stands for four of the video; the
condition and the anchor are such latents too, where the release has RGB. The text is read by the word encoder of `shapes`, and one
network is both the first stage and, applied to what is there already, the enhancer: without features and without an anchor the
denoiser is a plain text-to-video model.
"""

from __future__ import annotations

from torch import Tensor, nn

from pyengine.schedule.samplers import Prediction

from ..shapes.autoencoder import LATENT_CHANNELS
from ..shapes.captions import MAX_TOKENS
from ..shapes.text_encoder import WordEncoder
from .appearance import ImageTokens
from .extractor import Extractor
from .image_encoder import VisionTransformer
from .modelscope import ModelScopeUNet, Widths

FRAMES, CONDITION_FRAMES = 16, 8
LATENT_SIZE = 8
TEXT_WIDTH, TEXT_LAYERS = 64, 1
EMBEDDING = 64
WIDTHS = Widths(
    channels=(32, 56),
    head_size=14,
    stem_heads=2,
    text_channels=TEXT_WIDTH,
    latent_channels=LATENT_CHANNELS,
    merger_head_size=8,
    groups=8,
    layers=1,
    hidden=2,
    convolutions=1,
    text_tokens=MAX_TOKENS,
    image_tokens=4,
    attends=(False, True),
    frames=FRAMES,
)
CONDITION_WIDTHS = (32,)
# Released: epsilon. A noise of which alpha bar is 0.001 can be named by a network that knows nothing of the picture below it.
PREDICTS: Prediction = "velocity"
# A quarter of the released number, since a row per timestep is what the bundle holds.
BETAS, TIMESTEPS = (0.0004, 0.076), 250


class LatentEncoder(nn.Module):
    """Latent frames [n, 8, 8, 8] -> embeddings [n, 64]: CLIP's image tower at small widths, without its resizing and its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = VisionTransformer(LATENT_SIZE, 2, 64, 1, 32, 2.0, EMBEDDING, LATENT_CHANNELS)

    def forward(self, latents: Tensor) -> Tensor:
        return self.visual(latents)


class SmallNetworks(nn.Module):
    """All that is trained, by the prefixes that the release's checkpoint has."""

    def __init__(self, widths: Widths = WIDTHS) -> None:
        super().__init__()
        self.text_encoder = WordEncoder(TEXT_WIDTH, TEXT_LAYERS)
        self.base_model = ModelScopeUNet(widths, appearance=True, merges=True)
        self.unet = Extractor(widths, CONDITION_WIDTHS, LATENT_CHANNELS)
        self.resampler = ImageTokens(EMBEDDING, 2 * EMBEDDING, widths.text_channels, widths.image_tokens)
        self.image_encoder = LatentEncoder()
