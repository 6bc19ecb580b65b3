"""Resuming is bit-exact, and nothing a kill can leave behind is mistaken for a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rdlm.errors import UserError
from train import checkpoints as resume


def records(run) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measures."""
    clocks = ("seconds", "cpu_seconds", "step_s", "tokens_per_s", "peak_memory_bytes")
    lines = (Path(run.config.output) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in clocks} for line in lines]


def stop_after(steps: int):
    """A ``should_stop`` that lets so many updates pass."""
    calls = iter(range(10**6))
    return lambda: next(calls) >= steps


# Stage 3 cannot hold the scalar of the evidence read-out: DeepSpeed 0.19.8 does not partition 0-d parameters.
STAGES = [(0, "bf16", "single_pass"), (0, "fp32", "single_pass"), (1, "bf16", "single_pass"), (2, "bf16", "single_pass"),
          (2, "fp32", "single_pass"), (3, "bf16", "bptt"), (3, "bf16", "single_pass")]  # fmt: skip


@pytest.mark.parametrize(("stage", "precision", "objective"), STAGES)
def test_resumed_equals_uninterrupted(
    trainer, tmp_path: Path, stage: int, precision: str, objective: str
) -> None:
    """Stopped after 3 of 6 updates in a fresh engine: every loss, gradient norm and weight equal to the last bit."""
    changes = {
        "deepspeed.zero_stage": stage,
        "precision": precision,
        "objective": {"name": objective},
        "batch.micro_size": 2,
    }
    if objective == "bptt":
        changes["objective"] = {"name": "bptt", "depth": {"mean": 2, "grad_steps": 2}}
    whole = trainer({**changes, "output": str(tmp_path / "whole")})
    assert whole.fit()
    first = trainer(changes)
    assert not first.fit(stop_after(3))
    torch.manual_seed(99)  # global random state must not matter
    second = trainer(changes)
    assert second.step == 3
    assert second.fit()
    assert records(second) == records(whole)
    assert [r["step"] for r in records(second)] == [1, 2, 3, 4, 5, 6]
    for name, weight in second.weights().items():
        assert torch.equal(weight, whole.weights()[name]), name


def test_steps_beyond_the_checkpoint_are_logged_once(trainer, tmp_path: Path) -> None:
    """A kill after update 5 with checkpoints at 2 and 4: the record of 5 is cut off and written again."""
    run = trainer()
    run.fit()
    log = Path(run.config.output) / "metrics.jsonl"
    whole = records(run)
    shutil.rmtree(run.checkpoints / "step_000006")
    log.write_text(log.read_text() + '{"step": 7, "lo')  # what a kill leaves of a line
    again = trainer()
    assert again.step == 4
    again.fit()
    assert records(again) == whole


def test_interrupted_write_is_no_checkpoint(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Death at any point of a write leaves the earlier checkpoint in charge."""
    run = trainer({"schedule.steps": 2})
    run.fit()
    for victim in ("_seal", "_write"):
        with monkeypatch.context() as patch:
            patch.setattr(resume, victim, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                resume.save(run.engine, run.checkpoints, 9, run.config, "data")
        assert resume.newest(run.checkpoints, pytest.fail) == run.checkpoints / "step_000002"
    assert list(run.checkpoints.glob(".tmp-*"))
    resume.clean(run.checkpoints)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step_000002"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no_manifest"])
def test_damaged_checkpoint_is_passed_over_with_a_warning(trainer, damage: str) -> None:
    run = trainer()
    run.fit()
    newest = run.checkpoints / "step_000006"
    victim = next((newest / "state").glob("*optim_states.pt"))
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "remove":
        victim.unlink()
    elif damage == "manifest":
        victim = newest / "manifest.json"
        victim.write_text(victim.read_text()[:-9])
    else:
        victim = newest / "manifest.json"
        victim.unlink()
    warnings: list[str] = []
    assert resume.newest(run.checkpoints, warnings.append) == run.checkpoints / "step_000004"
    assert len(warnings) == 1 and victim.name in warnings[0]
    again = trainer()
    assert again.step == 4
    assert again.fit()
    assert resume.newest(run.checkpoints, pytest.fail) == newest


def test_keeps_the_newest(trainer) -> None:
    run = trainer({"checkpoint.interval_steps": 1, "checkpoint.keep": 3})
    run.fit()
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step_000004", "step_000005", "step_000006"]


def test_finished_run_has_nothing_left_to_do(trainer) -> None:
    run = trainer()
    run.fit()
    before = (Path(run.config.output) / "metrics.jsonl").read_bytes()
    again = trainer()
    assert again.fit()
    assert (Path(run.config.output) / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"optimizer.lr": 0.02}, "optimizer.lr"),
        ({"schedule.steps": 8}, "schedule.steps"),
        ({"model.mlp_width": 64}, "model.mlp_width"),
        ({"seed": 4}, "seed"),
        ({"deepspeed.zero_stage": 1}, "deepspeed.zero_stage"),
    ],
)
def test_resume_refuses_another_config(trainer, changes: dict[str, Any], field: str) -> None:
    trainer({"schedule.steps": 2, "schedule.warmup_steps": 0}).fit()
    with pytest.raises(UserError) as error:
        trainer({"schedule.steps": 2, "schedule.warmup_steps": 0, **changes})
    assert error.value.field == field


def test_resume_accepts_what_does_not_touch_the_computation(trainer) -> None:
    trainer({"schedule.kind": "constant", "schedule.steps": 2}).fit()
    longer = {"schedule.kind": "constant", "schedule.steps": 4, "log.interval_steps": 2, "checkpoint.keep": 5}
    assert trainer(longer).step == 2


def test_resume_refuses_other_data(trainer) -> None:
    run = trainer({"schedule.steps": 2})
    run.fit()
    with pytest.raises(UserError, match="data"):
        resume.load(run.engine, run.checkpoints / "step_000002", run.config, "other data")


def test_two_runs_cannot_share_an_output_folder(trainer) -> None:
    trainer()
    with pytest.raises(UserError, match="another run"):
        trainer(alongside=True)
