"""Sweeps: what a run gets of a budget, what is run again and what is not, and what the report says."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import train.sweep
from eval.metrics.sweep import Sweep, k_curves
from rdlm import cli
from rdlm.checkpoints import folder
from rdlm.config.base import parse
from rdlm.data.batch import Batch
from rdlm.errors import UserError
from rdlm.objectives.base import Keys
from rdlm.objectives.depth import drawn_depths
from rdlm.registry import build
from train.config_file import load
from train.cost import update_flops, updates_within
from train.process import lock_output
from train.settings import TrainConfig
from train.sweep import Sweeper, read_sweep

BASE: dict[str, Any] = {
    "model": {"family": "huginn", "vocab_size": 8, "d_model": 32, "num_heads": 2, "mlp_width": 48, "max_seq_len": 32},
    "data": {"kind": "group_product", "group": "s3", "length": 12}, "batch": {"global_size": 4},
    "optimizer": {"lr": 0.01}, "schedule": {"kind": "cosine", "warmup_steps": "10%"},
}  # fmt: skip


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Path]:
    """``sweep(arms=...)`` -> the YAML file of a sweep over BASE."""

    def write(**changes: Any) -> Path:
        document = {
            "name": "test",
            "output": str(tmp_path / "out"),
            "base": BASE,
            "budget": {"updates": 40},
            **changes,
        }
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
        return tmp_path / "sweep.yaml"

    return write


def planned(file: Path) -> list[Any]:
    return Sweeper(*read_sweep(file), lambda line: None).plan()


def test_every_arm_meets_every_point_of_the_grid_with_every_seed(sweep: Callable[..., Path]) -> None:
    arms = {
        "plain": {"objective": "next_token"},
        "loop": {"objective": "bptt", "objective.depth": {"mean": 2, "grad_steps": 1}},
    }
    runs = planned(
        sweep(arms=arms, grid={"optimizer.lr": [0.01, 0.02], "batch.global_size": [4]}, seeds=[3, 5])
    )
    assert [(run.arm, run.seed) for run, _ in runs] == [
        (f"{arm}, optimizer.lr={lr}, batch.global_size=4", seed)
        for arm in arms
        for lr in (0.01, 0.02)
        for seed in (3, 5)
    ]
    assert len({run.folder for run, _ in runs}) == len(runs) == 8
    for run, config in runs:
        assert config == load(run.config_file) and config.seed == run.seed
        assert (config.schedule.steps, config.schedule.warmup_steps) == (40, 4)
        assert config.objective.name == ("next_token" if run.arm.startswith("plain") else "bptt")
    assert [config.optimizer.lr for _, config in runs] == [0.01, 0.01, 0.02, 0.02] * 2


def test_budgets_in_tokens_and_flops_are_what_the_runs_get(sweep: Callable[..., Path]) -> None:
    arms = {
        "plain": {"objective": "next_token"},
        "deep": {"objective": {"name": "bptt", "depth": {"mean": 6, "grad_steps": 3}}},
    }
    tokens = [
        config.schedule.steps for _, config in planned(sweep(arms=arms, budget={"tokens": 4 * 12 * 30 + 5}))
    ]
    assert tokens == [30, 30]
    shutil.rmtree(sweep().parent / "out")
    for run, config in planned(sweep(arms=arms, budget={"flops": 3e9})):
        cost = update_flops(config)
        spent = sum(cost(step) for step in range(config.schedule.steps))
        assert spent <= 3e9 < spent + cost(config.schedule.steps), run.arm


def test_frozen_weights_cost_no_gradient_and_adapters_little(sweep: Callable[..., Path]) -> None:
    """A linear layer takes 2 n operations forward, 2 n for the gradient of its input and 2 n for that of its weight."""
    lora: dict[str, Any] = {"init_from": "x", "lora": {"rank": 1}}
    costs = {
        name: update_flops(
            parse(TrainConfig, {**BASE, "name": "x", "output": "o", "schedule": {"steps": 1}, **changes}, "test")
        )(0)
        for name, changes in {
            "all": {"objective": "next_token"},
            "half": {"objective": "next_token", "optimizer": {"lr": 1, "freeze": ["model.core_block"]}},
            "lora": {"objective": "next_token", **lora},
        }.items()
    }  # fmt: skip
    config = parse(
        TrainConfig,
        {**BASE, "name": "x", "output": "o", "schedule": {"steps": 1}, "objective": "next_token"},
        "test",
    )
    weights = dict(build(config.checkpoint_config, device="meta").named_parameters())
    core = sum(
        weight.numel()
        for name, weight in weights.items()
        if name.startswith("model.core_block") and weight.dim() == 2
    )
    assert costs["all"] - costs["half"] == 4 * 12 * 2 * core
    assert costs["half"] < costs["all"] and 0.6 < costs["lora"] / costs["all"] < 0.9


def test_a_dry_run_measures_nothing(sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget in seconds: arms whose speed is known have their updates, the others have none yet."""
    arms = {"known": {}, "new": {"objective": "next_token"}}
    monkeypatch.setattr(Sweeper, "_train", lambda *_: pytest.fail("a dry run trained"))
    said: list[str] = []
    sweeper = Sweeper(*read_sweep(sweep(arms=arms, budget={"seconds": 30})), said.append)
    sweeper.output.mkdir(parents=True)
    (sweeper.output / "calibration.json").write_text('{"known": 0.5}')
    assert [config.schedule.steps for _, config in sweeper.plan(dry=True)] == [60]
    assert said == ["known, seed 0: 60 updates", "new, seed 0: 30 s; updates are measured before it trains"]
    wrong = sweep(arms={"new": {"optimizer.lr": -1}}, budget={"seconds": 30})
    with pytest.raises(UserError, match="new: .*lr"):
        Sweeper(*read_sweep(wrong), said.append).plan(dry=True)


