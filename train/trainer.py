"""The one loop over batches, for every objective. Shapes: see rdlm/objectives/losses.py; one update sees ``batch.global_size`` sequences."""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rdlm.data.batch import Batch
from rdlm.errors import UserError
from rdlm.nn.transformer import TransformerLayer
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from rdlm.objectives.blockwise import blockwise, drawn_block
from rdlm.registry import build
from train import checkpoints as resume
from train.data import Corpus
from train.ds_config import ds_config
from train.engine_state import full_precision_weights, unreported_grad_norm
from train.engines import BlockEngines, ResidentEngines
from train.evaluate import held_out
from train.metrics import MetricsLog, Progress, peak_memory, plot_loss, read
from train.offload import InHost, OnDisk
from train.optimizer import build_optimizer
from train.schedule import learning_rate
from train.settings import TrainConfig


def recompute_layers(denoiser: Objective) -> None:
    """Keep only the inputs of each transformer layer and run it again in the backward pass.

    Of a noise level that is its embedding, C wide; scales, shifts and gates, 6 D wide at each position, are recomputed with the layer.
    Not re-entrant: that gives the shared core one gradient per iteration, and ZeRO 3 accepts one per parameter and backward pass.
    """
    denoiser.drops_modulation_activations()
    for layer in (m for m in denoiser.modules() if isinstance(m, TransformerLayer)):
        plain = layer.forward
        setattr(layer, "forward", partial(checkpoint, plain, use_reentrant=False, preserve_rng_state=False))  # noqa: B010


@dataclass
class Tally:
    """What one process saw in one update: sum of losses, positions, and metrics as (sum, number of micro-batches)."""

    total: float = 0.0
    count: float = 0.0
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, total: Tensor, count: Tensor, metrics: dict[str, Tensor]) -> None:
        """One micro-batch: see rdlm.objectives.losses.LossTerms."""
        self.total += float(total.detach())
        self.count += float(count)
        for name, value in metrics.items():
            before, number = self.metrics.get(name, (0.0, 0))
            self.metrics[name] = (before + float(value), number + 1)


