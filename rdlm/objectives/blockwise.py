"""A network of blocks: each is a complete network of its own noise range, and they share nothing that is
trained.

Nothing here knows what a block is made of, so every family can be cut this way: it needs a model that can be
built from a part of its layers (rdlm/registry.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np
from torch import Tensor, nn

from rdlm.data.batch import Batch
from rdlm.models.base import Backbone
from rdlm.nn.layers import Condition
from rdlm.objectives.base import Keys, LossTerms, Objective, Prediction, ReadOut

if TYPE_CHECKING:
    from rdlm.checkpoints.resident import ResidentBlocks

_BLOCK_KEY = 4


class Blockwise(Objective):
    """All blocks of a network: an objective of the blocks' own kind, in which each level belongs to one block
    (``at``).

    Without a level it is block 0, which owns sigma_max, where z = 0 is read.
    """

    blocks: nn.ModuleList
    resident: ResidentBlocks | None
    """Decides which blocks have their weights in memory (rdlm/checkpoints/resident.py); None: all have."""

    def _take(self, blocks: Sequence[Objective]) -> None:
        nn.Module.__init__(self)
        self.blocks, self.resident, self.block = nn.ModuleList(blocks), None, None
        first = blocks[0]
        assert first.block is not None
        self.config, self.noise, self.partition = first.config, first.noise, first.block.partition

    @property
    def first(self) -> Objective:
        return cast(Objective, self.blocks[0])

    @property
    def model(self) -> Backbone:  # type: ignore[override]
        return self.first.model

    @property
    def evidence_scale(self) -> nn.Parameter | None:
        return getattr(self.first, "evidence_scale", None)

    @property
    def parts(self) -> Sequence[Objective]:
        return [cast(Objective, block) for block in self.blocks]

    def at(self, sigma: float | None) -> Objective:
        return cast(Objective, self.blocks[self.partition.block_of(sigma)])

    def loss(self, batch: Batch, keys: Keys) -> LossTerms:
        raise TypeError("blocks train one at a time")

    def traced_loss(self, inputs: Tensor, num_steps: int, read_out: ReadOut) -> Tensor:
        raise TypeError("blocks train one at a time")

    def drops_modulation_activations(self) -> None:
        for part in self.parts:
            part.drops_modulation_activations()

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


@lru_cache
def _class_of(kind: type[Objective]) -> type[Blockwise]:
    return type(f"Blockwise{kind.__name__}", (Blockwise, kind), {})


def blockwise(blocks: Sequence[Objective]) -> Blockwise:
    """The network of these blocks, which are of one kind, noisiest block first."""
    kind = _class_of(type(blocks[0]))
    network = kind.__new__(kind)
    network._take(blocks)
    return network


def drawn_block(num_blocks: int, visit: int, seed: int) -> int:
    """The block that is trained at ``visit``, a pure function of (visit, seed), the same on every process.

    Every ``num_blocks`` visits train each block once, in shuffled order: no block is behind by more than one
    visit.
    """
    lap, place = divmod(visit, num_blocks)
    return int(
        np.random.default_rng([seed & 0xFFFF_FFFF_FFFF_FFFF, _BLOCK_KEY, lap]).permutation(num_blocks)[place]
    )
