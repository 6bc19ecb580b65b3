"""Gated feed-forward layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """proj(silu(gate) * up) with gate and up in one matrix, gate first (Shazeer 2020; Huginn's GatedMLP)."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d_model, 2 * width, bias=False)
        self.proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)
