"""What figures of several metrics share. No display is needed."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.provenance import write_bytes

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
    """Colour of the i-th run in a figure with several."""
    return f"C{i % 10}"


def against_k(
    curves: dict[str, list[Row]], what: str, bands: dict[str, tuple[float, float]] | None = None
) -> bytes:
    """PNG with a curve for each name over rows of {"K", "value", "value_interval"}; ``bands``: intervals
    that do not depend on K."""
    figure, (axes,) = new_figure()
    for name, (low, high) in (bands or {}).items():
        axes.axhspan(low, high, color="grey", alpha=0.3)
        axes.annotate(name, (0.01, high), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    for i, (name, rows) in enumerate(curves.items()):
        shift = 1.025 ** (
            i - (len(curves) - 1) / 2
        )  # so that the intervals of equal K do not hide each other
        shifted = [{**row, "K": row["K"] * shift} for row in rows]
        with_errors(axes, shifted, "K", "value", marker="o", markersize=4, color=colour(i), label=name)
    k_axis(axes, [row["K"] for rows in curves.values() for row in rows], "K")
    axes.set_ylabel(what)
    axes.legend(fontsize=7)
    return png(figure)
