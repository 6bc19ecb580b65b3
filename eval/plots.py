"""Figures of evaluation results. No display is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_nll(report: dict[str, Any], file: Path) -> None:
    """Held-out NLL against K with its 95 % intervals, as PNG. Mixture estimates are hollow: they are not the likelihood."""
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    results = report["results"]
    ks, nll = [r["K"] for r in results], [r["nll"] for r in results]
    axes.plot(ks, nll, color="tab:blue", linewidth=1.5)
    for normalised in (True, False):
        chosen = [r for r in results if r["estimator"].startswith("normalised") == normalised]
        if chosen:
            errors = [[abs(r["nll"] - r["nll_interval"][side]) for r in chosen] for side in (0, 1)]
            axes.errorbar(
                [r["K"] for r in chosen],
                [r["nll"] for r in chosen],
                yerr=errors,
                fmt="o",
                capsize=3,
                color="tab:blue",
                markerfacecolor="tab:blue" if normalised else "white",
                label="normalised likelihood" if normalised else "mixture over noise draws (biased upward)",
            )
    for r in results:
        axes.annotate(f"{r['nll']:.3f}", (r["K"], r["nll"]), xytext=(0, 9), textcoords="offset points", fontsize=8, ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.margins(x=0.1, y=0.15)
    axes.set_xlabel("core steps K")
    axes.set_ylabel("held-out NLL (nats per token)")
    checkpoint = report["checkpoint"]
    axes.set_title(f"{checkpoint['name']}, step {checkpoint['step']:,}: {report['tokens']:,} tokens of {report['data']['split']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    FigureCanvasAgg(figure).print_png(partial)
    os.replace(partial, file)
