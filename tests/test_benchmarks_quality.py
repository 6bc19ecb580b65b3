"""benchmarks/quality.py: which K an arm is judged at, what is run again, what is kept of lm-eval's files, and
the table of it all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import quality, tables
from benchmarks.quality import arms_of
from rdlm.checkpoints.folder import load_config, save
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.objectives import Objective


@pytest.fixture
def run_of(
    tmp_path: Path, tiny: Callable[..., Objective], tiny_config: Callable[..., CheckpointConfig]
) -> Callable[[str], Path]:
    """A folder as training leaves it."""

    def make(objective: str) -> Path:
        save(
            tmp_path / objective / "run" / "model",
            tiny("huginn", objective),
            tiny_config("huginn", objective),
            None,
        )
        return tmp_path / objective

    return make


@pytest.mark.parametrize(
    ("objective", "scored", "written"),
    [
        ("next_token", [1], [1]),
        ("bptt", [1, 4], [1, 4]),
        ("single_pass", [1, 4], [1, 4]),
        ("paper", [1], [1, 4]),
        ("evidence", [1], [1, 4]),
    ],
)
def test_an_arm_is_judged_where_k_is_part_of_it(
    run_of: Callable[[str], Path], objective: str, scored: list[int], written: list[int]
) -> None:
    arm, *others = arms_of(run_of(objective), [1, 4])
    assert (arm.name, arm.scored, arm.written) == (objective, scored, written)
    assert arms_of(arm.model, [1, 4])[0].name == "model"
    assert arm.published == bool(others) == (objective == "paper")
    for other in others:
        assert load_config(other.model).objective.readout_quantile == 1 and not other.published
        assert (other.name, other.scored, other.written) == ("paper-at-sigma-max", scored, written)


class Commands:
    """Stands in for `rdlm`: notes each command, writes what it would, and fails at ``broken``."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.broken = ""

    def __call__(self, arguments: Sequence[str], log: Path) -> None:
        options = dict(zip(arguments[2::1], arguments[3::1], strict=False))
        self.seen.append(arguments[1])
        if arguments[1] == self.broken:
            raise quality.subprocess.CalledProcessError(2, list(arguments))
        if arguments[1] == "lm-eval":
            for k in map(int, options["--num-steps"].split(",")):
                report = {
                    "results": {},
                    "config": {"num_steps": k},
                    "configs": {"metadata": options["--blimp"]},
                    "pretty_env_info": "x",
                }
                file = Path(options["--output_path"]) / "model" / f"results_{k}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(report))
        elif arguments[1] == "report":
            Path(options["--out"]).mkdir(parents=True)
            (Path(options["--out"]) / "mauve-1.png").write_bytes(b"PNG")
        else:
            Path(options["--out"]).write_text("{}")


def test_parts_run_once_and_keep_no_folder_of_the_machine(
    run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, out = Commands(), tmp_path / "out"
    monkeypatch.setattr(quality, "run_rdlm", commands)
    runs = [str(run_of(name)) for name in ("next_token", "bptt")]
    arguments = [
        *runs,
        "--data",
        "d",
        "--blimp",
        "/far/blimp",
        "--out",
        str(out),
        "--root",
        str(tmp_path / "r"),
        "--steps",
        "1,4",
    ]
    app = quality.typer.Typer()
    app.command()(quality.main)
    commands.broken = "mauve"
    failed = CliRunner().invoke(app, [*arguments, "--jobs", "1"])
    assert failed.exit_code == 1 and "report" not in commands.seen and "ended with 2" in failed.output
    assert sorted(commands.seen) == sorted(
        ["gen-ppl", "mauve", "lm-eval", "nll"] * 2
    )  # the others were not held up
    commands.broken, commands.seen = "", []
    assert CliRunner().invoke(app, [*arguments, "--jobs", "1"]).exit_code == 0
    assert commands.seen == ["mauve", "mauve", "report"]
    written = {f"{part}-{arm}.json" for part in ("gen-ppl", "mauve", "nll") for arm in ("next_token", "bptt")}
    written |= {"blimp-next_token-k1.json", "blimp-bptt-k1.json", "blimp-bptt-k4.json", "mauve-1.png"}
    assert {file.name for file in out.iterdir()} == written
    assert json.loads((out / "blimp-bptt-k4.json").read_text()) == {"results": {}, "config": {"num_steps": 4}}


def test_the_table_puts_every_figure_of_a_k_on_one_row() -> None:
    def of(kind: str, report: dict[str, Any]) -> dict[str, Any]:
        return {"kind": kind, "report": {"checkpoint": {"name": "a"}, **report}}

    at = [
        {"num_steps": 1, "perplexity": 90.2, "interval": [80, 99]},
        {"num_steps": 4, "perplexity": None, "interval": None},
    ]
    scores = {
        "groups": {"blimp_local": {"acc,none": 0.6, "acc_stderr,none": 0.01}},
        "config": {"checkpoint": "a", "num_steps": 4},
    }
    sections = [
        {
            "title": "MAUVE",
            "tables": [{"headers": ["run", "K"], "rows": [["a", "1"]], "note": "as measured"}],
        },
        {
            "title": "lm-eval",
            "tables": [
                {"headers": ["run", "task"], "rows": [["a", "blimp_local"], ["a", "blimp_x"]], "note": ""}
            ],
        },
        {"title": "Provenance", "tables": [{"headers": ["run"], "rows": [["hidden"]], "note": ""}]},
    ]
    text = tables.quality({
        "runs": [
            of("nll", {"results": [{"K": k, "nll": 4.0, "nll_interval": [3.9, 4.1]} for k in (1, 4)]}),
            of("gen-ppl", {"at_human_distinct_2": {"t": at}}),
            of("mauve", {"results": [{"num_steps": 1, "value": 0.5, "interval": [0.4, 0.6]}]}),
            of("lm-eval", scores),
        ],
        "sections": sections,
    })  # fmt: skip
    rows = text.splitlines()
    assert rows[2] == "| a | 1 | 4.000 [3.900, 4.100] | 90 [80, 99] | 0.500 [0.400, 0.600] |  |"
    assert rows[3] == "| a | 4 | 4.000 [3.900, 4.100] | not reached |  | 0.600 [0.580, 0.620] |"
    assert "as measured" in text and "blimp_x" not in text and "hidden" not in text
