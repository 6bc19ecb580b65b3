"""Packs over the two pools: whatever way the past is read, each row sees its own, and memory is what has been
written."""

from __future__ import annotations

import pytest
import torch

from rdlm.nn.attention import attention, for_every_head
from rdlm.nn.kv_cache import LANES, PAGE, KVCache, PackedContext, Segment

H, DH, STARTS = 2, 8, (5, 0, 3)
STEP = 2
"""The step that rows of the full pool are at; the past at position p has taken 1 + p % 4 steps."""


def random_rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn(3, 1, count, H, DH)
    return q, k, v


def filled(num_steps: int) -> tuple[KVCache, torch.Tensor]:
    """A pool whose three slots have a past, and the keys and values that a row at STEP must see: [2, slots,
    positions, H, Dh]."""
    torch.manual_seed(0)
    pool = KVCache(1, 3, 8, H, DH, num_steps=num_steps)
    seen = torch.zeros(2, 3, 8, H, DH)
    for slot, start in enumerate(STARTS):
        for position in range(start):
            for step in range(1 + position % 4 if pool.keeps_steps else 1):
                q, k, v = random_rows(1)
                PackedContext(pool, [Segment(slot, position, 1, step)]).attend(q, k, v, 0)
                if step <= STEP:
                    seen[:, slot, position] = torch.cat([k[0], v[0]])
    return pool, seen


@pytest.mark.parametrize("num_steps", [1, 4], ids=["shared", "full"])
@pytest.mark.parametrize("commits", [(True, True, True), (True, False, True)])
@pytest.mark.parametrize("slots", [(0, 1, 2), (2, 0, 1), (0, 2)], ids=["neighbours", "shuffled", "apart"])
def test_decoding_rows_see_their_own_past_and_themselves(
    slots: tuple[int, ...], commits: tuple[bool, ...], num_steps: int
) -> None:
    pool, seen = filled(num_steps)
    step = STEP if pool.keeps_steps else 0
    segments = [
        Segment(slot, STARTS[slot], 1, step, commit) for slot, commit in zip(slots, commits, strict=False)
    ]
    for _ in range(2):  # a repeated step gives the same
        q, k, v = random_rows(len(slots))
        out = PackedContext(pool, segments).attend(q, k, v, 0)
        for i, segment in enumerate(segments):
            past = [
                torch.cat([kept[segment.slot, : segment.start], new[0, i : i + 1]])[None]
                for kept, new in zip(seen, (k, v), strict=True)
            ]
            torch.testing.assert_close(
                out[:, i : i + 1], attention(q[:, i : i + 1], *past), atol=1e-6, rtol=1e-5
            )
    for slot, start in enumerate(
        STARTS
    ):  # a probe past the end reads what is kept: own places were written, and nothing else
        row = next((i for i, s in enumerate(segments) if s.slot == slot and s.commit), None)
        kept = seen[:, slot, :start]
        if row is not None:
            kept = torch.cat([kept, torch.stack([k[0, row], v[0, row]])[:, None]], dim=1)
        q2, k2, v2 = random_rows(1)
        probe = Segment(slot, kept.shape[1], 1, step, commit=False)
        out = PackedContext(pool, [probe]).attend(q2, k2, v2, 0)
        past = [torch.cat([old, new[0]])[None] for old, new in zip(kept, (k2, v2), strict=True)]
        torch.testing.assert_close(out, attention(q2, *past), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 4], ids=["shared", "full"])
def test_a_slot_that_was_freed_tells_its_next_owner_nothing(num_steps: int) -> None:
    """NaN keys of a request that failed would pass through the mask of a shorter one: 0 times NaN is NaN."""
    pool = KVCache(1, 2, 8, H, DH, num_steps=num_steps)
    nan = torch.full((1, 8, H, DH), float("nan"))
    PackedContext(pool, [Segment(0, 0, 8)]).attend(nan, nan, nan, 0)
    pool.free(0)
    q, k, v = random_rows(2)
    PackedContext(pool, [Segment(1, 0, 2)]).attend(q, k, v, 0)
    out = PackedContext(pool, [Segment(0, 0, 1), Segment(1, 2, 1)]).attend(q, k, v, 0)
    assert torch.isfinite(out).all()


def test_the_full_pool_holds_what_has_been_written() -> None:
    """Three layers of which the middle one iterates: pages of the steps and positions that were taken, and
    none after ``free``."""
    pool = KVCache(3, 2, 1000, H, DH, num_steps=5, core_layers=range(1, 2))
    page = PAGE * H * (DH + LANES) * 4  # keys, and values of narrow heads filled up
    assert pool.num_bytes == 0
    span = random_rows(PAGE + 1)
    PackedContext(pool, [Segment(0, 0, PAGE + 1)]).attend(*span, 0)
    for step in range(5):
        PackedContext(pool, [Segment(0, 0, PAGE + 1, step)]).attend(*span, 1)
    PackedContext(pool, [Segment(0, 0, PAGE + 1)]).attend(*span, 2)
    assert pool.num_bytes == (1 + 5 + 1) * 2 * page
    one = random_rows(1)
    for layer in (0, 2):  # prelude and coda
        PackedContext(pool, [Segment(1, 0, 1)]).attend(*one, layer)
    assert pool.num_bytes == (1 + 5 + 1) * 2 * page + 2 * page
    assert pool.free(0) == (1 + 5 + 1) * 2 * page and pool.num_bytes == 2 * page
    assert pool.free(1) == 2 * page and pool.num_bytes == 0


def test_a_single_query_in_bf16_is_the_fp32_answer_rounded() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 4, 16).bfloat16() for length in (1, 9, 9))
    assert torch.equal(attention(q, k, v), attention(q.float(), k.float(), v.float()).bfloat16())


def test_repeated_keys_are_what_grouped_heads_read() -> None:
    """What a GPU is given where there is a mask."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 6, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    mask = torch.rand(5, 9) > 0.3
    mask[:, 0] = True
    repeated = attention(q, for_every_head(k, 6), for_every_head(v, 6), mask)
    torch.testing.assert_close(repeated, attention(q, k, v, mask))
