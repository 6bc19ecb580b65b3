"""The dials: schedules that are pure functions, where gradient flows, what is noised, and that training
works."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rdlm.config.base import parse
from rdlm.config.objective import DepthConfig, ObjectiveConfig
from rdlm.data.batch import Batch
from rdlm.diffusion.samplers import run
from rdlm.diffusion.schedules import noise_schedule, schedule_of
from rdlm.errors import UserError
from rdlm.objectives.base import Draws, Keys
from rdlm.objectives.depth import num_recurrences
from rdlm.random_streams import generator

V, B, T = 64, 4, 16


def batch_of(ids: torch.Tensor) -> Batch:
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool))


def test_recurrence_schedule_is_huginns() -> None:
    """Mean 33 and the heavy tail of 1 + Poisson(LogNormal): variance = E[rate] + Var[rate] (Geiping et al.
    2025, Sec. 3.3)."""
    depth = DepthConfig(distribution="lognormal_poisson", mean=32, max_steps=1024, grad_steps=8)
    drawn = np.array([num_recurrences(depth, step, seed=0) for step in range(20_000)])
    rate_variance = 32**2 * (math.exp(0.25) - 1)
    assert drawn.mean() == pytest.approx(33, rel=0.01) and drawn.min() >= 1
    assert drawn.var() == pytest.approx(32 + rate_variance, rel=0.05)


@pytest.mark.parametrize("distribution", ["uniform", "lognormal_poisson", "fixed"])
def test_schedule_is_a_pure_function_of_step_and_seed(distribution: str) -> None:
    depth = DepthConfig(distribution=distribution, mean=6, max_steps=9)
    first = [num_recurrences(depth, step, 7) for step in range(200)]
    torch.manual_seed(123), np.random.seed(5)
    assert [num_recurrences(depth, step, 7) for step in range(200)] == first
    assert max(first) <= 9
    assert distribution == "fixed" or [num_recurrences(depth, step, 8) for step in range(200)] != first


def test_uniform_covers_one_to_twice_the_mean() -> None:
    depth = DepthConfig(distribution="uniform", mean=4)
    assert {num_recurrences(depth, step, 0) for step in range(500)} == set(range(1, 8))


def test_only_the_last_steps_carry_gradient() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    out = run(lambda s, _: s * weight, torch.tensor(1.0), 5, grad_steps=2)
    assert out.item() == 32.0
    assert (
        torch.autograd.grad(out, weight)[0].item() == 2 * 8 * 2.0
    )  # d(8 w^2)/dw at w = 2: three steps are constants


def test_truncation_reaches_the_parameters(tiny) -> None:
    """One-step and eight-step gradients of a deep recurrence differ; where r = 1 they are the same number."""
    ids, grads = torch.randint(0, V, (B, T + 1)), {}
    for name, depth in {
        "one": {"mean": 4, "grad_steps": 1}, "all": {"mean": 4, "grad_steps": 4},
        "r1": {"mean": 1}, "r1_deep": {"mean": 1, "grad_steps": 8},
    }.items():  # fmt: skip
        denoiser = tiny("huginn", {"name": "onestep", "depth": {"distribution": "fixed", **depth}})
        with torch.no_grad():
            denoiser.model.adapter.weight.add_(
                0.1 * torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
            )
        denoiser.loss(batch_of(ids), Keys(seed=0, step=0)).total.backward()
        grads[name] = denoiser.model.core_block[0].mlp.fc.weight.grad
    assert not torch.allclose(grads["one"], grads["all"], rtol=1e-3)
    torch.testing.assert_close(grads["r1"], grads["r1_deep"], atol=0, rtol=0)


def test_corruption_share_levels_and_zero_rows(tiny) -> None:
    denoiser = tiny("huginn", {"name": "single_pass", "corruption": {"share": 0.3, "per": "position"}})
    targets = torch.randint(0, V, (200, 100))
    noised = denoiser.corrupt(targets, generator(0))
    assert noised is not None
    assert noised.is_noised.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert bool((noised.dense[~noised.is_noised] == 0).all()) and bool(
        (noised.sigma[~noised.is_noised] == 80.0).all()
    )
    levels = noised.sigma[noised.is_noised]
    assert levels.min() >= 0.2 and levels.max() <= 80.0
    assert (levels < 2.0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    residual = (noised.dense - denoiser.clean(targets))[noised.is_noised] / levels[:, None]
    assert residual.std().item() == pytest.approx(1.0, abs=0.01) and residual.mean().item() == pytest.approx(
        0.0, abs=0.01
    )


def test_noise_per_sequence_is_one_level_a_row(tiny) -> None:
    denoiser = tiny("huginn", "paper")
    noised = denoiser.corrupt(torch.randint(0, V, (50, 8)), generator(0))
    assert (
        noised is not None
        and bool((noised.sigma == noised.sigma[:, :1]).all())
        and noised.sigma[:, 0].unique().numel() == 50
    )


def test_one_level_a_sequence_is_told_to_every_position(tiny) -> None:
    """The layers are told a sequence's level once; telling it at each position gives the same hidden states."""
    once, each = (
        tiny("huginn", {"name": "single_pass", "corruption": {"share": 0.5, "per": per}})
        for per in ("sequence", "position")
    )
    with torch.no_grad():
        once.model.core_block[0].modulation.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    each.load_state_dict(once.state_dict())
    ids = torch.randint(0, V, (8, T))
    noised = once.corrupt(ids, generator(0))
    assert noised is not None and 0 < int(noised.is_noised[:, 0].sum()) < 8
    hidden = [denoiser.hidden(ids, noised, [2] * len(ids), generator(1)) for denoiser in (once, each)]
    torch.testing.assert_close(hidden[0], hidden[1])
    told_nothing = each.hidden(
        ids, replace(noised, sigma=torch.full_like(noised.sigma, 80.0)), [2] * len(ids), generator(1)
    )
    assert not torch.allclose(told_nothing, hidden[1], atol=1e-3)


