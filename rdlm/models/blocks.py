"""The two transformer layers of the text families."""

from __future__ import annotations

from torch import Tensor, nn

from rdlm.nn.attention import Attention
from rdlm.nn.context import AttentionContext
from rdlm.nn.mlp import GatedMLP
from rdlm.nn.modulation import LayerCondition, LayerModulation, Modulation, modulate
from rdlm.nn.norm import RMSNorm


class SandwichBlock(nn.Module):
    """Huginn's layer: x = n2(attn(n1 x) + x); x = n4(mlp(n3 x) + x). The residual sum is normed."""

    def __init__(
        self, attn: Attention, mlp: GatedMLP, d_model: int, eps: float, cond_width: int | None
    ) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp
        self.norm_1, self.norm_2 = RMSNorm(d_model, eps), RMSNorm(d_model, eps)
        self.norm_3, self.norm_4 = RMSNorm(d_model, eps), RMSNorm(d_model, eps)
        self.modulation = Modulation(cond_width, d_model) if cond_width else None

    def forward(self, x: Tensor, ctx: AttentionContext, cond: LayerCondition | None = None) -> Tensor:
        """x [B, T, D]; cond: what ``self.modulation`` gave, what it takes, or None -> [B, T, D]."""
        if cond is None:
            x = self.norm_2(self.attn(self.norm_1(x), ctx) + x)
            return self.norm_4(self.mlp(self.norm_3(x)) + x)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulated(self.modulation, cond)
        x = self.norm_2(gate_a * self.attn(modulate(self.norm_1(x), shift_a, scale_a), ctx) + x)
        return self.norm_4(gate_m * self.mlp(modulate(self.norm_3(x), shift_m, scale_m)) + x)


class PreNormBlock(nn.Module):
    """Llama's layer: x = x + attn(n1 x); x = x + mlp(n2 x) (Touvron et al. 2023)."""

    def __init__(
        self, attn: Attention, mlp: GatedMLP, d_model: int, eps: float, cond_width: int | None
    ) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp
        self.norm_1, self.norm_2 = RMSNorm(d_model, eps), RMSNorm(d_model, eps)
        self.modulation = Modulation(cond_width, d_model) if cond_width else None

    def forward(self, x: Tensor, ctx: AttentionContext, cond: LayerCondition | None = None) -> Tensor:
        """x [B, T, D]; cond: what ``self.modulation`` gave, what it takes, or None -> [B, T, D]."""
        if cond is None:
            x = x + self.attn(self.norm_1(x), ctx)
            return x + self.mlp(self.norm_2(x))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulated(self.modulation, cond)
        x = x + gate_a * self.attn(modulate(self.norm_1(x), shift_a, scale_a), ctx)
        return x + gate_m * self.mlp(modulate(self.norm_2(x), shift_m, scale_m))


def _modulated(modulation: Modulation | None, cond: LayerCondition) -> LayerModulation:
    if not isinstance(cond, Tensor):
        return cond
    assert modulation is not None
    return modulation(cond)
