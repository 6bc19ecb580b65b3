"""HRM-Text (arXiv 2605.20613): a low and a high stack that read each other's states."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rdlm.config.model import HrmConfig, initial_std
from rdlm.models.base import Backbone, Take, init_weights
from rdlm.nn.attention import AttentionContext, LaterLayers, PrefixContext
from rdlm.nn.layers import Condition, Layers, TokenTable, TransformerLayer, normalized
from rdlm.random_streams import HashedStream, Stream


class Hrm(Backbone):
    """A step: ``num_low_cycles`` times low = L(low + high), then high = H(high + low). logits = head(high).

    The state is [high | low]. Each stack ends with a norm without a weight, so there is no final one.
    """

    noise_embedding = None
    draws_state = False

    def __init__(self, config: HrmConfig) -> None:
        super().__init__()
        width, layer, count = config.d_model, config.layer, config.num_stack_layers
        self.config, self.vocab_size, self.embed_scale = config, config.vocab_size, config.embed_scale
        self.head_dim, self.num_kv_heads = layer.head_width(width), layer.num_kv_heads or layer.num_heads
        self.is_prefix_lm = config.prefix_lm
        self.num_cache_layers = (config.num_low_cycles + 1) * count
        self.wte = TokenTable(config.vocab_size, width)
        first_high = config.num_low_cycles * count
        self.low = Layers(TransformerLayer(layer, width, i) for i in range(count))
        self.high = Layers(TransformerLayer(layer, width, first_high + i) for i in range(count))
        self.low_init = LowState(width)
        self.lm_head = TokenTable(config.vocab_size, width)

    @property
    def core_layers(self) -> nn.ModuleList:
        return nn.ModuleList([*self.low, *self.high])

    @property
    def core_cache_layers(self) -> range:
        return range(self.num_cache_layers)

    def prefix_context(self, token_types: Tensor) -> AttentionContext:
        return PrefixContext(token_types == 1)

    def encode(self, inputs: Tensor, ctx: AttentionContext) -> Tensor:
        return self.embed(inputs)

    def initial_latent(self, e: Tensor, generator: Stream | HashedStream | None) -> Tensor:
        return e

    def state_of(self, latent: Tensor, e: Tensor, num_steps: int | None) -> Tensor:
        """[latent | a learned vector]."""
        return torch.cat([latent, self.low_init(latent)], dim=-1)

    def core(self, state: Tensor, e: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        high, low = state.chunk(2, dim=-1)
        for cycle in range(self.config.num_low_cycles):
            low = self._stack(self.low, low + high, LaterLayers(ctx, cycle * len(self.low)))
        return torch.cat([self._stack(self.high, high + low, ctx), low], dim=-1)

    def _stack(self, layers: Layers, x: Tensor, ctx: AttentionContext) -> Tensor:
        return normalized(layers.through(x, ctx), self.config.layer.norm_eps)

    def latent(self, state: Tensor) -> Tensor:
        return state[..., : self.config.d_model]

    def decode(self, state: Tensor, ctx: AttentionContext) -> Tensor:
        return self.latent(state)

    def init_weights(self, generator: torch.Generator, take: Take | None = None) -> None:
        """See rdlm.models.base.init_weights; the low state starts like a matrix."""
        std = initial_std(self.config.d_model)
        init_weights(self, generator, std=std, residual_std=std / math.sqrt(4 * len(self.low)), take=take)


class LowState(nn.Module):
    """The low stack's state before the first step, the same at every position."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))

    def forward(self, like: Tensor) -> Tensor:  # [..., D] -> [..., D]
        return self.weight.expand_as(like)