@pytest.mark.parametrize(
    "objective",
    ["next_token", {"name": "bptt", "depth": {"mean": 5, "grad_steps": 3}},
        {"name": "onestep", "depth": {"per": "sequence", "mean": 4}},
     {"name": "per_step", "depth": {"mean": 5, "grad_steps": 2}}, "single_pass"],
)  # fmt: skip
def test_the_cost_of_an_update_is_that_of_its_own_code(objective: Any) -> None:
    """Counted on tensors without data, at every r of the schedule: what was interpolated is what is counted."""
    config = parse(
        TrainConfig,
        {**BASE, "name": "x", "output": "out", "schedule": {"steps": 9}, "objective": objective},
        "test",
    )
    cost = update_flops(config)
    for step in range(6):
        depths = drawn_depths(config.objective.depth_in_training, Keys(config.seed, step), 4)
        with FlopCounterMode(display=False) as counter:
            network = build(config.checkpoint_config, device="meta")
            network.depths = lambda batch, keys, found=depths: found  # type: ignore[method-assign,assignment,misc]
            mask, ids = (
                torch.ones(4, 12, dtype=torch.bool),
                torch.empty(4, 12, dtype=torch.int64, device="meta"),
            )
            network.loss(Batch(ids, ids, mask.to("meta"), None, mask), Keys(config.seed, 0)).total.backward()
        assert cost(step) == pytest.approx(
            counter.get_total_flops(), rel=1e-6 if objective != "single_pass" else 0.02
        )
    assert updates_within(config, cost(0) + cost(1) + 1) == 2


