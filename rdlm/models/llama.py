"""Llama-style autoregressive transformer (Touvron et al. 2023). Its layers are the core; it runs once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rdlm.config.model import LlamaConfig, TextConfig, VitConfig
from rdlm.models.prenorm import INIT_STD, PreNormModel
from rdlm.nn.context import AttentionContext
from rdlm.nn.modulation import Condition


class Llama(PreNormModel):
    """hidden = norm(layers(embed(ids))); with noise conditioning the noised target enters through an adapter [z, e]."""

    def __init__(self, config: LlamaConfig, layers: range | None = None) -> None:
        """layers: see PreNormModel."""
        super().__init__(config, layers, config.num_kv_heads)

    def _add_stem(self, config: TextConfig | VitConfig) -> None:
        self.adapter = (
            nn.Linear(2 * config.d_model, config.d_model, bias=False) if config.noise_conditioning else None
        )

    def core(self, state: Tensor, e: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        # At one scale with the embedding: coordinates of size 1 drown one that starts at 0.02 as soon as the adapter moves.
        x = e if self.adapter is None else self.adapter(torch.cat([INIT_STD * state, e], dim=-1))
        return self.through_layers(x, cond, ctx)
