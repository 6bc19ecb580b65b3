"""The frozen target table: what blocks that never meet agree on without exchanging a byte."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=4)
def frozen_rows(seed: int, vocab_size: int, width: int, device: torch.device) -> Tensor:
    """Unit rows drawn from ``seed``: fp32 [V, D], one copy for all blocks of a process; a constant, never
    written to.

    A pure function of its arguments on every machine and version: numpy freezes the stream of RandomState
    (NEP 19). So the table is in no checkpoint, in no optimizer, and its rows are nearly orthogonal, which the
    evidence term reads best.
    """
    rows = np.random.RandomState(seed).standard_normal((vocab_size, width))
    with torch.inference_mode(
        False
    ):  # else a first call in inference mode would make the table unusable in training
        return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).float().to(device)
