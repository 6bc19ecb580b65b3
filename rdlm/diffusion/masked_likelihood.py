"""Likelihoods of a masked denoiser: the exact one of its sampler from left to right, and a bound on that of
its sampler in random order.

Both samplers are in rdlm/diffusion/unmasking.py. Shapes: ids [B, T] int64, ``mask_id`` where masked.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from rdlm.diffusion.unmasking import Query, by_owner, mask_of, read
from rdlm.random_streams import generator

_BOUND_KEY = 6
POSITIONS_AT_ONCE = 1 << 14
"""``left_to_right`` sends the network at most so many positions in one pass, or else one row."""


@torch.no_grad()
def bound(
    denoiser: Any,
    targets: Tensor,
    num_steps: int,
    *,
    mask: Tensor | None = None,
    always_given: bool = False,
    seed: int = 0,
    num_draws: int = 8,
) -> Tensor:
    """Nats [B, T] fp32 whose sum over a row is an unbiased estimate of a bound: E sum >= -log p(row) of the
    sampler with K = num_steps.

    The negative ELBO of discrete time (MD4 Sec. 3): sum over k of 1/k times the expected cross-entropies of
    the tokens masked at level k/K; it has no other terms, since all is masked at level 1 and nothing at 0.
    ``num_draws`` of its K terms are evaluated, one of each of as many equal parts of 1 .. K, on a hiding of
    its own. Draws depend on (seed, the row's ids, draw): not on the batch, and the same for all K. At K = 1
    nothing is random. How the nats fall on positions is the draw's doing; only sums mean something.

    mask: bool [B, T], True where a token is modelled. The others are never masked, and what is bounded
    is the likelihood of the modelled ones given these, as ``unmask`` draws them. always_given: see there.
    """
    draws = num_draws if num_steps > 1 else 1
    keys = [zlib.crc32(row.numpy().tobytes()) for row in targets.cpu()]
    nats = torch.zeros(targets.shape, device=targets.device)
    whole = mask is None or always_given
    shares = [1.0] * len(targets) if mask is None or whole else mask.double().mean(1).tolist()
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
        for owner, rows in by_owner(denoiser, levels, possible):
            here = hidden[rows] if mask is None else hidden[rows] & mask[rows]
            states = owner.hidden(targets[rows].masked_fill(here, owner.mask_id), level[rows])[here]
            losses = owner.cross_entropy(
                states, targets[rows][here], torch.ones(len(states), device=states.device)
            )[1]
            weight = torch.tensor(
                [num_steps / k[row] / draws for row in rows.tolist()], device=targets.device
            )
            nats[rows] += torch.zeros_like(nats[rows]).masked_scatter(here, losses) * weight.unsqueeze(1)
    return nats


@torch.no_grad()
def left_to_right(denoiser: Any, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability of each token given those before it, itself and all behind it masked -> fp32 [B, T], and
    whether it is the arg max, bool.

    By the chain rule their sum over a row is exactly log p(row) of ``unmask`` in this order with as many
    steps as tokens (temperature 1, all ids allowed). One pass a token, whatever K means elsewhere. mask: bool
    [B, T], True where a token is modelled; the others are never masked and have log-probability 0.
    """
    length, mask_id = targets.shape[1], mask_of(denoiser)
    modelled = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    logprobs, greedy = torch.zeros(targets.shape, device=targets.device), torch.ones_like(modelled)
    rows, places = modelled.nonzero().unbind(1)
    if not len(rows):
        return logprobs, greedy
    chunk = max(1, POSITIONS_AT_ONCE // length)
    for row, place in zip(rows.split(chunk), places.split(chunk), strict=True):
        hidden = modelled[row] & (torch.arange(length, device=row.device) >= place.unsqueeze(1))
        levels, ids = hidden.double().mean(1).tolist(), targets[row].masked_fill(hidden, mask_id)
        asked = [Query(*each) for each in zip(ids, levels, place.split(1), strict=True)]
        logits, truth = torch.cat(read(denoiser, asked)), targets[row, place]
        logprobs[row, place] = logits.log_softmax(-1).gather(1, truth.unsqueeze(1)).squeeze(1)
        greedy[row, place] = logits.argmax(1) == truth
    return logprobs, greedy
