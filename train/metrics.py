"""What a run reports: ``metrics.jsonl``, TensorBoard, a progress bar, and ``loss.png`` at the end. Rank 0
only."""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from tqdm import tqdm

from train.cost import UpdateFlops, peak_flops
from train.engines import ResidentEngines
from train.wandb_sink import Wandb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from train.trainer import Tally, Trainer

PLAIN_INTERVAL = 10.0
"""Seconds between two progress lines where there is no terminal."""
SPIKE_WINDOW = 64
"""Records that a loss is compared with."""
SPIKE = 6.0
"""Deviations above their median from which a loss is counted as a spike."""
Sink = Callable[[str, dict[str, Any]], None]
"""(name of the log, record) -> None."""


class MetricsLog:
    """A JSONL file with one record per logged step, cut back to ``step`` when a run is resumed there."""

    def __init__(self, path: Path, step: int, tensorboard: bool, sink: Sink | None = None) -> None:
        """sink: what else is given each record."""
        self.path, self._sink = path, sink
        self.damaged = 0
        """Lines that were no records; they are dropped."""
        kept = []
        if path.exists():
            lines = path.read_text(errors="replace", encoding="utf-8").splitlines(keepends=True)
            records = [_record(line) for line in lines]
            self.damaged = sum(record is None for record in records[:-1])  # a kill may cut the last one short
            kept = [record for record in records if record is not None and record["step"] <= step and step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self.last: dict[str, Any] = kept[-1] if kept else {}
        self.losses: list[float] = [r["loss"] for r in kept[-SPIKE_WINDOW:] if r.get("loss") is not None]
        """Losses of the last records that there were."""
        self._file = self.path.open("a", buffering=1, encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(path.parent / "tensorboard" / path.stem), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; ``step`` is its number of finished updates. JSON has no NaN: such a value is
        null."""
        self._file.write(json.dumps(finite_only(record), allow_nan=False) + "\n")
        if self._sink is not None:
            self._sink(self.path.stem, finite_only(record))
        if self._board is not None:
            for key, value in record.items():
                if key != "step":
                    self._board.add_scalar(key, value, record["step"])

    def text(self, name: str, content: str, step: int) -> None:
        """Markdown for TensorBoard."""
        if self._board is not None:
            self._board.add_text(name, content, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def finite_only(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None in the place of numbers that JSON cannot express."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a ``metrics.jsonl``; a line that is none, or was cut short by a kill, is passed over. None
    if there is no file."""
    if not path.exists():
        return []
    found = [
        _record(line) for line in path.read_text(errors="replace", encoding="utf-8").splitlines(keepends=True)
    ]
    return [record for record in found if record is not None]


def _record(line: str) -> dict[str, Any] | None:
    """The record of a whole line of numbers, None for anything else."""
    try:
        record = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record if all(v is None or isinstance(v, int | float) for v in record.values()) else None


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the device held, on a CPU the most this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def spike(loss: float, before: Sequence[float]) -> float | None:
    """How far a loss lies above the median of those before it, in standard deviations of a normal law with their
    median absolute deviation; None before 16 of them."""
    if len(before) < 16:
        return None
    median = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(value - median) for value in before)
    return (loss - median) / spread if spread else None


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, total: int, done: int, terminal: TextIO, unit: str) -> None:
        """unit: what a position of a row is, see train.data.Corpus."""
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
        shown += f", grad norm {record['grad_norm']:.2f}"
        if "epoch" in record:
            shown += f", epoch {record['epoch']:.2f}"
        if "mfu" in record:
            shown += f", {record['mfu']:.0%} of peak FLOPs"
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
    """Training loss against updates: raw, and an exponential mean over about 2 % of the run (at least 10
    points).

    what: the loss and its unit. Held-out accuracies have an axis of their own. Where some positions are
    noised, the curve is the cross-entropy of the others (``ce_prior``): that is what the held-out likelihood
    is of, and the mixed loss lies below it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    like = "ce_prior" if any(record.get("ce_prior") is not None for record in records) else "loss"
    drawn = [record for record in records if record.get(like) is not None]
    steps, losses = [record["step"] for record in drawn], [record[like] for record in drawn]
    keep = 1 - 1 / max(10.0, len(losses) / 50)
    smooth: list[float] = []
    for loss in losses:
        smooth.append(loss if not smooth else keep * smooth[-1] + (1 - keep) * loss)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(
        steps,
        losses,
        color="tab:blue",
        alpha=0.25,
        linewidth=1,
        label="each update" if like == "loss" else "positions without noise, each update",
    )
    axes.plot(steps, smooth, color="tab:blue", linewidth=2, label="smoothed")
    names = {key for record in held_out for key in record if key != "step"}
    shares = axes.twinx() if any(name.startswith("accuracy") for name in names) else None
    for k in sorted(names, key=lambda name: (len(name), name)):  # K=4 before K=16
        series = [(record["step"], record[k]) for record in held_out if record.get(k) is not None]
        if not series:
            continue
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
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """The figure as PNG, in one piece, and closed."""
    from matplotlib import pyplot

    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    pyplot.close(figure)
    os.replace(temporary, path)


def curves(held_out: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """NLL by K before training, where a run that starts from other weights has measured it, and after the last
    update that was; empty for anything else."""
    if len(held_out) < 2 or held_out[0]["step"]:
        return {}
    named = {"before training": held_out[0], f"after update {held_out[-1]['step']:,}": held_out[-1]}
    found = {
        name: {int(key[2:]): value for key, value in record.items() if key[:2] == "K=" and value is not None}
        for name, record in named.items()
    }
    return found if all(found.values()) else {}


def before_and_after(held_out: list[dict[str, Any]]) -> list[str]:
    """A line for each of ``curves``."""
    return [
        f"held-out NLL {name}: " + ", ".join(f"K={k} {value:.4f}" for k, value in sorted(curve.items()))
        for name, curve in curves(held_out).items()
    ]


def plot_depth(curves: dict[str, dict[int, float]], path: Path, title: str) -> None:
    """Held-out NLL against K, a line for each curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (name, curve), style in zip(curves.items(), (":", "-"), strict=True):
        axes.plot(sorted(curve), [curve[k] for k in sorted(curve)], f"o{style}", label=name)
    ks = sorted({k for curve in curves.values() for k in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="K, core steps", ylabel="held-out NLL, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


class Report:
    """Rank 0's account of the run: first lines, metrics files, progress, plot."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, config = trainer, trainer.config
        self.progress = Progress(config.schedule.steps, trainer.step, trainer.terminal, trainer.corpus.unit)
        parts, whole = range(len(trainer.engines)), len(trainer.engines) == 1
        configs = [config if whole else config.model_copy(update={"block": block}) for block in parts]
        self._flops = [UpdateFlops.of_run(each) for each in configs]
        self.first_loss: float | None = None
        self.last_losses: list[float] = []
        self.spikes = 0
        wanted = config.log.wandb
        self.wandb = None if wanted is None else Wandb(wanted, config, trainer.output)
        self._open()
        for line in first_lines(trainer):
            self.progress.say(line)
        if trainer.step:
            self.progress.say(f"resumed {config.name} at step {trainer.step}")
        if trainer.step >= config.schedule.steps:
            self.progress.say(
                "all updates are made: a larger schedule.steps goes on, another output starts anew"
            )

    def _open(self) -> None:
        trainer, tensorboard = self.trainer, self.trainer.config.log.tensorboard
        sink = self.wandb.log if self.wandb is not None else None
        self.log = MetricsLog(trainer.output / "metrics.jsonl", trainer.step, tensorboard, sink)
        self.held_out_log = MetricsLog(trainer.output / "held_out.jsonl", trainer.step, tensorboard, sink)
        self.losses = self.log.losses
        for log in (self.log, self.held_out_log):
            if log.damaged:
                self.progress.say(f"warning: dropped {log.damaged} lines of {log.path} that are no records")
        self.cpu_seconds = float(self.log.last.get("cpu_seconds") or 0.0)
        self.seconds = float(self.log.last.get("seconds") or 0.0)
        self.logged_step, self.swapped = trainer.step, self._swap_seconds()

    def rewind(self) -> None:
        """Cut the logs back to the trainer's step."""
        self.log.close()
        self.held_out_log.close()
        self._open()

    def _swap_seconds(self) -> float:
        engines = self.trainer.engines
        return engines.swap_seconds if isinstance(engines, ResidentEngines) else 0.0

    def step(
        self,
        parts: list[tuple[Tally, float]],
        positions: float,
        seconds: float,
        grad_norm: float,
        more: dict[str, float] | None = None,
    ) -> None:
        """Record the update just made. parts: every process's tally and CPU seconds; seconds: since the last
        record; more: other figures of it."""
        trainer, steps = self.trainer, self.trainer.step - self.logged_step
        tallies = [tally for tally, _ in parts]
        assert sum(t.count for t in tallies) == positions, (
            "an objective counted other positions than the batch's mask"
        )
        self.cpu_seconds += sum(cpu for _, cpu in parts)
        self.seconds += seconds
        config = trainer.config
        record: dict[str, Any] = {
            "step": trainer.step,
            "loss": sum(float(t.total) for t in tallies) / max(1.0, positions),
            "lr": trainer.learning_rate,
            "grad_norm": grad_norm,
            f"{trainer.corpus.unit}s_per_s": config.batch.global_size * config.seq_len * steps / seconds,
            "targets_per_s": positions * steps / seconds,
            f"{trainer.corpus.unit}s_seen": (trainer.step + trainer.state.skipped)
            * config.batch.global_size
            * config.seq_len,
            "step_s": seconds / steps,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_memory_bytes": peak_memory(trainer.device),
            **self._utilisation(seconds),
        }
        record |= more or {}
        deviation = spike(record["loss"], self.losses)
        if deviation is not None:
            record["loss_spike"] = deviation
            self.spikes += deviation > SPIKE
        self.losses = [*self.losses, record["loss"]][-SPIKE_WINDOW:]
        rows = trainer.corpus.num_rows
        if rows is not None:
            record["epoch"] = (trainer.step + trainer.state.skipped) * config.batch.global_size / rows
        if len(trainer.engines) > 1:
            record["block"] = trainer.block
        if config.resident is not None:
            swapped = self._swap_seconds()
            record["swap_share"], self.swapped = (swapped - self.swapped) / seconds, swapped
        for name in sorted({name for tally in tallies for name in tally.metrics}):
            pairs = [tally.metrics[name] for tally in tallies if name in tally.metrics]
            record[name] = sum(float(total) for total, _ in pairs) / sum(number for _, number in pairs)
        self.logged_step = trainer.step
        self.first_loss = record["loss"] if self.first_loss is None else self.first_loss
        self.last_losses = [*self.last_losses[-9:], record["loss"]]
        self.log.write(record)
        self.progress.update(trainer.step, record)

    def _utilisation(self, seconds: float) -> dict[str, float]:
        """Operations per second of one process since the last record, and their share of what its device could do
        where that is known."""
        depths, self.trainer.depths = self.trainer.depths, []
        sequences = self.trainer.accumulation * self.trainer.micro_size
        done = sequences * sum(self._flops[block].of(steps) for block, steps in depths)
        peak, rate = peak_flops(self.trainer.device), done / seconds
        return {"tflops": rate / 1e12, **({} if peak is None else {"mfu": rate / peak})}

    def held_out(self, found: dict[str, float]) -> None:
        """Record what train/evaluate.py measured."""
        self.held_out_log.write({"step": self.trainer.step, **found})
        kind = "NLL " if any(name.startswith("K=") for name in found) else ""
        self.progress.say(
            f"step {self.trainer.step}: held-out {kind}" + ", ".join(f"{k} {v:.3f}" for k, v in found.items())
        )
        if not all(math.isfinite(value) for value in found.values()):
            self.progress.say("warning: a held-out figure is not finite: the model may have diverged")

    def close(self) -> None:
        self.log.close()
        self.held_out_log.close()
        if self.wandb is not None:
            self.wandb.close()
        if self.spikes:
            what = f"more than {SPIKE:g} deviations above the median of the {SPIKE_WINDOW} before it"
            self.progress.say(f"the loss of {self.spikes} updates was {what}")
        if len(self.last_losses) == 10 and self.first_loss is not None:
            mean = sum(self.last_losses) / 10
            if mean > self.first_loss:
                problem = f"the last losses ({mean:.3f}) lie above the first one ({self.first_loss:.3f})"
                self.progress.say(f"warning: {problem}: lower optimizer.lr or warm up longer")
        self.progress.close()
        output = self.trainer.output
        records, held_out = read(output / "metrics.jsonl"), read(output / "held_out.jsonl")
        for line in before_and_after(held_out):
            self.progress.say(line)
        if len(curves(held_out)) > 1:
            plot_depth(curves(held_out), output / "k_curve.png", self.trainer.config.name)
        if records:
            what = f"{self.trainer.config.objective.loss_name} per {self.trainer.corpus.unit}"
            plot_loss(records, held_out, output / "loss.png", self.trainer.config.name, what)


def first_lines(trainer: Trainer) -> list[str]:
    """What a run is: its size, where it runs, how much of its data it will see."""
    config, corpus = trainer.config, trainer.corpus
    sizes = {p: getattr(p, "ds_numel", p.numel()) for p in trainer.network.parameters()}
    count, trained = sum(sizes.values()), sum(size for p, size in sizes.items() if p.requires_grad)
    size = f"{count:,} parameters" + (f" ({trained:,} of them train)" if trained < count else "")
    per_update = config.batch.global_size
    lines = [
        f"{config.name}: {size}, family {config.model.family}, objective {config.objective.name}, {config.precision}, "
        f"ZeRO {config.deepspeed.zero_stage}, {trainer.world} x {trainer.device.type}",
        f"{config.schedule.steps:,} updates of {per_update:,} x {corpus.seq_len:,} {corpus.unit}s: "
        f"{config.schedule.steps * per_update * corpus.seq_len:,} {corpus.unit}s",
    ]
    rows = corpus.num_rows
    if rows is not None:
        share = config.schedule.steps * per_update / rows
        seen = f"{share:.1f} epochs" if share >= 1 else f"{share:.1%} of the data"
        lines.append(f"an epoch has {rows * corpus.seq_len:,} {corpus.unit}s; the run sees {seen}")
        if per_update > rows:
            lines.append(
                f"warning: batch.global_size {per_update} exceeds the {rows} rows there are: an update repeats rows"
            )
        elif share > 4:
            lines.append(f"warning: {share:.1f} epochs: more data would teach more than repetitions do")
    return lines
