"""A gate that is trained here, by both stages, exits in the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rdlm.checkpoints.folder import load
from rdlm.data.tokenizer import train_tokenizer
from rdlm.exit_criteria import ExitRule
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.loading import build_served
from serve.settings import EngineSettings
from train.export import export_run

STAGE_1 = {
    "model.exit_gate": "linear", "model.vocab_size": 257,
    "objective": {"name": "exit_gate", "beta": 0.0, "depth": {"mean": 4, "grad_steps": "all"}},
    "schedule": {"kind": "constant", "steps": 60}, "precision": "fp32", "checkpoint.interval_steps": 60,
    "log.interval_steps": 20,
}  # fmt: skip
STAGE_2 = {
    **STAGE_1,
    "objective": {"name": "gate_only", "margin": 50.0, "depth": {"mean": 4}},
    "optimizer.lr": 0.1,
}


def test_both_stages_train_a_gate_that_the_engine_exits_on(
    trainer: Callable[..., Any], tmp_path: Path
) -> None:
    first = trainer(STAGE_1)
    first.fit()
    source = export_run(tmp_path / "run")
    before = first.weights()
    second = trainer({**STAGE_2, "output": str(tmp_path / "gate"), "init_from": str(source)})
    second.fit()
    moved = {name for name, weight in second.weights().items() if not torch.equal(weight, before[name])}
    assert moved == {"model.exit_gate.linear.weight", "model.exit_gate.linear.bias"}
    loaded = load(export_run(tmp_path / "gate"))
    names = train_tokenizer("bpe", iter(["a text"]), 257)
    served = build_served(loaded.denoiser, loaded.config, names, EngineSettings(max_slots=2), frozenset())
    # A margin that no improvement reaches teaches the gate to stop at once.
    rule = ExitRule("gate", 0.6)
    asked = Request((1, 2, 3), StepBudget(8, rule), 4)
    with Engine(lambda: served) as engine:
        [events] = engine.generate([asked])
    usage = events[-1].usage
    assert usage is not None and usage.exits == 4 and usage.saved_core_steps > 0
