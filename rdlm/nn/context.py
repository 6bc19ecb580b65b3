"""How rows attend to each other. A context is data handed to a model for one call; models keep no attention state.

Shapes: B batch, T rows of a sequence, H heads, Dh head width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rdlm.nn.rotary import rotary_table


class AttentionContext(Protocol):
    """What a layer needs to know about the other rows."""

    def rope(self, head_dim: int, base: float) -> Tensor:
        """Rotary factors of the rows: complex64 [B or 1, T, 1, head_dim/2]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [B, T, H, Dh], k and v [B, T, Hkv, Dh] -> [B, T, H, Dh]."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Scaled dot-product attention over the second-last-but-one axis; grouped heads where Hkv < H. [B, T, H, Dh] in and out."""
    if q.shape[1] == 1 and q.device.type == "cpu" and q.dtype != torch.float32:
        # Single queries are slow in PyTorch's half-precision CPU kernel: several times the fp32 one with its casts.
        return attention(q.float(), k.float(), v.float(), mask, is_causal).to(q.dtype)
    grouped = k.shape[2] != q.shape[2]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2)


class CausalContext:
    """Rows are positions 0..T-1 of whole sequences; row i sees rows j <= i."""

    is_causal = True

    def __init__(self, length: int, device: torch.device | str = "cpu") -> None:
        self.length, self.device = length, torch.device(device)

    def rope(self, head_dim: int, base: float) -> Tensor:
        return rotary_table(head_dim, base, self.length, self.device)[None, :, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return attention(q, k, v, is_causal=self.is_causal)


class BidirectionalContext(CausalContext):
    """Rows are positions 0..T-1 of whole sequences; every row sees all of them."""

    is_causal = False


class PaddedContext(BidirectionalContext):
    """Rows of several lengths, padded at their ends to ``length``: every row sees those of its own sequence, and no padding."""

    def __init__(self, lengths: Tensor, length: int, device: torch.device | str = "cpu") -> None:
        """lengths: [B] int64."""
        super().__init__(length, device)
        self.lengths = lengths.to(self.device)

    @cached_property
    def mask(self) -> Tensor:
        """bool [B, 1, 1, T], True where every row may look."""
        return (torch.arange(self.length, device=self.device) < self.lengths.unsqueeze(1))[:, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return attention(q, k, v, mask=self.mask)


class TwoStreamContext:
    """Rows are a clean stream 0..T-1 followed by a noisy stream 0..T-1 of the same positions (DiffusionBlocks App. E.4).

    Clean row i sees clean j <= i. Noisy row i sees itself and the clean rows before its target: j <= i where its own clean row
    is part of its context (``sees_own_clean``, the published layout), j < i where the noisy row stands in its place.
    No row sees another noisy row.
    """

    def __init__(self, length: int, sees_own_clean: bool, device: torch.device | str = "cpu") -> None:
        self.length, self.sees_own_clean, self.device = length, sees_own_clean, torch.device(device)

    @cached_property
    def mask(self) -> Tensor:
        """bool [2T, 2T], True where the row may look."""
        square = torch.ones(self.length, self.length, dtype=torch.bool, device=self.device)
        clean = square.tril()
        context = clean if self.sees_own_clean else square.tril(-1)
        alone = torch.eye(self.length, dtype=torch.bool, device=self.device)
        return torch.cat([torch.cat([clean, ~square], 1), torch.cat([context, alone], 1)], 0)

    def rope(self, head_dim: int, base: float) -> Tensor:
        return rotary_table(head_dim, base, self.length, self.device).repeat(2, 1)[None, :, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return attention(q, k, v, mask=self.mask)
