"""Huginn: prelude, adapter, core, coda (Geiping et al. 2025, arXiv 2502.05171). Names follow its checkpoint."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rdlm.config.model import HuginnConfig
from rdlm.models.base import Backbone
from rdlm.models.blocks import SandwichBlock
from rdlm.nn.attention import Attention
from rdlm.nn.context import AttentionContext
from rdlm.nn.mlp import GatedMLP
from rdlm.nn.modulation import Condition, NoiseEmbedding
from rdlm.nn.norm import RMSNorm
from rdlm.nn.table import TokenTable


class Huginn(Backbone):
    """e = prelude(embed(ids)); state = core(adapter([state, e])) K times; hidden = ln_f(coda(ln_f(state)))."""

    def __init__(self, config: HuginnConfig) -> None:
        super().__init__()
        self.config, self.vocab_size = config, config.vocab_size
        self.head_dim, self.num_kv_heads = config.d_model // config.num_heads, config.num_heads
        self.num_cache_layers = config.num_layers
        self.embed_scale = math.sqrt(config.d_model)
        self.wte = TokenTable(config.vocab_size, config.d_model)
        self.noise_embedding = NoiseEmbedding(config.noise_embed_dim) if config.noise_conditioning else None
        first_core, first_coda = config.num_prelude_layers, config.num_prelude_layers + config.num_core_layers
        cond_width = config.noise_embed_dim if config.noise_conditioning else None
        self.prelude = nn.ModuleList(self._block(i, None) for i in range(first_core))
        self.adapter = nn.Linear(2 * config.d_model, config.d_model, bias=False)
        self.core_block = nn.ModuleList(self._block(i, cond_width) for i in range(first_core, first_coda))
        self.coda = nn.ModuleList(self._block(i, None) for i in range(first_coda, config.num_layers))
        self.ln_f = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else TokenTable(config.vocab_size, config.d_model)

    def _block(self, layer: int, cond_width: int | None) -> SandwichBlock:
        c = self.config
        attn = Attention(c.d_model, c.num_heads, c.num_heads, c.rope_base, c.qk_bias, layer)
        return SandwichBlock(attn, GatedMLP(c.d_model, c.mlp_width), c.d_model, c.norm_eps, cond_width)

    @property
    def core_layers(self) -> nn.ModuleList:
        return self.core_block

    def encode(self, inputs: Tensor, ctx: AttentionContext) -> Tensor:
        e = self.embed(inputs)
        for block in self.prelude:
            e = block(e, ctx)
        return e

    def initial_state(self, e: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Zeros, or Huginn's "like-init": normal of std sqrt(2/5D) cut at three of them, times the embedding scale."""
        if self.config.state_init == "zero":
            return torch.zeros_like(e)
        std = initial_std(self.config.d_model)
        state = torch.empty(e.shape, dtype=torch.float32, device=generator.device if generator else e.device)
        nn.init.trunc_normal_(state, 0.0, std, -3 * std, 3 * std, generator=generator)
        return (state * self.embed_scale).to(e)

    def core(self, state: Tensor, e: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        x = self.adapter(torch.cat([state, e], dim=-1))  # [B, T, 2D] -> [B, T, D], the state first
        for i, block in enumerate(self.core_block):
            x = block(x, ctx, None if cond is None else cond[i])
        return x

    def decode(self, state: Tensor, ctx: AttentionContext) -> Tensor:
        x = self.ln_f(state)
        for block in self.coda:
            x = block(x, ctx)
        return self.ln_f(x)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Takase et al. 2023 as Huginn uses it. Drawn in fp32 from ``generator`` in parameter order.

        | weight                        | initial value                                               |
        |-------------------------------|-------------------------------------------------------------|
        | wte, lm_head, Wqkv, mlp.fc    | normal, std = sqrt(2 / (5 D))                               |
        | attn.proj, mlp.proj           | normal, std / sqrt(2 * effective depth) (residual_init)     |
        | adapter                       | [0, I] (config identity) or normal, std                     |
        | norms 1, biases 0, modulation | constants; AdaLN starts at zero                             |
        | noise_embedding               | normal, std 0.02                                            |
        """
        config, std = self.config, initial_std(self.config.d_model)
        # Huginn counts every core run of a training step; rdlm's default trains about four, Huginn-0125 thirty-two.
        depth = config.num_prelude_layers + 4 * config.num_core_layers + config.num_coda_layers
        for name, parameter in self.named_parameters():
            if "norm" in name or "ln_f" in name:
                parameter.fill_(1.0)
            elif "modulation" in name or name.endswith("bias"):
                parameter.zero_()
            elif name == "adapter.weight" and config.adapter_init == "identity":
                parameter.zero_()
                parameter[:, config.d_model :].fill_diagonal_(1.0)
            elif "noise_embedding" in name:
                nn.init.normal_(parameter, 0.0, 0.02, generator=generator)
            else:
                scaled = config.residual_init == "scaled" and name.endswith("proj.weight")
                scale = 1 / math.sqrt(2 * depth) if scaled else 1.0
                nn.init.normal_(parameter, 0.0, std * scale, generator=generator)


def initial_std(d_model: int) -> float:
    """sqrt(2 / (5 D)): 0.0087 for Huginn-0125."""
    return math.sqrt(2 / (5 * d_model))
