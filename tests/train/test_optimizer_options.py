"""Averages of the weights, decays that branch from a long run, learning rates by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rdlm.checkpoints import folder as checkpoint
from rdlm.config.base import parse
from rdlm.errors import UserError
from rdlm.registry import build
from train.export import export
from train.optim import Cut, build_optimizer, parameter_groups
from train.pretrain import check
from train.settings import TrainConfig

PLAIN: dict[str, Any] = {"objective": "onestep", "schedule.kind": "constant", "schedule.warmup_steps": 0}


def exported(run: Any, out: Path, averaged: bool) -> dict[str, torch.Tensor]:
    last = run.checkpoints / f"step_{run.step:06d}"
    return dict(checkpoint.load(export(last, out, averaged=averaged)).denoiser.named_parameters())


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_averages_are_those_of_the_weights_after_each_update(
    trainer: Any, tmp_path: Path, stage: int, precision: str
) -> None:
    """The oracle is the definition, from the weights that the trainer reports; stopped and resumed on the way."""
    changes = {**PLAIN, "deepspeed.zero_stage": stage, "precision": precision, "ema": {"decay": 0.4}}
    run = trainer({**changes, "output": str(tmp_path / "whole")})
    expected: dict[str, torch.Tensor] = {}
    whole = run.train_step

    def watched(*arguments: Any) -> Any:
        tally = whole(*arguments)
        n = run.step
        share = min(0.4, (1 + n) / (10 + n))
        for name, weight in run.weights().items():
            expected[name] = weight if n == 0 else torch.lerp(expected[name], weight, 1 - share)
        return tally

    run.train_step = watched
    run.fit()
    found = exported(run, tmp_path / "model", True)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].data, weight, rtol=1e-6, atol=1e-7)
    last = exported(run, tmp_path / "last", False)
    assert all(torch.equal(last[name].data, weight) for name, weight in run.weights().items())
    assert any(not torch.equal(last[name].data, found[name].data) for name in found)
    trainer({**changes, "schedule.steps": 3}).fit()
    again = trainer(changes)
    assert again.step == 3
    again.fit()
    resumed = exported(again, tmp_path / "resumed", True)
    assert all(torch.equal(resumed[name], weight) for name, weight in found.items())


def test_a_run_without_averages_has_none_to_export(trainer: Any, tmp_path: Path) -> None:
    run = trainer({**PLAIN, "schedule.steps": 1})
    run.fit()
    with pytest.raises(UserError, match="--ema=True.*keeps no averages"):
        exported(run, tmp_path / "model", True)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_branched_decay_is_the_run_that_had_it_from_the_start(
    trainer: Any, tmp_path: Path, stage: int
) -> None:
    """Until the decay begins both schedules give the same rates, so every bit must be the same."""
    base = {**PLAIN, "deepspeed.zero_stage": stage, "objective": {"name": "single_pass"}}
    decay = {"schedule.kind": "trapezoid", "schedule.steps": 6, "schedule.cooldown_steps": 2}
    long = trainer({**base, "schedule.steps": 4, "output": str(tmp_path / "long")})
    long.fit()
    direct = trainer({**base, **decay, "output": str(tmp_path / "direct")})
    direct.fit()
    expected = {name: weight.clone() for name, weight in direct.weights().items()}
    branch = {**base, **decay, "branch_from": str(tmp_path / "long" / "checkpoints" / "step_000004")}
    run = trainer(branch)
    assert run.step == 4
    run.fit()
    assert all(torch.equal(weight, expected[name]) for name, weight in run.weights().items())
    assert run.state.history[-1]["branched_from"].endswith("step_000004")
    again = trainer(branch)  # it has checkpoints of its own now
    assert again.step == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"branch_from": "nowhere"}, "branch_from='nowhere': holds no training checkpoint"),
        ({"schedule.steps": 2}, "has made 2 updates, and schedule.steps is 2"),
        ({"seed": 4}, "seed=4: the run .* was started with 3"),
    ],
)
def test_a_branch_that_cannot_be_is_one_line(
    trainer: Any, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    trainer({**PLAIN, "schedule.steps": 2, "output": str(tmp_path / "long")}).fit()
    with pytest.raises(UserError, match=words):
        trainer({**PLAIN, "branch_from": str(tmp_path / "long"), **changes})


def test_rates_fall_from_layer_to_layer(document: Any) -> None:
    model = {"num_prelude_layers": 2, "num_core_layers": 2, "num_coda_layers": 1}
    changes = {f"model.{key}": value for key, value in model.items()}
    given = {
        "optimizer.layer_decay": 0.5,
        "optimizer.lr_factors": {"model.adapter": 10},
        "optimizer.freeze": ["*.norm_1"],
    }
    config = parse(TrainConfig, document({**PLAIN, **changes, **given}), "test")
    network = build(config.checkpoint_config, seed=0)
    groups = parameter_groups(network, config.optimizer)
    names = {id(p): name for name, p in network.named_parameters()}
    found = {names[id(p)]: group["lr_factor"] for group in groups for p in group["params"]}
    for name, factor in {
        "model.wte.weight": 0.5**5,
        "model.prelude.0.mlp.fc.weight": 0.5**4,
        "model.prelude.1.attn.proj.weight": 0.5**3,
        "model.prelude.1.norm_1.weight": 0.0,
        "model.adapter.weight": 10 * 0.5**3,
        "model.core_block.0.mlp.proj.weight": 0.5**2,
        "model.core_block.1.mlp.proj.weight": 0.5,
        "model.coda.0.mlp.fc.weight": 1.0,
        "model.ln_f.weight": 1.0,
    }.items():
        assert found[name] == factor, name
    assert found.keys() == {name for name, _ in network.named_parameters()}


def test_muon_moves_matrices_as_the_library_does_and_the_rest_as_adamw(document: Any) -> None:
    config = parse(
        TrainConfig, document({**PLAIN, "optimizer.name": "muon", "deepspeed.zero_stage": 0}), "test"
    )
    networks = [build(config.checkpoint_config, seed=0) for _ in range(2)]
    matrices = {n for n, m in networks[0].named_modules() if isinstance(m, torch.nn.Linear)}
    first, second = (dict(network.named_parameters()) for network in networks)
    ours = build_optimizer(networks[0], config)
    named = {True: [], False: []}
    for name, parameter in second.items():
        named[name.removesuffix(".weight") in matrices and name.endswith(".weight")].append((name, parameter))
    spec = config.optimizer
    theirs = [
        torch.optim.Muon(
            [p for _, p in named[True]],
            lr=0.01,
            weight_decay=0.1,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [p for _, p in named[False]], lr=0.01, weight_decay=0.0, betas=spec.betas, eps=spec.eps
        ),
    ]
    rng = torch.Generator().manual_seed(0)
    for group in ours.param_groups:
        group["lr"] = 0.01
    for _ in range(3):
        for name, parameter in first.items():
            parameter.grad = torch.randn(parameter.shape, generator=rng)
            second[name].grad = parameter.grad.clone()
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    assert named[True] and named[False]
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name


def test_a_gate_of_one_row_is_no_matrix_for_muon(document: Any) -> None:
    """It decays like one, and keeps AdamW's groups as they were."""
    changes = {**PLAIN, "objective": "exit_gate", "model.exit_gate": "linear"}
    for name, of_gate in (("muon", [False]), ("adamw", [True])):
        config = parse(TrainConfig, document({**changes, "optimizer.name": name}), "test")
        network = build(config.checkpoint_config, seed=0)
        gate = network.model.exit_gate.linear.weight  # type: ignore[union-attr]
        assert gate.shape[0] == 1
        groups = parameter_groups(network, config.optimizer)
        mine = [g for g in groups if any(p is gate for p in g["params"])]
        assert [g["matrices"] for g in mine] == of_gate and mine[0]["weight_decay"] == 0.1
        assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("each", [False, True])
