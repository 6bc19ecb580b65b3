"""Conditioning on a noise level: sinusoidal embedding and zero-initialised AdaLN (Peebles and Xie 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LayerModulation = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Shifts, factors and gates of one layer, each [B or 1, T or 1, D]: see Modulation.forward."""

LayerCondition = LayerModulation | Tensor
"""What one layer is told about the noise level of its rows: its modulation, or the embedding [B or 1, T or 1, C] to compute it from."""

Condition = Sequence[LayerCondition]
"""One entry per core layer: computed once for a level, used by every core step at it."""


class NoiseEmbedding(nn.Module):
    """c_noise [...] fp32 -> [..., C]: sinusoids of 1000 * c_noise, then a two-layer MLP. One vector serves every layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.fc_1, self.fc_2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, c_noise: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=c_noise.device) / half)
        angles = 1000.0 * c_noise.float().unsqueeze(-1) * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc_1.weight.dtype)
        return F.silu(self.fc_2(F.silu(self.fc_1(waves))))


class Modulation(nn.Module):
    """cond [..., C] -> shift, scale and gate of both branches of a layer, each [..., D].

    All zero at the start, and gates are used as 1 + gate, so a conditioned layer begins as the plain layer.
    The input is narrow (C much below D): a level per position then costs a few per cent of a layer instead of a third.
    """

    def __init__(self, cond_width: int, d_model: int) -> None:
        super().__init__()
        self.linear = nn.Linear(cond_width, 6 * d_model)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cond: Tensor) -> LayerModulation:
        """-> shift, 1 + scale, 1 + gate of the attention branch, then of the MLP branch."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.linear(cond).chunk(6, dim=-1)
        return shift_a, 1 + scale_a, 1 + gate_a, shift_m, 1 + scale_m, 1 + gate_m


def modulate(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """x * factor + shift; all [..., D] or broadcastable."""
    return torch.addcmul(shift, x, factor)
