"""Quality against diversity over decoding settings: the plot, and perplexities read off it at the
diversity of human text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from eval.plots import heading, new_figure, write_png
from eval.stats import FEWEST_UNITS, interval, resamples
from eval.texts.sweep import setting_of

Row = dict[str, Any]


Curve = tuple[int, str]
"""K and what else settings share (``Setting.rest``); along a curve only the temperature changes."""


def curves(results: list[Row]) -> dict[Curve, list[Row]]:
    """Settings that differ in temperature alone, coolest first."""
    found: dict[Curve, list[Row]] = defaultdict(list)
    for row in sorted(
        results, key=lambda r: (setting_of(r).num_steps, setting_of(r).rest, setting_of(r).temperature)
    ):
        setting = setting_of(row)
        found[setting.num_steps, setting.rest].append(row)
    return dict(found)


def at_equal_diversity(report: Row, judge: str, seed: int = 0) -> list[Row]:
    """Perplexity of each curve where its distinct-2 is that of human text, and its 95 % interval over
    blocks of prompts.

    -> [{"num_steps", "cut", "perplexity", "interval"}]; None where the curve does not get there.
    """
    return [
        {"num_steps": k, "cut": cut, **estimate(found)}
        for (k, cut), found in nats_at_equal_diversity(report, judge, seed).items()
    ]


def nats_at_equal_diversity(report: Row, judge: str, seed: int = 0) -> dict[Curve, np.ndarray]:
    """Log perplexity of each curve at the distinct-2 of human text, fp64 [1 + resamples], NaN where it is
    not reached.

    Log-linear between the two temperatures around it. Entry 0 weighs all blocks of prompts alike, the
    others are bootstrap resamples, the same for every curve, for human text and for other reports on the
    same prompts: differences of two results are paired. There are none with fewer than FEWEST_UNITS
    blocks.
    """
    human = np.array(report["human"]["diversity"]["distinct_2"]["by_block"])
    drawn = resamples(len(human), seed)[: None if len(human) >= FEWEST_UNITS else 0]
    weights = np.concatenate([np.ones((1, len(human))), drawn])
    at = weights @ human / len(human)
    found = {}
    for key, rows in curves(report["results"]).items():
        x = [weights @ np.array(row["diversity"]["distinct_2"]["by_block"]) / len(human) for row in rows]
        nats = [weights @ np.array(row["perplexity"][judge]["by_block"]) for row in rows]
        found[key] = _interpolated(x, [n[:, 0] / n[:, 1] for n in nats], at)
    return found


def _interpolated(x: list[np.ndarray], y: list[np.ndarray], at: np.ndarray) -> np.ndarray:
    """y at x = at, linear between the first two neighbours around it; all of one shape."""
    out = np.full_like(at, np.nan)
    for (x0, x1), (y0, y1) in zip(pairwise(x), pairwise(y), strict=True):
        here = np.isnan(out) & (x0 != x1) & (np.minimum(x0, x1) <= at) & (at <= np.maximum(x0, x1))
        out[here] = (y0 + (at - x0) * (y1 - y0) / np.where(x0 == x1, 1, x1 - x0))[here]
    return out


def estimate(nats: np.ndarray) -> Row:
    """exp of entry 0 and the middle 95 % of the rest, of ``nats_at_equal_diversity`` or a difference of
    two (then a ratio).

    -> {"perplexity", "interval"}. No value where entry 0 is NaN; no interval where more than 5 % of the
    rest are, or there are none.
    """
    value, known = nats[0], nats[1:][~np.isnan(nats[1:])]
    enough = len(known) > 0.95 * (len(nats) - 1)
    return {
        "perplexity": None if np.isnan(value) else math.exp(value),
        "interval": interval(np.exp(known)) if enough and not np.isnan(value) else None,
    }


def _point(row: Row, judge: str) -> tuple[float, float]:
    return row["diversity"]["distinct_2"]["value"], row["perplexity"][judge]["value"]


def plot_frontier(report: dict[str, Any], file: Path) -> None:
    """A panel per judge, as PNG: see ``draw_frontier``."""
    names = [judge["name"] for judge in report["judges"]]
    figure, panels = new_figure(len(names), height=4.8)
    for axes, name in zip(panels, names, strict=True):
        draw_frontier(axes, [("", report)], name)
        axes.set_title(f"{heading(report)}: {report['samples']['prompts']['count']} prompts", fontsize=10)
    write_png(figure, file)


def draw_frontier(axes: Axes, reports: Sequence[tuple[str, dict[str, Any]]], judge: str) -> None:
    """Perplexity (log) against distinct-2, a marker per setting with its 95 % intervals, human text as a
    star.

    reports: (name, report). Colour is name and K, marker is what cuts the distribution, and a line joins
    settings that differ in temperature alone.
    """
    found = [
        (name, k, cut, rows)
        for name, report in reports
        for (k, cut), rows in curves(report["results"]).items()
    ]
    kinds = list(dict.fromkeys((name, k) for name, k, _, _ in found))
    cuts = sorted({cut for _, _, cut, _ in found})
    colours = dict(
        zip(
            kinds,
            colormaps["viridis"]([0.9 * i / max(1, len(kinds) - 1) for i in range(len(kinds))]),
            strict=True,
        )
    )
    for name, k, cut, rows in found:
        points = [_point(row, judge) for row in rows]
        label = ", ".join(filter(None, (name, f"K = {k}", cut)))
        marker, colour = "osD^vP"[cuts.index(cut) % 6], colours[name, k]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1, label=label)
        for row, point in zip(rows, points, strict=True):
            _errors(axes, row, judge, point, colour)
            axes.annotate(
                f"T {row['temperature']:g}", point, xytext=(5, 4), textcoords="offset points", fontsize=7
            )
    _frame(axes, reports[0][1]["human"], judge)


def _frame(axes: Axes, human: Row, judge: str) -> None:
    point = _point(human, judge)
    _errors(axes, human, judge, point, "tab:red")
    axes.plot(*point, marker="*", markersize=14, color="tab:red", linestyle="none", label="human text")
    axes.axvline(point[0], color="tab:red", linewidth=0.6, alpha=0.5)
    axes.set_yscale("log")
    axes.set_xlabel(f"distinct-2 (groups of {human['diversity']['group_texts']} texts)")
    axes.set_ylabel(f"generative perplexity under {judge}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def _errors(axes: Axes, row: Row, judge: str, point: tuple[float, float], colour: Any) -> None:
    intervals = row["diversity"]["distinct_2"]["interval"], row["perplexity"][judge]["interval"]
    x, y = (
        [[max(0.0, at - i[0])], [max(0.0, i[1] - at)]] if i else None
        for at, i in zip(point, intervals, strict=True)
    )
    axes.errorbar(*point, xerr=x, yerr=y, color=colour, capsize=2, linewidth=0.8)
