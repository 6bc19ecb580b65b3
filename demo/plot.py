"""The loss curve of a run, from its metrics file."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure


def plot_loss(metrics: Path, image: Path) -> None:
    """Draw ``loss`` against ``step`` of a JSONL file into a PNG, with a running mean over 20 updates."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    points = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    steps = [step for step, _ in points]
    losses = [loss for _, loss in points]
    means = [sum(losses[max(0, i - 19) : i + 1]) / len(losses[max(0, i - 19) : i + 1]) for i in range(len(losses))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, linewidth=0.5, alpha=0.4, label="each update")
    axes.plot(steps, means, label="mean of 20")
    axes.set(xlabel="update", ylabel="loss (nats per token)", title=str(metrics.parent.name))
    axes.legend()
    figure.savefig(image, dpi=120)
