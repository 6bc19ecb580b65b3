"""Gated feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of a fused [..., 2W] tensor. Its backward writes both gradients into one buffer: autograd's own
    backward of ``chunk`` makes two and concatenates them."""

    @staticmethod
    def forward(ctx: Any, fused: Tensor) -> Tensor:
        ctx.save_for_backward(fused)
        gate, up = fused.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (fused,) = ctx.saved_tensors
        gate, up = fused.chunk(2, dim=-1)
        out = torch.empty_like(fused)
        d_gate, d_up = out.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = torch.mul(gate, sigmoid, out=d_up)
        # d silu / d gate = sigmoid + silu * (1 - sigmoid). All in place: a layer that is recomputed holds the most in this moment.
        torch.neg(sigmoid, out=d_gate).add_(1.0)
        torch.addcmul(sigmoid, silu, d_gate, out=d_gate).mul_(up).mul_(grads[0])
        d_up.mul_(grads[0])
        return out


class GatedMLP(nn.Module):
    """proj(silu(gate) * up) with gate and up in one matrix, gate first (Shazeer 2020; Huginn's GatedMLP)."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d_model, 2 * width, bias=False)
        self.proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        return self.proj(_SwiGLU.apply(self.fc(x)))
