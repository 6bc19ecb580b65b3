"""Prepared token shards as training batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rdlm.data.batch import Batch
from rdlm.data.token_shards import TokenStore
from train.data.order import row_numbers, shuffled


class TokenCorpus:
    """Windows of ``seq_len`` tokens that follow each other without overlap, visited in a seeded order, each once an epoch.

    Windows cross document ends; every target counts. Held-out windows come from ``valid``.
    """

    unit = "token"

    def __init__(self, path: str | Path, seq_len: int, split: str = "train", held_out: str = "valid") -> None:
        """UserError if the shards are missing or damaged, or a split is shorter than one window (valid: when first used)."""
        self._store = TokenStore(path, split)
        self._held_out = held_out
        self.seq_len, self.vocab_size = seq_len, self._store.manifest.vocab_size
        self.num_windows = self._store.num_windows(seq_len)
        self.identity = self._store.manifest_sha256
        self.tokenizer = self._store.tokenizer()

    def batch(
        self,
        step: int,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
        micro_index: int,
        micro_size: int,
    ) -> Batch:
        """See ``train.data.Corpus.batch``."""
        place = {"rank": rank, "world": world, "micro_index": micro_index, "micro_size": micro_size}
        rows = row_numbers(step, global_batch=global_batch, **place)
        return self._store.rows(shuffled(rows, self.num_windows, seed), self.seq_len)

    def windows(self, max_tokens: int | None, batch_size: int) -> Iterator[Batch]:
        """The first held-out windows, in order."""
        return TokenStore(self._store.folder, self._held_out).windows(self.seq_len, max_tokens, batch_size)
