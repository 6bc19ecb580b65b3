"""Keys and values of past positions, and the context that lets a ragged pack of rows attend to them.

Shapes: S segments (one per sequence in the pack), N rows (the segments' rows one after another), H heads, Dh
head width.

Two pools. ``KVPool`` makes the cache independent of K: it keeps one key per (layer, position); while a
position iterates its key is overwritten, so later positions see the keys of its last step (Huginn's shared
ring, "compress-s4"). ``FullKVPool`` keeps the keys of every step, and a row at step r reads the past at step
r (or at the past's last step, where it took fewer): exactly what training and scoring compute.
docs/results/main-job.md has what the shared ring loses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from rdlm.config.model import Llama3Scaling
from rdlm.nn.attention import attention, rotary_table

PAGE = 64
"""``FullKVPool`` allocates the keys of so many positions at once."""


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one sequence. slot: its place in the pool; start: position of its first row;
    length: rows.

    step: which core step the rows are at (0-based; 0 where the pool does not keep steps). commit: whether
    their keys are kept. append_own: an uncommitted row sees its own key in addition to the position's
    committed one instead of in its place.
    """

    slot: int
    start: int
    length: int
    step: int = 0
    commit: bool = True
    append_own: bool = False

    @property
    def end(self) -> int:
        return self.start + self.length


