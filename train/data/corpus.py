"""Training data behind one interface: ``build_corpus(config)`` gives batches that depend on their
arguments alone.

One kind of data is a class and a line in CORPORA.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from rdlm.config.checkpoint import ModelConfig
from rdlm.config.model import ImageConfig
from rdlm.data.batch import Batch
from rdlm.data.images import ImageStore, as_batch
from rdlm.data.packing import Packed
from rdlm.data.synthetic import FilledIn, Generated, GroupProduct, LatinSquare, PointerChasing, Task
from rdlm.data.token_shards import TokenStore
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError
from rdlm.random_streams import mix64
from train.settings import (
    DataConfig,
    GeneratedConfig,
    GroupProductConfig,
    ImagesConfig,
    LatinSquareConfig,
    MixtureConfig,
    Packing,
    PointerChasingConfig,
    TokensConfig,
)

Augment = Literal["none", "flip", "flip_crop"]
PERIOD = 1000
"""Rows in which a mixture has exactly its shares."""
PAD = 4
"""Pixels that ``flip_crop`` moves an image by at most (He et al. 2016, Sec. 4.2, which pads with zeros).
"""
_AUGMENT_KEY, _MIX_KEY = 0x11A6E5, 0x3117  # apart from other uses of the seed


class Corpus(ABC):
    """Training data whose rows have numbers: an update's are drawn from one endless list."""

    vocab_size: int
    seq_len: int
    """Targets of an example."""
    unit: str
    """What a target is of: "token", "image"."""
    identity: str
    """Names the data: a resumed run compares it."""
    tokenizer: Tokenizer | None
    """None where ids stand for something other than text."""
    num_rows: int | None = None
    """Rows of an epoch; None where it is not known, or rows are generated without end."""

    def check_model(self, model: ModelConfig) -> None:
        """UserError for a model that cannot learn from it."""
        if self.vocab_size > model.vocab_size:
            problem = f"smaller than the data's vocabulary ({self.vocab_size})"
            remedy = f"set model.vocab_size={self.vocab_size}"
            raise UserError("model.vocab_size", model.vocab_size, problem, remedy)

    @abstractmethod
    def rows(self, numbers: np.ndarray, seed: int) -> Batch:
        """Rows of the endless list by their numbers, int64 [n]."""

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
        """Micro-batch ``micro_index`` of ``rank`` in update ``step``: [micro_size, seq_len], a pure function
        of the arguments, so that a resumed run needs no state but its step.

        Update ``step`` takes rows [step, step + 1) * global_batch of the list: rank after rank, micro-batch
        after micro-batch.
        """
        share = global_batch // world
        if global_batch % world or share % micro_size or not 0 <= micro_index < share // micro_size:
            raise UserError(
                "batch",
                (global_batch, world, micro_size, micro_index),
                "the micro-batches do not add up to the global batch",
                "make global_size a multiple of processes * micro_size",
            )
        first = step * global_batch + rank * share + micro_index * micro_size
        return self.rows(np.arange(first, first + micro_size), seed)

    @abstractmethod
    def windows(self, max_tokens: int | None, batch_size: int) -> Iterator[Batch]:
        """Held-out batches, the same ones every time; at most ``max_tokens`` targets, at least one
        sequence."""


