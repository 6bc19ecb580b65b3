"""Rotary position embedding (Su et al. 2021), interleaved pairs as in Huginn, always computed in fp32."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def rotary_table(head_dim: int, base: float, length: int, device: torch.device) -> Tensor:
    """exp(i * position * base^(-2j/head_dim)): complex64 [length, head_dim/2]. No buffer: casting a model must not round it."""
    with torch.inference_mode(False):  # or a table that serving has made could not be trained with
        inverse = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
        return torch.polar(torch.ones_like(angles), angles).to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x: [B, T, H, Dh]; table: complex64 [B or 1, T, 1, Dh/2] -> [B, T, H, Dh] in x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
