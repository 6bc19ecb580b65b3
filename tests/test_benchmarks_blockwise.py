"""The arms of the block-wise benchmark: every one can be built, and gets the budget that its name says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import blockwise, tables
from benchmarks.common import check_same_corpus, read_json, tokenizers_of, write_json
from rdlm.cli import run
from rdlm.config.base import parse
from rdlm.data.token_shards import read_manifest
from rdlm.errors import UserError
from rdlm.objectives.blockwise import drawn_block
from rdlm.registry import build
from train.data.prepare import Preparation, prepare
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


def test_a_table_has_one_corpus(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"Line {i} tells of {i * i} foxes."}) + "\n" for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    data = tmp_path / "data"
    prepare(Preparation(str(tmp_path / "a.jsonl"), data, vocab_size=260), progress=False)
    own = read_manifest(data).tokenizer_fingerprint
    file = tmp_path / "a.json"
    check_same_corpus(file, data)  # there is none yet
    runs = [{"data": {"tokenizer_fingerprint": own}}, {"data": {}}, {}]
    write_json(file, {"runs": runs})
    check_same_corpus(file, data)
    write_json(file, {"runs": [*runs, {"data": {"tokenizer_fingerprint": "another"}}]})
    with pytest.raises(UserError, match="data with another tokenizer"):
        check_same_corpus(file, data)


@pytest.mark.parametrize("name", ["language", "blockwise"])
def test_published_rows_are_of_one_corpus(name: str) -> None:
    assert len(tokenizers_of(REPO / "docs" / "results" / "raw" / f"{name}.json")) == 1
