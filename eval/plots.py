"""Figures of evaluation results. No display is needed."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.output import write_bytes

Row = dict[str, Any]


def new_figure(panels: int = 1, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A row of panels."""
    figure = Figure(figsize=(6.4 * panels, height), dpi=150, layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def write_png(figure: Figure, file: Path) -> None:
    """Write the figure at once or not at all."""
    write_bytes(file, png(figure))


def k_axis(axes: Axes, ks: Sequence[int], label: str = "core steps K") -> None:
    """K on a logarithmic axis, each value that was measured a tick."""
    shown = sorted(set(ks))
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [str(k) for k in shown])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def with_errors(axes: Axes, rows: Sequence[Row], x: str, y: str, **style: Any) -> None:
    """rows[y] against rows[x] with the intervals in rows[y + "_interval"]."""
    errors = [[abs(r[y] - r[f"{y}_interval"][side]) for r in rows] for side in (0, 1)]
    axes.errorbar([r[x] for r in rows], [r[y] for r in rows], yerr=errors, capsize=3, **style)


def heading(report: Row) -> str:
    """Which checkpoint a figure or a table is of."""
    checkpoint = report["checkpoint"]
    return f"{checkpoint['name']}, step {checkpoint['step']:,}"


def colour(i: int) -> str:
    """Of the i-th run in a figure with several."""
    return f"C{i % 10}"


def against_k(
    curves: dict[str, list[Row]], what: str, bands: dict[str, tuple[float, float]] | None = None
) -> bytes:
    """PNG with a curve for each name over rows of {"K", "value", "value_interval"}; ``bands``: intervals that do not depend on K."""
    figure, (axes,) = new_figure()
    for name, (low, high) in (bands or {}).items():
        axes.axhspan(low, high, color="grey", alpha=0.3)
        axes.annotate(name, (0.01, high), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    for i, (name, rows) in enumerate(curves.items()):
        beside = 1.025 ** (
            i - (len(curves) - 1) / 2
        )  # so that the intervals of equal K do not hide each other
        shifted = [{**row, "K": row["K"] * beside} for row in rows]
        with_errors(axes, shifted, "K", "value", marker="o", markersize=4, color=colour(i), label=name)
    k_axis(axes, [row["K"] for rows in curves.values() for row in rows], "K")
    axes.set_ylabel(what)
    axes.legend(fontsize=7)
    return png(figure)


def draw_nll(axes: Axes, report: Row, **style: Any) -> None:
    """Held-out NLL against K. Mixture estimates and bounds are hollow: they are not the likelihood."""
    results = report["results"]
    style = {"color": "tab:blue", **style}
    axes.plot([r["K"] for r in results], [r["nll"] for r in results], color=style["color"], linewidth=1.5)
    name = style.pop("label", None)
    for normalised in (True, False):
        chosen = [r for r in results if r["estimator"].startswith("normalised") == normalised]
        if chosen:
            other = (
                "upper bound"
                if chosen[0]["estimator"].startswith("upper bound")
                else "mixture over noise draws (biased upward)"
            )
            kind = "normalised likelihood" if normalised else other
            face = style["color"] if normalised else "white"
            label = f"{name}: {kind}" if name else kind
            with_errors(axes, chosen, "K", "nll", fmt="o", markerfacecolor=face, label=label, **style)
    axes.set_ylabel("held-out NLL (nats per token)")


def plot_nll(report: Row, file: Path) -> None:
    """Held-out NLL against K with its 95 % intervals, as PNG."""
    figure, (axes,) = new_figure()
    draw_nll(axes, report)
    for r in report["results"]:
        axes.annotate(
            f"{r['nll']:.3f}",
            (r["K"], r["nll"]),
            xytext=(0, 9),
            textcoords="offset points",
            fontsize=8,
            ha="center",
        )
    k_axis(axes, [r["K"] for r in report["results"]])
    axes.margins(x=0.1, y=0.15)
    axes.set_title(f"{heading(report)}: {report['tokens']:,} tokens of {report['data']['split']}")
    axes.legend(fontsize=8)
    write_png(figure, file)


def draw_depth(axes: Axes, report: Row, name: str = "", **style: Any) -> None:
    """Accuracy against K, a curve for each length."""
    for length in dict.fromkeys(r["length"] for r in report["results"]):
        chosen = [r for r in report["results"] if r["length"] == length]
        label = f"{name}{report['data']['unit']} {length}"
        with_errors(axes, chosen, "K", "accuracy", marker="o", label=label, **style)
    axes.set_ylabel("share of right answers")


def plot_depth(report: Row, file: Path) -> None:
    """Accuracy against K with its 95 % intervals, as PNG."""
    figure, (axes,) = new_figure()
    draw_depth(axes, report)
    axes.axhline(report["chance"], color="grey", linestyle=":", label="chance")
    k_axis(axes, [r["K"] for r in report["results"]], label="K")
    axes.set_title(f"{heading(report)}: {report['data']['task']}")
    axes.legend(fontsize=8)
    write_png(figure, file)


def draw_accuracy(axes: Axes, report: Row, name: str = "", first_colour: int = 0) -> int:
    """Accuracy against K, a curve for each bridge; -> how many."""
    bridges = list(dict.fromkeys(r["bridge"] for r in report["results"]))
    for i, bridge in enumerate(bridges):
        chosen = [r for r in report["results"] if r["bridge"] == bridge]
        with_errors(
            axes,
            chosen,
            "K",
            "accuracy",
            marker="o",
            markersize=4,
            color=colour(first_colour + i),
            label=f"{name}{bridge}",
        )
    axes.set_ylabel("accuracy")
    return len(bridges)


def plot_accuracy(report: Row, file: Path) -> None:
    """Accuracy against K with its 95 % intervals, as PNG."""
    figure, (axes,) = new_figure()
    draw_accuracy(axes, report)
    k_axis(axes, [r["K"] for r in report["results"]], "K")
    axes.set_title(f"{heading(report)}: {report['images']:,} images of {report['data']['split']}")
    axes.legend(fontsize=8)
    write_png(figure, file)
