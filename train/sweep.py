"""``rdlm sweep``: many runs with one budget, each in processes of its own through `rdlm train`, and one report.

A sweep is a YAML file: a training config, what its arms change in it, seeds, and a budget (updates, tokens, FLOPs
or seconds) that every run gets. Nothing here trains or measures: it writes configs, starts `rdlm train` and
`rdlm eval`, and remembers in files what is done, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from rdlm.atomic import write_file
from rdlm.checkpoints.folder import CONFIG, load_config
from rdlm.config.base import Strict, parse
from rdlm.errors import UserError
from train.config_file import changed, load, read_yaml
from train.process import LAUNCHER, launcher_name, stop_signals
from train.settings import FolderPath, TrainConfig

_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")
CALIBRATION = {
    "schedule.steps": 24,
    "log.interval_steps": 1,
    "evaluation.interval_steps": 0,
    "samples.interval_steps": 0,
}
"""A calibrating run, for budgets in seconds."""
UNMEASURED = 4
"""Its first updates, which warm up."""
MAX_RUNS = 4096
"""Most runs of a sweep: more would be a mistake in its grid."""
PROGRESS_SECONDS = 30.0
"""Between two lines about a run that trains."""


class BudgetConfig(Strict):
    """What every run gets; exactly one of them."""

    updates: int | None = Field(None, ge=1)
    tokens: float | None = Field(None, gt=0)
    flops: float | None = Field(None, gt=0)
    """Budget in FLOPs of the model, forward and backward, all processes together (train/cost.py)."""
    seconds: float | None = Field(None, gt=0)
    """On a CPU seconds of CPU time, else of the clock, at the rate that a short run of the arm was measured
    at: a machine that is slow for a while takes no updates from a run."""

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("give exactly one of updates, tokens, flops and seconds")
        return self

    @property
    def unit(self) -> str:
        return next(iter(self.model_dump(exclude_none=True)))

    @property
    def amount(self) -> float:
        return float(next(iter(self.model_dump(exclude_none=True).values())))


DECIDED = {
    "seed": "seeds",
    "name": "name of the sweep",
    "output": "output of the sweep",
    "schedule.steps": "budget",
}
"""Field of a run -> what says it in a sweep."""


class SweepConfig(Strict):
    """The YAML file of a sweep."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    output: FolderPath
    base: dict[str, Any] | str
    """A training config without name, output, seed and schedule.steps, or the path of one from this file. A
    number of updates may be a share of the run: ``warmup_steps: 5%``."""
    budget: BudgetConfig
    seeds: tuple[int, ...] = (0,)
    arms: dict[str, dict[str, Any]] = {"base": {}}
    """Name -> what it changes: ``objective.depth.grad_steps: 4``; a section replaces the base's."""
    grid: dict[str, tuple[Any, ...]] = {}
    """Field -> values; every arm runs at every combination."""
    evaluate: dict[str, str] = {}
    """Name -> a command of `rdlm eval` on every trained model, with {model}, {data} and {out} in it:
    ``nll --checkpoint {model} --data {data} --num-steps 1,4 --out {out}.json``."""
    num_procs: int = Field(1, ge=1)
    """Processes of a run."""
    jobs: int = Field(1, ge=1)
    """Runs at a time."""

    @model_validator(mode="after")
    def _something(self) -> SweepConfig:
        if not self.arms or not self.seeds:
            raise ValueError("a sweep needs at least one of arms and of seeds")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} name one twice; give each once")
        if empty := [field for field, values in self.grid.items() if not values]:
            raise ValueError(f"grid.{empty[0]} has no values; give some, or drop it")
        return self

    @model_validator(mode="after")
    def _own_fields(self) -> SweepConfig:
        """What a sweep decides for every run, arms and grid cannot."""
        for where, changes in [
            *((f"arms.{arm}", given) for arm, given in self.arms.items()),
            ("grid", self.grid),
        ]:
            steps = isinstance(section := changes.get("schedule"), dict) and "steps" in section
            own = (name for name in DECIDED for key in changes if f"{key}.".startswith(f"{name}."))
            decided = next(own, "schedule.steps" if steps else None)
            if decided is not None:
                raise ValueError(f"{where}: {decided} is decided by the sweep; use {DECIDED[decided]}")
        return self

    @model_validator(mode="after")
    def _placeholders(self) -> SweepConfig:
        for name, command in self.evaluate.items():
            try:
                command.format(model="", data="", out="")
            except (KeyError, IndexError, ValueError, AttributeError):
                raise ValueError(
                    f"evaluate.{name}: only {{model}}, {{data}} and {{out}} may stand in braces"
                ) from None
            if not re.fullmatch("[A-Za-z0-9._ -]+", name) or not name.strip(". "):
                raise ValueError(
                    f"evaluate.{name}: it names a file; write letters, digits and - for its name"
                )
            try:
                words = shlex.split(command)
            except ValueError as error:  # a quote that is not closed
                raise ValueError(f"evaluate.{name}: {error}; close it") from None
            if not words:
                raise ValueError(f"evaluate.{name}: there is no command; write for instance `nll ...`")
        return self


