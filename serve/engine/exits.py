"""Adaptive exits: when a position leaves before its last step. Criteria and their names are those of Geiping et al. 2025's code.

A latent criterion looks at the states before and after a step and costs nothing. A prediction criterion reads out at every check,
which costs coda and head, about half a step. N rows of states, M rows read out, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.engine.sequence import Sequence

Seen = Seq[Tensor | None]
"""What each row's last check left behind; None before the first."""
MIN_P = 0.1
"""Of minp-kl: what is less likely than this times the likeliest token counts as noise."""


def latent_change(before: Tensor, after: Tensor) -> Tensor:
    """|x' - x| / |x'| of each row: states [N, D] -> fp32 [N] (Geiping et al. 2025, "latent-diff"). 1 after a first step from zero."""
    after = after.float()
    return (after - before.float()).norm(dim=-1) / after.norm(dim=-1).clamp(
        min=torch.finfo(torch.float32).tiny
    )


def cosine_change(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos(x, x') of each row: states [N, D] -> fp32 [N]. 1 after a first step from zero."""
    return 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) of each row: log-probabilities [M, V] -> fp32 [M], never below 0 (Geiping et al. 2025, "kl")."""
    return (before.exp() * (before - after)).sum(-1).clamp(min=0)


def kl(logp: Tensor, seen: Seen) -> tuple[Tensor, list[Tensor]]:
    """KL(previous || new), from uniform before the first check. logp [M, V] -> values [M], what to remember."""
    uniform = logp.new_full(logp.shape[1:], -math.log(logp.shape[1]))
    return divergence(torch.stack([uniform if row is None else row for row in seen]), logp), list(logp)


def minp_kl(logp: Tensor, seen: Seen) -> tuple[Tensor, list[Tensor]]:
    """``kl`` of what min-p leaves: probabilities below 0.1 of the largest count as 1 / V, renormalised."""
    noise = logp < logp.amax(-1, keepdim=True) + math.log(MIN_P)
    return kl(logp.masked_fill(noise, -math.log(logp.shape[1])).log_softmax(-1), seen)


def entropy_diff(logp: Tensor, seen: Seen) -> tuple[Tensor, list[Tensor]]:
    """|H' - H| in nats, from H = 100 before the first check."""
    entropy = -(logp.exp() * logp).sum(-1)
    before = torch.stack([entropy.new_tensor(100.0) if row is None else row for row in seen])
    return (entropy - before).abs(), list(entropy)


def argmax_repeats(logp: Tensor, seen: Seen) -> tuple[Tensor, list[Tensor]]:
    """How many checks in a row have left the likeliest token where it was."""
    best = logp.argmax(-1)
    before = torch.stack([best.new_tensor([-1, 0]) if row is None else row for row in seen])  # token, repeats
    repeats = torch.where(best == before[:, 0], before[:, 1] + 1, 0)
    return repeats.float(), list(torch.stack([best, repeats], dim=1))


LATENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "latent-diff": latent_change,
    "cosine": cosine_change,
}
PREDICTION: dict[str, Callable[[Tensor, Seen], tuple[Tensor, list[Tensor]]]] = {
    "kl": kl, "minp-kl": minp_kl, "entropy-diff": entropy_diff, "argmax-stability": argmax_repeats,
}  # fmt: skip


def watches(sequence: Sequence, criteria: Collection[str]) -> bool:
    """Whether the step now taken is checked by one of ``criteria``, or is one that a later check compares with."""
    rule, segment = sequence.request.exit, sequence.segment
    assert segment is not None
    if (
        rule is None
        or rule.criterion not in criteria
        or (not rule.prefill and segment.start < len(sequence.request.prompt))
    ):
        return False
    taken = segment.step + 1
    if taken >= sequence.depth.drawn or taken % rule.check_every:
        return False
    first = {"argmax-stability": 1}.get(
        rule.criterion, rule.min_steps - rule.check_every * (rule.criterion in PREDICTION)
    )
    return taken >= first


def _leaves(sequence: Sequence, value: float) -> bool:
    """Whether the criterion's value ends the segment. A threshold of 0 never does."""
    rule, segment = sequence.request.exit, sequence.segment
    assert rule is not None and segment is not None
    if segment.step + 1 < rule.min_steps:
        return False
    return 0 < rule.threshold <= value if rule.criterion == "argmax-stability" else value < rule.threshold


def settled_states(batch: list[Sequence], lengths: list[int], before: Tensor, after: Tensor) -> set[int]:
    """Ids of the sequences that a latent criterion lets go: states [N, D], ``lengths`` rows each; all rows must have settled."""
    settled: set[int] = set()
    for name, change in LATENT.items():
        if any(watches(s, (name,)) for s in batch):
            values = iter(change(before, after).tolist())
            largest = [max(islice(values, length)) for length in lengths]
            settled |= {
                s.id
                for s, value in zip(batch, largest, strict=True)
                if watches(s, (name,)) and _leaves(s, value)
            }
    return settled


def settled_predictions(sequences: list[Sequence], logits: Tensor, seen: dict[int, Tensor]) -> set[int]:
    """Ids of those that a prediction criterion lets go: logits [M, V]. ``seen`` (by sequence id) is brought up to date."""
    settled: set[int] = set()
    groups: dict[str, list[int]] = defaultdict(list)
    for i, sequence in enumerate(sequences):
        assert sequence.request.exit is not None
        groups[sequence.request.exit.criterion].append(i)
    for name, rows in groups.items():
        ids = [sequences[i].id for i in rows]
        values, kept = PREDICTION[name](logits[rows].log_softmax(-1), [seen.get(j) for j in ids])
        seen.update(zip(ids, kept, strict=True))
        settled |= {
            j for i, j, value in zip(rows, ids, values.tolist(), strict=True) if _leaves(sequences[i], value)
        }
    return settled
