"""Folders that are written completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A new folder to fill. It takes the place of ``folder`` once it is complete and on disk, and vanishes if
    filling it fails."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if folder.exists():
        outdated = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(outdated, ignore_errors=True)
        os.rename(folder, outdated)
        os.rename(temporary, folder)
        shutil.rmtree(outdated)
    else:
        os.rename(temporary, folder)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, text: str) -> None:
    """A text file that is there as a whole or as it was before."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, path)
