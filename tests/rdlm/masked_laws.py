"""Joint laws that a masked model could have learned, read as exact denoisers, and what follows from them by
summing over everything."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from rdlm.data.batch import Batch
from rdlm.objectives import Objective
from rdlm.objectives.base import Prediction

V, T = 64, 12


def batch(rows: int) -> Batch:
    ids = torch.randint(0, V, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(rows, T, dtype=torch.bool))


class Exact(nn.Module):
    """The exact denoiser of a joint law p [V, .., V] over T tokens, which asks about all positions at once;
    at any level the same."""

    def __init__(self, law: Tensor) -> None:
        super().__init__()
        self.law, self.mask_id, self.calls = law, law.shape[0], 0
        self.known: dict[tuple[int, ...], Tensor] = {}

    def at(self, sigma: float | None) -> Exact:
        return self

    def hidden(self, ids: Tensor, level: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-probabilities of each position given the tokens in sight: [B, T, V]."""
        self.calls += 1
        rows = [self._marginals(tuple(row)) for row in ids.tolist()]
        return torch.stack(rows) if rows else torch.zeros(0, ids.shape[1], self.mask_id)

    def _marginals(self, row: tuple[int, ...]) -> Tensor:
        if row not in self.known:
            law, dims = self.law, range(len(row))
            for position, token in enumerate(row):
                if token != self.mask_id:
                    index = torch.tensor([token])
                    law = torch.zeros_like(law).index_copy_(
                        position, index, law.index_select(position, index)
                    )
            law = law / law.sum()
            self.known[row] = torch.stack(
                [law.sum([d for d in dims if d != i]) if len(row) > 1 else law for i in dims]
            ).log()
        return self.known[row]

    def predict(self, states: Tensor) -> Prediction:
        return Prediction(states.clamp(min=-1e4).float())

    def cross_entropy(self, states: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        losses = -states.gather(1, targets.unsqueeze(1)).squeeze(1).float()
        return (losses * weight).sum(), losses


def joint(vocab: int, length: int, seed: int = 0) -> Tensor:
    law = (
        torch.rand((vocab,) * length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    )
    return law / law.sum()


def expected_bound(denoiser: Any, row: Tensor, num_steps: int) -> float:
    """The bound in full: all levels, all 2^T ways to hide."""
    ways = torch.tensor(list(itertools.product([False, True], repeat=len(row))))
    total = 0.0
    for k in range(1, num_steps + 1):
        level = k / num_steps
        share = torch.where(ways, level, 1 - level).prod(1)
        ids = row.expand(ways.shape)
        states = denoiser.hidden(ids.masked_fill(ways, denoiser.mask_id), torch.full((len(ways),), level))[
            ways
        ]
        losses = denoiser.cross_entropy(states, ids[ways], torch.ones(len(states)))[1]
        total += float((torch.zeros(ways.shape).masked_scatter(ways, losses).sum(1) * share).sum()) / k
    return total


class Levels(nn.Module):
    """Asks the block that owns the level."""

    def __init__(self, denoiser: Objective, mask_id: int) -> None:
        super().__init__()
        self.denoiser, self.mask_id = denoiser, mask_id

    def hidden(self, ids: Tensor, level: Tensor, lengths: Tensor | None = None) -> Tensor:
        self.owner: Any = self.denoiser.at(float(level[0]))
        return self.owner.hidden(ids, level)

    def cross_entropy(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        return self.owner.cross_entropy(*args)


def law_of(drawn: Tensor) -> dict[tuple[int, ...], float]:
    counts = Counter(map(tuple, drawn.tolist()))
    return {x: n / len(drawn) for x, n in counts.items()}


def distance(law: Tensor, drawn: Tensor) -> float:
    """Total variation."""
    found = law_of(drawn)
    return (
        sum(
            abs(float(law[x]) - found.get(x, 0.0))
            for x in itertools.product(range(law.shape[0]), repeat=law.dim())
        )
        / 2
    )
