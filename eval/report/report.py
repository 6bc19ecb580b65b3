"""One report out of the JSON files that the other commands of ``rdlm eval`` and lm-eval have written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rdlm.errors import UserError

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A file of results, and what it is called in tables."""

    file: Path
    kind: str
    """The command that wrote it: nll, depth, gen-ppl, mauve, ce-by-sigma, convergence, fid or lm-eval."""
    label: str
    report: Json


@dataclass(frozen=True)
class Table:
    """All cells are text; the first column names the row."""

    headers: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG."""

    content: bytes
    caption: str


@dataclass(frozen=True)
class Sample:
    """What each side wrote after one prompt: (who, text) pairs."""

    prompt: str
    answers: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and what follows."""

    title: str
    about: str
    blocks: list[Table | Picture | Sample]


def read_runs(files: Sequence[Path]) -> list[Run]:
    """UserError for a file that is no result. A name that several files of one kind share is told apart by their file names."""
    found = [_read(file) for file in files]
    names = [(run.kind, run.label) for run in found]
    return [
        run
        if names.count((run.kind, run.label)) == 1
        else replace(run, label=f"{run.label} ({_stem(run.file)})")
        for run in found
    ]


def _stem(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def _read(file: Path) -> Run:
    remedy = "give files that `rdlm eval ... --out` or lm-eval's --output_path wrote"
    try:
        report = json.loads(file.read_text())
    except OSError as error:
        raise UserError("RUN", str(file), error.strerror or "cannot be read", remedy) from None
    except ValueError:
        raise UserError("RUN", str(file), "is not JSON", remedy) from None
    if isinstance(report, dict) and report.get("evaluation") in PROTOCOLS:
        return Run(file, report["evaluation"], name_of(report), report)
    if isinstance(report, dict) and "lm_eval_version" in report and "results" in report:
        config = report["config"]
        k = "" if config.get("num_steps") is None else f" K = {config['num_steps']}"
        return Run(
            file,
            "lm-eval",
            f"{config.get('checkpoint') or report.get('model_name', config.get('model'))}{k}",
            report,
        )
    raise UserError(
        "RUN", str(file), "names no evaluation that this version knows", f"{remedy} (of this version)"
    )


def name_of(report: Json) -> str:
    """Of the checkpoint that was measured; of images that no checkpoint drew, their own."""
    return report["checkpoint"]["name"] if "checkpoint" in report else report["results"][0]["images"]["name"]


def _common(report: Json) -> Json:
    data = report["data"]
    return {"data.manifest_sha256": data["manifest_sha256"], "data.split": data["split"]}


def _windows(report: Json) -> Json:
    return {**_common(report), "data.seq_len": report["data"]["seq_len"], "tokens": report["tokens"]}


def _texts(report: Json) -> Json:
    samples = report["samples"]
    return {**_common(report), "prompts": samples["prompts"]["sha256"], "shape": samples["shape"]}


def _judge(teacher: Json) -> str:
    return f"{teacher['name']} {teacher.get('fingerprint')} {teacher.get('dtype')}, window {teacher.get('window')}"


PROTOCOLS: dict[str, Callable[[Json], Json]] = {
    "nll": _windows,
    "ce-by-sigma": lambda r: {
        **_windows(r),
        "sigmas": [row["sigma"] for row in r["results"]],
        "prior_num_steps": r["prior_num_steps"],
    },
    "convergence": _windows,
    "depth": lambda r: {
        "task": r["data"]["task"],
        "rows": r["data"]["rows"],
        "seed": r["data"]["seed"],
        "lengths": sorted({row["length"] for row in r["results"]}),
    },
    "gen-ppl": lambda r: {**_texts(r), "teachers": [_judge(teacher) for teacher in r["teachers"]]},
    "accuracy": lambda r: {**_common(r), "images": r["images"]},
    "fid": lambda r: {
        "features": r["features"],
        "reference": r["reference"],
        "images, reference": r["results"][0]["n"],
    },
    "mauve": lambda r: {**_texts(r), "protocol": r["protocol"], "featuriser": _judge(r["featuriser"])},
}
"""What must agree between files of a kind before their figures may stand in one table."""


def check_alike(runs: Sequence[Run]) -> None:
    """UserError for the first file of a kind whose protocol is not that of the kind's first file."""
    for kind, protocol in PROTOCOLS.items():
        alike = [run for run in runs if run.kind == kind]
        for run in alike[1:]:
            first, mine = protocol(alike[0].report), protocol(run.report)
            for name, value in mine.items():
                if value != first[name]:
                    problem = f"{kind}: {name} is {value}, in {alike[0].file} it is {first[name]}, so one table cannot hold both"
                    raise UserError(
                        "RUN", str(run.file), problem, "report them apart, or evaluate again in the same way"
                    )
    harness = [run for run in runs if run.kind == "lm-eval"]
    for run in harness[1:]:
        _check_tasks(harness[0], run)


def _check_tasks(first: Run, run: Run) -> None:
    for task in sorted(first.report["results"].keys() & run.report["results"].keys()):
        for name in ("versions", "n-shot", "n-samples"):
            here, there = (r.report.get(name, {}).get(task) for r in (run, first))
            if here != there:
                problem = (
                    f"{task}: {name} is {here}, in {first.file} it is {there}, so one table cannot hold both"
                )
                raise UserError(
                    "RUN", str(run.file), problem, "report them apart, or evaluate again in the same way"
                )


def provenance(runs: Sequence[Run]) -> Section:
    """Where every figure comes from, a row for each file."""
    rows = []
    for run in runs:
        report = run.report
        if run.kind == "lm-eval":
            config = report["config"]
            seeds = ", ".join(
                str(config.get(name)) for name in ("model_seed", "random_seed", "numpy_seed", "torch_seed")
            )
            command = f"lm_eval {report['lm_eval_version']}: --model {config.get('model')} --model_args {config.get('model_args')}"
            facts = [
                command,
                str(report.get("git_hash")),
                seeds,
                str(config.get("weights_sha256"))[:12],
                "by task",
                config.get("machine", ""),
            ]
        else:
            origin, data = report["provenance"], report["data"]
            seed = report.get("seed", data.get("seed", report.get("samples", {}).get("seed")))
            machine = (
                f"{origin['gpu'] or origin['cpu']}, {origin['threads']} threads, torch {origin['torch']}"
            )
            digest = data.get("manifest_sha256") or f"generated: {data.get('task')}"
            facts = [
                origin["command"],
                str(origin["git_commit"]),
                str(seed),
                report.get("checkpoint", {}).get("weights_sha256", "-")[:12],
                digest[:24],
                machine,
            ]
        rows.append([run.label, run.kind, *facts])
    headers = ["run", "evaluation", "command", "commit", "seed", "weights", "data", "hardware"]
    about = "Commits that end in -dirty had uncommitted changes. Weights and data are named by the start of their sha256."
    return Section("Provenance", about, [Table(headers, rows)])
