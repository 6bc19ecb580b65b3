"""Any training checkpoint becomes a model, and a run may start from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rdlm.checkpoints.folder import load
from rdlm.cli import app, run
from rdlm.errors import UserError
from train import checkpoints as resume
from train.export import export, export_run, find_checkpoint, weights_of
from train.pretrain import check

EVALUATED: dict[str, Any] = {"evaluation": {"interval_steps": 1, "steps": [1, 2], "max_tokens": 48}}


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
)
def test_an_unfinished_run_exports_the_weights_it_has(
    trainer, tmp_path: Path, stage: int, precision: str
) -> None:
    training = trainer({"deepspeed.zero_stage": stage, "precision": precision})
    calls = iter(range(9))
    assert not training.fit(lambda: next(calls) >= 3)
    assert run(app, ["export", str(training.output), str(tmp_path / "out")], "rdlm") == 0
    assert load(tmp_path / "out").config.step == 3
    weights = training.weights()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in stored)


def test_a_file_that_somebody_put_into_the_model_stays_when_the_run_goes_on(trainer, tmp_path: Path) -> None:
    training = trainer()
    calls = iter(range(9))
    training.fit(lambda: next(calls) >= 3)
    model = export_run(training.output)
    (model / "notes.md").write_text("by hand")
    trainer().fit()
    assert load(export_run(training.output)).config.step == 6
    assert (model / "notes.md").read_text() == "by hand"


def test_the_model_says_at_which_k_it_was_trained(trainer, tmp_path: Path) -> None:
    training = trainer({"objective.depth": {"distribution": "fixed", "mean": 3}})
    training.fit()
    model = load(export_run(training.output))
    assert model.config.trained_steps == 3
    assert model.config.depth_warning(3) is None and "K = 4 exceeds the 3" in str(
        model.config.depth_warning(4)
    )


def test_the_checkpoint_can_be_chosen(trainer, tmp_path: Path, capsys) -> None:
    training = trainer(
        {**EVALUATED, "checkpoint.keep_best": True, "checkpoint.keep": 1, "optimizer.lr": 0.02}
    )
    training.fit()
    record = resume.best_record(training.checkpoints)
    assert record is not None and record["metric"] == "K=2"
    held_out = [float(line["K=2"]) for line in read_held_out(training.output)]
    assert record["value"] == min(held_out) and record["step"] == 1 + held_out.index(min(held_out))
    kept = {resume.step_of(path) for path in resume.checkpoints_in(training.checkpoints)}
    assert kept == {record["step"], 6}
    source = str(training.output)
    assert run(app, ["export", "run", source, str(tmp_path / "best"), "--which", "best"], "rdlm") == 0
    assert load(tmp_path / "best").config.step == record["step"]
    step = training.checkpoints / "step_000006"
    assert run(app, ["export", str(step), str(tmp_path / "last")], "rdlm") == 0
    for arguments, problem in (
        ([source, str(tmp_path / "best")], "holds something already"),
        ([source, str(tmp_path / "x"), "--which", "5000"], "there is no such checkpoint"),
        ([source, str(tmp_path / "x"), "--which", "first"], "neither last, best nor a number"),
        ([str(tmp_path), str(tmp_path / "x")], "holds no training checkpoint"),
    ):
        capsys.readouterr()
        assert run(app, ["export", *arguments], "rdlm") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and problem in err


def read_held_out(output: Path) -> list[dict[str, Any]]:
    from train.metrics import read

    return read(output / "held_out.jsonl")


def test_published_layouts_are_still_reached(capsys) -> None:
    assert run(app, ["export", "huginn", "nowhere", "out"], "rdlm") == 2
    assert "nowhere" in capsys.readouterr().err
    assert run(app, ["export", "--help"], "rdlm") == 0
    out = capsys.readouterr().out
    assert "run" in out and "huginn" in out


def test_a_weight_that_is_not_finite_is_not_exported(trainer, tmp_path: Path) -> None:
    training = trainer({"schedule.steps": 2, "schedule.warmup_steps": 0})
    training.fit()
    (state,) = (training.checkpoints / "step_000002" / "state").glob("*optim_states.pt")
    saved = torch.load(state, weights_only=False)
    saved["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[7] = float("inf")
    torch.save(saved, state)
    with pytest.raises(UserError, match="is not finite"):
        export(training.checkpoints / "step_000002", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="does not match its checksum"):
        find_checkpoint(training.checkpoints / "step_000002", "last", pytest.fail)


def test_a_run_starts_from_the_weights_of_another(trainer, tmp_path: Path) -> None:
    first = trainer({"output": str(tmp_path / "first"), "schedule.steps": 2, "schedule.warmup_steps": 0})
    first.fit()
    export_run(first.output)
    for source in (first.output, first.output / "model", first.checkpoints / "step_000002"):
        second = trainer(
            {"init_from": str(source), "seed": 9, "output": str(tmp_path / f"from {source.name}")}
        )
        assert second.step == 0 and not second.engines[0].optimizer.optimizer.state
        wanted = {name: weight.bfloat16().float() for name, weight in first.weights().items()}
        for name, weight in second.weights().items():
            assert torch.equal(weight, wanted[name]), name
    assert second.fit(), "the weights come from init_from only once"
    assert trainer({"init_from": str(tmp_path / "gone"), "seed": 9, "output": str(second.output)}).step == 6


def test_a_run_may_have_weights_that_its_source_lacks(trainer, tmp_path: Path) -> None:
    plain = trainer({"objective": {"name": "onestep"}, "output": str(tmp_path / "plain"), "schedule.steps": 2,
            "schedule.warmup_steps": 0})  # fmt: skip
    plain.fit()
    noisy = trainer({"init_from": str(plain.output)})
    assert "initialized anew: " in noisy.terminal.getvalue()
    check(noisy.config, 1)
    for changes, problem in (
        ({"model.mlp_width": 64}, "has shape"),
        ({"model.num_coda_layers": 0}, "the model has no place for it"),
    ):
        with pytest.raises(UserError, match=problem):
            check(
                type(noisy.config).model_validate(
                    {**noisy.config.model_dump(), **altered(noisy.config, changes)}
                ),
                1,
            )
    assert weights_of(plain.output).keys() == plain.weights().keys()


def altered(config: Any, changes: dict[str, Any]) -> dict[str, Any]:
    ((name, value),) = changes.items()
    return {"model": {**config.model.model_dump(), name.partition(".")[2]: value}}
