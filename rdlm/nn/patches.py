"""Images as rows and rows as images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rdlm.config.model import ImageConfig


class PatchEmbedding(nn.Module):
    """[B, C, H, W] -> [B, P, D]: a linear map of each patch, row by row, plus a learned vector of its place (Dosovitskiy et al. 2021)."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        patch_size, num_channels, d_model = config.patch_size, config.num_channels, config.d_model
        self.image_shape = (num_channels, config.image_size, config.image_size)
        self.patch_size = patch_size
        self.linear = nn.Linear(num_channels * patch_size**2, d_model)
        self.places = nn.Parameter(torch.empty(config.num_patches, d_model))

    def empty_images(self, count: int) -> Tensor:
        """[count, C, H, W] without values."""
        return torch.empty(count, *self.image_shape)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(patches(images, self.patch_size).to(self.places.dtype)) + self.places


def patches(images: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, (H/size) (W/size), C size^2]."""
    tiles = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, C, h, p, w, p]
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def assemble(rows: Tensor, size: int, num_channels: int) -> Tensor:
    """The way back, of square images: [B, P, C size^2] -> [B, C, H, W]."""
    side = round(rows.shape[1] ** 0.5)
    tiles = rows.unflatten(2, (num_channels, size, size)).unflatten(1, (side, side))  # [B, h, w, C, p, p]
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
