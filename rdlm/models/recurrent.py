"""The one recurrent-depth text model: a layer layout and a loop topology, both data (RecurrentConfig).

e = prelude(embed(ids)); state = core(inject(state, e)) K times; hidden = norm(coda(readout(state))). Huginn
(Geiping et al. 2025, whose names the parameters have), Ouro, Parcae, Llama, a masked diffusion transformer:
settings. A plain transformer is a core that runs once.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdlm.config.model import RecurrentConfig, initial_std
from rdlm.device import staged
from rdlm.models.base import Backbone, Take, init_weights
from rdlm.nn.attention import AttentionContext, BidirectionalContext
from rdlm.nn.layers import (
    Condition,
    Layers,
    NoiseEmbedding,
    RMSNorm,
    TokenTable,
    TransformerLayer,
    normalized,
)
from rdlm.random_streams import CounterStream, HashedStream, Stream


class Recurrent(Backbone):
    """See the module. Built from a part of its layers it is a block: embedding, these layers, norm and
    read-out, all its own."""

    def __init__(self, config: RecurrentConfig, layers: range | None = None) -> None:
        """layers: which of a plain network's layers, None for all."""
        super().__init__()
        layer, loop, width = config.layer, config.loop, config.d_model
        self.config, self.vocab_size, self.embed_scale = config, config.vocab_size, config.embed_scale
        self.head_dim, self.num_kv_heads = layer.head_width(width), layer.num_kv_heads or layer.num_heads
        self.num_cache_layers, self.is_causal = config.num_layers, not config.masked
        first_core, first_coda = loop.num_prelude_layers, loop.num_prelude_layers + loop.num_core_layers
        self.wte = TokenTable(config.vocab_size, width)
        self.noise_embedding = NoiseEmbedding(config.noise_embed_dim) if config.noise_conditioning else None
        # A table of its own, so that the read-out, tied to the other one, has no mask among its answers.
        self.mask_row = TokenTable(1, width) if config.masked else None
        self.prelude = Layers(self._layer(i) for i in range(first_core))
        self.input_norm = RMSNorm(width, layer.norm_eps) if loop.input_norm else None
        self.adapter = _adapter(config)
        core = Layers(self._layer(i, is_core=True) for i in layers or range(first_core, first_coda))
        self.core_name = "core_block" if loop.iterates else "layers"
        self.add_module(self.core_name, core)
        self.step_gate = StepGate(width, loop.step_gate_width) if loop.step_gate_width else None
        self.readout = nn.Linear(width, width, bias=False) if loop.readout == "linear" else None
        self.coda = Layers(self._layer(i) for i in range(first_coda, config.num_layers))
        self.ln_f = RMSNorm(width, layer.norm_eps)
        self.lm_head = None if config.tie_embeddings else TokenTable(config.vocab_size, width)
        kv_width = self.num_kv_heads * self.head_dim
        self.value_embeds = nn.ModuleDict(
            {str(i): TokenTable(config.vocab_size, kv_width) for i in config.value_embeddings}
        )
        of_core = [i for i in config.value_embeddings if first_core <= i < first_coda]
        of_coda = [i for i in config.value_embeddings if i >= first_coda]
        self._in_e = {
            i: slice(width + n * kv_width, width + (n + 1) * kv_width) for n, i in enumerate(of_core)
        }
        """Where e holds the value embeddings of a core layer. Behind them are those of the coda, which a
        state carries there."""
        self._in_state = {
            i: slice(width + n * kv_width, width + (n + 1) * kv_width) for n, i in enumerate(of_coda)
        }
        self.exit_gate = (
            None if loop.exit_gate == "none" else ExitGate(width, loop.exit_gate == "norm_linear")
        )
        self.has_exit_gate = self.exit_gate is not None
        self.state_is_random = loop.state == "normal" and bool(loop.state_std)
        self.hashes_state = self.state_is_random and loop.state_hash
        self.draws_state = loop.state != "embedding" and loop.injection != "replace"

    def _layer(self, place: int, is_core: bool = False) -> TransformerLayer:
        config = self.config
        return TransformerLayer(
            config.layer,
            config.d_model,
            place,
            cond_width=config.noise_embed_dim if is_core and config.noise_conditioning else None,
            mlp_width=config.loop.core_mlp_width if is_core else None,
            value_gate_width=config.value_gate_width if place in config.value_embeddings else None,
        )

    @property
    def core_layers(self) -> Layers:
        return cast(Layers, getattr(self, self.core_name))

    @property
    def core_cache_layers(self) -> range:
        first = len(self.prelude)
        return range(first, first + len(self.core_layers))

    @property
    def mask_id(self) -> int:
        """Id that stands for a masked token, of masked models: the first one behind the vocabulary."""
        return self.vocab_size

    def context(self, inputs: Tensor, documents: Tensor | None = None) -> AttentionContext:
        if self.is_causal:
            return super().context(inputs, documents)
        assert documents is None, "train/config_file.py refuses documents for masked models"
        return BidirectionalContext(inputs.shape[1], inputs.device)

    def embed(self, input_ids: Tensor) -> Tensor:
        if self.mask_row is None:
            return super().embed(input_ids)
        masked = input_ids == self.mask_id
        rows = super().embed(input_ids.masked_fill(masked, 0))
        return torch.where(masked.unsqueeze(-1), self.mask_row(torch.zeros_like(input_ids)), rows)

    def encode(self, inputs: Tensor, ctx: AttentionContext) -> Tensor:
        """-> e [B, T, E]: D channels, then the value embeddings of the layers behind the prelude."""
        e = self.embed(inputs)
        values = {int(i): table(inputs) for i, table in self.value_embeds.items()}
        e = self.prelude.through(e, ctx, None, [values.get(i) for i in range(len(self.prelude))])
        if self.input_norm is not None:
            e = self.input_norm(e)
        later = [values[i] for i in (*self._in_e, *self._in_state)]
        return torch.cat([e, *later], dim=-1) if later else e

    def state_of(self, latent: Tensor, e: Tensor, num_steps: int | None) -> Tensor:
        """The latent, then the value embeddings of the coda, which no step changes."""
        if not self._in_state:
            return latent
        return torch.cat([latent, e[..., -len(self._in_state) * self.num_kv_heads * self.head_dim :]], dim=-1)

    def initial_latent(self, e: Tensor, generator: Stream | HashedStream | None) -> Tensor:
        """Zeros, e, or a normal draw (of Huginn: std sqrt(2 / 5D) cut at three of them, times the embedding
        scale)."""
        e, loop = self._first(e), self.config.loop
        if loop.state == "zero":
            return torch.zeros_like(e)
        if loop.state == "embedding":
            return e
        std, cut = loop.state_std or 0.0, loop.state_cut
        if isinstance(generator, HashedStream):
            hashed = generator.normals(e.shape[1], e.shape[2], e.device)
            return (std * loop.state_scale * hashed).to(e).expand_as(e)
        if isinstance(generator, CounterStream):
            rows = torch.arange(e.shape[0] * e.shape[1], device=e.device)
            drawn = generator.normals(rows, e.shape[2], None if std == 0 else cut)
            return (std * loop.state_scale * drawn.view(e.shape)).to(e)
        state = torch.empty(e.shape, dtype=torch.float32, device=generator.device if generator else e.device)
        if cut is None or std == 0:
            nn.init.normal_(state, 0.0, std, generator=generator)
        else:
            nn.init.trunc_normal_(state, 0.0, std, -cut * std, cut * std, generator=generator)
        return staged(state * loop.state_scale, e.device).to(e)

    def core(self, state: Tensor, e: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        latent = self._first(state)
        x = self._inject(latent, self._first(e))
        x = self.core_layers.through(x, ctx, cond, self._values(e, self._in_e, self.core_cache_layers))
        if self.step_gate is not None:
            x = self.step_gate(latent, x)
        match self.config.loop.boundary_norm:
            case "weighted":
                x = self.ln_f(x)
            case "unweighted":
                x = normalized(x, self.config.layer.norm_eps)
        return torch.cat([x, state[..., self.config.d_model :]], dim=-1) if self._in_state else x

    def decode(self, state: Tensor, ctx: AttentionContext) -> Tensor:
        x, loop = self._first(state), self.config.loop
        match loop.readout:
            case "norm":
                x = self.ln_f(x)
            case "linear":
                x = cast(nn.Linear, self.readout)(x)
        first = self.core_cache_layers.stop
        of_coda = range(first, first + len(self.coda))
        x = self.coda.through(x, ctx, None, self._values(state, self._in_state, of_coda))
        return self.ln_f(x) if loop.final_norm else x

    def latent(self, state: Tensor) -> Tensor:
        return self._first(state)

    def gate(self, state: Tensor) -> Tensor:
        if self.exit_gate is None:
            return super().gate(state)
        return torch.sigmoid(self.exit_gate(self._first(state)).float()).squeeze(-1)

    def init_weights(self, generator: torch.Generator, take: Take | None = None) -> None:
        """See rdlm.models.base.init_weights.

        Residual projections are smaller by sqrt(2 * depth). Huginn counts every core run of a training step;
        rdlm's default trains about four, Huginn-0125 thirty-two.
        """
        config, loop = self.config, self.config.loop
        std = initial_std(config.d_model) if config.init.std is None else config.init.std
        runs = 4 if loop.iterates else 1
        depth = len(self.prelude) + runs * len(self.core_layers) + len(self.coda)
        scale = 1 / math.sqrt(2 * depth) if config.init.residual == "scaled" else 1.0
        identity = config.init.adapter == "identity"
        init_weights(self, generator, std=std, residual_std=std * scale, identity_adapter=identity, take=take)

    @staticmethod
    def _values(rows: Tensor, where: dict[int, slice], layers: range) -> list[Tensor | None] | None:
        """The value embeddings of layers that e or a state carries behind its first channels."""
        return [rows[..., where[i]] if i in where else None for i in layers] if where else None

    def _first(self, rows: Tensor) -> Tensor:
        """The first D channels of e or of a state: all of them, unless value embeddings are behind them."""
        return rows[..., : self.config.d_model] if rows.shape[-1] > self.config.d_model else rows

    def _inject(self, state: Tensor, e: Tensor) -> Tensor:
        loop = self.config.loop
        match loop.injection:
            case "none":
                return state
            case "replace":
                return e
            case "add":
                return state + e
            case "linear":
                scale = loop.injection_state_scale
                scaled = state if scale == 1.0 else scale * state
                return cast(nn.Linear, self.adapter)(torch.cat([scaled, e], dim=-1))  # the state first
            case _:
                return cast(DiagonalInjection, self.adapter)(state, e)


class DiagonalInjection(nn.Module):
    """decay * state + step * (B e), channel by channel: step = softplus(dt_bias), decay = exp(-step
    exp(A_log)) (Parcae, arXiv 2604.12946)."""

    def __init__(self, d_model: int, is_orthogonal: bool, eps: float) -> None:
        """is_orthogonal: what is injected replaces the state's part along it (IFM LoopedLM P2, "OrthoInj"); eps:
        added to its squared length."""
        super().__init__()
        self.is_orthogonal, self.eps = is_orthogonal, eps
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(d_model)), nn.Parameter(torch.empty(d_model))
        self.B = nn.Linear(d_model, d_model, bias=False)

    def forward(self, state: Tensor, e: Tensor) -> Tensor:  # [..., D], [..., D] -> [..., D]
        step = F.softplus(self.dt_bias.float())
        kept = torch.exp(-step * self.A_log.float().exp()) * state.float()
        injected = step * self.B(e).float()
        if self.is_orthogonal:
            along = (kept * injected).sum(-1, keepdim=True) / (
                injected.square().sum(-1, keepdim=True) + self.eps
            )
            kept = kept - injected * along
        return (kept + injected).to(state.dtype)


