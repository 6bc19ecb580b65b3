"""Spikes of the loss, the gradient noise scale, and records in Weights & Biases."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rdlm.errors import UserError
from train.gradient_noise import moment_sums, noise_scale
from train.metrics import spike
from train.pretrain import check
from train.settings import TrainConfig

PLAIN: dict[str, Any] = {"objective": "onestep", "schedule.kind": "constant", "schedule.warmup_steps": 0}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("ratio", [0.5, 2.0, 8.0])
def test_the_noise_scale_is_that_of_the_gradients(ratio: float) -> None:
    """Gradients of 40,000 elements with |G|^2 and tr(Sigma) / B known; the batch counts as 16 sequences."""
    rng = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(40_000))
    optimizer = torch.optim.AdamW([parameter], lr=0.0, betas=(0.9, 0.95))
    true = torch.randn(40_000, generator=rng)
    for _ in range(60):
        parameter.grad = true + ratio**0.5 * torch.randn(40_000, generator=rng)
        optimizer.step()
    found = noise_scale(*moment_sums(optimizer, (0.9, 0.95)), 0.9, 16)
    assert found == pytest.approx(16 * ratio, rel=0.1)


def test_too_few_updates_say_nothing_about_noise() -> None:
    assert noise_scale(1.0, 2.0, 9, 0.9, 4) is None


def test_a_run_reports_the_same_noise_scale_at_every_stage(trainer: Any, tmp_path: Path) -> None:
    """A large batch and a small rate: the signal is far from drowned."""
    changes = {
        **PLAIN, "schedule.steps": 12, "log.gradient_noise": True, "precision": "fp32", "optimizer.lr": 1e-4,
        "batch.global_size": 64, "optimizer.grad_clip": 0.0,
    }  # fmt: skip
    found = []
    for stage in (0, 1, 2):
        run = trainer({**changes, "deepspeed.zero_stage": stage, "output": str(tmp_path / str(stage))})
        run.fit()
        records = lines(run.output / "metrics.jsonl")
        assert "gradient_noise" not in records[8]
        found.append(records[-1]["gradient_noise"])
    assert found[0] > 0 and found == pytest.approx([found[0]] * 3, rel=1e-3)


def test_rates_count_what_is_processed_and_what_is_learned_apart(trainer: Any, tmp_path: Path) -> None:
    """Of 9 positions of this task the 3 hops are targets."""
    data = {"kind": "pointer_chasing", "nodes": 6, "hops": 3}
    run = trainer({**PLAIN, "schedule.steps": 2, "data": data, "output": str(tmp_path / "hops")})
    run.fit()
    for record in lines(run.output / "metrics.jsonl"):
        assert record["tokens_per_s"] == pytest.approx(3 * record["targets_per_s"])
        assert record["tokens_per_s"] * record["step_s"] == pytest.approx(4 * 9)


def test_a_spike_is_measured_against_the_losses_before() -> None:
    draw = random.Random(0)
    before = [draw.gauss(2.0, 0.1) for _ in range(64)]
    assert spike(2.0, before[:15]) is None
    assert abs(spike(2.0, before) or 0.0) < 0.5
    assert spike(3.0, before) == pytest.approx(10, rel=0.25)


def test_spikes_are_recorded_and_the_same_when_resumed(trainer: Any, tmp_path: Path) -> None:
    changes = {**PLAIN, "schedule.steps": 24, "checkpoint": {"interval_steps": 20, "keep": 2}}
    whole = trainer({**changes, "output": str(tmp_path / "whole")})
    whole.fit()
    trainer({**changes, "schedule.steps": 20}).fit()
    again = trainer(changes)
    again.fit()
    first, second = (
        [record.get("loss_spike") for record in lines(run.output / "metrics.jsonl")] for run in (whole, again)
    )
    assert first == second and first[15] is None and first[16] is not None


def stored(file: Path) -> list[bytes]:
    """The records of a .wandb file: LevelDB's log format behind 7 bytes, in blocks of 32 KiB of chunks with a
    header of checksum (4 bytes), length (2) and type (1: whole, 2: first, 3: middle, 4: last)."""
    data, at, found, parts = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0 or 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(parts)
            parts = b""
    return found


def test_records_are_sent_to_wandb(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline; the library's own messages are read back from its file."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = trainer({**PLAIN, "schedule.steps": 3, "log.wandb": {"project": "loops"}})
    run.fit()
    (file,) = (run.output / "wandb").glob("offline-run-*/run-*.wandb")
    sent = []
    for data in stored(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            sent.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
    expected = lines(run.output / "metrics.jsonl")
    assert [found["loss"] for found in sent] == [record["loss"] for record in expected]
    assert [found["_step"] for found in sent] == [1, 2, 3]


def test_a_sink_that_is_not_installed_is_one_line(document: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    config = TrainConfig.model_validate(document({**PLAIN, "log.wandb": {"project": "loops"}}))
    with pytest.raises(UserError, match="log.wandb.*the package wandb is not installed"):
        check(config, 1)
