"""``rdlm data``: prepare and inspect token shards and images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from rich.table import Table
from tqdm import tqdm

from rdlm.command_line import new_app, new_console
from rdlm.data.images import open_split, read_image_manifest
from rdlm.data.manifest import check_hashes, kind_of, read_document
from rdlm.data.token_shards import Manifest, check_sizes, hashes_of, num_targets, read_manifest
from train.data.file_formats import FORMATS
from train.data.image_prepare import MAX_SIZE, ImagePreparation, prepare_images
from train.data.image_sources import PRESETS as IMAGE_PRESETS
from train.data.prepare import Preparation, prepare
from train.data.sources import spellings

app = new_app(
    help="Prepare text as token shards and images as arrays, both memory-mapped.",
    epilog="Example: rdlm data prepare embedded --out data/demo",
    no_args_is_help=True,
)
_PREPARE_EXAMPLE = (
    "Examples: rdlm data prepare embedded --out data/demo   |   rdlm data prepare wikitext-103 --out "
    "data/wikitext-103   |   "
    "rdlm data prepare books/train.parquet --valid books/valid.parquet --test books/test.parquet --out "
    "data/books"
)

_IMAGES_EXAMPLE = (
    "Examples: rdlm data images cifar10 --out data/cifar10   |   rdlm data images photos/ --size 64 --out "
    "data/photos   |   "
    "rdlm data images cifar100/train.parquet --test cifar100/test.parquet --label-column fine_label --out "
    "data/cifar100"
)


@app.command("prepare", epilog=_PREPARE_EXAMPLE)
def prepare_command(
    source: Annotated[
        str,
        typer.Argument(help=f"{spellings()}. Files may end in {', '.join(FORMATS)}; text also compressed."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    tokenizer: Annotated[
        str, typer.Option(help="'train' (a new one), a checkpoint, or the file or folder of a tokenizer.")
    ] = "train",
    kind: Annotated[Literal["bpe", "sentencepiece"], typer.Option(help="Tokenizer to train.")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Size of the vocabulary to train.")] = 4096,
    tokenizer_sample_mb: Annotated[
        int,
        typer.Option(min=1, help="Train the tokenizer on this many MB from the start of the training text."),
    ] = 200,
    valid: Annotated[str | None, typer.Option(help="Source of the valid split.")] = None,
    test: Annotated[str | None, typer.Option(help="Source of the test split.")] = None,
    valid_fraction: Annotated[
        float | None, typer.Option(help="Share of documents for valid [0.05 if SOURCE has one split].")
    ] = None,
    test_fraction: Annotated[
        float | None, typer.Option(help="Share of documents for test [0.05 if SOURCE has one split].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    text_column: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    rows: Annotated[
        Literal["documents", "wikitext", "chat"],
        typer.Option(help="What a row is: a document, a line of an article, or a conversation."),
    ] = "documents",
    loss_on: Annotated[
        Literal["answers", "last_answer", "all"],
        typer.Option(help="--rows chat: which tokens count as targets."),
    ] = "answers",
    text_files: Annotated[
        Literal["files", "pieces"] | None,
        typer.Option(
            help="What a document of plain text is: a file, or 8 KiB up to a blank line [files; pieces of a "
            "single file].",
            show_default=False,
        ),
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help=r"Split plain text at this string; \n and \t mean newline and tab."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what --out holds.")] = False,
) -> None:
    """Tokenise text into shards with a manifest. The text is streamed and split by document; equal inputs give
    equal bytes."""
    options = Preparation(
        source=source,
        out=out,
        tokenizer=tokenizer,
        kind=kind,
        vocab_size=vocab_size,
        valid=valid,
        test=test,
        tokenizer_sample_mb=tokenizer_sample_mb,
        valid_fraction=valid_fraction,
        test_fraction=test_fraction,
        seed=seed,
        text_column=text_column,
        rows=rows,
        loss_on=loss_on,
        text_files=text_files,
        separator=None if separator is None else separator.replace(r"\n", "\n").replace(r"\t", "\t"),
    )
    manifest, built = prepare(options, force=force, note=partial(typer.echo, err=True))
    _show(out, manifest, "written" if built else "already prepared")


@app.command(epilog="Example: rdlm data info data/demo")
def info(folder: Annotated[Path, typer.Argument(help="A prepared folder.")]) -> None:
    """Check every hash of a prepared folder and print its counts."""
    images = kind_of(read_document(folder)) == "images"
    if images:
        hashes = _check_images(folder)
    else:
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
        hashes = hashes_of(manifest)
    total = sum((folder / file).stat().st_size for file in hashes)
    with tqdm(total=total, unit="B", unit_scale=True, desc="check hashes", leave=False) as bar:
        check_hashes(folder, hashes, bar.update)
    _show_images(folder, "all hashes match") if images else _show(folder, manifest, "all hashes match")


@app.command("images", epilog=_IMAGES_EXAMPLE)
def images_command(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder with one subfolder a class, a .parquet file with images and labels, a folder with "
            "train, valid and test of "
            f"these, one of {', '.join(IMAGE_PRESETS)}, or hub:OWNER/NAME[:CONFIG]."
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
            max=MAX_SIZE,
            help="Scale the shorter side to this and cut out the centre; without it images have one size.",
        ),
    ] = None,
    label_column: Annotated[str, typer.Option(help="Integer column that holds the class.")] = "label",
    force: Annotated[bool, typer.Option("--force", help="Replace what --out holds.")] = False,
) -> None:
    """Write labelled images as arrays with a manifest. All have one size; equal inputs give equal bytes."""
    options = ImagePreparation(
        source, out, valid, test, valid_fraction, test_fraction, seed, size, label_column
    )
    _, built = prepare_images(options, force=force)
    _show_images(out, "written" if built else "already prepared")


def _show(folder: Path, manifest: Manifest, state: str) -> None:
    table = Table(
        title=f"{folder}: {state}",
        caption=f"source {manifest.source}; vocabulary {manifest.vocab_size}; "
        f"{manifest.dtype}; tokenizer {manifest.tokenizer_fingerprint[:12]}",
    )
    marked = any(shard.marks_sha256 for split in manifest.splits.values() for shard in split.shards)
    for name in ("split", "documents", "tokens", *["targets"] * marked, "bytes", "bytes/token", "shards"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, found in manifest.splits.items():
        ratio = f"{found.bytes / max(1, found.tokens):.3f}"
        table.add_row(
            split,
            f"{found.documents:,}",
            f"{found.tokens:,}",
            *[f"{num_targets(folder, found):,}"] * marked,
            f"{found.bytes:,}",
            ratio,
            str(len(found.shards)),
        )
    new_console().print(table)
    _tell_skipped(manifest.skipped)


def _tell_skipped(skipped: dict[str, int]) -> None:
    if skipped:
        typer.echo("left out: " + ", ".join(f"{count:,} {what}" for what, count in skipped.items()))


def _check_images(folder: Path) -> dict[str, str]:
    """Every array is there and has its shape; -> file below the folder -> sha256."""
    manifest = read_image_manifest(folder)
    for split in manifest.splits:
        open_split(folder, manifest, split)
    return manifest.hashes()


def _show_images(folder: Path, state: str) -> None:
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
    new_console().print(table)
    _tell_skipped(manifest.skipped)
