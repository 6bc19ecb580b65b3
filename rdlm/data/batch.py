"""A micro-batch, as data readers make it and objectives take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Text: inputs, targets [B, T] int64, ids. Images: inputs fp32 [B, C, H, W] in [-1,
    1], targets [B, 1] int64, classes. mask: bool of the targets' shape, True where a target counts."""

    inputs: Tensor
    targets: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.inputs.to(device), self.targets.to(device), self.mask.to(device))
