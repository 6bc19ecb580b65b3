"""What Llama and the masked model share: a stack of pre-norm layers (Touvron et al. 2023) that can be built in parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rdlm.context import AttentionContext
from rdlm.layers.attention import Attention
from rdlm.layers.mlp import GatedMLP
from rdlm.layers.modulation import Condition, NoiseEmbedding
from rdlm.layers.norm import RMSNorm
from rdlm.layers.table import TokenTable
from rdlm.model_config import PreNormConfig
from rdlm.models.backbone import Backbone
from rdlm.models.blocks import PreNormBlock

INIT_STD = 0.02


class PreNormModel(Backbone):
    """Built from a part of its layers it is a block: embedding, stem, these layers, norm and read-out, all its own."""

    is_recurrent = False

    def __init__(self, config: PreNormConfig, num_kv_heads: int, layers: range | None = None) -> None:
        """layers: which of the network's layers, None for all; they keep their places in the cache."""
        super().__init__()
        places = layers or range(config.num_layers)
        self.vocab_size = config.vocab_size
        self.head_dim, self.num_kv_heads = config.d_model // config.num_heads, num_kv_heads
        self.num_cache_layers = config.num_layers
        self.wte = TokenTable(config.vocab_size, config.d_model)
        cond_width = config.noise_embed_dim if config.noise_conditioning else None
        self.noise_embedding = None if cond_width is None else NoiseEmbedding(cond_width)
        self._add_stem(config)
        self.layers = nn.ModuleList(self._layer(config, i, cond_width) for i in places)
        self.ln_f = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else TokenTable(config.vocab_size, config.d_model)

    def _add_stem(self, config: PreNormConfig) -> None:
        """What stands between embedding and layers."""

    def _layer(self, config: PreNormConfig, layer: int, cond_width: int | None) -> PreNormBlock:
        attn = Attention(config.d_model, config.num_heads, self.num_kv_heads, config.rope_base, False, layer)
        return PreNormBlock(attn, GatedMLP(config.d_model, config.mlp_width), config.d_model, config.norm_eps, cond_width)

    @property
    def core_layers(self) -> nn.ModuleList:
        return self.layers

    def encode(self, inputs: Tensor, ctx: AttentionContext) -> Tensor:
        return self.embed(inputs)

    def through_layers(self, x: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        for i, block in enumerate(self.layers):
            x = block(x, ctx, None if cond is None else cond[i])
        return x

    def decode(self, state: Tensor, ctx: AttentionContext) -> Tensor:
        return self.ln_f(state)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal of std 0.02; residual projections by 1 / sqrt(2 L) (Radford et al. 2019); norms 1, AdaLN 0, adapter [0, I]."""
        for name, parameter in self.named_parameters():
            if "norm" in name or "ln_f" in name:
                parameter.fill_(1.0)
            elif "modulation" in name or name.endswith("bias"):
                parameter.zero_()
            elif name == "adapter.weight":
                parameter.zero_()
                parameter[:, parameter.shape[0] :].fill_diagonal_(1.0)
            else:
                scale = 1 / math.sqrt(2 * len(self.layers)) if name.endswith("proj.weight") else 1.0
                nn.init.normal_(parameter, 0.0, INIT_STD * scale, generator=generator)
