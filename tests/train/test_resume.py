"""Resuming is bit-exact, and nothing a kill can leave behind is mistaken for a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rdlm.errors import UserError
from tests.train.test_launch import CLOCKS
from train import checkpoints as resume
from train.checkpoints import RunState
from train.optim import OPTIMIZERS


def records(run) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measures."""
    lines = (Path(run.config.output) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]


def stop_after(steps: int):
    """A ``should_stop`` that lets so many updates pass."""
    calls = iter(range(10**6))
    return lambda: next(calls) >= steps


# Stage 3 cannot hold the scalar of the evidence read-out: DeepSpeed 0.19.8 does not partition 0-d parameters.
STAGES = [(0, "bf16", "single_pass"), (0, "fp32", "single_pass"), (1, "bf16", "single_pass"),
(2, "bf16", "single_pass"),
          (2, "fp32", "single_pass"), (3, "bf16", "bptt"), (3, "bf16", "single_pass")]  # fmt: skip


@pytest.mark.parametrize(("stage", "precision", "objective"), STAGES)
def test_resumed_equals_uninterrupted(
    trainer, tmp_path: Path, stage: int, precision: str, objective: str
) -> None:
    """Stopped after 3 of 6 updates in a fresh engine: every loss, gradient norm and weight equal to the last
    bit."""
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
                resume.save(run.engines, run.checkpoints, RunState(9), run.config, "data")
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
    [({"model.mlp_width": 64}, "model.mlp_width"), ({"seed": 4}, "seed"),
    ({"batch.global_size": 8}, "batch.global_size")],
)  # fmt: skip
def test_resume_refuses_what_decides_what_is_learned(trainer, changes: dict[str, Any], field: str) -> None:
    trainer(SHORT).fit()
    with pytest.raises(UserError, match="--allow-changes") as error:
        trainer({**SHORT, **changes})
    assert error.value.field == field


SHORT: dict[str, Any] = {"schedule.steps": 2, "schedule.warmup_steps": 0}


def test_what_was_changed_on_purpose_is_in_the_history(trainer) -> None:
    trainer(SHORT).fit()
    changes = {
        "seed": 4,
        "allow_changes": True,
        "optimizer.lr": 0.02,
        "schedule.steps": 4,
        "batch.micro_size": 2,
    }
    again = trainer({**SHORT, **changes})
    assert again.step == 2 and "optimizer.lr 0.02 (before: 0.01)" in again.terminal.getvalue()
    again.fit()
    manifest = resume.manifest_of(again.checkpoints / "step_000004")
    assert manifest["history"] == [
        {"step": 2, "batch.micro_size": [None, 2], "optimizer.lr": [0.01, 0.02], "schedule.steps": [2, 4],
        "seed": [3, 4]}
    ]  # fmt: skip
    third = trainer({**SHORT, **changes, "schedule.steps": 6})
    assert [change["step"] for change in third.state.history] == [2, 4]


def nadam(groups: Any, spec: Any) -> torch.optim.Optimizer:
    """Its state has a number (``mu_product``, from 1) beside the step count and the moments."""
    return torch.optim.NAdam(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        (0, "fp32", "none"),
        (0, "bf16", "none"),
        (1, "bf16", "none"),
        (2, "fp32", "none"),
        (3, "bf16", "none"),
        (2, "bf16", "cpu"),
        (3, "fp32", "cpu"),
    ],
)
def test_an_optimizer_with_numbers_of_its_own_resumes_too(
    trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str, offload: str
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "nadam", nadam)
    changes = {
        "optimizer.name": "nadam",
        "deepspeed.zero_stage": stage,
        "deepspeed.offload_optimizer": offload,
        "precision": precision,
    }
    whole = trainer({**changes, "output": str(tmp_path / "whole")})
    assert whole.fit()
    assert not trainer(changes).fit(stop_after(3))
    second = trainer(changes)
    assert second.step == 3 and second.fit()
    assert records(second) == records(whole)


def test_an_optimizer_whose_state_cannot_be_cut_is_refused_when_a_run_resumes(
    trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        OPTIMIZERS, "adafactor", lambda groups, spec: torch.optim.Adafactor(groups, lr=spec.lr)
    )
    changes = {"optimizer.name": "adafactor", "deepspeed.zero_stage": 0, "precision": "fp32"}
    assert not trainer(changes).fit(stop_after(3))
    with pytest.raises(UserError, match="cannot be restored"):
        trainer(changes)


