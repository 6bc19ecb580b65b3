"""Tasks of lm-evaluation-harness, in process.

EleutherAI's own command line with the model ``rdlm`` in it, and its results in a report.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import typer

from eval.metric import Json, Metric, Picture, Run, Section, Table, check_equal
from eval.options import steps_given
from eval.plots import Row, against_k
from eval.stats import Pair, difference, mover, with_interval
from rdlm.command_line import new_app
from rdlm.errors import UserError

TASKS = Path(__file__).parents[1] / "texts" / "tasks"
COMMANDS = ("run", "ls", "validate")
"""Commands of lm_eval itself."""


def with_model(arguments: list[str]) -> list[str]:
    """lm_eval's own default is a Hugging Face model; here it is ours, unless the arguments or a config
    file name another."""
    named = any(
        item.partition("=")[0] in ("--model", "-M", "--config", "-C", "--help", "-h") for item in arguments
    )
    runs = bool(arguments) and (arguments[0] == "run" or arguments[0].startswith("-"))
    return [*arguments, "--model", "rdlm"] if runs and not named else arguments


def with_checkpoint(arguments: list[str]) -> list[str]:
    """A first word that is no command of lm_eval is the checkpoint, as in the other commands."""
    if not arguments or arguments[0].startswith("-") or arguments[0] in COMMANDS:
        return arguments
    given, rest = f"checkpoint={arguments[0]}", arguments[1:]
    if "--model_args" not in rest:
        return ["--model_args", given, *rest]
    place = rest.index("--model_args") + 1
    return [*rest[:place], ",".join([given, *rest[place : place + 1]]), *rest[place + 1 :]]


def taken_out(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    """The arguments without ``name VALUE`` or ``name=VALUE``, and the value: "" where it is missing, None
    where the name is."""
    rest, value = [], None
    items = iter(arguments)
    for item in items:
        if item == name or item.startswith(f"{name}="):
            value = item.partition("=")[2] or next(items, "")
        else:
            rest.append(item)
    return rest, value


def expand_blimp(arguments: list[str], together: Path | None = None) -> list[str]:
    """``--blimp FOLDER`` in lm_eval's terms: our task folder as --include_path, the data folder as
    metadata of the tasks.

    lm_eval takes one --include_path: where the arguments name one too, ``together`` becomes a folder of
    links to both.
    """
    rest, folder = taken_out(arguments, "--blimp")
    if folder is None:
        return rest
    if not folder or not Path(folder).is_dir():
        raise UserError("--blimp", folder, "is not a folder", "give the folder of BLiMP's 67 JSONL files")
    rest, own = taken_out(rest, "--include_path")
    tasks = TASKS
    if own is not None:
        if not own or not Path(own).is_dir():
            raise UserError("--include_path", own, "is not a folder", "give the folder of your tasks")
        tasks = together or Path(tempfile.mkdtemp(prefix="rdlm-tasks-"))
        for name, source in (("blimp", TASKS), ("own", Path(own).resolve())):
            shutil.copytree(source, tasks / name, copy_function=os.symlink)
    run = [] if rest[:1] == ["run"] else ["run"]
    return [*run, *rest, "--include_path", str(tasks), "--metadata", json.dumps({"blimp": folder})]


class LmEval(Metric):
    """lm-eval on a checkpoint in process: every argument is lm_eval's own, the model is `rdlm` unless
    another is named.

    Two are ours: --blimp FOLDER (local BLiMP files) and --num-steps 1,4,8 (a run for each K, scored in one
    pass).
    """

    name = "lm-eval"
    place = 40
    example = "rdlm eval lm-eval runs/demo/model --num-steps 8 --blimp FOLDER --tasks blimp_local"

    def command(self) -> typer.Typer:
        """Hands every argument over, --help included."""

        def command(context: typer.Context) -> None:
            self.run(context.args)

        app = new_app()
        passing = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
        app.command(self.name, help=self.__doc__, context_settings=passing)(command)
        return app

    def run(self, given: list[str]) -> None:
        """Run lm_eval, which prints and writes its results itself."""
        arguments, steps = taken_out(with_checkpoint(given), "--num-steps")
        ks = steps_given(steps)
        try:
            from eval.texts.lm_eval_adapter import run, run_sweep
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in ("lm_eval", "datasets"):
                raise
            raise UserError(
                "rdlm eval lm-eval",
                missing,
                "is not installed",
                "run `pip install 'lm-eval[api]==0.4.13' datasets`",
            ) from error
        with tempfile.TemporaryDirectory(prefix="rdlm-tasks-") as together:
            arguments = with_model(expand_blimp(arguments, Path(together)))
            if ks is None:
                run(arguments)
            else:
                run_sweep(arguments, ks)

    def label(self, report: Json) -> str:
        config = report["config"]
        k = "" if config.get("num_steps") is None else f" K = {config['num_steps']}"
        return f"{config.get('checkpoint') or report.get('model_name', config.get('model'))}{k}"

    def check_alike(self, first: Run, run: Run) -> None:
        """Shared tasks have the same version, number of shots and number of documents."""
        for task in sorted(first.report["results"].keys() & run.report["results"].keys()):
            facts = []
            for name in ("versions", "n-shot", "n-samples"):
                here, there = (each.report.get(name, {}).get(task) for each in (run, first))
                facts.append((f"{task}: {name}", here, there))
            check_equal(run, first, facts)

    def origin(self, report: Json) -> list[str]:
        config = report["config"]
        names = ("model_seed", "random_seed", "numpy_seed", "torch_seed")
        seeds = ", ".join(str(config.get(name)) for name in names)
        command = (
            f"lm_eval {report['lm_eval_version']}: --model {config.get('model')} --model_args "
            f"{config.get('model_args')}"
        )
        weights = str(config.get("weights_sha256"))[:12]
        return [command, str(report.get("git_hash")), seeds, weights, "by task", config.get("machine", "")]

    def section(self, runs: list[Run]) -> Section:
        first, rows = runs[0], []
        for run in runs:
            for task, metrics in run.report["results"].items():
                for name, value in metrics.items():
                    if "_stderr" in name or "," not in name or not isinstance(value, int | float):
                        continue
                    rows.append([run.label, task, name.partition(",")[0], *_cells(run, first, task, name)])
        about = (
            "lm-evaluation-harness; the interval is 1.96 standard errors. Estimators: "
            + "; ".join(
                f"{run.label}: {run.report['config'].get('estimator', 'that of the server')}" for run in runs
            )
            + ". Documents without a unique best choice count for the first one: "
            + ", ".join(
                f"{run.label} {run.report['config'].get('tied_documents', 'unknown')}" for run in runs
            )
            + "."
        )
        table = Table(["run", "task", "metric", "value [95 %]", f"against {first.label}"], rows)
        return Section("lm-eval", about, [table, *_against_k(runs)])


def _against_k(runs: list[Run]) -> list[Picture]:
    """The groups of tasks (or, without groups, the tasks) against K, where some checkpoint was run at more
    than one."""
    curves: dict[tuple[str, str, str], list[Row]] = {}
    for run in runs:
        config, groups = run.report["config"], run.report.get("groups") or run.report["results"]
        for task, metrics in groups.items():
            for name in metrics:
                found = _score(run, task, name)
                if found is not None and config.get("num_steps") is not None:
                    row = {"K": config["num_steps"], "value": found[0], "value_interval": found[1]}
                    key = (str(config.get("checkpoint")), task, name.partition(",")[0])
                    curves.setdefault(key, []).append(row)
    if not any(len(rows) > 1 for rows in curves.values()):
        return []
    named = {" ".join(key): sorted(rows, key=lambda r: r["K"]) for key, rows in curves.items()}
    return [Picture(against_k(named, "score"), "Scores against K")]


def _cells(run: Run, first: Run, task: str, name: str) -> list[str]:
    mine, other = (_score(each, task, name) for each in (run, first))
    shown = f"{run.report['results'][task][name]:.4f}" if mine is None else with_interval(*mine, ".4f")
    return [
        shown,
        "" if run is first or mine is None or other is None else difference(*mover(mine, other), "+.4f"),
    ]


def _score(run: Run, task: str, name: str) -> Pair | None:
    """A score and its interval; None where lm-eval gives no standard error."""
    metrics = run.report["results"].get(task, {})
    error = metrics.get(name.replace(",", "_stderr,"))
    if name not in metrics or "_stderr" in name or not isinstance(error, int | float):
        return None
    return metrics[name], [metrics[name] - 1.96 * error, metrics[name] + 1.96 * error]
