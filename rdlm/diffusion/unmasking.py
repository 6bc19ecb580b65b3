"""Sampling from a masked denoiser: masked tokens are unmasked in K steps, in texts of any length together.

The K steps have the levels K/K, (K-1)/K, .., 1/K, times the masked share at the start (of the tokens that
training may mask). At step k, counted down from K, a masked token is unmasked with probability (alpha_s -
alpha_t) / (1 - alpha_t) = 1/k and drawn from the denoiser (MD4, Shi et al. 2024, Sec. 4); an unmasked token
never changes. Other orders than this one: rdlm/diffusion/unmasking_plan.py.

Shapes: B rows of T tokens, ids int64 with ``mask_id`` where masked; P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rdlm.diffusion.samplers import run
from rdlm.diffusion.unmasking_plan import UnmaskingStep, unmasking_steps
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
    """A text some of whose tokens are masked, and the plan that unmasks them."""

    ids: Tensor
    """[T]; ``fill`` writes into it."""
    plan: Sequence[UnmaskingStep]
    params: SamplingParams
    seed: int = 0
    choice: int = 0
    """Draws depend on (seed, choice, position, step)."""
    ends: Collection[int] = ()
    """Ids that are not drawn before the position ``ends_from``."""
    ends_from: int = 0
    taken: int = 0

    @property
    def next_step(self) -> UnmaskingStep | None:
        """None: no token is masked any more."""
        return self.plan[self.taken] if self.taken < len(self.plan) else None

    def history(self, position: int) -> History:
        return History(banned=self.ends if position < self.ends_from else ())


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
    """Unmask the masked tokens of ids [B, T] in ``num_steps`` steps -> ids [B, T]; the others stay.

    params: temperature, top-k, top-p, min-p and biases act on every draw. num_tokens: ids from there on are
    never drawn. Draws depend on (seed, number of the row, position, step); the first row is number ``first``.
    A row with a clean prompt starts at the level of its masked share, so with a long prompt the first block
    may never run.

    always_given: tokens that are unmasked at the start never counted in training (``Batch.mask``: rows of a
    task with its inputs). The level is then the masked share of the others alone, as in the objective's loss:
    sampling starts at 1.
    """
    masked, drafts = ids == mask_of(denoiser), []
    for choice, (row, here) in enumerate(zip(ids.clone(), masked, strict=True), first):
        positions = here.nonzero().squeeze(1).tolist()
        start = 1.0 if always_given else len(positions) / len(row)
        plan = unmasking_steps(positions, num_steps, start, order, seed, choice)
        drafts.append(Draft(row, plan, params, seed, choice))

    def step(drafts: list[Draft], k: int) -> list[Draft]:
        fill(
            denoiser,
            [draft for draft in drafts if draft.next_step is not None and draft.next_step.step == k],
            num_tokens,
        )
        return drafts

    return torch.stack([draft.ids for draft in run(step, drafts, num_steps)])


@torch.no_grad()
def fill(
    denoiser: MaskedNetwork, drafts: Sequence[Draft], num_tokens: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Take the next step of every draft, together -> of each the positions [P] that were unmasked and their
    logits [P, V].

    The same tokens as alone, but for rounding. num_tokens: see ``unmask``.
    """
    mask_id, queries = mask_of(denoiser), []
    for draft in drafts:
        step = draft.next_step
        assert step is not None
        positions = (
            (draft.ids == mask_id).nonzero().squeeze(1)
            if step.positions is None
            else torch.tensor(step.positions)
        )
        queries.append(Query(draft.ids, step.level, positions.to(draft.ids.device)))
    found = []
    for group in _in_memory([len(query.positions) * mask_id for query in queries]):
        found += _take(
            [drafts[i] for i in group],
            [queries[i] for i in group],
            read(denoiser, [queries[i] for i in group]),
            num_tokens,
        )
    return found


def _take(
    drafts: Sequence[Draft], queries: Sequence[Query], read_out: Sequence[Tensor], num_tokens: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Draw a token at each position that was read out, and write those that are unmasked."""
    pairs = zip(drafts, queries, strict=True)
    rows = [(draft, position) for draft, query in pairs for position in query.positions.tolist()]
    logits, sizes = torch.cat(list(read_out))[:, :num_tokens], [len(query.positions) for query in queries]
    uniforms = [uniform(d.seed, _TOKEN, d.choice, position, d.plan[d.taken].step) for d, position in rows]
    drawn = sample(
        logits, [d.params for d, _ in rows], [d.history(position) for d, position in rows], uniforms
    )
    found = []
    for draft, query, whole, own, tokens in zip(
        drafts, queries, read_out, logits.split(sizes), drawn.split(sizes), strict=True
    ):
        step = draft.plan[draft.taken]
        kept = torch.arange(len(tokens), device=tokens.device)
        if step.positions is None:
            score = own.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
            kept = score.argsort(stable=True, descending=True)[: step.count]
        draft.ids[query.positions[kept]] = tokens[kept]
        draft.taken += 1
        found.append((query.positions[kept], whole[kept]))
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
class Query:
    """A row for one forward pass: ids [T], the level, and the positions [P] that
    are read out."""

    ids: Tensor
    level: float
    positions: Tensor


@torch.no_grad()
def read(denoiser: MaskedNetwork, queries: Sequence[Query]) -> list[Tensor]:
    """Logits [P, V] fp32 of the positions of each row. Rows of similar length share a pass, where their owner is
    the same."""
    found: dict[int, Tensor] = {}
    for owner, numbers in by_owner(denoiser, [query.level for query in queries]):
        for group in _alike(numbers.tolist(), [len(query.ids) for query in queries]):
            rows = [queries[i] for i in group]
            lengths = torch.tensor([len(row.ids) for row in rows])
            ids = nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True)
            ragged = int(lengths.min()) < ids.shape[1]
            states = owner.hidden(ids, torch.tensor([row.level for row in rows]), lengths if ragged else None)
            chosen = torch.cat([states[i, row.positions] for i, row in enumerate(rows)])
            found.update(
                zip(
                    group,
                    owner.predict(chosen).logits().split([len(row.positions) for row in rows]),
                    strict=True,
                )
            )
    return [found[i] for i in range(len(queries))]


def mask_of(denoiser: MaskedNetwork) -> int:
    """The id of a masked token."""
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
    for owner, numbers in rows.items():
        yield owner, torch.tensor(numbers, dtype=torch.long)
