"""Costly results on disk, so that an interrupted measurement goes on where it stopped; and progress bars
for them."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

CHUNK_TEXTS = 256
"""Items of one file; what an interruption can lose."""

Progress = Callable[[int], object] | None
"""Takes how many are done since."""
Bar = Callable[[str, int], Progress]
"""Opens a progress bar: (what, how many) -> its callback."""


def cached(
    folder: Path,
    key: Sequence[object],
    texts: Sequence[Any],
    compute: Callable[[Sequence[Any], Progress], np.ndarray],
    progress: Progress = None,
) -> np.ndarray:
    """compute(texts, progress) -> [texts, ...], in chunks kept as files under a hash of ``key`` and the
    chunk, so that it resumes."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in range(0, len(texts), CHUNK_TEXTS):
        chunk = texts[first : first + CHUNK_TEXTS]
        name = hashlib.sha256(json.dumps([*key, chunk]).encode()).hexdigest()[:24]
        file, partial = folder / f"{key[0]}-{name}.npy", folder / f".{key[0]}-{name}.partial"
        known = file.is_file()
        if not known:
            with partial.open("ab") as stream:
                fcntl.flock(
                    stream, fcntl.LOCK_EX
                )  # another run at the same texts waits here, then finds them
                known = file.is_file()
                if not known:
                    stream.truncate(0)
                    np.save(stream, compute(chunk, progress))
                    stream.flush()
                    partial.replace(file)
            partial.unlink(missing_ok=True)
        if known and progress:
            progress(len(chunk))
        parts.append(np.load(file))
    return np.concatenate(parts)


@contextmanager
def bars() -> Iterator[Bar]:
    """One progress bar at a time: the next one closes the one before it, the block the last."""
    with ExitStack() as stack:

        def bar(what: str, total: int) -> Callable[[int], object]:
            stack.close()
            return stack.enter_context(tqdm(total=total, desc=what)).update

        yield bar
