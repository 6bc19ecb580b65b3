"""The batch loop against plain PyTorch, and against itself under other splits of the same work."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rdlm.objectives.base import Keys
from rdlm.registry import build
from train.trainer import learning_rate

PLAIN: dict[str, Any] = {
    "objective": {"name": "bptt", "depth": {"mean": 2, "grad_steps": 2}},
    "precision": "fp32",
    "optimizer.eps": 1e-3,
}
# eps keeps Adam from blowing up rounding errors of gradients that are zero in exact arithmetic (the bias of
# keys)


def losses(trainer) -> list[float]:
    return [
        json.loads(line)["loss"]
        for line in (Path(trainer.config.output) / "metrics.jsonl").read_text().splitlines()
    ]


def test_equals_a_plain_torch_loop(trainer) -> None:
    """ZeRO 0 in fp32 against a loop written out with torch alone: same losses, gradient norms and weights."""
    run = trainer({**PLAIN, "deepspeed.zero_stage": 0, "optimizer.grad_clip": 0.5})
    model, config = copy.deepcopy(run.network), run.config
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    groups = [
        {
            "params": [p for p in model.parameters() if (id(p) in linear) is decays],
            "weight_decay": 0.1 if decays else 0.0,
        }
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.optimizer.betas, eps=config.optimizer.eps)
    run.fit()
    expected, norms = [], []
    for step in range(config.schedule.steps):
        batch = run.corpus.batch(step, seed=3, global_batch=4, rank=0, world=1, micro_index=0, micro_size=4)
        terms = model.loss(batch, Keys(seed=3, step=step))
        loss = terms.total / terms.count
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.optimizer.lr, step)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    records = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in records] == pytest.approx(expected, rel=1e-6)
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-5)
    assert max(norms) > 0.5, "clipping must have been at work"
    for name, weight in run.weights().items():
        torch.testing.assert_close(
            weight, dict(model.named_parameters())[name].detach(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_computes_the_same(trainer, tmp_path: Path, stage: int) -> None:
    """fp32, one process: partitioning may change the order of additions only (tolerance 1e-5 on the losses)."""
    reference = trainer({**PLAIN, "deepspeed.zero_stage": 0, "output": str(tmp_path / "reference")})
    reference.fit()
    run = trainer({**PLAIN, "deepspeed.zero_stage": stage})
    run.fit()
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
    for name, weight in run.weights().items():
        torch.testing.assert_close(weight, reference.weights()[name], rtol=1e-3, atol=1e-4)


def test_every_zero_stage_makes_the_same_first_updates_in_bf16(trainer, tmp_path: Path) -> None:
    """DeepSpeed's update with zero gradients at stage 0 must count for nothing: fp32 weights after three
    updates agree to 2 % of what they have moved, the rounding of bf16 sums of gradients. With Adam's step
    count one ahead they differ by 20 %."""
    moved = []
    for stage in range(4):
        run = trainer({
            "objective": PLAIN["objective"], "deepspeed.zero_stage": stage, "optimizer.eps": 1e-3, "schedule.steps": 3,
            "schedule.warmup_steps": 0, "schedule.kind": "constant", "output": str(tmp_path / str(stage)),
        })  # fmt: skip
        before = torch.cat([w.flatten() for w in run.weights().values()])
        run.fit()
        moved.append(torch.cat([w.flatten() for w in run.weights().values()]) - before)
    for stage in (1, 2, 3):
        assert (moved[0] - moved[stage]).norm() < 0.02 * moved[stage].norm(), stage


@pytest.mark.parametrize("stage", [0, 2])
def test_gradient_accumulation_changes_nothing(trainer, tmp_path: Path, stage: int) -> None:
    """2 x 2 sequences against 1 x 4, objective without noise (noise is keyed by micro-batch): losses to 1e-5."""
    whole = trainer(
        {**PLAIN, "deepspeed.zero_stage": stage, "batch.micro_size": 4, "output": str(tmp_path / "whole")}
    )
    whole.fit()
    parts = trainer({**PLAIN, "deepspeed.zero_stage": stage, "batch.micro_size": 2})
    parts.fit()
    assert parts.accumulation == 2
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_loss_divides_by_the_global_count_of_masked_positions(trainer) -> None:
    """Unequal masks in the micro-batches: the gradient is that of the sum over all positions over their
    number."""
    run = trainer({**PLAIN, "deepspeed.zero_stage": 0, "batch.micro_size": 2, "optimizer.grad_clip": 0.0})
    batches = run._batches(0)
    batches[0].mask[:, 3:] = False
    model = copy.deepcopy(run.network)
    terms = [model.loss(batch, Keys(seed=3, step=0, micro=i)) for i, batch in enumerate(batches)]
    (sum(t.total for t in terms) / sum(t.count for t in terms)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    tally = run.train_step(batches, float(sum(batch.mask.sum() for batch in batches)))
    assert tally.count == 2 * 3 + 2 * 12
    assert run.grad_norm() == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "objective"), [(2, "single_pass"), (2, "paper"), (2, "bptt"), (3, "bptt"), (3, "single_pass")]
)
def test_activation_checkpointing_changes_nothing(
    trainer, tmp_path: Path, stage: int, objective: str
) -> None:
    """Recomputed activations are the same activations: losses to the last bit."""
    changes = {"deepspeed.zero_stage": stage, "objective": {"name": objective}, "schedule.steps": 3}
    if objective == "bptt":
        changes["objective"] = PLAIN["objective"]
    plain = trainer({**changes, "output": str(tmp_path / "plain")})
    plain.fit()
    run = trainer({**changes, "activation_checkpointing": True})
    run.fit()
    assert losses(run) == losses(plain)


@pytest.mark.parametrize("objective", ["next_token", "bptt", "onestep", "evidence", "single_pass", "paper"])
def test_no_parameter_is_idle(tiny, objective: str) -> None:
    """DeepSpeed fills missing gradients with zeros, and AdamW then decays and moves the parameter: none may
    be missing."""
    denoiser = tiny(objective=objective)
    run_one = torch.randint(0, 64, (2, 9))
    from rdlm.data.batch import Batch

    batch = Batch(run_one[:, :-1], run_one[:, 1:], torch.ones(2, 8, dtype=torch.bool))
    denoiser.loss(batch, Keys(seed=0, step=0)).total.backward()
    assert [name for name, p in denoiser.named_parameters() if p.grad is None] == []


def test_weight_decay_touches_matrices_only(tiny) -> None:
    from train.optim import parameter_groups
    from train.settings import OptimizerConfig

    denoiser = tiny()
    decayed, others = parameter_groups(denoiser, OptimizerConfig(lr=0.1, weight_decay=0.5))
    names = {id(p): name for name, p in denoiser.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    free = {names[id(p)] for p in others["params"]}
    assert {
        "evidence_scale",
        "model.wte.weight",
        "model.ln_f.weight",
        "model.core_block.0.attn.qk_bias",
    } <= free
    assert not any("norm" in names[id(p)] or "bias" in names[id(p)] for p in decayed["params"])
    assert "model.adapter.weight" in {names[id(p)] for p in decayed["params"]}


def test_learns_the_task(trainer) -> None:
    """A product of two permutations is learned well above chance (ln 6 = 1.79) within seconds."""
    changes: dict[str, Any] = {
        "data.length": 2,
        "schedule.steps": 150,
        "batch.global_size": 32,
        "optimizer.lr": 0.005,
        "checkpoint.interval_steps": 500,
    }
    run = trainer({**changes, "precision": "fp32"})
    run.fit()
    assert sum(losses(run)[-10:]) / 10 < 0.9


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "bf16"), (3, "fp32")])
def test_a_run_starts_from_the_weights_of_its_seed(trainer, stage: int, precision: str) -> None:
    """Whatever ZeRO does: weights are made one at a time, and at stage 3 never whole in a process."""
    run = trainer({"deepspeed.zero_stage": stage, "precision": precision})
    expected = build(run.config.checkpoint_config, seed=run.config.seed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = run.weights()
    assert found.keys() == dict(expected.named_parameters()).keys()
    for name, weight in expected.named_parameters():
        assert torch.equal(found[name], weight.detach().to(dtype).float()), name
    if stage == 3:
        assert all(parameter.numel() == 0 for parameter in run.network.parameters())
