"""Which rows a process trains on at a step: pure functions, so that a resumed run needs no state but the
step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rdlm.data.synthetic import mix64
from rdlm.errors import UserError

_MIX_KEY = 0x3117  # apart from other uses of the seed


def row_numbers(
    step: int, *, global_batch: int, rank: int, world: int, micro_index: int, micro_size: int
) -> np.ndarray:
    """Positions in the endless list of training rows, int64 [micro_size].

    Update ``step`` takes rows [step, step + 1) * global_batch; rank after rank, micro-batch after
    micro-batch.
    """
    share = global_batch // world
    if global_batch % world or share % micro_size or not 0 <= micro_index < share // micro_size:
        raise UserError(
            "batch",
            (global_batch, world, micro_size, micro_index),
            "the micro-batches do not tile the global batch",
            "make global_size a multiple of processes * micro_size",
        )
    first = step * global_batch + rank * share + micro_index * micro_size
    return np.arange(first, first + micro_size)


def shuffled(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Row numbers -> items 0 .. count-1: each item once an epoch of ``count`` rows, in an order of its own
    every epoch."""
    epochs, positions = np.divmod(rows, count)
    items = np.empty_like(rows)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        items[inside] = permute(positions[inside], count, seed, int(epoch))
    return items


def shares(weights: Sequence[float], count: int) -> list[int]:
    """``count`` in whole parts in proportion to ``weights``: the largest remainders are rounded up."""
    exact = [weight / sum(weights) * count for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: count - sum(parts)]:
        parts[i] += 1
    return parts


def mixed(rows: np.ndarray, counts: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers -> (part, number of the row in that part's own endless list), both int64.

    Of every sum(counts) rows part i gives counts[i], in an order of their own; each row of a part comes once.
    """
    period = sum(counts)
    ends = np.cumsum(counts)
    rounds, positions = np.divmod(rows, period)
    slots = np.empty_like(rows)
    for number in np.unique(rounds):
        inside = rounds == number
        slots[inside] = permute(positions[inside], period, seed ^ _MIX_KEY, int(number))
    part = np.searchsorted(ends, slots, side="right")
    own = np.asarray(counts)[part]
    return part, rounds * own + slots - (ends[part] - own)


def permute(positions: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """A seeded bijection of 0 .. count-1 in constant memory: four Feistel rounds on the next power of
    four, walked until inside (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains")."""
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, epoch]).generate_state(4, np.uint64)
    out = positions.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for key in keys:
            left, right = right, left ^ (mix64(right ^ key) & mask)
        out[outside] = left << half | right
        outside = out >= count
    return out.astype(np.int64)
