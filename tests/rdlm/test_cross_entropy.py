"""The fused read-out and loss against torch's own cross-entropy, value and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rdlm.nn import cross_entropy
from rdlm.nn.cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("with_evidence", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 20])  # many chunks with a ragged last one; a single chunk
def test_matches_torch(
    monkeypatch: pytest.MonkeyPatch, with_evidence: bool, chunk: int, z_loss: float
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    rng = torch.Generator().manual_seed(0)
    hidden, weight, u, table = (torch.randn(n, 8, generator=rng) for n in (37, 11, 37, 11))
    marked = torch.rand(37, generator=rng) < 0.6  # u counts on these rows alone
    targets, item_weight = torch.randint(0, 11, (37,), generator=rng), torch.rand(37, generator=rng)
    scale = torch.tensor(0.7, requires_grad=True)
    hidden.requires_grad_(), weight.requires_grad_()
    inputs = [hidden, weight] + ([scale] if with_evidence else [])

    rows, others = marked.nonzero().squeeze(1), (~marked).nonzero().squeeze(1)
    evidence = (rows, others, u[marked], table, scale) if with_evidence else None
    total, losses = linear_cross_entropy(hidden, weight, targets, item_weight, evidence, z_loss)
    grads = torch.autograd.grad(3.0 * total, inputs)

    logits = F.linear(hidden, weight) + (
        scale * F.linear(u * marked[:, None], table) if with_evidence else 0.0
    )
    expected = F.cross_entropy(logits, targets, reduction="none")
    whole = ((expected + z_loss * logits.logsumexp(1).square()) * item_weight).sum()
    expected_grads = torch.autograd.grad(3.0 * whole, inputs)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(total, whole)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_evidence_on_every_row_needs_no_list_of_rows(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    hidden, weight, u, table = (torch.randn(n, 8) for n in (37, 11, 37, 11))
    targets, scale, every = torch.randint(0, 11, (37,)), torch.tensor(0.7), torch.arange(37)
    rows = ((None, None), (every, every[:0]))
    found = [
        linear_cross_entropy(hidden, weight, targets, torch.ones(37), (*which, u, table, scale))[1]
        for which in rows
    ]
    torch.testing.assert_close(found[0], found[1])


def test_a_frozen_table_gets_no_gradient() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8)
    total, _ = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 3]), torch.ones(4))
    total.backward()
    assert weight.grad is None
    again = hidden.detach().requires_grad_()
    F.cross_entropy(F.linear(again, weight), torch.tensor([0, 1, 2, 3]), reduction="sum").backward()
    torch.testing.assert_close(hidden.grad, again.grad)


def test_weights_act_per_row() -> None:
    """A weight on one row scales that row's loss alone: the released code's [B] * [B, 1] product would fail
    here."""
    hidden, weight, targets = torch.randn(4, 8), torch.randn(5, 8), torch.tensor([0, 1, 2, 3])
    plain, losses = linear_cross_entropy(hidden, weight, targets, torch.ones(4))
    total, _ = linear_cross_entropy(hidden, weight, targets, torch.tensor([1.0, 1.0, 10.0, 1.0]))
    torch.testing.assert_close(total - plain, 9 * losses[2])
