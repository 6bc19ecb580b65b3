"""Training data behind one interface: ``build_corpus(config)`` gives batches that depend on their arguments alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from rdlm.data.batch import Batch
from rdlm.data.synthetic import FilledIn, Generated, GroupProduct, LatinSquare, PointerChasing
from rdlm.data.tokenizer import Tokenizer
from train.data.generated import GeneratedCorpus
from train.data.images import ImageCorpus
from train.data.text import TokenCorpus
from train.settings import (
    DataConfig,
    GeneratedConfig,
    GroupProductConfig,
    ImagesConfig,
    PointerChasingConfig,
    TokensConfig,
)


class Corpus(Protocol):
    """What the trainer may ask of its data."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def seq_len(self) -> int:
        """Targets of an example."""

    @property
    def unit(self) -> str:
        """What a target is of: "token", "image"."""

    @property
    def identity(self) -> str:
        """Names the data: a resumed run compares it."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where ids stand for something other than text."""

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
        """Micro-batch ``micro_index`` of ``rank`` in update ``step``: [micro_size, seq_len], a pure function of the arguments.

        The rows of one update, over all ranks and micro-batches, depend on (step, seed, global_batch) only.
        """

    def windows(self, max_tokens: int | None, batch_size: int) -> Iterator[Batch]:
        """Held-out batches, the same ones every time; at most ``max_tokens`` targets, at least one sequence."""


def build_corpus(config: DataConfig, fills_in: bool = False) -> Corpus:
    """UserError if the data is missing, damaged or too short. fills_in: whether the model fills in hidden tokens of whole rows."""
    if isinstance(config, TokensConfig):
        return TokenCorpus(config.path, config.seq_len)
    if isinstance(config, ImagesConfig):
        return ImageCorpus(config.path, config.augment)
    task = build_task(config)
    return GeneratedCorpus(FilledIn(task) if fills_in else task)


def build_task(config: GeneratedConfig) -> Generated:
    """UserError for a task that there is not."""
    if isinstance(config, GroupProductConfig):
        return GroupProduct(config.group, config.length)
    if isinstance(config, PointerChasingConfig):
        return PointerChasing(config.nodes, config.hops)
    return LatinSquare(config.side, config.fewest_blanks, config.most_blanks)
