"""One-row packs: whatever way the past is read, each row sees its own."""

from __future__ import annotations

import pytest
import torch

from rdlm.nn.attention import attention
from rdlm.nn.kv_cache import KVPool, PackedContext, Segment

H, DH, STARTS = 2, 8, (5, 0, 3)


def filled(depth: int) -> KVPool:
    pool = KVPool(1, 3, 8, H, DH, depth)
    torch.manual_seed(0)
    for store in (pool.k, pool.v):
        store.normal_()
    return pool


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("commits", [(True, True, True), (True, False, True)])
@pytest.mark.parametrize("slots", [(0, 1, 2), (2, 0, 1), (0, 2)], ids=["neighbours", "shuffled", "apart"])
def test_decoding_rows_see_their_own_past_and_themselves(
    slots: tuple[int, ...], commits: tuple[bool, ...], depth: int
) -> None:
    pool, step = filled(depth), depth - 1
    before = pool.k.clone(), pool.v.clone()
    segments = [
        Segment(slot, STARTS[slot], 1, step, commit) for slot, commit in zip(slots, commits, strict=False)
    ]
    q, k, v = torch.randn(3, 1, len(slots), H, DH)
    out = PackedContext(pool, segments).attend(q, k, v, 0)
    for i, segment in enumerate(segments):
        past = [
            torch.cat([store[0, segment.slot, step, : segment.start], new[0, i : i + 1]])[None]
            for store, new in zip(before, (k, v), strict=True)
        ]
        torch.testing.assert_close(out[:, i : i + 1], attention(q[:, i : i + 1], *past), atol=1e-6, rtol=1e-5)
        for store, old, new in zip((pool.k, pool.v), before, (k, v), strict=True):
            old[0, segment.slot, step, segment.start] = (
                new[0, i] if segment.commit else old[0, segment.slot, step, segment.start]
            )
            assert torch.equal(store[0, segment.slot], old[0, segment.slot]), (
                "its own place is written, and nothing else"
            )


def test_a_single_query_in_bf16_is_the_fp32_answer_rounded() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 4, 16).bfloat16() for length in (1, 9, 9))
    assert torch.equal(attention(q, k, v), attention(q.float(), k.float(), v.float()).bfloat16())
