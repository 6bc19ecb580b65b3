"""``rdlm data images``: labelled images as memory-mapped arrays; and what ``rdlm data info`` says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from rdlm.data.images import open_split, read_image_manifest
from train.data.image_prepare import ImagePreparation, prepare_images
from train.data.image_sources import PRESETS

EXAMPLE = (
    "Examples: rdlm data images cifar10 --out data/cifar10   |   rdlm data images photos/ --size 64 --out data/photos   |   "
    "rdlm data images cifar100/train.parquet --test cifar100/test.parquet --label-column fine_label --out data/cifar100"
)


def images_command(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder with one subfolder a class, a .parquet file with images and labels, a folder with train, valid and test of "
            f"these, one of {', '.join(PRESETS)}, or hub:OWNER/NAME[:CONFIG]."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    valid: Annotated[str | None, typer.Option(help="Source of the valid split.")] = None,
    test: Annotated[str | None, typer.Option(help="Source of the test split.")] = None,
    valid_fraction: Annotated[
        float | None, typer.Option(help="Share of train for valid [0.05 if there is no valid split].")
    ] = None,
    test_fraction: Annotated[float | None, typer.Option(help="Share of train for test [0].")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Scale the shorter side to this and cut out the centre; without it images have one size.",
        ),
    ] = None,
    label_column: Annotated[str, typer.Option(help="Integer column that holds the class.")] = "label",
    force: Annotated[bool, typer.Option("--force", help="Replace what --out holds.")] = False,
) -> None:
    """Write labelled images as arrays with a manifest: one size, one list of classes, the same bytes for the same inputs."""
    options = ImagePreparation(
        source, out, valid, test, valid_fraction, test_fraction, seed, size, label_column
    )
    _, built = prepare_images(options, force=force)
    show_images(out, "written" if built else "already prepared")


def check_images(folder: Path) -> dict[str, str]:
    """Every array is there and has its shape; -> file below the folder -> sha256."""
    manifest = read_image_manifest(folder)
    for split in manifest.splits:
        open_split(folder, manifest, split)
    return manifest.hashes()


def show_images(folder: Path, state: str) -> None:
    manifest = read_image_manifest(folder)
    (height, width), classes = manifest.image_size, manifest.classes
    names = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    table = Table(
        title=f"{folder}: {state}",
        caption=f"source {manifest.source}; {width}x{height}; {len(classes)} classes: {names}",
    )
    for name in ("split", "images", "fewest of a class", "most of a class", "bytes"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split in manifest.splits:
        images, labels = open_split(folder, manifest, split)
        counts = np.bincount(labels, minlength=len(classes))
        table.add_row(
            split, f"{len(images):,}", f"{counts.min():,}", f"{counts.max():,}", f"{images.nbytes:,}"
        )
    Console().print(table)
