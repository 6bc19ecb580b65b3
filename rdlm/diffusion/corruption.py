"""How targets are corrupted in training: Gaussian noise on target embeddings, masks on tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rdlm.config.objective import CorruptionConfig, NoiseConfig
from rdlm.diffusion.partition import Block
from rdlm.diffusion.schedules import noise_schedule


@dataclass(frozen=True)
class Noised:
    """z [B, T, D] fp32, zero where not noised; sigma [B, T] fp32, sigma_max there; is_noised [B, T] bool."""

    z: Tensor
    sigma: Tensor
    is_noised: Tensor


def draw_levels(
    corruption: CorruptionConfig,
    noise: NoiseConfig,
    block: Block | None,
    shape: tuple[int, int],
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """(sigma [B, T] fp32, is_noised [B, T] bool); sigma is sigma_max where a position is not noised.

    block: draw from the range that trains this block; None draws from the whole distribution.
    """
    rows = shape if corruption.per == "position" else (shape[0], 1)
    is_noised = torch.rand(rows, generator=rng) < corruption.share
    schedule = noise_schedule(noise, corruption)
    sigma = schedule.sample(rows, rng) if block is None else block.sample_level(rows, rng)
    sigma = torch.where(is_noised, sigma, torch.tensor(noise.sigma_max))
    return sigma.expand(shape), is_noised.expand(shape)


def add_noise(targets: Tensor, sigma: Tensor, is_noised: Tensor, rng: torch.Generator) -> Noised:
    """z = y + sigma * eps where noised, 0 elsewhere: targets y [B, T, D] fp32, sigma and is_noised [B, T]."""
    sigma, is_noised = sigma.to(targets.device), is_noised.to(targets.device)
    eps = torch.randn(targets.shape, generator=rng).to(targets.device)
    z = torch.where(is_noised.unsqueeze(-1), targets + sigma.unsqueeze(-1) * eps, torch.zeros_like(targets))
    return Noised(z, sigma, is_noised)


def mask_tokens(level: Tensor, maskable: Tensor, rng: torch.Generator) -> Tensor:
    """Which tokens are masked: each independently with probability level [B], where ``maskable`` [B, T]. ->
    bool [B, T]."""
    uniform = torch.rand(maskable.shape, generator=rng)
    return (uniform < level.cpu().unsqueeze(1)).to(maskable.device) & maskable
