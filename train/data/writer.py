"""Writing prepared data: one split's shards, and the folder that appears only when it is complete."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from rdlm.data.images import ImageManifest
from rdlm.data.manifest import MANIFEST, read_document
from rdlm.data.token_shards import Manifest, Shard, Split
from rdlm.errors import UserError, reason


class SplitWriter:
    """Appends documents to the shards of one split and counts them."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self.folder, self.split, self.dtype, self.limit = (
            folder,
            split,
            np.dtype(dtype).newbyteorder("<"),
            shard_tokens,
        )
        self.documents = self.bytes = self.tokens = 0
        self.shards: list[Shard] = []
        self._file: IO[bytes] | None = None
        (folder / split).mkdir()

    def add(self, texts: list[str], ids: list[list[int]], eos: int) -> None:
        flat = np.fromiter(
            itertools.chain.from_iterable(itertools.chain(i, (eos,)) for i in ids), dtype=self.dtype
        )
        self.documents += len(texts)
        self.bytes += sum(len(text.encode()) for text in texts)
        while len(flat):
            if self._file is None:
                self._name = f"{self.split}/shard_{len(self.shards):05d}.bin"
                self._file, self._digest, self._filled = (
                    (self.folder / self._name).open("wb"),
                    hashlib.sha256(),
                    0,
                )
            piece, flat = flat[: self.limit - self._filled], flat[self.limit - self._filled :]
            self._file.write(data := piece.tobytes())
            self._digest.update(data)
            self._filled += len(piece)
            if self._filled == self.limit:
                self._finish()

    def _finish(self) -> None:
        if self._file is not None:
            self._file.close()
            self.shards.append(Shard(file=self._name, tokens=self._filled, sha256=self._digest.hexdigest()))
            self.tokens += self._filled
            self._file = None

    def close(self) -> Split:
        self._finish()
        return Split(
            documents=self.documents, tokens=self.tokens, bytes=self.bytes, shards=tuple(self.shards)
        )


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder next to ``out`` that becomes ``out`` if the block succeeds. A killed build's remains are
    replaced by the next."""
    folder, old = (out.with_name(f".{out.name}.{what}") for what in ("building", "old"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "--out", str(out), f"cannot be written ({reason(error)})", "choose another folder"
        ) from None
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "--out", str(out), "another process is preparing it", "wait, or choose another folder"
            ) from None
        for entry in folder.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield folder
        except OSError as error:  # a full disk; what cannot be read is a UserError of its source
            shutil.rmtree(folder)
            raise UserError(
                "--out", str(out), f"cannot be written ({reason(error)})", "free some space"
            ) from error
        except BaseException:
            shutil.rmtree(folder)
            raise
        (folder / "lock").unlink()
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.replace(out, old)
        os.replace(folder, out)
        shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest | ImageManifest) -> None:
    """``skipped`` stands in it only where something was: what is whole keeps the bytes that it always had."""
    document = manifest.model_dump()
    if not document.get("skipped"):
        document.pop("skipped", None)
    (folder / MANIFEST).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def check_same_request(out: Path, request: dict[str, Any]) -> None:
    """UserError unless ``out`` is a preparation of the same request."""
    if not (out / MANIFEST).is_file():
        raise UserError(
            "--out",
            str(out),
            "exists and is not a finished preparation",
            "choose another folder, or add --force",
        )
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
