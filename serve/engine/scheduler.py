"""Which rows step now. Pure bookkeeping over Sequence objects: no torch, no clock, no threads.

One engine step is one core step of every open segment. Single rows always run (there are at most
``num_slots`` of them); longer prompt chunks share ``prefill_rows`` further rows, strictly first come first
served, so nothing starves. A sequence owns a slot of the cache from admission to its end: admission is what
keeps memory bounded.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from serve.engine.sequence import NO_SLOT, Sequence


class Scheduler:
    """First come, first served over a fixed number of cache slots."""

    def __init__(self, num_slots: int, prefill_rows: int, chunk: int) -> None:
        """num_slots: sequences in flight; prefill_rows: prompt positions in one step; chunk: prompt positions
        of one segment."""
        if chunk > prefill_rows:
            raise ValueError(
                f"chunk ({chunk}) exceeds prefill_rows ({prefill_rows}): no prompt could ever start"
            )
        self.num_slots, self.prefill_rows, self.chunk = num_slots, prefill_rows, chunk
        self.waiting: deque[Sequence] = deque()
        self.running: OrderedDict[int, Sequence] = OrderedDict()
        self._free = list(range(num_slots - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Sequence]:
        """Admit, open segments, and return the sequences whose segment steps now, oldest first."""
        while self.waiting and self._free:
            sequence = self.waiting.popleft()
            sequence.slot = self._free.pop()
            self.running[sequence.id] = sequence
        budget = self.prefill_rows - sum(s.length for s in self.running.values() if s.length > 1)
        blocked = False
        for sequence in self.running.values():
            if sequence.is_open:
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
        return [s for s in self.running.values() if s.is_open]

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