class Trainer:
    """Builds model, data and DeepSpeed engine from the config, resumes if there is something to resume, trains.

    Raises UserError where config, data and earlier checkpoints do not fit. Every rank makes the same calls.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, device: torch.device, terminal: TextIO) -> None:
        self.config, self.corpus, self.device, self.terminal = config, corpus, device, terminal
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.output = Path(config.output)
        self.checkpoints = self.output / "checkpoints"
        self.micro_size, self.accumulation = config.batch.accumulation(self.world)
        if self.rank == 0:
            self._lock = _lock(self.output)
            resume.clean(self.checkpoints)
        self._built: list[Objective] = []
        self.engines = self._engines()
        self.network = self._built[0] if len(self._built) == 1 else blockwise(self._built)
        self._own_norm: Tensor | None = None
        self.step = self._saved_step = self._resume()
        """Updates made."""

    @property
    def engine(self) -> deepspeed.DeepSpeedEngine | BlockEngines:
        """What a checkpoint is made of: the engine, or those of all blocks."""
        return self.engines.active if len(self.engines) == 1 else self.engines

    def _engines(self) -> BlockEngines:
        blocks, resident = self.config.blocks, self.config.resident
        if blocks is None or blocks.num_blocks == 1 or self.config.block is not None:
            return BlockEngines(1, lambda _: self._start(self.config))

        def start(block: int) -> deepspeed.DeepSpeedEngine:
            return self._start(self.config.model_copy(update={"block": block}))

        if resident is None:
            return BlockEngines(blocks.num_blocks, start)
        rest = partial(OnDisk, self.output) if resident.rest == "disk" else InHost
        return ResidentEngines(blocks.num_blocks, start, rest, self.device)

    def _start(self, part: TrainConfig) -> deepspeed.DeepSpeedEngine:
        """Build the network, or the one block that ``part`` names, and its engine; nothing else is allocated."""
        denoiser = build(part.checkpoint_config, seed=self.config.seed)
        self._built.append(denoiser)
        if self.config.activation_checkpointing:
            recompute_layers(denoiser)
        optimizer, config = build_optimizer(denoiser, self.config), ds_config(self.config, self.world)
        return deepspeed.initialize(model=denoiser, optimizer=optimizer, config=config)[0]

    def fit(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end; False if ``should_stop`` cut it short. A checkpoint is written either way."""
        report = Report(self) if self.rank == 0 else None
        seconds, cpu = time.perf_counter(), time.process_time()
        while self.step < self.config.schedule.steps:
            batches = self._batches(self.step)
            positions, stopping = self._agree(
                sum(float(batch.mask.sum()) for batch in batches), should_stop()
            )
            if stopping:
                break
            tally = self.train_step(batches, positions)
            self.step += 1
            if self.step % self.config.log.interval_steps == 0 or self.step == self.config.schedule.steps:
                now, cpu_now = time.perf_counter(), time.process_time()
                parts = self._gather((tally, cpu_now - cpu))
                self._check_finite(parts)
                if report is not None:
                    report.step(parts, positions, now - seconds, self.grad_norm())
                seconds, cpu = time.perf_counter(), cpu_now
            self._evaluate(report)
            if (
                self.step % self.config.checkpoint.interval_steps == 0
                and self.step < self.config.schedule.steps
            ):
                self.save()
        finished = self.step == self.config.schedule.steps
        if self._saved_step != self.step:
            self.save()
        if report is not None:
            report.close()
        return finished

    def train_step(self, batches: list[Batch], positions: float) -> Tally:
        """One update on this process's micro-batches; the loss is the sum over all processes' tokens over ``positions``."""
        # DeepSpeed divides by accumulation and averages over processes; both are undone, so that the global count alone divides.
        scale = self.world * self.accumulation / positions
        tally, seed = Tally(), self.config.seed
        engine = self.due()
        rate = learning_rate(self.config.schedule, self.config.optimizer.lr, self.step)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        for micro, batch in enumerate(batches):
            total, count, metrics = engine(batch, Keys(seed, self.step, self.rank, micro))
            engine.backward(total * scale)
            tally.add(total, count, metrics)
            if micro == len(batches) - 1:
                self._own_norm = unreported_grad_norm(engine)
            engine.step()
        return tally

    def due(self) -> deepspeed.DeepSpeedEngine:
        """The engine whose block is trained in the next update."""
        visit = self.step if self.config.resident is None else self.step // self.config.resident.visit_steps
        return self.engines.choose(drawn_block(len(self.engines), visit, self.config.seed))

    def grad_norm(self) -> float:
        """Norm of the last update's gradient over all parameters that it reached, before clipping."""
        return float(self.engines.active.get_global_grad_norm() if self._own_norm is None else self._own_norm)

    def save(self) -> None:
        """Checkpoint the run as it stands."""
        resume.save(self.engine, self.checkpoints, self.step, self.config, self.corpus.identity)
        self._saved_step = self.step

    def close(self) -> None:
        """Let another run have the output folder."""
        if self.rank == 0:
            self._lock.close()

    def weights(self) -> dict[str, Tensor] | None:
        """All fp32 weights on rank 0, None elsewhere. Collective."""
        whole = {name: weight for part in self.weights_by_block() for name, weight in part.items()}
        return whole if self.rank == 0 else None

    def weights_by_block(self) -> Iterator[dict[str, Tensor]]:
        """fp32 weights under their names in the network, one block in memory at a time; empty except on rank 0. Collective."""
        for block, engine in enumerate(self.engines):
            prefix = "" if len(self.engines) == 1 else f"blocks.{block}."
            part = full_precision_weights(engine, engine.module) or {}
            yield {prefix + name: weight for name, weight in part.items()}

    def _resume(self) -> int:
        found: list[Path | None] = [None]
        if self.rank == 0:
            found = [
                resume.newest(self.checkpoints, lambda text: print(f"warning: {text}", file=self.terminal))
            ]
        dist.broadcast_object_list(found)
        return (
            0 if found[0] is None else resume.load(self.engine, found[0], self.config, self.corpus.identity)
        )

    def _batches(self, step: int) -> list[Batch]:
        batches = [
            self.corpus.batch(
                step, seed=self.config.seed, global_batch=self.config.batch.global_size, rank=self.rank, world=self.world,
                micro_index=micro, micro_size=self.micro_size,
            )
            for micro in range(self.accumulation)
        ]  # fmt: skip
        return [batch.to(self.device) for batch in batches]

    def _agree(self, positions: float, stop: bool) -> tuple[float, bool]:
        """Positions of all processes, and whether any of them was asked to stop."""
        both = torch.tensor([positions, float(stop)], device=self.device)
        dist.all_reduce(both)
        return float(both[0]), bool(both[1] > 0)

    def _check_finite(self, parts: list[tuple[Tally, float]]) -> None:
        """A diverged run must not go on, nor be saved."""
        loss = sum(tally.total for tally, _ in parts)
        if not math.isfinite(loss):
            remedy = "lower optimizer.lr or optimizer.grad_clip, or warm up longer; earlier checkpoints are untouched"
            raise UserError("loss", loss, f"training diverged at update {self.step}", remedy)

    def _gather(self, mine: Any) -> list[Any]:
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, mine)
        return parts

    def _evaluate(self, report: Report | None) -> None:
        interval = self.config.evaluation.interval_steps
        if not interval or (self.step % interval and self.step != self.config.schedule.steps):
            return
        # Resident blocks are asked for K = 1 alone (train/settings.py), which is block 0.
        one = len(self.engines) == 1 or self.config.resident is not None
        network = self.engines.choose(0).module if one else self.network
        found = held_out(network, self.config, self.corpus, self.device)
        if report is not None:
            report.held_out(found)


