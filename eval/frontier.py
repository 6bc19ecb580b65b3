"""Quality against diversity over decoding settings: the plot, and perplexities read off it at the diversity of human text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes

from eval.plots import heading, new_figure, write_png

Row = dict[str, Any]


def curves(results: list[Row]) -> dict[tuple[int, float], list[Row]]:
    """Settings that differ in temperature alone, by (K, top-p), coolest first."""
    found: dict[tuple[int, float], list[Row]] = defaultdict(list)
    for row in sorted(results, key=lambda r: (r["num_steps"], r["top_p"], r["temperature"])):
        found[row["num_steps"], row["top_p"]].append(row)
    return dict(found)


def at_equal_diversity(results: list[Row], teacher: str, distinct_2: float) -> list[Row]:
    """Perplexity of each curve where its distinct-2 is the one given: log-linear between the two settings around it, None where the
    curve does not reach it. -> [{"num_steps", "top_p", "perplexity"}]."""
    return [
        {"num_steps": k, "top_p": top_p, "perplexity": _interpolated(rows, teacher, distinct_2)}
        for (k, top_p), rows in curves(results).items()
    ]


def _interpolated(rows: list[Row], teacher: str, distinct_2: float) -> float | None:
    for left, right in pairwise(rows):
        (x0, y0), (x1, y1) = _point(left, teacher), _point(right, teacher)
        if x0 != x1 and min(x0, x1) <= distinct_2 <= max(x0, x1):
            return math.exp(math.log(y0) + (distinct_2 - x0) / (x1 - x0) * (math.log(y1) - math.log(y0)))
    return None


def _point(row: Row, teacher: str) -> tuple[float, float]:
    return row["diversity"]["distinct_2"]["value"], row["perplexity"][teacher]["value"]


def plot_frontier(report: dict[str, Any], file: Path) -> None:
    """A panel per teacher, as PNG: see ``draw_frontier``."""
    names = [teacher["name"] for teacher in report["teachers"]]
    figure, panels = new_figure(len(names), height=4.8)
    for axes, name in zip(panels, names, strict=True):
        draw_frontier(axes, [("", report)], name)
        axes.set_title(f"{heading(report)}: {report['samples']['prompts']['count']} prompts", fontsize=10)
    write_png(figure, file)


def draw_frontier(axes: Axes, reports: Sequence[tuple[str, dict[str, Any]]], teacher: str) -> None:
    """Perplexity (log) against distinct-2, a marker per setting with its 95 % intervals, human text as a star.

    reports: (name, report). Colour is name and K, marker is top-p, and a line joins settings that differ in temperature alone.
    """
    found = [(name, k, top_p, rows) for name, report in reports for (k, top_p), rows in curves(report["results"]).items()]
    kinds = list(dict.fromkeys((name, k) for name, k, _, _ in found))
    top_ps = sorted({top_p for _, _, top_p, _ in found})
    colours = dict(zip(kinds, colormaps["viridis"]([0.9 * i / max(1, len(kinds) - 1) for i in range(len(kinds))]), strict=True))
    for name, k, top_p, rows in found:
        points = [_point(row, teacher) for row in rows]
        label = (f"{name}, " if name else "") + f"K = {k}" + (f", top-p {top_p:g}" if top_p < 1 or len(top_ps) > 1 else "")
        marker, colour = "osD^vP"[top_ps.index(top_p) % 6], colours[name, k]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1, label=label)
        for row, point in zip(rows, points, strict=True):
            _errors(axes, row, teacher, point, colour)
            axes.annotate(f"T {row['temperature']:g}", point, xytext=(5, 4), textcoords="offset points", fontsize=7)
    _frame(axes, reports[0][1]["human"], teacher)


def _frame(axes: Axes, human: Row, teacher: str) -> None:
    point = _point(human, teacher)
    _errors(axes, human, teacher, point, "tab:red")
    axes.plot(*point, marker="*", markersize=14, color="tab:red", linestyle="none", label="human text")
    axes.axvline(point[0], color="tab:red", linewidth=0.6, alpha=0.5)
    axes.set_yscale("log")
    axes.set_xlabel(f"distinct-2 (groups of {human['diversity']['group_texts']} texts)")
    axes.set_ylabel(f"generative perplexity under {teacher}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def _errors(axes: Axes, row: Row, teacher: str, point: tuple[float, float], colour: Any) -> None:
    intervals = row["diversity"]["distinct_2"]["interval"], row["perplexity"][teacher]["interval"]
    x, y = ([[max(0.0, at - i[0])], [max(0.0, i[1] - at)]] if i else None for at, i in zip(point, intervals, strict=True))
    axes.errorbar(*point, xerr=x, yerr=y, color=colour, capsize=2, linewidth=0.8)
