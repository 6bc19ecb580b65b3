"""What a metric is: a command of ``rdlm eval`` and a section of its report; and the parts of a report.

One metric is one class in one file of eval/metrics: a ``Measurement``, whose options are the fields of a
dataclass and whose result is a JSON document that begins with ``provenance.origin``, or a ``Metric`` around
another program (lm-eval). `rdlm eval report` puts the results of several files into one section.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import typer
from rich.console import Console
from rich.table import Table as RichTable

from eval.provenance import write_json
from rdlm.atomic import check_out_file
from rdlm.command_line import new_app, new_console
from rdlm.errors import UserError

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A file of results, and its name in tables. ``metric``: the name of the one that wrote it."""

    file: Path
    metric: str
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


Block = Table | Picture | Sample


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and what follows."""

    title: str
    about: str
    blocks: Sequence[Block]


class Metric(ABC):
    """A command of ``rdlm eval`` and its section of a report."""

    name: ClassVar[str]
    """Its command, and the name of its file with dashes."""
    place: ClassVar[int] = 100
    """Where its section stands in a report: the lowest first."""
    example: ClassVar[str]

    @abstractmethod
    def command(self) -> typer.Typer:
        """The command line."""

    @abstractmethod
    def section(self, runs: list[Run]) -> Section:
        """Files of this metric side by side; differences are against the first one."""

    def protocol(self, report: Json) -> Json:
        """What must agree between files before their figures may stand in one table."""
        data = report["data"]
        return {"data.manifest_sha256": data["manifest_sha256"], "data.split": data["split"]}

    def check_alike(self, first: Run, run: Run) -> None:
        """UserError where the protocol of a file is not that of the first one."""
        mine, theirs = self.protocol(run.report), self.protocol(first.report)
        check_equal(
            run, first, [(f"{self.name}: {name}", value, theirs[name]) for name, value in mine.items()]
        )

    def label(self, report: Json) -> str:
        """The name of what was measured."""
        return str(report["checkpoint"]["name"])

    def origin(self, report: Json) -> list[str]:
        """Command, commit, seed, weights, data and hardware, for the table of provenance."""
        origin, data = report["provenance"], report["data"]
        seed = report.get("seed", data.get("seed", report.get("samples", {}).get("seed")))
        machine = f"{origin['gpu'] or origin['cpu']}, {origin['threads']} threads, torch {origin['torch']}"
        digest = data.get("manifest_sha256") or f"generated: {data.get('task')}"
        weights = report.get("checkpoint", {}).get("weights_sha256", "-")[:12]
        return [origin["command"], str(origin["git_commit"]), str(seed), weights, digest[:24], machine]


class Measurement(Metric):
    """A metric that is computed here. The docstring of a subclass is the help of its command, the fields of
    ``Options`` are its options."""

    Options: ClassVar[type]
    """A dataclass with the fields ``out`` and ``plot``."""

    @abstractmethod
    def measure(self, options: Any) -> Json:
        """The result. UserError where checkpoint, data and options do not fit each other."""

    @abstractmethod
    def show(self, report: Json, console: Console) -> None:
        """Print the result as a table."""

    @abstractmethod
    def plot(self, report: Json, file: Path) -> None:
        """Write the result as a PNG."""

    def written(self, report: Json, options: Any) -> Json:
        """What goes into the file of ``--out``: all of the result, unless options leave something out."""
        return report

    def run(self, options: Any) -> None:
        """Measure, print, and write the files that the options name."""
        for name in ("out", "plot"):
            if (file := getattr(options, name)) is not None:
                check_out_file(file, f"--{name}")
        report = self.measure(options)
        self.show(report, new_console())
        if options.out is not None:
            write_json(options.out, self.written(report, options))
        if options.plot is not None:
            self.plot(report, options.plot)

    def command(self) -> typer.Typer:
        """Every field of ``Options`` is an option."""
        hints = get_type_hints(self.Options, include_extras=True)
        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields(self.Options)
        ]

        def command(**given: Any) -> None:
            self.run(self.Options(**given))

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        app = new_app()
        app.command(self.name, help=inspect.getdoc(type(self)), epilog=f"Example: {self.example}")(command)
        return app


def check_equal(run: Run, first: Run, facts: Sequence[tuple[str, object, object]]) -> None:
    """UserError for the first (name, value, value in the first file) that differs."""
    for name, here, there in facts:
        if here != there:
            problem = f"{name} is {here}, in {first.file} it is {there}, so one table cannot hold both"
            remedy = "report them separately, or evaluate again in the same way"
            raise UserError("RUN", str(run.file), problem, remedy)


def print_table(
    console: Console,
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    styles: Mapping[int, str] | None = None,
) -> None:
    """A table on the terminal, aligned to the right. styles: by number of the row."""
    table = RichTable(title=title, caption=caption)
    for name in headers:
        table.add_column(name, justify="right")
    for number, row in enumerate(rows):
        table.add_row(*row, style=(styles or {}).get(number))
    console.print(table)


def pair(row: Json, name: str) -> tuple[float, list[float]]:
    """A figure of a row, and its interval."""
    return row[name], row[f"{name}_interval"]
