"""A micro-batch, as data readers make it and objectives take it. All of an update go to a device in one copy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rdlm.device import staged

ALIGNMENT = 16
"""Bytes: parts of a buffer begin at multiples, as their kernels expect."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Text: inputs, targets [B, T] int64, ids. Images: inputs fp32 [B, C, H, W] in [-1,
    1], targets [B, 1] int64, classes. mask: bool of the targets' shape, True where a target counts."""

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    documents: Tensor | None = None
    """int64 [B, T]: the number of the document that a position belongs to, rising along a row. Positions see
    their own document alone, and count from its start. None: a row is one sequence, whatever is in it."""
    mask_on_host: Tensor | None = None
    """The mask in host memory; None: ``mask`` is asked, for which the host waits where it is on a device."""

    @property
    def counted(self) -> Tensor:
        """The mask in host memory: how many targets count, and which, decides shapes."""
        return self.mask.cpu() if self.mask_on_host is None else self.mask_on_host

    def to(self, device: torch.device | str) -> Batch:
        where = torch.device(device)
        inputs, targets, mask = (staged(part, where) for part in (self.inputs, self.targets, self.mask))
        documents = None if self.documents is None else staged(self.documents, where)
        return Batch(inputs, targets, mask, documents, self.counted)


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