class Reader:
    """What ``read(index)`` gives, begun while the update before is computed. Batches are pure functions of their
    index, so reading ahead changes nothing and is no part of a run's state."""

    def __init__(self, read: Callable[[int], list[Batch]]) -> None:
        self._read = read
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def take(self, index: int, following: int | None) -> list[Batch]:
        """Batches of ``index``; those of ``following`` are begun. Whatever reading them raised is raised here."""
        if self._ahead is not None and self._ahead[0] == index:
            batches = self._ahead[1].result()
        else:
            batches = self._read(index)
        self._ahead = None
        if following is not None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")
            self._ahead = (following, self._thread.submit(self._read, following))
        return batches

    def close(self) -> None:
        """End the thread; ``take`` starts another where it is called again."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread = self._ahead = None


class TokenCorpus(Corpus):
    """Rows of ``seq_len`` tokens, visited in a seeded order, each once an epoch: windows that follow each
    other without overlap and cross document ends, or documents that are packed and kept apart.

    Held-out rows come from ``valid``.
    """

    unit = "token"

    def __init__(
        self,
        path: str | Path,
        seq_len: int,
        split: str = "train",
        held_out: str = "valid",
        packing: Packing = "windows",
    ) -> None:
        """UserError if the shards are missing or damaged, or a split is shorter than one window (valid:
        when first used)."""
        self._store = TokenStore(path, split)
        self._held_out, self._packing = held_out, packing
        self.seq_len, self.vocab_size = seq_len, self._store.manifest.vocab_size
        self._packed = Packed(self._store, seq_len) if packing == "documents" else None
        self.num_rows: int = self._store.num_windows(seq_len) if self._packed is None else len(self._packed)
        self.identity = self._store.manifest_sha256
        self.tokenizer: Tokenizer = self._store.tokenizer()

    def rows(self, numbers: np.ndarray, seed: int) -> Batch:
        chosen = shuffled(numbers, self.num_rows, seed)
        return self._store.rows(chosen, self.seq_len) if self._packed is None else self._packed.rows(chosen)

    def windows(self, max_tokens: int | None, batch_size: int) -> Iterator[Batch]:
        """The first held-out rows, in order."""
        store = TokenStore(self._store.folder, self._held_out)
        if self._packing == "windows":
            return store.windows(self.seq_len, max_tokens, batch_size)
        return Packed(store, self.seq_len).windows(max_tokens, batch_size)


class MixtureCorpus(Corpus):
    """Rows of several TokenCorpus: of every PERIOD rows each part gives its share, in a seeded order. A part
    begins a new epoch when its own rows are through. Held-out rows are those of the parts, one after the other.
    """

    unit = "token"

    def __init__(self, config: MixtureConfig) -> None:
        """UserError where a part is missing, has another tokenizer than the first, or a weight that no row
        of PERIOD would show."""
        self._parts = [TokenCorpus(p.path, config.seq_len, packing=config.packing) for p in config.parts]
        first = self._parts[0]
        self.seq_len, self.vocab_size, self.tokenizer = config.seq_len, first.vocab_size, first.tokenizer
        for given, part in zip(config.parts, self._parts, strict=True):
            if part.tokenizer.fingerprint != self.tokenizer.fingerprint:
                problem = f"has another tokenizer than {config.parts[0].path}"
                remedy = f"prepare it with --tokenizer {config.parts[0].path}/tokenizer"
                raise UserError("data.parts", given.path, problem, remedy)
        self._counts = shares([part.weight for part in config.parts], PERIOD)
        if 0 in self._counts:
            smallest = min(config.parts, key=lambda part: part.weight)
            problem = f"its weight {smallest.weight} is less than 1 of {PERIOD} rows"
            raise UserError("data.parts", smallest.path, problem, "raise it, or leave the part out")
        named = [(part.identity, count) for part, count in zip(self._parts, self._counts, strict=True)]
        self.identity = hashlib.sha256(json.dumps(named).encode()).hexdigest()

    def rows(self, numbers: np.ndarray, seed: int) -> Batch:
        which, numbers = mixed(numbers, self._counts, seed)
        chosen = [np.flatnonzero(which == part) for part in range(len(self._parts))]
        batches = [self._parts[i].rows(numbers[rows], seed) for i, rows in enumerate(chosen) if len(rows)]
        order = torch.from_numpy(np.argsort(np.concatenate(chosen), kind="stable"))

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(batch, name) for batch in batches])[order]

        documents = None if batches[0].documents is None else joined("documents")
        return Batch(joined("inputs"), joined("targets"), joined("mask"), documents)

    def windows(self, max_tokens: int | None, batch_size: int) -> Iterator[Batch]:
        """The first held-out rows of each part, of ``max_tokens`` in proportion to its weight."""
        bounds = [None if max_tokens is None else max_tokens * count // PERIOD for count in self._counts]
        parts = zip(self._parts, bounds, strict=True)
        return chain.from_iterable([part.windows(bound, batch_size) for part, bound in parts])


class ImageCorpus(Corpus):
    """Images with their class, visited in a seeded order, each once an epoch. Held-out images come from
    ``valid``, as they are."""

    tokenizer, unit = None, "image"
    seq_len = 1
    """Targets of a row: its class."""

    def __init__(
        self, path: str | Path, augment: Augment = "flip", split: str = "train", held_out: str = "valid"
    ) -> None:
        """UserError if the data is missing or damaged, or lacks the split (valid: when first used)."""
        self._store = ImageStore(path, split)
        self._augment, self._held_out = augment, held_out
        height, width = self._store.manifest.image_size
        self.image_size = (height, width)
        """H, W."""
        self.vocab_size = len(self._store.manifest.classes)
        """Classes."""
        self.identity = self._store.manifest_sha256
        if augment == "flip_crop" and min(self.image_size) <= PAD:
            problem = f"reflects {PAD} pixels at each side, and images are {width}x{height}"
            raise UserError("data.augment", augment, problem, "use flip or none")

    def check_model(self, model: ModelConfig) -> None:
        images = cast(ImageConfig, model)  # train/config_file.py has refused other models of images
        height, width = self.image_size
        found = {
            "image_size": (images.image_size,) * 2,
            "num_channels": images.num_channels,
            "num_classes": images.num_classes,
        }
        wanted = {"image_size": self.image_size, "num_channels": 3, "num_classes": self.vocab_size}
        for field, given in found.items():
            if given != wanted[field]:
                problem = (
                    f"the data's images are {width}x{height} in 3 channels and {self.vocab_size} classes"
                )
                remedy = (
                    f"set model.{field}={wanted[field]}"
                    if field != "image_size"
                    else "prepare the data with --size, or change it"
                )
                raise UserError(f"model.{field}", getattr(images, field), problem, remedy)

    def rows(self, numbers: np.ndarray, seed: int) -> Batch:
        """Images of the endless list by their numbers, int64 [n]: inputs fp32 [n, 3, H, W], targets [n, 1]."""
        pixels, labels = self._store.read(shuffled(numbers, len(self._store), seed))
        return as_batch(augmented(pixels, numbers, seed, self._augment), labels)

    def windows(self, max_tokens: int | None, batch_size: int) -> Iterator[Batch]:
        """The first held-out images, in order; at most ``max_tokens`` of them, since a row has one target."""
        store = ImageStore(self._store.folder, self._held_out)
        count = len(store) if max_tokens is None else min(len(store), max(1, max_tokens))
        for first in range(0, count, batch_size):
            yield store.rows(np.arange(first, min(first + batch_size, count)))


def augmented(pixels: np.ndarray, rows: np.ndarray, seed: int, how: Augment) -> np.ndarray:
    """uint8 [n, H, W, C] -> the same shape: mirrored with p = 1/2, then (``flip_crop``) moved by up to PAD
    pixels within its reflection.

    rows: int64 [n], positions in the endless list of training rows. What an image undergoes depends on
    (seed, position) alone.
    """
    if how == "none":
        return pixels
    height, width = pixels.shape[1:3]
    key = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, _AUGMENT_KEY]).generate_state(1, np.uint64)[0]
    bits = mix64(mix64(rows.astype(np.uint64)) ^ key)
    flip = (bits & np.uint64(1)).astype(bool)
    if how == "flip":
        return np.where(flip[:, None, None, None], pixels[:, :, ::-1], pixels)
    span = np.uint64(2 * PAD + 1)
    down, right = ((bits >> np.uint64(shift) & np.uint64(0xFFFFFF)) % span for shift in (8, 40))
    y, x = _reflected(down, height), _reflected(right, width)
    x = np.where(flip[:, None], width - 1 - x, x)
    return pixels[np.arange(len(rows))[:, None, None], y[:, :, None], x[:, None, :]]


def _reflected(offset: np.ndarray, size: int) -> np.ndarray:
    """Source positions, int64 [n, size], of a crop at ``offset`` in an axis of ``size`` padded by PAD on
    both sides."""
    position = np.abs(np.arange(size) + offset.astype(np.int64)[:, None] - PAD)
    return size - 1 - np.abs(size - 1 - position)


class GeneratedCorpus(Corpus):
    """A task of rdlm/data/synthetic.py: no row number is used twice; held-out rows come from a random
    stream of their own."""

    tokenizer, unit = None, "token"

    def __init__(self, task: Task) -> None:
        self._task = task
        self.seq_len, self.vocab_size, self.identity = task.length, task.vocab_size, task.identity

    def rows(self, numbers: np.ndarray, seed: int) -> Batch:
        return self._task.rows(numbers, seed)

    def windows(self, max_tokens: int | None, batch_size: int) -> Iterator[Batch]:
        """Held-out examples of seed 0; 65,536 positions where no bound is given."""
        count = max(1, (max_tokens or 65_536) // self.seq_len)
        for first in range(0, count, batch_size):
            yield self._task.rows(np.arange(first, min(first + batch_size, count)), seed=0, split="valid")


TASKS: dict[type[GeneratedConfig], Callable[[Any], Generated]] = {
    GroupProductConfig: lambda config: GroupProduct(config.group, config.length),
    PointerChasingConfig: lambda config: PointerChasing(config.nodes, config.hops),
    LatinSquareConfig: lambda config: LatinSquare(config.side, config.fewest_blanks, config.most_blanks),
}


def build_task(config: GeneratedConfig) -> Generated:
    """UserError for sizes that make no task."""
    return TASKS[type(config)](config)


def _generated(config: GeneratedConfig, fills_in: bool) -> Corpus:
    task = build_task(config)
    return GeneratedCorpus(FilledIn(task) if fills_in else task)


CORPORA: dict[type[DataConfig], Callable[[Any, bool], Corpus]] = {
    MixtureConfig: lambda config, fills_in: MixtureCorpus(config),
    TokensConfig: lambda config, fills_in: TokenCorpus(config.path, config.seq_len, packing=config.packing),
    ImagesConfig: lambda config, fills_in: ImageCorpus(config.path, config.augment),
    **dict.fromkeys(TASKS, _generated),
}
"""Section ``data`` of a training config -> what reads it."""


def build_corpus(config: DataConfig, fills_in: bool = False) -> Corpus:
    """UserError if the data is missing, damaged or too short. fills_in: whether the model fills in masked
    tokens of whole rows."""
    return CORPORA[type(config)](config, fills_in)


def shuffled(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Row numbers -> items 0 .. count-1: each item once an epoch of ``count`` rows, in an order of its own
    every epoch."""
    epochs, positions = np.divmod(rows, count)
    items = np.empty_like(rows)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        items[inside] = permute(positions[inside], count, seed, int(epoch))
    return items


