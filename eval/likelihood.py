"""Log-likelihoods of continuations in padded batches, through rdlm.scoring."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch

from rdlm.answers import greedy_answers
from rdlm.checkpoint import Loaded
from rdlm.errors import UserError
from rdlm.scoring import token_logprobs

logger = logging.getLogger("rdlm.eval")

HALF, SLACK = math.log(0.5), 1e-4


def score_continuations(
    loaded: Loaded,
    pairs: Sequence[tuple[list[int], list[int]]],
    num_steps: int,
    *,
    batch_size: int,
    max_length: int,
    seed: int = 0,
    num_draws: int = 8,
    progress: Callable[[int], object] | None = None,
) -> list[tuple[float, bool]]:
    """(log p(continuation | context) in nats, whether each of its tokens is the arg max) at K = num_steps, in the order given.

    pairs: (context ids, at least one; continuation ids). What exceeds max_length positions is cut from the start of the context.
    For mixtures (see rdlm/scoring.py) the flag is true only where every token has probability above 1/2.
    Raises UserError where a continuation alone is too long. ``progress`` is told the rows done.
    """
    rows = [(context + continuation)[-(max_length + 1) :] for context, continuation in pairs]
    wanted = [len(continuation) for _, continuation in pairs]
    if any(n >= len(row) for row, n in zip(rows, wanted, strict=True)):
        raise UserError("max_length", max_length, f"a continuation has {max(wanted)} tokens", "raise it, or leave out the task")
    cut = sum(len(row) < len(c) + len(t) for row, (c, t) in zip(rows, pairs, strict=True))
    if cut:
        logger.warning("%d of %d contexts exceed %d tokens and lose their start", cut, len(pairs), max_length)
    scores: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    longest_first = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), rows[i]))
    for start in range(0, len(rows), batch_size):
        chosen = longest_first[start : start + batch_size]
        found = _score_batch(loaded, [rows[i] for i in chosen], [wanted[i] for i in chosen], num_steps, seed, num_draws)
        for i, score in zip(chosen, found, strict=True):
            scores[i] = score
        if progress:
            progress(len(chosen))
    return scores


def _score_batch(
    loaded: Loaded, rows: list[list[int]], wanted: list[int], k: int, seed: int, num_draws: int
) -> list[tuple[float, bool]]:
    """Longest row first, padded on the right, which no earlier position sees; the last ``wanted`` ids of each row are scored."""
    padded = torch.zeros((len(rows), len(rows[0])), dtype=torch.int64)
    for row, target in zip(rows, padded, strict=True):
        target[: len(row)] = torch.tensor(row)
    padded = padded.to(next(loaded.denoiser.parameters()).device)
    inputs, targets = padded[:, :-1], padded[:, 1:]
    model, config = loaded.denoiser, loaded.config
    logprobs = token_logprobs(model, config, inputs, targets, [k], seed=seed, num_draws=num_draws)[k].cpu()
    spans = [slice(len(row) - 1 - n, len(row) - 1) for row, n in zip(rows, wanted, strict=True)]
    values = [logprobs[i, span] for i, span in enumerate(spans)]
    greedy = [bool((v > HALF).all()) for v in values]  # a majority is the maximum
    least = -math.log(config.model.vocab_size) - SLACK  # below the average no token is the maximum
    undecided = [i for i, v in enumerate(values) if not greedy[i] and bool((v >= least).all())]
    if undecided and (config.objective.k_meaning == "thinking" or k == 1):
        hits = (greedy_answers(model, config, inputs, [k], seed)[k] == targets).cpu()  # of all rows: the same random states
        for i in undecided:
            greedy[i] = bool(hits[i, spans[i]].all())
    return [(float(v.double().sum()), g) for v, g in zip(values, greedy, strict=True)]
