"""Recurrent-depth language models of rdlm for transformers: config and model, needing nothing but torch and
transformers.

e = prelude(embed(ids)); state = core(inject(state, e)) K times; logits = head(norm(coda(read-out(state)))).
``num_steps`` (K) is an argument of ``forward`` and ``generate``. The KV cache keeps keys and values of every
core step and layer. Shapes: B sequences, T new positions, S positions with the cached ones, D width, H query
heads, Hkv key-value heads, Dh head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

Modulation = tuple[Tensor, ...]
"""Shift, 1 + scale, 1 + gate of the attention branch, then of the MLP branch; each [1, 1, D]."""


class RdlmConfig(PreTrainedConfig):
    """``layout``: layers and loop (RecurrentConfig, HrmConfig or LoopFormerConfig of rdlm). ``read_out``: noise
    levels at which the network is read.

    ``num_steps``: K where none is given; ``max_num_steps``: the largest one. ``rdlm``: the whole config of
    the checkpoint that was exported, which only ``rdlm import`` reads.
    """

    model_type = "rdlm"

    def __init__(
        self,
        layout: dict[str, Any] | None = None,
        read_out: dict[str, Any] | None = None,
        num_steps: int = 1,
        max_num_steps: int = 1,
        rdlm: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.layout, self.read_out, self.rdlm = layout, read_out or {}, rdlm
        self.num_steps, self.max_num_steps = num_steps, max_num_steps
        super().__init__(**kwargs)


def namespace(value: Any) -> Any:
    """Nested dictionaries as attributes."""
    return (
        SimpleNamespace(**{k: namespace(v) for k, v in value.items()}) if isinstance(value, dict) else value
    )


class Rows:
    """The new rows of a call: their positions, whom they see, and the cache that their keys and values
    enter."""

    def __init__(self, positions: Tensor, mask: Tensor | None, cache: DynamicCache | None) -> None:
        """positions: [B or 1, T]; mask: bool [B or 1, 1, T, S], None where T = S and every row sees itself
        and the rows before."""
        self.positions, self.mask, self.cache = positions, mask, cache
        self.shift = 0
        """Added to the cache index of a layer: a core layer has an index of its own in every step."""
        self.table: Tensor | None = None

    def rotations(self, num_dims: int, rope: Any) -> Tensor:
        """exp(i position frequency): complex64 [B or 1, T, 1, num_dims / 2], frequencies in fp32 (Su et al.
        2021).

        Every layer of a model rotates alike, so they are computed once a call.
        """
        if self.table is None:
            self.table = self.computed_rotations(num_dims, rope)
        return self.table

    def computed_rotations(self, num_dims: int, rope: Any) -> Tensor:
        device = self.positions.device
        inverse = 1.0 / rope.base ** (torch.arange(0, num_dims, 2, dtype=torch.float32) / num_dims)
        if rope.scaling is not None:
            kept = self.kept(inverse, num_dims, rope.base, rope.scaling)
            inverse = (1 - kept) * inverse / rope.scaling.factor + kept * inverse
        angles = self.positions.to(torch.float32).unsqueeze(-1) * inverse.to(device)
        size = getattr(rope.scaling, "attention_factor", 1.0)
        return torch.polar(torch.full_like(angles, size), angles).unsqueeze(2)

    def kept(self, inverse: Tensor, num_dims: int, base: float, s: Any) -> Tensor:
        """Share of each frequency that is not divided by the factor: of Llama 3.1, YaRN, and plain division."""
        if hasattr(s, "low_freq_factor"):
            periods = s.original_max_seq_len / (2 * math.pi / inverse)
            return ((periods - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        if not hasattr(s, "beta_fast"):
            return torch.zeros_like(inverse)
        low, high = (
            num_dims * math.log(s.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (s.beta_fast, s.beta_slow)
        )
        if s.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, num_dims - 1)
        width = high - low if high != low else 0.001
        return 1 - ((torch.arange(len(inverse), dtype=torch.float32) - low) / width).clamp(0, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [B, T, H, Dh], k and v [B, T, Hkv, Dh] -> [B, T, H, Dh]."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        k, v = self.with_cached(k, v, layer + self.shift)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k,
            v,
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=k.shape[1] != q.shape[2],
        )
        return out.transpose(1, 2)

    def with_cached(self, k: Tensor, v: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, T, Dh] of this call -> those of all positions [B, Hkv, S, Dh]."""
        if self.cache is None:
            return k, v
        while len(self.cache.layers) <= index:
            self.cache.layers.append(DynamicLayer())
        return self.cache.update(k, v, index)


