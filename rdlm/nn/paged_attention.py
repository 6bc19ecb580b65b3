"""Attention of packed rows to the pages of a pool, in one call and without copies of keys: FlexAttention (Dong et al.
2024, arXiv 2412.05496) with a mask over the pool's own places. Chunks of prompts and rows that decode share the call.

Rows of a sequence lie in tiles, and a tile reads its sequence's pages alone. Which these are is data, so that a call
can be captured. On a CPU it runs as written, with all scores: the reference of the compiled form that a GPU runs.

Shapes: N rows, G tiles, W pages of a tile at most, P pages of the pool, H heads, Hkv key-value heads, Dh head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

TILE = 16
"""Rows of a tile: the fewest that a matrix unit multiplies at a time."""


@dataclass(frozen=True)
class Visible:
    """What each row of a call sees: positions below its limit in its sequence's pages, and one place of its own.

    pages int32 [G, W]: of each tile, in order of positions, then any others that its rows see; count int32 [G]: how
    many of them count. positions int32 [G]: how many of them are of positions. limit int32, own int32 [G * TILE]: of
    each row; own -1: none. into int64 [N]: each row's index among those of the tiles.
    """

    pages: Tensor
    count: Tensor
    positions: Tensor
    limit: Tensor
    own: Tensor
    into: Tensor

    @classmethod
    def of_single_rows(cls, pages: Tensor, limit: Tensor, own: Tensor, page: int) -> Visible:
        """A tile for each row: pages [N, W], limit and own int64 [N]."""
        tiles, used = len(pages), -(-limit // page)
        pages = torch.cat([pages, torch.zeros_like(pages[:, :1])], 1)
        column = torch.arange(pages.shape[1], device=pages.device)
        pages = pages.masked_fill(column >= used[:, None], 0).scatter(
            1, used[:, None], (own // page)[:, None]
        )
        last = pages.gather(1, (used - 1).clamp(min=0)[:, None])[:, 0]
        is_new = (used == 0) | (last != own // page)
        first = torch.arange(tiles, device=pages.device) * TILE
        rows = torch.zeros(2, tiles * TILE, dtype=torch.int64, device=pages.device)
        rows[1] -= 1
        of_rows = rows.index_copy(1, first, torch.stack([limit, own])).int()
        return cls(pages.int(), (used + is_new).int(), used.int(), of_rows[0], of_rows[1], first)

    def block_mask(self, num_pages: int, page: int) -> BlockMask:
        """Over the rows of all tiles, and the places of a pool."""
        column = torch.arange(self.pages.shape[1], device=self.pages.device)
        known = torch.where(column < self.positions[:, None], column, -1).int()
        start = torch.full((len(self.pages), num_pages), -1, dtype=torch.int32, device=self.pages.device)
        # Page 0 is nobody's: all that is not a position's page may be written there.
        start = start.scatter(1, torch.where(known < 0, 0, self.pages).long(), known)
        limit, own = self.limit, self.own

        def sees(batch: Tensor, head: Tensor, row: Tensor, place: Tensor) -> Tensor:
            first = start[row // TILE, place // page]
            is_past = (first >= 0) & (first * page + place % page < limit[row])
            return is_past | (place == own[row])

        return BlockMask.from_kv_blocks(
            self.count[None, None],
            self.pages[None, None],
            BLOCK_SIZE=(TILE, page),
            mask_mod=sees,
            seq_lengths=(len(self.pages) * TILE, num_pages * page),
            compute_q_blocks=False,
        )


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def attend_pages(q: Tensor, k: Tensor, v: Tensor, visible: Visible, mask: BlockMask) -> Tensor:
    """q [N, H, Dh], k and v [P, page, Hkv, Dh], mask: ``visible.block_mask`` -> [N, H, Dh]."""
    rows = q.new_zeros(len(visible.limit), *q.shape[1:]).index_copy(0, visible.into, q)
    is_gpu = q.device.type == "cuda"
    attend = _compiled() if is_gpu else cast(Callable[..., Any], flex_attention)
    out = attend(
        rows.transpose(0, 1)[None],
        *(pool.flatten(0, 1).transpose(0, 1)[None] for pool in (k, v)),
        block_mask=mask,
        enable_gqa=k.shape[2] != q.shape[1],
        kernel_options={"BLOCK_M": TILE, "BLOCK_N": mask.BLOCK_SIZE[1]} if is_gpu else None,
    )
    return cast(Tensor, out)[0].transpose(0, 1)[visible.into]
