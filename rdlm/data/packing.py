"""Whole documents in rows of one length: which document stands where, and the batches that keep them
apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
import torch

from rdlm.data.batch import Batch
from rdlm.data.token_shards import TokenStore
from rdlm.errors import UserError


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Items of ``lengths`` (at most ``capacity``) in as few rows as best-fit decreasing finds: each item, the
    longest first, goes into the fullest row that has room (Ding et al. 2024, arXiv 2404.10830).

    Rows come in the order of their first items; the result depends on the lengths alone.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    """Room -> the rows that have it."""
    rooms: list[int] = []
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
            rows[row].append(item)
        else:
            room, row = capacity, len(rows)
            rows.append([item])
        left = room - length
        if left:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(row)
    return [sorted(row) for row in rows]


class Packed:
    """The documents of a split in rows of ``seq_len`` positions.

    A document of n tokens has n - 1 positions, each with the next token as target: nothing predicts its first
    token. One that is longer than a row is cut; what is left of a row is padding, which counts for nothing.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        """UserError where no document has two tokens. Reads the split once to find the documents."""
        self._store, self.seq_len = store, seq_len
        starts = store.document_starts()
        lengths = np.diff(np.append(starts, len(store))) - 1
        pieces = -(-lengths // seq_len)
        document = np.repeat(np.arange(len(starts)), pieces)
        piece = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._starts = starts[document] + piece * seq_len
        self._lengths = np.minimum(seq_len, lengths[document] - piece * seq_len)
        if not len(self._starts):
            problem = f"split {store.split!r} has no document of two tokens"
            raise UserError("data.path", str(store.folder), problem, "prepare more text")
        self._rows = best_fit(self._lengths, seq_len)

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: np.ndarray) -> Batch:
        """Rows by number -> Batch [n, T] with ``documents``; padding is a document of its own."""
        shape = (len(indices), self.seq_len)
        inputs = np.full(shape, self._store.manifest.eos_id, dtype=np.int64)
        targets, mask = inputs.copy(), np.zeros(shape, dtype=bool)
        documents = np.full(shape, self.seq_len, dtype=np.int64)
        for row, index in enumerate(indices.tolist()):
            at = 0
            for number, item in enumerate(self._rows[index]):
                start, length = int(self._starts[item]), int(self._lengths[item])
                ids, span = self._store.read(start, length + 1), slice(at, at + length)
                inputs[row, span], targets[row, span], documents[row, span] = ids[:-1], ids[1:], number
                mask[row, span] = self._store.counts(start + 1, length)
                at += length
        return Batch(*(torch.from_numpy(array) for array in (inputs, targets, mask, documents)))

    def windows(self, max_tokens: int | None, batch_size: int) -> Iterator[Batch]:
        """The first rows in order, of at most ``max_tokens`` positions (at least one row)."""
        count = len(self) if max_tokens is None else min(len(self), max(1, max_tokens // self.seq_len))
        for first in range(0, count, batch_size):
            yield self.rows(np.arange(first, min(first + batch_size, count)))