class NoisyRows(Rows):
    """Rows of a noisy stream: each sees the clean rows up to its own, which the cache holds, and itself
    (DiffusionBlocks App. E.4)."""

    def __init__(self, clean: Rows) -> None:
        super().__init__(clean.positions, None, clean.cache)
        length = clean.positions.shape[1]
        own = torch.eye(length, dtype=torch.bool, device=clean.positions.device)[None, None]
        seen = own.new_ones(length, length).tril()[None, None] if clean.mask is None else clean.mask
        self.mask = torch.cat([seen, own.expand(len(seen), -1, -1, -1)], -1)

    def with_cached(self, k: Tensor, v: Tensor, index: int) -> tuple[Tensor, Tensor]:
        assert self.cache is not None
        clean: Any = self.cache.layers[index]
        return torch.cat([clean.keys, k], 2), torch.cat([clean.values, v], 2)


def normalized(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis, in fp32, in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast to x's dtype, then times the weight where there is one."""

    def __init__(self, width: int, eps: float, has_weight: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if has_weight else None

    def forward(self, x: Tensor) -> Tensor:
        x = normalized(x, self.eps)
        return x if self.weight is None else x * self.weight


class Attention(nn.Module):
    """Multi-head attention as ``layout.layer`` describes it; Wqkv is q | k | v, rotations are of adjacent
    pairs."""

    def __init__(self, c: Any, d_model: int, index: int, value_gate_width: int | None) -> None:
        super().__init__()
        self.c, self.index = c, index
        self.num_heads, self.num_kv_heads = c.num_heads, c.num_kv_heads or c.num_heads
        self.head_dim = d_model // c.num_heads if c.head_dim is None else c.head_dim
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.Wqkv = nn.Linear(d_model, q_width + 2 * kv_width, bias=c.bias.startswith("qkv"))
        self.proj = nn.Linear(q_width, d_model, bias=c.bias == "qkvo")
        if c.bias == "qk":
            self.qk_bias = nn.Parameter(torch.zeros(2, 1, self.num_heads, self.head_dim))
        self.qk_eps = c.norm_eps if c.qk_norm_eps is None else c.qk_norm_eps
        if c.qk_norm in ("full", "head"):
            full = c.qk_norm == "full"
            self.q_norm = RMSNorm(q_width if full else self.head_dim, self.qk_eps)
            self.k_norm = RMSNorm(kv_width if full else self.head_dim, self.qk_eps)
        if value_gate_width is not None:
            self.value_gate = nn.Linear(value_gate_width, self.num_kv_heads, bias=False)
        if c.output_gate:
            self.output_gate = nn.Linear(d_model, q_width, bias=False)

    def forward(self, x: Tensor, rows: Rows, values: Tensor | None) -> Tensor:
        heads = self.Wqkv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 Hkv, Dh]
        qk, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.c.bias == "qk":
            qk = (qk + self.qk_bias.flatten(0, 2)).to(v.dtype)
        qk = self.normed(qk)
        if self.c.rope is not None:
            num_dims = self.c.rope.num_dims or self.head_dim
            table = rows.rotations(num_dims, self.c.rope)
            pairs = torch.view_as_complex(qk[..., :num_dims].float().unflatten(-1, (-1, 2)).contiguous())
            rotated = torch.view_as_real(pairs * table).flatten(-2).to(qk.dtype)
            qk = torch.cat([rotated, qk[..., num_dims:]], dim=-1)
        if values is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))
            v = v + gate.unsqueeze(-1) * values.unflatten(-1, (-1, self.head_dim))
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=2)
        attended = rows.attend(q, k, v, self.index).flatten(-2)
        if self.c.output_gate:
            attended = torch.sigmoid(self.output_gate(x)) * attended
        return self.proj(attended)

    def normed(self, qk: Tensor) -> Tensor:
        if self.c.qk_norm == "none":
            return qk
        if self.c.qk_norm == "head_unweighted":
            return normalized(qk, self.qk_eps)
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=2)
        if self.c.qk_norm == "head":
            return torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        q, k = self.q_norm(q.flatten(-2)), self.k_norm(k.flatten(-2))
        return torch.cat([q, k], dim=-1).unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    """proj(silu(gate) * up), proj(relu(fc x)^2) or proj(gelu(fc x)); gate and up are one matrix, gate
    first."""

    def __init__(self, c: Any, d_model: int, width: int) -> None:
        super().__init__()
        self.kind, self.scale = c.mlp, c.mlp_scale
        self.fc = nn.Linear(d_model, 2 * width if c.mlp == "swiglu" else width, bias=c.mlp_bias)
        self.proj = nn.Linear(width, d_model, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.fc(x)
        if self.kind == "swiglu":
            gate, up = wide.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = F.relu(wide).square() if self.kind == "relu2" else F.gelu(wide)
        return self.proj(inner if self.scale == 1.0 else self.scale * inner)


class AdaLN(nn.Module):
    """An embedded noise level [1, 1, C] -> the modulation of a layer."""

    def __init__(self, width: int, d_model: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * d_model)

    def forward(self, embedded: Tensor) -> Modulation:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.linear(embedded).chunk(6, dim=-1)
        return shift_a, 1 + scale_a, 1 + gate_a, shift_m, 1 + scale_m, 1 + gate_m


class Layer(nn.Module):
    """x = around(attn, x); x = around(mlp, x). pre: x + f(n x); post: x + n(f x); sandwich_branch: x + n'(f(n
    x)); sandwich_sum: n'(f(n x) + x). A noise level shifts and scales what enters f and gates what leaves."""

    def __init__(
        self,
        c: Any,
        d_model: int,
        index: int,
        cond_width: int | None = None,
        mlp_width: int | None = None,
        value_gate: int | None = None,
    ) -> None:
        super().__init__()
        self.norms = c.norms
        self.attn = Attention(c, d_model, index, value_gate)
        self.mlp = MLP(c, d_model, mlp_width or c.mlp_width)
        for i in range(4 if c.norms.startswith("sandwich") else 2):
            self.add_module(f"norm_{i + 1}", RMSNorm(d_model, c.norm_eps, c.norm_weights))
        if cond_width is not None:
            self.modulation = AdaLN(cond_width, d_model)

    def forward(
        self, x: Tensor, rows: Rows, cond: Modulation | None = None, values: Tensor | None = None
    ) -> Tensor:
        n: list[Any] = [module for name, module in self.named_children() if name.startswith("norm_")]
        none: list[Any] = [None, None]
        before, after = (
            (n, none) if self.norms == "pre" else (none, n) if self.norms == "post" else (n[::2], n[1::2])
        )
        of_attn, of_mlp = (None, None) if cond is None else (cond[:3], cond[3:])
        x = self.leave(x, self.attn(self.enter(x, before[0], of_attn), rows, values), after[0], of_attn)
        return self.leave(x, self.mlp(self.enter(x, before[1], of_mlp)), after[1], of_mlp)

    def enter(self, x: Tensor, norm: Any, modulation: Modulation | None) -> Tensor:
        x = x if norm is None else norm(x)
        return x if modulation is None else torch.addcmul(modulation[0], x, modulation[1])

    def leave(self, x: Tensor, branch: Tensor, norm: Any, modulation: Modulation | None) -> Tensor:
        is_sum = self.norms == "sandwich_sum"
        if norm is not None and not is_sum:
            branch = norm(branch)
        if modulation is not None:
            branch = modulation[2] * branch
        return norm(x + branch) if is_sum else x + branch


class NoiseEmbedding(nn.Module):
    """log(sigma) / 4 [1, 1] fp32 -> [1, 1, C]: sinusoids, then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc_1, self.fc_2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, c_noise: Tensor) -> Tensor:
        half = self.fc_1.in_features // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=c_noise.device) / half)
        angles = 1000.0 * c_noise.unsqueeze(-1) * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc_1.weight.dtype)
        return F.silu(self.fc_2(F.silu(self.fc_1(waves))))


class DiagonalInjection(nn.Module):
    """decay * state + step * (B e), channel by channel (Parcae); orthogonal: what is injected replaces the
    state's part along it."""

    def __init__(self, d_model: int, is_orthogonal: bool, eps: float) -> None:
        super().__init__()
        self.is_orthogonal, self.eps = is_orthogonal, eps
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(d_model)), nn.Parameter(torch.zeros(d_model))
        self.B = nn.Linear(d_model, d_model, bias=False)

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
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
    """share * new + (1 - share) * old, with share = exp(-softplus(W2 W1 (new - old) + b) exp(A_log))
    (LoopUS)."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(d_model))
        self.dt_in, self.dt_out = nn.Linear(d_model, width, bias=False), nn.Linear(width, d_model)

    def forward(self, old: Tensor, new: Tensor) -> Tensor:
        step = F.softplus(self.dt_out(self.dt_in(new - old)).float())
        share = torch.exp(-step * self.A_log.float().exp()).to(new.dtype)
        return share * new + (1 - share) * old


class ExitGate(nn.Module):
    """Trained exit probability of a state; here it is carried along and not used."""

    def __init__(self, d_model: int, has_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model) if has_norm else None
        self.linear = nn.Linear(d_model, 1)


class Recurrent(nn.Module):
    """Prelude, core, coda. Cache indices: prelude, coda, then the core layers of step 0, 1, ..."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        loop, width = c.loop, c.d_model
        self.c = c
        self.counts = (loop.num_prelude_layers, loop.num_core_layers, loop.num_coda_layers)
        first_core, first_coda = self.counts[0], self.counts[0] + self.counts[1]
        self.first_core_index, self.layers_per_step = self.counts[0] + self.counts[2], self.counts[1]
        self.wte = nn.Embedding(c.vocab_size, width)
        self.noise_embedding = NoiseEmbedding(c.noise_embed_dim) if c.noise_conditioning else None
        self.prelude = nn.ModuleList(self._layer(i, i) for i in range(first_core))
        self.input_norm = RMSNorm(width, c.layer.norm_eps) if loop.input_norm else None
        if loop.injection == "linear":
            self.adapter: nn.Module = nn.Linear(2 * width, width, bias=loop.injection_bias)
        elif loop.injection.startswith("diagonal"):
            is_orthogonal = loop.injection == "diagonal_orthogonal"
            self.adapter = DiagonalInjection(width, is_orthogonal, loop.injection_eps)
        core = nn.ModuleList(
            self._layer(i, self.first_core_index + i - first_core, True)
            for i in range(first_core, first_coda)
        )
        self.core_name = "core_block" if loop.iterates else "layers"
        self.add_module(self.core_name, core)
        self.step_gate = StepGate(width, loop.step_gate_width) if loop.step_gate_width else None
        self.readout = nn.Linear(width, width, bias=False) if loop.readout == "linear" else None
        self.coda = nn.ModuleList(self._layer(first_coda + i, first_core + i) for i in range(self.counts[2]))
        self.ln_f = RMSNorm(width, c.layer.norm_eps)
        self.lm_head = None if c.tie_embeddings else nn.Linear(width, c.vocab_size, bias=False)
        kv_width = (c.layer.num_kv_heads or c.layer.num_heads) * (
            c.layer.head_dim or width // c.layer.num_heads
        )
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(c.vocab_size, kv_width) for i in c.value_embeddings}
        )
        if loop.exit_gate != "none":
            self.exit_gate = ExitGate(width, loop.exit_gate == "norm_linear")

    def _layer(self, place: int, index: int, is_core: bool = False) -> Layer:
        c = self.c
        return Layer(
            c.layer,
            c.d_model,
            index,
            cond_width=c.noise_embed_dim if is_core and c.noise_conditioning else None,
            mlp_width=c.loop.core_mlp_width if is_core else None,
            value_gate=c.value_gate_width if place in c.value_embeddings else None,
        )

    @property
    def core(self) -> Sequence[Layer]:
        return getattr(self, self.core_name)

    @property
    def draws_state(self) -> bool:
        """Whether the state before the first step is free."""
        return self.c.loop.state != "embedding" and self.c.loop.injection != "replace"

    def condition(self, sigma: float | None) -> list[Modulation | None]:
        """The modulation of every core layer at a noise level."""
        if self.noise_embedding is None or sigma is None:
            return [None] * len(self.core)
        level = torch.full((1, 1), sigma, device=self.wte.weight.device, dtype=torch.float32)
        embedded = self.noise_embedding(level.log() / 4)
        return [layer.modulation(embedded) for layer in self.core]

    def at(self, cond: list[Any], k: int, num_steps: int) -> list[Any]:
        """The modulation of every core layer in step k of num_steps."""
        return cond

    def encode(self, ids: Tensor, rows: Rows) -> tuple[Tensor, dict[int, Tensor]]:
        """-> e [B, T, D] and the value embeddings by layer."""
        e = self.wte(ids)
        if self.c.embed_scale != 1.0:
            e = e * self.c.embed_scale
        values = {int(i): table(ids) for i, table in self.value_embeds.items()}
        for i, layer in enumerate(self.prelude):
            e = layer(e, rows, None, values.get(i))
        return (e if self.input_norm is None else self.input_norm(e)), values

    def start(self, e: Tensor, given: Tensor | None) -> Tensor:
        if self.c.loop.state == "embedding":
            return e
        return torch.zeros_like(e) if given is None else given.to(e)

    def step(
        self, state: Tensor, e: Tensor, values: dict[int, Tensor], cond: list[Any], rows: Rows, k: int
    ) -> Tensor:
        """Core step k = 0, 1, ..."""
        loop, rows.shift = self.c.loop, k * self.layers_per_step
        x = self.inject(state, e)
        for i, layer in enumerate(self.core):
            x = layer(x, rows, cond[i], values.get(self.counts[0] + i))
        rows.shift = 0
        if self.step_gate is not None:
            x = self.step_gate(state, x)
        if loop.boundary_norm == "weighted":
            return self.ln_f(x)
        return normalized(x, self.c.layer.norm_eps) if loop.boundary_norm == "unweighted" else x

    def inject(self, state: Tensor, e: Tensor) -> Tensor:
        loop = self.c.loop
        if loop.injection == "none":
            return state
        if loop.injection == "replace":
            return e
        if loop.injection == "add":
            return state + e
        if loop.injection == "linear":
            scale = loop.injection_state_scale
            return self.adapter(torch.cat([state if scale == 1.0 else scale * state, e], dim=-1))
        return self.adapter(state, e)

    def decode(self, state: Tensor, values: dict[int, Tensor], rows: Rows) -> Tensor:
        x, loop = state, self.c.loop
        if loop.readout == "norm":
            x = self.ln_f(x)
        elif self.readout is not None:
            x = self.readout(x)
        for i, layer in enumerate(self.coda):
            x = layer(x, rows, None, values.get(self.counts[0] + self.counts[1] + i))
        return self.ln_f(x) if loop.final_norm else x


