"""Prepared token data on disk: ``manifest.json``, ``tokenizer/`` and memory-mapped
``SPLIT/shard_00000.bin`` files.

A shard is a flat little-endian array of token ids; the shards of a split are one long stream of documents,
each followed by the end-of-text token. Conversations are documents without that token, because a template
ends their turns itself; beside each of their shards lie its marks, a byte a token. Training and evaluation
both read it here; only ``train`` writes it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from rdlm.config.base import Strict, parse
from rdlm.data.batch import Batch
from rdlm.data.manifest import AGAIN, MANIFEST, file_sha256, no_split, read_kind
from rdlm.data.tokenizer import Tokenizer, load_tokenizer
from rdlm.errors import UserError

SCHEMA_VERSION = 1
COUNTS, STARTS = 1, 2
"""Bits of a mark: the token counts as a target; it is the first of its document."""

UNWRITTEN = 64
"""So many tokens of id 0 and no other are hardly text: a crash may have left them, or a copy that was cut off."""


class Shard(Strict):
    """One file of a split."""

    file: str
    """Path relative to the manifest."""
    tokens: int = Field(ge=0)
    sha256: str
    marks_sha256: str | None = None
    """Hash of the file of marks, uint8 [tokens]; None where there is none: every token counts."""

    @property
    def marks(self) -> str:
        """Path of the file of marks, relative to the manifest."""
        return str(PurePosixPath(self.file).with_suffix(".marks"))

    @model_validator(mode="after")
    def _inside(self) -> Shard:
        path = PurePosixPath(self.file)
        if "\0" in self.file or path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError("a shard lies in the folder of its manifest")
        return self


class Split(Strict):
    """Counts of one split. ``bytes``: UTF-8 bytes of its documents; ``tokens`` includes an end-of-text
    token a document."""

    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)
    shards: tuple[Shard, ...]

    @model_validator(mode="after")
    def _whole(self) -> Split:
        if (total := sum(shard.tokens for shard in self.shards)) != self.tokens:
            raise ValueError(f"the shards have {total} tokens together, the split has {self.tokens}")
        return self


class Manifest(Strict):
    """What a folder of shards holds and what it was made from."""

    schema_version: int
    source: str
    """The source as the user named it."""
    request: dict[str, Any]
    """Everything that decides the bytes of the shards: input hashes, tokenizer, split, seed."""
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=2)
    eos_id: int = Field(ge=0)
    tokenizer_fingerprint: str
    splits: dict[Literal["train", "valid", "test"], Split]
    skipped: dict[str, int] = {}
    """Rows and documents that the sources hold and no split does, by reason."""

    @model_validator(mode="after")
    def _end_is_a_token(self) -> Manifest:
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"the end of text is id {self.eos_id}, and there are {self.vocab_size}")
        return self


def read_manifest(folder: Path) -> Manifest:
    """UserError if there is none, it is not ours or not of text, or it is newer than this code."""
    return parse(Manifest, read_kind(folder, "tokens", SCHEMA_VERSION), str(folder / MANIFEST))


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Every shard is there and as long as the manifest says; UserError otherwise. Cheap: reads no data."""
    width = np.dtype(manifest.dtype).itemsize
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        _check_size(folder / shard.file, shard.tokens * width)
        if shard.marks_sha256 is not None:
            _check_size(folder / shard.marks, shard.tokens)


