"""Batches on their way to the device: read one update ahead by a thread, sent in one copy that nothing waits for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rdlm.data.batch import Batch
from rdlm.device import staged

ALIGNMENT = 16
"""Bytes: parts of the buffer begin at multiples, as their kernels expect."""


class Reader:
    """What ``read(index)`` gives, begun while the update before is computed. Batches are pure functions of their
    index, so reading ahead changes nothing and is no part of a run's state."""

    def __init__(self, read: Callable[[int], list[Batch]]) -> None:
        self._read = read
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def take(self, index: int, following: int | None) -> list[Batch]:
        """Batches of ``index``; those of ``following`` are begun. Whatever reading them raised is raised here."""
        if self._ahead is not None and self._ahead[0] == index:
            batches = self._ahead[1].result()
        else:
            batches = self._read(index)
        self._ahead = None
        if following is not None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")
            self._ahead = (following, self._thread.submit(self._read, following))
        return batches

    def close(self) -> None:
        """End the thread; ``take`` starts another where it is called again."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread = self._ahead = None


def on_device(batches: list[Batch], device: torch.device) -> list[Batch]:
    """The micro-batches of one update on ``device``: all their tensors in one pinned buffer, one copy."""
    if device.type == "cpu":
        return batches
    names = [field.name for field in fields(Batch) if field.name != "mask_on_host"]
    parts = [getattr(batch, name) for batch in batches for name in names]
    starts, end = [], 0
    for part in parts:
        starts.append(end)
        end += 0 if part is None else -(-part.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    for start, part in zip(starts, parts, strict=True):
        if part is not None:
            buffer[start : start + part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
    there = staged(buffer, device)

    def placed(start: int, part: Tensor | None) -> Any:
        if part is None:
            return None
        return there[start : start + part.nbytes].view(part.dtype).view(part.shape)

    moved = [placed(start, part) for start, part in zip(starts, parts, strict=True)]
    count = len(names)
    return [
        Batch(**dict(zip(names, moved[n * count : (n + 1) * count], strict=True)), mask_on_host=batch.counted)
        for n, batch in enumerate(batches)
    ]