@dataclass(frozen=True)
class Run:
    """One training run of a sweep."""

    arm: str
    """Its name in tables: the arm's and what the grid changes."""
    seed: int
    document: dict[str, Any]
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def output(self) -> Path:
        return self.folder / "run"

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> tuple[SweepConfig, dict[str, Any]]:
    """The sweep and its base config. UserError for anything that is wrong with either."""
    where = f"{path} or in an override" if overrides else str(path)
    sweep: SweepConfig = parse(SweepConfig, changed(read_yaml(path), overrides), where)
    base = read_yaml(path.parent / sweep.base) if isinstance(sweep.base, str) else sweep.base
    for name in ("name", "output", "seed"):
        base.pop(name, None)
    return sweep, base


def runs_of(sweep: SweepConfig, base: Mapping[str, Any]) -> list[Run]:
    """Every arm at every point of the grid with every seed; schedule.steps is still open."""
    count = len(sweep.arms) * prod(map(len, sweep.grid.values())) * len(sweep.seeds)
    if count > MAX_RUNS:
        problem = f"with arms and seeds these are {count:,} runs, more than {MAX_RUNS:,}"
        raise UserError("grid", list(sweep.grid), problem, "give fewer values, or split the sweep")
    found = []
    for arm, changes in sweep.arms.items():
        for values in product(*sweep.grid.values()):
            point = dict(zip(sweep.grid, values, strict=True))
            name = ", ".join([arm, *(f"{key}={value}" for key, value in point.items())])
            for seed in sweep.seeds:
                document = with_changes(base, {**changes, **point, "seed": seed, "name": _slug(name)})
                folder = Path(sweep.output) / "runs" / f"{_slug(name)}-seed{seed}"
                document["output"] = str(folder / "run")
                found.append(Run(name, seed, document, folder))
    folders: dict[Path, Run] = {}
    for run in found:
        if (other := folders.setdefault(run.folder, run)) is not run:
            problem = f"would share the folder {run.folder.name} with {other.label!r}"
            raise UserError("arms", run.label, problem, "give each a name of its own in letters and digits")
    return found


