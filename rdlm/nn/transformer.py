"""The transformer layer of every family: attention and a feed-forward layer, with norms where the LayerConfig
puts them."""

from __future__ import annotations

from torch import Tensor, nn

from rdlm.config.model import LayerConfig
from rdlm.nn.attention import Attention, AttentionContext
from rdlm.nn.layers import MLP, LayerCondition, Modulation, RMSNorm, UnweightedNorm, modulate

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
        self.mlp = MLP(config.mlp, d_model, mlp_width or config.mlp_width, config.mlp_scale)
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


def _enter(x: Tensor, norm: Norm | None, modulation: BranchModulation | None) -> Tensor:
    if norm is not None:
        x = norm(x)
    return x if modulation is None else modulate(x, modulation[0], modulation[1])
