"""Generated tasks as training batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rdlm.data.batch import Batch
from rdlm.data.synthetic import Task
from train.data.order import row_numbers


class GeneratedCorpus:
    """A task of rdlm/data/synthetic.py: no row number is used twice; held-out rows come from a random stream of their own."""

    tokenizer, unit = None, "token"

    def __init__(self, task: Task) -> None:
        self._task = task
        self.seq_len, self.vocab_size, self.identity = task.length, task.vocab_size, task.identity

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
        return self._task.rows(rows, seed)

    def windows(self, max_tokens: int | None, batch_size: int) -> Iterator[Batch]:
        """Held-out examples of seed 0; 65,536 positions where no bound is given."""
        count = max(1, (max_tokens or 65_536) // self.seq_len)
        for first in range(0, count, batch_size):
            yield self._task.rows(np.arange(first, min(first + batch_size, count)), seed=0, split="valid")
