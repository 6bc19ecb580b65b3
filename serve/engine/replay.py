"""Parts of a step over static buffers, so that they can be captured and replayed: as CUDA graphs on a GPU.

A pass of single rows is padded to a bucket of rows and of positions that they see. All that differs between two
passes of a bucket is one int32 buffer. A step fills those of all its parts by one copy from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rdlm.device import staged
from rdlm.nn.kv_cache import PAGE, UNKEPT, KVCache, PagedContext, Pages, Segment
from rdlm.sampling import History, Kind, SamplingParams, packed, unpacked
from serve.engine.rows import Block, Inputs, Part, RowBuffers, core

Key = tuple[object, ...]
Pass = Callable[[], tuple[Tensor, ...]]


class Replayer(Protocol):
    """Runs a pass whose operations, shapes and addresses are those of every pass with the same key."""

    def __call__(self, key: Key, run: Pass) -> tuple[Tensor, ...]:
        """-> what ``run`` returns, valid until the next call. ``run`` may be called several times:
        a pass writes nothing that it reads, but for keys and values that are the same each time."""

    def forget(self) -> None:
        """Drop what has been captured: a buffer has moved."""


class Eager:
    """The reference: nothing is captured."""

    def __call__(self, key: Key, run: Pass) -> tuple[Tensor, ...]:
        return run()

    def forget(self) -> None:
        pass


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

    def forget(self) -> None:
        torch.cuda.synchronize()  # none of them is running
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()  # the memory of the old one goes with its last graph


def bucket(count: int) -> int:
    """Rows of a pass that ``count`` rows fill up: 1, 2, 4, 8, 16, 24, ..."""
    return -(-count // 8) * 8 if count > 4 else 1 << (count - 1).bit_length()


def window(length: int) -> int:
    """Positions that a pass sees: pages, doubled."""
    return PAGE << (-(-length // PAGE) - 1).bit_length()


@dataclass(frozen=True, slots=True)
class SingleRows:
    """The single rows of a pass: a segment each, their tokens, the indices of their states and their noise levels.

    sampling: what a part that draws is told, as rdlm.sampling.packed takes it.
    """

    segments: list[Segment]
    ids: Sequence[int]
    where: np.ndarray
    levels: Sequence[float | None]
    sampling: tuple[list[SamplingParams], list[History], list[float]] | None = None


class StaticPasses:
    """Runs parts for single rows of different sequences through a replayer."""

    def __init__(self, cache: KVCache, rows: RowBuffers, top: float, replay: Replayer) -> None:
        """top: the noise level of rows without one. The cache must have an unkept place for every row."""
        self.cache, self.rows, self.top, self.replay = cache, rows, top, replay
        self._buffers: dict[tuple[Part, int, int], Tensor] = {}
        self._moved: tuple[int, ...] = ()

    def stage(self, block: Block, passes: list[tuple[Part, SingleRows]]) -> list[Pass]:
        """Send what the passes read to the device, in one copy -> the passes, each to be run once, in this order.
        Those of one part must not be staged together."""
        filled = [self._filled(part, rows) for part, rows in passes]
        sent = staged(
            torch.from_numpy(np.concatenate([host.ravel() for host, *_ in filled])), self.rows.device
        )
        parts = sent.split([host.size for host, *_ in filled])
        found: list[Pass] = []
        for (part, rows), (host, width, kind), values in zip(passes, filled, parts, strict=True):
            key = (part, *host.shape)
            if key not in self._buffers:
                self._buffers[key] = torch.zeros(host.shape, dtype=torch.int32, device=self.rows.device)
            self._buffers[key].copy_(values.view(host.shape))
            found.append(partial(self._run, part, block, rows, self._buffers[key], width, kind))
        return found

    def _run(
        self, part: Part, block: Block, rows: SingleRows, buffer: Tensor, width: int, kind: Kind | None
    ) -> tuple[Tensor, ...]:
        stores, noised = self._stores(part), any(level is not None for level in rows.levels)

        def run() -> tuple[Tensor, ...]:
            return part(block, self.rows, self._inputs(stores, buffer, width, noised, kind))

        self.rows.make_room()
        moved = (self.rows.moved, *(store.moved for store in self.cache.stores))
        if moved != self._moved:  # what was captured reads the old buffers, and keeps them
            self.replay.forget()
            self._moved = moved
        key = (part.__name__, block.index, *buffer.shape, noised, kind)
        return tuple(out[:, : len(rows.segments)] for out in self.replay(key, run))

    def _stores(self, part: Part) -> list[Pages]:
        """Those that a part reads: where keys of every step are kept, the core has one of its own."""
        stores, is_core = self.cache.stores, part is core
        return stores if not self.cache.keeps_steps else stores[:1] if is_core else stores[1:]

    def _filled(self, part: Part, rows: SingleRows) -> tuple[np.ndarray, int, Kind | None]:
        """int32 [R, 7 + (1 + W) for each store + settings], W, and the kind of the settings. Columns: id, position,
        place of its own key among those that it sees, the three of Inputs, level; then of each store where the key is
        written, and those that are seen; then settings of the draw."""
        segments, stores = rows.segments, self._stores(part)
        own = [s.start + (s.append_own and not s.commit) for s in segments]
        count, size, width = len(segments), bucket(len(segments)), window(max(own) + 1)
        host = np.zeros((size, 7 + len(stores) * (1 + width)), np.int32)
        host[:, 3:6] = self.rows.spare, self.rows.spare + 1, self.rows.spare // 2
        host[:count, 0], host[:count, 1], host[:count, 2] = rows.ids, [s.start for s in segments], own
        host[:count, 3], host[:count, 4], host[:count, 5] = rows.where, rows.where ^ 1, rows.where >> 1
        host[:, 6] = np.array([self.top], np.float32).view(np.int32)
        known = np.array([self.top if level is None else level for level in rows.levels], np.float32)
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
        if rows.sampling is None:
            return host, width, None
        settings, kind = packed(*rows.sampling, size)
        return np.concatenate([host, settings], 1), width, kind

    def _inputs(
        self, stores: list[Pages], buffer: Tensor, width: int, noised: bool, kind: Kind | None
    ) -> Inputs:
        end = 7 + len(stores) * (1 + width)
        columns = buffer[:, :end].long()
        ids, positions, own, at, other, places = columns[:, :6].unbind(1)
        tables = columns[:, 7:].split(1 + width, 1) if stores else ()  # a model may be its core alone
        seen = [(store, table[:, 0], table[:, 1:]) for store, table in zip(stores, tables, strict=True)]
        context = PagedContext(self.cache, positions, own, width, seen)
        levels = buffer[:, 6].contiguous().view(torch.float32)[None] if noised else None
        sampling = None if kind is None else (unpacked(buffer[:, end:], kind), kind)
        return Inputs(ids, at, other, places, levels, context, sampling)
