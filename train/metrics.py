"""What a run reports: ``metrics.jsonl``, TensorBoard, a progress bar, and ``loss.png`` at the end. Rank 0 only."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

PLAIN_INTERVAL = 10.0
"""Seconds between two progress lines where there is no terminal."""


class MetricsLog:
    """A JSONL file with one record per logged step, cut back to ``step`` when a run is resumed there."""

    def __init__(self, path: Path, step: int, tensorboard: bool) -> None:
        self.path = path
        kept = [record for record in read(self.path) if record["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, self.path)
        self.last: dict[str, Any] = kept[-1] if kept else {}
        self._file = self.path.open("a", buffering=1)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(path.parent / "tensorboard" / path.stem), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; ``step`` is its number of finished updates."""
        self._file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for key, value in record.items():
                if key != "step":
                    self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a ``metrics.jsonl``, without a last line that a kill cut short; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the device held, on a CPU the most this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, total: int, done: int, terminal: TextIO, unit: str) -> None:
        """unit: what a target is, see train.data.Corpus."""
        self.total, self.terminal, self.unit = total, terminal, unit
        self._bar = (
            tqdm(total=total, initial=done, file=terminal, unit="step", dynamic_ncols=True)
            if terminal.isatty()
            else None
        )
        self._first, self._started, self._printed = done, time.monotonic(), 0.0

    def update(self, step: int, record: dict[str, Any]) -> None:
        """After update ``step`` (1-based), with its record."""
        shown = f"loss {record['loss']:.3f}, {record[f'{self.unit}s_per_s']:,.0f} {self.unit}s/s, lr {record['lr']:.2e}"
        if "swap_share" in record:
            shown += f", {record['swap_share']:.0%} moving blocks"
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(shown)
        elif now - self._printed > PLAIN_INTERVAL or step == self.total:
            left = (now - self._started) / (step - self._first) * (self.total - step)
            self.say(f"step {step}/{self.total}: {shown}, {left:.0f} s left")
            self._printed = now

    def say(self, line: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(line, file=self.terminal)
        else:
            print(line, file=self.terminal, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def plot_loss(
    records: list[dict[str, Any]], held_out: list[dict[str, Any]], path: Path, title: str, what: str
) -> None:
    """Training loss against updates: raw, and an exponential mean over about 2 % of the run (at least 10 points).

    what: the loss and its unit. Held-out accuracies have an axis of their own.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [record["step"] for record in records], [record["loss"] for record in records]
    keep = 1 - 1 / max(10.0, len(losses) / 50)
    smooth: list[float] = []
    for loss in losses:
        smooth.append(loss if not smooth else keep * smooth[-1] + (1 - keep) * loss)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1, label="each update")
    axes.plot(steps, smooth, color="tab:blue", linewidth=2, label="smoothed")
    names = {key for record in held_out for key in record if key != "step"}
    shares = axes.twinx() if any(name.startswith("accuracy") for name in names) else None
    for k in sorted(names, key=lambda name: (len(name), name)):  # K=4 before K=16
        series = [(record["step"], record[k]) for record in held_out if k in record]
        panel, line = (shares, ":") if shares is not None and k.startswith("accuracy") else (axes, "-")
        panel.plot(
            *zip(*series, strict=True), line, marker="o", markersize=4, linewidth=1, label=f"held out, {k}"
        )
    if shares is not None:
        shares.set_ylabel("accuracy")
        shares.legend(loc="center right")
    axes.set(xlabel="updates", ylabel=what, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    pyplot.close(figure)
    os.replace(temporary, path)
