"""The metrics of ``rdlm eval``: every file of eval/metrics is one, and its name is the command's.

The first paragraph of a file is its line in ``rdlm eval --help``. A metric is imported when it is run, or when
a report holds its results.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.metric import Metric

FOLDER = Path(__file__).parent / "metrics"


def _found() -> dict[str, str]:
    found = {}
    for file in sorted(FOLDER.glob("[!_]*.py")):
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem.replace("_", "-")] = " ".join(about.partition("\n\n")[0].split())
    return found


METRICS = _found()
"""Command -> one line of help."""


def load_metric(name: str) -> Metric:
    """The metric of a name in METRICS: the one class of its file that has this name."""
    module = importlib.import_module(f"eval.metrics.{name.replace('-', '_')}")
    [metric] = [
        each for each in vars(module).values() if isinstance(each, type) and vars(each).get("name") == name
    ]
    found: Metric = metric()
    return found


def metric_of(report: Any) -> str | None:
    """The metric that wrote a file of results; None for a file that is none. lm-eval's own files name no
    evaluation."""
    if not isinstance(report, dict):
        return None
    if "lm_eval_version" in report and "results" in report:
        return "lm-eval"
    name = report.get("evaluation")
    return name if name in METRICS else None
