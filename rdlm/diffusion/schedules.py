"""Distributions of noise levels in training, and of masking levels: what a level is, how it is drawn, how its
range is cut; and EDM's preconditioning, the coefficients of a network at a noise level (Karras et al. 2022,
Table 1).

A schedule is a class with the methods of ``NoiseSchedule`` and one line in ``NOISE_SCHEDULES`` or
``MASKING_SCHEDULES``. A config names it (``objective.corruption.distribution``,
``objective.masking.schedule``). All maths is in fp64 on the CPU.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.objective import (
    BaseObjectiveConfig,
    CorruptionConfig,
    EdmConfig,
    EvidenceConfig,
    MaskedConfig,
    MaskingConfig,
    NoiseConfig,
    PaperConfig,
    SinglePassConfig,
)
from rdlm.errors import UserError

Noised = SinglePassConfig | EvidenceConfig | PaperConfig | EdmConfig
"""Objectives that add Gaussian noise to their targets."""


class NoiseSchedule(Protocol):
    """A distribution of levels on [lowest, highest]."""

    @property
    def ends(self) -> tuple[float, float]:
        """(lowest, highest) level."""

    def cdf(self, level: Tensor) -> Tensor:
        """Probability of a level at or below this one: [...] -> [...] fp64, 0 at the lowest and 1 at the
        highest."""

    def icdf(self, q: Tensor) -> Tensor:
        """The level below which the probability q lies: [...] in [0, 1] -> [...] fp64."""

    def sample(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Levels of one batch: fp32 [*shape]."""

    def widen(self, low: float, high: float, overlap: float) -> tuple[float, float]:
        """The range on which a block trains that owns (low, high]."""

    def grid(self, num_levels: int) -> list[float]:
        """Falling levels at which a sampler calls the network ``num_levels`` times; the first is the highest
        level."""


