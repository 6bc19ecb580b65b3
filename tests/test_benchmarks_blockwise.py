"""The arms of the block-wise benchmark: every one can be built, and gets the budget that its name says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import blockwise, tables
from benchmarks.common import read_json, with_earlier_runs, write_json
from rdlm.cli import run
from rdlm.config.base import parse
from rdlm.errors import UserError
from rdlm.objectives.blockwise import drawn_block
from rdlm.registry import build
from train.settings import TrainConfig

REPO = Path(__file__).parents[1]
COST = {"next_token B=1": 0.5, "paper B=1": 1.0, "paper B=2": 0.6, "paper B=4": 0.4, "evidence B=1": 0.6,
"evidence B=2": 0.4,
        "evidence B=4": 0.3}  # fmt: skip


@pytest.mark.parametrize("name", blockwise.ARMS)
def test_every_arm_is_a_run_that_can_be_built_and_gets_its_budget(name: str) -> None:
    arm = blockwise.ARMS[name]
    updates = blockwise.updates_of(arm, 1.0, COST)
    document = blockwise.config_of(name, 0, updates, 1e-3, Path("data"))
    config: TrainConfig = parse(TrainConfig, {**document, "output": "run"}, "arm")
    build(config.checkpoint_config, device="meta")
    assert config.schedule.steps == updates
    if arm.equal == "time":
        assert updates * COST[arm.cost] == pytest.approx(60, abs=COST[arm.cost])
    else:
        visits = [drawn_block(arm.num_blocks, step, 0) for step in range(updates)]
        assert [visits.count(b) for b in range(arm.num_blocks)] == [120] * arm.num_blocks


def _row(name: str, lr: float, nll: float) -> dict[str, Any]:
    arm = blockwise.ARMS[name]
    curve = [{"sigma": sigma, "ce": 1.0, "reference": 0.9} for sigma in (0.3, 0.5)]
    return {
        "arm": name, "seed": 0, "lr": lr, "objective": arm.objective, "num_blocks": arm.num_blocks,
        "equal": arm.equal, "updates": 8,
        "cpu_seconds": 2.0, "results": [{"nll": nll, "nll_interval": [nll - 1, nll + 1]}],
        **({} if name == "next_token" else {"curve": curve}),
    }  # fmt: skip


def test_rows_are_merged_and_shown(tmp_path: Path) -> None:
    out, head = tmp_path / "rows.json", {"minutes": 1.0}
    for name, lr, nll in (
        ("evidence B=4 time", 2e-3, 5.0),
        ("next_token", 2e-3, 4.0),
        ("evidence B=4 time", 2e-3, 4.5),
    ):
        blockwise.merge(out, _row(name, lr, nll), head)
    rows = blockwise.merge(out, _row("evidence B=4 time", 4e-3, 4.7), head)
    assert [(r["arm"], r["lr"], r["results"][0]["nll"]) for r in rows] == [
        ("next_token", 2e-3, 4.0), ("evidence B=4 time", 2e-3, 4.5), ("evidence B=4 time", 4e-3, 4.7)
    ]  # fmt: skip
    blockwise.plot(rows, tmp_path / "rows.png", 1.0)
    assert "4.500 [3.500, 5.500]" in tables.blockwise(read_json(out))
    with pytest.raises(UserError, match="minutes"):
        blockwise.merge(out, _row("next_token", 2e-3, 4.0), {"minutes": 2.0})


def test_an_arm_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(tmp_path), "--out", str(tmp_path / "x.json"), "--arms", "evidence B=3"]
    assert run(blockwise.app, options, "blockwise") == 2
    assert "--arms='evidence B=3'" in capsys.readouterr().err


def test_rows_of_a_table_are_of_one_corpus(tmp_path: Path) -> None:
    def row(arm: str, tokenizer: str | None) -> dict[str, Any]:
        return {"arm": arm, "seed": 0, "lr": 0.1, "data": {"tokenizer_fingerprint": tokenizer}}

    write_json(tmp_path / "a.json", {"runs": [row("one", "x"), row("two", None)]})
    assert len(with_earlier_runs(tmp_path / "a.json", [row("three", "x")])) == 3
    assert (
        len(with_earlier_runs(tmp_path / "a.json", [row("one", "y")])) == 2
    )  # the only row of x is replaced
    with pytest.raises(UserError, match="different tokenizers"):
        with_earlier_runs(tmp_path / "a.json", [row("three", "y")])


@pytest.mark.parametrize("name", ["language", "depth", "blockwise"])
def test_published_rows_are_of_one_corpus(name: str) -> None:
    file = REPO / "docs" / "results" / "raw" / f"{name}.json"
    with_earlier_runs(file, [])
