"""A micro-batch, as data readers make it and objectives take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rdlm.device import staged


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
