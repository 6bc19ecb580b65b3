"""What a sweep refuses before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rdlm.config.base import parse
from rdlm.errors import UserError
from train.settings import ScheduleConfig
from train.sweep import SweepConfig, resolved, runs_of

SWEEP = {"name": "s", "output": "out", "base": {}, "budget": {"updates": 3}}


def _sweep(changes: dict[str, Any]) -> SweepConfig:
    return parse(SweepConfig, {**SWEEP, **changes}, "sweep.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 0]}, "name one twice"),
        ({"grid": {"optimizer.lr": []}}, "grid.optimizer.lr has no values"),
        ({"grid": {"seed": [1, 2]}}, "decided by the sweep; use seeds"),
        ({"arms": {"a": {"output": "x"}}}, "arms.a: output is decided by the sweep"),
        ({"arms": {"a": {"schedule.steps": 5}}}, "use budget"),
        ({"arms": {"a": {"schedule": {"kind": "constant", "steps": 5}}}}, "use budget"),
        ({"evaluate": {"x": "nll {zzz}"}}, "evaluate.x: only {model}"),
        ({"evaluate": {"x": "nll {model"}}, "evaluate.x: only {model}"),
        ({"evaluate": {"x": "nll {}"}}, "evaluate.x: only {model}"),
        ({"evaluate": {"x": "nll 'a"}}, "evaluate.x: No closing quotation"),
        ({"evaluate": {"x": " "}}, "evaluate.x: there is no command"),
        ({"evaluate": {"../x": "nll"}}, "evaluate.../x: it names a file"),
        ({"arms": {"a": {"output.x": 1}}}, "arms.a: output is decided by the sweep"),
        ({"arms": {"a": {"schedule.steps.x": 5}}}, "use budget"),
    ],
)
def test_what_would_mean_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("{", r"\{")):
        _sweep(changes)


def test_arms_with_one_folder_are_refused() -> None:
    with pytest.raises(UserError, match="share the folder"):
        runs_of(_sweep({"arms": {"a b": {}, "a-b": {}}}), {})
    assert len(runs_of(_sweep({"arms": {"a": {}, "b": {}}, "seeds": [0, 1]}), {})) == 4


def test_a_grid_of_a_million_runs_is_refused_at_once() -> None:
    many = list(range(1, 101))
    grid = {"grid": {"optimizer.lr": many, "batch.global_size": many, "optimizer.eps": many}}
    with pytest.raises(UserError, match="1,000,000 runs, more than 4,096"):
        runs_of(_sweep(grid), {})


def test_a_section_that_is_a_value_and_a_budget_without_end_are_named(tmp_path: Path) -> None:
    base = {"schedule": 5}
    [run] = runs_of(_sweep({"output": str(tmp_path)}), base)
    with pytest.raises(UserError, match="schedule=5: it holds a value"):
        resolved(run, 3)
    with pytest.raises(UserError, match="^steps="):
        parse(ScheduleConfig, {"steps": 10**300}, "s.yaml")
