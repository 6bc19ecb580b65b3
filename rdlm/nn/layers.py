"""The parts of a layer other than attention: norms, the token table, feed-forward layers, and conditioning on
a noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalized(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis, in fp32, in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast to x's dtype, then times the weight (in this order, as Huginn does; Zhang and
    Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        return normalized(x, self.eps) * self.weight


class UnweightedNorm(nn.Module):
    """RMSNorm without a weight."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        return normalized(x, self.eps)


R = TypeVar("R")


class TokenTable(nn.Module):
    """weight [V, D]. ``table(ids)`` looks rows up; ``table(hidden=x)`` multiplies x [..., D] with all rows;
    ``table(use=f)`` returns ``f(weight)``.

    Every use goes through forward because ZeRO stage 3 gathers a partitioned weight only around its module's
    forward.
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(
        self,
        ids: Tensor | None = None,
        use: Callable[[Tensor], R] | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor | R:
        if use is not None:
            return use(self.weight)
        if hidden is not None:
            return F.linear(hidden, self.weight)
        assert ids is not None
        return F.embedding(ids, self.weight)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of a fused [..., 2W] tensor. Its backward writes both gradients into one buffer:
    autograd's own backward of ``chunk`` makes two and concatenates them."""

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
        # d silu / d gate = sigmoid + silu * (1 - sigmoid). All in place: a layer that is recomputed holds the
        # most in this moment.
        torch.neg(sigmoid, out=d_gate).add_(1.0)
        torch.addcmul(sigmoid, silu, d_gate, out=d_gate).mul_(up).mul_(grads[0])
        d_up.mul_(grads[0])
        return out


class MLP(nn.Module):
    """Feed-forward layer: proj(silu(gate) * up), proj(relu(fc x)^2) or proj(gelu(fc x)).

    swiglu: gate and up are one matrix, gate first (Shazeer 2020; Huginn's GatedMLP). gelu is the exact one.
    """

    def __init__(
        self, kind: Literal["swiglu", "relu2", "gelu"], d_model: int, width: int, scale: float = 1.0
    ) -> None:
        """scale: factor of what enters ``proj`` (Parcae: 1/2 with relu2)."""
        super().__init__()
        self.kind, self.scale = kind, scale
        self.fc = nn.Linear(d_model, 2 * width if kind == "swiglu" else width, bias=False)
        self.proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        return self.proj(self._inner(self.fc(x)))

    def _inner(self, wide: Tensor) -> Tensor:
        if self.kind == "swiglu":
            # A compiler fuses the plain form by itself, and cannot trace the other.
            gate, up = wide.chunk(2, dim=-1) if torch.compiler.is_compiling() else (None, None)
            inner: Tensor = _SwiGLU.apply(wide) if gate is None or up is None else F.silu(gate) * up
        else:
            inner = F.relu(wide).square() if self.kind == "relu2" else F.gelu(wide)
        return inner if self.scale == 1.0 else self.scale * inner


LayerModulation = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Shifts, factors and gates of one layer, each [B or 1, T or 1, D]: see Modulation.forward."""

LayerCondition = LayerModulation | Tensor
"""The conditioning of one layer on the noise level of its rows: its modulation, or the embedding [B or 1, T or 1,
C] to compute it from."""

Condition = Sequence[LayerCondition]
"""One entry per core layer: computed once for a level, used by every core step at it."""


class NoiseEmbedding(nn.Module):
    """c_noise [...] fp32 -> [..., C]: sinusoids of 1000 * c_noise, then a two-layer MLP. One vector serves
    every layer."""

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
    The input is narrow (C much below D): a level per position then costs a few per cent of a layer instead of
    a third.
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
