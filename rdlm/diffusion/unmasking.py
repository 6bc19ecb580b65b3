"""Text from a masked denoiser: hidden tokens come into sight in K steps, together with those of other texts
of any length.

K steps have the levels K/K, (K-1)/K, .., 1/K, times the share that is hidden at the start of what training
may hide. At step k, counted down from K, a hidden token comes into sight with probability (alpha_s - alpha_t)
/ (1 - alpha_t) = 1/k, drawn from the denoiser (MD4, Shi et al. 2024, Sec. 4); one that is in sight never
changes. Other orders than this one: rdlm/diffusion/unmasking_plan.py.

Shapes: B rows of T tokens, ids int64 with ``mask_id`` where hidden; P places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rdlm.diffusion.samplers import run
from rdlm.diffusion.unmasking_plan import Turn, turns
from rdlm.sampling import sample
from rdlm.sampling_params import History, Order, SamplingParams, uniform

_TOKEN = 1
LOGITS_AT_ONCE = 1 << 24
"""``fill`` holds at most so many logits (64 MiB of fp32), or else those of one text."""


class MaskedNetwork(Protocol):
    """What sampling needs of a masked model (rdlm/objectives/masked.py)."""

    @property
    def mask_id(self) -> int:
        """The id of a masked token."""

    def at(self, sigma: float | None) -> Any:
        """The network that owns a level."""

    def hidden(self, ids: Tensor, level: Tensor, lengths: Tensor | None = None) -> Tensor:
        """ids [B, T], level [B] -> hidden states [B, T, D]."""

    def predict(self, hidden: Tensor) -> Any:
        """Hidden states [..., D] -> a prediction with ``logits()`` [..., V]."""


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
    denoiser: MaskedNetwork,
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
    """Fill in the hidden tokens of ids [B, T] in ``num_steps`` steps -> ids [B, T]; tokens in sight stay what
    they are.

    params: temperature, top-k, top-p, min-p and biases act on every draw. num_tokens: ids from there on are
    never drawn. Draws depend on (seed, number of the row, place, step), the first row being number ``first``.
    A row with a clean prompt starts at the level that its hidden share is in training, so with a long one the
    first block may never be asked. rdlm/diffusion/unmasking_plan.py says what comes into sight when.

    always_given: what is in sight at the start never counted in training (``Batch.mask``: rows of a task with
    its inputs). A level is then the hidden share of the others alone, as it is in ``masked_terms``: sampling
    starts at 1.
    """
    hidden, drafts = ids == mask_of(denoiser), []
    for choice, (row, here) in enumerate(zip(ids.clone(), hidden, strict=True), first):
        places = here.nonzero().squeeze(1).tolist()
        plan = turns(places, num_steps, 1.0 if always_given else len(places) / len(row), order, seed, choice)
        drafts.append(Draft(row, plan, params, seed, choice))

    def step(drafts: list[Draft], k: int) -> list[Draft]:
        fill(
            denoiser,
            [draft for draft in drafts if draft.turn is not None and draft.turn.step == k],
            num_tokens,
        )
        return drafts

    return torch.stack([draft.ids for draft in run(step, drafts, num_steps)])


@torch.no_grad()
def fill(
    denoiser: MaskedNetwork, drafts: Sequence[Draft], num_tokens: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Take the next turn of every draft, together -> of each the places [P] that came into sight and their
    logits [P, V].

    The same tokens as alone, but for rounding. num_tokens: see ``unmask``.
    """
    mask_id, asked = mask_of(denoiser), []
    for draft in drafts:
        turn = draft.turn
        assert turn is not None
        places = (
            (draft.ids == mask_id).nonzero().squeeze(1) if turn.places is None else torch.tensor(turn.places)
        )
        asked.append(Asked(draft.ids, turn.level, places.to(draft.ids.device)))
    found = []
    for group in _in_memory([len(ask.places) * mask_id for ask in asked]):
        found += _take(
            [drafts[i] for i in group],
            [asked[i] for i in group],
            read(denoiser, [asked[i] for i in group]),
            num_tokens,
        )
    return found


