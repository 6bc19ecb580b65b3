"""Attention that reads pages in place against the gather of all keys that a row sees."""

from __future__ import annotations

import pytest
import torch

from rdlm.nn.kv_cache import PAGE, UNKEPT, KVCache, PackedContext, PagedContext, Segment
from rdlm.nn.paged_attention import TILE, Visible

HEADS, WIDTH = 4, 8


def caches(kv_heads: int, num_unkept: int = 0) -> list[KVCache]:
    """One that is gathered, and one that is read in place."""
    sizes = (2, 3, 4 * PAGE, kv_heads, WIDTH)
    return [KVCache(*sizes, num_unkept=num_unkept, by_rows=by_rows) for by_rows in (False, True)]


def rows(count: int, heads: int, seed: int) -> torch.Tensor:
    return torch.randn(1, count, heads, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_chunks_and_rows_that_decode_share_a_call(kv_heads: int) -> None:
    """Three sequences whose pages are mixed up, in steps of other lengths: chunks within and across pages, and single
    rows."""
    steps = [[40, 5, 1], [1, 90, 63], [30, 1, 1], [1, 1, 70]]
    found = []
    for cache in caches(kv_heads):
        ends, outputs = [0, 0, 0], []
        for number, lengths in enumerate(steps):
            segments = [Segment(slot, ends[slot], length) for slot, length in enumerate(lengths)]
            context = PackedContext(cache, segments)
            for layer in range(2):
                q, k, v = (
                    rows(sum(lengths), heads, 10 * number + layer + 100 * i)
                    for i, heads in enumerate((HEADS, kv_heads, kv_heads))
                )
                outputs.append(context.attend(q, k, v, layer))
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        found.append(torch.cat(outputs, 1))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("commit", [True, False])
def test_single_rows_in_buffers(commit: bool) -> None:
    """At the first position, within a page and at its bounds; kept or not, with the position's own key or beside it."""
    positions = [0, 1, PAGE - 1, PAGE, PAGE + 7, 2 * PAGE]
    found = []
    for cache in caches(2, num_unkept=8):
        cache.num_slots = len(positions)
        store = cache.stores[0]
        outputs = []
        for slot, position in enumerate(positions):
            slot %= 3
            cache.free(slot)
            if position:
                past = Segment(slot, 0, position)
                context = PackedContext(cache, [past])
                context.attend(
                    *(rows(position, heads, slot + i) for i, heads in enumerate((HEADS, 2, 2))), layer=0
                )
            if commit:
                store.reserve(Segment(slot, position, 1))
            width = 4 * PAGE
            seen = torch.zeros(1, width, dtype=torch.int64)
            known = torch.from_numpy(store.row(Segment(slot, position, 1))[:position].astype("int64"))
            write = int(store.row(Segment(slot, position, 1))[position]) if commit else UNKEPT + slot
            seen[0, :position], seen[0, position] = known, write
            at = torch.tensor([position])
            paged = PagedContext(cache, at, at, width, [(store, torch.tensor([write]), seen)])
            outputs.append(
                paged.attend(
                    *(rows(1, heads, 50 + slot + i) for i, heads in enumerate((HEADS, 2, 2))), layer=0
                )
            )
        found.append(torch.cat(outputs, 1))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_a_tile_lists_each_page_that_its_rows_see_once() -> None:
    """The compiled form reads these pages and no others; the one that runs on a CPU would not miss one."""
    places = [[0, 5, 9], [3, 0, 0], [4, 6, 0], [0, 0, 0]]
    limit = torch.tensor([2 * PAGE + 3, 7, PAGE, 0])
    own = torch.tensor([9 * PAGE + 3, 3 * PAGE + 7, 6 * PAGE, UNKEPT + 2])
    pages = torch.tensor(places, dtype=torch.int64)
    pages[0] = torch.tensor([7, 5, 9])
    visible = Visible.of_single_rows(pages, limit, own, PAGE)
    mask = visible.block_mask(12, PAGE)
    for tile in range(4):
        listed = visible.pages[tile, : visible.count[tile]].tolist()
        assert len(set(listed)) == len(listed)
        row = torch.tensor(tile * TILE)
        seen = [
            p
            for p in range(12 * PAGE)
            if mask.mask_mod(torch.tensor(0), torch.tensor(0), row, torch.tensor(p))
        ]
        assert {p // PAGE for p in seen} == set(listed) and len(seen) == int(limit[tile]) + 1
