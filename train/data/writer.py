"""Writing prepared data: one split's shards, the manifest, and whether a folder holds the same already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rdlm.data.images import ImageManifest
from rdlm.data.manifest import MANIFEST, SPLITS, read_document
from rdlm.data.token_shards import Manifest, Shard, Split
from rdlm.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """A document as shards hold it. text: what decides its split. num_bytes: of its text in UTF-8. marks: a
    byte for each id (COUNTS, STARTS), where the split has marks."""

    text: str
    ids: Sequence[int]
    num_bytes: int
    marks: Sequence[int] = ()


class SplitWriter:
    """Appends documents to the shards of one split and counts them."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, marked: bool) -> None:
        """marked: whether its tokens have marks."""
        self.folder, self.split, self.limit, self.marked = folder, split, shard_tokens, marked
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.documents = self.bytes = self.tokens = 0
        self.shards: list[Shard] = []
        self._files: list[_Hashed] = []
        """The shard that is being written, and its marks."""
        (folder / split).mkdir()

    def add(self, documents: Sequence[Encoded]) -> None:
        columns = [np.fromiter(chain.from_iterable(d.ids for d in documents), dtype=self.dtype)]
        if self.marked:
            columns.append(np.fromiter(chain.from_iterable(d.marks for d in documents), dtype=np.uint8))
        self.documents += len(documents)
        self.bytes += sum(document.num_bytes for document in documents)
        while len(columns[0]):
            if not self._files:
                self._name, self._filled = f"{self.split}/shard_{len(self.shards):05d}.bin", 0
                files = (self.folder / self._name, (self.folder / self._name).with_suffix(".marks"))
                self._files = [_Hashed(file) for file in files[: len(columns)]]
            room = self.limit - self._filled
            for file, column in zip(self._files, columns, strict=True):
                file.write(column[:room].tobytes())
            self._filled += len(columns[0][:room])
            columns = [column[room:] for column in columns]
            if self._filled == self.limit:
                self._finish()

    def _finish(self) -> None:
        if self._files:
            digests = [file.close() for file in self._files]
            marks = digests[1] if self.marked else None
            self.shards.append(
                Shard(file=self._name, tokens=self._filled, sha256=digests[0], marks_sha256=marks)
            )
            self.tokens += self._filled
            self._files = []

    def close(self) -> Split:
        self._finish()
        return Split(
            documents=self.documents, tokens=self.tokens, bytes=self.bytes, shards=tuple(self.shards)
        )


class _Hashed:
    """A file that is being written, and the hash of what is in it."""

    def __init__(self, file: Path) -> None:
        self._file, self._digest = file.open("wb"), hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> str:
        self._file.close()
        return self._digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest | ImageManifest) -> None:
    """``skipped`` and ``marks_sha256`` stand in it only where something was: other data keep the bytes that
    they always had."""
    document = manifest.model_dump()
    if not document.get("skipped"):
        document.pop("skipped", None)
    for split in document["splits"].values():
        for shard in split.get("shards", ()):
            if shard.get("marks_sha256") is None:
                shard.pop("marks_sha256", None)
    (folder / MANIFEST).write_text(
        json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


PREPARED = (MANIFEST, "tokenizer", *SPLITS)
"""What lies in a folder of prepared data, and what --force may replace."""


def check_same_request(out: Path, request: dict[str, Any]) -> None:
    """UserError unless ``out`` is a preparation of the same request."""
    if not (out / MANIFEST).is_file():
        problem = "exists and is not a finished preparation"
        raise UserError("--out", str(out), problem, "choose another folder")
    found = read_document(out).get("request")
    if found != request:
        old = found if isinstance(found, dict) else {}
        differs = ", ".join(
            key for key in (request | old) if key not in old or key not in request or old[key] != request[key]
        )
        raise UserError(
            "--out",
            str(out),
            f"holds a different preparation (other {differs})",
            "choose another folder, or add --force",
        )
