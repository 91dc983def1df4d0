"""Small vision transformers for small images, built from timm's VisionTransformer with a class token."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class ConvStem(nn.Module):
    """Images to patches of 4 x 4 pixels by three 3 x 3 convolutions (Xiao et al. 2021), which train in few epochs.

    Takes the place of timm's PatchEmbed: (batch, 3, h, w) -> (batch, h/4 * w/4, embed_dim).
    """

    patch_size = (4, 4)

    def __init__(self, img_size: int, embed_dim: int, in_chans: int = 3, **_):
        super().__init__()
        self.num_patches = (img_size // 4) ** 2
        widths = (embed_dim // 4, embed_dim // 2)
        self.layers = nn.Sequential(
            nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
            nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(widths[1]),
            nn.ReLU(),
            nn.Conv2d(widths[1], embed_dim, 3, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)


def vit_cifar10() -> VisionTransformer:
    """Six blocks of width 96 over 8 x 8 patches of a 32 x 32 image: 0.5 million parameters."""
    return VisionTransformer(
        img_size=32, embed_layer=ConvStem, embed_dim=96, depth=6, num_heads=3, mlp_ratio=2, num_classes=10
    )


def vit_digits() -> VisionTransformer:
    """Four blocks of width 64 over 4 x 4 patches of an 8 x 8 grey image: 0.1 million parameters."""
    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2, num_classes=10
    )