class Report:
    """Rank 0's account of the run: metrics files, progress, plot."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, config = trainer, trainer.config
        self.log = MetricsLog(trainer.output / "metrics.jsonl", trainer.step, config.log.tensorboard)
        self.held_out_log = MetricsLog(
            trainer.output / "held_out.jsonl", trainer.step, config.log.tensorboard
        )
        self.cpu_seconds = float(self.log.last.get("cpu_seconds", 0.0))
        self.seconds = float(self.log.last.get("seconds", 0.0))
        self.logged_step, self.swapped = trainer.step, trainer.engines.swap_seconds
        self.progress = Progress(config.schedule.steps, trainer.step, trainer.terminal, trainer.corpus.unit)
        if trainer.step:
            self.progress.say(f"resumed {config.name} at step {trainer.step}")

    def step(
        self, parts: list[tuple[Tally, float]], positions: float, seconds: float, grad_norm: float
    ) -> None:
        """Record the update just made. parts: every process's tally and CPU seconds; seconds: since the last record."""
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
            "loss": sum(t.total for t in tallies) / positions,
            "lr": learning_rate(config.schedule, config.optimizer.lr, trainer.step - 1),
            "grad_norm": grad_norm,
            f"{trainer.corpus.unit}s_per_s": positions * steps / seconds,
            "step_s": seconds / steps,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_memory_bytes": peak_memory(trainer.device),
        }
        if len(trainer.engines) > 1:
            record["block"] = trainer.engines.index
        if config.resident is not None:
            record["swap_share"] = (trainer.engines.swap_seconds - self.swapped) / seconds
            self.swapped = trainer.engines.swap_seconds
        for name in sorted({name for tally in tallies for name in tally.metrics}):
            pairs = [tally.metrics[name] for tally in tallies if name in tally.metrics]
            record[name] = sum(total for total, _ in pairs) / sum(number for _, number in pairs)
        self.logged_step = trainer.step
        self.log.write(record)
        self.progress.update(trainer.step, record)

    def held_out(self, found: dict[str, float]) -> None:
        """Record what train/evaluate.py measured."""
        self.held_out_log.write({"step": self.trainer.step, **found})
        kind = "NLL " if any(name.startswith("K=") for name in found) else ""
        self.progress.say(
            f"step {self.trainer.step}: held-out {kind}" + ", ".join(f"{k} {v:.3f}" for k, v in found.items())
        )

    def close(self) -> None:
        self.log.close()
        self.held_out_log.close()
        self.progress.close()
        output = self.trainer.output
        records = read(output / "metrics.jsonl")
        if records:
            loss = (
                "weighted squared error"
                if self.trainer.config.objective.name == "edm"
                else "cross-entropy, nats"
            )
            what = f"{loss} per {self.trainer.corpus.unit}"
            plot_loss(
                records, read(output / "held_out.jsonl"), output / "loss.png", self.trainer.config.name, what
            )


def _lock(output: Path) -> TextIO:
    """Hold the output folder for this run; the kernel releases it when the process ends, however it ends."""
    output.mkdir(parents=True, exist_ok=True)
    lock = (output / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            "output", str(output), "another run is writing there", "wait for it, or set another output folder"
        ) from None
    return lock
