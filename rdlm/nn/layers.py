"""The modules of a network: norms, the token table, attention, feed-forward layers, conditioning on a noise level,
and the transformer layer that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdlm.config.model import LayerConfig
from rdlm.nn.attention import AttentionContext, rotate


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


class Attention(nn.Module):
    """Multi-head attention as a LayerConfig describes it; who sees whom, and cached keys, are the context's
    business.

    Wqkv is q | k | v in one matrix. ``layer`` is the cache index of this layer; the layer itself holds no
    keys.
    """

    def __init__(
        self, config: LayerConfig, d_model: int, layer: int, value_gate_width: int | None = None
    ) -> None:
        """value_gate_width: leading channels of the input that gate a value embedding (Parcae); None: there
        is none."""
        super().__init__()
        self.config, self.layer = config, layer
        self.head_dim = config.head_width(d_model)
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.Wqkv = nn.Linear(d_model, q_width + 2 * kv_width, bias=config.bias.startswith("qkv"))
        self.proj = nn.Linear(q_width, d_model, bias=config.bias == "qkvo")
        has_qk_bias = config.bias == "qk"
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, self.num_heads, self.head_dim)) if has_qk_bias else None
        self.q_norm = self.k_norm = None
        self.qk_eps = config.norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
        if config.qk_norm in ("full", "head"):
            widths = (q_width, kv_width) if config.qk_norm == "full" else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (RMSNorm(width, self.qk_eps) for width in widths)
        gated = value_gate_width is not None
        self.value_gate = nn.Linear(value_gate_width or 0, self.num_kv_heads, bias=False) if gated else None
        self.output_gate = nn.Linear(d_model, q_width, bias=False) if config.output_gate else None

    def forward(self, x: Tensor, ctx: AttentionContext, values: Tensor | None = None) -> Tensor:
        """x [B, T, D]; values [B, T, Hkv Dh]: the rows' value embeddings, where the layer has a gate for them
        -> [B, T, D]."""
        heads = self.Wqkv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 Hkv, Dh]
        qk, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.qk_bias is not None:
            qk = (qk + self.qk_bias.flatten(0, 2)).to(v.dtype)
        if self.config.qk_norm != "none":
            qk = self._normed(qk)
        if self.config.rope is not None:
            qk = self._rotated(qk, ctx)
        if self.value_gate is not None and values is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))  # [B, T, Hkv]
            v = v + gate.unsqueeze(-1) * values.unflatten(-1, (-1, self.head_dim))
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=2)
        attended = ctx.attend(q, k, v, self.layer).flatten(-2)
        if self.output_gate is not None:
            attended = torch.sigmoid(self.output_gate(x)) * attended
        return self.proj(attended)

    def _rotated(self, qk: Tensor, ctx: AttentionContext) -> Tensor:
        rope = self.config.rope
        assert rope is not None
        num_dims = rope.num_dims or self.head_dim
        table = ctx.rope(num_dims, rope.base, rope.scaling)
        if num_dims == self.head_dim:
            return rotate(qk, table)
        return torch.cat([rotate(qk[..., :num_dims], table), qk[..., num_dims:]], dim=-1)

    def _normed(self, qk: Tensor) -> Tensor:
        if self.q_norm is None or self.k_norm is None:
            return normalized(qk, self.qk_eps)
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=2)
        if self.config.qk_norm == "head":
            return torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        q, k = self.q_norm(q.flatten(-2)), self.k_norm(k.flatten(-2))  # one mean over all heads (OLMo 2)
        return torch.cat([q, k], dim=-1).unflatten(-1, (-1, self.head_dim))


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
        self,
        kind: Literal["swiglu", "relu2", "gelu"],
        d_model: int,
        width: int,
        scale: float = 1.0,
        has_bias: bool = False,
    ) -> None:
        """scale: factor of what enters ``proj`` (Parcae: 1/2 with relu2). has_bias: of both matrices."""
        super().__init__()
        self.kind, self.scale = kind, scale
        self.fc = nn.Linear(d_model, 2 * width if kind == "swiglu" else width, bias=has_bias)
        self.proj = nn.Linear(width, d_model, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        return self.proj(self._inner(self.fc(x)))

    def _inner(self, wide: Tensor) -> Tensor:
        inner: Tensor
        if self.kind == "relu2":
            inner = F.relu(wide).square()
        elif self.kind == "gelu":
            inner = F.gelu(wide)
        elif torch.compiler.is_compiling():  # it fuses this by itself, and cannot trace the other form
            gate, up = wide.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = _SwiGLU.apply(wide)
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


BranchModulation = tuple[Tensor, Tensor, Tensor]
"""Shift, factor and gate of one branch, each [B or 1, T or 1, D]."""

Norm = RMSNorm | UnweightedNorm


class TransformerLayer(nn.Module):
    """x = around(attn, x); x = around(mlp, x), where ``config.norms`` says what around(f, x) is:

    | norms           | around(f, x)     | as in                          |
    |-----------------|------------------|--------------------------------|
    | pre             | x + f(n(x))      | Llama (Touvron et al. 2023)    |
    | post            | x + n(f(x))      | OLMo 2                         |
    | sandwich_branch | x + n'(f(n(x)))  | Ouro                           |
    | sandwich_sum    | n'(f(n(x)) + x)  | Huginn (Geiping et al. 2025)   |

    Norms are numbered in the order of their use. With a noise level, AdaLN shifts and scales what enters f
    and gates what leaves.
    """

    def __init__(
        self,
        config: LayerConfig,
        d_model: int,
        layer: int,
        cond_width: int | None = None,
        mlp_width: int | None = None,
        value_gate_width: int | None = None,
    ) -> None:
        """layer: cache index. cond_width: width of an embedded noise level. mlp_width: None takes
        ``config.mlp_width``."""
        super().__init__()
        self.norms = config.norms
        self.attn = Attention(config, d_model, layer, value_gate_width)
        inner = mlp_width or config.mlp_width
        self.mlp = MLP(config.mlp, d_model, inner, config.mlp_scale, config.mlp_bias)
        self.norm_1, self.norm_2 = _norm(config, d_model), _norm(config, d_model)
        self.norm_3 = self.norm_4 = None
        if config.norms in ("sandwich_sum", "sandwich_branch"):
            self.norm_3, self.norm_4 = _norm(config, d_model), _norm(config, d_model)
        self.modulation = Modulation(cond_width, d_model) if cond_width else None

    def forward(
        self,
        x: Tensor,
        ctx: AttentionContext,
        cond: LayerCondition | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D]; cond: what ``self.modulation`` gave, what it takes, or None; values: see Attention ->
        [B, T, D]."""
        of_attn, of_mlp = (None, None) if cond is None else self._modulated(cond)
        (before_attn, after_attn), (before_mlp, after_mlp) = self._norms()
        x = self._leave(x, self.attn(_enter(x, before_attn, of_attn), ctx, values), after_attn, of_attn)
        return self._leave(x, self.mlp(_enter(x, before_mlp, of_mlp)), after_mlp, of_mlp)

    def _norms(self) -> tuple[tuple[Norm | None, Norm | None], tuple[Norm | None, Norm | None]]:
        """(before, after) of attention and of the feed-forward layer."""
        if self.norms == "pre":
            return (self.norm_1, None), (self.norm_2, None)
        if self.norms == "post":
            return (None, self.norm_1), (None, self.norm_2)
        return (self.norm_1, self.norm_2), (self.norm_3, self.norm_4)

    def _modulated(self, cond: LayerCondition) -> tuple[BranchModulation, BranchModulation]:
        if isinstance(cond, Tensor):
            assert self.modulation is not None
            cond = self.modulation(cond)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = cond
        return (shift_a, scale_a, gate_a), (shift_m, scale_m, gate_m)

    def _leave(
        self, x: Tensor, branch: Tensor, norm: Norm | None, modulation: BranchModulation | None
    ) -> Tensor:
        if norm is not None and self.norms != "sandwich_sum":
            branch = norm(branch)
        if modulation is not None:
            branch = modulation[2] * branch
        branch = x + branch
        return norm(branch) if norm is not None and self.norms == "sandwich_sum" else branch


def _norm(config: LayerConfig, width: int) -> Norm:
    return RMSNorm(width, config.norm_eps) if config.norm_weights else UnweightedNorm(config.norm_eps)


class Layers(nn.ModuleList):
    """Transformer layers one after the other, of consecutive cache indices."""

    def through(
        self,
        x: Tensor,
        ctx: AttentionContext,
        cond: Condition | None = None,
        values: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """x [B, T, D], and of each layer what TransformerLayer.forward takes -> [B, T, D]."""
        for i, layer in enumerate(self):
            x = layer(x, ctx, None if cond is None else cond[i], None if values is None else values[i])
        return x


def _enter(x: Tensor, norm: Norm | None, modulation: BranchModulation | None) -> Tensor:
    if norm is not None:
        x = norm(x)
    return x if modulation is None else modulate(x, modulation[0], modulation[1])