def test_matrices_are_put_together_from_what_processes_hold(each: bool, world: int) -> None:
    """Cut as DeepSpeed cuts: all parameters in a row at ZeRO 1 and 2, every one at 3, padded at the end."""
    shapes = [(3, 4), (1, 5), (2, 2), (7, 3)]
    whole = [torch.randn(shape) for shape in shapes]
    if each:
        padded = [torch.zeros(world * -(-m.numel() // world)) for m in whole]
        for to, matrix in zip(padded, whole, strict=True):
            to[: matrix.numel()] = matrix.flatten()
        flats = torch.stack([torch.cat([m.view(world, -1)[rank] for m in padded]) for rank in range(world)])
    else:
        row = torch.cat([matrix.flatten() for matrix in whole])
        flats = torch.cat([row, torch.zeros(-len(row) % (4 * world))]).view(world, -1)
    held = [0] * len(shapes)
    for rank in range(world):
        for matrix, place, part in Cut(shapes, each).matrices(flats, rank):
            number = next(i for i, m in enumerate(whole) if m.shape == matrix.shape)
            assert torch.equal(matrix, whole[number])
            assert torch.equal(flats[rank][place], matrix.flatten()[part])
            held[number] += part.stop - part.start
    assert held == [matrix.numel() for matrix in whole]  # each element once


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")])
def test_muon_is_the_same_at_every_stage_and_resumes(
    trainer: Any, tmp_path: Path, stage: int, precision: str
) -> None:
    """Without clipping, whose norm is summed in another order at every stage: the library orthogonalises in bf16,
    where the last bit of a gradient is 0.4 % of an element."""
    changes = {
        **PLAIN,
        "optimizer.name": "muon",
        "optimizer.grad_clip": 0,
        "precision": precision,
        "schedule.steps": 4,
    }
    weights = []
    for number in (0, stage):
        run = trainer({**changes, "deepspeed.zero_stage": number, "output": str(tmp_path / str(number))})
        before = run.weights()
        run.fit()
        weights.append(run.weights())
    moved = sum(float((weights[0][name] - before[name]).square().sum()) for name in before) ** 0.5
    apart = sum(float((weights[0][name] - weights[1][name]).square().sum()) for name in before) ** 0.5
    exact = (stage, precision) == (1, "fp32")  # there the gradients are the same to the last bit
    assert apart <= (0 if exact else 6e-2) * moved
    trainer({**changes, "deepspeed.zero_stage": stage, "schedule.steps": 2}).fit()
    again = trainer({**changes, "deepspeed.zero_stage": stage})
    assert again.step == 2
    again.fit()
    for name, weight in again.weights().items():
        assert torch.equal(weight, weights[1][name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_with_muon_resumes_bit_for_bit_and_averages(
    trainer: Any, tmp_path: Path, precision: str
) -> None:
    changes = {
        **PLAIN,
        "optimizer.name": "muon",
        "deepspeed.zero_stage": 0,
        "precision": precision,
        "ema": {},
    }
    whole = trainer({**changes, "output": str(tmp_path / "whole"), "schedule.steps": 4})
    whole.fit()
    expected = exported(whole, tmp_path / "one", True), exported(whole, tmp_path / "two", False)
    trainer({**changes, "schedule.steps": 2}).fit()
    again = trainer({**changes, "schedule.steps": 4})
    assert again.step == 2
    again.fit()
    found = exported(again, tmp_path / "three", True), exported(again, tmp_path / "four", False)
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {
                "optimizer.name": "muon",
                "deepspeed.zero_stage": 2,
                "deepspeed.offload_optimizer": "cpu",
            },
            "deepspeed.offload_optimizer='cpu'.*'muon'",
        ),
        ({"optimizer.momentum": 0.9}, "momentum belongs to optimizer 'muon'"),
    ],
)
def test_muon_says_what_it_cannot_do(document: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(parse(TrainConfig, document({**PLAIN, **changes}), "test"), 1)
