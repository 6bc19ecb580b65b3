"""Log-likelihoods of continuations in padded batches: which estimates there are, and how each is computed."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from rdlm.checkpoints.folder import Loaded
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.diffusion.masked_likelihood import bound, left_to_right
from rdlm.errors import UserError

logger = logging.getLogger("rdlm.eval")

Score = tuple[float, bool]
"""log p(continuation | context) in nats, and whether each of its tokens is greedy."""


@dataclass(frozen=True)
class Continuations:
    """Rows of ids, longest first, of which the last ``wanted`` ids each are scored; and how noise is drawn."""

    rows: list[list[int]]
    wanted: list[int]
    seed: int
    num_draws: int


class Estimator(ABC):
    """One way to estimate log p of a continuation."""

    owners: ClassVar[str]
    """Which checkpoints have it."""
    sees_padding: ClassVar[bool] = False
    """Whether rows of a batch must be equally long, because padding would be read; then all positions are
    also inputs."""

    def scored_steps(self, config: CheckpointConfig, num_steps: int) -> int:
        """K of the log-likelihoods of a run at K = num_steps."""
        return num_steps

    def described(self, config: CheckpointConfig, num_steps: int) -> str:
        """What the numbers are, for the results."""
        return config.objective.estimator_at(num_steps)

    @abstractmethod
    def score(self, loaded: Loaded, asked: Continuations, ks: Sequence[int]) -> dict[int, list[Score]]:
        """A score of each continuation at each K."""


class Mixture(Estimator):
    """The law of the token drawn last, over noise draws: normalised, but biased towards low probabilities.

    Greedy means a probability above 1/2, which is enough but not necessary.
    """

    owners = "sampling"

    def score(self, loaded: Loaded, asked: Continuations, ks: Sequence[int]) -> dict[int, list[Score]]:
        """Padded on the right, which no earlier position sees."""
        rows, wanted = asked.rows, asked.wanted
        padded = torch.zeros((len(rows), len(rows[0])), dtype=torch.int64)
        for row, target in zip(rows, padded, strict=True):
            target[: len(row)] = torch.tensor(row)
        padded = padded.to(next(loaded.denoiser.parameters()).device)
        inputs, targets = padded[:, :-1], padded[:, 1:]
        scores = loaded.denoiser.score(inputs, targets, ks, seed=asked.seed, num_draws=asked.num_draws)
        spans = [
            (i, slice(len(row) - 1 - n, len(row) - 1))
            for i, (row, n) in enumerate(zip(rows, wanted, strict=True))
        ]
        out = {}
        for k in ks:
            logprobs, hits = scores[k].logprobs.double().cpu(), scores[k].is_greedy.cpu()
            out[k] = [(float(logprobs[place].sum()), bool(hits[place].all())) for place in spans]
        return out


class Normalised(Mixture):
    """The softmax of one read-out: at every K of a thinking checkpoint, at K = 1 of a sampling one. Greedy
    is exact."""

    owners = "next-token"

    def scored_steps(self, config: CheckpointConfig, num_steps: int) -> int:
        return 1 if "mixture" in config.objective.estimators else num_steps


class Bound(Estimator):
    """A lower bound of a masked model, of a continuation whose length is known
    (rdlm/diffusion/masked_likelihood.py).

    Greedy means that the bound exceeds 1/2, which is enough but not necessary.
    """

    owners, sees_padding = "masked", True

    def score(self, loaded: Loaded, asked: Continuations, ks: Sequence[int]) -> dict[int, list[Score]]:
        """The last ``wanted`` ids of each row are modelled, those before stay visible."""
        ids, places = _continuations(loaded, asked)
        out = {}
        for k in ks:
            nats = bound(loaded.denoiser, ids, k, mask=places, seed=asked.seed, num_draws=asked.num_draws)
            totals = nats.double().sum(1).tolist()
            out[k] = [(-total, -total > math.log(0.5)) for total in totals]
        return out


class LeftToRight(Estimator):
    """The exact likelihood of a masked model that unmasks one token a step in order: the same at every K,
    and greedy is exact."""

    owners, sees_padding = "masked", True

    def scored_steps(self, config: CheckpointConfig, num_steps: int) -> int:
        return 1

    def described(self, config: CheckpointConfig, num_steps: int) -> str:
        return config.objective.estimator

    def score(self, loaded: Loaded, asked: Continuations, ks: Sequence[int]) -> dict[int, list[Score]]:
        """Nothing is drawn."""
        logprobs, greedy = left_to_right(loaded.denoiser, *_continuations(loaded, asked))
        found = list(zip(logprobs.double().sum(1).tolist(), greedy.all(1).tolist(), strict=True))
        return {k: found for k in ks}


ESTIMATORS: dict[str, Estimator] = {
    "normalised": Normalised(),
    "mixture": Mixture(),
    "bound": Bound(),
    "left_to_right": LeftToRight(),
}


def score_continuations(
    loaded: Loaded,
    pairs: Sequence[tuple[list[int], list[int]]],
    ks: Sequence[int],
    *,
    batch_size: int,
    max_length: int,
    seed: int = 0,
    num_draws: int = 8,
    estimator: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[int, list[Score]]:
    """{K: (log p(continuation | context) in nats, whether each of its tokens is greedy), in the order
    given}, in one pass.

    pairs: (context ids, at least one; continuation ids). What exceeds max_length positions is cut from the
    start of the context. estimator: a name in ESTIMATORS, by default the checkpoint's own; its class says
    what log p and greedy are. Raises UserError where a continuation alone is too long. ``progress`` takes
    the number of rows done.
    """
    rows = [(context + continuation)[-(max_length + 1) :] for context, continuation in pairs]
    wanted = [len(continuation) for _, continuation in pairs]
    if any(n >= len(row) for row, n in zip(rows, wanted, strict=True)):
        raise UserError(
            "max_length",
            max_length,
            f"a continuation has {max(wanted)} tokens",
            "raise it, or leave out the task",
        )
    cut = sum(len(row) < len(c) + len(t) for row, (c, t) in zip(rows, pairs, strict=True))
    if cut:
        logger.warning("%d of %d contexts exceed %d tokens and lose their start", cut, len(pairs), max_length)
    scores: dict[int, list[Score]] = {k: [(0.0, True)] * len(rows) for k in ks}
    longest_first = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), rows[i]))
    chosen_estimator = ESTIMATORS[estimator or loaded.config.objective.estimators[0]]
    alike = (lambda i: len(rows[i])) if chosen_estimator.sees_padding else (lambda i: 0)
    groups = [list(group) for _, group in groupby(longest_first, key=alike)]
    for chosen in (
        group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)
    ):
        asked = Continuations([rows[i] for i in chosen], [wanted[i] for i in chosen], seed, num_draws)
        found = chosen_estimator.score(loaded, asked, ks)
        for k in ks:
            for i, found_score in zip(chosen, found[k], strict=True):
                scores[k][i] = found_score
        if progress:
            progress(len(chosen))
    return scores


def _continuations(loaded: Loaded, asked: Continuations) -> tuple[Tensor, Tensor]:
    """ids [B, T] and the places [B, T] of the last ``wanted`` ids of each."""
    ids = torch.tensor(asked.rows, device=next(loaded.denoiser.parameters()).device)
    start = ids.shape[1] - torch.tensor(asked.wanted, device=ids.device).unsqueeze(1)
    return ids, torch.arange(ids.shape[1], device=ids.device) >= start
