"""Images from a denoiser of images: the probability-flow ODE in K steps (DiffusionBlocks Sec. 3.2), levels at equal training mass."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import ImageConfig
from rdlm.diffusion.partition import partition_of
from rdlm.diffusion.samplers import Solver, solve
from rdlm.objectives.denoiser import Denoiser
from rdlm.objectives.image_denoiser import ImageDenoiser
from rdlm.random_streams import generator

_IMAGE_KEY = 8


@torch.no_grad()
def draw_images(
    denoiser: Denoiser,
    config: CheckpointConfig,
    classes: Tensor,
    num_steps: int,
    *,
    first: int = 0,
    guidance: float = 1.0,
    solver: Solver = "euler",
    seed: int = 0,
) -> Tensor:
    """Images first .. first + B - 1 of a seed, of the classes given [B] int64 -> [B, C, H, W] fp32, about [-1, 1].

    num_steps: K steps from the highest level to 0. A step is one network call, two with ``heun`` except the last; each is twice as large
    where guidance is not 1. Of a network of blocks a level is asked of the block that owns it. Image i starts from noise that depends on
    (seed, i) alone: not on the batch, K, solver or guidance.
    """
    shape, grid = cast(ImageConfig, config.model), partition_of(config).grid(num_steps)
    size = (shape.num_channels, shape.image_size, shape.image_size)
    starts = [
        torch.randn(size, generator=generator(seed, _IMAGE_KEY, first + i)) for i in range(len(classes))
    ]
    z = grid[0] * torch.stack(starts).to(classes.device)

    def denoise(z: Tensor, sigma: float) -> Tensor:
        return cast(ImageDenoiser, denoiser.at(sigma)).guided(z, sigma, classes, guidance)

    return solve(denoise, z, [*grid, 0.0], solver)


def pixels(images: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1], which is cut off -> uint8 [B, H, W, C]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
