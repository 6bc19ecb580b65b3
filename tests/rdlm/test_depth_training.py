"""Training that keeps depth: windows of gradient, rows of different depth in one pass, curricula, read-outs after
every run, and the exit gate. The oracles are written out here, run by run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdlm.config.base import parse
from rdlm.config.objective import DepthConfig, ObjectiveConfig
from rdlm.data.batch import Batch
from rdlm.diffusion.corruption import Noised
from rdlm.errors import UserError
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from rdlm.objectives.depth import CURRICULA, drawn_depths, mean_at, num_recurrences, rows_at_work
from rdlm.random_streams import generator
from rdlm.registry import build
from train.optim import parameter_groups
from train.settings import OptimizerConfig

V, B, T = 64, 5, 12
KEYS = Keys(seed=3, step=1)
SPREAD = {"distribution": "uniform", "mean": 3, "per": "sequence"}


@pytest.fixture
def batch() -> Batch:
    ids = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.8
    return Batch(ids[:, :-1], ids[:, 1:], mask)


@pytest.fixture
def network(tiny: Callable[..., Objective]) -> Callable[[Any], Objective]:
    """``network(objective)``: in fp64 outside of its fp32 islands, and with an injection and a gate that look at
    the state."""

    def make(objective: Any) -> Objective:
        made = tiny("huginn", objective).double()
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if "adapter" in name or "exit_gate" in name or "modulation" in name:
                    weight.add_(0.2 * torch.randn(weight.shape, generator=rng, dtype=torch.float64))
        return made

    return make


def row(batch: Batch, i: int) -> Batch:
    return Batch(batch.inputs[i : i + 1], batch.targets[i : i + 1], batch.mask[i : i + 1])


def gradients(objective: Objective, total: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    total.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in objective.named_parameters()}


def every_loss(objective: Objective, batch: Batch, num_steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Cross-entropies [B, T] after each of ``num_steps`` runs, and the states, all of it in autograd's graph."""
    model, ctx = objective.model, objective.model.context(batch.inputs)
    e = model.encode(batch.inputs, ctx)
    state, losses, states = model.initial_state(e), [], []
    for _ in range(num_steps):
        state = model.core(state, e, None, ctx)
        logits = F.linear(model.decode(state, ctx), model.wte.weight)
        losses.append(F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none"))
        states.append(state)
    return losses, states


def test_a_window_of_one_run_is_onestep_and_of_all_runs_is_full_backpropagation(network, batch) -> None:
    def bptt(name: str, grad_steps: Any) -> tuple[Tensor, dict[str, Tensor]]:
        depth = {"distribution": "fixed", "mean": 4, "grad_steps": grad_steps}
        objective = network({"name": name, "depth": depth})
        total = objective.loss(batch, KEYS).total
        return total.detach(), gradients(objective, total)

    one, all_of_them = bptt("bptt", 1), bptt("bptt", "all")
    torch.testing.assert_close(one, bptt("onestep", 1), atol=0, rtol=0)
    torch.testing.assert_close(all_of_them, bptt("bptt", 4), atol=0, rtol=0)
    reference = network({"name": "next_token"})
    total = (every_loss(reference, batch, 4)[0][-1] * batch.mask).sum()
    full = gradients(reference, total)
    for name, expected in full.items():
        torch.testing.assert_close(all_of_them[1][name], expected, rtol=1e-4, atol=1e-5)
    windows = [bptt("bptt", b)[1]["model.core_block.0.mlp.fc.weight"] for b in (1, 2, 3, 4)]
    apart = [(g - full["model.core_block.0.mlp.fc.weight"]).norm().item() for g in windows]
    assert apart[0] > apart[1] > apart[2] > apart[3]


@pytest.mark.parametrize("grad_steps", [1, 2, "all"])
@pytest.mark.parametrize("name", ["bptt", "per_step", "exit_gate", "gate_only"])
def test_rows_of_different_depth_share_a_pass_and_each_counts_as_if_alone(
    network, batch, name, grad_steps
) -> None:
    shared = network({"name": name, "depth": {**SPREAD, "grad_steps": grad_steps}})
    depths = drawn_depths(shared.settings.depth, KEYS, B)
    assert len(set(depths)) > 2
    total = shared.loss(batch, KEYS).total
    together, expected, sums = gradients(shared, total), 0.0, {}
    for i, r in enumerate(depths):
        alone = network(
            {"name": name, "depth": {"distribution": "fixed", "mean": r, "grad_steps": grad_steps}}
        )
        part = alone.loss(row(batch, i), KEYS).total
        expected += part.item()
        for key, gradient in gradients(alone, part).items():
            sums[key] = sums.get(key, 0) + gradient
    assert total.item() == pytest.approx(expected, rel=1e-6)
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, sums[key], rtol=1e-4, atol=1e-5)


