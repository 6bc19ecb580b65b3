"""Random streams keyed by what they are for, so that no result depends on batching, order or restarts."""

from __future__ import annotations

import numpy as np
import torch


def generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator that is a pure function of (seed, key): the same draw for the same step, rank or
    position, always."""
    words = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, *key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))
