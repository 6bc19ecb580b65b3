"""What a sweep refuses before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest

from rdlm.config.base import parse
from rdlm.errors import UserError
from train.sweep import SweepConfig, runs_of

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
    ],
)
def test_what_would_mean_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("{", r"\{")):
        _sweep(changes)


def test_arms_with_one_folder_are_refused() -> None:
    with pytest.raises(UserError, match="share the folder"):
        runs_of(_sweep({"arms": {"a b": {}, "a-b": {}}}), {})
    assert len(runs_of(_sweep({"arms": {"a": {}, "b": {}}, "seeds": [0, 1]}), {})) == 4