def test_noised_rows_of_different_depth_count_as_if_alone(network, batch) -> None:
    shared = network({"name": "single_pass", "depth": SPREAD, "corruption": {"share": 0.5}})
    depths = drawn_depths(shared.settings.depth, KEYS, B)
    noised = shared.corrupt(batch.targets, generator(0, 1))
    together = shared.hidden(batch.inputs, noised, depths, generator(0))
    for i, r in enumerate(depths):
        flags = noised.is_noised[i]
        rows, others = flags.nonzero()[:, 0], (~flags).nonzero()[:, 0]
        mine = Noised(noised.dense[i, rows], noised.sigma[i : i + 1], flags[None], rows, others)
        alone = shared.hidden(batch.inputs[i : i + 1], mine, [r], generator(0))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_no_row_takes_a_step_more_than_its_own(network, batch, monkeypatch) -> None:
    objective = network({"name": "bptt", "depth": SPREAD})
    depths, rows, plain = drawn_depths(objective.settings.depth, KEYS, B), [], objective.model.core
    monkeypatch.setattr(objective.model, "core", lambda s, *rest: (rows.append(len(s)), plain(s, *rest))[1])
    objective.loss(batch, KEYS)
    assert sum(rows) == sum(depths) and rows == rows_at_work(depths) == sorted(rows)


def test_sequences_draw_their_own_depth_from_the_same_distribution() -> None:
    depth = DepthConfig(distribution="poisson", mean=6, per="sequence", max_steps=256)
    drawn = np.array([drawn_depths(depth, Keys(0, step), 8) for step in range(4000)])
    assert drawn.mean() == pytest.approx(6, rel=0.01) and drawn.var() == pytest.approx(5, rel=0.05)
    assert (np.diff(drawn) <= 0).all() and drawn.min() >= 1
    assert drawn_depths(depth, Keys(0, 5), 8) == drawn_depths(depth, Keys(0, 5), 8)
    others = (Keys(1, 5), Keys(0, 6), Keys(0, 5, rank=1), Keys(0, 5, micro=1))
    assert all(drawn_depths(depth, keys, 64) != drawn_depths(depth, Keys(0, 5), 64) for keys in others)


@pytest.mark.parametrize(
    ("kind", "half"),
    [("linear", 9.0), ("one_minus_sqrt", 1 + 16 * (1 - math.sqrt(0.5))), ("geometric", math.sqrt(17))],
)
def test_a_curriculum_leads_from_its_start_to_the_mean(kind: str, half: float) -> None:
    ramp = {"kind": kind, "start": 1, "updates": 100}
    depth = parse(DepthConfig, {"mean": 17, "curriculum": ramp}, "test")
    means = [mean_at(depth, step) for step in range(150)]
    assert means[0] == 1 and means[50] == pytest.approx(half) and means[100:] == [17.0] * 50
    assert means == sorted(means)
    assert [num_recurrences(depth, step, 0) for step in (0, 50, 149)] == [1, round(half), 17]
    assert kind in CURRICULA


def test_a_curriculum_must_rise() -> None:
    ramp = {"start": 9, "updates": 10}
    with pytest.raises(UserError, match="must not exceed mean"):
        parse(DepthConfig, {"mean": 8, "curriculum": ramp}, "test")


def test_the_last_of_the_step_losses_alone_is_bptt(network, batch) -> None:
    depth = {**SPREAD, "grad_steps": 2}
    last, bptt = (
        network({"name": n, "depth": depth, **w})
        for n, w in (("per_step", {"weights": "last"}), ("bptt", {}))
    )
    totals = [objective.loss(batch, KEYS).total for objective in (last, bptt)]
    torch.testing.assert_close(totals[0], totals[1], atol=0, rtol=0)
    torch.testing.assert_close(gradients(last, totals[0]), gradients(bptt, totals[1]), atol=0, rtol=0)


