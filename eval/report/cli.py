"""``rdlm eval report``: files of results as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    """Put results side by side: tables, curves, samples and provenance. Refuses what was not measured in the same way."""
    from eval.report.render import write_report
    from eval.report.report import check_alike, provenance, read_runs
    from eval.report.sections import sections

    found = read_runs(runs)
    check_alike(found)
    for file in write_report(out, title, [*sections(found), provenance(found)], found):
        typer.echo(file)
