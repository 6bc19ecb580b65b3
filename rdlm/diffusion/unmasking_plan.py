"""Which masked positions are unmasked at which step: the plan of a masked model's sampler. No torch: the
server plans with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rdlm.sampling_params import Order, uniform

_ORDER = 0
_LOWEST = 1e-6
"""Levels stay above 0, where nothing is masked and a masked token's weight has no bound."""


@dataclass(frozen=True, slots=True)
class UnmaskingStep:
    """What one step unmasks."""

    step: int
    """Number of the step among K; 0 is the first."""
    level: float
    """The masked share that the network is conditioned on."""
    count: int
    """Positions that are unmasked."""
    positions: tuple[int, ...] | None
    """Which; None: of all that are masked, those whose draw is the most probable."""


def unmasking_steps(
    positions: Sequence[int],
    num_steps: int,
    start: float,
    order: Order = "random",
    seed: int = 0,
    choice: int = 0,
) -> list[UnmaskingStep]:
    """The plan of a row with these masked positions, in rising steps; a step that unmasks nothing is left out.

    start: level at the first of K = num_steps steps; step k has level start (K - k) / K. The random order
    depends on (seed, choice, position). left_to_right takes no more steps than there are positions and
    spreads them evenly; with one a step the level is exactly the masked share. confidence unmasks the share
    1 / (K - k) of what is masked at step k, rounded up.
    """
    if order == "confidence":
        return _by_confidence(len(positions), num_steps, start)
    count, due = len(positions), defaultdict[int, list[int]](list)
    steps = min(num_steps, count) if order == "left_to_right" else num_steps
    for i, position in enumerate(positions):
        k = (
            -(-(i + 1) * steps // count) - 1
            if order == "left_to_right"
            else int(steps * uniform(seed, _ORDER, choice, position))
        )
        due[k].append(position)
    return [UnmaskingStep(k, _level(start, k, steps), len(due[k]), tuple(due[k])) for k in sorted(due)]


def _by_confidence(masked: int, num_steps: int, start: float) -> list[UnmaskingStep]:
    found = []
    for k in range(num_steps):
        count = -(-masked // (num_steps - k))
        if count:
            found.append(UnmaskingStep(k, _level(start, k, num_steps), count, None))
        masked -= count
    return found


def _level(start: float, step: int, num_steps: int) -> float:
    return max(start * (num_steps - step) / num_steps, _LOWEST)