def test_noise_depends_on_rank_and_micro_batch_and_nothing_else(tiny) -> None:
    denoiser, batch = tiny("huginn", "single_pass"), batch_of(torch.randint(0, V, (B, T + 1)))

    def total(**key: int) -> float:
        return denoiser.loss(batch, Keys(**{"step": 3, "seed": 0, "rank": 0, "micro": 0, **key})).total.item()

    base = total()
    torch.manual_seed(99)
    assert total() == base
    assert all(total(**{key: 1}) != base for key in ("seed", "rank", "micro"))


def test_edm_weighting_scales_each_position_by_its_own_level(tiny) -> None:
    plain, weighted = (tiny("huginn", {"name": "paper", "loss_weighting": w}) for w in ("none", "edm"))
    batch = batch_of(torch.randint(0, V, (B, T + 1)))
    noised = plain.corrupt(batch.targets, generator(0, 2, 0, 0, 0))  # the noise key of step 0
    assert noised is not None
    w = (noised.sigma.square() + 0.25) / (noised.sigma * 0.5).square()
    ratio = weighted.loss(batch, Keys(seed=0, step=0)).total / plain.loss(batch, Keys(seed=0, step=0)).total
    assert w.min() <= ratio <= w.max() and ratio > 1.5


@pytest.mark.parametrize("name", ["next_token", "single_pass", "per_step", "evidence", "paper"])
def test_z_loss_is_added_to_the_loss_and_to_no_reported_cross_entropy(tiny, name: str) -> None:
    plain, added = (tiny("huginn", {"name": name, "z_loss": z}) for z in (0.0, 0.1))
    batch = batch_of(torch.randint(0, V, (B, T + 1)))
    without, with_it = (each.loss(batch, Keys(seed=0, step=0)) for each in (plain, added))
    assert with_it.total > without.total and torch.equal(with_it.metrics["ce"], without.metrics["ce"])


