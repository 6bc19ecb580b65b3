"""Text from a masked denoiser in K steps, and the bound on the likelihood of just that sampler.

K steps have the levels K/K, (K-1)/K, .., 1/K, times the share that is hidden at the start of what training may hide. At step k, counted
down from K, a hidden token comes into sight with probability (alpha_s - alpha_t) / (1 - alpha_t) = 1/k, drawn from the denoiser (MD4,
Shi et al. 2024, Sec. 4); one that is in sight never changes.

Shapes: ids [B, T] int64, ``mask_id`` where hidden; levels [B] fp32.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from rdlm.decoding import sample, uniform
from rdlm.decoding_types import History, Order, SamplingParams
from rdlm.denoiser import Denoiser
from rdlm.masked_denoiser import MaskedDenoiser
from rdlm.randomness import generator
from rdlm.sampler import run

_BOUND_KEY, _TURN, _TOKEN = 6, 0, 1
POSITIONS_AT_ONCE = 1 << 14
"""``left_to_right`` sends the network at most so many positions in one pass, or else one row."""


@torch.no_grad()
def bound(
    denoiser: Denoiser,
    targets: Tensor,
    num_steps: int,
    *,
    mask: Tensor | None = None,
    always_given: bool = False,
    seed: int = 0,
    num_draws: int = 8,
) -> Tensor:
    """Nats [B, T] fp32 whose sum over a row is an unbiased estimate of a bound: E sum >= -log p(row) of the sampler with K = num_steps.

    The negative ELBO of discrete time (MD4 Sec. 3): sum over k of 1/k times the expected cross-entropies of the tokens hidden at level
    k/K; it has no other terms, since all is hidden at level 1 and nothing at 0. ``num_draws`` of its K terms are evaluated, one of each
    of as many equal parts of 1 .. K, on a hiding of its own. Draws depend on (seed, the row's ids, draw): not on the batch, and
    the same for all K. At K = 1 nothing is random. How the nats fall on positions is the draw's doing; only sums mean something.

    mask: bool [B, T], True where a token is modelled. The others are in sight all along, and what is bounded is the likelihood of the
    modelled ones given these, as ``unmask`` draws them. always_given: see there.
    """
    draws = num_draws if num_steps > 1 else 1
    keys = [zlib.crc32(row.numpy().tobytes()) for row in targets.cpu()]
    nats = torch.zeros(targets.shape, device=targets.device)
    whole = mask is None or always_given
    shares = [1.0] * len(targets) if mask is None or whole else mask.float().mean(1).tolist()
    for draw in range(draws):
        rngs = [generator(seed, _BOUND_KEY, key, draw) for key in keys]
        places = [(draw + float(torch.rand((), generator=rng, dtype=torch.float64))) / draws for rng in rngs]
        k = [1 + int(num_steps * place) for place in places]
        levels = [share * each / num_steps for share, each in zip(shares, k, strict=True)]
        level, rate = torch.tensor(levels), torch.tensor([each / num_steps for each in k])
        rand = torch.stack([torch.rand(targets.shape[1], generator=rng) for rng in rngs])
        hidden = (rand < rate.unsqueeze(1)).to(targets.device)
        lowest, highest = 1 + num_steps * draw // draws, min(num_steps, 1 + num_steps * (draw + 1) // draws)
        possible = [each / num_steps for each in range(lowest, highest + 1)] if whole else []
        for owner, rows in _by_owner(denoiser, levels, possible):
            here = hidden[rows] if mask is None else hidden[rows] & mask[rows]
            states = owner.hidden(targets[rows].masked_fill(here, owner.mask_id), level[rows])[here]
            losses = owner.loss(states, targets[rows][here], torch.ones(len(states), device=states.device))[1]
            weight = torch.tensor([num_steps / k[row] / draws for row in rows.tolist()], device=targets.device)
            nats[rows] += torch.zeros_like(nats[rows]).masked_scatter(here, losses) * weight.unsqueeze(1)
    return nats


@torch.no_grad()
def left_to_right(denoiser: Denoiser, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability of each token given those before it, all from itself on hidden -> fp32 [B, T], and whether it is the arg max, bool.

    By the chain rule their sum over a row is exactly log p(row) of ``unmask`` in this order with as many steps as tokens (temperature 1,
    all ids allowed). One pass a token, whatever K means elsewhere. mask: bool [B, T], True where a token is modelled; the others are in
    sight all along and have log-probability 0.
    """
    length = targets.shape[1]
    modelled = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    logprobs, greedy = torch.zeros(targets.shape, device=targets.device), torch.ones_like(modelled)
    rows, places = modelled.nonzero().unbind(1)
    chunk = max(1, POSITIONS_AT_ONCE // length)
    for row, place in zip(rows.split(chunk), places.split(chunk), strict=True):
        hidden = modelled[row] & (torch.arange(length, device=row.device) >= place.unsqueeze(1))
        levels = hidden.float().mean(1)
        for owner, mine in _by_owner(denoiser, levels.tolist()):
            at, truth = (row[mine], place[mine]), targets[row[mine], place[mine]]
            states = owner.hidden(targets[at[0]].masked_fill(hidden[mine], owner.mask_id), levels[mine])
            logits = owner.predict(states[torch.arange(len(mine)), at[1]]).logits()
            logprobs[at] = logits.log_softmax(-1).gather(1, truth.unsqueeze(1)).squeeze(1)
            greedy[at] = logits.argmax(1) == truth
    return logprobs, greedy


@torch.no_grad()
def unmask(
    denoiser: Denoiser,
    ids: Tensor,
    num_steps: int,
    params: SamplingParams,
    *,
    seed: int = 0,
    order: Order = "random",
    num_tokens: int | None = None,
    always_given: bool = False,
) -> Tensor:
    """Fill in the hidden tokens of ids [B, T] in ``num_steps`` steps -> ids [B, T]; tokens in sight stay what they are.

    params: temperature, top-k, top-p and min-p act on every draw. num_tokens: ids from there on are never drawn. Draws depend on
    (seed, row, position, step). A row with a clean prompt starts at the level that its hidden share is in training, so with a long one
    the first block may never be asked. Steps at which nothing comes into sight call no network. left_to_right takes no more steps than
    tokens are hidden, as evenly as whole tokens go: one a step, the level is exactly the share that is hidden.

    always_given: what is in sight at the start never counted in training (``Batch.mask``: rows of a task with its inputs). A level is then
    the hidden share of the others alone, as it is in ``masked_terms``: sampling starts at 1.
    """
    mask_id = cast(MaskedDenoiser, denoiser.at(1.0)).mask_id
    start = [1.0] * len(ids) if always_given else (ids == mask_id).float().mean(1).tolist()
    steps = torch.full((len(ids),), num_steps)
    if order == "left_to_right":
        place, count = (ids == mask_id).cumsum(1), (ids == mask_id).sum(1, keepdim=True).clamp(min=1)
        steps = count[:, 0].clamp(max=num_steps).cpu()
        due = (place * steps.to(ids.device).unsqueeze(1) / count).ceil().long() - 1
    else:
        turn = torch.tensor([[uniform(seed, _TURN, b, i) for i in range(ids.shape[1])] for b in range(len(ids))])
        due = (num_steps * turn).long().to(ids.device)  # the step at which a position's turn comes: 0 is the first

    def step(ids: Tensor, k: int) -> Tensor:
        hidden = ids == mask_id
        wanted = hidden if order == "confidence" else hidden & (due == k)
        if not bool(wanted.any()):
            return ids
        levels = [max(share * (own - k) / own, 1e-6) for share, own in zip(start, steps.tolist(), strict=True)]
        out = ids.clone()
        for owner, rows in _by_owner(denoiser, levels):
            chosen = wanted[rows]
            if not bool(chosen.any()):
                continue
            states = owner.hidden(ids[rows], torch.tensor([levels[row] for row in rows.tolist()]))[chosen]
            logits = owner.predict(states).logits()[:, :num_tokens]
            places = [(int(rows[b]), int(i)) for b, i in chosen.nonzero().tolist()]
            uniforms = [uniform(seed, _TOKEN, *place, k) for place in places]
            drawn = sample(logits, [params] * len(places), [History()] * len(places), uniforms)
            filled = ids[rows].masked_scatter(chosen, drawn)
            if order == "confidence":
                score = logits.log_softmax(-1).gather(1, drawn.unsqueeze(1)).squeeze(1)
                scores = torch.full(chosen.shape, -torch.inf, device=ids.device).masked_scatter(chosen, score)
                filled = torch.where(_best(scores, chosen, num_steps - k), filled, ids[rows])
            out[rows] = filled
        return out

    return run(step, ids, num_steps)


def _best(scores: Tensor, hidden: Tensor, steps_left: int) -> Tensor:
    """The share 1 / steps_left, rounded up, of the hidden positions of each row that score highest: bool [B, T]."""
    count = (hidden.sum(1, keepdim=True) / steps_left).ceil()
    rank = scores.argsort(stable=True, dim=1, descending=True).argsort(1)
    return (rank < count) & hidden


def _by_owner(
    denoiser: Denoiser, levels: Sequence[float], possible: Sequence[float] = ()
) -> Iterator[tuple[MaskedDenoiser, Tensor]]:
    """The denoisers that own the rows' levels, each with its rows' numbers.

    Owners of ``possible`` levels come in any case, without rows: every process then makes the same calls, which ZeRO 3 needs.
    """
    rows: dict[Denoiser, list[int]] = {denoiser.at(level): [] for level in possible}
    for row, level in enumerate(levels):
        rows.setdefault(denoiser.at(level), []).append(row)
    for owner, mine in rows.items():
        yield cast(MaskedDenoiser, owner), torch.tensor(mine, dtype=torch.long)
