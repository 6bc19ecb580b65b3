"""Criteria of adaptive exits as tensors: how much a position still moved in its last core step."""

from __future__ import annotations

import torch
from torch import Tensor


def latent_change(before: Tensor, after: Tensor) -> Tensor:
    """|x' - x| / |x'| of each row: states [N, D] -> fp32 [N] (Geiping et al. 2025, "latent-diff"). 1 after a first step from zero."""
    after = after.float()
    return (after - before.float()).norm(dim=-1) / after.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) of each row: log-probabilities [M, V] -> fp32 [M], never below 0 (Geiping et al. 2025, "kl")."""
    return (before.exp() * (before - after)).sum(-1).clamp(min=0)