class Hrm(nn.Module):
    """A step: ``num_low_cycles`` times low = L(low + high), then high = H(high + low). The state is [high |
    low] (HRM-Text)."""

    draws_state = False
    first_core_index = 0

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c, count = c, c.num_stack_layers
        self.layers_per_step = (c.num_low_cycles + 1) * count
        self.wte = nn.Embedding(c.vocab_size, c.d_model)
        self.low = nn.ModuleList(Layer(c.layer, c.d_model, i) for i in range(count))
        self.high = nn.ModuleList(
            Layer(c.layer, c.d_model, c.num_low_cycles * count + i) for i in range(count)
        )
        self.low_init = LowState(c.d_model)
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)

    def condition(self, sigma: float | None) -> list[Modulation | None]:
        return []

    def at(self, cond: list[Any], k: int, num_steps: int) -> list[Any]:
        return cond

    def encode(self, ids: Tensor, rows: Rows) -> tuple[Tensor, dict[int, Tensor]]:
        e = self.wte(ids)
        return (e * self.c.embed_scale if self.c.embed_scale != 1.0 else e), {}

    def start(self, e: Tensor, given: Tensor | None) -> Tensor:
        return torch.cat([e, self.low_init.weight.expand_as(e)], dim=-1)

    def step(
        self, state: Tensor, e: Tensor, values: dict[int, Tensor], cond: list[Any], rows: Rows, k: int
    ) -> Tensor:
        high, low = state.chunk(2, dim=-1)
        for cycle in range(self.c.num_low_cycles):
            rows.shift = k * self.layers_per_step + cycle * len(self.low)
            low = self.stack(self.low, low + high, rows)
        rows.shift = k * self.layers_per_step
        state = torch.cat([self.stack(self.high, high + low, rows), low], dim=-1)
        rows.shift = 0
        return state

    def stack(self, layers: nn.ModuleList, x: Tensor, rows: Rows) -> Tensor:
        for layer in layers:
            x = layer(x, rows)
        return normalized(x, self.c.layer.norm_eps)

    def decode(self, state: Tensor, values: dict[int, Tensor], rows: Rows) -> Tensor:
        return state[..., : self.c.d_model]


