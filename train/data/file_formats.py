"""Kinds of files that hold texts: one kind is a class and a line in FORMATS. All of them stream."""

from __future__ import annotations

import csv
import io
import json
import lzma
import sys
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from rdlm.data.tokenizer import HALF_PAIR, is_unicode
from rdlm.errors import UserError, reason

TEXT_DOCUMENT_CHARS = 8192
Rows = Literal["documents", "wikitext", "chat"]
Record = tuple[str, Mapping[str, Any]]
"""A row: where it stands (file and line), and its fields."""
TextFiles = Literal["files", "pieces"]


@dataclass(frozen=True)
class Reading:
    """How files and rows become documents.

    column: the field or column that holds the text. rows: what a row is. text_files: a plain text file is
    one document ("files"), or is cut into pieces of about TEXT_DOCUMENT_CHARS at blank lines; None is
    "files", but "pieces" for a source of one file, which could not be split otherwise. separator: cut
    plain text files wherever it stands, instead. option: what named the source.
    """

    column: str = "text"
    rows: Rows = "documents"
    text_files: TextFiles | None = None
    separator: str | None = None
    option: str = "SOURCE"


class FileFormat(ABC):
    """One kind of file. ``compressible``: it is read as a stream of text, so it may also be compressed as
    a whole. ``is_plain_text``: it has no rows, so a reading says how it becomes documents."""

    compressible = True
    is_plain_text = False

    @abstractmethod
    def rows(self, file: Path, reading: Reading) -> Iterator[str | None]:
        """The texts in order, None for a row without one. UserError for a column that is not there."""

    def records(self, file: Path, reading: Reading) -> Iterator[Record]:
        """The rows with all their fields. UserError for a format without fields."""
        problem = "has no fields, which conversations need"
        raise UserError(reading.option, str(file), problem, "give .jsonl, .parquet, .arrow or .csv files")

    def text_bytes(self, file: Path, reading: Reading) -> int:
        """About how many UTF-8 bytes of text it holds, for a progress bar."""
        return file.stat().st_size


class PlainText(FileFormat):
    """UTF-8 text of any markup."""

    is_plain_text = True

    def rows(self, file: Path, reading: Reading) -> Iterator[str | None]:
        with open_text(file) as stream:
            if reading.separator is not None:
                yield from _split(stream, reading.separator)
            elif reading.text_files == "files":
                yield stream.read()
            else:
                yield from _pieces(stream)


class JsonLines(FileFormat):
    """A JSON object a line."""

    def rows(self, file: Path, reading: Reading) -> Iterator[str | None]:
        for place, row in self.records(file, reading):
            yield text_of(row, place, reading)

    def records(self, file: Path, reading: Reading) -> Iterator[Record]:
        with open_text(file) as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                place = f"{file}:{number}"
                try:
                    row = json.loads(line, object_pairs_hook=_object)
                except (ValueError, RecursionError) as error:
                    problem = f"is not JSON ({reason(error)})"
                    raise UserError(reading.option, place, problem, "correct the line") from None
                if not isinstance(row, dict):
                    raise UserError(reading.option, place, "is not a JSON object", "write one object a line")
                yield place, row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError where it names a field twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is there twice")
    return found


@dataclass(frozen=True)
class Table(FileFormat):
    """Comma- or tab-separated values with a header line."""

    delimiter: str

    def rows(self, file: Path, reading: Reading) -> Iterator[str | None]:
        for _, row in self._lines(file, reading, reading.column):
            yield row[reading.column]

    def records(self, file: Path, reading: Reading) -> Iterator[Record]:
        return self._lines(file, reading, None)

    def _lines(self, file: Path, reading: Reading, column: str | None) -> Iterator[Record]:
        """The lines below the header, which must have ``column``."""
        csv.field_size_limit(sys.maxsize)
        with open_text(file, newline="") as stream:
            table = csv.DictReader(stream, delimiter=self.delimiter, strict=True)
            names = table.fieldnames or ()
            if column is not None and column not in names:
                raise _no_column(reading, str(file), names, names)
            twice = next((name for name, count in Counter(names).items() if count > 1), None)
            if twice is not None:
                problem = f"its header names {twice!r} twice"
                raise UserError(reading.option, str(file), problem, "give each column a name of its own")
            for row in table:
                place = f"{file}:{table.line_num}"
                if None in row:
                    raise UserError(
                        reading.option, place, "has more cells than the header", "correct the line"
                    )
                yield place, row


def _checked_pages(file: Path) -> pyarrow.parquet.ParquetFile:
    """A parquet file whose pages are compared with their checksums, where it has some."""
    return pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)


class Parquet(FileFormat):
    """A table whose text column may be string, large_string, string_view or a dictionary of one of them."""

    compressible = False

    def rows(self, file: Path, reading: Reading) -> Iterator[str | None]:
        table, column = _checked_pages(file), reading.column
        _check_column(table.schema_arrow, file, reading)
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            yield from batch.column(column).to_pylist()

    def records(self, file: Path, reading: Reading) -> Iterator[Record]:
        batches = _checked_pages(file).iter_batches(batch_size=256)
        return numbered(file, (row for batch in batches for row in batch.to_pylist()))

    def text_bytes(self, file: Path, reading: Reading) -> int:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if reading.column not in names or table.metadata.num_columns != len(
            names
        ):  # nested columns: no simple index
            return file.stat().st_size
        index, groups = names.index(reading.column), range(table.metadata.num_row_groups)
        return sum(table.metadata.row_group(g).column(index).total_uncompressed_size for g in groups)


