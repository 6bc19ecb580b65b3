"""Weight-only quantisation: matrices as int8 or int4 with a scale for each group of inputs of an output.

Symmetric and without data, as Q8_0 and Q4_0 of llama.cpp (https://github.com/ggml-org/ggml): value = integer *
scale. The scale of an int4 group is the one of ``CANDIDATES`` whose squared error is least.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rdlm.config.checkpoint import WeightFormat
from rdlm.nn.layers import MLP, Attention, TokenTable

GROUP_SIZE = 32
"""Inputs that share a scale where nothing else is said."""
CANDIDATES = torch.linspace(-9.5, -6.5, 13)
"""Integers, not rounded, that the value of largest size in an int4 group may become; its sign makes all of -8 .. 7
useful."""
SMALLEST = 1e-30
"""A group of a smaller scale is zero."""
DTYPES_OF = {"int8": torch.int8, "int4": torch.uint8}
"""Format -> dtype of the stored values."""
RANGES = {"int8": (-127, 127), "int4": (-8, 7)}
PIECE = 1 << 22
"""Weights that are quantised at a time."""


@dataclass(frozen=True)
class Quantized:
    """Rows of a matrix of ``inputs`` columns: values [..., I], scales [..., ceil(inputs / group_size)] bf16.

    values: int8 from -127 to 127, I = inputs; or uint8 with two int4 from -8 to 7, each plus 8, the first in the
    low half, I = ceil(inputs / 2).
    """

    values: Tensor
    scales: Tensor
    inputs: int
    group_size: int

    @property
    def weights(self) -> WeightFormat:
        return "int4" if self.values.dtype == torch.uint8 else "int8"

    def integers(self) -> Tensor:
        """int8 [..., inputs]."""
        if self.weights == "int8":
            return self.values
        halves = torch.stack([self.values & 15, self.values >> 4], -1).flatten(-2)[..., : self.inputs]
        return halves.to(torch.int8) - 8

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., inputs]."""
        scales = self.scales.float().repeat_interleave(self.group_size, -1)[..., : self.inputs]
        return (self.integers() * scales).to(dtype)

    def __getitem__(self, rows: Tensor) -> Quantized:
        """Rows by their indices [...]."""
        return Quantized(self.values[rows], self.scales[rows], self.inputs, self.group_size)


def quantized(
    weight: Tensor, weights: WeightFormat, group_size: int = GROUP_SIZE, scales: Tensor | None = None
) -> Quantized:
    """A matrix [out, in], finite, in any float dtype. scales: those of ``scales_of``, where they are known."""
    scales = scales_of(weight, weights, group_size) if scales is None else scales
    parts = [
        _stored(
            _integers(groups, part.float().unsqueeze(2), weights).flatten(1)[:, : weight.shape[1]], weights
        )
        for groups, part in zip(_groups(weight, group_size), _pieces(scales, weight), strict=True)
    ]
    return Quantized(torch.cat(parts), scales, weight.shape[1], group_size)


def scales_of(weight: Tensor, weights: WeightFormat, group_size: int = GROUP_SIZE) -> Tensor:
    """[out, ceil(in / group_size)] bf16 of a matrix [out, in]."""
    found = []
    for groups in _groups(weight, group_size):
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        if weights == "int8":
            found.append(_rounded(extreme.abs() / 127))
            continue
        best, least = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
        for candidate in CANDIDATES:
            scales = _rounded(extreme / candidate)
            error = (_integers(groups, scales, weights) * scales - groups).square_().sum(2, keepdim=True)
            better = error < least
            best, least = torch.where(better, scales, best), torch.where(better, error, least)
        found.append(best)
    return torch.cat(found).squeeze(2).bfloat16()


def _pieces(matrix: Tensor, weight: Tensor) -> Sequence[Tensor]:
    """Rows of a matrix, as many at a time as are few for ``weight``."""
    return matrix.detach().split(max(1, PIECE // weight.shape[1]))


def _groups(weight: Tensor, group_size: int) -> Iterator[Tensor]:
    """[rows, groups, group_size] fp32, filled up with zeros, piece by piece."""
    for rows in _pieces(weight, weight):
        yield F.pad(rows.float(), (0, -weight.shape[1] % group_size)).unflatten(1, (-1, group_size))


def _rounded(scales: Tensor) -> Tensor:
    """The stored values in fp32."""
    return scales.bfloat16().float()


def _integers(groups: Tensor, scales: Tensor, weights: WeightFormat) -> Tensor:
    inverse = torch.where(scales.abs() < SMALLEST, 0, 1 / scales)
    least, most = RANGES[weights]
    return (groups * inverse).round_().clamp_(least, most).to(torch.int8)


def _stored(integers: Tensor, weights: WeightFormat) -> Tensor:
    if weights == "int8":
        return integers
    halves = F.pad(integers + 8, (0, integers.shape[1] % 2)).to(torch.uint8)
    return halves[:, ::2] | halves[:, 1::2] << 4


def formats(network: nn.Module, weights: WeightFormat) -> dict[str, WeightFormat]:
    """Parameter name -> format of each matrix that is quantised: those of linear layers and of token tables.

    int4 is for attention and feed-forward layers. Token tables, which the read-out and its tied table are, and
    what injects the prelude's output or a noise level stay in int8. Norms, biases and gates of one number stay
    as they are.
    """
    inner, gates, matrices = set(), set(), set()
    for module in network.modules():
        match module:
            case Attention():
                inner |= {
                    id(m.weight) for m in (module.Wqkv, module.proj, module.output_gate) if m is not None
                }
                gates |= {id(m.weight) for m in (module.value_gate,) if m is not None}
            case MLP():
                inner |= {id(module.fc.weight), id(module.proj.weight)}
            case nn.Linear() | TokenTable() if min(module.weight.shape) > 1:
                matrices.add(id(module.weight))
    return {
        name: weights if id(parameter) in inner else "int8"
        for name, parameter in network.named_parameters()
        if id(parameter) in matrices - gates
    }


def stored_shapes(shape: Sequence[int], weights: WeightFormat, group_size: int) -> list[tuple[int, int]]:
    """Shapes of the stored values and scales of a matrix [out, in]."""
    out, inputs = shape
    return [(out, inputs if weights == "int8" else -(-inputs // 2)), (out, -(-inputs // group_size))]