class StepEmbedding(nn.Module):
    """A time in [0, 1] -> [1, 1, D]: 128 cosines and sines, then a two-layer MLP."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.fc_1, self.fc_2 = nn.Linear(256, d_model), nn.Linear(d_model, d_model)

    def forward(self, t: float) -> Tensor:
        weight = self.fc_1.weight
        steps = torch.arange(128, dtype=torch.float32, device=weight.device)
        angles = torch.tensor(t, dtype=torch.float32) * torch.exp(-math.log(10_000.0) * steps / 128)
        waves = torch.cat([angles.cos(), angles.sin()])[None, None].to(weight.dtype)
        return self.fc_2(F.silu(self.fc_1(waves)))


class LoopFormer(nn.Module):
    """Layers that are conditioned on the time of a step, k / K, and on its length, 1 / K (LoopFormer)."""

    draws_state = False
    first_core_index = 0

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c, width, count = c, c.d_model, c.num_layers
        self.layers_per_step = count
        self.wte, self.wpe = nn.Embedding(c.vocab_size, width), nn.Embedding(c.max_seq_len, width)
        self.time, self.length = StepEmbedding(width), StepEmbedding(width)
        self.core_block = nn.ModuleList(Layer(c.layer, width, i) for i in range(count))
        self.modulation = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(count))
        self.ln_f = RMSNorm(width, c.layer.norm_eps)
        self.lm_head = None if c.tie_embeddings else nn.Linear(width, c.vocab_size, bias=False)

    def condition(self, sigma: float | None) -> list[Modulation | None]:
        return []

    def at(self, cond: list[Any], k: int, num_steps: int) -> list[Any]:
        embedded = F.silu(self.time(k / num_steps) + self.length(1 / num_steps))
        none, found = torch.zeros_like(embedded), []
        for modulation in self.modulation:
            gate_a, gate_m, scale_a, scale_m = modulation(embedded).chunk(4, dim=-1)
            found.append((none, 1 + scale_a, gate_a, none, 1 + scale_m, gate_m))
        return found

    def encode(self, ids: Tensor, rows: Rows) -> tuple[Tensor, dict[int, Tensor]]:
        return self.wte(ids) + self.wpe(rows.positions), {}

    def start(self, e: Tensor, given: Tensor | None) -> Tensor:
        return e

    def step(
        self, state: Tensor, e: Tensor, values: dict[int, Tensor], cond: list[Any], rows: Rows, k: int
    ) -> Tensor:
        rows.shift = k * self.layers_per_step
        for layer, modulation in zip(self.core_block, cond, strict=True):
            state = layer(state, rows, modulation)
        rows.shift = 0
        return state

    def decode(self, state: Tensor, values: dict[int, Tensor], rows: Rows) -> Tensor:
        return self.ln_f(state)


NETWORKS = {"hrm": Hrm, "loopformer": LoopFormer}
"""Of families that are not Recurrent."""


class LowState(nn.Module):
    """The low stack's state before the first step, the same at every position."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model))


