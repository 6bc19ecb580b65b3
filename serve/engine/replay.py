"""Parts of a step over static buffers, so that they can be captured and replayed: as CUDA graphs on a GPU.

A pass of single rows is padded to a bucket of rows and of positions that they see. All that differs between two
passes of a bucket is one int32 buffer, filled by one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rdlm.device import staged
from rdlm.nn.kv_cache import PAGE, UNKEPT, KVCache, PagedContext, Pages, Segment
from serve.engine.rows import Block, Inputs, Part, RowBuffers, core

Key = tuple[object, ...]
Pass = Callable[[], tuple[Tensor, ...]]


class Replayer(Protocol):
    """Runs a pass whose operations, shapes and addresses are those of every pass with the same key."""

    def __call__(self, key: Key, run: Pass) -> tuple[Tensor, ...]:
        """-> what ``run`` returns, valid until the next call. ``run`` may be called several times:
        a pass writes nothing that it reads, but for keys and values that are the same each time."""


def eager(key: Key, run: Pass) -> tuple[Tensor, ...]:
    """The reference: nothing is captured."""
    return run()


class CudaGraphs:
    """A graph for each key, captured when it first comes. Graphs share one memory pool: only one runs at a time."""

    def __init__(self) -> None:
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, key: Key, run: Pass) -> tuple[Tensor, ...]:
        if key not in self._graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # tables are made and libraries loaded outside of the graph
                run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                out = run()
            self._graphs[key] = graph, out
        graph, out = self._graphs[key]
        graph.replay()
        return out


def bucket(count: int) -> int:
    """Rows of a pass that ``count`` rows fill up: 1, 2, 4, 8, 16, 24, ..."""
    return -(-count // 8) * 8 if count > 4 else 1 << (count - 1).bit_length()


def window(length: int) -> int:
    """Positions that a pass sees: pages, doubled."""
    return PAGE << (-(-length // PAGE) - 1).bit_length()


class StaticPasses:
    """Runs parts for single rows of different sequences through a replayer."""

    def __init__(self, cache: KVCache, rows: RowBuffers, top: float, replay: Replayer) -> None:
        """top: the noise level of rows without one. The cache must have an unkept place for every row."""
        self.cache, self.rows, self.top, self.replay = cache, rows, top, replay
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def __call__(
        self,
        part: Part,
        block: Block,
        segments: list[Segment],
        ids: Sequence[int],
        where: np.ndarray,
        levels: Sequence[float | None],
    ) -> tuple[Tensor, ...]:
        """segments of one row each, their tokens, the indices of their states and their noise levels."""
        noised, stores = any(level is not None for level in levels), self._stores(part)
        host, width = self._filled(stores, segments, ids, where, levels)
        if host.shape not in self._buffers:
            self._buffers[host.shape] = torch.zeros(host.shape, dtype=torch.int32, device=self.rows.device)
        buffer = self._buffers[host.shape]
        buffer.copy_(staged(torch.from_numpy(host), self.rows.device))

        def run() -> tuple[Tensor, ...]:
            return part(block, self.rows, self._inputs(stores, buffer, width, noised))

        # Where a buffer has grown it has moved, and what was captured reads the old one.
        self.rows.make_room()
        moved = (self.rows.moved, *(store.moved for store in self.cache.stores))
        key = (part.__name__, block.index, *host.shape, noised, *moved)
        return tuple(out[:, : len(segments)] for out in self.replay(key, run))

    def _stores(self, part: Part) -> list[Pages]:
        """Those that a part reads: where keys of every step are kept, the core has one of its own."""
        stores, is_core = self.cache.stores, part is core
        return stores if not self.cache.keeps_steps else stores[:1] if is_core else stores[1:]

    def _filled(
        self,
        stores: list[Pages],
        segments: list[Segment],
        ids: Sequence[int],
        where: np.ndarray,
        levels: Sequence[float | None],
    ) -> tuple[np.ndarray, int]:
        """int32 [R, 7 + (1 + W) for each store], and W. Columns: id, position, place of its own key among those that
        it sees, the three of Inputs, level; then of each store where the key is written, and those that are seen."""
        own = [s.start + (s.append_own and not s.commit) for s in segments]
        count, size, width = len(segments), bucket(len(segments)), window(max(own) + 1)
        host = np.zeros((size, 7 + len(stores) * (1 + width)), np.int32)
        host[:, 3:6] = self.rows.spare, self.rows.spare + 1, self.rows.spare // 2
        host[:count, 0], host[:count, 1], host[:count, 2] = ids, [s.start for s in segments], own
        host[:count, 3], host[:count, 4], host[:count, 5] = where, where ^ 1, where >> 1
        host[:, 6] = np.array([self.top], np.float32).view(np.int32)
        known = np.array([self.top if level is None else level for level in levels], np.float32)
        host[:count, 6] = known.view(np.int32)
        for column, store in enumerate(stores):
            places = host[:, 7 + column * (1 + width) : 7 + (column + 1) * (1 + width)]
            places[:, 0] = places[:, 1] = np.arange(UNKEPT, UNKEPT + size)
            for i, s in enumerate(segments):
                if s.commit:
                    store.reserve(s)
                    places[i, 0] = store.row(s)[s.start]
                seen = store.row(s)[: own[i]]
                places[i, 1 : 1 + len(seen)] = seen
                places[i, 1 + own[i]] = places[i, 0]
        return host, width

    def _inputs(self, stores: list[Pages], buffer: Tensor, width: int, noised: bool) -> Inputs:
        columns = buffer.long()
        ids, positions, own, at, other, places = columns[:, :6].unbind(1)
        tables = [columns[:, first : first + 1 + width] for first in range(7, columns.shape[1], 1 + width)]
        seen = [(store, table[:, 0], table[:, 1:]) for store, table in zip(stores, tables, strict=True)]
        context = PagedContext(self.cache, positions, own, width, seen)
        levels = buffer[:, 6].contiguous().view(torch.float32)[None] if noised else None
        return Inputs(ids, at, other, places, levels, context)
