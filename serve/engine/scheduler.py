"""Which rows step now, and K of the next token where it may vary. Pure bookkeeping over Sequence objects: no
torch, no clock, no threads. All times are seconds of the engine's clock.

One engine step is one core step of every open segment. Positions after the prompt always run (at most
``num_slots`` times a wavefront's); longer prompt chunks share ``prefill_rows`` further rows, strictly first come
first served, so nothing starves. Positions of one K begin together: they then share one pass through prelude,
coda and head, whose weights they read once each if they are some steps apart. So a sequence that joins others
waits once, for less than K steps, after its first token. For the same reason positions that are about to take
their last step wait for others that soon will, where that costs less than the read-out that it saves. A sequence
owns a slot of the cache from admission to its end: admission is what keeps memory bounded.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from serve.engine.sequence import NO_SLOT, Sequence, StepCounts

MOST_WAITING = 0.14
"""Share of a core step's rows that may be missing for a read-out to be shared: of the core steps that depths
save, 95 % stay saved."""


class Scheduler:
    """First come, first served over a fixed number of cache slots."""

    def __init__(self, num_slots: int, prefill_rows: int, chunk: int, readout_cost: float = 0.0) -> None:
        """num_slots: sequences in flight; prefill_rows: prompt positions in one step; chunk: prompt positions
        of one segment. readout_cost: of a pass through coda, head and prelude, in core steps; 0: no position waits
        for others to be read out."""
        if chunk > prefill_rows:
            raise ValueError(
                f"chunk ({chunk}) exceeds prefill_rows ({prefill_rows}): no prompt could ever start"
            )
        self.num_slots, self.prefill_rows, self.chunk = num_slots, prefill_rows, chunk
        self._waiting_share = min(readout_cost / 2, MOST_WAITING)
        self.waiting: deque[Sequence] = deque()
        self.running: OrderedDict[int, Sequence] = OrderedDict()
        self._free = list(range(num_slots - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def admit(self) -> None:
        """Give free slots to the sequences that have waited longest."""
        while self.waiting and self._free:
            sequence = self.waiting.popleft()
            sequence.slot = self._free.pop()
            self.running[sequence.id] = sequence

    def schedule(self) -> list[Sequence]:
        """Open segments, and return the sequences whose segment steps now, oldest first."""
        budget = self.prefill_rows - sum(
            s.length for s in self.running.values() if s.length > 1 and not s.is_wavefront
        )
        blocked = False
        under_way = {s.counts.drawn for s in self.running.values() if s.aligns and s.is_open and s.step}
        for sequence in self.running.values():
            if sequence.is_open or sequence.waits_for_prefix:
                continue
            if sequence.aligns and sequence.counts.drawn in under_way:
                continue
            length = sequence.next_length()
            if length == 1:
                sequence.open()
            elif not blocked and (
                length <= budget or budget == self.prefill_rows
            ):  # a longer segment has a step to itself
                sequence.open()
                budget -= length
            else:
                blocked = True  # a later, shorter prompt must not overtake
        stepping = [s for s in self.running.values() if s.is_open]
        held = self._held(stepping) if self._waiting_share else ()
        return [s for s in stepping if s.id not in held]

    def _held(self, stepping: list[Sequence]) -> set[int]:
        """Ids of the positions whose last step waits for others, whose last step comes soon enough."""
        decoded = [s for s in stepping if s.steps_left is not None]
        last = {s.id for s in decoded if s.steps_left == 1}
        later = [s.steps_left - 1 for s in decoded if s.steps_left is not None and s.id not in last]
        missing = len(last) * min(later, default=0)
        return last if 0 < missing < self._waiting_share * len(stepping) else set()

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its state, and free its slot."""
        if self.running.pop(sequence.id, None) is not None:
            self._free.append(sequence.slot)
            sequence.slot, sequence.length = NO_SLOT, 0
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @property
    def free_slots(self) -> int:
        return len(self._free)


class StepCost:
    """Seconds of one core step of the engine as a + b * rows: least squares in which older steps fade."""

    FADE = 0.99
    """Weight of a step one step later: about the last hundred count."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0
        self._unfinished: list[int] = []
        self._unfinished_s = 0.0

    def observe(self, rows: int, seconds: float, finished: bool = True) -> None:
        """A step over ``rows`` rows took ``seconds``. finished: whether the device had done its work when the
        clock was read.

        An accelerator only queues kernels until something waits for it: steps that nothing waited for share
        the time of the next one that was waited for, instead of teaching how long launches take.
        """
        self._unfinished.append(rows)
        self._unfinished_s += seconds
        if not finished:
            return
        share = self._unfinished_s / len(self._unfinished)
        for count in self._unfinished:
            self._add(count, share)
        self._unfinished, self._unfinished_s = [], 0.0

    def _add(self, rows: int, seconds: float) -> None:
        self._weight = self.FADE * self._weight + 1
        self._rows = self.FADE * self._rows + rows
        self._seconds = self.FADE * self._seconds + seconds
        self._rows_rows = self.FADE * self._rows_rows + rows * rows
        self._rows_seconds = self.FADE * self._rows_seconds + rows * seconds

    def predict(self, rows: int) -> float:
        """Seconds of a step over ``rows`` rows, at least a tenth of the average; 0 before anything was
        observed."""
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


class Deadlines:
    """The sequences whose K varies, by schedule or by deadline, which lowers K before it ends an answer; and what
    the next core step of each may cost."""

    def __init__(self) -> None:
        self.cost = StepCost()
        self._varied: dict[int, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        budget = sequence.request.budget
        if budget.schedule or budget.max_ms is not None:
            self._varied[sequence.id] = sequence

    def remove(self, sequence: Sequence) -> None:
        self._varied.pop(sequence.id, None)

    def expired(self, now: float) -> list[Sequence]:
        """Sequences whose deadline has passed."""
        return [s for s in self._varied.values() if s.deadline is not None and now >= s.deadline]

    def update(
        self, now: float, running: int, step_counts: Callable[[int, frozenset[int]], StepCounts]
    ) -> None:
        """Set the step counts of every segment that may open now. ``running``: sequences that share the
        engine's steps."""
        for sequence in self._varied.values():
            if not sequence.is_open:
                steps = self._steps(sequence, now, max(1, running))
                sequence.lowered += steps < sequence.request.budget.steps_at(sequence.next_token)
                sequence.counts = step_counts(steps, sequence.blocks)

    def _steps(self, sequence: Sequence, now: float, running: int) -> int:
        budget = sequence.request.budget
        requested = budget.steps_at(sequence.next_token)
        if sequence.deadline is None or not budget.lowers:
            return requested
        per_k = self._seconds_per_k(sequence, running)
        affordable = int((sequence.deadline - now) / per_k) if per_k > 0 else requested
        return max(min(requested, affordable), min(requested, budget.min_steps))

    def _seconds_per_k(self, sequence: Sequence, running: int) -> float:
        """What the rest of the answer costs for each step of K: the chunks of the prompt that are left, then
        every token."""
        waiting = max(0, len(sequence.request.prompt) - sequence.next_start)
        whole, rest = divmod(waiting, sequence.chunk)
        chunks = whole * self.cost.predict(sequence.chunk + running - 1) + (
            self.cost.predict(rest + running - 1) if rest else 0
        )
        decoded = max(0, sequence.request.max_tokens - len(sequence.output) - (1 if waiting else 0))
        return chunks + decoded * self.cost.predict(running)