class RdlmForCausalLM(PreTrainedModel, GenerationMixin):
    """A checkpoint of rdlm; noise-conditioned ones are read with z = 0."""

    config_class = RdlmConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _supports_sdpa = True

    def __init__(self, config: RdlmConfig) -> None:
        super().__init__(config)
        layout = namespace(config.layout)
        self.model = NETWORKS.get(layout.family, Recurrent)(layout)
        # Used with a noised target only: kept so that the checkpoint can be imported again.
        self.evidence_scale = (
            nn.Parameter(torch.ones(1)) if config.read_out.get("has_evidence_scale") else None
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.wte

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_steps: int | None = None,
        input_states: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> Any:
        """input_ids [B, T] -> logits [B, T, V] after ``num_steps`` core steps (None: the checkpoint's
        default).

        attention_mask [B, S]: 0 marks padding. input_states [B, T, D]: the recurrent state before the first
        step; zeros where none is given, also of models that draw it. token_type_ids [B, T], of models with prefixes:
        rows of type 1 of the first call see each other in both directions. A cache belongs to the number of steps
        that filled it.
        """
        num_steps = self.config.num_steps if num_steps is None else num_steps
        self.check_steps(num_steps, input_states, past_key_values)
        two_streams = self.config.read_out.get("two_streams", False)
        if past_key_values is None and (use_cache or two_streams):
            past_key_values = DynamicCache()
        if past_key_values is not None and not isinstance(past_key_values, DynamicCache):
            raise ValueError(
                f"past_key_values={type(past_key_values).__name__}: keys of every step need a cache that grows; use "
                "DynamicCache, which generate makes where no cache_implementation is given"
            )
        rows = self.rows(input_ids, attention_mask, position_ids, past_key_values, token_type_ids)
        hidden = self.hidden(input_ids, input_states, num_steps, rows)
        chosen = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head = self.model.wte if self.model.lm_head is None else self.model.lm_head
        logits = F.linear(hidden[:, chosen], head.weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        kept = past_key_values if use_cache or use_cache is None else None
        found = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept)
        return found.to_tuple() if return_dict is False else found

    def hidden(self, ids: Tensor, given: Tensor | None, num_steps: int, rows: Rows) -> Tensor:
        """-> [B, T, D], ready for the read-out table."""
        model, levels = self.model, self.config.read_out
        e, values = model.encode(ids, rows)
        cond = model.condition(levels.get("sigma"))
        if not levels.get("two_streams", False):
            state = model.start(e, given)
            for k in range(num_steps):
                state = model.step(state, e, values, model.at(cond, k, num_steps), rows, k)
            return self.scaled(model.decode(state, values, rows))
        silent = torch.zeros_like(e)
        clean = model.step(silent, e, values, model.condition(levels["context_sigma"]), rows, 0)
        model.decode(clean, values, rows)  # fills the cache of the coda
        noisy = NoisyRows(rows)
        return self.scaled(model.decode(model.step(silent, e, values, cond, noisy, 0), values, noisy))

    def scaled(self, hidden: Tensor) -> Tensor:
        """EDM read-out at z = 0: c_out times the network's output."""
        sigma_data = self.config.read_out.get("edm_sigma_data")
        if sigma_data is None:
            return hidden
        sigma = torch.tensor(self.config.read_out["sigma"], device=hidden.device)
        c_out = sigma * sigma_data / (sigma.square() + sigma_data**2).sqrt()
        return (c_out * hidden.float()).to(hidden.dtype)

    def rows(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: DynamicCache | None,
        types: Tensor | None = None,
    ) -> Rows:
        length, device = ids.shape[1], ids.device
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is not None and (
            attention_mask.dim() != 2 or attention_mask.shape[1] != past + length
        ):
            raise ValueError(
                f"attention_mask must be [B, {past + length}], got {tuple(attention_mask.shape)}"
            )
        if attention_mask is not None and bool((attention_mask != 0).all()):
            attention_mask = None
        new = torch.arange(past, past + length, device=device)
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, past:]
        positions = new.unsqueeze(0) if position_ids is None else position_ids
        if past or not (self.config.layout or {}).get("prefix_lm"):
            types = None  # as models without prefixes, and chunks after the first one
        if attention_mask is None and past == 0 and types is None:
            return Rows(positions, None, cache)
        keys = torch.arange(past + length, device=device)
        mask = (keys <= new.unsqueeze(1))[None, None]
        if types is not None:
            prefix = types == 1
            mask = mask | (prefix[:, None, :, None] & prefix[:, None, None, :])
        if attention_mask is not None:
            own = keys == new.unsqueeze(1)  # a row of padding sees itself: a softmax over nothing is NaN
            mask = (mask & (attention_mask != 0)[:, None, None]) | own
        return Rows(positions, mask, cache)

    def check_steps(self, num_steps: int, input_states: Tensor | None, cache: DynamicCache | None) -> None:
        """ValueError for what the checkpoint does not have, and for a cache of another number of steps."""
        if not 1 <= num_steps <= self.config.max_num_steps:
            raise ValueError(
                f"num_steps={num_steps}: this checkpoint allows 1 to {self.config.max_num_steps}"
            )
        if input_states is not None and not self.model.draws_state:
            raise ValueError(
                "input_states: this model starts from its tokens, not from a given state; leave it out"
            )
        if cache is None or not cache.get_seq_length():
            return
        filled = sum(1 for _ in self.filled_steps(cache))
        if filled != num_steps:
            raise ValueError(
                f"num_steps={num_steps}: the cache was filled with {filled}; use that, or a new cache"
            )

    def filled_steps(self, cache: DynamicCache) -> Iterator[int]:
        for index in range(self.model.first_core_index, len(cache.layers), self.model.layers_per_step):
            layer: Any = cache.layers[index]
            if layer.get_seq_length():
                yield index