class StepGate(nn.Module):
    """share * new + (1 - share) * old, with share = exp(-softplus(W2 W1 (new - old) + b) exp(A_log)) (LoopUS,
    arXiv 2605.11011)."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(d_model))
        self.dt_in, self.dt_out = nn.Linear(d_model, width, bias=False), nn.Linear(width, d_model)

    def forward(self, old: Tensor, new: Tensor) -> Tensor:  # [..., D], [..., D] -> [..., D]
        step = F.softplus(self.dt_out(self.dt_in(new - old)).float())
        share = torch.exp(-step * self.A_log.float().exp()).to(new.dtype)
        return share * new + (1 - share) * old


class ExitGate(nn.Module):
    """A logit of stopping at each state: Linear(D -> 1) with bias, with or without a LayerNorm before it."""

    def __init__(self, d_model: int, has_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model) if has_norm else None
        self.linear = nn.Linear(d_model, 1)

    def forward(self, state: Tensor) -> Tensor:  # [..., D] -> [..., 1]
        return self.linear(state if self.norm is None else self.norm(state))


def _adapter(config: RecurrentConfig) -> nn.Linear | DiagonalInjection | None:
    match config.loop.injection:
        case "linear":
            return nn.Linear(2 * config.d_model, config.d_model, bias=config.loop.injection_bias)
        case "diagonal" | "diagonal_orthogonal":
            is_orthogonal = config.loop.injection == "diagonal_orthogonal"
            return DiagonalInjection(config.d_model, is_orthogonal, config.loop.injection_eps)
        case _:
            return None
