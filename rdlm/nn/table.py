"""The token table: embedding and, where tied, read-out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

R = TypeVar("R")


class TokenTable(nn.Module):
    """weight [V, D]. ``table(ids)`` looks rows up; ``table(use=f)`` returns ``f(weight)``.

    Every use goes through forward because ZeRO stage 3 gathers a partitioned weight only around its module's forward.
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, ids: Tensor | None = None, use: Callable[[Tensor], R] | None = None) -> Tensor | R:
        if use is not None:
            return use(self.weight)
        assert ids is not None
        return F.embedding(ids, self.weight)