class _Levels(ABC):
    """What schedules of Gaussian noise share."""

    ends: tuple[float, float]

    @abstractmethod
    def icdf(self, q: Tensor) -> Tensor:
        """The level below which the probability q lies: [...] in [0, 1] -> [...] fp64."""

    def sample(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Levels fp32 [*shape] by inverse CDF."""
        return self.icdf(torch.rand(shape, generator=rng, dtype=torch.float64)).float()

    def grid(self, num_levels: int) -> list[float]:
        """Levels with equal probability between them: the upper edges of ``num_levels`` equi-probability
        blocks."""
        q = 1.0 - torch.arange(num_levels, dtype=torch.float64) / num_levels
        return [float(level) for level in self.icdf(q)]

    def widen(self, low: float, high: float, overlap: float) -> tuple[float, float]:
        """[low/a, high*a] with a = (high/low)^overlap, clipped to the ends (DiffusionBlocks App. C)."""
        factor = (high / low) ** overlap
        return max(low / factor, self.ends[0]), min(high * factor, self.ends[1])


@dataclass(frozen=True)
class LogNormalSchedule(_Levels):
    """log sigma ~ N(p_mean, p_std^2), truncated to [sigma_min, sigma_max] (DiffusionBlocks Sec. 3.3)."""

    noise: NoiseConfig

    @classmethod
    def of(cls, noise: NoiseConfig, corruption: CorruptionConfig) -> LogNormalSchedule:
        return cls(noise)

    @property
    def ends(self) -> tuple[float, float]:  # type: ignore[override]
        return self.noise.sigma_min, self.noise.sigma_max

    def _normal_cdf(self, sigma: Tensor) -> Tensor:
        return torch.special.ndtr((sigma.double().log() - self.noise.p_mean) / self.noise.p_std)

    @property
    def _bounds(self) -> tuple[float, float]:
        ends = self._normal_cdf(
            torch.tensor([self.noise.sigma_min, self.noise.sigma_max], dtype=torch.float64)
        )
        return ends[0].item(), ends[1].item()

    def cdf(self, level: Tensor) -> Tensor:
        low, high = self._bounds
        return ((self._normal_cdf(level) - low) / (high - low)).clamp(0.0, 1.0)

    def icdf(self, q: Tensor) -> Tensor:
        low, high = self._bounds
        log_sigma = self.noise.p_mean + self.noise.p_std * torch.special.ndtri(
            low + q.double() * (high - low)
        )
        return log_sigma.exp().clamp(self.noise.sigma_min, self.noise.sigma_max)


@dataclass(frozen=True)
class BandSchedule(_Levels):
    """Half of the levels log-uniform in each of two bands, ``low_band`` and ``high_band``."""

    corruption: CorruptionConfig

    @classmethod
    def of(cls, noise: NoiseConfig, corruption: CorruptionConfig) -> BandSchedule:
        return cls(corruption)

    @property
    def _knots(self) -> tuple[np.ndarray, np.ndarray]:
        """(log sigma, probability below it) where the slope changes; linear in between."""
        bands = np.log([self.corruption.low_band, self.corruption.high_band])  # [2, 2]
        levels = np.sort(bands.flatten())
        return levels, np.mean([np.clip((levels - a) / (b - a), 0, 1) for a, b in bands], axis=0)

    @property
    def ends(self) -> tuple[float, float]:  # type: ignore[override]
        (a, b), (c, d) = self.corruption.low_band, self.corruption.high_band
        return min(a, c), max(b, d)

    def cdf(self, level: Tensor) -> Tensor:
        levels, mass = self._knots
        return torch.as_tensor(np.interp(level.double().log().numpy(), levels, mass))

    def icdf(self, q: Tensor) -> Tensor:
        levels, mass = self._knots
        return torch.as_tensor(np.interp(q.double().numpy(), mass, levels)).exp().clamp(*self.ends)

    def sample(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Levels fp32 [*shape]: a fair coin chooses the band, then a log-uniform draw inside it."""
        use_low = torch.rand(shape, generator=rng) < 0.5
        bands = torch.tensor([self.corruption.high_band, self.corruption.low_band]).log()[
            use_low.long()
        ]  # [..., 2]
        return (bands[..., 0] + torch.rand(shape, generator=rng) * (bands[..., 1] - bands[..., 0])).exp()

    def grid(self, num_levels: int) -> list[float]:
        """The highest level, then a geometric grid over the low band, where almost all information about a
        token is decided."""
        low, high = self.corruption.low_band
        return [self.ends[1], *geometric_grid(high, low, num_levels - 1)]


@dataclass(frozen=True)
class LinearMasking:
    """alpha(t) = 1 - t is the probability that a token is unmasked at level t, and t is uniform (MD4 Sec. 2)."""

    masking: MaskingConfig

    @classmethod
    def of(cls, masking: MaskingConfig) -> LinearMasking:
        return cls(masking)

    @property
    def ends(self) -> tuple[float, float]:
        return self.masking.t_min, 1.0

    def cdf(self, level: Tensor) -> Tensor:
        low, high = self.ends
        return ((level.double() - low) / (high - low)).clamp(0.0, 1.0)

    def icdf(self, q: Tensor) -> Tensor:
        low, high = self.ends
        return low + q.double() * (high - low)

    def widen(self, low: float, high: float, overlap: float) -> tuple[float, float]:
        """Longer by the share ``overlap`` at each end, in alpha (as DiffusionBlocks App. C widens log sigma)."""
        more = overlap * (high - low)
        return max(low - more, self.ends[0]), min(high + more, self.ends[1])

    def sample(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Levels fp32 [*shape], evenly spread over a batch (see ``low_discrepancy``)."""
        return self.icdf(low_discrepancy(math.prod(shape), rng)).float().view(shape)

    def grid(self, num_levels: int) -> list[float]:
        return [1.0 - k / num_levels for k in range(num_levels)]

    def weight(self, level: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)), the weight of a masked token's cross-entropy (MD4 Sec. 3;
        DiffusionBlocks Eq. 8)."""
        return 1 / level


NOISE_SCHEDULES: dict[str, Callable[[NoiseConfig, CorruptionConfig], NoiseSchedule]] = {
    "bands": BandSchedule.of,
    "lognormal": LogNormalSchedule.of,
}
"""What ``objective.corruption.distribution`` may name."""
MASKING_SCHEDULES: dict[str, Callable[[MaskingConfig], LinearMasking]] = {"linear": LinearMasking.of}
"""What ``objective.masking.schedule`` may name."""


def noise_schedule(noise: NoiseConfig, corruption: CorruptionConfig) -> NoiseSchedule:
    """The training distribution of noise levels. Raises UserError for a name that no schedule has."""
    if corruption.distribution not in NOISE_SCHEDULES:
        names = ", ".join(NOISE_SCHEDULES)
        raise UserError(
            "objective.corruption.distribution",
            corruption.distribution,
            "there is no such noise schedule",
            f"use {names}",
        )
    return NOISE_SCHEDULES[corruption.distribution](noise, corruption)


def masking_schedule(masking: MaskingConfig) -> LinearMasking:
    """The masking schedule. Raises UserError for a name that no schedule has."""
    if masking.schedule not in MASKING_SCHEDULES:
        names = ", ".join(MASKING_SCHEDULES)
        raise UserError(
            "objective.masking.schedule", masking.schedule, "there is no such schedule", f"use {names}"
        )
    return MASKING_SCHEDULES[masking.schedule](masking)


def schedule_of(config: CheckpointConfig) -> NoiseSchedule:
    """The distribution of levels that a checkpoint's objective trains on; the published one where it has
    none."""
    objective: BaseObjectiveConfig = config.objective
    if isinstance(objective, MaskedConfig):
        return masking_schedule(objective.masking)
    if isinstance(objective, Noised):
        return noise_schedule(config.noise, objective.corruption)
    return noise_schedule(config.noise, CorruptionConfig())


def low_discrepancy(count: int, rng: torch.Generator) -> Tensor:
    """``count`` uniform numbers, fp64, at equal distances on the circle [0, 1), so that one batch covers all
    levels evenly (the low-discrepancy sampler of Kingma et al. 2021, as in MD4)."""
    return (
        torch.rand(1, generator=rng, dtype=torch.float64) + torch.arange(count, dtype=torch.float64) / count
    ) % 1.0


def geometric_grid(high: float, low: float, num_levels: int) -> list[float]:
    """num_levels levels from high to low in equal ratios; one level is ``high``."""
    if num_levels <= 1:
        return [high] * num_levels
    ratio = math.log(low / high) / (num_levels - 1)
    return [high * math.exp(ratio * k) for k in range(num_levels)]


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
