"""Where labelled images come from: one set, a folder with a set a split, or a Hugging Face data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rdlm.data.image_files import ImageSet, numbered, open_images, to_rgb
from rdlm.data.manifest import file_sha256
from rdlm.errors import UserError
from train.data.sources import hub_loader, hub_name, unreachable

LABELLED = (
    "a folder with one subfolder a class, or a parquet file with an image column and an integer label column"
)
_FOLDERS = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}


@dataclass(frozen=True)
class HubImages:
    """Names on the Hugging Face hub. ``splits``: ours -> theirs. ``image``: None is the one column of
    images."""

    path: str
    name: str | None
    splits: dict[str, str]
    image: str | None
    label: str


PRESETS = {
    "cifar10": HubImages("uoft-cs/cifar10", None, {"train": "train", "test": "test"}, "img", "label"),
    "cifar100": HubImages("uoft-cs/cifar100", None, {"train": "train", "test": "test"}, "img", "fine_label"),
    "tiny-imagenet": HubImages(
        "zh-plus/tiny-imagenet", None, {"train": "train", "valid": "valid"}, "image", "label"
    ),
}


@dataclass(frozen=True)
class ImageSource:
    """A set of labelled images that need not be read to be named."""

    identity: Any
    """JSON: equal identities give equal images and labels."""
    open: Callable[[], ImageSet]


def open_source(given: str, label_column: str, option: str = "SOURCE") -> dict[str, ImageSource]:
    """Split -> source. UserError names ``option`` if nothing is there."""
    if given in PRESETS or given.startswith("hub:"):
        return _hub(given, label_column, option)
    path = Path(given)
    if not path.exists():
        remedy = f"give {LABELLED}, one of {', '.join(PRESETS)}, or hub:OWNER/NAME"
        raise UserError(option, given, "no such file or folder", remedy)
    return {split: _local(place, option, label_column) for split, place in _places(path, option).items()}


def _places(path: Path, option: str) -> dict[str, Path]:
    """The sets of a folder that has one a split; a folder of classes (one may be called ``train``) or a
    file is the train split."""
    classes = path / "train"
    if not (path / "train.parquet").is_file() and not (
        classes.is_dir() and any(each.is_dir() for each in classes.iterdir())
    ):
        return {"train": path}
    found = {}
    for split, names in _FOLDERS.items():
        places = [
            place for name in names for place in (path / name, path / f"{name}.parquet") if place.exists()
        ]
        if len(places) > 1:
            problem = f"has more than one {split} split: {', '.join(place.name for place in places)}"
            raise UserError(
                option, str(path), problem, "keep one, or give SOURCE, --valid and --test by themselves"
            )
        if places:
            found[split] = places[0]
    return found


def _local(path: Path, option: str, label_column: str) -> ImageSource:
    images = open_images(path, option, label_column)
    if images.labels is None:
        if path.suffix.lower() == ".parquet":
            problem = f"has no integer column {label_column!r} without gaps"
            raise UserError(option, str(path), problem, "name the column of labels with --label-column")
        raise UserError(option, str(path), "does not say what its images show", f"give {LABELLED}")
    if path.is_dir():
        lines = (f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\n" for file in images.files)
        digest = hashlib.sha256()
        for line in lines:
            digest.update(line.encode(errors="surrogateescape"))
        identity: dict[str, Any] = {"files": images.count, "sha256": digest.hexdigest()}
    else:
        identity = {"name": path.name, "sha256": file_sha256(path), "label_column": label_column}
    return ImageSource(identity, lambda: images)


def _hub(given: str, label_column: str, option: str) -> dict[str, ImageSource]:
    if given in PRESETS:
        wanted = PRESETS[given]
    else:
        wanted = HubImages(*hub_name(given), {"train": "train"}, None, label_column)
    sources = {}
    for ours, theirs in wanted.splits.items():
        identity = {
            "hub": wanted.path,
            "name": wanted.name,
            "split": theirs,
            "image": wanted.image,
            "label": wanted.label,
        }
        sources[ours] = ImageSource(identity, partial(_hub_images, given, wanted, theirs, option))
    return sources


def _hub_images(given: str, wanted: HubImages, split: str, option: str) -> ImageSet:
    """Downloaded whole into the library's cache, which images are then read from in any order."""
    load_dataset = hub_loader(given, "the images")
    try:
        data = load_dataset(wanted.path, wanted.name, split=split)
        features = data.features
    except (
        Exception
    ) as error:  # the library raises its own, the hub client's and the HTTP client's exceptions
        raise unreachable(given, "the images", error) from error
    columns = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    image = wanted.image or (columns[0] if len(columns) == 1 else None)
    if image not in columns:
        raise UserError(option, given, f"has the image columns {columns}", "give a data set with exactly one")
    if wanted.label not in features:
        raise UserError(
            "--label-column",
            wanted.label,
            f"{given} has the columns {list(features)}",
            "name the column of labels",
        )
    try:
        labels = np.asarray(data.select_columns([wanted.label])[:][wanted.label])
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{labels.dtype} {list(labels.shape)}")
    except ValueError as error:
        problem = f"holds no integers ({error})"
        raise UserError("--label-column", wanted.label, problem, "name the column of labels") from None

    def read(index: int) -> np.ndarray:
        try:
            return to_rgb(data[index][image])
        except (OSError, ValueError, AttributeError) as error:  # AttributeError: the row holds None
            raise UserError(
                option, f"{given}, row {index}", f"cannot be decoded ({error})", "choose another data set"
            ) from None

    classes = tuple(getattr(features[wanted.label], "names", None) or numbered(labels, given, option))
    return ImageSet(option, Path(given), len(data), read, labels.astype(np.int64), classes)
