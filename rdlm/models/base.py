"""What every architecture that names something (tokens, classes) answers to, and the parts that do not differ between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor, nn

from rdlm.nn.context import AttentionContext, CausalContext
from rdlm.nn.modulation import Condition, Modulation, NoiseEmbedding
from rdlm.nn.norm import RMSNorm
from rdlm.nn.table import TokenTable


class Backbone(nn.Module, ABC):
    """encode -> core (any number of times) -> decode -> logits.

    Shapes: inputs, of text, [B, T] int64; e, state, hidden [B, T, D]; logits [..., V]; cond: one entry per core layer.
    A subclass sets the attributes below and defines encode, core and decode.
    """

    vocab_size: int
    num_cache_layers: int
    """Layers that keep keys and values: prelude first, then core, then coda."""
    num_kv_heads: int
    head_dim: int
    wte: TokenTable
    ln_f: RMSNorm
    lm_head: TokenTable | None
    """None where the read-out is tied to the embedding."""
    noise_embedding: NoiseEmbedding | None
    embed_scale: float = 1.0
    is_causal: bool = True
    """Whether rows of whole sequences see only what precedes them."""
    modulates_in_layers: bool = False
    """Whether a core layer computes its modulation itself whenever it runs, instead of once per level for all core steps. A layer that
    is recomputed then keeps nothing of it."""

    @abstractmethod
    def encode(self, inputs: Tensor, ctx: AttentionContext) -> Tensor:
        """Everything that depends on the inputs alone, computed once for all K steps. -> e [B, T, D]"""

    @abstractmethod
    def core(self, state: Tensor, e: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        """One core step. state, e [B, T, D] -> [B, T, D]"""

    @abstractmethod
    def decode(self, state: Tensor, ctx: AttentionContext) -> Tensor:
        """Coda and final norm. [B, T, D] -> hidden [B, T, D]"""

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw every weight from ``generator`` in fp32; each architecture tables what it draws."""

    def context(self, inputs: Tensor) -> AttentionContext:
        """How the rows of whole sequences see each other where nothing is cached."""
        return CausalContext(inputs.shape[1], inputs.device)

    def empty_inputs(self, count: int, length: int) -> Tensor:
        """Inputs of ``count`` examples, of text ``length`` tokens long, without values: for counting what a pass allocates."""
        return torch.empty(count, length, dtype=torch.int64)

    def target_shape(self, inputs: Tensor) -> tuple[int, int]:
        """(B, targets of an example)."""
        return inputs.shape[0], inputs.shape[1]

    def initial_state(self, e: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """State before the first step: zeros unless the architecture says otherwise."""
        return torch.zeros_like(e)

    @property
    @abstractmethod
    def core_layers(self) -> nn.ModuleList:
        """The layers of one core step, first one first."""

    def condition(self, c_noise: Tensor) -> Condition | None:
        """What the core layers are told about levels c_noise [B or 1, T or 1] fp32; None for an unconditioned model."""
        if self.noise_embedding is None:
            return None
        embedded = self.noise_embedding(c_noise)  # [B or 1, T or 1, C]
        if self.modulates_in_layers:
            return [embedded] * len(self.core_layers)
        return [cast(Modulation, layer.modulation)(embedded) for layer in self.core_layers]

    @property
    def head(self) -> TokenTable:
        """The read-out table [V, D]."""
        return self.wte if self.lm_head is None else self.lm_head

    def embed(self, input_ids: Tensor) -> Tensor:
        rows = self.wte(input_ids)
        return rows * self.embed_scale if self.embed_scale != 1.0 else rows

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] fp32."""
        return self.head(use=lambda weight: nn.functional.linear(hidden, weight).float())
