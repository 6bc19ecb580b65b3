"""Prepared images on disk: ``manifest.json`` and, for each split, ``images.npy`` and ``labels.npy``, both
memory-mapped.

Training and evaluation both read them here; only ``train`` writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from rdlm.config.base import Strict, parse
from rdlm.data.batch import Batch
from rdlm.data.manifest import AGAIN, MANIFEST, file_sha256, no_split, read_kind
from rdlm.errors import UserError, reason

SCHEMA_VERSION = 1


class ImageSplit(Strict):
    """One split: ``images.npy`` uint8 [count, H, W, 3] and ``labels.npy`` int64 [count] in the folder of
    its name."""

    count: int = Field(ge=1)
    images_sha256: str
    labels_sha256: str


class ImageManifest(Strict):
    """What a folder of images holds and what it was made from."""

    schema_version: int
    kind: Literal["images"] = "images"
    source: str
    """The source as the user named it."""
    request: dict[str, Any]
    """Everything that decides the bytes: input hashes, split, seed, size."""
    image_size: tuple[int, int]
    """[H, W] of every image."""
    channels: Literal[3] = 3
    """Red, green, blue."""
    classes: tuple[str, ...] = Field(min_length=1)
    """Names: label i is classes[i]."""
    splits: dict[Literal["train", "valid", "test"], ImageSplit]
    skipped: dict[str, int] = {}
    """What the sources held besides images -> how many."""

    def hashes(self) -> dict[str, str]:
        """Path below the folder -> sha256."""
        out: dict[str, str] = {}
        for name, split in self.splits.items():
            out |= {f"{name}/images.npy": split.images_sha256, f"{name}/labels.npy": split.labels_sha256}
        return out


def read_image_manifest(folder: Path) -> ImageManifest:
    """UserError if there is none, it is not ours or not of images, or it is newer than this code."""
    return parse(ImageManifest, read_kind(folder, "images", SCHEMA_VERSION), str(folder / MANIFEST))


def open_split(
    folder: Path, manifest: ImageManifest, split: Literal["train", "valid", "test"]
) -> tuple[np.ndarray, np.ndarray]:
    """Memory-mapped (images uint8 [N, H, W, 3], labels int64 [N]); UserError where a file is missing or
    not what the manifest says."""
    count = manifest.splits[split].count
    images = _open(folder / split / "images.npy", np.uint8, (count, *manifest.image_size, manifest.channels))
    labels = _open(folder / split / "labels.npy", np.int64, (count,))
    if labels.min() < 0 or labels.max() >= len(manifest.classes):
        problem = (
            f"holds labels from {labels.min()} to {labels.max()}, the manifest has {len(manifest.classes)} "
            "classes"
        )
        raise UserError("data", str(folder / split / "labels.npy"), problem, AGAIN)
    return images, labels


def _open(file: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r")
    except FileNotFoundError:
        raise UserError("data", str(file), "is missing", AGAIN) from None
    except Exception as error:  # numpy raises whatever a damaged header or a shortened file leads to
        raise UserError("data", str(file), f"cannot be read as an array ({reason(error)})", AGAIN) from None
    if array.dtype != dtype or array.shape != shape:
        problem = (
            f"holds {array.dtype} {list(array.shape)}, the manifest says {np.dtype(dtype)} {list(shape)}"
        )
        raise UserError("data", str(file), problem, AGAIN)
    return array


class ImageStore:
    """Read access to one split. ``len`` is its number of images."""

    def __init__(self, folder: str | Path, split: str) -> None:
        """UserError if the folder is not a finished preparation of images or has no such split."""
        self.folder, self.split = Path(folder), split
        self.manifest = read_image_manifest(self.folder)
        arrays = {name: open_split(self.folder, self.manifest, name) for name in self.manifest.splits}
        if split not in self.manifest.splits:
            raise no_split(split, ", ".join(self.manifest.splits))
        self._images, self._labels = {str(name): found for name, found in arrays.items()}[split]

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def manifest_sha256(self) -> str:
        """Names the data in reports and lets a resumed run notice other data."""
        return file_sha256(self.folder / MANIFEST)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images by number, in the order of ``indices``. -> (uint8 [n, H, W, 3], int64 [n])"""
        return self._images[indices], np.asarray(self._labels[indices])

    def rows(self, indices: np.ndarray) -> Batch:
        """Images by number, as a model takes them: see ``as_batch``."""
        return as_batch(*self.read(indices))


def as_batch(pixels: np.ndarray, labels: np.ndarray) -> Batch:
    """uint8 [n, H, W, C], int64 [n] -> inputs fp32 [n, C, H, W] = pixel / 127.5 - 1, targets int64 [n, 1];
    every target counts."""
    inputs = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float().div_(127.5).sub_(1)
    targets = torch.from_numpy(np.array(labels, dtype=np.int64))[:, None]
    return Batch(inputs, targets, torch.ones_like(targets, dtype=torch.bool))
