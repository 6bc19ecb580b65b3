"""Updates that are not finite change nothing, are not saved, and end the run where the config says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rdlm.errors import UserError
from train import checkpoints as resume
from train.metrics import MetricsLog, plot_loss, read

STEADY: dict[str, Any] = {"schedule.kind": "constant", "schedule.warmup_steps": 0, "schedule.steps": 6}


def poisoned(trainer: Any, index: int) -> None:
    """Batch ``index`` of the run gives a loss that is not finite."""
    engine, plain = trainer.engines[0], trainer.engines[0].module.forward

    def forward(batch: Any, keys: Any = None, **others: Any) -> Any:
        total, *rest = plain(batch, keys, **others)
        return total * float("nan") if keys is not None and keys.step == index else total, *rest

    engine.module.forward = forward


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
)
def test_a_nonfinite_update_changes_no_weight(trainer, stage: int, precision: str) -> None:
    run = trainer({**STEADY, "deepspeed.zero_stage": stage, "precision": precision})
    poisoned(run, 1)
    for step in range(3):
        before = run.weights()
        batches = run._batches(step)
        tally = run.train_step(batches, float(sum(batch.mask.sum() for batch in batches)))
        run.step += 1
        after = run.weights()
        assert tally.finite == (step != 1)
        assert any(not torch.equal(after[name], before[name]) for name in before) == (step != 1)
        assert all(weight.isfinite().all() for weight in after.values())


def test_skipping_goes_on_and_the_log_is_json(trainer) -> None:
    run = trainer(STEADY)
    poisoned(run, 2)
    assert run.fit()
    assert "update 3 is not finite: it changed no weight (1 in a row)" in run.terminal.getvalue()
    steps = [
        json.loads(line, parse_constant=pytest.fail)["step"] for line in (run.output / "metrics.jsonl").open()
    ]
    assert steps == [1, 2, 4, 5, 6]


def test_stopping_names_the_update_and_keeps_earlier_checkpoints(trainer) -> None:
    run = trainer({**STEADY, "nonfinite.action": "stop", "log.interval_steps": 100})
    poisoned(run, 2)
    with pytest.raises(UserError, match="diverged at update 3"):
        run.fit()
    assert [p.name for p in resume.checkpoints_in(run.checkpoints)] == ["step_000002"]


def test_more_skips_in_a_row_than_the_limit_end_the_run(trainer) -> None:
    run = trainer({**STEADY, "nonfinite.limit": 1, "checkpoint.interval_steps": 100})
    with torch.no_grad():
        for weight in run.network.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(UserError, match="diverged at update 2"):
        run.fit()
    assert not resume.checkpoints_in(run.checkpoints)


def test_weights_that_diverged_are_not_saved(trainer) -> None:
    """An absurd rate: the first update is finite, the weights after it are useless, and no later checkpoint
    replaces step 2."""
    trainer({**STEADY, "schedule.steps": 2}).fit()
    run = trainer({**STEADY, "optimizer.lr": 1e30, "log.interval_steps": 100, "checkpoint.interval_steps": 1})
    assert run.step == 2
    with pytest.raises(UserError, match="diverged"):
        run.fit()
    assert [p.name for p in resume.checkpoints_in(run.checkpoints)] == ["step_000002"]


def test_rollback_passes_over_the_batches_since_the_checkpoint(trainer, tmp_path: Path) -> None:
    run = trainer({**STEADY, "nonfinite.action": "rollback"})
    poisoned(run, 3)
    used: list[int] = []
    take = run._reader.take
    run._reader.take = lambda index, following: (used.append(index), take(index, following))[1]
    assert run.fit()
    assert used == [0, 1, 2, 3, 4, 5, 6, 7], (
        "checkpoint at 2, batch 3 failed: updates 3 to 6 see batches 4 to 7"
    )
    assert [record["step"] for record in read(run.output / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    manifest = resume.manifest_of(run.checkpoints / "step_000006")
    assert manifest["skipped"] == 2 and manifest["history"] == [{"step": 2, "rollback_from": 4}]
    assert trainer(STEADY).state.skipped == 2


def test_rollbacks_have_an_end(trainer) -> None:
    run = trainer({**STEADY, "nonfinite": {"action": "rollback", "limit": 2}})
    plain = run.train_step
    run.train_step = lambda *a: (lambda tally: setattr(tally, "finite", run.step < 2) or tally)(plain(*a))
    with pytest.raises(UserError, match="diverged at update 3"):
        run.fit()
    assert run.terminal.getvalue().count("back to the checkpoint of step 2") == 2


def test_a_log_holds_no_nan_and_survives_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.0}\nnonsense\n[3]\n{"loss": 1}\n{"step": 2, "loss": NaN}\n\xff\n{"step": 3, "lo'
    )
    assert [record["step"] for record in read(path)] == [1, 2]
    log = MetricsLog(path, 9, tensorboard=False)
    assert log.damaged == 4
    log.write({"step": 3, "loss": float("inf"), "grad_norm": 1.0})
    log.close()
    assert path.read_text().splitlines()[-1] == '{"step": 3, "loss": null, "grad_norm": 1.0}'
    plot_loss(read(path), [{"step": 3, "K=1": None}], tmp_path / "loss.png", "t", "nats")
    assert (tmp_path / "loss.png").stat().st_size > 0
