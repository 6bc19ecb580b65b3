"""Spikes of the loss, the gradient noise scale, and records in Weights & Biases."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rdlm.errors import UserError
from train.gradient_noise import moment_sums, noise_scale
from train.metrics import first_lines, plot_loss, read, spike
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


def test_the_curve_beside_the_held_out_one_is_of_the_same_quantity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions without noise, where some have it: the mixed loss lies below both."""
    from matplotlib.axes import Axes

    drawn: list[list[float]] = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *args, **kwargs: drawn.append([*y]))
    monkeypatch.setattr(Axes, "legend", lambda *args, **kwargs: None)
    records = [{"step": step, "loss": 1.0, "ce_prior": 3.0} for step in (1, 2)]
    plot_loss(records, [{"step": 2, "K=1": 3.1}], tmp_path / "loss.png", "t", "nats")
    assert drawn == [[3.0, 3.0], [3.0, 3.0], [3.1]]


def test_a_line_that_is_no_record_is_passed_over(tmp_path: Path) -> None:
    good, file = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}], tmp_path / "metrics.jsonl"
    bad = [
        b"\xff\xfe",
        b"[1]",
        b'{"step": "1"}',
        b'{"loss": 1}',
        b"",
        b"[" * 100_000,
        b'{"step": 3, "loss": "x"}',
    ]
    lines = [json.dumps(good[0]).encode(), *bad, json.dumps(good[1]).encode()]
    file.write_bytes(b"\n".join(lines) + b'\n{"step": 3, "los')
    assert read(file) == good


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, None),
        (240, "an epoch has 2,880 tokens; the run sees 10.0% of the data"),
        (5, "warning: 4.8 epochs"),
        (3, "warning: batch.global_size 4 exceeds the 3 rows"),
    ],
)
def test_the_first_lines_say_how_much_of_the_data_is_seen(
    document: Any, rows: int | None, said: str | None
) -> None:
    """24 rows of 12 tokens in 6 updates."""
    corpus = SimpleNamespace(num_rows=rows, seq_len=12, unit="token")
    running = SimpleNamespace(
        config=TrainConfig.model_validate(document()), corpus=corpus, network=torch.nn.Linear(10, 10, bias=False),
        world=1, device=torch.device("cpu"),
    )  # fmt: skip
    lines = first_lines(running)  # type: ignore[arg-type]
    assert "100 parameters" in lines[0] and "6 updates of 4 x 12 tokens: 288 tokens" in lines[1]
    assert len(lines) == 2 if said is None else any(said in line for line in lines[2:])
