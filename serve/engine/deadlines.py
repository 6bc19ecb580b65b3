"""K of the next token where it may vary: schedules, and deadlines that lower K before they end an answer. No torch, no clock.

All times are seconds of the engine's clock.
"""

from __future__ import annotations

from collections.abc import Callable

from serve.engine.active import Active
from serve.engine.sequence import Depth, Sequence


class StepCost:
    """Seconds of one core step of the engine as a + b * rows: least squares in which older steps fade."""

    FADE = 0.99
    """Weight of a step one step later: about the last hundred count."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        self._weight = self.FADE * self._weight + 1
        self._rows = self.FADE * self._rows + rows
        self._seconds = self.FADE * self._seconds + seconds
        self._rows_rows = self.FADE * self._rows_rows + rows * rows
        self._rows_seconds = self.FADE * self._rows_seconds + rows * seconds

    def predict(self, rows: int) -> float:
        """Seconds of a step over ``rows`` rows, at least a tenth of the average; 0 before anything was observed."""
        if not self._weight:
            return 0.0
        mean_rows, mean = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows_rows / self._weight - mean_rows**2
        slope = (
            max(0.0, (self._rows_seconds / self._weight - mean_rows * mean) / variance)
            if variance > 0.25
            else 0.0
        )
        return max(mean / 10, mean + slope * (rows - mean_rows))


class Pace:
    """The sequences whose depth varies, and what the next core step of each may cost."""

    def __init__(self) -> None:
        self.cost = StepCost()
        self._varied: dict[int, Active] = {}

    def add(self, active: Active) -> None:
        request = active.sequence.request
        if request.budget.schedule or request.budget.max_ms is not None:
            self._varied[active.sequence.id] = active

    def remove(self, sequence_id: int) -> None:
        self._varied.pop(sequence_id, None)

    def expired(self, now: float) -> list[Active]:
        """Those whose time is over."""
        return [a for a in self._varied.values() if a.deadline is not None and now >= a.deadline]

    def settle(self, now: float, running: int, depth: Callable[[int], Depth]) -> None:
        """Set the depth of every segment that may open now. ``running``: sequences that share the engine's steps."""
        for active in self._varied.values():
            if active.sequence.segment is None:
                steps = self._steps(active, now, max(1, running))
                active.lowered += steps < active.sequence.request.budget.steps_at(active.sequence.next_token)
                active.sequence.depth = depth(steps)

    def _steps(self, active: Active, now: float, running: int) -> int:
        sequence, request = active.sequence, active.sequence.request
        asked = request.budget.steps_at(sequence.next_token)
        if active.deadline is None or not request.budget.lowers:
            return asked
        per_k = self._seconds_per_k(sequence, running)
        affordable = int((active.deadline - now) / per_k) if per_k > 0 else asked
        return max(min(asked, affordable), min(asked, request.budget.min_steps))

    def _seconds_per_k(self, sequence: Sequence, running: int) -> float:
        """What the rest of the answer costs for each step of K: the chunks of the prompt that are left, then every token."""
        waiting = max(0, len(sequence.request.prompt) - sequence.next_start)
        whole, rest = divmod(waiting, sequence.chunk)
        chunks = whole * self.cost.predict(sequence.chunk + running - 1) + (
            self.cost.predict(rest + running - 1) if rest else 0
        )
        decoded = max(0, sequence.request.max_tokens - len(sequence.output) - (1 if waiting else 0))
        return chunks + decoded * self.cost.predict(running)
