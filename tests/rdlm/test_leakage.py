"""Perturbation tests: what a row may see. A leak makes every likelihood a lie, so each objective is probed
end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rdlm.config.objective import VARIANTS
from rdlm.data.batch import Batch
from rdlm.nn.attention import CausalContext, TwoStreamContext
from rdlm.objectives import Objective
from rdlm.random_streams import generator

B, T, V = 2, 10, 64


def trained_a_little(denoiser: Objective) -> Objective:
    """AdaLN, adapter and biases start at zero or identity, which would hide paths: move every weight."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng) * (0.1 + parameter.abs().mean()))
    return denoiser


def row_losses(denoiser: Objective, batch: Batch) -> torch.Tensor:
    """Logits of each row under the objective's own training forward, noise fixed by the seed. [B, T, V]"""
    noised = denoiser.corrupt(batch.targets, generator(0, 1))
    z, sigma = (None, None) if noised is None else (noised.dense, noised.sigma)
    if denoiser.settings.name == "paper":
        hidden = denoiser.two_stream_hidden(batch.inputs, z, sigma)
    else:
        hidden = denoiser.hidden(batch.inputs, noised, [3] * len(batch.inputs), generator(0, 2))
    return denoiser.predict(hidden, z, sigma).logits()


def shifted(ids: torch.Tensor) -> Batch:
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool))


CAUSAL = [
    str(v.model_fields["name"].default) for v in VARIANTS if "causal" in v.tasks
]  # the leakage of masked models is tests/rdlm/test_masked.py's business
ALL_NOISED = {"name": "single_pass", "corruption": {"share": 1.0}}


@pytest.mark.parametrize("name", [*CAUSAL, pytest.param(ALL_NOISED, id="single_pass, all noised")])
@torch.no_grad()
def test_no_row_sees_a_later_token(tiny, name: str | dict[str, Any]) -> None:
    """Change token j (a target of row j - 1 and an input of row j): rows before j - 1 must not move at all,
    and row j - 1 may move only through its own noised target."""
    denoiser = trained_a_little(tiny("huginn", name))
    ids = torch.randint(0, V, (B, T + 1))
    before = row_losses(denoiser, shifted(ids))
    for j in range(2, T + 1):
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 17) % V
        after = row_losses(denoiser, shifted(changed))
        torch.testing.assert_close(after[:, : j - 1], before[:, : j - 1], atol=0, rtol=0)
        if j < T:
            assert not torch.equal(
                after[:, j], before[:, j]
            )  # the test can fail: later rows do read the token


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_prior_logits_do_not_depend_on_the_target(tiny, tiny_config, name: str) -> None:
    """Scores of the prior are likelihoods: the target must enter only as the index that is looked up."""
    denoiser = trained_a_little(tiny("huginn", name))
    ids = torch.randint(0, V, (1, T))
    every = torch.stack([denoiser.token_logprobs(ids, torch.full_like(ids, v), [1])[1] for v in range(V)])
    torch.testing.assert_close(
        every.logsumexp(0), torch.zeros(1, T), atol=1e-4, rtol=0
    )  # normalised over the vocabulary


@torch.no_grad()
def test_thinking_scores_are_normalised_at_every_k(tiny, tiny_config) -> None:
    denoiser = trained_a_little(tiny("huginn", "single_pass"))
    ids = torch.randint(0, V, (1, T))
    for k in (1, 3, 7):
        every = torch.stack([denoiser.token_logprobs(ids, torch.full_like(ids, v), [k])[k] for v in range(V)])
        torch.testing.assert_close(every.logsumexp(0), torch.zeros(1, T), atol=1e-4, rtol=0)


@torch.no_grad()
def test_mixture_is_normalised_too(tiny, tiny_config) -> None:
    denoiser = trained_a_little(tiny("huginn", "evidence"))
    ids = torch.randint(0, V, (1, 4))
    every = torch.stack(
        [denoiser.token_logprobs(ids, torch.full_like(ids, v), [3], num_draws=2)[3] for v in range(V)]
    )
    torch.testing.assert_close(every.logsumexp(0), torch.zeros(1, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sees_own_clean", [True, False])
def test_two_stream_mask(sees_own_clean: bool) -> None:
    mask = TwoStreamContext(4, sees_own_clean).mask
    for i in range(4):
        assert (
            mask[i].tolist() == [j <= i for j in range(4)] + [False] * 4
        )  # the clean stream is causal and sees no noise
        context = [j <= i if sees_own_clean else j < i for j in range(4)]
        assert mask[4 + i].tolist() == context + [j == i for j in range(4)]


@torch.no_grad()
def test_clean_stream_is_the_plain_causal_model(tiny) -> None:
    """The clean half of the two streams must equal the model without them, whatever the noise: its cache
    serves every K."""
    denoiser = trained_a_little(tiny("huginn", "paper"))
    model, ids = denoiser.model, torch.randint(0, V, (B, T))
    z, sigma = torch.randn(B, T, 32), torch.full((B, T), 0.4)
    e = model.encode(ids, CausalContext(T))
    ctx = TwoStreamContext(T, True)
    cond = denoiser.condition(torch.cat([torch.full((B, T), 80.0), sigma], 1), e)
    both = torch.cat([torch.zeros_like(e), denoiser.inject(z, sigma)], 1)
    streams = model.decode(denoiser.model.core(both, torch.cat([e, e], 1), cond, ctx), ctx)
    alone_ctx = CausalContext(T)
    alone = model.decode(
        denoiser.model.core(torch.zeros_like(e), e, denoiser.condition(None, e), alone_ctx), alone_ctx
    )
    torch.testing.assert_close(streams[:, :T], alone, atol=2e-6, rtol=1e-5)
