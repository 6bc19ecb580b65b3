"""Labelled images to memory-mapped arrays: one size, one list of classes, splits, written atomically.

The bytes written depend only on the images, their labels, the seed, the split settings and the size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rdlm.atomic import check_out, contents, replacing
from rdlm.data.image_files import ImageSet, pillow
from rdlm.data.images import SCHEMA_VERSION, ImageManifest, ImageSplit, open_split, read_image_manifest
from rdlm.data.manifest import SPLITS, file_sha256
from rdlm.errors import UserError
from train.data.corpus import permute
from train.data.image_sources import ImageSource, open_source
from train.data.prepare import held_out_fractions
from train.data.writer import PREPARED, check_same_request, write_manifest

MAX_SIZE = 4096
"""Largest value of --size: a larger image of a set would take 50 MB and more."""
MAX_PIXELS = 1 << 27
"""Most pixels of an image while it is scaled; a long narrow one grows with its longer side."""


@dataclass(frozen=True)
class ImagePreparation:
    """What to prepare; the options of ``rdlm data images``."""

    source: str
    out: Path
    valid: str | None = None
    test: str | None = None
    valid_fraction: float | None = None
    test_fraction: float | None = None
    seed: int = 0
    size: int | None = None
    label_column: str = "label"


@dataclass(frozen=True)
class _Part:
    """One split to be written: the images of a set by number, and their labels among the classes of
    ``train``."""

    images: ImageSet
    indices: np.ndarray
    labels: np.ndarray


def prepare_images(
    options: ImagePreparation, *, force: bool = False, progress: bool = True
) -> tuple[ImageManifest, bool]:
    """Build ``options.out``; -> (manifest, whether it was built now). An identical finished preparation is
    reused.

    UserError if the folder holds something else and ``force`` is false, or if options or source cannot be
    used.
    """
    sources, fractions = _sources(options)
    request = {
        "inputs": {split: source.identity for split, source in sources.items()},
        "fractions": fractions,
        "seed": options.seed,
        "size": options.size,
    }
    out = options.out
    if contents(out, "--out") and not force:
        return _existing(out, request), False
    check_out(out, "--out", PREPARED, force)
    sets = {split: source.open() for split, source in sources.items()}
    parts = _parts(options, sets, fractions)
    fit = _fit(options.size, sets["train"])
    with replacing(out, "--out") as folder:
        splits: dict[Any, ImageSplit] = {}
        for split, part in parts.items():
            with tqdm(
                total=len(part.indices), unit="image", desc=f"write {split}", disable=not progress
            ) as bar:
                splits[split] = _write(folder / split, part, fit, bar.update)
        manifest = ImageManifest(
            schema_version=SCHEMA_VERSION,
            source=options.source,
            request=request,
            image_size=fit.size,
            classes=sets["train"].classes,
            splits=splits,
            skipped=dict(sum((Counter(images.skipped) for images in sets.values()), Counter())),
        )
        write_manifest(folder, manifest)
    return manifest, True


def _existing(out: Path, request: dict[str, Any]) -> ImageManifest:
    check_same_request(out, request)
    manifest = read_image_manifest(out)
    for split in manifest.splits:
        open_split(out, manifest, split)
    return manifest


def _sources(options: ImagePreparation) -> tuple[dict[str, ImageSource], dict[str, float]]:
    """Split -> source, and the fractions of ``train`` that go to the splits without a source."""
    sources = open_source(options.source, options.label_column)
    for split, given in (("valid", options.valid), ("test", options.test)):
        if given is not None:
            sources[split] = open_source(given, options.label_column, f"--{split}")["train"]
    column, usual = options.label_column, ImagePreparation.label_column
    if column != usual and not any(column in each.identity.values() for each in sources.values()):
        raise UserError("--label-column", column, "it changes nothing: no source has columns", "drop it")
    given_fractions = {"valid": options.valid_fraction, "test": options.test_fraction}
    return sources, held_out_fractions(sources, given_fractions, {"valid": 0.05, "test": 0.0})


def _parts(
    options: ImagePreparation, sets: dict[str, ImageSet], fractions: dict[str, float]
) -> dict[str, _Part]:
    """What each split holds: the first images of a seeded permutation of ``train`` are held out, and order
    stays that of the source."""
    train = sets["train"]
    labels = {split: _labels(images, train.classes) for split, images in sets.items()}
    counts = {split: round(fraction * train.count) for split, fraction in fractions.items()}
    order = permute(np.arange(sum(counts.values())), train.count, options.seed, 0)
    indices, first = {split: np.arange(images.count) for split, images in sets.items()}, 0
    for split, count in counts.items():
        indices[split], first = np.sort(order[first : first + count]), first + count
    indices["train"] = np.setdiff1d(indices["train"], order)
    parts = {}
    for split in (split for split in SPLITS if split in indices):
        own = split if split in sets else "train"
        parts[split] = _Part(sets[own], indices[split], labels[own][indices[split]])
        if not len(indices[split]):
            leave = "" if split == "train" else f" (--{split}-fraction 0 leaves it out)"
            remedy = f"give more images or another fraction{leave}"
            raise UserError("SOURCE", options.source, f"split {split!r} has no images", remedy)
    return parts


def _labels(images: ImageSet, classes: tuple[str, ...]) -> np.ndarray:
    """The labels of a set as places in ``classes``: names decide, not numbers. UserError for one that is
    not there."""
    assert images.labels is not None
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= len(images.classes):
        bad = low if low < 0 else high
        problem = f"has label {bad} where labels are 0 to {len(images.classes) - 1}"
        raise UserError(
            images.option, str(images.path), problem, "correct the labels, or leave this split out"
        )
    place = {name: i for i, name in enumerate(classes)}
    if len(place) < len(classes):
        raise UserError(
            images.option, str(images.path), "names two classes alike", "give each class a name of its own"
        )
    unknown = [images.classes[i] for i in np.unique(images.labels) if images.classes[i] not in place]
    if unknown:
        problem = f"has the class {unknown[0]!r}, which train lacks"
        raise UserError(images.option, str(images.path), problem, "give splits of one data set")
    return np.array([place.get(name, -1) for name in images.classes], dtype=np.int64)[images.labels]


@dataclass(frozen=True)
class _Fit:
    """Brings images to one size [H, W]. ``resize``: scale the shorter side and cut out the centre, else
    refuse other sizes."""

    size: tuple[int, int]
    resize: bool

    def __call__(self, images: ImageSet, index: int) -> np.ndarray:
        pixels = images.read(index)
        if pixels.shape[:2] == self.size:
            return pixels
        (height, width), (tall, wide) = pixels.shape[:2], self.size
        if not self.resize:
            problem = f"image {index} is {width}x{height}, the first of train is {wide}x{tall}"
            raise UserError(
                images.option, str(images.path), problem, f"add for instance --size {min(self.size)}"
            )
        image_module, short = pillow(images.option, str(images.path)), min(height, width)
        scaled = (max(wide, width * wide // short), max(tall, height * tall // short))
        if scaled[0] * scaled[1] > MAX_PIXELS:
            problem = f"image {index} is {width}x{height} and would be scaled to {scaled[0]}x{scaled[1]}"
            raise UserError(
                images.option, str(images.path), problem, "remove this image, or give a smaller --size"
            )
        image = image_module.fromarray(pixels).resize(
            scaled, image_module.Resampling.BICUBIC
        )  # widens its kernel when shrinking
        left, top = (scaled[0] - wide) // 2, (scaled[1] - tall) // 2
        return np.asarray(image.crop((left, top, left + wide, top + tall)))


def _fit(size: int | None, train: ImageSet) -> _Fit:
    if size is not None:
        return _Fit((size, size), resize=True)
    height, width, _ = train.read(0).shape
    return _Fit((height, width), resize=False)


def _write(folder: Path, part: _Part, fit: _Fit, progress: Callable[[int], object]) -> ImageSplit:
    folder.mkdir()
    images, labels = folder / "images.npy", folder / "labels.npy"
    shape = (len(part.indices), *fit.size, 3)
    with images.open(
        "wb"
    ) as stream:  # not through a memory map: a full disk would be a signal instead of an error
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for index in part.indices:
            stream.write(np.ascontiguousarray(fit(part.images, int(index))).tobytes())
            progress(1)
    np.save(labels, part.labels.astype("<i8"))
    return ImageSplit(
        count=len(part.indices), images_sha256=file_sha256(images), labels_sha256=file_sha256(labels)
    )