class KVPool:
    """One key and value of each position, for ``num_slots`` sequences of ``max_len`` positions, allocated at
    once.

    k and v are [layers, slots, max_len, Hkv, Dh].
    """

    keeps_steps = False

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.max_len, self.num_slots, self.device = max_len, num_slots, torch.device(device)
        shape = (num_layers, num_slots, max_len, num_kv_heads, head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    @property
    def num_bytes(self) -> int:
        """Allocated for all slots."""
        return 2 * self.k.numel() * self.k.element_size()

    def free(self, slot: int, length: int) -> int:
        """Clear the first ``length`` positions of a slot -> their bytes. A masked NaN would still be a NaN to
        the slot's next owner."""
        for store in (self.k, self.v):
            store[:, slot, :length] = 0
        return length * (self.num_bytes // (self.num_slots * self.max_len))

    def rows(self, segments: list[Segment], width: int) -> _SharedRows:
        """The first ``width`` positions of segments of one row each."""
        return _SharedRows(self, segments, width)

    def span(self, segment: Segment) -> _SharedSpan:
        """All positions up to the end of one committed segment."""
        return _SharedSpan(self, segment)


class _SharedSpan:
    def __init__(self, pool: KVPool, segment: Segment) -> None:
        self.pool, self.segment = pool, segment

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the segment's k and v [1, L, Hkv, Dh] -> those of all positions [1, end, Hkv, Dh]."""
        slot, start, end = self.segment.slot, self.segment.start, self.segment.end
        for store, new in ((self.pool.k, k), (self.pool.v, v)):
            store[layer, slot, start:end] = new
        return self.pool.k[layer, slot, None, :end], self.pool.v[layer, slot, None, :end]


class _SharedRows:
    def __init__(self, pool: KVPool, segments: list[Segment], width: int) -> None:
        self.pool, self.width, device = pool, width, pool.device
        kept = [(i, s.slot * pool.max_len + s.start) for i, s in enumerate(segments) if s.commit]
        self.lanes, self.places = torch.tensor(kept, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
        slots = [s.slot for s in segments]
        neighbours = slots == list(range(slots[0], slots[0] + len(slots)))
        self.slots: slice | Tensor = (
            slice(slots[0], slots[0] + len(slots))  # a view, no copy
            if neighbours and len(kept) == len(segments)
            else torch.tensor(slots, device=device)
        )

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the committed rows' k and v [S, Hkv, Dh] -> those of all positions [S, width, Hkv, Dh]."""
        return self._update(self.pool.k[layer], k), self._update(self.pool.v[layer], v)

    def _update(self, store: Tensor, new: Tensor) -> Tensor:
        if len(self.lanes):
            store.flatten(0, 1)[self.places] = new[self.lanes]
        return store[self.slots, : self.width]


class FullKVPool:
    """Keys and values of every core step of every position, allocated as they are written and freed with
    their sequence.

    A position takes the memory of the steps that it took, in the layers that took them: prelude and coda run
    once.
    """

    keeps_steps = True

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.max_len, self.num_slots, self.device = max_len, num_slots, torch.device(device)
        self._shape, self._dtype = (num_kv_heads, head_dim), dtype
        self._stores: list[list[list[Tensor]]] = [[[] for _ in range(num_layers)] for _ in range(num_slots)]
        """By slot, layer and step: keys and values [2, positions, Hkv, Dh], as many pages of positions as
        have been written."""
        self._taken = torch.zeros(num_slots, max_len, dtype=torch.long)
        """Core steps whose keys each position has."""

    @property
    def num_bytes(self) -> int:
        """Allocated at the moment."""
        return sum(self._bytes(slot) for slot in range(self.num_slots))

    def _bytes(self, slot: int) -> int:
        return sum(t.numel() * t.element_size() for steps in self._stores[slot] for t in steps)

    def free(self, slot: int, length: int) -> int:
        """Give the memory of a slot back -> its bytes."""
        freed = self._bytes(slot)
        self._stores[slot] = [[] for _ in self._stores[slot]]
        self._taken[slot, :length] = 0
        return freed

    def rows(self, segments: list[Segment], width: int) -> _FullRows:
        """The first ``width`` positions of segments of one row each."""
        return _FullRows(self, segments, width)

    def span(self, segment: Segment) -> _FullSpan:
        """All positions up to the end of one committed segment."""
        return _FullSpan(self, segment)

    def take(self, segment: Segment) -> None:
        """Record that the segment's positions have keys of its step."""
        taken = self._taken[segment.slot, segment.start : segment.end]
        taken.clamp_(min=segment.step + 1)

    def places(self, segment: Segment) -> list[tuple[int, Tensor]] | None:
        """Which step's keys a row of the segment reads at which positions; None where it reads its own step's
        everywhere."""
        last = self._taken[segment.slot, : segment.end].clamp(max=segment.step + 1) - 1
        if bool((last == segment.step).all()):
            return None
        steps = last.clamp(
            min=0
        )  # an uncommitted row's own position may have none: its key is put there later
        return [(int(t), (steps == t).nonzero().squeeze(1).to(self.device)) for t in steps.unique()]

    def write(self, layer: int, segment: Segment, new: Tensor) -> None:
        """Keep new [2, L, Hkv, Dh] of the segment's step."""
        steps = self._stores[segment.slot][layer]
        self._reserve(steps, segment.step, segment.end)
        steps[segment.step][:, segment.start : segment.end] = new

    def _reserve(self, steps: list[Tensor], step: int, end: int) -> None:
        while len(steps) <= step:
            steps.append(torch.empty(2, 0, *self._shape, dtype=self._dtype, device=self.device))
        old = steps[step]
        if old.shape[1] < end:
            size = min(self.max_len, -(-end // PAGE) * PAGE)
            steps[step] = torch.zeros(2, size, *self._shape, dtype=self._dtype, device=self.device)
            steps[step][:, : old.shape[1]] = old

    def read(self, layer: int, segment: Segment, places: list[tuple[int, Tensor]] | None) -> Tensor:
        """Keys and values that the segment's rows see, by what ``places`` found: [2, end, Hkv, Dh]."""
        steps = self._stores[segment.slot][layer]
        if places is None:
            self._reserve(steps, segment.step, segment.end)
            return steps[segment.step][:, : segment.end]
        found = torch.zeros(2, segment.end, *self._shape, dtype=self._dtype, device=self.device)
        for step, index in places:
            self._reserve(steps, step, segment.end)
            found[:, index] = steps[step][:, index]
        return found


class _FullSpan:
    def __init__(self, pool: FullKVPool, segment: Segment) -> None:
        self.pool, self.segment = pool, segment
        pool.take(segment)
        self.places = pool.places(segment)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the segment's k and v [1, L, Hkv, Dh] -> those of all positions [1, end, Hkv, Dh]."""
        self.pool.write(layer, self.segment, torch.cat([k, v]))
        past_k, past_v = self.pool.read(layer, self.segment, self.places).split(1)
        return past_k, past_v


class _FullRows:
    def __init__(self, pool: FullKVPool, segments: list[Segment], width: int) -> None:
        self.pool, self.segments, self.width = pool, segments, width
        for segment in segments:
            if segment.commit:
                pool.take(segment)
        self.places = [pool.places(segment) for segment in segments]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the committed rows' k and v [S, Hkv, Dh] -> those of all positions [S, width, Hkv, Dh]."""
        new = torch.stack([k, v])  # [2, S, Hkv, Dh]
        past = new.new_zeros(2, len(self.segments), self.width, *new.shape[2:])
        for i, (segment, places) in enumerate(zip(self.segments, self.places, strict=True)):
            if segment.commit:
                self.pool.write(layer, segment, new[:, i : i + 1])
            past[:, i, : segment.end] = self.pool.read(layer, segment, places)
        return past[0], past[1]


class PackedContext:
    """AttentionContext of a pack [1, N, ...]: row p of a sequence sees the pooled positions < p and its own
    segment up to p.

    Segments of one row (decoding) are attended together in one padded batch, longer ones (prefill) one by
    one. Packs whose segments stand in the order of their slots are fastest: a ``KVPool`` is read in place
    where slots are neighbours. Uncommitted segments must have length 1. Prelude and coda layers run once per
    position: their packs have step 0.
    """

    def __init__(self, pool: KVPool | FullKVPool, segments: list[Segment]) -> None:
        assert all(s.commit or s.length == 1 for s in segments), "uncommitted segments have one row"
        self.pool, self.segments = pool, segments
        self.device = pool.device
        self.firsts = list(accumulate((s.length for s in segments[:-1]), initial=0))
        self._tables: dict[tuple[int, float, Llama3Scaling | None], Tensor] = {}
        self._spans: dict[Segment, _SharedSpan | _FullSpan] = {}

    @cached_property
    def _positions(self) -> Tensor:
        return torch.tensor(
            [i for s in self.segments for i in range(s.start, s.start + s.length)], device=self.device
        )

    @cached_property
    def _singles(self) -> _Singles | None:
        chosen = [(first, s) for first, s in zip(self.firsts, self.segments, strict=True) if s.length == 1]
        return _Singles(self.pool, chosen) if chosen else None

    def positions(self) -> Tensor:
        return self._positions[None]

    def rope(self, num_dims: int, base: float, scaling: Llama3Scaling | None = None) -> Tensor:
        key = (num_dims, base, scaling)
        if key not in self._tables:  # every layer asks, at every core step
            table = rotary_table(num_dims, base, self.pool.max_len, self.device, scaling)
            self._tables[key] = table[self._positions][None, :, None]
        return self._tables[key]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [1, N, H, Dh], k and v [1, N, Hkv, Dh] -> [1, N, H, Dh]."""
        singles = self._singles
        if singles is not None and len(singles.rows) == len(self.segments):
            return singles.attend(q[0], k[0], v[0], layer)[None]
        out = torch.empty_like(q)
        if singles is not None:
            out[0, singles.rows] = singles.attend(
                q[0, singles.rows], k[0, singles.rows], v[0, singles.rows], layer
            )
        for first, segment in zip(self.firsts, self.segments, strict=True):
            if segment.length > 1:
                span = slice(first, first + segment.length)
                out[:, span] = self._attend_span(q[:, span], k[:, span], v[:, span], layer, segment)
        return out

    def _attend_span(self, q: Tensor, k: Tensor, v: Tensor, layer: int, segment: Segment) -> Tensor:
        if segment not in self._spans:
            self._spans[segment] = self.pool.span(segment)
        past_k, past_v = self._spans[segment].update(layer, k, v)
        if segment.start == 0:
            return attention(q, k, v, is_causal=True)
        mask = torch.ones(segment.length, segment.end, dtype=torch.bool, device=q.device).tril(segment.start)
        return attention(q, past_k, past_v, mask=mask)


class _Singles:
    """The one-row segments of a pack, attended as one batch padded to the longest past."""

    def __init__(self, pool: KVPool | FullKVPool, chosen: list[tuple[int, Segment]]) -> None:
        segments, device = [s for _, s in chosen], pool.device
        self.rows = torch.tensor([first for first, _ in chosen], device=device)
        # Where a row's own key stands among the gathered ones: at its position, or one past it.
        own = [s.start + (s.append_own and not s.commit) for s in segments]
        width = max(own) + 1
        self.own = torch.tensor(own, device=device)
        self.mask = (torch.arange(width, device=device) <= self.own.unsqueeze(1))[
            :, None, None
        ]  # [S, 1, 1, L]
        self.uncommitted = torch.tensor(
            [i for i, s in enumerate(segments) if not s.commit], dtype=torch.long, device=device
        )
        self.width, self.past = width, pool.rows(segments, width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [S, H, Dh], k and v [S, Hkv, Dh] -> [S, H, Dh]."""
        seen_k, seen_v = self.past.update(layer, k, v)
        return attention(
            q.unsqueeze(1), self._with_own(seen_k, k), self._with_own(seen_v, v), mask=self.mask
        ).squeeze(1)

    def _with_own(self, past: Tensor, new: Tensor) -> Tensor:
        """Keys or values [S, width, Hkv, Dh] with those of uncommitted rows, which are not kept, where they
        stand."""
        if len(self.uncommitted):
            if past.shape[1] < self.width:  # the appended own key of a row at the last position
                past = torch.cat([past, torch.zeros_like(past[:, :1])], dim=1)
            past[self.uncommitted, self.own[self.uncommitted]] = new[self.uncommitted]
        return past