@pytest.mark.parametrize(("weights", "shares"), [("uniform", [1 / 3] * 3), ("linear", [1 / 6, 2 / 6, 3 / 6])])
def test_step_losses_are_a_weighted_sum_of_the_losses_at_every_k(network, batch, weights, shares) -> None:
    objective = network({"name": "per_step", "weights": weights, "depth": {"mean": 3, "grad_steps": "all"}})
    terms = objective.loss(batch, KEYS)
    scores = objective.score(batch.inputs, batch.targets, (1, 2, 3))
    expected = sum(-w * scores[k].logprobs[batch.mask].sum() for k, w in enumerate(shares, 1))
    torch.testing.assert_close(terms.total.double(), expected.double(), rtol=1e-5, atol=0)
    losses, _ = every_loss(objective, batch, 3)
    total = sum(w * (loss * batch.mask).sum() for loss, w in zip(losses, shares, strict=True))
    expected_gradients = gradients(objective, total)
    for name, gradient in gradients(objective, objective.loss(batch, KEYS).total).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5)


def test_the_exit_gate_minimises_the_expected_loss_less_the_entropy(network, batch) -> None:
    """Ouro, stage 1: sum_t p_t CE_t - beta H(p), by autograd through all of it."""
    objective = network({"name": "exit_gate", "beta": 0.3, "depth": {"mean": 4, "grad_steps": "all"}})
    losses, states = every_loss(objective, batch, 4)
    left, total = torch.ones(B, T, dtype=torch.float64), 0
    probabilities = []
    for t, state in enumerate(states):
        gate = torch.sigmoid(objective.model.exit_gate(state)).squeeze(-1)
        probabilities.append(left * (gate if t < 3 else 1))
        left = left * (1 - gate)
    torch.testing.assert_close(sum(probabilities), torch.ones(B, T, dtype=torch.float64))
    for p, loss in zip(probabilities, losses, strict=True):
        total = total + ((p * loss + 0.3 * p * p.log()) * batch.mask).sum()
    terms = objective.loss(batch, KEYS)
    assert terms.total.item() == pytest.approx(total.item(), rel=1e-5)
    mine = gradients(objective, terms.total)
    for name, expected in gradients(objective, total).items():
        torch.testing.assert_close(mine[name], expected, rtol=1e-4, atol=1e-5)
    assert mine["model.exit_gate.linear.weight"].norm() > 0
    steps = sum(t * p for t, p in enumerate(probabilities, 1))[batch.mask].mean()
    assert terms.metrics["exit_step"].item() == pytest.approx(steps.item(), rel=1e-5)


def test_the_gate_alone_learns_to_go_on_as_long_as_the_loss_falls(network, batch) -> None:
    """Ouro, stage 2."""
    objective = network({"name": "gate_only", "slope": 3.0, "margin": 0.01, "depth": {"mean": 4}})
    with torch.no_grad():
        losses, states = every_loss(objective, batch, 4)
    expected: Any = 0
    for t in (1, 2, 3):
        wanted = torch.sigmoid(3.0 * ((losses[t - 1] - losses[t]).clamp_min(0) - 0.01))
        gate = torch.sigmoid(objective.model.exit_gate(states[t])).squeeze(-1)
        both = wanted * (1 - gate).log() + (1 - wanted) * gate.log()
        expected = expected - (both * batch.mask).sum() / 3
    mine = objective.loss(batch, KEYS).total
    assert mine.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = gradients(objective, mine), gradients(objective, expected)
    for name, gradient in found.items():
        assert ("exit_gate" in name) == bool(gradient.norm() > 0)
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


def test_gate_only_freezes_the_network(network) -> None:
    objective = network("gate_only")
    groups = parameter_groups(objective, OptimizerConfig(lr=0.1))
    names = {id(p): n for n, p in objective.named_parameters()}
    moving = {names[id(p)] for group in groups if group["lr_factor"] > 0 for p in group["params"]}
    assert moving == {"model.exit_gate.linear.weight", "model.exit_gate.linear.bias"}


@pytest.mark.parametrize("name", ["exit_gate", "gate_only"])
def test_a_model_without_a_gate_is_refused(tiny_config, name: str) -> None:
    config = tiny_config("huginn", name, exit_gate="none")
    with pytest.raises(UserError, match="exit_gate=linear"):
        build(config, device="meta")


@pytest.mark.parametrize("name", ["per_step", "exit_gate"])
def test_noise_conditioning_is_a_dial_of_every_step_objectives(tiny, batch, name: str) -> None:
    plain, noised = tiny("huginn", name), tiny("huginn", {"name": name, "corruption": {"share": 0.5}})
    assert plain.evidence_scale is None and plain.model.noise_embedding is None
    assert noised.evidence_scale is not None and noised.model.noise_embedding is not None
    total = noised.loss(batch, KEYS).total
    total.backward()
    assert noised.evidence_scale.grad.abs().item() > 0
    assert noised.settings.name == name
    assert parse(ObjectiveConfig, noised.settings.model_dump(), "test") == noised.settings
