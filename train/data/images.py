"""Prepared images as training batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from rdlm.data.batch import Batch
from rdlm.data.images import ImageStore, as_batch
from rdlm.data.synthetic import mix64
from rdlm.errors import UserError
from train.data.order import row_numbers, shuffled

Augment = Literal["none", "flip", "flip_crop"]
PAD = 4
"""Pixels that ``flip_crop`` moves an image by at most (He et al. 2016, Sec. 4.2, which pads with zeros)."""
_KEY = 0x11A6E5  # apart from other uses of the seed


class ImageCorpus:
    """Images with their class, visited in a seeded order, each once an epoch. Held-out images come from ``valid``, as they are."""

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
        """See ``train.data.Corpus.batch``; inputs fp32 [micro_size, 3, H, W], targets [micro_size, 1]."""
        place = {"rank": rank, "world": world, "micro_index": micro_index, "micro_size": micro_size}
        rows = row_numbers(step, global_batch=global_batch, **place)
        pixels, labels = self._store.read(shuffled(rows, len(self._store), seed))
        return as_batch(augmented(pixels, rows, seed, self._augment), labels)

    def windows(self, max_tokens: int | None, batch_size: int) -> Iterator[Batch]:
        """The first held-out images, in order; at most ``max_tokens`` of them, since a row has one target."""
        store = ImageStore(self._store.folder, self._held_out)
        count = len(store) if max_tokens is None else min(len(store), max(1, max_tokens))
        for first in range(0, count, batch_size):
            yield store.rows(np.arange(first, min(first + batch_size, count)))


def augmented(pixels: np.ndarray, rows: np.ndarray, seed: int, how: Augment) -> np.ndarray:
    """uint8 [n, H, W, C] -> the same shape: mirrored with p = 1/2, then (``flip_crop``) moved by up to PAD pixels within its reflection.

    rows: int64 [n], positions in the endless list of training rows. What an image undergoes depends on (seed, position) alone.
    """
    if how == "none":
        return pixels
    height, width = pixels.shape[1:3]
    key = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, _KEY]).generate_state(1, np.uint64)[0]
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
    """Source positions, int64 [n, size], of a crop at ``offset`` in an axis of ``size`` padded by PAD on both sides."""
    position = np.abs(np.arange(size) + offset.astype(np.int64)[:, None] - PAD)
    return size - 1 - np.abs(size - 1 - position)