def test_mask_removes_positions(tiny) -> None:
    denoiser, ids = tiny("huginn", "next_token"), torch.randint(0, V, (B, T + 1))
    batch = batch_of(ids)
    half = Batch(batch.inputs, batch.targets, torch.arange(T).expand(B, T) < T // 2)
    other = batch.targets.clone()
    other[:, T // 2 :] = 0
    terms = denoiser.loss(half, Keys(seed=0, step=0))
    assert terms.count.item() == B * T // 2
    assert (
        terms.total.item()
        == denoiser.loss(Batch(batch.inputs, other, half.mask), Keys(seed=0, step=0)).total.item()
    )


@pytest.mark.parametrize("family", ["huginn", "llama"])
@pytest.mark.parametrize("name", ["next_token", "bptt", "onestep", "single_pass", "evidence", "paper"])
def test_every_objective_learns(tiny, family: str, name: str) -> None:
    """A fixed batch is memorised: the prior loss falls below half of ln V, from about ln V."""
    settings: dict = {"name": name}
    if family == "llama":
        if name in ("bptt", "onestep"):
            pytest.skip("llama runs its layers once")
        settings["depth"] = {"distribution": "fixed", "mean": 1}
    elif name == "bptt":
        settings["depth"] = {"mean": 4, "grad_steps": 2}
    denoiser = tiny(family, settings)
    batch = batch_of(torch.randint(0, V, (B, T + 1)))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    first = last = 0.0
    for step in range(60):
        terms = denoiser.loss(batch, Keys(seed=0, step=step))
        last = (terms.total / terms.count).item()
        first = first or last
        (terms.total / terms.count).backward()
        optimizer.step(), optimizer.zero_grad()
    assert last < 0.5 * first


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"name": "single_pass", "readout": "plain"}, "readout"),
        ({"name": "paper", "depth": {"mean": 3}}, "depth"),
        ({"name": "bptt", "depth": {"means": 3}}, "depth.means"),
        ({"name": "nonsense"}, "name"),
        ({"name": "gate_only", "z_loss": 0.1}, "z_loss"),
        ({"name": "masked", "z_loss": 0.1}, "z_loss"),
    ],
)
def test_contradictions_are_refused(settings: dict, field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}="):
        parse(ObjectiveConfig, settings, "objective")


def test_presets_keep_overrides() -> None:
    objective = parse(ObjectiveConfig, {"name": "bptt", "depth": {"mean": 8}}, "x")
    assert objective.depth == DepthConfig(distribution="lognormal_poisson", mean=8, grad_steps=8)
    assert not objective.noise_conditioned and objective.k_meaning == "thinking"


def test_a_sampling_model_is_read_at_a_level_that_its_training_covers(tiny, tiny_config) -> None:
    """``paper`` trains on no z = 0 at sigma_max: it is read at a quantile of its levels; a quantile of 1 is
    sigma_max."""
    config = tiny_config("huginn", "paper")
    level = tiny("huginn", "paper").readout_level
    drawn = noise_schedule(config.noise, config.objective.corruption).sample(
        (20_000,), torch.Generator().manual_seed(0)
    )
    assert 0.985 < float((drawn <= level).float().mean()) < 0.995
    at_top = tiny("huginn", {"name": "paper", "readout_quantile": 1.0})
    assert at_top.readout_level is None and at_top.sampling_levels(3)[0] is None
    assert "0.99 quantile" in config.objective.estimator_at(1)
    assert "sigma_max" in at_top.config.objective.estimator_at(1)


@torch.no_grad()
def test_the_readout_level_moves_the_scores_and_nothing_else(tiny, awake) -> None:
    data = batch_of(torch.randint(0, V, (B, T + 1)))
    low, top = (
        awake(tiny("huginn", "paper")),
        awake(tiny("huginn", {"name": "paper", "readout_quantile": 1.0})),
    )
    assert torch.equal(low.loss(data, Keys(0, 3)).total, top.loss(data, Keys(0, 3)).total)
    scores = [each.score(data.inputs, data.targets, (1,))[1].logprobs for each in (low, top)]
    assert not torch.allclose(*scores)


@pytest.mark.parametrize("num_steps", [1, 4])
@torch.no_grad()
def test_the_published_sampler_is_euler_from_noise_that_the_network_sees(tiny, awake, num_steps: int) -> None:
    """Start z = sigma_max eps, levels of equal mass, x0 = softmax(logits) E, arg max (DiffusionBlocks App. E.4)."""
    paper, ids = awake(tiny("huginn", "paper")), torch.randint(0, V, (2, 6))
    levels = [80.0, *schedule_of(paper.config).grid(num_steps)[1:]]
    z = torch.stack([torch.randn(6, 32, generator=generator(0, 0, row, 0)) for row in range(2)]) * levels[0]
    for level, below in zip(levels, [*levels[1:], None], strict=True):
        sigma = torch.full((2, 6), level)
        logits = paper.predict(paper.two_stream_hidden(ids, z, sigma), z, sigma).logits()
        if below is not None:
            x0 = logits.softmax(-1) @ paper.unit_table()
            z = z + (below - level) * (z - x0) / level
    found = paper.answer(ids, [num_steps], Draws(sampler="published"))[num_steps]
    assert torch.equal(found, logits.argmax(-1))
