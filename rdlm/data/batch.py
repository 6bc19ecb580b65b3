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
    documents: Tensor | None = None
    """int64 [B, T]: the number of the document that a position belongs to, rising along a row. Positions see
    their own document alone, and count from its start. None: a row is one sequence, whatever is in it."""

    def to(self, device: torch.device | str) -> Batch:
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), self.mask.to(device), documents)