@pytest.mark.parametrize(
    ("before", "after", "precision"), [(0, 3, "fp32"), (3, 2, "bf16"), (2, 1, "bf16"), (1, 0, "bf16")]
)
def test_another_zero_stage_goes_on_with_the_same_weights_and_moments(
    trainer, tmp_path: Path, before: int, after: int, precision: str
) -> None:
    """And the losses of the uninterrupted run, to the order of additions (1e-5) and to bf16 sums of gradients
    (1e-2)."""
    plain: dict[str, Any] = {
        "objective": {"name": "bptt", "depth": {"mean": 2, "grad_steps": 2}}, "precision": precision,
        "optimizer.eps": 1e-3,
    }  # fmt: skip
    whole = trainer({**plain, "deepspeed.zero_stage": before, "output": str(tmp_path / "whole")})
    assert whole.fit()
    first = trainer({**plain, "deepspeed.zero_stage": before})
    assert not first.fit(stop_after(3))
    saved = first.weights()
    second = trainer({**plain, "deepspeed.zero_stage": after})
    assert second.step == 3
    for name, weight in second.weights().items():
        assert torch.equal(weight, saved[name]), name
    assert second.fit()
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    assert [r["loss"] for r in records(second)] == pytest.approx(
        [r["loss"] for r in records(whole)], rel=tolerance
    )


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(trainer) -> None:
    run = trainer()
    run.fit()
    log = (run.output / "metrics.jsonl").read_bytes()
    for path in resume.checkpoints_in(run.checkpoints):
        (path / "manifest.json").write_text("[]")
    with pytest.raises(
        UserError, match="none of its 2 checkpoints is complete; .* remove the folder to start over"
    ):
        trainer()
    assert [p.name for p in resume.checkpoints_in(run.checkpoints)] == ["step_000004", "step_000006"]
    assert (run.output / "metrics.jsonl").read_bytes() == log


def test_a_damaged_checkpoint_counts_for_nothing_when_old_ones_are_dropped(trainer) -> None:
    """With keep 2 and step 6 damaged, steps 4 and 5 stay; the damaged one waits under another name."""
    run = trainer()
    run.fit()
    (run.checkpoints / "step_000006" / "manifest.json").unlink()
    again = trainer({"checkpoint.interval_steps": 5})
    assert again.step == 4
    assert "damaged-step_000006" in again.terminal.getvalue()
    assert not again.fit(stop_after(1))
    names = sorted(p.name for p in run.checkpoints.iterdir())
    assert names == ["damaged-step_000006", "step_000004", "step_000005"]


@pytest.mark.parametrize(
    "manifest", [b"\xff\xfe\x00", b"[1]", b"{}", b'{"format": 1, "step": 9, "files": []}', b"nul"]
)
def test_odd_manifests_are_damage(trainer, tmp_path: Path, manifest: bytes) -> None:
    folder = tmp_path / "step_000009"
    folder.mkdir()
    (folder / "manifest.json").write_bytes(manifest)
    assert "manifest.json" in str(resume.damage_of(folder))


def test_foreign_files_among_the_checkpoints_are_ignored_with_a_line(trainer) -> None:
    run = trainer(SHORT)
    run.fit()
    newest = run.checkpoints / "step_000002"
    shutil.copytree(newest, run.checkpoints / "step_000002.bak")
    shutil.copytree(newest, run.checkpoints / "step_best")
    shutil.copytree(newest, run.checkpoints / "step_000009")  # its manifest says 2
    (run.checkpoints / "step_000003.tar").write_bytes(b"x")
    (run.checkpoints / "step_000004").write_text("a file")
    again = trainer({**SHORT, "schedule.steps": 4})
    assert again.step == 2 and again.fit()
    said = again.terminal.getvalue()
    for name in ("step_000002.bak", "step_best", "step_000003.tar"):
        assert f"ignoring {run.checkpoints / name}" in said
        assert (run.checkpoints / name).exists()
    assert "manifest.json is that of step 2" in said


def test_resume_accepts_what_does_not_touch_the_computation(trainer) -> None:
    trainer({"schedule.kind": "constant", "schedule.steps": 2}).fit()
    longer = {"schedule.kind": "constant", "schedule.steps": 4, "log.interval_steps": 2, "checkpoint.keep": 5}
    assert trainer(longer).step == 2


def test_resume_refuses_other_data(trainer) -> None:
    run = trainer({"schedule.steps": 2})
    run.fit()
    with pytest.raises(UserError, match="data"):
        resume.load(run.engines, run.checkpoints / "step_000002", run.config, "other data")


def test_two_runs_cannot_share_an_output_folder(trainer) -> None:
    trainer()
    with pytest.raises(UserError, match="another run"):
        trainer(alongside=True)
