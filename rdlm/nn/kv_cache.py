"""Keys and values of past positions, and the context that lets a ragged pack of rows attend to them.

Shapes: S segments (one per sequence in the pack), N rows (the segments' rows one after another), H heads, Dh head width.

The choice that makes the cache independent of K, written down once: ``depth`` = 1 keeps one key per (layer, position); while a
position iterates its key is overwritten, so later positions see the keys of its last step (Huginn's shared ring, "compress-s4").
``depth`` = max K keeps the keys of every step, and a row at step r reads the past at step r (or at the past's last step, where
it took fewer): exactly what training and scoring compute. docs/results/main-job.md has what the shared ring loses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from rdlm.config.model import Llama3Scaling
from rdlm.nn.attention import attention, rotary_table


class KVPool:
    """Storage for ``num_slots`` sequences of ``max_len`` positions: k and v are [layers, slots, depth, max_len, Hkv, Dh]."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        depth: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, num_slots, depth, max_len, num_kv_heads, head_dim)
        self.depth, self.max_len, self.num_slots = depth, max_len, num_slots
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    @staticmethod
    def bytes_per_position(
        num_layers: int, num_kv_heads: int, head_dim: int, depth: int, dtype: torch.dtype
    ) -> int:
        """Bytes one position of one sequence takes: for admission and planning."""
        return 2 * num_layers * depth * num_kv_heads * head_dim * dtype.itemsize


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one sequence. slot: its place in the pool; start: position of its first row; length: rows.

    step: which core step the rows are at (0-based; read only where depth > 1). commit: whether their keys are kept.
    append_own: an uncommitted row sees its own key beside the position's committed one instead of in its place.
    """

    slot: int
    start: int
    length: int
    step: int = 0
    commit: bool = True
    append_own: bool = False


class PackedContext:
    """AttentionContext of a pack [1, N, ...]: row p of a sequence sees the pooled positions < p and its own segment up to p.

    Segments of one row (decoding) are attended together in one padded batch, longer ones (prefill) one by one. Packs whose
    segments stand in the order of their slots are fastest: the past of neighbouring slots is read where it lies.
    Uncommitted segments must have length 1. Prelude and coda layers run once per position: their packs have step 0.
    """

    def __init__(self, pool: KVPool, segments: list[Segment]) -> None:
        assert all(s.commit or s.length == 1 for s in segments), "uncommitted segments have one row"
        self.pool, self.segments = pool, segments
        self.device = pool.k.device
        self.firsts = list(accumulate((s.length for s in segments[:-1]), initial=0))
        self._tables: dict[tuple[int, float, Llama3Scaling | None], Tensor] = {}

    @cached_property
    def _positions(self) -> Tensor:
        return torch.tensor(
            [i for s in self.segments for i in range(s.start, s.start + s.length)], device=self.device
        )

    @cached_property
    def _singles(self) -> _Singles | None:
        chosen = [(first, s) for first, s in zip(self.firsts, self.segments, strict=True) if s.length == 1]
        return _Singles(self.pool, chosen) if chosen else None

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
        end, depth = segment.start + segment.length, min(segment.step, self.pool.depth - 1)
        for store, new in (
            (self.pool.k, k),
            (self.pool.v, v),
        ):  # later steps read this one until they have their own
            store[layer, segment.slot, depth:, segment.start : end] = new
        if segment.start == 0:
            return attention(q, k, v, is_causal=True)
        past_k, past_v = (
            store[layer, segment.slot, depth, :end].unsqueeze(0) for store in (self.pool.k, self.pool.v)
        )
        mask = torch.ones(segment.length, end, dtype=torch.bool, device=q.device).tril(segment.start)
        return attention(q, past_k, past_v, mask=mask)


class _Singles:
    """The one-row segments of a pack, attended as one batch padded to the longest past."""

    def __init__(self, pool: KVPool, chosen: list[tuple[int, Segment]]) -> None:
        segments, device = [s for _, s in chosen], pool.k.device
        self.pool, self.rows = pool, torch.tensor([first for first, _ in chosen], device=device)
        steps = [min(s.step, pool.depth - 1) for s in segments]
        # Where a row's own key stands among the gathered ones: at its position, or one past it.
        own = [s.start + (s.append_own and not s.commit) for s in segments]
        self.width = max(own) + 1
        self.own = torch.tensor(own, device=device)
        self.mask = (torch.arange(self.width, device=device) <= self.own.unsqueeze(1))[
            :, None, None
        ]  # [S, 1, 1, L]
        # A key goes to its own step and the later ones, which read it until they have their own: lanes and flat places in a layer.
        kept = [
            (lane, (s.slot * pool.depth + depth) * pool.max_len + s.start)
            for lane, (s, step) in enumerate(zip(segments, steps, strict=True))
            if s.commit
            for depth in range(step, pool.depth)
        ]
        self.lanes, self.places = torch.tensor(kept, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
        self.uncommitted = torch.tensor(
            [i for i, s in enumerate(segments) if not s.commit], dtype=torch.long, device=device
        )
        slots = [s.slot for s in segments]
        if (
            pool.depth == 1
            and not len(self.uncommitted)
            and slots == list(range(slots[0], slots[0] + len(slots)))
        ):
            self.past: tuple[slice | Tensor, int | Tensor] = (
                slice(slots[0], slots[0] + len(slots)),
                0,
            )  # a view, no copy
        else:
            self.past = (torch.tensor(slots, device=device), torch.tensor(steps, device=device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [S, H, Dh], k and v [S, Hkv, Dh] -> [S, H, Dh]."""
        seen = [self._seen(store[layer], new) for store, new in ((self.pool.k, k), (self.pool.v, v))]
        return attention(q.unsqueeze(1), seen[0], seen[1], mask=self.mask).squeeze(1)

    def _seen(self, store: Tensor, new: Tensor) -> Tensor:
        """Keep what is committed; keys or values that the rows see: [S, L, Hkv, Dh]. store: one layer's."""
        if len(self.lanes):
            store.flatten(0, 2)[self.places] = new[self.lanes]
        past = store[(*self.past, slice(0, self.width))]
        if len(self.uncommitted):
            if past.shape[1] < self.width:  # the appended own key of a row at the last position
                past = torch.cat([past, torch.zeros_like(past[:, :1])], dim=1)
            past[self.uncommitted, self.own[self.uncommitted]] = new[self.uncommitted]
        return past
