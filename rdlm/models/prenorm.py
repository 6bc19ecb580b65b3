"""Stacks of pre-norm layers (Touvron et al. 2023) that can be built in parts: what all families but Huginn share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rdlm.config.model import PreNormConfig, TextConfig, VitConfig
from rdlm.models.base import Backbone
from rdlm.models.blocks import PreNormBlock
from rdlm.nn.attention import Attention
from rdlm.nn.context import AttentionContext
from rdlm.nn.mlp import GatedMLP
from rdlm.nn.modulation import Condition, NoiseEmbedding
from rdlm.nn.norm import RMSNorm
from rdlm.nn.table import TokenTable

INIT_STD = 0.02


def pre_norm_layers(
    config: PreNormConfig,
    layers: range | None = None,
    num_kv_heads: int | None = None,
    rope_base: float | None = None,
) -> nn.ModuleList:
    """The layers of a network, or those of them that ``layers`` names; they keep their places in the cache."""
    cond_width = config.noise_embed_dim if config.noise_conditioning else None

    def layer(place: int) -> PreNormBlock:
        attn = Attention(
            config.d_model, config.num_heads, num_kv_heads or config.num_heads, rope_base, False, place
        )
        return PreNormBlock(
            attn, GatedMLP(config.d_model, config.mlp_width), config.d_model, config.norm_eps, cond_width
        )

    return nn.ModuleList(layer(place) for place in layers or range(config.num_layers))


def through(layers: nn.ModuleList, x: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
    """x [B, T, D] through all of them -> [B, T, D]."""
    for i, block in enumerate(layers):
        x = block(x, ctx, None if cond is None else cond[i])
    return x


@torch.no_grad()
def init_pre_norm(model: nn.Module, num_layers: int, generator: torch.Generator) -> None:
    """Drawn in parameter order.

    | weight                                  | initial value                                                            |
    |-----------------------------------------|--------------------------------------------------------------------------|
    | residual projections                    | normal, 0.02 / sqrt(2 L) (Radford et al. 2019)                           |
    | norms 1, AdaLN and biases 0, adapter    | constants; the adapter is [0, I], or 0 where it takes the state alone    |
    | patches.linear                          | normal, 1 / sqrt(values of a patch): rows of size 1 (Dosovitskiy et al.) |
    | patches.places, classes (of DiT)        | normal, 0.5: at 0.02 rows of size 1 drown them for hundreds of updates   |
    | pixels (DiT's read-out)                 | 0 (Peebles and Xie 2023)                                                 |
    | all others                              | normal, 0.02                                                             |
    """
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            parameter.fill_(1.0)
        elif "modulation" in name or name.endswith("bias") or name == "pixels.weight":
            parameter.zero_()
        elif name == "adapter.weight":
            width = parameter.shape[0]
            parameter.zero_()
            if parameter.shape[1] > width:
                parameter[:, width:].fill_diagonal_(1.0)
        elif name in ("patches.places", "classes.weight"):
            nn.init.normal_(parameter, 0.0, 0.5, generator=generator)
        elif name == "patches.linear.weight":
            nn.init.normal_(parameter, 0.0, 1 / math.sqrt(parameter.shape[1]), generator=generator)
        else:
            scale = 1 / math.sqrt(2 * num_layers) if name.endswith("proj.weight") else 1.0
            nn.init.normal_(parameter, 0.0, INIT_STD * scale, generator=generator)


class PreNormModel(Backbone):
    """Built from a part of its layers it is a block: embedding, stem, these layers, norm and read-out, all its own."""

    def __init__(
        self, config: TextConfig | VitConfig, layers: range | None = None, num_kv_heads: int | None = None
    ) -> None:
        """layers: which of the network's layers, None for all."""
        super().__init__()
        self.vocab_size = config.vocab_size
        self.head_dim, self.num_kv_heads = (
            config.d_model // config.num_heads,
            num_kv_heads or config.num_heads,
        )
        self.num_cache_layers = config.num_layers
        self.wte = TokenTable(config.vocab_size, config.d_model)
        self.noise_embedding = NoiseEmbedding(config.noise_embed_dim) if config.noise_conditioning else None
        self._add_stem(config)
        self.layers = pre_norm_layers(config, layers, num_kv_heads, config.rope_base)
        self.ln_f = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else TokenTable(config.vocab_size, config.d_model)

    def _add_stem(self, config: TextConfig | VitConfig) -> None:
        """What stands between embedding and layers."""

    @property
    def core_layers(self) -> nn.ModuleList:
        return self.layers

    def encode(self, inputs: Tensor, ctx: AttentionContext) -> Tensor:
        return self.embed(inputs)

    def through_layers(self, x: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        return through(self.layers, x, cond, ctx)

    def decode(self, state: Tensor, ctx: AttentionContext) -> Tensor:
        return self.ln_f(state)

    def init_weights(self, generator: torch.Generator) -> None:
        init_pre_norm(self, len(self.layers), generator)
