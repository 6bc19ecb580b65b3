"""One report out of the JSON files that the metrics and lm-eval have written: as HTML, as Markdown and as
JSON.

The HTML file has everything inside; Markdown refers to its figures as files. Both are templates of this
folder.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from eval.metric import Json, Metric, Picture, Run, Section, Table
from eval.provenance import write_bytes, write_json
from eval.registry import METRICS, load_metric, metric_of
from rdlm.diffusion.samplers import OLD_NAMES
from rdlm.errors import UserError

EXAMPLE = "Example: rdlm eval report results/*.json --out report"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="JSON files of rdlm eval or lm-eval; the first of a kind is the baseline."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of report.html, report.md and report.json.")] = Path(
        "report"
    ),
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "Evaluation",
) -> None:
    """Compare results: tables, curves, samples and provenance. Results that were not measured in the same way
    are refused."""
    found = read_runs(runs)
    for file in write_report(out, title, sections(found), found):
        typer.echo(file)


def read_runs(files: Sequence[Path]) -> list[Run]:
    """UserError for a file that is no result. A name that several files of one metric share is extended
    by their file names."""
    found = [_read(file) for file in files]
    names = [(run.metric, run.label) for run in found]
    return [
        run
        if names.count((run.metric, run.label)) == 1
        else replace(run, label=f"{run.label} ({_stem(run.file)})")
        for run in found
    ]


def _stem(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def _read(file: Path) -> Run:
    remedy = "give files that `rdlm eval ... --out` or lm-eval's --output_path wrote"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("RUN", str(file), error.strerror or "cannot be read", remedy) from None
    except (ValueError, RecursionError):
        raise UserError("RUN", str(file), "is not JSON", remedy) from None
    name = metric_of(document)
    if name is None:
        problem = "names no evaluation that this version knows"
        raise UserError("RUN", str(file), problem, f"{remedy} (of this version)")
    document = current(document)
    return Run(file, name, load_metric(name).label(document), document)


OLD_KEYS = {
    "bridge": "sampler", "solver": "sampler", "against_first_bridge": "against_first_sampler", "teachers": "judges",
}  # fmt: skip
"""Names in results of earlier versions, and today's."""


def current(document: Any) -> Any:
    """A file of results as this version writes it."""
    if isinstance(document, list):
        return [current(item) for item in document]
    if not isinstance(document, dict):
        return document
    found = {OLD_KEYS.get(key, key): current(value) for key, value in document.items()}
    if isinstance(found.get("sampler"), str):
        found["sampler"] = OLD_NAMES.get(found["sampler"], found["sampler"])
    return found


def sections(runs: Sequence[Run]) -> list[Section]:
    """One for each metric there is, in the order of their ``place``, and provenance. UserError where files
    of one were measured differently."""
    chosen = {name: [run for run in runs if run.metric == name] for name in METRICS}
    loaded = sorted((load_metric(name) for name, found in chosen.items() if found), key=lambda m: m.place)
    metrics: dict[str, Metric] = {metric.name: metric for metric in loaded}
    for name, metric in metrics.items():
        for run in chosen[name][1:]:
            metric.check_alike(chosen[name][0], run)
    return [*(metric.section(chosen[name]) for name, metric in metrics.items()), _provenance(runs, metrics)]


def _provenance(runs: Sequence[Run], metrics: dict[str, Metric]) -> Section:
    """Where every figure comes from, a row for each file."""
    rows = [[run.label, run.metric, *metrics[run.metric].origin(run.report)] for run in runs]
    headers = ["run", "evaluation", "command", "commit", "seed", "weights", "data", "hardware"]
    about = (
        "Commits that end in -dirty had uncommitted changes. Weights and data are named by the start of "
        "their sha256."
    )
    return Section("Provenance", about, [Table(headers, rows)])


def write_report(folder: Path, title: str, sections: Sequence[Section], runs: Sequence[Run]) -> list[Path]:
    """Write report.html, report.md (with a PNG for each figure) and report.json into the folder. -> their
    paths."""
    page, text, data = folder / "report.html", folder / "report.md", folder / "report.json"
    figures = _figures(sections)
    templates = _templates()
    write_bytes(page, templates.get_template("report.html").render(title=title, sections=sections).encode())
    for name, picture in figures.items():
        write_bytes(folder / name, picture.content)
    names = {id(picture): name for name, picture in figures.items()}
    markdown = templates.get_template("report.md").render(title=title, sections=sections, names=names)
    write_bytes(text, markdown.encode())
    write_json(data, as_json(title, sections, runs))
    return [page, text, data]


def _figures(sections: Sequence[Section]) -> dict[str, Picture]:
    """File names of the figures."""
    found: dict[str, Picture] = {}
    for section in sections:
        stem = "-".join(section.title.lower().split())
        pictures = [block for block in section.blocks if isinstance(block, Picture)]
        found |= {f"{stem}-{number}.png": picture for number, picture in enumerate(pictures, 1)}
    return found


def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("eval.report"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "base64": lambda content: b64encode(content).decode()}
    environment.tests["table"] = lambda block: isinstance(block, Table)
    environment.tests["picture"] = lambda block: isinstance(block, Picture)
    environment.globals["id"] = id
    return environment


def _cell(text: str) -> str:
    """The text on one line, without a character that would end the cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def as_json(title: str, sections: Sequence[Section], runs: Sequence[Run]) -> dict[str, Any]:
    """The tables as they are shown, and every input as it was read."""
    shown = [
        {"title": s.title, "about": s.about, "tables": [asdict(b) for b in s.blocks if isinstance(b, Table)]}
        for s in sections
    ]
    inputs: list[Json] = [
        {"file": run.file.name, "label": run.label, "kind": run.metric, "report": run.report} for run in runs
    ]
    return {"title": title, "sections": shown, "runs": inputs}