@pytest.mark.parametrize("budget", [{"updates": 40}, {"tokens": 4 * 12 * 30}, {"flops": 3e8}], ids=str)
def test_a_run_that_began_is_planned_again_and_never_overwritten(
    sweep: Callable[..., Path], budget: dict[str, float]
) -> None:
    [(run, _)] = planned(sweep(budget=budget))
    run.output.mkdir()
    began = run.config_file.read_bytes()
    planned(sweep(budget=budget))
    with pytest.raises(UserError, match="other settings"):
        planned(sweep(budget=budget, arms={"base": {"optimizer.lr": 0.5}}))
    assert run.config_file.read_bytes() == began


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"budget": {"updates": 3, "tokens": 5}}, "exactly one"),
        ({"arms": {"wrong": {"optimizer.lrr": 1}}}, "wrong: .*lrr"),
        (
            {"arms": {"deep": {"objective": {"name": "bptt", "depth": {"mean": 9, "max_steps": 4}}}}},
            "deep: objective.depth.mean",
        ),
        ({"evaluations": {}}, "evaluations"),
    ],
)
def test_mistakes_are_named_before_anything_trains(
    sweep: Callable[..., Path], changes: Any, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        planned(sweep(**changes))


class Commands:
    """Stands in for `rdlm`: notes each command and writes what it would."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.broken: str | None = None
        self.jobs, self.signal, self.keeps_windows = 1, 0, False

    def rdlm(
        self, arguments: Sequence[str], log: Path | None, meanwhile: Callable[[], None] = lambda: None
    ) -> int:
        self.seen.append(
            f"{arguments[0]} {Path(arguments[1]).parent.name if arguments[0] == 'train' else arguments[1]}"
        )
        if self.broken is not None and self.broken in self.seen[-1]:
            return 1
        if arguments[0] == "train":
            config = load(arguments[1])
            output = Path(config.output)
            (output / "model").mkdir(parents=True, exist_ok=True)
            model = config.checkpoint_config.model_copy(update={"step": config.schedule.steps})
            (output / "model" / folder.CONFIG).write_text(model.model_dump_json())
            record = {"step": config.schedule.steps, "loss": 1.0, "seconds": 2.0, "cpu_seconds": 2.0}
            (output / "metrics.jsonl").write_text(json.dumps(record) + "\n")
            held_out = [{"step": step, "K=1": 3.0, "K=4": 2.0 + config.seed} for step in (20, 40)]
            (output / "held_out.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held_out))
            meanwhile()
        elif arguments[1] == "nll":
            options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
            of_run = "seed" in options["--out"]
            seed = int(options["--out"].split("seed")[1][0]) if of_run else 2
            rows = [
                {"K": k, "nll": 3.0 - k / 10 + seed, "nll_interval": [0, 9], "estimator": "normalised"}
                for k in (1, 4)
            ]
            report = {"evaluation": "nll", "results": rows, **self.windows(rows)}
            Path(options["--out"]).write_text(json.dumps(report))
        return 0

    def windows(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Nats of 6 windows, which differ from each other by much and between models and K by nothing more than
        their means."""
        if not self.keeps_windows:
            return {}
        nats = {str(row["K"]): [10 * (row["nll"] + n - 2.5) for n in range(6)] for row in rows}
        return {"window_nll": nats, "window_tokens": [10] * 6}

    def until_signal(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def test_a_long_command_is_asked_about_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train.sweep, "PROGRESS_SECONDS", 0.01)
    asked: list[int] = []
    status = train.sweep.Commands(1).rdlm(["--version"], tmp_path / "log.txt", lambda: asked.append(1))
    assert train.sweep.Commands(1).rdlm(["--version"], None) == 0
    assert capfd.readouterr().out.startswith("rdlm ")
    assert status == 0 and asked and (tmp_path / "log.txt").read_text().startswith("rdlm ")


def test_finished_runs_are_not_run_again_and_a_failed_one_holds_up_no_other(
    sweep: Callable[..., Path],
) -> None:
    file = sweep(
        arms={"a": {}, "b": {"optimizer.lr": 0.02}}, seeds=[0, 1],
        evaluate={"held out": "nll --checkpoint {model} --num-steps 1,4 --out {out}.json"},
    )  # fmt: skip
    said: list[str] = []
    sweeper = Sweeper(*read_sweep(file), said.append)
    with pytest.raises(UserError, match="--report.*without --report first"):
        sweeper.report()
    sweeper.commands = commands = Commands()  # type: ignore[assignment]
    commands.broken = "a-seed1"
    [failed] = sweeper.run(sweeper.plan())
    assert "a, seed 1" in failed and commands.seen.count("eval nll") == 3
    steps = load(sweeper.output / "runs" / "a-seed0" / "config.yaml").schedule.steps
    assert f"a, seed 0: step {steps}/{steps}, loss 1.000" in said
    assert [line for line in said if "done" in line][-1] == "b, seed 1: done (3 of 4)"
    commands.seen, commands.broken = [], None
    assert sweeper.run(sweeper.plan()) == []
    assert commands.seen == ["train a-seed1", "eval nll"]
    commands.seen = []
    assert sweeper.run(sweeper.plan()) == [] and commands.seen == []
    report = Sweep().measure(Sweep.Options(folder=sweeper.output))
    assert [(run["arm"], run["seed"], run["finished"]) for run in report["runs"]] == [
        (arm, seed, True) for arm in "ab" for seed in (0, 1)
    ]
    assert k_curves(report, "held out")["b"][4] == {0: 2.6, 1: 3.6}
    from eval.metric import Run

    section = Sweep().section([Run(file, "sweep", "test", report)])
    table = section.blocks[1]
    assert table.rows[0] == ["a", "3.4000 [2.9000, 3.9000]", "3.1000 [2.6000, 3.6000]"]
    gain, against = section.blocks[2:4]
    assert gain.rows[1] == ["b", "", "-0.3000 [-0.3000, -0.3000]"]  # lowest and highest seed
    assert against.rows == [["b", *["+0.0000 [+0.0000, +0.0000]"] * 2]]
    pictures = [block for block in section.blocks if hasattr(block, "content")]
    assert len(pictures) == 2
    Sweep().plot(report, file.with_suffix(".png"))
    assert file.with_suffix(".png").read_bytes() == pictures[0].content
    with pytest.raises(UserError, match="--plot"):
        Sweep().plot({**report, "runs": [], "starts": []}, file.with_suffix(".png"))


def test_a_model_of_fewer_updates_is_no_finished_run(sweep: Callable[..., Path]) -> None:
    """A stop exports a model; a kill after the last update and before the export leaves it beside a log that is
    complete. What was measured of a model is measured again when it has been trained again."""
    file = sweep(evaluate={"held out": "nll --checkpoint {model} --num-steps 1,4 --out {out}.json"})
    sweeper = Sweeper(*read_sweep(file), lambda line: None)
    sweeper.commands = commands = Commands()  # type: ignore[assignment]
    [(trained, config)] = planned = sweeper.plan()
    assert sweeper.run(planned) == [] and commands.seen == [f"train {trained.folder.name}", "eval nll"]
    model = trained.output / "model" / folder.CONFIG
    stopped = json.loads(model.read_text()) | {"step": config.schedule.steps - 1}
    model.write_text(json.dumps(stopped))
    commands.seen = []
    assert sweeper.run(sweeper.plan()) == [] and commands.seen == [f"train {trained.folder.name}", "eval nll"]


def test_a_second_sweep_in_one_folder_is_one_line(
    sweep: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep()
    held = lock_output(Path(read_sweep(file)[0].output), lambda line: None)
    assert cli.run(cli.app, ["sweep", str(file), "--dry-run"], "rdlm") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "another run is writing there" in error
    held.close()
    assert cli.run(cli.app, ["sweep", str(file), "--dry-run"], "rdlm") == 0


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_sweep_that_is_killed_at_random_points_ends_as_one_that_is_not(
    sweep: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGKILL of the command or of everything, SIGTERM: nobody is left behind, and the same command goes on."""
    draw, models = random.Random(0), {}
    base = {**BASE, "precision": "fp32", "checkpoint": {"interval_steps": 2}}
    for name, kills in (("whole", 0), ("killed", 8)):
        file = sweep(output=str(tmp_path / name), arms={"a": {}, "b": {"optimizer.lr": 0.02}}, base=base)
        for left in range(kills, -1, -1):
            process = subprocess.Popen(
                [sys.executable, "-m", "rdlm", "sweep", str(file)], stderr=subprocess.DEVNULL
            )
            try:
                process.wait(draw.uniform(1, 40) if left else None)
                continue
            except subprocess.TimeoutExpired:
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            number = draw.choice([signal.SIGKILL, signal.SIGTERM])
            for one in draw.choice([family[:1], family]):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(number)
            process.wait(300)
            assert not psutil.wait_procs(family, timeout=60)[1]
        assert process.returncode == 0
        models[name] = [
            load_file(f) for f in sorted((tmp_path / name).glob("runs/*/run/model/model.safetensors"))
        ]
    assert len(models["whole"]) == len(models["killed"]) == 2
    for whole, killed in zip(models["whole"], models["killed"], strict=True):
        assert whole.keys() == killed.keys() and all(torch.equal(whole[k], killed[k]) for k in whole)


def test_differences_are_paired_over_windows_and_name_what_training_changed(
    sweep: Callable[..., Path], tmp_path: Path
) -> None:
    """Windows differ by 5 nats from each other; paired, the differences between models have no spread."""
    start = tmp_path / "start" / "model"
    model = load(planned(sweep())[0][0].config_file).checkpoint_config
    folder.save(start, build(model, seed=0), model, None)
    file = sweep(
        output=str(tmp_path / "from"),
        arms={"a": {}, "b": {"optimizer.lr": 0.02}}, base={**BASE, "init_from": str(start.parent)},
        evaluate={"held out": "nll --checkpoint {model} --num-steps 1,4 --out {out}.json"},
    )  # fmt: skip
    sweeper = Sweeper(*read_sweep(file), lambda line: None)
    sweeper.commands = commands = Commands()  # type: ignore[assignment]
    commands.keeps_windows = True
    assert sweeper.run(sweeper.plan()) == [] and commands.seen.count("eval nll") == 3
    report = Sweep().measure(Sweep.Options(folder=sweeper.output))
    before = "before training, start"
    assert list(k_curves(report, "held out")) == [before, "a", "b"]
    found = {(d["kind"], d["arm"], d["K"]): d for d in report["differences"]["held out"]}
    expected = {("gain", arm, 4): -0.3 for arm in (before, "a", "b")}
    expected |= {("change", arm, k): -2.0 for arm in "ab" for k in (1, 4)}  # the mock's seed 0 against 2
    expected |= {("against", arm, k): value for arm, value in ((before, 2.0), ("b", 0.0)) for k in (1, 4)}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert [found[key]["value"], *found[key]["interval"]] == pytest.approx([value] * 3)
    assert "window_nll" not in json.dumps(report)  # which may be many
    commands.seen = []
    sweeper.report()  # evaluations may be of different data: each has a report of its own
    assert commands.seen == ["eval sweep", "eval report", "eval report"]


def test_runs_from_a_training_checkpoint_have_it_exported_and_measured(
    sweep: Callable[..., Path], tmp_path: Path
) -> None:
    sweeper = Sweeper(*read_sweep(sweep()), lambda line: None)
    sweeper.commands = commands = Commands()  # type: ignore[assignment]
    assert sweeper._exported(tmp_path, tmp_path / "start-0") == tmp_path / "start-0" / "model"
    assert commands.seen == [f"export {tmp_path}"]
    (tmp_path / "config.json").write_text("{}")
    assert sweeper._exported(tmp_path, tmp_path / "start-0") == tmp_path