def _take(
    drafts: Sequence[Draft], asked: Sequence[Asked], read_out: Sequence[Tensor], num_tokens: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Draw a token at each place that was read out, and write those that come into sight."""
    rows = [(draft, place) for draft, ask in zip(drafts, asked, strict=True) for place in ask.places.tolist()]
    logits, sizes = torch.cat(list(read_out))[:, :num_tokens], [len(ask.places) for ask in asked]
    uniforms = [uniform(d.seed, _TOKEN, d.choice, place, d.turns[d.taken].step) for d, place in rows]
    drawn = sample(logits, [d.params for d, _ in rows], [d.history(place) for d, place in rows], uniforms)
    found = []
    for draft, ask, whole, own, tokens in zip(
        drafts, asked, read_out, logits.split(sizes), drawn.split(sizes), strict=True
    ):
        turn = draft.turns[draft.taken]
        kept = torch.arange(len(tokens), device=tokens.device)
        if turn.places is None:
            score = own.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
            kept = score.argsort(stable=True, descending=True)[: turn.count]
        draft.ids[ask.places[kept]] = tokens[kept]
        draft.taken += 1
        found.append((ask.places[kept], whole[kept]))
    return found


def _in_memory(sizes: Sequence[int]) -> list[list[int]]:
    """Numbers of neighbours whose logits, ``sizes`` of them, are held at once."""
    groups: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = LOGITS_AT_ONCE
        groups[-1].append(i)
        room -= size
    return groups


@dataclass(frozen=True, slots=True)
class Asked:
    """A row of tokens and what the network is to say about it: ids [T], the level, and the places [P] that
    are read out."""

    ids: Tensor
    level: float
    places: Tensor


@torch.no_grad()
def read(denoiser: MaskedNetwork, asked: Sequence[Asked]) -> list[Tensor]:
    """Logits [P, V] fp32 of the places of each row. Rows of similar length share a pass, where their owner is
    the same."""
    found: dict[int, Tensor] = {}
    for owner, mine in by_owner(denoiser, [ask.level for ask in asked]):
        for group in _alike(mine.tolist(), [len(ask.ids) for ask in asked]):
            rows = [asked[i] for i in group]
            lengths = torch.tensor([len(row.ids) for row in rows])
            ids = nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True)
            ragged = int(lengths.min()) < ids.shape[1]
            states = owner.hidden(ids, torch.tensor([row.level for row in rows]), lengths if ragged else None)
            chosen = torch.cat([states[i, row.places] for i, row in enumerate(rows)])
            found.update(
                zip(
                    group,
                    owner.predict(chosen).logits().split([len(row.places) for row in rows]),
                    strict=True,
                )
            )
    return [found[i] for i in range(len(asked))]


def mask_of(denoiser: MaskedNetwork) -> int:
    """The id of a hidden token."""
    return denoiser.at(1.0).mask_id


def _alike(rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Rows in groups whose shortest has at least three quarters of the longest's tokens: padding costs no
    more than a third."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        if groups and 4 * lengths[row] >= 3 * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def by_owner(
    denoiser: MaskedNetwork, levels: Sequence[float], possible: Sequence[float] = ()
) -> Iterator[tuple[Any, Tensor]]:
    """The denoisers that own the rows' levels, each with its rows' numbers.

    Owners of ``possible`` levels come in any case, without rows: every process then makes the same calls,
    which ZeRO 3 needs.
    """
    rows: dict[MaskedNetwork, list[int]] = {denoiser.at(level): [] for level in possible}
    for row, level in enumerate(levels):
        rows.setdefault(denoiser.at(level), []).append(row)
    for owner, mine in rows.items():
        yield owner, torch.tensor(mine, dtype=torch.long)
