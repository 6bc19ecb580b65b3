"""What every architecture that names something (tokens, classes) answers to, and the parts that do not differ
between them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from rdlm.errors import UserError
from rdlm.nn.attention import AttentionContext, CausalContext, DocumentContext
from rdlm.nn.layers import Condition, Modulation, NoiseEmbedding, RMSNorm, TokenTable
from rdlm.random_streams import HashedStream, Stream, generator

Take = Callable[[str, Tensor], None]
"""(name of a parameter, its initial value in fp32) -> None."""


class Backbone(nn.Module, ABC):
    """encode -> core (any number of times) -> decode -> logits.

    Shapes: inputs, of text, [B, T] int64; e [B, T, E] and state [B, T, S], opaque but row by row: what the
    later parts need of the inputs, and what a step changes (its first D channels are the latent, S is D in
    most models); hidden [B, T, D]; logits [..., V]; cond: one entry per core layer. A subclass sets the
    attributes below and defines encode, core and decode.
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
    is_prefix_lm: bool = False
    """Whether it was trained on prompts whose rows see each other in both directions."""
    has_exit_gate: bool = False
    """Whether ``gate`` was trained."""
    depends_on_num_steps: bool = False
    """Whether a step depends on how many there will be, so that the states of K steps are not the first K
    states of more."""
    takes_step_sizes: bool = False
    """Whether steps have lengths that can be given: see ``sized_core``."""
    hashes_state: bool = False
    """Whether it is to be drawn from a HashedStream at inference."""
    state_is_random: bool = False
    """Whether the state before the first step is drawn from a generator."""
    draws_state: bool = True
    """Whether the state before the first step is free: drawn, zero or given."""
    modulates_in_layers: bool = False
    """Whether a core layer computes its modulation itself whenever it runs, instead of once per level for all
    core steps. A layer that is recomputed then keeps nothing of it."""

    @abstractmethod
    def encode(self, inputs: Tensor, ctx: AttentionContext) -> Tensor:
        """Everything that depends on the inputs alone, computed once for all K steps. -> e [B, T, E]"""

    @abstractmethod
    def core(self, state: Tensor, e: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        """One core step. state [B, T, S], e [B, T, E] -> [B, T, S]"""

    def sized_core(
        self, state: Tensor, e: Tensor, time: Tensor | float, size: Tensor | float, ctx: AttentionContext
    ) -> Tensor:
        """``core`` as a step of length ``size`` that begins at ``time``, of all rows or fp32 [B, T] of each; only
        where ``takes_step_sizes``."""
        raise TypeError("the steps of this model have no lengths")

    @abstractmethod
    def decode(self, state: Tensor, ctx: AttentionContext) -> Tensor:
        """Coda and final norm. [B, T, S] -> hidden [B, T, D]"""

    @abstractmethod
    def init_weights(self, generator: torch.Generator, take: Take | None = None) -> None:
        """Draw every weight from ``generator`` in fp32; each architecture tables what it draws. take: is given
        the weights, one at a time, in the place of a network that has no memory for them (meta)."""

    def context(self, inputs: Tensor, documents: Tensor | None = None) -> AttentionContext:
        """How the rows of whole sequences see each other where nothing is cached. documents [B, T] int64: the
        sequence is made of several, which do not."""
        if documents is not None:
            return DocumentContext(documents)
        return CausalContext(inputs.shape[1], inputs.device)

    def prefix_context(self, token_types: Tensor) -> AttentionContext:
        """The context where rows of type 1 form a prefix that sees itself in both directions; token_types [B,
        T] int64."""
        raise UserError("token_type_ids", "...", "this model knows no prefix", "leave them out")

    def empty_inputs(self, count: int, length: int) -> Tensor:
        """Inputs of ``count`` examples, of text ``length`` tokens long, without values: for counting what a
        pass allocates."""
        return torch.empty(count, length, dtype=torch.int64)

    def target_shape(self, inputs: Tensor) -> tuple[int, int]:
        """(B, targets of an example)."""
        return inputs.shape[0], inputs.shape[1]

    def initial_state(
        self,
        e: Tensor,
        generator: Stream | HashedStream | None = None,
        latent: Tensor | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """State before the first step [B, T, S]. latent [B, T, D]: given, not drawn.

        num_steps: how many steps there will be; only models with ``depends_on_num_steps`` need it.
        """
        return self.state_of(self.initial_latent(e, generator) if latent is None else latent, e, num_steps)

    def initial_latent(self, e: Tensor, generator: Stream | HashedStream | None) -> Tensor:
        """[B, T, D]: zeros unless the architecture says otherwise."""
        return torch.zeros_like(e)

    def state_of(self, latent: Tensor, e: Tensor, num_steps: int | None) -> Tensor:
        """The state [B, T, S] before the first step whose latent is given."""
        return latent

    def state_stream(self, seed: int) -> Stream | HashedStream:
        """What ``initial_state`` draws whole sequences from at inference."""
        return HashedStream(seed) if self.hashes_state else generator(seed)

    def latent(self, state: Tensor) -> Tensor:
        """What of a state the read-out sees, for measuring how far a step moved it: [..., S] -> [..., D]."""
        return state

    def gate(self, state: Tensor) -> Tensor:
        """Trained probability of stopping at a state: [..., S] -> [...] fp32; only where ``has_exit_gate``."""
        raise TypeError("this model has no exit gate")

    @property
    @abstractmethod
    def core_layers(self) -> nn.ModuleList:
        """The layers of one core step, first one first."""

    def condition(self, c_noise: Tensor) -> Condition | None:
        """The conditioning of the core layers on levels c_noise [B or 1, T or 1] fp32; None for an
        unconditioned model."""
        if self.noise_embedding is None:
            return None
        embedded = self.noise_embedding(c_noise)  # [B or 1, T or 1, C]
        if self.modulates_in_layers:
            return [embedded] * len(self.core_layers)
        return [cast(Modulation, layer.modulation)(embedded) for layer in self.core_layers]

    @property
    def core_cache_layers(self) -> range:
        """Numbers of those layers of a core step that keep keys and values."""
        return range(len(self.core_layers))

    @property
    def head(self) -> TokenTable:
        """The read-out table [V, D]."""
        return self.wte if self.lm_head is None else self.lm_head

    def embed(self, input_ids: Tensor) -> Tensor:
        rows = self.wte(input_ids)
        return rows * self.embed_scale if self.embed_scale != 1.0 else rows

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] fp32."""
        return self.head(hidden=hidden).float()


@torch.no_grad()
def init_weights(
    model: nn.Module,
    generator: torch.Generator,
    *,
    std: float,
    residual_std: float,
    identity_adapter: bool = True,
    take: Take | None = None,
) -> None:
    """Drawn in fp32 from ``generator`` in parameter order, in place or for ``take``.

    | weight                              | initial value                                                            |
    |-------------------------------------|--------------------------------------------------------------------------|
    | attn.proj, mlp.proj                 | normal, ``residual_std``                                                 |
    | norms 1, AdaLN, biases and decays 0 | constants                                                                |
    | adapter                             | [0, I]; 0 where it takes the state alone; ``std`` if not identity        |
    | noise_embedding                     | normal, 0.02                                                             |
    | patches.linear                      | normal, 1 / sqrt(values of a patch): rows of size 1 (Dosovitskiy et al.) |
    | patches.places, classes (of DiT)    | normal, 0.5: at 0.02 rows of size 1 drown them for hundreds of updates   |
    | pixels (DiT's read-out)             | 0 (Peebles and Xie 2023)                                                 |
    | all others                          | normal, ``std``                                                          |
    """
    for name, own in list(model.named_parameters()):
        parameter: Tensor = own if take is None else torch.empty(own.shape)
        if name.endswith(("bias", "A_log")) or "modulation" in name or name == "pixels.weight":
            parameter.zero_()
        elif "norm" in name or "ln_f" in name:
            parameter.fill_(1.0)
        elif name == "adapter.weight" and identity_adapter:
            width = parameter.shape[0]
            parameter.zero_()
            if parameter.shape[1] > width:
                parameter[:, width:].fill_diagonal_(1.0)
        elif "noise_embedding" in name:
            nn.init.normal_(parameter, 0.0, 0.02, generator=generator)
        elif name in ("patches.places", "classes.weight"):
            nn.init.normal_(parameter, 0.0, 0.5, generator=generator)
        elif name == "patches.linear.weight":
            nn.init.normal_(parameter, 0.0, 1 / math.sqrt(parameter.shape[1]), generator=generator)
        else:
            drawn = residual_std if name.endswith("proj.weight") else std
            nn.init.normal_(parameter, 0.0, drawn, generator=generator)
        if take is not None:
            take(name, parameter)
