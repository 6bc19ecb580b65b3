"""Random streams keyed by what they are for, so that no result depends on batching, order or restarts.

Few numbers (levels, masks, choices) come from a generator in host memory. Many (the noise of targets [M, D])
come from the same generator, or from a counter: a hash of (key, number of the element), which any device
computes by itself, without state, and of as few elements as are needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rdlm.device import staged


def _signed(word: int) -> int:
    """The 64 bits of a number as int64 holds them."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN, _MIX_1, _MIX_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_AT_ONCE = {"cpu": 1 << 16}
"""Pairs of normals made at a time, by device: on a CPU what its cache holds."""
_AT_ONCE_GPU = 1 << 24


def generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator that is a pure function of (seed, key): the same draw for the same step, rank or
    position, always."""
    words = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, *key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


@dataclass(frozen=True)
class CounterStream:
    """Normal numbers by their place: element (row, column) is a function of (key, row, column) alone.

    The integers behind them are those of SplitMix64 (Steele, Lea and Flood 2014), equal on every device; the
    normal numbers (Box and Muller 1958) are equal up to the rounding of log, cos and sin.
    """

    key: int
    """64 bits, signed."""
    host: torch.Generator
    """Generator of the few numbers."""

    def bits(self, counters: Tensor) -> Tensor:
        """Element ``counter`` of SplitMix64 seeded with the key: int64 [...] -> int64 [...]."""
        x = counters * _GOLDEN + _signed(self.key + _GOLDEN)
        x = (x ^ (x >> 30 & 0x3_FFFF_FFFF)) * _MIX_1  # >> keeps the sign, which a hash must not
        x = (x ^ (x >> 27 & 0x1F_FFFF_FFFF)) * _MIX_2
        return x ^ (x >> 31 & 0x1_FFFF_FFFF)

    def uniforms(self, rows: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
        """Two numbers for each of ``pairs`` counters of a row: fp32 [M, pairs] in (0, 1] and in [0, 1)."""
        bits = self.bits(rows.unsqueeze(1) * pairs + torch.arange(pairs, device=rows.device))
        high, low = bits >> 32 & 0xFFFF_FFFF, bits & 0xFFFF_FFFF
        return (high.float() + 0.5) * 2**-32, low.float() * 2**-32

    def normals(self, rows: Tensor, width: int, cut: float | None = None) -> Tensor:
        """Standard normal numbers of these rows, or those cut at +- ``cut`` (by inverting the distribution
        function): int64 [M] -> fp32 [M, width] on the device of ``rows``."""
        pairs = (width + 1) // 2
        out = torch.empty(len(rows), width, dtype=torch.float32, device=rows.device)
        at_once = max(1, _AT_ONCE.get(rows.device.type, _AT_ONCE_GPU) // pairs)
        for first in range(0, len(rows), at_once):
            span = slice(first, first + at_once)
            one, other = self.uniforms(rows[span], pairs)
            if cut is None:
                radius, angle = one.log_().mul_(-2.0).sqrt_(), other.mul_(2 * math.pi)
                one, other = radius * angle.cos(), radius * angle.sin()
            else:
                one, other = _inverted(one, cut), _inverted(other, cut)
            out[span, :pairs], out[span, pairs:] = one, other[:, : width - pairs]
        return out


def _inverted(uniform: Tensor, cut: float) -> Tensor:
    """fp32 in [0, 1] -> a normal number within +- ``cut``."""
    inside = math.erf(cut / math.sqrt(2))
    return torch.erfinv((2 * uniform - 1) * inside).mul_(math.sqrt(2)).clamp_(-cut, cut)


@dataclass(frozen=True)
class HashedStream:
    """Numbers that look normal and are a hash of seed, example, position and channel, with which IFM's LoopedLM
    starts its recurrence in the evaluation of its paper. The sine's last bits decide: devices differ."""

    seed: int
    example: int = 0
    start: int = 0
    """Position of the first row."""

    MODULUS: ClassVar[int] = 16_777_213

    @property
    def phase(self) -> Tensor:
        """fp32, of an example under a seed."""
        mixed = (self.example % self.MODULUS) * 104_729 + (self.seed % self.MODULUS) * 130_363
        return torch.tensor(mixed % self.MODULUS, dtype=torch.float32) * (2 * math.pi / self.MODULUS)

    def normals(self, length: int, width: int, device: torch.device) -> Tensor:
        """fp32 [length, width]."""
        channels = torch.arange(width, dtype=torch.float32, device=device)
        positions = torch.arange(self.start, self.start + length, dtype=torch.float32, device=device)
        x = channels * 0.013579 + (positions * 0.021713)[:, None]  # in this order, rounded after each
        x = x + self.phase.to(device) + 0.123457
        x = x.sin() * 43758.5453123
        x = (x - x.floor()).clamp(1e-6, 1 - 1e-6)
        return (2 * x - 1).erfinv() * math.sqrt(2)


Stream = torch.Generator | CounterStream
"""Where the randomness of a micro-batch comes from."""


def counter_stream(seed: int, *key: int) -> CounterStream:
    """The stream of (seed, key) whose many numbers come from a counter, its few from ``generator(seed,
    *key)``."""
    words = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, *key]).generate_state(3, np.uint64)
    return CounterStream(_signed(int(words[2])), generator(seed, *key))


def host_generator(stream: Stream) -> torch.Generator:
    """What draws the few numbers of a stream."""
    return stream.host if isinstance(stream, CounterStream) else stream


def normals(stream: Stream, rows: Tensor, num_rows: int, width: int, device: torch.device) -> Tensor:
    """Standard normal numbers of some rows of [num_rows, width], the others' are not needed: rows int64 [M] in
    host memory -> fp32 [M, width] on ``device``."""
    if isinstance(stream, CounterStream):
        return stream.normals(staged(rows, device), width)
    every = torch.randn(num_rows, width, generator=stream)
    return staged(every if len(rows) == num_rows else every[rows], device)


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al. 2014): a bijection of uint64 that scatters neighbouring
    values."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
