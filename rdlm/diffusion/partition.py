"""Which block owns which noise level. Block 0 = first layers = highest noise, in training, evaluation and
sampling alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.objective import NoiseConfig
from rdlm.diffusion.schedules import LogNormalSchedule, NoiseSchedule, schedule_of
from rdlm.errors import UserError

PartitionKind = Literal["equi_probability", "uniform", "log_uniform", "equal_information", "explicit"]
Curve = Sequence[tuple[float, float]]
"""(sigma, cross-entropy in nats) pairs, rising in sigma."""


@dataclass(frozen=True)
class BlockPartition:
    """edges: num_blocks + 1 levels, descending from sigma_max to sigma_min; block b owns (edges[b + 1],
    edges[b]]. Levels are sigma, or of a masked model t: what is said of sigma_max holds for t = 1.

    layers: the contiguous layers of each block. overlap widens a block's training range, never its ownership.
    """

    schedule: NoiseSchedule
    edges: tuple[float, ...]
    layers: tuple[range, ...]
    overlap: float = 0.0

    @property
    def num_blocks(self) -> int:
        return len(self.layers)

    def block_of(self, sigma: float | None) -> int:
        """The one function from level to block. Levels outside [sigma_min, sigma_max] belong to the nearest
        block; None, z = 0 read at sigma_max, to block 0."""
        return 0 if sigma is None else sum(sigma <= edge for edge in self.edges[1:-1])

    def training_range(self, block: int) -> tuple[float, float]:
        """(lowest, highest) level that trains ``block``, overlap included."""
        return self.schedule.widen(self.edges[block + 1], self.edges[block], self.overlap)

    def sample_level(self, block: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Levels of ``block`` under the training distribution: fp32 ``shape``, by inverse CDF."""
        return self.levels_at(block, torch.rand(shape, generator=generator, dtype=torch.float64))

    def levels_at(self, block: int, uniform: Tensor) -> Tensor:
        """The levels of ``block`` at quantiles ``uniform`` [...] of its training mass: fp32 [...]."""
        low, high = (
            self.schedule.cdf(torch.tensor(level, dtype=torch.float64))
            for level in self.training_range(block)
        )
        return self.schedule.icdf(low + uniform * (high - low)).float()

    def grid(self, num_steps: int) -> list[float]:
        """``num_steps`` levels, noisiest first, spread evenly over the blocks: K = B is the upper edge of
        each block.

        Inside a block the levels have equal training mass between them.
        """
        places = [k * self.num_blocks / num_steps for k in range(num_steps)]
        return [self._inside(int(place), place - int(place)) for place in places]

    def _inside(self, block: int, fraction: float) -> float:
        """The level below which all but ``fraction`` of the block's own mass lies."""
        if fraction == 0:
            return self.edges[block]
        ends = self.schedule.cdf(torch.tensor(self.edges[block : block + 2], dtype=torch.float64))
        return self.schedule.icdf(ends[0] + fraction * (ends[1] - ends[0])).item()


