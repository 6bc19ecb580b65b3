"""Noise levels: the log-normal training distribution, EDM coefficients and grids. fp64 scalar maths, no data, no networks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rdlm.config.checkpoint import NoiseConfig


@dataclass(frozen=True)
class Scalings:
    """EDM coefficients of D(z) = c_skip z + c_out F(c_in z, c_noise), each shaped as sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def denoise_scalings(sigma: Tensor, sigma_data: float) -> Scalings:
    """sigma [...] > 0 -> four fp32 tensors [...]. Karras et al. 2022, Table 1; DiffusionBlocks App. C.

    Computed in fp32 or wider: at sigma 0.002 the weight is 2.5e5 and bf16 would lose it.
    """
    sigma = sigma.double() if sigma.dtype == torch.float64 else sigma.float()
    total = sigma.square() + sigma_data**2
    return Scalings(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=total.rsqrt(),
        c_noise=sigma.log() / 4,
    )


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """w(sigma) = (sigma^2 + sd^2) / (sigma sd)^2 = 1 / c_out^2. [...] -> [...] (Karras et al. 2022, Table 1)."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


@dataclass(frozen=True)
class LogNormalSchedule:
    """log sigma ~ N(p_mean, p_std^2), cut to [sigma_min, sigma_max] (DiffusionBlocks Sec. 3.3)."""

    noise: NoiseConfig

    @property
    def ends(self) -> tuple[float, float]:
        """(lowest, highest) level."""
        return self.noise.sigma_min, self.noise.sigma_max

    def _normal_cdf(self, sigma: Tensor) -> Tensor:
        return torch.special.ndtr((sigma.double().log() - self.noise.p_mean) / self.noise.p_std)

    @property
    def _bounds(self) -> tuple[float, float]:
        ends = self._normal_cdf(
            torch.tensor([self.noise.sigma_min, self.noise.sigma_max], dtype=torch.float64)
        )
        return ends[0].item(), ends[1].item()

    def cdf(self, sigma: Tensor) -> Tensor:
        """Training mass at or below sigma, 0 at sigma_min and 1 at sigma_max. [...] -> [...] fp64."""
        low, high = self._bounds
        return ((self._normal_cdf(sigma) - low) / (high - low)).clamp(0.0, 1.0)

    def icdf(self, q: Tensor) -> Tensor:
        """The level below which the mass q lies: [...] in [0, 1] -> [...] fp64."""
        low, high = self._bounds
        log_sigma = self.noise.p_mean + self.noise.p_std * torch.special.ndtri(
            low + q.double() * (high - low)
        )
        return log_sigma.exp().clamp(self.noise.sigma_min, self.noise.sigma_max)

    def grid(self, num_steps: int) -> list[float]:
        """num_steps + 1 levels, noisiest first: sigma_max, equal steps of training mass, then 0.

        The levels are the upper edges of ``num_steps`` equi-probability blocks, so K = B uses each block once, and the step
        to 0 lands on the denoised estimate itself: K steps are K network calls.
        """
        q = 1.0 - torch.arange(num_steps, dtype=torch.float64) / num_steps
        return [*self.icdf(q).tolist(), 0.0]

    def widen(self, low: float, high: float, overlap: float) -> tuple[float, float]:
        """[low/a, high*a] with a = (high/low)^overlap, clipped to [sigma_min, sigma_max] (DiffusionBlocks App. C)."""
        factor = (high / low) ** overlap
        return max(low / factor, self.noise.sigma_min), min(high * factor, self.noise.sigma_max)


def geometric_grid(high: float, low: float, num_levels: int) -> list[float]:
    """num_levels levels from high to low in equal ratios; one level is ``high``."""
    if num_levels <= 1:
        return [high] * num_levels
    ratio = math.log(low / high) / (num_levels - 1)
    return [high * math.exp(ratio * k) for k in range(num_levels)]
