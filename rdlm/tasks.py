"""Generated tasks that need serial computation: the running product in a group (Liu et al. 2023, "Transformers Learn Shortcuts
to Automata"; Barrington 1986 for why S5 cannot be done in constant depth, S3 being the solvable, easier case).

Every example is a pure function of (split, seed, row), so the order of generation, batch sizes and restarts change nothing.
"""

from __future__ import annotations

from functools import cached_property
from itertools import permutations
from typing import Literal

import numpy as np
import torch

from rdlm.errors import UserError
from rdlm.objectives import Batch

GROUPS = {"s3": 3, "s5": 5}
_SPLIT_KEY = {"train": 1, "valid": 2, "test": 3}


class GroupProduct:
    """Inputs are elements g_1 .. g_T; the target at position i is g_1 * ... * g_i, in the same ids 0 .. |G|-1.

    Element n is the n-th permutation of ``itertools.permutations(range(k))``; (a * b)(x) = a(b(x)). Id 0 is the identity.
    """

    def __init__(self, group: str, length: int) -> None:
        """UserError for another group or a length below 1."""
        if group not in GROUPS:
            raise UserError("data.group", group, "there is no such group", f"use one of {', '.join(GROUPS)}")
        if length < 1:
            raise UserError("data.length", length, "a product needs at least one factor", "use 1 or more")
        self.group, self.length = group, length
        self.elements = np.array(list(permutations(range(GROUPS[group]))))
        self.vocab_size = len(self.elements)

    @cached_property
    def table(self) -> np.ndarray:
        """table[a, b] = id of a * b, int64 [|G|, |G|]."""
        base = GROUPS[self.group] ** np.arange(GROUPS[self.group])
        composed = self.elements[:, self.elements]  # [a, b, x] = a(b(x))
        keys = (self.elements * base).sum(-1)
        order = np.argsort(keys)
        return order[np.searchsorted(keys[order], (composed * base).sum(-1))]

    def rows(self, indices: np.ndarray, seed: int, split: Literal["train", "valid", "test"] = "train") -> Batch:
        """Examples by number, [len(indices), length]; every position counts. Equal arguments give equal examples.

        The splits draw from different random streams whatever their seeds are.
        """
        key = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, _SPLIT_KEY[split]]).generate_state(1, np.uint64)[0]
        counters = indices.astype(np.uint64)[:, None] * np.uint64(self.length) + np.arange(self.length, dtype=np.uint64)
        factors = (mix64(mix64(counters) ^ key) % np.uint64(self.vocab_size)).astype(np.int64)
        products = factors.copy()
        for i in range(1, self.length):
            products[:, i] = self.table[products[:, i - 1], factors[:, i]]
        targets = torch.from_numpy(products)
        return Batch(torch.from_numpy(factors), targets, torch.ones_like(targets, dtype=torch.bool))

    def batch(self, n: int, seed: int, split: Literal["train", "valid", "test"] = "train") -> Batch:
        """The first ``n`` examples of a seed."""
        return self.rows(np.arange(n), seed, split)


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al. 2014): a bijection of uint64 that scatters neighbouring values."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
