"""CLIP's image tower as OpenCLIP has it (ViT-H/14, laion2b_s32b_b79k): what the anchor frame looks like, in one vector.

Names as in the checkpoint under `image_encoder.`; the remains of the text tower that the release carries along there are not built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class SelfAttention(nn.Module):
    """Full attention over all tokens; the three projections are one matrix, with a bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [n, heads, tokens, head size]
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class ResidualAttention(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = SelfAttention(width, heads), Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttention(width, heads, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    """Prepared images [n, channels, size, size] -> embeddings [n, out]: the projection of the class token."""

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        width: int = 1280,
        layers: int = 32,
        head_width: int = 80,
        mlp_ratio: float = 4.0,
        embed_dim: int = 1024,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, patch_size, patch_size, bias=False)
        tokens = (image_size // patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(width, layers, width // head_width, int(width * mlp_ratio))
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, image: Tensor) -> Tensor:
        patches = self.conv1(image).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = self.transformer(self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class ClipImage(nn.Module):
    """The tower below the name that OpenCLIP's whole model gives it."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.visual = visual


class ImageEncoder(nn.Module):
    """rgb [n, 3, h, w] in [-1, 1] -> embedding [n, 1024]."""

    def __init__(self, image_size: int = 224, **sizes: int | float) -> None:
        super().__init__()
        self.image_size = image_size
        self.model = ClipImage(VisionTransformer(image_size, **sizes))  # type: ignore[arg-type]

    def prepare(self, rgb: Tensor) -> Tensor:
        """Bicubic to the tower's size, corners onto corners and nothing cut off; then CLIP's mean and deviation."""
        size = (self.image_size, self.image_size)
        x = (F.interpolate(rgb, size, mode="bicubic", align_corners=True) + 1) / 2
        mean, deviation = (rgb.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        return (x - mean) / deviation

    def forward(self, rgb: Tensor) -> Tensor:
        return self.model.visual(self.prepare(rgb))