class Arrow(FileFormat):
    """An Arrow IPC file or stream (Feather version 2, the cache of the library ``datasets``), with columns
    as in Parquet."""

    compressible = False

    def rows(self, file: Path, reading: Reading) -> Iterator[str | None]:
        for batch in self._batches(file, reading, lambda schema: _check_column(schema, file, reading)):
            yield from batch.column(reading.column).to_pylist()

    def records(self, file: Path, reading: Reading) -> Iterator[Record]:
        batches = self._batches(file, reading, lambda schema: None)
        return numbered(file, (row for batch in batches for row in batch.to_pylist()))

    def _batches(
        self, file: Path, reading: Reading, check: Callable[[pyarrow.Schema], None]
    ) -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.memory_map(str(file)) as source:
            try:
                table = pyarrow.ipc.open_file(source)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = table = pyarrow.ipc.open_stream(source)
            check(table.schema)
            yield from batches


FORMATS: dict[str, FileFormat] = {
    ".txt": PlainText(),
    ".md": PlainText(),
    ".jsonl": JsonLines(),
    ".ndjson": JsonLines(),
    ".csv": Table(","),
    ".tsv": Table("\t"),
    ".parquet": Parquet(),
    ".arrow": Arrow(),
    ".feather": Arrow(),
}
"""Ending -> what reads it; capital letters make no difference."""
COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4", ".xz", ".zip")
"""Endings that may stand behind those of a compressible format. A .zip holds one file."""


def format_of(file: Path) -> FileFormat | None:
    """What reads a file of this name; None where nothing does."""
    endings = [ending.lower() for ending in file.suffixes]
    if endings and endings[-1] in COMPRESSIONS:
        found = FORMATS.get(endings[-2]) if len(endings) > 1 else None
        return found if found is not None and found.compressible else None
    return FORMATS.get(endings[-1]) if endings else None


def open_text(file: Path, newline: str | None = None) -> IO[str]:
    """A file as UTF-8 text, decompressed by its ending; a byte order mark at its start is not part of it."""
    if file.suffix.lower() == ".xz":
        binary: Any = lzma.open(file)
    elif file.suffix.lower() == ".zip":
        archive = zipfile.ZipFile(file)
        names = [each.filename for each in archive.infolist() if not each.is_dir()]
        if len(names) != 1:
            raise OSError(
                f"the archive holds {len(names)} files, and one is read: unpack it and give the folder"
            )
        binary = archive.open(names[0])
    else:
        lower = file.name.lower()  # the library looks for endings in small letters
        compression = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}.get(Path(lower).suffix)
        binary = pyarrow.input_stream(str(file), compression=compression)
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline=newline)


def _pieces(stream: IO[str]) -> Iterator[str]:
    """Pieces of about TEXT_DOCUMENT_CHARS characters: up to a blank line, or four times that up to a white
    space."""
    size, held = TEXT_DOCUMENT_CHARS, ""
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
    if held:
        yield held


def _split(stream: IO[str], separator: str) -> Iterator[str]:
    """What stands between separators, which are in no document."""
    held = ""
    while piece := stream.read(1 << 20):
        *whole, held = (held + piece).split(separator)
        yield from whole
    if held:
        yield held


def numbered(place: object, rows: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """Rows of a file without lines, counted from 1."""
    return ((f"{place}, row {number}", row) for number, row in enumerate(rows, 1))


def text_of(row: Mapping[str, Any], place: str, reading: Reading) -> str | None:
    """The text of a row. UserError where it has none, or half of a surrogate pair, which JSON can write as \\ud800."""
    text = row.get(reading.column)
    if reading.column not in row or not isinstance(text, str | None):
        texts = [name for name, value in row.items() if isinstance(value, str)]
        raise _no_column(reading, place, texts, row)
    if text is not None and not is_unicode(text):
        raise UserError(reading.option, place, HALF_PAIR, "remove or replace it")
    return text


def _check_column(schema: pyarrow.Schema, file: Path, reading: Reading) -> None:
    texts = [field.name for field in schema if _is_text(field.type)]
    if reading.column not in texts:
        raise _no_column(reading, str(file), texts, schema.names)


def _is_text(kind: pyarrow.DataType) -> bool:
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    checks = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    return any(check(value) for check in checks)


def _no_column(reading: Reading, place: str, texts: Iterable[str], names: Iterable[str]) -> UserError:
    """texts: columns that could be named instead; names: all there are."""
    known = ", ".join(map(repr, texts))
    problem = f"{place} has no such text" + ("" if known else ", nor another")
    remedy = f"use one of {known}" if known else "give rows with a field of text"
    chat = next((name for name in ("messages", "conversations") if name in names), None)
    if chat is not None:
        problem += f"; its {chat!r} are conversations"
        remedy = "add --rows chat, with the tokenizer of a model that has a chat template"
    return UserError("--text-column", reading.column, problem, remedy)