@dataclass(frozen=True)
class Block:
    """One block of a partition."""

    partition: BlockPartition
    index: int

    def sample_level(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Levels that train this block: fp32 ``shape``."""
        return self.partition.sample_level(self.index, shape, generator)

    def levels_at(self, uniform: Tensor) -> Tensor:
        """Levels at quantiles ``uniform`` [...] of the mass that trains this block: fp32 [...]."""
        return self.partition.levels_at(self.index, uniform)


def partition(
    noise: NoiseConfig,
    num_layers: int,
    num_blocks: int,
    kind: PartitionKind = "equi_probability",
    layers_per_block: Sequence[int] | None = None,
    overlap: float = 0.0,
    schedule: NoiseSchedule | None = None,
    edges: Sequence[float] | None = None,
    curve: Curve | None = None,
) -> BlockPartition:
    """Split layers and noise levels into blocks.

    kind: equal training mass (DiffusionBlocks Sec. 3.3), equal widths of sigma (the text of Sec. 3.3) or of
    log sigma (App. E.6), equal drops of ``curve``, or the inner ``edges`` given. layers_per_block: layers of
    each block, first block first; even by default, earlier blocks take the remainder. schedule: the training
    distribution of levels; by default the log-normal one of ``noise``. Raises UserError for impossible
    splits.
    """
    if not 1 <= num_blocks <= num_layers:
        raise UserError(
            "num_blocks",
            num_blocks,
            f"the model has {num_layers} layers to split",
            f"choose 1 to {num_layers}",
        )
    if not 0.0 <= overlap <= 1.0:
        raise UserError("overlap", overlap, "is outside [0, 1]", "the paper uses 0.05, and 0.1 for text")
    sizes = list(
        layers_per_block
        or [num_layers // num_blocks + (b < num_layers % num_blocks) for b in range(num_blocks)]
    )
    if len(sizes) != num_blocks or sum(sizes) != num_layers or min(sizes) < 1:
        raise UserError(
            "layers_per_block",
            sizes,
            f"needs {num_blocks} positive entries that sum to {num_layers}",
            "correct the list",
        )
    schedule = schedule or LogNormalSchedule(noise)
    starts = [sum(sizes[:b]) for b in range(num_blocks)]
    layers = tuple(range(s, s + n) for s, n in zip(starts, sizes, strict=True))
    return BlockPartition(
        schedule, _edges(schedule, num_blocks, kind, edges or (), curve or ()), layers, overlap
    )


def partition_of(config: CheckpointConfig) -> BlockPartition:
    """The partition of a checkpoint's layers and of its objective's noise levels; one block where it has no
    ``blocks``."""
    blocks, model, schedule = config.blocks, config.model, schedule_of(config)
    if blocks is None:
        return partition(config.noise, model.num_layers, 1, schedule=schedule)
    curve: Curve | None = blocks.curve
    if blocks.prior_nats is not None:
        curve = evidence_curve(blocks.prior_nats, *schedule.ends)
    return partition(
        config.noise, model.num_layers, blocks.num_blocks, blocks.partition, blocks.layers_per_block,
        blocks.overlap, schedule,
        blocks.edges, curve,
    )  # fmt: skip


def evidence_curve(
    prior_nats: float, low: float, high: float, num_levels: int = 256
) -> list[tuple[float, float]]:
    """(sigma, cross-entropy) of an exact denoiser whose prior has ``prior_nats``: E softplus(prior_nats -
    1/(2 s^2) + eps / s).

    exp(prior_nats) equally likely tokens with orthogonal unit rows: the true token leads each other one by
    1/s^2 + noise, and the sum over the others is taken at its mean (random energy model above its freezing
    point, s^2 > 1 / (2 prior_nats)).
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    levels = np.geomspace(low, high, num_levels)
    margin = prior_nats - 0.5 / levels[:, None] ** 2 + nodes / levels[:, None]
    entropy = np.logaddexp(0, margin) @ (weights / weights.sum())
    return list(zip(levels.tolist(), entropy.tolist(), strict=True))


def _edges(
    schedule: NoiseSchedule, num_blocks: int, kind: PartitionKind, inner: Sequence[float], curve: Curve
) -> tuple[float, ...]:
    low, high = schedule.ends
    fractions = [b / num_blocks for b in range(num_blocks + 1)]  # 0 = noisiest edge
    cuts: dict[PartitionKind, Callable[[], tuple[float, ...]]] = {
        "uniform": lambda: tuple(high + f * (low - high) for f in fractions),
        "log_uniform": lambda: tuple(math.exp(math.log(high) + f * math.log(low / high)) for f in fractions),
        "explicit": lambda: _falling("edges", (high, *inner, low), num_blocks),
        "equal_information": lambda: _falling(
            "curve", (high, *equal_drops(curve, num_blocks, low, high), low), num_blocks
        ),
        "equi_probability": lambda: tuple(
            schedule.icdf(torch.tensor([1.0 - f for f in fractions], dtype=torch.float64)).tolist()
        ),
    }
    return cuts[kind]()


def _falling(field: str, edges: tuple[float, ...], num_blocks: int) -> tuple[float, ...]:
    if len(edges) != num_blocks + 1 or any(a <= b for a, b in zip(edges, edges[1:], strict=False)):
        problem = f"does not cut [{edges[-1]:g}, {edges[0]:g}] into {num_blocks} ranges, noisiest first"
        raise UserError(
            field,
            [round(edge, 4) for edge in edges[1:-1]],
            problem,
            f"give {num_blocks - 1} falling levels inside",
        )
    return edges


def equal_drops(curve: Curve, num_blocks: int, low: float, high: float) -> list[float]:
    """The num_blocks - 1 levels, falling, between which the curve, cut to [low, high], drops by the same
    amount.

    Linear in log sigma between points; where noise of measurement makes the curve fall with rising sigma, it
    is taken as flat. UserError for fewer than two points, levels that do not rise, or a curve without any
    drop.
    """
    logs = np.log([max(sigma, 1e-300) for sigma, _ in curve])
    if len(logs) < 2 or min(sigma for sigma, _ in curve) <= 0 or np.any(np.diff(logs) <= 0):
        raise UserError(
            "curve",
            list(curve),
            "needs at least two (sigma, nats) pairs rising in sigma > 0",
            "sort and complete it",
        )
    ends = math.log(low), math.log(high)
    knots = np.array([ends[0], *logs[(logs > ends[0]) & (logs < ends[1])], ends[1]])
    nats = np.maximum.accumulate(np.interp(knots, logs, [value for _, value in curve]))
    if nats[-1] <= nats[0]:
        raise UserError(
            "curve",
            list(curve),
            f"does not rise inside [{low:g}, {high:g}]",
            "give nats that rise with sigma",
        )
    wanted = nats[-1] + (nats[0] - nats[-1]) * np.arange(1, num_blocks) / num_blocks
    right = np.searchsorted(nats, wanted)  # the lowest place where the curve is flat
    share = (wanted - nats[right - 1]) / (nats[right] - nats[right - 1])
    return np.exp(knots[right - 1] + share * (knots[right] - knots[right - 1])).tolist()