def with_changes(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with ``section.field`` set to each value."""
    made = deepcopy(dict(document))
    for key, value in changes.items():
        *parents, last = key.split(".")
        below = made
        for parent in parents:
            if isinstance(below.get(parent), str):  # objective: bptt
                below[parent] = {"name": below[parent]}
            below = below.setdefault(parent, {})
            if not isinstance(below, dict):
                raise UserError(
                    f"arms: {key}", value, f"{parent} holds a value, not a section", "correct the key"
                )
        below[last] = deepcopy(value)
    return made


def resolved(run: Run, updates: int) -> dict[str, Any]:
    """The run's config with its number of updates, and shares of it as numbers."""

    def number(found: Any) -> Any:
        if isinstance(found, dict):
            return {key: number(value) for key, value in found.items()}
        if isinstance(found, list):
            return [number(value) for value in found]
        share = _SHARE.fullmatch(found) if isinstance(found, str) else None
        return found if share is None else max(1, round(updates * float(share[1]) / 100))

    document: dict[str, Any] = number(run.document)
    schedule = document.setdefault("schedule", {})
    if not isinstance(schedule, dict):
        raise UserError(
            "schedule", schedule, "it holds a value, not a section", "write for instance kind: cosine"
        )
    schedule["steps"] = updates
    return document


def checked(run: Run, updates: int, final: bool = True) -> TrainConfig:
    """Write the run's config and read it as `rdlm train` does. UserError names the arm. final: whether the
    number of updates is the run's, and not one that is only tried."""
    from ruamel.yaml import YAML

    from train.pretrain import check

    run.folder.mkdir(parents=True, exist_ok=True)
    new, temporary = resolved(run, updates), run.folder / ".config.yaml"
    with temporary.open("w", encoding="utf-8") as stream:
        YAML(typ="safe", pure=True).dump(new, stream)
    try:
        config = load(temporary)
        check(config, 1)
    except UserError as error:
        raise UserError(f"{run.arm}: {error.field}", error.value, error.problem, error.remedy) from None
    if not final:
        temporary.unlink()
        return config
    if (
        run.output.is_dir()
        and run.config_file.is_file()
        and read_yaml(run.config_file) != read_yaml(temporary)
    ):
        problem = f"{run.folder} holds a run of this name with other settings"
        remedy = f"remove that folder, or change {run.config_file} back, or set another output"
        raise UserError("output", str(run.folder), problem, remedy)
    temporary.replace(run.config_file)
    return config


def updates_of(sweep: SweepConfig, run: Run, seconds_per_update: Callable[[Run], float]) -> int:
    """How many updates the budget is for this run; at least one."""
    budget, amount = sweep.budget, sweep.budget.amount
    if budget.unit == "updates":
        return int(amount)
    config = checked(run, 1000, final=False)
    if budget.unit == "tokens":
        return max(1, int(amount / (config.batch.global_size * config.seq_len)))
    if budget.unit == "seconds":
        return max(1, int(amount / seconds_per_update(run)))
    from train.cost import updates_within

    found, last = 1000, 0
    for _ in range(6):  # a curriculum that is a share of the run makes its cost depend on its length
        last, found = found, max(1, updates_within(checked(run, found, final=False), amount))
        if found == last:
            break
    return found


class Commands:
    """Child processes, at most ``jobs`` at a time; a signal ends them, and they save what they have."""

    def __init__(self, jobs: int) -> None:
        self.jobs, self.signal = jobs, 0
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def rdlm(
        self, arguments: Sequence[str], log: Path | None, meanwhile: Callable[[], None] = lambda: None
    ) -> int:
        """`rdlm ARGUMENTS` with its output in ``log``, or on the terminal -> exit status. meanwhile: called now
        and then."""
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, LAUNCHER: launcher_name()}
        with nullcontext() if log is None else log.open("ab") as stream:
            with self._lock:
                if self.signal:
                    return 128 + self.signal
                child = subprocess.Popen(
                    [sys.executable, "-m", "rdlm", *arguments], stdin=subprocess.DEVNULL, stdout=stream,
                    stderr=stream, env=environment
                )  # fmt: skip
                self._alive.add(child)
            while True:
                try:
                    status = child.wait(PROGRESS_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    meanwhile()
            with self._lock:
                self._alive.discard(child)
        return status

    def stop(self, number: int, _: object = None) -> None:
        self.signal = number
        for child in list(self._alive):
            child.send_signal(signal.SIGTERM)

    @contextmanager
    def until_signal(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.stop) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Sweeper:
    """Runs what is missing of a sweep."""

    sweep: SweepConfig
    base: dict[str, Any]
    say: Callable[[str], None]
    commands: Commands = field(init=False)

    def __post_init__(self) -> None:
        self.commands = Commands(self.sweep.jobs)
        self.output = Path(self.sweep.output)

    def plan(self, dry: bool = False) -> list[tuple[Run, TrainConfig]]:
        """Every run with its number of updates, checked. UserError before anything trains. dry: measure nothing,
        and leave out runs whose updates a measurement would have to say."""
        planned, updates = [], {}
        for run in runs_of(self.sweep, self.base):
            if dry and self.sweep.budget.unit == "seconds" and run.arm not in self._calibrated():
                checked(run, 1000, final=False)
                self.say(
                    f"{run.label}: {self.sweep.budget.amount:,.0f} s; updates are measured before it trains"
                )
                continue
            if run.arm not in updates:  # seeds of an arm get equal numbers
                updates[run.arm] = updates_of(self.sweep, run, self.seconds_per_update)
            config = checked(run, updates[run.arm])
            planned.append((run, config))
            self.say(f"{run.label}: {config.schedule.steps:,} updates")
        return planned

    def seconds_per_update(self, run: Run) -> float:
        """Measured by a short run of the arm; kept in calibration.json for all later calls."""
        known = self._calibrated()
        if run.arm not in known:
            folder = self.output / "calibration" / _slug(run.arm)
            shutil.rmtree(folder, ignore_errors=True)  # clocks of an interrupted one begin anew
            document = with_changes(run.document, {**CALIBRATION, "output": str(folder / "run")})
            short = Run(run.arm, run.seed, document, folder)
            steps = int(CALIBRATION["schedule.steps"])
            checked(short, steps)
            self.say(f"{run.arm}: measuring {steps} updates")
            self._train(short, steps)
            records = _records(short)
            clock = "cpu_seconds" if _on_cpu() else "seconds"
            first, last = records[UNMEASURED - 1], records[-1]
            known[run.arm] = (last[clock] - first[clock]) / (last["step"] - first["step"])
            write_file(self._calibration, json.dumps(known, indent=1) + "\n")
        return known[run.arm]

    @property
    def _calibration(self) -> Path:
        return self.output / "calibration.json"

    def _calibrated(self) -> dict[str, float]:
        """Seconds of an update of the arms that were measured."""
        known: dict[str, float] = {}
        return (
            json.loads(self._calibration.read_text(encoding="utf-8"))
            if self._calibration.is_file()
            else known
        )

    def run(self, planned: Sequence[tuple[Run, TrainConfig]]) -> list[str]:
        """Train and evaluate what is not finished -> what failed."""
        self._write_plan(planned)
        failed: list[str] = []
        done: list[str] = []

        def one(run: Run, config: TrainConfig) -> None:
            try:
                if not is_finished(run, config):
                    for measured in run.folder.glob("eval-*.done"):  # of a model that is trained again
                        measured.unlink()
                    self.say(f"{run.label}: training")
                    self._train(run, config.schedule.steps)
                self._evaluate(run.folder, run.output / "model", _data_of(config))
                done.append(run.label)
                self.say(f"{run.label}: done ({len(done)} of {len(planned)})")
            except _Failed as error:
                failed.append(f"{run.label}: {error}")

        with self.commands.until_signal(), ThreadPoolExecutor(self.sweep.jobs) as pool:
            for future in [pool.submit(one, *each) for each in planned]:
                future.result()
            for source, (folder, config) in self._starts(planned).items():
                try:
                    self._evaluate(folder, self._exported(source, folder), _data_of(config))
                except _Failed as error:
                    failed.append(f"before training, {source}: {error}")
        return failed

    def report(self) -> Path:
        """results.json and the report of everything that is there."""
        if not (self.output / "plan.json").is_file():
            problem, remedy = "holds no run of this sweep", "run the same command without --report first"
            raise UserError("--report", str(self.output), problem, remedy)
        results, log = self.output / "results.json", self.output / "log.txt"
        out, title = self.output / "report", f"Sweep {self.sweep.name}"
        steps: list[list[str]] = [["sweep", "--folder", str(self.output), "--out", str(results)]]
        steps.append(["report", str(results), "--out", str(out), "--title", title])
        for name in self.sweep.evaluate:  # evaluations may be of different data, which one table cannot hold
            files = [
                str(file)
                for file in sorted(self.output.glob(f"runs/*/eval-{_slug(name)}.json"))
                if "evaluation" in file.read_text(encoding="utf-8")[:4096]
            ]
            if files:
                place = str(out / _slug(name))
                steps.append(["report", *files, "--out", place, "--title", f"{title}: {name}"])
        for number, arguments in enumerate(steps):  # the tables of the first are shown
            if self.commands.rdlm(["eval", *arguments], log if number else None):
                where = f"; see {log}" if number else ""
                raise UserError("report", str(out), f"was not written{where}", "correct it and run again")
        return out / "report.html"

    def _train(self, run: Run, updates: int) -> None:
        def progress() -> None:
            if records := _records(run):
                step, loss = records[-1]["step"], records[-1].get("loss")
                self.say(f"{run.label}: step {step:,}/{updates:,}" + (f", loss {loss:.3f}" if loss else ""))

        status = self.commands.rdlm(
            ["train", str(run.config_file), "--num-procs", str(self.sweep.num_procs)],
            run.folder / "log.txt",
            progress,
        )
        if status:
            raise _Failed(f"training ended with status {status}; see {run.folder / 'log.txt'}")

    def _evaluate(self, folder: Path, model: Path, data: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, command in self.sweep.evaluate.items():
            done = folder / f"eval-{_slug(name)}.done"
            filled = command.format(model=model, data=data, out=folder / f"eval-{_slug(name)}")
            if done.is_file() and done.read_text(encoding="utf-8") == filled:
                continue
            if status := self.commands.rdlm(["eval", *shlex.split(filled)], folder / "log.txt"):
                raise _Failed(f"evaluation {name} ended with status {status}; see {folder / 'log.txt'}")
            write_file(done, filled)

    def _starts(self, planned: Sequence[tuple[Run, TrainConfig]]) -> dict[Path, tuple[Path, TrainConfig]]:
        """Checkpoints that runs start from, with the folder of their measurements: they are evaluated as they are,
        before training."""
        found: dict[Path, tuple[Path, TrainConfig]] = {}
        for _, config in planned:
            if config.init_from is not None:
                folder = self.output / "runs" / f"start-{len(found)}"
                found.setdefault(_started_from(config.init_from), (folder, config))
        return found

    def _exported(self, source: Path, folder: Path) -> Path:
        """The model folder of what runs start from, which may be a training checkpoint."""
        if (source / CONFIG).is_file():
            return source
        folder.mkdir(parents=True, exist_ok=True)
        model, log = folder / "model", folder / "log.txt"
        if not model.is_dir() and (status := self.commands.rdlm(["export", str(source), str(model)], log)):
            raise _Failed(f"export ended with status {status}; see {log}")
        return model

    def _write_plan(self, planned: Sequence[tuple[Run, TrainConfig]]) -> None:
        """What `rdlm eval sweep` reads."""
        from train.cost import update_flops

        flops: dict[str, float] = {}
        for run, config in planned:
            if run.arm not in flops:
                cost = update_flops(config)
                flops[run.arm] = sum(cost(step) for step in range(config.schedule.steps))
        starts = {
            source: str(folder.relative_to(self.output))
            for source, (folder, _) in self._starts(planned).items()
        }
        rows = [
            {
                "arm": run.arm, "seed": run.seed, "folder": str(run.folder.relative_to(self.output)),
                "updates": config.schedule.steps,
                "tokens": config.schedule.steps * config.batch.global_size * config.seq_len,
                "flops": flops[run.arm],
                "start": None if config.init_from is None else starts[_started_from(config.init_from)],
            }
            for run, config in planned
        ]  # fmt: skip
        document = {
            "name": self.sweep.name, "budget": self.sweep.budget.model_dump(exclude_none=True),
            "data": _data_of(planned[0][1]),
            "evaluations": {_slug(name): name for name in self.sweep.evaluate}, "runs": rows,
            "starts": [{"source": str(source), "folder": folder} for source, folder in starts.items()],
        }  # fmt: skip
        write_file(self.output / "plan.json", json.dumps(document, indent=1) + "\n")


def _started_from(init_from: str) -> Path:
    """The model folder that init_from names."""
    source = Path(init_from)
    return source / "model" if (source / "model").is_dir() else source


class _Failed(Exception):
    """A child process ended with another status than 0."""


def is_finished(run: Run, config: TrainConfig) -> bool:
    """Whether the run has made all its updates and written its model."""
    try:
        return load_config(run.output / "model").step >= config.schedule.steps
    except UserError:  # no model yet; one that a stopped run has left counts fewer updates
        return False


def _records(run: Run) -> list[dict[str, Any]]:
    from train.metrics import read

    return read(run.output / "metrics.jsonl")


def _data_of(config: TrainConfig) -> str:
    return config.data.folder


def _on_cpu() -> bool:
    from train.process import device_kind

    return device_kind() == "cpu"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")
