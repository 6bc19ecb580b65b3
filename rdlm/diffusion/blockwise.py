"""A network of blocks: each is a complete denoiser of its noise range, and they share nothing that is trained.

Nothing here knows what a block is made of, so every family can be cut this way: it needs a model that can be built from a part of
its layers (rdlm/registry.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from torch import Tensor, nn

from rdlm.models.base import Backbone
from rdlm.nn.layers import Condition
from rdlm.objectives.denoiser import Denoiser, Prediction

if TYPE_CHECKING:
    from rdlm.diffusion.resident import ResidentBlocks

_BLOCK_KEY = 4


class Blockwise(Denoiser):
    """All blocks of a network. Asked for nothing but z = 0 it is block 0, which owns sigma_max; a level is asked of ``at``."""

    def __init__(self, blocks: Sequence[Denoiser]) -> None:
        nn.Module.__init__(self)
        self.blocks = nn.ModuleList(blocks)
        self.resident: ResidentBlocks | None = None
        """What decides which blocks have their weights in memory (rdlm/diffusion/resident.py); None: all have."""
        first = blocks[0]
        assert first.block is not None
        self.objective, self.noise, self.partition = first.objective, first.noise, first.block.partition

    @property
    def model(self) -> Backbone:  # type: ignore[override]
        return self.first.model

    @property
    def evidence_scale(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.first.evidence_scale

    @property
    def first(self) -> Denoiser:
        return cast(Denoiser, self.blocks[0])

    def at(self, sigma: float | None) -> Denoiser:
        """The denoiser that owns the level; None (z = 0, read at sigma_max) is block 0."""
        return cast(Denoiser, self.blocks[self.partition.block_of(sigma)])

    def clean(self, targets: Tensor) -> Tensor:
        raise TypeError("targets belong to a block: use at(sigma)")

    def unit_table(self) -> Tensor:
        raise TypeError("targets belong to a block: use at(sigma)")

    def inject(self, z: Tensor, sigma: Tensor) -> Tensor:
        raise TypeError("a noised target belongs to a block: use at(sigma)")

    def condition(self, sigma: Tensor | None, like: Tensor) -> Condition | None:
        assert sigma is None, "a level belongs to a block: use at(sigma)"
        return self.first.condition(None, like)

    def predict(self, hidden: Tensor, z: Tensor | None = None, sigma: Tensor | None = None) -> Prediction:
        assert z is None and sigma is None, "a level belongs to a block: use at(sigma)"
        return self.first.predict(hidden)


def blocks_of(denoiser: Denoiser) -> list[Denoiser]:
    """The denoisers that train on their own: the blocks, or the one denoiser of all levels."""
    return (
        [cast(Denoiser, block) for block in denoiser.blocks]
        if isinstance(denoiser, Blockwise)
        else [denoiser]
    )


def drawn_block(num_blocks: int, visit: int, seed: int) -> int:
    """Which block is trained at ``visit``, a pure function of (visit, seed), the same on every process.

    Every ``num_blocks`` visits train each block once, in shuffled order: no block is behind by more than one visit.
    """
    if num_blocks == 1:
        return 0
    lap, place = divmod(visit, num_blocks)
    return int(
        np.random.default_rng([seed & 0xFFFF_FFFF_FFFF_FFFF, _BLOCK_KEY, lap]).permutation(num_blocks)[place]
    )
