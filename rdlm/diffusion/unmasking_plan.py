"""At which step each hidden token of a text comes into sight: the plan of a masked model's sampler. No torch:
the server plans with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rdlm.sampling_params import Order, uniform

_TURN = 0
_LOWEST = 1e-6
"""Levels stay above 0, where nothing is hidden and a hidden token's weight has no bound."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one step brings into sight."""

    step: int
    """Of K; 0 is the first."""
    level: float
    """What the network is told of the share that is hidden."""
    count: int
    """Tokens that come into sight."""
    places: tuple[int, ...] | None
    """Where; None: of all that are hidden, those whose draw is the most probable."""


def turns(
    places: Sequence[int],
    num_steps: int,
    start: float,
    order: Order = "random",
    seed: int = 0,
    choice: int = 0,
) -> list[Turn]:
    """The turns of the hidden ``places`` of a row, in rising steps; steps at which nothing comes into sight
    have none.

    start: level at the first of K = num_steps steps; step k is told start (K - k) / K. Random turns depend on
    (seed, choice, place). left_to_right takes no more steps than places, as evenly as whole tokens go: one a
    step, the level is exactly the share that is hidden. confidence brings the share 1 / (K - k) of what is
    hidden into sight at step k, rounded up.
    """
    if order == "confidence":
        return _by_confidence(len(places), num_steps, start)
    count, due = len(places), defaultdict[int, list[int]](list)
    steps = min(num_steps, count) if order == "left_to_right" else num_steps
    for i, place in enumerate(places):
        k = (
            -(-(i + 1) * steps // count) - 1
            if order == "left_to_right"
            else int(steps * uniform(seed, _TURN, choice, place))
        )
        due[k].append(place)
    return [Turn(k, _level(start, k, steps), len(due[k]), tuple(due[k])) for k in sorted(due)]


def _by_confidence(hidden: int, num_steps: int, start: float) -> list[Turn]:
    found = []
    for k in range(num_steps):
        count = -(-hidden // (num_steps - k))
        if count:
            found.append(Turn(k, _level(start, k, num_steps), count, None))
        hidden -= count
    return found


def _level(start: float, step: int, num_steps: int) -> float:
    return max(start * (num_steps - step) / num_steps, _LOWEST)
