"""Attention: rotary positions, the kernel, and the contexts that say which rows see each other.

A context is data handed to a model for one call; models keep no attention state.
Shapes: B batch, T rows of a sequence, H query heads, Hkv key-value heads, Dh head width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property, lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rdlm.config.model import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling


@lru_cache(maxsize=16)
def rotary_table(
    num_dims: int, base: float, length: int, device: torch.device, scaling: RopeScaling | None = None
) -> Tensor:
    """exp(i * position * frequency_j) of adjacent pairs: complex64 [length, num_dims/2], computed in fp32 (Su
    et al. 2021).

    frequency_j = base^(-2j/num_dims), slowed down by ``scaling``. No buffer: casting a model must not round
    it.
    """
    with torch.inference_mode(False):  # or a table that serving has made could not be trained with
        frequencies = rotary_frequencies(num_dims, base, scaling)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        size = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
        return torch.polar(torch.full_like(angles, size), angles).to(device)


def rotary_frequencies(num_dims: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """fp32 [num_dims/2]; see ``rotary_table``."""
    frequencies = 1.0 / base ** (torch.arange(0, num_dims, 2, dtype=torch.float32) / num_dims)
    match scaling:
        case Llama3Scaling():
            return _llama3(frequencies, scaling)
        case LinearScaling():
            return frequencies / scaling.factor
        case YarnScaling():
            return _yarn(frequencies, num_dims, base, scaling)
    return frequencies


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are divided by ``factor``, short ones kept, those between
    interpolated."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    periods = scaling.original_max_seq_len / (
        2 * math.pi / frequencies
    )  # of a frequency in the original length
    blend = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(frequencies: Tensor, num_dims: int, base: float, scaling: YarnScaling) -> Tensor:
    """See YarnScaling."""

    def dimension(turns: float) -> float:
        """The one that turns so often within the original length."""
        return (
            num_dims * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(base))
        )

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, num_dims - 1)
    width = high - low if high != low else 0.001
    slowed = ((torch.arange(len(frequencies), dtype=torch.float32) - low) / width).clamp(0, 1)
    return slowed * frequencies / scaling.factor + (1 - slowed) * frequencies


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x: [B, T, H, Dh]; table: complex64 [B or 1, T, 1, Dh/2], or the same as pairs of fp32 [..., Dh/2, 2], which
    a compiler can fuse -> [B, T, H, Dh] in x's dtype. Both forms give the same bits where nothing is fused."""
    if not table.is_complex():
        (a, b), (c, d) = x.float().unflatten(-1, (-1, 2)).unbind(-1), table.unbind(-1)
        return torch.stack([a * c - b * d, a * d + b * c], dim=-1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


class AttentionContext(Protocol):
    """What a layer needs to know about the other rows."""

    def positions(self) -> Tensor:
        """Positions of the rows in their sequences: int64 [B or 1, T]."""

    def rope(self, num_dims: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
        """Rotary factors of the rows: complex64 [B or 1, T, 1, num_dims/2]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [B, T, H, Dh], k and v [B, T, Hkv, Dh] -> [B, T, H, Dh]."""


def for_every_head(rows: Tensor, num_heads: int) -> Tensor:
    """Keys or values [B, T, Hkv, Dh] of grouped heads -> [B, T, H, Dh], each as often as heads share it."""
    return rows.repeat_interleave(num_heads // rows.shape[2], dim=2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Scaled dot-product attention over the second-last-but-one axis; grouped heads where Hkv < H. [B, T, H,
    Dh] in and out."""
    if q.device.type == "cpu" and q.dtype != torch.float32:
        # PyTorch's half-precision CPU kernel is slower than the fp32 one with its casts: for single queries several
        # times, and in the backward pass of short sequences twice.
        return attention(q.float(), k.float(), v.float(), mask, is_causal).to(q.dtype)
    grouped = k.shape[2] != q.shape[2]
    if grouped and mask is not None and q.device.type == "cuda":
        # The memory-efficient kernel has no grouped heads, and the others no mask: what is left holds all scores.
        k, v = (for_every_head(rows, q.shape[2]) for rows in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2)


class KeepsRope(ABC):
    """Part of contexts under which compiled layers may run: their rotary table is made before, outside of the
    compiled code, which would make it again in every layer."""

    _pairs: Tensor | None = None

    def prepare_rope(self, num_dims: int, base: float, scaling: RopeScaling | None = None) -> None:
        """Make the table of ``rope`` as pairs of real numbers. The layers of a model all ask for one table."""
        if self._pairs is None:
            self._pairs = torch.view_as_real(self.rope(num_dims, base, scaling))

    def rope(self, num_dims: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
        """The prepared pairs in compiled code, elsewhere complex numbers; see AttentionContext."""
        if self._pairs is not None and torch.compiler.is_compiling():
            return self._pairs
        return self._rope(num_dims, base, scaling)

    @abstractmethod
    def _rope(self, num_dims: int, base: float, scaling: RopeScaling | None) -> Tensor:
        """The table as complex numbers."""


class CausalContext(KeepsRope):
    """Rows are positions 0..T-1 of whole sequences; row i sees rows j <= i."""

    is_causal = True

    def __init__(self, length: int, device: torch.device | str = "cpu") -> None:
        self.length, self.device = length, torch.device(device)

    def positions(self) -> Tensor:
        return torch.arange(self.length, device=self.device)[None]

    def _rope(self, num_dims: int, base: float, scaling: RopeScaling | None) -> Tensor:
        return rotary_table(num_dims, base, self.length, self.device, scaling)[None, :, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return attention(q, k, v, is_causal=self.is_causal)


class DocumentContext(CausalContext):
    """Rows are documents one after the other: row i sees rows j <= i of its own document, and positions count
    from its start."""

    def __init__(self, documents: Tensor) -> None:
        """documents: int64 [B, T], the document of each row, rising along T."""
        super().__init__(documents.shape[1], documents.device)
        self.mask = (same_document(documents) & _lower(self.length, self.device)).unsqueeze(1)
        """bool [B, 1, T, T], True where the row may look."""
        places = torch.arange(self.length, device=self.device).expand_as(documents)
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        self._positions = places - places.where(starts, 0).cummax(1).values

    def positions(self) -> Tensor:
        return self._positions

    def _rope(self, num_dims: int, base: float, scaling: RopeScaling | None) -> Tensor:
        table = rotary_table(num_dims, base, self.length, self.device, scaling)
        return table[self._positions].unsqueeze(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return attention(q, k, v, mask=self.mask)


def same_document(documents: Tensor) -> Tensor:
    """[B, T] -> bool [B, T, T]."""
    return documents.unsqueeze(1) == documents.unsqueeze(2)


def _lower(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class BidirectionalContext(CausalContext):
    """Rows are positions 0..T-1 of whole sequences; every row sees all of them."""

    is_causal = False


class PaddedContext(BidirectionalContext):
    """Rows of several lengths, padded at their ends to ``length``: every row sees those of its own sequence,
    and no padding."""

    def __init__(self, lengths: Tensor, length: int, device: torch.device | str = "cpu") -> None:
        """lengths: [B] int64."""
        super().__init__(length, device)
        self.lengths = lengths.to(self.device)

    @cached_property
    def mask(self) -> Tensor:
        """bool [B, 1, 1, T], True where every row may look."""
        return (torch.arange(self.length, device=self.device) < self.lengths.unsqueeze(1))[:, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return attention(q, k, v, mask=self.mask)


class PrefixContext(BidirectionalContext):
    """Rows are positions 0..T-1 of whole sequences; row i sees rows j <= i, and rows of the prefix see all of
    the prefix."""

    def __init__(self, in_prefix: Tensor) -> None:
        """in_prefix: bool [B, T]."""
        super().__init__(in_prefix.shape[1], in_prefix.device)
        both = in_prefix.unsqueeze(1) & in_prefix.unsqueeze(2)
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=self.device).tril()
        self.mask = (both | causal).unsqueeze(1)  # [B, 1, T, T]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return attention(q, k, v, mask=self.mask)


class LaterLayers:
    """Another context whose layers have cache indices of their own: a layer that runs several times in a step
    keeps keys of each run."""

    def __init__(self, inner: AttentionContext, shift: int) -> None:
        self.inner, self.shift = inner, shift

    def positions(self) -> Tensor:
        return self.inner.positions()

    def rope(self, num_dims: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
        return self.inner.rope(num_dims, base, scaling)

    def prepare_rope(self, num_dims: int, base: float, scaling: RopeScaling | None = None) -> None:
        """See KeepsRope."""
        if isinstance(self.inner, KeepsRope):
            self.inner.prepare_rope(num_dims, base, scaling)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return self.inner.attend(q, k, v, layer + self.shift)


class TwoStreamContext(KeepsRope):
    """Rows are a clean stream 0..T-1 followed by a noisy stream 0..T-1 of the same positions (DiffusionBlocks
    App. E.4).

    Clean row i sees clean j <= i. Noisy row i sees itself and the clean rows before its target: j <= i where
    its own clean row is part of its context (``sees_own_clean``, the published layout), j < i where the noisy
    row stands in its place. No row sees another noisy row. With documents, none sees another one's rows.
    """

    def __init__(
        self,
        length: int,
        sees_own_clean: bool,
        device: torch.device | str = "cpu",
        documents: Tensor | None = None,
    ) -> None:
        """documents: see DocumentContext; None: each sequence is one."""
        self.length, self.sees_own_clean, self.device = length, sees_own_clean, torch.device(device)
        self._one = CausalContext(length, device) if documents is None else DocumentContext(documents)
        square = self._streams()
        self.mask = square
        """bool [2T, 2T], with documents [B, 1, 2T, 2T]: True where the row may look."""
        if documents is not None:
            self.mask = (same_document(documents).repeat(1, 2, 2) & square).unsqueeze(1)

    def _streams(self) -> Tensor:
        square = torch.ones(self.length, self.length, dtype=torch.bool, device=self.device)
        clean = square.tril()
        context = clean if self.sees_own_clean else square.tril(-1)
        alone = torch.eye(self.length, dtype=torch.bool, device=self.device)
        return torch.cat([torch.cat([clean, ~square], 1), torch.cat([context, alone], 1)], 0)

    def positions(self) -> Tensor:
        return self._one.positions().repeat(1, 2)

    def _rope(self, num_dims: int, base: float, scaling: RopeScaling | None) -> Tensor:
        return self._one.rope(num_dims, base, scaling).repeat(1, 2, 1, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return attention(q, k, v, mask=self.mask)
