"""LoopFormer (arXiv 2602.11451): layers that know at which time of the loop they run, and how long the step
is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdlm.config.model import LoopFormerConfig, initial_std
from rdlm.models.base import Backbone, Take, init_weights
from rdlm.nn.attention import AttentionContext
from rdlm.nn.layers import Condition, Layers, RMSNorm, TokenTable, TransformerLayer
from rdlm.random_streams import HashedStream, Stream

NUM_FREQUENCIES = 128


class LoopFormer(Backbone):
    """x = embed(ids) + place; K times x = layers(x; k / K, 1 / K); hidden = norm(x).

    The state is [x | k | K]: whole numbers, which half precision keeps exactly up to 256.
    """

    noise_embedding = None
    draws_state = False
    depends_on_num_steps = True
    takes_step_sizes = True

    def __init__(self, config: LoopFormerConfig) -> None:
        super().__init__()
        width, layer = config.d_model, config.layer
        self.config, self.vocab_size = config, config.vocab_size
        self.head_dim, self.num_kv_heads = layer.head_width(width), layer.num_kv_heads or layer.num_heads
        self.num_cache_layers = config.num_layers
        self.wte, self.wpe = TokenTable(config.vocab_size, width), TokenTable(config.max_seq_len, width)
        self.time, self.length = StepEmbedding(width), StepEmbedding(width)
        self.core_block = Layers(TransformerLayer(layer, width, i) for i in range(config.num_layers))
        self.modulation = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(config.num_layers))
        self.ln_f = RMSNorm(width, layer.norm_eps)
        self.lm_head = None if config.tie_embeddings else TokenTable(config.vocab_size, width)

    @property
    def core_layers(self) -> nn.ModuleList:
        return self.core_block

    def encode(self, inputs: Tensor, ctx: AttentionContext) -> Tensor:
        return self.embed(inputs) + self.wpe(ctx.positions())

    def initial_latent(self, e: Tensor, generator: Stream | HashedStream | None) -> Tensor:
        return e

    def state_of(self, latent: Tensor, e: Tensor, num_steps: int | None) -> Tensor:
        """[latent | step | number of steps]."""
        assert num_steps is not None, "a step of this model depends on how many there will be"
        one = latent[..., :1]
        return torch.cat([latent, torch.zeros_like(one), torch.full_like(one, num_steps)], dim=-1)

    def core(self, state: Tensor, e: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        x, step, num_steps = state.split([self.config.d_model, 1, 1], dim=-1)
        whole = num_steps.float().squeeze(-1)
        x = self._layers(x, step.float().squeeze(-1) / whole, 1 / whole, ctx)
        return torch.cat([x, step + 1, num_steps], dim=-1)

    def sized_core(
        self, state: Tensor, e: Tensor, time: Tensor | float, size: Tensor | float, ctx: AttentionContext
    ) -> Tensor:
        x, step, num_steps = state.split([self.config.d_model, 1, 1], dim=-1)
        like = torch.ones_like(step, dtype=torch.float32).squeeze(-1)
        return torch.cat([self._layers(x, time * like, size * like, ctx), step + 1, num_steps], dim=-1)

    def _layers(self, x: Tensor, time: Tensor, size: Tensor, ctx: AttentionContext) -> Tensor:
        """x [B, T, D]; time, size [B, T] fp32 -> [B, T, D]."""
        embedded = F.silu(self.time(time) + self.length(size))  # [B, T, D]
        none = torch.zeros_like(x)  # there are no shifts
        cond = []
        for modulation in self.modulation:
            gate_a, gate_m, scale_a, scale_m = modulation(embedded).chunk(4, dim=-1)
            cond.append((none, 1 + scale_a, gate_a, none, 1 + scale_m, gate_m))
        return self.core_block.through(x, ctx, cond)

    def latent(self, state: Tensor) -> Tensor:
        return state[..., : self.config.d_model]

    def decode(self, state: Tensor, ctx: AttentionContext) -> Tensor:
        return self.ln_f(self.latent(state))

    def init_weights(self, generator: torch.Generator, take: Take | None = None) -> None:
        """See rdlm.models.base.init_weights."""
        std = initial_std(self.config.d_model)
        residual = std / math.sqrt(2 * self.config.num_layers)
        init_weights(self, generator, std=std, residual_std=residual, take=take)


class StepEmbedding(nn.Module):
    """[...] fp32 in [0, 1] -> [..., D]: 128 cosines and sines, then a two-layer MLP."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.fc_1, self.fc_2 = nn.Linear(2 * NUM_FREQUENCIES, d_model), nn.Linear(d_model, d_model)

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=t.device)
        angles = t.unsqueeze(-1) * torch.exp(-math.log(10_000.0) * steps / NUM_FREQUENCIES)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc_1.weight.dtype)
        return self.fc_2(F.silu(self.fc_1(waves)))
