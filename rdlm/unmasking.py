"""Text from a masked denoiser in K steps, and the bound on the likelihood of just that sampler.

K steps have the levels K/K, (K-1)/K, .., 1/K, times the share that is hidden at the start of what training may hide. At step k, counted
down from K, a hidden token comes into sight with probability (alpha_s - alpha_t) / (1 - alpha_t) = 1/k, drawn from the denoiser (MD4,
Shi et al. 2024, Sec. 4); one that is in sight never changes.

Shapes: ids [B, T] int64, ``mask_id`` where hidden; levels [B] fp32.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rdlm.decoding import sample
from rdlm.decoding_types import History, Order, SamplingParams, uniform
from rdlm.denoiser import Denoiser
from rdlm.masked_denoiser import MaskedDenoiser
from rdlm.randomness import generator
from rdlm.sampler import run
from rdlm.turns import Turn, turns

_BOUND_KEY, _TOKEN = 6, 1
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
        asked = [Asked(*each) for each in zip(ids, levels, place.split(1), strict=True)]
        logits, truth = torch.cat(read(denoiser, asked)), targets[row, place]
        logprobs[row, place] = logits.log_softmax(-1).gather(1, truth.unsqueeze(1)).squeeze(1)
        greedy[row, place] = logits.argmax(1) == truth
    return logprobs, greedy


@dataclass(slots=True)
class Draft:
    """A text some of whose tokens are hidden, and what brings them into sight."""

    ids: Tensor
    """[T]; ``fill`` writes into it."""
    turns: Sequence[Turn]
    params: SamplingParams
    seed: int = 0
    choice: int = 0
    """Draws depend on (seed, choice, place, step)."""
    ends: Collection[int] = ()
    """Ids that are not drawn before the place ``ends_from``."""
    ends_from: int = 0
    taken: int = 0

    @property
    def turn(self) -> Turn | None:
        """The next one; None: nothing is hidden any more."""
        return self.turns[self.taken] if self.taken < len(self.turns) else None

    def history(self, place: int) -> History:
        return History(banned=self.ends if place < self.ends_from else ())


@torch.no_grad()
def unmask(
    denoiser: Denoiser,
    ids: Tensor,
    num_steps: int,
    params: SamplingParams,
    *,
    seed: int = 0,
    order: Order = "random",
    first: int = 0,
    num_tokens: int | None = None,
    always_given: bool = False,
) -> Tensor:
    """Fill in the hidden tokens of ids [B, T] in ``num_steps`` steps -> ids [B, T]; tokens in sight stay what they are.

    params: temperature, top-k, top-p, min-p and biases act on every draw. num_tokens: ids from there on are never drawn. Draws depend on
    (seed, number of the row, place, step), the first row being number ``first``. A row with a clean prompt starts at the level that its
    hidden share is in training, so with a long one the first block may never be asked. rdlm/turns.py says what comes into sight when.

    always_given: what is in sight at the start never counted in training (``Batch.mask``: rows of a task with its inputs). A level is then
    the hidden share of the others alone, as it is in ``masked_terms``: sampling starts at 1.
    """
    hidden, drafts = ids == mask_of(denoiser), []
    for choice, (row, here) in enumerate(zip(ids.clone(), hidden, strict=True), first):
        places = here.nonzero().squeeze(1).tolist()
        plan = turns(places, num_steps, 1.0 if always_given else len(places) / len(row), order, seed, choice)
        drafts.append(Draft(row, plan, params, seed, choice))

    def step(drafts: list[Draft], k: int) -> list[Draft]:
        fill(denoiser, [draft for draft in drafts if draft.turn is not None and draft.turn.step == k], num_tokens)
        return drafts

    return torch.stack([draft.ids for draft in run(step, drafts, num_steps)])


def fill(denoiser: Denoiser, drafts: Sequence[Draft], num_tokens: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Take the next turn of every draft, together -> of each the places [P] that came into sight and their logits [P, V].

    The same tokens as alone, but for rounding. num_tokens: see ``unmask``.
    """
    mask_id, asked = mask_of(denoiser), []
    for draft in drafts:
        turn = draft.turn
        assert turn is not None
        places = (draft.ids == mask_id).nonzero().squeeze(1) if turn.places is None else torch.tensor(turn.places)
        asked.append(Asked(draft.ids, turn.level, places.to(draft.ids.device)))
    if not drafts:
        return []
    read_out = read(denoiser, asked)
    rows = [(draft, place) for draft, ask in zip(drafts, asked, strict=True) for place in ask.places.tolist()]
    logits = torch.cat(read_out)[:, :num_tokens]
    uniforms = [uniform(d.seed, _TOKEN, d.choice, place, d.turns[d.taken].step) for d, place in rows]
    drawn = sample(logits, [d.params for d, _ in rows], [d.history(place) for d, place in rows], uniforms)
    found = []
    sizes = [len(ask.places) for ask in asked]
    for draft, ask, whole, own, tokens in zip(drafts, asked, read_out, logits.split(sizes), drawn.split(sizes), strict=True):
        turn = draft.turns[draft.taken]
        kept = torch.arange(len(tokens), device=tokens.device)
        if turn.places is None:
            score = own.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
            kept = score.argsort(stable=True, descending=True)[: turn.count]
        draft.ids[ask.places[kept]] = tokens[kept]
        draft.taken += 1
        found.append((ask.places[kept], whole[kept]))
    return found


@dataclass(frozen=True, slots=True)
class Asked:
    """A row of tokens and what the network is to say about it: ids [T], the level, and the places [P] that are read out."""

    ids: Tensor
    level: float
    places: Tensor


def read(denoiser: Denoiser, asked: Sequence[Asked]) -> list[Tensor]:
    """Logits [P, V] fp32 of the places of each row. Rows of similar length share a pass, where their owner is the same."""
    found: dict[int, Tensor] = {}
    for owner, mine in _by_owner(denoiser, [ask.level for ask in asked]):
        for group in _alike(mine.tolist(), [len(ask.ids) for ask in asked]):
            rows = [asked[i] for i in group]
            lengths = torch.tensor([len(row.ids) for row in rows])
            ids = nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True)
            ragged = int(lengths.min()) < ids.shape[1]
            states = owner.hidden(ids, torch.tensor([row.level for row in rows]), lengths if ragged else None)
            chosen = torch.cat([states[i, row.places] for i, row in enumerate(rows)])
            found.update(zip(group, owner.predict(chosen).logits().split([len(row.places) for row in rows]), strict=True))
    return [found[i] for i in range(len(asked))]


def mask_of(denoiser: Denoiser) -> int:
    """The id of a hidden token."""
    return cast(MaskedDenoiser, denoiser.at(1.0)).mask_id


def _alike(rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Rows in groups whose shortest has at least three quarters of the longest's tokens: padding costs no more than a third."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        if groups and 4 * lengths[row] >= 3 * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


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
