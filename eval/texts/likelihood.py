"""Log-likelihoods of continuations in padded batches, through rdlm.scoring."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from rdlm.checkpoints.folder import Loaded
from rdlm.diffusion.masked_likelihood import bound, left_to_right
from rdlm.errors import UserError

logger = logging.getLogger("rdlm.eval")

Score = tuple[float, bool]


def score_continuations(
    loaded: Loaded,
    pairs: Sequence[tuple[list[int], list[int]]],
    ks: Sequence[int],
    *,
    batch_size: int,
    max_length: int,
    seed: int = 0,
    num_draws: int = 8,
    in_order: bool = False,
    progress: Callable[[int], object] | None = None,
) -> dict[int, list[Score]]:
    """{K: (log p(continuation | context) in nats, whether each of its tokens is greedy), in the order given}, in one pass.

    pairs: (context ids, at least one; continuation ids). What exceeds max_length positions is cut from the start of the context.
    rdlm/scoring.py says what is greedy in a mixture. Of masked models log p is a lower bound (rdlm.diffusion.masked_likelihood), of a continuation
    whose length is known, and greedy means that the bound exceeds 1/2, which is enough but not necessary; ``in_order`` takes their exact
    likelihood one token a step from left to right instead, the same at every K, and greedy is exact.
    Raises UserError where a continuation alone is too long. ``progress`` is told the rows done.
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
    masked = not loaded.config.objective.left_to_right
    score = _ordered_batch if in_order else _bound_batch if masked else _score_batch
    # A masked model would see the padding of a shorter row.
    groups = [list(group) for _, group in groupby(longest_first, key=lambda i: len(rows[i]) if masked else 0)]
    for chosen in (
        group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)
    ):
        found = score(loaded, [rows[i] for i in chosen], [wanted[i] for i in chosen], ks, seed, num_draws)
        for k in ks:
            for i, found_score in zip(chosen, found[k], strict=True):
                scores[k][i] = found_score
        if progress:
            progress(len(chosen))
    return scores


def _score_batch(
    loaded: Loaded, rows: list[list[int]], wanted: list[int], ks: Sequence[int], seed: int, num_draws: int
) -> dict[int, list[Score]]:
    """Longest row first, padded on the right, which no earlier position sees; the last ``wanted`` ids of each row are scored."""
    padded = torch.zeros((len(rows), len(rows[0])), dtype=torch.int64)
    for row, target in zip(rows, padded, strict=True):
        target[: len(row)] = torch.tensor(row)
    padded = padded.to(next(loaded.denoiser.parameters()).device)
    inputs, targets = padded[:, :-1], padded[:, 1:]
    scores = loaded.denoiser.score(inputs, targets, ks, seed=seed, num_draws=num_draws)
    spans = [
        (i, slice(len(row) - 1 - n, len(row) - 1))
        for i, (row, n) in enumerate(zip(rows, wanted, strict=True))
    ]
    out = {}
    for k in ks:
        logprobs, hits = scores[k].logprobs.double().cpu(), scores[k].is_greedy.cpu()
        out[k] = [(float(logprobs[place].sum()), bool(hits[place].all())) for place in spans]
    return out


def _bound_batch(
    loaded: Loaded, rows: list[list[int]], wanted: list[int], ks: Sequence[int], seed: int, num_draws: int
) -> dict[int, list[Score]]:
    """Rows of one length; the last ``wanted`` ids of each are modelled, those before stay in sight."""
    ids, places = _continuations(loaded, rows, wanted)
    out = {}
    for k in ks:
        nats = bound(loaded.denoiser, ids, k, mask=places, seed=seed, num_draws=num_draws).double().sum(1)
        out[k] = [(-total, -total > math.log(0.5)) for total in nats.tolist()]
    return out


def _ordered_batch(
    loaded: Loaded, rows: list[list[int]], wanted: list[int], ks: Sequence[int], seed: int, num_draws: int
) -> dict[int, list[Score]]:
    """As ``_bound_batch``; nothing is drawn."""
    logprobs, greedy = left_to_right(loaded.denoiser, *_continuations(loaded, rows, wanted))
    found = list(zip(logprobs.double().sum(1).tolist(), greedy.all(1).tolist(), strict=True))
    return {k: found for k in ks}


def _continuations(loaded: Loaded, rows: list[list[int]], wanted: list[int]) -> tuple[Tensor, Tensor]:
    """ids [B, T] and the places [B, T] of the last ``wanted`` ids of each."""
    ids = torch.tensor(rows, device=next(loaded.denoiser.parameters()).device)
    start = ids.shape[1] - torch.tensor(wanted, device=ids.device).unsqueeze(1)
    return ids, torch.arange(ids.shape[1], device=ids.device) >= start