def shares(weights: Sequence[float], count: int) -> list[int]:
    """``count`` in whole parts in proportion to ``weights``: the largest remainders are rounded up."""
    exact = [weight / sum(weights) * count for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: count - sum(parts)]:
        parts[i] += 1
    return parts


def mixed(rows: np.ndarray, counts: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers -> (part, number of the row in that part's own endless list), both int64.

    Of every sum(counts) rows part i gives counts[i], in an order of their own; each row of a part comes once.
    """
    period = sum(counts)
    ends = np.cumsum(counts)
    rounds, positions = np.divmod(rows, period)
    slots = np.empty_like(rows)
    for number in np.unique(rounds):
        inside = rounds == number
        slots[inside] = permute(positions[inside], period, seed ^ _MIX_KEY, int(number))
    part = np.searchsorted(ends, slots, side="right")
    own = np.asarray(counts)[part]
    return part, rounds * own + slots - (ends[part] - own)


def permute(positions: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """A seeded bijection of 0 .. count-1 in constant memory: four Feistel rounds on the next power of
    four, walked until inside (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains")."""
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, epoch]).generate_state(4, np.uint64)
    out = positions.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for key in keys:
            left, right = right, left ^ (mix64(right ^ key) & mask)
        out[outside] = left << half | right
        outside = out >= count
    return out.astype(np.int64)