def _check_size(file: Path, size: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != size:
        problem = "is missing" if found is None else f"has {found} bytes, the manifest says {size}"
        raise UserError("data", str(file), problem, AGAIN)


def num_targets(folder: Path, split: Split) -> int:
    """Tokens of a split that count as targets."""
    counted = 0
    for shard in split.shards:
        if shard.marks_sha256 is None:
            counted += shard.tokens
        elif shard.tokens:  # an empty file cannot be mapped
            marks = np.memmap(folder / shard.marks, dtype=np.uint8, mode="r")
            counted += int(np.count_nonzero(marks & COUNTS))
    return counted


def hashes_of(manifest: Manifest) -> dict[str, str]:
    """Every file of the splits, relative to the manifest -> its sha256."""
    found = {}
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        found[shard.file] = shard.sha256
        if shard.marks_sha256 is not None:
            found[shard.marks] = shard.marks_sha256
    return found


class TokenStore:
    """Read access to one split. ``len`` is its number of tokens; ids come back as int64."""

    def __init__(self, folder: str | Path, split: str) -> None:
        """UserError if the folder is not a finished preparation or has no such split."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        check_sizes(self.folder, self.manifest)
        if split not in self.manifest.splits:
            raise no_split(split, ", ".join(self.manifest.splits))
        self.split, self.info = split, self.manifest.splits[split]
        shards = self._shards = [shard for shard in self.info.shards if shard.tokens]
        self._checked: set[str] = set()
        """Shards whose hash is known to be right."""
        code = f"<{_code(self.manifest.dtype)}"
        self._maps = [np.memmap(self.folder / s.file, dtype=code, mode="r") for s in shards]
        self._marks = [
            np.memmap(self.folder / s.marks, dtype="u1", mode="r") for s in shards if s.marks_sha256
        ]
        self._starts = np.concatenate([[0], np.cumsum([len(m) for m in self._maps])]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def manifest_sha256(self) -> str:
        """Names the data in reports and lets a resumed run notice other data."""
        return file_sha256(self.folder / MANIFEST)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the shards were made with; UserError if another one lies in its place."""
        tokenizer, manifest = load_tokenizer(self.folder / "tokenizer"), self.manifest
        found = (tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id)
        if found != (manifest.tokenizer_fingerprint, manifest.vocab_size, manifest.eos_id):
            raise UserError(
                "tokenizer",
                str(self.folder / "tokenizer"),
                "is not the one the data was made with",
                AGAIN,
            )
        return tokenizer

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), across shards. -> int64 [count]; UserError for an id that the
        vocabulary has not, and for zeros that a damaged shard holds."""
        out = self._read(self._maps, start, count)
        if count and (largest := int(out.max())) >= self.manifest.vocab_size:
            problem = (
                f"split {self.split!r} holds the id {largest}, the vocabulary has {self.manifest.vocab_size}"
            )
            raise UserError("data", str(self.folder), problem, AGAIN)
        if count >= UNWRITTEN and not out.any():
            self._check_hashes(start, count)
        return out

    def _check_hashes(self, start: int, count: int) -> None:
        """UserError where a shard that holds these tokens is not the one that was written. Reads it whole, once."""
        for i in range(bisect_right(self._starts, start) - 1, bisect_right(self._starts, start + count - 1)):
            shard = self._shards[i]
            if shard.file not in self._checked and file_sha256(self.folder / shard.file) != shard.sha256:
                problem = f"holds {count} tokens of id 0 in a row, and its hash is not the manifest's"
                raise UserError("data", str(self.folder / shard.file), problem, AGAIN)
            self._checked.add(shard.file)

    def counts(self, start: int, count: int) -> np.ndarray:
        """Which of tokens [start, start + count) count as targets: bool [count]."""
        if not self._marks:
            return np.ones(count, dtype=bool)
        return (self._read(self._marks, start, count) & COUNTS).astype(bool)

    def document_starts(self) -> np.ndarray:
        """The first token of each document, int64, rising. Reads the whole split."""
        found, eos = [np.zeros(1, dtype=np.int64)], self.manifest.eos_id
        for start, ids, marks in zip(self._starts, self._maps, self._marks or self._maps, strict=False):
            here = np.flatnonzero(marks & STARTS) if self._marks else np.flatnonzero(ids == eos) + 1
            found.append(here + start)
        starts = np.unique(np.concatenate(found))
        return starts[starts < len(self)]

    def _read(self, maps: list[np.memmap], start: int, count: int) -> np.ndarray:
        if not 0 <= start <= start + count <= len(self):
            raise IndexError(f"tokens {start}..{start + count} of {len(self)}")
        out, filled = np.empty(count, dtype=np.int64), 0
        while filled < count:
            i = bisect_right(self._starts, start + filled) - 1
            offset = start + filled - self._starts[i]
            piece = maps[i][offset : offset + count - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        return out

    def num_windows(self, seq_len: int) -> int:
        """Windows of ``seq_len`` inputs and their next tokens, without overlap of inputs; UserError if
        there is none."""
        count = (len(self) - 1) // seq_len
        if count < 1:
            raise UserError(
                "seq_len",
                seq_len,
                f"split {self.split!r} has only {len(self)} tokens",
                f"use {max(1, len(self) - 1)} or less, or prepare more text",
            )
        return count

    def rows(self, indices: np.ndarray, seq_len: int) -> Batch:
        """Windows by number: window i is tokens [i T, (i + 1) T] -> Batch [len(indices), T]."""
        rows = torch.from_numpy(np.stack([self.read(int(i) * seq_len, seq_len + 1) for i in indices]))
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        counts = np.stack([self.counts(int(i) * seq_len + 1, seq_len) for i in indices])
        return Batch(inputs, targets, torch.from_numpy(counts))

    def windows(self, seq_len: int, max_tokens: int | None, batch_size: int) -> Iterator[Batch]:
        """The first windows in order, at most ``max_tokens`` targets (at least one window): for held-out
        evaluation."""
        count = self.num_windows(seq_len)
        if max_tokens is not None:
            count = min(count, max(1, max_tokens // seq_len))
        for first in range(0, count, batch_size):
            yield self.rows(np.arange(first, min(first + batch_size, count)), seq_len)


def _code(dtype: str) -> str:
    return {"uint16": "u2", "uint32": "u4"}[dtype]
