"""Which block owns which noise level. Block 0 = first layers = highest noise, in training, evaluation and sampling alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rdlm.config import NoiseConfig
from rdlm.errors import UserError
from rdlm.noise import LogNormalSchedule

PartitionKind = Literal["equi_probability", "uniform", "log_uniform"]


@dataclass(frozen=True)
class BlockPartition:
    """edges: num_blocks + 1 levels, descending from sigma_max to sigma_min; block b owns (edges[b + 1], edges[b]].

    layers: the contiguous layers of each block. overlap widens a block's training range, never its ownership.
    """

    schedule: LogNormalSchedule
    edges: tuple[float, ...]
    layers: tuple[range, ...]
    overlap: float = 0.0

    @property
    def num_blocks(self) -> int:
        return len(self.layers)

    def block_of(self, sigma: float) -> int:
        """The one function from level to block. Levels outside [sigma_min, sigma_max] belong to the nearest block."""
        inner = self.edges[1:-1]
        return sum(sigma <= edge for edge in inner)

    def training_range(self, block: int) -> tuple[float, float]:
        """(lowest, highest) level that trains ``block``, overlap included."""
        return self.schedule.widen(self.edges[block + 1], self.edges[block], self.overlap)

    def sample_level(self, block: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Levels of ``block`` under the training distribution: fp32 ``shape``, by inverse CDF."""
        low, high = (self.schedule.cdf(torch.tensor(level, dtype=torch.float64)) for level in self.training_range(block))
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return self.schedule.icdf(low + uniform * (high - low)).float()


def partition(
    noise: NoiseConfig,
    num_layers: int,
    num_blocks: int,
    kind: PartitionKind = "equi_probability",
    layers_per_block: list[int] | None = None,
    overlap: float = 0.0,
) -> BlockPartition:
    """Split layers and noise levels into blocks.

    kind: equal training mass (DiffusionBlocks Sec. 3.3), equal widths of sigma (the text of Sec. 3.3) or of log sigma (App. E.6).
    layers_per_block: layers of each block, first block first; even by default, earlier blocks take the remainder.
    Raises UserError for impossible splits.
    """
    if not 1 <= num_blocks <= num_layers:
        raise UserError("num_blocks", num_blocks, f"the model has {num_layers} layers to split", f"choose 1 to {num_layers}")
    if not 0.0 <= overlap <= 1.0:
        raise UserError("overlap", overlap, "is outside [0, 1]", "the paper uses 0.05, and 0.1 for text")
    sizes = layers_per_block or [num_layers // num_blocks + (b < num_layers % num_blocks) for b in range(num_blocks)]
    if len(sizes) != num_blocks or sum(sizes) != num_layers or min(sizes) < 1:
        raise UserError(
            "layers_per_block", sizes, f"needs {num_blocks} positive entries that sum to {num_layers}", "correct the list"
        )
    schedule = LogNormalSchedule(noise)
    starts = [sum(sizes[:b]) for b in range(num_blocks)]
    return BlockPartition(
        schedule, _edges(schedule, num_blocks, kind), tuple(range(s, s + n) for s, n in zip(starts, sizes, strict=True)), overlap
    )


def _edges(schedule: LogNormalSchedule, num_blocks: int, kind: PartitionKind) -> tuple[float, ...]:
    high, low = schedule.noise.sigma_max, schedule.noise.sigma_min
    fractions = [b / num_blocks for b in range(num_blocks + 1)]  # 0 = noisiest edge
    if kind == "uniform":
        return tuple(high + f * (low - high) for f in fractions)
    if kind == "log_uniform":
        return tuple(math.exp(math.log(high) + f * math.log(low / high)) for f in fractions)
    return tuple(schedule.icdf(torch.tensor([1.0 - f for f in fractions], dtype=torch.float64)).tolist())
