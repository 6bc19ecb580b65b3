"""Llama-style autoregressive transformer (Touvron et al. 2023). Its layers are the core; it runs once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rdlm.config import LlamaConfig
from rdlm.context import AttentionContext
from rdlm.layers.attention import Attention
from rdlm.layers.mlp import GatedMLP
from rdlm.layers.modulation import Condition, NoiseEmbedding
from rdlm.layers.norm import RMSNorm
from rdlm.layers.table import TokenTable
from rdlm.models.blocks import PreNormBlock
from rdlm.models.text import TextModel

INIT_STD = 0.02


class Llama(TextModel):
    """hidden = norm(layers(embed(ids))); with noise conditioning the noised target enters through an adapter [z, e].

    Built from a part of its layers it is a block: embedding, adapter, these layers, norm and read-out, all its own.
    """

    is_recurrent = False

    def __init__(self, config: LlamaConfig, layers: range | None = None) -> None:
        """layers: which of the network's layers, None for all; they keep their places in the cache."""
        super().__init__()
        places = layers or range(config.num_layers)
        self.config, self.vocab_size = config, config.vocab_size
        self.head_dim, self.num_kv_heads = config.d_model // config.num_heads, config.num_kv_heads or config.num_heads
        self.num_cache_layers = config.num_layers
        self.wte = TokenTable(config.vocab_size, config.d_model)
        noisy, cond_width = config.noise_conditioning, config.noise_embed_dim
        self.noise_embedding = NoiseEmbedding(cond_width) if noisy else None
        self.adapter = nn.Linear(2 * config.d_model, config.d_model, bias=False) if noisy else None
        self.layers = nn.ModuleList(self._block(i, cond_width if noisy else None) for i in places)
        self.ln_f = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else TokenTable(config.vocab_size, config.d_model)

    def _block(self, layer: int, cond_width: int | None) -> PreNormBlock:
        c = self.config
        attn = Attention(c.d_model, c.num_heads, self.num_kv_heads, c.rope_base, False, layer)
        return PreNormBlock(attn, GatedMLP(c.d_model, c.mlp_width), c.d_model, c.norm_eps, cond_width)

    @property
    def core_layers(self) -> nn.ModuleList:
        return self.layers

    def encode(self, input_ids: Tensor, ctx: AttentionContext) -> Tensor:
        return self.embed(input_ids)

    def core(self, state: Tensor, e: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        # At one scale with the embedding: coordinates of size 1 drown one that starts at 0.02 as soon as the adapter moves.
        x = e if self.adapter is None else self.adapter(torch.cat([INIT_STD * state, e], dim=-1))
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
                parameter[:, self.config.d_model :].fill_diagonal_(1.0)
            else:
                scale = 1 / math.sqrt(2 * len(self.layers)) if name.endswith("proj.weight") else 1.0
                nn.init.normal_(parameter, 0.0, INIT_STD * scale, generator=generator)
