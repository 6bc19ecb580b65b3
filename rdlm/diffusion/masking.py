"""Hiding tokens: the schedule of masked diffusion and its draws. No networks; MD4 is Shi et al. 2024, arXiv 2406.04329.

A level t in (0, 1] says how much is hidden: each token stays in sight with probability alpha(t), alpha(0) = 1, alpha(1) = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rdlm.config.checkpoint import MaskingConfig


@dataclass(frozen=True)
class LinearMasking:
    """alpha(t) = 1 - t, and levels drawn evenly in t, that is in alpha (MD4 Sec. 2). Same questions as LogNormalSchedule."""

    masking: MaskingConfig

    @property
    def ends(self) -> tuple[float, float]:
        """(lowest, highest) level."""
        return self.masking.t_min, 1.0

    def cdf(self, level: Tensor) -> Tensor:
        """Training mass at or below the level. [...] -> [...] fp64."""
        low, high = self.ends
        return ((level.double() - low) / (high - low)).clamp(0.0, 1.0)

    def icdf(self, q: Tensor) -> Tensor:
        """The level below which the mass q lies. [...] -> [...] fp64."""
        low, high = self.ends
        return low + q.double() * (high - low)

    def widen(self, low: float, high: float, overlap: float) -> tuple[float, float]:
        """Longer by the share ``overlap`` at each end, in alpha, clipped to the ends (as DiffusionBlocks App. C widens log sigma)."""
        more = overlap * (high - low)
        return max(low - more, self.ends[0]), min(high + more, self.ends[1])

    def weight(self, level: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)), the weight of a hidden token's cross-entropy (MD4 Sec. 3; DiffusionBlocks Eq. 8)."""
        return 1 / level


def spread(count: int, rng: torch.Generator) -> Tensor:
    """``count`` uniform numbers, fp64, at equal distances on the circle [0, 1): levels of one batch then cover all levels evenly
    (the low-discrepancy sampler of Kingma et al. 2021, as in MD4)."""
    return (
        torch.rand(1, generator=rng, dtype=torch.float64) + torch.arange(count, dtype=torch.float64) / count
    ) % 1.0


def hide(level: Tensor, countable: Tensor, rng: torch.Generator) -> Tensor:
    """Which tokens are hidden: each on its own with probability level [B], never one that is not ``countable`` [B, T]. -> bool [B, T]."""
    uniform = torch.rand(countable.shape, generator=rng)
    return (uniform < level.cpu().unsqueeze(1)).to(countable.device) & countable
