"""Masked diffusion: what a hidden token may know, what is learned, blocks, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdlm.checkpoints.folder import load, save
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.objective import MaskingConfig, objective_config
from rdlm.data.batch import Batch
from rdlm.diffusion.corruption import mask_tokens
from rdlm.diffusion.masked_likelihood import bound
from rdlm.diffusion.partition import partition_of
from rdlm.diffusion.schedules import LinearMasking, low_discrepancy
from rdlm.errors import UserError
from rdlm.objectives.base import Keys
from rdlm.objectives.blockwise import Blockwise
from rdlm.objectives.masked import MaskedDiffusion
from rdlm.registry import build

V, T = 64, 12


def batch(rows: int = 4, mask: Tensor | None = None) -> Batch:
    ids = torch.randint(0, V, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(rows, T, dtype=torch.bool) if mask is None else mask)


# What is learned --------------------------------------------------------------------------------------------


def test_a_hidden_token_never_reaches_a_prediction_and_one_in_sight_reaches_all(masked_config, awake) -> None:
    denoiser = awake(build(masked_config(), seed=0))
    assert isinstance(denoiser, MaskedDiffusion)
    hidden_ones = torch.arange(T)[None].expand(2, T) % 3 == 0
    level, targets = torch.tensor([0.4, 0.4]), batch(2).targets

    def logits(ids: Tensor) -> Tensor:
        return denoiser.predict(denoiser.hidden(ids.masked_fill(hidden_ones, V), level)).logits()

    before = logits(targets)
    assert before.shape == (2, T, V), "the mask is no answer"
    for position in range(T):
        changed = targets.clone()
        changed[:, position] = (changed[:, position] + 7) % V
        moved = (logits(changed) - before).abs().amax(-1) > 1e-6
        assert not moved.any() if hidden_ones[0, position] else moved[hidden_ones].all(), position


def test_the_loss_hides_what_it_asks_and_touches_nothing_else(
    masked_config, awake, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.ones(4, T, dtype=torch.bool)
    mask[:, 7:] = False
    data, denoiser = batch(mask=mask), awake(build(masked_config(), seed=0))
    seen: list[tuple[Tensor, Tensor]] = []
    real = MaskedDiffusion.hidden
    monkeypatch.setattr(
        MaskedDiffusion,
        "hidden",
        lambda self, ids, level, lengths=None: seen.append((ids, level)) or real(self, ids, level, lengths),
    )
    terms = denoiser.loss(data, Keys(seed=9, step=2))
    ids, level = seen[0]
    hidden = ids == V
    assert not hidden[:, 7:].any() and torch.equal(ids[~hidden], data.targets[~hidden])
    logits = denoiser.predict(real(denoiser, ids, level)).logits()
    ce = -logits.log_softmax(-1).gather(2, data.targets.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(terms.total, (ce * hidden / level[:, None]).sum())
    assert terms.count == mask.sum()
    assert torch.equal(terms.total, denoiser.loss(data, Keys(seed=9, step=2)).total)
    for other in ({"step": 3}, {"seed": 8}, {"rank": 1}, {"micro": 1}):
        assert not torch.equal(
            terms.total, denoiser.loss(data, Keys(**{"step": 2, "seed": 9, **other})).total
        )
    unseen = Batch((data.inputs + 1) % V, data.targets, mask)
    assert torch.equal(terms.total, denoiser.loss(unseen, Keys(seed=9, step=2)).total), (
        "it models the targets themselves"
    )


def test_every_parameter_learns(masked_config, awake) -> None:
    denoiser = awake(build(masked_config(model={"tie_embeddings": False}), seed=0))
    denoiser.loss(batch(8), Keys(seed=0, step=0)).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in denoiser.parameters())


def test_it_learns_what_one_token_says_of_another() -> None:
    """Arithmetic sequences modulo 12: tokens alone are uniform, so only context can lower the bound, and only
    beyond K = 1."""
    rng = torch.Generator().manual_seed(0)

    def rows(count: int) -> Batch:
        start, stride = (
            torch.randint(12, (count, 1), generator=rng),
            torch.randint(1, 4, (count, 1), generator=rng),
        )
        ids = (start + stride * torch.arange(16)) % 12
        return Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool))

    shape = {
        "family": "masked",
        "vocab_size": 12,
        "d_model": 64,
        "num_heads": 2,
        "mlp_width": 128,
        "num_layers": 3,
        "max_seq_len": 16,
    }
    document = {
        "name": "toy",
        "model": {**shape, "noise_conditioning": True},
        "objective": {"name": "masked"},
    }
    denoiser = build(CheckpointConfig.model_validate(document), seed=0)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, step / 50)
        terms = denoiser.loss(rows(16), Keys(seed=0, step=step))
        (terms.total / terms.count).backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    held_out = rows(64).targets
    alone, four, many = (float(bound(denoiser, held_out, k).sum(1).mean()) for k in (1, 4, 64))
    assert alone > 0.98 * 16 * math.log(12) and many < four < 0.75 * alone and many < 0.6 * alone, (
        alone,
        four,
        many,
    )


def test_a_batch_in_which_nothing_is_hidden_costs_nothing(masked_config) -> None:
    denoiser = build(masked_config(), seed=0)
    terms = denoiser.loss(batch(mask=torch.zeros(4, T, dtype=torch.bool)), Keys(seed=0, step=0))
    terms.total.backward()
    assert (
        terms.total == 0
        and terms.metrics["ce"] == 0
        and all(p.grad.abs().sum() == 0 for p in denoiser.parameters())
    )


def test_levels_cover_the_interval_and_tokens_are_hidden_at_their_rate() -> None:
    rng = torch.Generator().manual_seed(0)
    levels = low_discrepancy(50, rng).sort().values
    torch.testing.assert_close(levels.diff(), torch.full((49,), 0.02, dtype=torch.float64))
    rate = (
        mask_tokens(torch.tensor([0.1, 0.5, 1.0]), torch.ones(3, 20_000, dtype=torch.bool), rng)
        .float()
        .mean(1)
    )
    torch.testing.assert_close(rate, torch.tensor([0.1, 0.5, 1.0]), atol=0.02, rtol=0)
    schedule, q = LinearMasking(MaskingConfig(t_min=0.01)), torch.rand(9, dtype=torch.float64)
    torch.testing.assert_close(schedule.cdf(schedule.icdf(q)), q)
    assert schedule.widen(0.4, 0.6, 0.5) == pytest.approx((0.3, 0.7)) and schedule.widen(0.01, 1.0, 0.5) == (
        0.01,
        1.0,
    )


# Blocks, checkpoints, refusals ------------------------------------------------------------------------------


def test_blocks_cut_alpha_evenly_and_train_on_their_own_levels(
    masked_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = partition_of(masked_config(num_blocks=4, overlap=0.1))
    low = MaskingConfig().t_min
    assert cut.edges == pytest.approx([1 - b / 4 * (1 - low) for b in range(5)])
    assert [cut.block_of(t) for t in (None, 1.0, 0.76, 0.5, 0.3, 0.01, 1e-6)] == [0, 0, 0, 2, 2, 3, 3]
    seen: list[Tensor] = []
    real = MaskedDiffusion.hidden
    monkeypatch.setattr(
        MaskedDiffusion,
        "hidden",
        lambda self, ids, level, lengths=None: seen.append(level) or real(self, ids, level, lengths),
    )
    for b in range(4):
        alone = build(masked_config(num_blocks=4, overlap=0.1, block=b), seed=0)
        alone.loss(batch(64), Keys(seed=0, step=0))
        lowest, highest = cut.training_range(b)
        assert lowest <= seen[-1].min() and seen[-1].max() <= highest + 1e-6
        assert seen[-1].max() - seen[-1].min() > 0.9 * (highest - lowest)


def test_a_block_built_alone_is_the_block_of_the_whole_and_learns_alone(masked_config, tmp_path) -> None:
    whole = build(masked_config(num_blocks=2), seed=5)
    assert isinstance(whole, Blockwise)
    for b, part in enumerate(whole.parts):
        alone = build(masked_config(num_blocks=2, block=b), seed=5)
        totals = [d.loss(batch(), Keys(seed=7, step=3)).total for d in (alone, part)]
        assert torch.equal(totals[0], totals[1])
        totals[1].backward()
        assert all(p.grad is None for other in whole.parts[b + 1 :] for p in other.parameters())
    save(tmp_path / "m", whole, masked_config(num_blocks=2), None)
    again = load(tmp_path / "m")
    assert torch.equal(bound(again.denoiser, batch().targets, 8), bound(whole, batch().targets, 8))
    lazily = load(tmp_path / "m", resident_blocks=1).denoiser
    assert torch.equal(bound(lazily, batch().targets, 8), bound(whole, batch().targets, 8))
    card = (tmp_path / "m" / "README.md").read_text()
    assert "tokens are masked" in card and "rdlm serve" in card and "a setting of the sampler" in card


@pytest.mark.parametrize(
    ("objective", "problem"),
    [
        ({"name": "masked", "corruption": {"share": 0.5}}, "not permitted"),
        ({"name": "masked", "loss_weighting": "edm"}, "not permitted"),
        ({"name": "masked", "readout": "evidence"}, "not permitted"),
        ({"name": "evidence", "masking": {}}, "not permitted"),
        ({"name": "masked", "masking": {"t_min": 0}}, "greater than 0"),
    ],
)
def test_dials_that_would_be_ignored_are_errors(objective: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        objective_config.validate_python(objective)


@pytest.mark.parametrize(
    ("family", "objective"),
    [("llama", "masked"), ("huginn", "masked"), ("masked", "evidence"), ("masked", "next_token")],
)
def test_family_and_objective_need_each_other(tiny_config, family: str, objective: str) -> None:
    with pytest.raises(UserError, match="cannot be trained with it"):
        build(tiny_config(family, objective), device="meta")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"blocks": {"num_blocks": 2, "partition": "equal_information", "prior_nats": 4.0}},
            "curve is one over sigma",
        ),
    ],
)
def test_what_masked_models_cannot_be(masked_config, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        build(CheckpointConfig.model_validate({**masked_config().model_dump(), **changes}), device="meta")


def test_sequences_are_seen_from_both_sides(masked_config, awake) -> None:
    """The first position hears of the last one, and the other way round."""
    denoiser: Any = awake(build(masked_config(), seed=0))

    def first_and_last(ids: Sequence[int]) -> Tensor:
        return denoiser.hidden(torch.tensor([ids]), torch.tensor([0.5]))[0, [0, -1]]

    base = first_and_last([V, 3, 4, V])
    assert not torch.allclose(base[0], first_and_last([V, 3, 5, V])[0]) and not torch.allclose(
        base[1], first_and_last([V, 2, 4, V])[1]
    )
