"""Keys and values of past positions in pages, and the context that lets a ragged pack of rows attend to them.

Shapes: S segments (one per sequence in the pack), N rows (the segments' rows one after another), H heads, Hkv
key-value heads, Dh head width.

Three policies. ``shared`` makes the cache independent of K: it keeps one key per (layer, position); while a
position iterates its key is overwritten, so later positions see the keys of its last step (Huginn's shared
ring, "compress-s4"). ``full`` keeps the keys of every step, and a row at step r reads the past at step r (or
at the past's last step, where it took fewer): exactly what training and scoring compute. ``first`` keeps those
of the first step: a row at a later one reads the past's and, of itself, what it has now, which it does not keep.
docs/results/main-job.md has what the shared policy loses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from rdlm.config.model import RopeScaling
from rdlm.device import staged
from rdlm.nn.attention import attention, rotary_table
from rdlm.nn.paged_attention import TILE, Visible, attend_pages

PAGE = 64
"""Positions of a page: the cache is allocated in these units."""
UNKEPT = PAGE
"""The first place of the page after page 0."""
LANES = 32
"""Values of a head are filled up to a multiple of this width, which any CPU reads in whole vectors."""


PageTable = dict[tuple[int, int], int]
"""The page of each (step, position // PAGE)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of one sequence. slot: its place in the cache; start: position of its first row;
    length: rows.

    step: which core step the rows are at (0-based; 0 where the cache does not keep steps). commit: whether
    their keys are kept. append_own: an uncommitted row sees its own key in addition to the position's
    committed one instead of in its place. two_way: every row sees all of the segment, which is the whole past.
    """

    slot: int
    start: int
    length: int
    step: int = 0
    commit: bool = True
    append_own: bool = False
    two_way: bool = False

    @property
    def end(self) -> int:
        return self.start + self.length


class Pages:
    """Keys and values of some layers in pages, and the table of where each position's are.

    k is [layers, pages, Hkv, Dh, PAGE], v [layers, pages, Hkv, PAGE, Dh or more]: products with queries run
    along positions, those with probabilities along the dimensions of a head. A *place* is page * PAGE +
    offset, and the offset is the position's own. by_rows: both are [layers, pages, PAGE, Hkv, Dh], which attention
    reads in place on a GPU (rdlm/nn/paged_attention.py). Page 0 stays zero: it is what unwritten positions show. The
    pages after it, for ``num_unkept`` places from ``UNKEPT`` on, are for keys that nobody keeps.
    """

    def __init__(
        self,
        layers: range,
        num_slots: int,
        num_steps: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        num_unkept: int = 0,
        by_rows: bool = False,
    ) -> None:
        self.layers, self.num_steps, self.device, self.by_rows = layers, num_steps, device, by_rows
        self._per_slot = -(-max_len // PAGE)
        self.places = np.zeros((num_slots, num_steps, self._per_slot * PAGE), dtype=np.int32)
        """[slots, steps, positions]: where a row at a step reads the key of a position. Once a position has
        keys of step r, rows of that and of every later step read them, until it has later ones."""
        first = 1 + -(-num_unkept // PAGE)
        count, width = num_slots * self._per_slot + first, -(-head_dim // LANES) * LANES
        self.head_dim, shape = head_dim, (len(layers), count, num_kv_heads)
        keys, values = (*shape, head_dim, PAGE), (*shape, PAGE, width)
        if by_rows:
            keys = values = (len(layers), count, PAGE, num_kv_heads, head_dim)
        self.k, self.v = (torch.zeros(sizes, dtype=dtype, device=device) for sizes in (keys, values))
        self._free = list(range(count - 1, first - 1, -1))
        self._room = count - first
        """How many further pages of a first step may be taken before some are evicted."""
        self._owned: list[PageTable] = [{} for _ in range(num_slots)]
        """Page tables of the pages that a slot owns, by slot."""
        self.moved = 0
        """How often the pools have got another address."""
        self.evict: Callable[[], bool] = lambda: False
        """Called when as many positions are kept as the slots have: frees some that were detached, or returns
        False."""

    @property
    def page_bytes(self) -> int:
        """Bytes of the keys and values of a page in all layers."""
        return sum(pool[:, 0].numel() * pool.element_size() for pool in (self.k, self.v))

    @property
    def num_used(self) -> int:
        return sum(len(owned) for owned in self._owned)

    def row(self, segment: Segment) -> np.ndarray:
        """Places that rows of a segment read: int32 [positions]. Layers that run once, and all of a shared
        cache, have one for every step."""
        return self.places[segment.slot, min(segment.step, self.num_steps - 1)]

    def write(self, layer: int, pages: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep k and v [N, Hkv, Dh] at places given as pages and offsets [N]."""
        if self.by_rows:
            self.k[layer][pages, offsets], self.v[layer][pages, offsets] = k, v
            return
        self.k[layer][pages, :, :, offsets] = k
        self.v[layer][pages, :, offsets, : self.head_dim] = v

    def read(self, layer: int, pages: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., Hkv, Dh] at places given as pages and offsets [...]."""
        if self.by_rows:
            return self.k[layer][pages, offsets], self.v[layer][pages, offsets]
        return (
            self.k[layer][pages, :, :, offsets],
            self.v[layer][pages, :, offsets, : self.head_dim],
        )

    def reserve(self, segment: Segment) -> None:
        """Give each position of a segment a place for the keys of its step."""
        owned, step = self._owned[segment.slot], min(segment.step, self.num_steps - 1)
        rows = self.places[segment.slot, step:]
        for index in range(segment.start // PAGE, (segment.end - 1) // PAGE + 1):
            page = owned.get((step, index))
            if page is None:
                page = owned[step, index] = self._take(step)
            first, last = max(segment.start, index * PAGE), min(segment.end, (index + 1) * PAGE)
            shift = (page - index) * PAGE
            if last - first == 1:
                rows[:, first] = first + shift
            else:
                rows[:, first:last] = np.arange(first + shift, last + shift, dtype=np.int32)

    def attach(self, slot: int, pages: PageTable) -> None:
        """Let a slot read pages that it does not own."""
        for (step, index), page in sorted(pages.items()):
            first = page * PAGE
            self.places[slot, step:, index * PAGE : (index + 1) * PAGE] = np.arange(first, first + PAGE)

    def detach(self, slot: int, start: int, end: int) -> PageTable:
        """Take the pages of positions start to end, bounds of pages, from the slot, which goes on reading them
        and writes there no more -> these pages."""
        owned, indices = self._owned[slot], range(start // PAGE, end // PAGE)
        return {key: owned.pop(key) for key in list(owned) if key[1] in indices}

    def is_finite(self, slot: int, start: int, end: int) -> bool:
        """Whether keys and values that the slot has written of positions start to end, bounds of pages, are
        numbers."""
        owned, indices = self._owned[slot], range(start // PAGE, end // PAGE)
        pages = [page for (_, index), page in owned.items() if index in indices]
        return all(bool(pool[:, pages].isfinite().all()) for pool in (self.k, self.v))

    def clear(self, pages: PageTable) -> None:
        """Free pages that nobody reads. They are cleared: a masked NaN would still be a NaN to their next
        owner."""
        for (step, _), page in pages.items():
            self.k[:, page], self.v[:, page] = 0, 0
            self._room += step == 0
        self._free += pages.values()

    def _take(self, step: int) -> int:
        if step == 0:
            while self._room <= 0 and self.evict():
                pass
            self._room -= 1
        if not self._free:
            self._grow()
        return self._free.pop()

    def _grow(self) -> None:
        count, self.moved = self.k.shape[1], self.moved + 1
        with torch.inference_mode(False):  # or nothing could be written outside of it
            self.k, self.v = (torch.cat([old, torch.zeros_like(old)], dim=1) for old in (self.k, self.v))
        self._free = list(range(2 * count - 1, count - 1, -1))

    def free(self, slot: int) -> int:
        """Free the pages of a slot -> their bytes."""
        pages, self._owned[slot] = self._owned[slot], {}
        self.clear(pages)
        self.places[slot] = 0
        return len(pages) * self.page_bytes


class KVCache:
    """Keys and values of every position of ``num_slots`` sequences of ``max_len`` positions, in pages.

    ``num_steps`` 1 is the shared policy, and the first one where only rows of the first step commit; more is
    the full one, for positions that take up to so many core steps. Memory is taken as positions are
    written, for the steps that they took in the layers that took them, and freed with their sequence.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        num_steps: int = 1,
        core_layers: range | None = None,
        num_unkept: int = 0,
        by_rows: bool = False,
    ) -> None:
        """core_layers: those that run once per core step (None: all); the others run once per position.

        num_unkept, by_rows: see Pages; rows of a PagedContext need an unkept place each.
        """
        self.max_len, self.num_slots, self.device = max_len, num_slots, torch.device(device)
        self._rotary: dict[tuple[int, float, RopeScaling | None], Tensor] = {}
        self.keeps_steps = num_steps > 1
        core = range(num_layers) if core_layers is None or not self.keeps_steps else core_layers
        once = [range(core.start), range(core.stop, num_layers)]
        self.stores = [
            Pages(
                layers,
                num_slots,
                steps,
                max_len,
                num_kv_heads,
                head_dim,
                dtype,
                self.device,
                num_unkept,
                by_rows,
            )
            for layers, steps in [(core, num_steps), *((layers, 1) for layers in once)]
            if layers
        ]

    def rotary(self, num_dims: int, base: float, scaling: RopeScaling | None) -> Tensor:
        """``rotary_table`` of all positions: the same tensor at every call."""
        key = (num_dims, base, scaling)
        if key not in self._rotary:
            self._rotary[key] = rotary_table(num_dims, base, self.max_len, self.device, scaling)
        return self._rotary[key]

    def store(self, layer: int) -> Pages:
        """The pages that keep a layer's keys."""
        return next(pages for pages in self.stores if layer in pages.layers)

    @property
    def num_bytes(self) -> int:
        """Bytes that are in use at the moment."""
        return sum(pages.num_used * pages.page_bytes for pages in self.stores)

    def read(self, layer: int, slot: int, step: int, length: int) -> Tensor:
        """Keys and values of the first ``length`` positions as a row at ``step`` sees them: [2, length, Hkv,
        Dh]."""
        store = self.store(layer)
        places = torch.from_numpy(store.row(Segment(slot, 0, length, step))[:length].astype(np.int64))
        pages, offsets = (places // PAGE).to(self.device), (places % PAGE).to(self.device)
        return torch.stack(store.read(layer - store.layers.start, pages, offsets))

    def free(self, slot: int) -> int:
        """Forget a sequence -> the bytes that it had."""
        return sum(pages.free(slot) for pages in self.stores)


class PackedContext:
    """AttentionContext of a pack [1, N, ...]: row p of a sequence sees the cached positions < p and its own
    segment up to p.

    Uncommitted segments must have length 1. Prelude and coda layers run once per position: their packs have
    step 0. ``attend`` is the reference in plain torch operations: segments of one row (decoding) are attended
    together in one padded batch, longer ones (prefill) one by one.
    """

    def __init__(self, cache: KVCache, segments: list[Segment]) -> None:
        assert all(s.commit or s.length == 1 for s in segments), "uncommitted segments have one row"
        assert all(s.start == 0 for s in segments if s.two_way), "a two-way segment is all of the past"
        self.cache, self.segments, self.device = cache, segments, cache.device
        self.firsts = list(accumulate((s.length for s in segments[:-1]), initial=0))
        self.views: dict[int, Any] = {}
        """What kernels have made of the rows, by the store (its id) that they are for."""
        self._tables: dict[tuple[int, float, RopeScaling | None], Tensor] = {}
        self._readers: dict[int, _Reader] = {}

    @cached_property
    def num_rows(self) -> int:
        return sum(s.length for s in self.segments)

    @cached_property
    def row_positions(self) -> np.ndarray:
        """int32 [N]."""
        return np.fromiter(
            (i for s in self.segments for i in range(s.start, s.start + s.length)), np.int32, self.num_rows
        )

    @cached_property
    def _positions(self) -> Tensor:
        return torch.from_numpy(self.row_positions.astype(np.int64)).to(self.device)

    def positions(self) -> Tensor:
        return self._positions[None]

    def rope(self, num_dims: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
        key = (num_dims, base, scaling)
        if key not in self._tables:  # every layer asks, at every core step
            self._tables[key] = self.cache.rotary(*key)[self._positions][None, :, None]
        return self._tables[key]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [1, N, H, Dh], k and v [1, N, Hkv, Dh] -> [1, N, H, Dh]."""
        store = self.cache.store(layer)
        if id(store) not in self._readers:
            self._readers[id(store)] = _Reader(store, self.segments, self.firsts)
        return self._readers[id(store)].attend(q[0], k[0], v[0], layer - store.layers.start)[None]


class _Reader:
    """Attention of a pack's rows to the pages of one store."""

    def __init__(self, store: Pages, segments: list[Segment], firsts: list[int]) -> None:
        self.store, device = store, store.device
        for segment in segments:
            if segment.commit:
                store.reserve(segment)
        kept = [(f, s) for f, s in zip(firsts, segments, strict=True) if s.commit]
        self.visible: Visible | None = None
        if store.by_rows and len(kept) == len(segments) and not any(s.two_way for s in segments):
            self.visible = _visible(store, segments)
            self.mask_of_pages = self.visible.block_mask(store.k.shape[1], PAGE)
        self.kept = torch.tensor(
            [f + i for f, s in kept for i in range(s.length)], device=device, dtype=torch.long
        )
        own = [np.empty(0, np.int32), *(store.row(s)[s.start : s.end] for _, s in kept)]
        self.own_pages, self.own_offsets = self._split(np.concatenate(own))
        self.spans = [
            (slice(f, f + s.length), s, self._split(store.row(s)[: s.end])) for f, s in kept if s.length > 1
        ]
        self._init_singles([(f, s) for f, s in zip(firsts, segments, strict=True) if s.length == 1])

    def _init_singles(self, chosen: list[tuple[int, Segment]]) -> None:
        """The one-row segments, attended as one batch padded to the longest past."""
        segments, device = [s for _, s in chosen], self.store.device
        self.rows = torch.tensor([first for first, _ in chosen], device=device, dtype=torch.long)
        if not segments:
            return
        # Where a row's own key stands among the gathered ones: at its position, or one past it.
        own = [s.start + (s.append_own and not s.commit) for s in segments]
        width = max(own) + 1
        table = np.zeros((len(segments), width), dtype=np.int32)
        for i, s in enumerate(segments):
            seen = self.store.row(s)[: own[i] + 1]
            table[i, : len(seen)] = seen
        self.pages, self.offsets = self._split(table)
        self.own = torch.tensor(own, device=device)
        self.mask = (torch.arange(width, device=device) <= self.own.unsqueeze(1))[:, None, None]
        self.uncommitted = torch.tensor(
            [i for i, s in enumerate(segments) if not s.commit], dtype=torch.long, device=device
        )

    def _split(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        where = torch.from_numpy(places.astype(np.int64)).to(self.store.device)
        return where // PAGE, where % PAGE

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [N, H, Dh], k and v [N, Hkv, Dh] -> [N, H, Dh]."""
        if len(self.kept):
            self.store.write(layer, self.own_pages, self.own_offsets, k[self.kept], v[self.kept])
        if self.visible is not None:
            return attend_pages(q, self.store.k[layer], self.store.v[layer], self.visible, self.mask_of_pages)
        if len(self.rows) == len(q):
            return self._attend_singles(layer, q, k, v)
        out = torch.empty_like(q)
        if len(self.rows):
            out[self.rows] = self._attend_singles(layer, q[self.rows], k[self.rows], v[self.rows])
        for span, segment, (pages, offsets) in self.spans:
            own, mask = q[None, span], None
            past_k, past_v = k[None, span], v[None, span]
            if segment.start:
                past_k, past_v = (past[None] for past in self.store.read(layer, pages, offsets))
                mask = torch.ones(segment.length, segment.end, dtype=torch.bool, device=q.device)
                mask = mask.tril(segment.start)
            is_causal = mask is None and not segment.two_way
            out[span] = attention(own, past_k, past_v, mask=mask, is_causal=is_causal)[0]
        return out

    def _attend_singles(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen_k, seen_v = self.store.read(layer, self.pages, self.offsets)  # [S, width, Hkv, Dh]
        if len(self.uncommitted):
            own = self.own[self.uncommitted]
            seen_k[self.uncommitted, own], seen_v[self.uncommitted, own] = (
                k[self.uncommitted],
                v[self.uncommitted],
            )
        return attention(q.unsqueeze(1), seen_k, seen_v, mask=self.mask).squeeze(1)


def _visible(store: Pages, segments: list[Segment]) -> Visible:
    """Of rows that are all kept: each sees its sequence up to itself."""
    tiles = [(s, first) for s in segments for first in range(0, s.length, TILE)]
    used = [-(-s.end // PAGE) for s, _ in tiles]
    pages = np.zeros((len(tiles), max(used)), np.int32)
    limit = np.zeros((len(tiles), TILE), np.int32)
    into: list[int] = []
    for i, (s, first) in enumerate(tiles):
        pages[i, : used[i]] = store.row(s)[: s.end : PAGE] // PAGE
        rows = min(TILE, s.length - first)
        limit[i, :rows] = s.start + first + 1 + np.arange(rows)
        into += range(i * TILE, i * TILE + rows)
    sent = [staged(torch.from_numpy(np.asarray(x)), store.device) for x in (pages, used, limit.ravel(), into)]
    count, own = sent[1].int(), torch.full_like(sent[2], -1)
    return Visible(sent[0], count, count, sent[2], own, sent[3].long())


class PagedContext:
    """AttentionContext of one row each of R sequences [1, R, ...], whose positions and places are tensors: the
    same operations whatever their values, so that they can be captured once and replayed.

    The layout of the caches and of the reference is that of PackedContext; rows are padded to one length.
    """

    def __init__(
        self,
        cache: KVCache,
        positions: Tensor,
        own: Tensor,
        width: int,
        places: list[tuple[Pages, Tensor, Tensor]],
    ) -> None:
        """positions, own int64 [R]: of a row in its sequence, and of its own key among those that it sees.

        width: W, positions that any row may see. places, for each store that is read: where a row's key is written
        [R], and where the keys are that it sees [R, W], int64.
        """
        self.cache, self._positions, self.own = cache, positions, own
        self.mask = (torch.arange(width, device=own.device) <= own.unsqueeze(1))[:, None, None]
        """bool [R, 1, 1, W]."""
        self._visible: dict[int, tuple[Visible, BlockMask]] = {}
        for store, writes, seen in places:
            if store.by_rows:
                visible = Visible.of_single_rows(seen[:, ::PAGE] // PAGE, own, writes, PAGE)
                self._visible[id(store)] = visible, visible.block_mask(store.k.shape[1], PAGE)
        self._places = {
            id(store): [(place // PAGE, place % PAGE) for place in (writes, seen)]
            for store, writes, seen in places
        }

    def positions(self) -> Tensor:
        return self._positions[None]

    def rope(self, num_dims: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
        return self.cache.rotary(num_dims, base, scaling)[self._positions][None, :, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q [1, R, H, Dh], k and v [1, R, Hkv, Dh] -> [1, R, H, Dh]."""
        store = self.cache.store(layer)
        writes, seen = self._places[id(store)]
        store.write(layer - store.layers.start, *writes, k[0], v[0])
        if store.by_rows:
            at = layer - store.layers.start
            return attend_pages(q[0], store.k[at], store.v[at], *self._visible[id(store)])[None]
        seen_k, seen_v = store.read(layer - store.layers.start, *seen)  # [R, W, Hkv, Dh]
        return attention(q[0].unsqueeze(1), seen_k, seen_v, mask=self.mask).transpose(0, 1)
