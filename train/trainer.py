"""The one loop over batches, for every objective. Shapes: see rdlm/objectives; one update sees
``batch.global_size`` sequences."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rdlm.atomic import write_file
from rdlm.data.batch import Batch, on_device
from rdlm.errors import UserError
from rdlm.nn.layers import TransformerLayer
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from rdlm.objectives.blockwise import blockwise, drawn_block
from rdlm.registry import build, materialize
from train import checkpoints as resume
from train.checkpoints import RunState
from train.compilation import compile_layers, uncompiled
from train.data import Corpus, Reader
from train.engines import (
    ResidentEngines,
    full_precision_weights,
    grad_norm,
    partitioner,
    start_engine,
    step_without_gradients,
)
from train.evaluate import held_out
from train.export import find_checkpoint, initialize_from
from train.gradient_noise import moment_sums, noise_scale
from train.lora import add_adapters, dropout_seed
from train.metrics import Report
from train.offload import InHost, OnDisk
from train.optim import build_optimizer
from train.process import ProcessError, lock_output
from train.profiling import Profiler
from train.samples import record, written_texts
from train.settings import ScheduleConfig, TrainConfig


def recompute_layers(denoiser: Objective) -> None:
    """Keep only the inputs of each transformer layer and run it again in the backward pass.

    Of a noise level its embedding is kept, C wide; the scales, shifts and gates of AdaLN, 6 D wide at each
    position, are recomputed with the layer. Not re-entrant: that gives the shared core one gradient per
    iteration, and ZeRO 3 accepts one per parameter and backward pass.
    """
    denoiser.drops_modulation_activations()
    draws = any(isinstance(m, torch.nn.Dropout) for m in denoiser.modules())  # of adapters
    for layer in (m for m in denoiser.modules() if isinstance(m, TransformerLayer)):
        plain = layer.forward
        setattr(layer, "forward", partial(checkpoint, plain, use_reentrant=False, preserve_rng_state=draws))  # noqa: B010


@dataclass
class Tally:
    """What one process saw in one update: sum of losses, positions, and metrics as (sum, number of
    micro-batches).

    fp64 scalars on the device: adding a micro-batch does not make the host wait.
    """

    total: Tensor | float = 0.0
    count: Tensor | float = 0.0
    metrics: dict[str, tuple[Tensor | float, int]] = field(default_factory=dict)
    finite: bool = True
    """Whether loss and gradient of the whole update were finite; where the gradient was not, no weight has
    changed."""

    def add(self, total: Tensor, count: Tensor, metrics: dict[str, Tensor]) -> None:
        """Add one micro-batch: the terms of its loss."""
        self.total = self.total + total.detach().double()
        self.count = self.count + count.detach().double()
        for name, value in metrics.items():
            before, number = self.metrics.get(name, (0.0, 0))
            self.metrics[name] = (before + value.detach().double(), number + 1)

    def on_host(self) -> Tally:
        """The tally in plain numbers."""
        metrics: dict[str, tuple[Tensor | float, int]] = {
            name: (float(total), number) for name, (total, number) in self.metrics.items()
        }
        return Tally(float(self.total), float(self.count), metrics, self.finite)


class Trainer:
    """Builds networks, data and DeepSpeed engines from the config, resumes if there is something to resume,
    trains.

    Raises UserError where config, data and earlier checkpoints do not fit. Every rank makes the same calls.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, device: torch.device, terminal: TextIO) -> None:
        self.config, self.corpus, self.device, self.terminal = config, corpus, device, terminal
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.output = Path(config.output)
        self.checkpoints = self.output / "checkpoints"
        self.micro_size, self.accumulation = config.batch.accumulation(self.world)
        if self.rank == 0:
            self._lock = lock_output(self.output, self.say)
            resume.clean(self.checkpoints)
            write_file(self.output / "train_config.json", config.model_dump_json(indent=1) + "\n")
        self._networks: list[Objective] = []
        self.engines = self._start_engines()
        """The engine of each block; of a network that is not cut, its one engine."""
        self.network = self._networks[0] if len(self._networks) == 1 else blockwise(self._networks)
        self.block = 0
        """The block of the last update."""
        self.learning_rate = 0.0
        """Learning rate of the last update."""
        self._own_norm: Tensor | None = None
        self._measures_norm = config.deepspeed.zero_stage == 0 and config.precision == "fp32"
        """There DeepSpeed reports no norm after an update."""
        self._last_good: tuple[Batch, Keys] | None = None
        """The first micro-batch of the last update that was finite, and what its noise is drawn from."""
        self._nonfinite_in_a_row = self._rollbacks = 0
        self.depths: list[tuple[int, float]] = []
        """(Block, mean of its core steps) of the updates since the last record."""
        self._reader = Reader(self._batches)
        try:
            self.state = self._resume()
        except UserError:
            self.close()  # the folder is free again for a run that fits
            raise
        self._saved_step = self.step

    @property
    def step(self) -> int:
        """Updates made."""
        return self.state.step

    @step.setter
    def step(self, value: int) -> None:
        self.state.step = value

    def say(self, line: str) -> None:
        """One line on the terminal, from rank 0."""
        if self.rank == 0:
            print(line, file=self.terminal, flush=True)

    def _start_engines(self) -> Sequence[DeepSpeedEngine]:
        blocks, resident = self.config.blocks, self.config.resident
        if blocks is None or blocks.num_blocks == 1 or self.config.block is not None:
            return [self._start_engine(self.config)]
        starts = [
            partial(self._start_engine, self.config.model_copy(update={"block": block}))
            for block in range(blocks.num_blocks)
        ]
        if resident is None:
            return [start() for start in starts]
        store = partial(OnDisk, self.output) if resident.rest == "disk" else InHost
        return ResidentEngines(starts, store, self.device)

    def _start_engine(self, part: TrainConfig) -> DeepSpeedEngine:
        """Build the network, or the one block that ``part`` names, and its engine; nothing else is allocated."""
        if self.config.init_from is None and self.config.lora is None:
            dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
            denoiser = build(part.checkpoint_config, device="meta")
            materialize(denoiser, self.config.seed, dtype, partitioner(self.config, self.world))
        else:
            denoiser = build(part.checkpoint_config, seed=self.config.seed)
        if self.config.init_from is not None and not resume.checkpoints_in(self.checkpoints):
            for line in initialize_from(denoiser, self.config.init_from, part.block, self.config.init_map):
                self.say(line)
        add_adapters(denoiser, self.config.lora, self.config.seed)
        self._networks.append(denoiser)
        if self.config.compile != "off":
            compile_layers(denoiser)
        if self.config.activation_checkpointing:
            recompute_layers(denoiser)
        optimizer = build_optimizer(denoiser, self.config)
        return start_engine(denoiser, optimizer, self.config, self.world)

    def fit(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end; False if ``should_stop`` cut it short. A checkpoint is written either way.

        Raises UserError where training diverges: ``config.nonfinite`` says what is tolerated.
        """
        config = self.config
        report = Report(self) if self.rank == 0 else None
        if self.step == 0 and config.init_from is not None and config.evaluation.interval_steps:
            self._measure(report)  # what training changes is seen beside it
        seconds, cpu = time.perf_counter(), time.process_time()
        profiler = None if config.profile is None else Profiler(config.profile, self.output, self.rank)
        while self.step < config.schedule.steps:
            index = self.step + self.state.skipped
            batches = self._reader.take(index, index + 1 if self.step + 1 < config.schedule.steps else None)
            if profiler is not None:
                profiler.before(self.step)
            positions, stopping = self._agree(
                sum(float(batch.mask.sum()) for batch in batches), should_stop()
            )
            if stopping:
                break
            tally = self.train_step(on_device(batches, self.device), positions)
            for line in [] if profiler is None else profiler.after(self.step):
                self.say(line)
            self.step += 1
            if not tally.finite:
                self._after_nonfinite(report)
            else:
                self._nonfinite_in_a_row = 0
                self._last_good = batches[0], self._keys(index, 0)
            if tally.finite and (
                self.step % config.log.interval_steps == 0 or self.step == config.schedule.steps
            ):
                now, cpu_now = time.perf_counter(), time.process_time()
                parts = self._gather((tally.on_host(), cpu_now - cpu))
                norm, more = self.grad_norm(), self._gradient_noise()
                if report is not None:
                    report.step(parts, positions, now - seconds, norm, more)
                seconds, cpu = time.perf_counter(), cpu_now
            self._evaluate(report)
            self._write_samples(report)
            if self.step % config.checkpoint.interval_steps == 0 and self.step < config.schedule.steps:
                self.save()
        finished = self.step == config.schedule.steps
        self.save()
        if report is not None:
            report.close()
        return finished

    def train_step(self, batches: list[Batch], positions: float) -> Tally:
        """One update on this process's micro-batches; the loss is the sum over all processes' tokens over
        ``positions``."""
        # DeepSpeed divides by accumulation and averages over processes; both are undone, so that the global
        # count alone divides.
        scale = self.world * self.accumulation / max(1.0, positions)  # conversations may have no answer here
        tally, index, self._own_norm = Tally(), self.step + self.state.skipped, None
        engine = self.due()
        self.learning_rate = learning_rate(self.config.schedule, self.config.optimizer.lr, self.step)
        for group in engine.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["lr_factor"]
        for micro, batch in enumerate(batches):
            if self.config.lora is not None and self.config.lora.dropout:
                torch.manual_seed(dropout_seed(self.config.seed, index, self.rank, micro))
            total, count, metrics = engine(batch, self._keys(index, micro))
            engine.backward(total * scale)
            tally.add(total, count, metrics)
            if self._measures_norm and micro == len(batches) - 1:
                self._own_norm = grad_norm(engine)
            if self._own_norm is not None and not bool(self._own_norm.isfinite()):
                step_without_gradients(engine)
            else:
                engine.step()
        applied = engine.was_step_applied() if self._own_norm is None else bool(self._own_norm.isfinite())
        tally.finite = self._everywhere(torch.as_tensor(tally.total).isfinite() & applied)
        depth, number = tally.metrics["core_steps"]  # in host memory
        self.depths.append((self.block, float(depth) / number))
        return tally

    def _keys(self, index: int, micro: int) -> Keys:
        return Keys(self.config.seed, index, self.rank, micro, self.config.noise_source)

    def due(self) -> DeepSpeedEngine:
        """The engine whose block is trained in the next update."""
        if len(self.engines) == 1:
            return self.engines[0]
        visit = self.step if self.config.resident is None else self.step // self.config.resident.visit_steps
        self.block = drawn_block(len(self.engines), visit, self.config.seed)
        return self.engines[self.block]

    def grad_norm(self) -> float:
        """Norm of the last update's gradient over all parameters that it reached, before clipping."""
        if self._own_norm is not None:
            return float(self._own_norm)
        return float(self.engines[self.block].get_global_grad_norm())

    def _gradient_noise(self) -> dict[str, float]:
        """The gradient noise scale where it is asked for and known. Collective."""
        if not self.config.log.gradient_noise:
            return {}
        engine, spec = self.engines[self.block], self.config.optimizer
        base = getattr(engine.optimizer, "optimizer", engine.optimizer)
        sums = moment_sums(base, spec.betas)
        every = torch.tensor(sums, dtype=torch.float64, device=self.device)
        if self.config.deepspeed.zero_stage > 0:  # each process has a part of the moments
            dist.all_reduce(every[:2])
        squares, seconds, updates = every.tolist()
        found = noise_scale(squares, seconds, updates, spec.betas[0], self.config.batch.global_size)
        return {} if found is None else {"gradient_noise": found}

    def save(self) -> None:
        """Checkpoint the run as it stands, unless that is done. Raises UserError where its loss is not
        finite. Collective."""
        if self._saved_step == self.step:
            return
        self._check_weights()
        resume.save(
            self.engines,
            self.checkpoints,
            self.state,
            self.config,
            self.corpus.identity,
            self.corpus.tokenizer,
        )
        self._saved_step, self._rollbacks = self.step, 0

    def close(self) -> None:
        """Let another run have the output folder."""
        self._reader.close()
        if self.rank == 0:
            self._lock.close()

    def weights(self) -> dict[str, Tensor] | None:
        """All fp32 weights on rank 0 under their names in the network, None elsewhere. Collective."""
        whole: dict[str, Tensor] = {}
        for block, engine in enumerate(self.engines):
            prefix = "" if len(self.engines) == 1 else f"blocks.{block}."
            part = full_precision_weights(engine, engine.module) or {}
            whole |= {prefix + name: weight for name, weight in part.items()}
        return whole if self.rank == 0 else None

    def _resume(self) -> RunState:
        """Load the newest checkpoint that is whole; a new run's state where there is none."""
        found = resume.newest(self.checkpoints, lambda text: self.say(f"warning: {text}"), self._gather)
        if found is None and self.config.branch_from is not None:
            return self._branched(self.config.branch_from)
        if found is None:
            return RunState()
        state = resume.load(
            self.engines,
            found,
            self.config,
            self.corpus.identity,
            lambda text: self.say(f"resuming with {text}"),
        )
        if self.rank == 0:
            for path in resume.foreign_entries(self.checkpoints):
                self.say(f"ignoring {path}: it is not a checkpoint of this run")
            for path in resume.set_aside_damaged(self.checkpoints, state.step):
                self.say(f"renamed a damaged checkpoint to {path}")
        return state

    def _branched(self, source: str) -> RunState:
        """Load what another run left, and go on from there."""
        path = find_checkpoint(Path(source), "last", self.say, "branch_from")
        state = resume.load(
            self.engines,
            path,
            self.config,
            self.corpus.identity,
            lambda text: self.say(f"branching with {text}"),
        )
        if state.step >= self.config.schedule.steps:
            problem = f"has made {state.step} updates, and schedule.steps is {self.config.schedule.steps}"
            raise UserError(
                "branch_from", source, problem, "raise schedule.steps, or give an earlier checkpoint"
            )
        self.say(f"branched from {path} at step {state.step}")
        state.history.append({"step": state.step, "branched_from": str(path)})
        return state

    def _batches(self, index: int) -> list[Batch]:
        """This process's micro-batches of batch ``index``, on the host. Raises UserError for ids that the
        model does not know."""
        batches = [
            self.corpus.batch(
                index, seed=self.config.seed, global_batch=self.config.batch.global_size, rank=self.rank,
                world=self.world,
                micro_index=micro, micro_size=self.micro_size,
            )
            for micro in range(self.accumulation)
        ]  # fmt: skip
        known = self.config.model.vocab_size
        for ids in (ids for b in batches for ids in (b.inputs, b.targets) if not ids.is_floating_point()):
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < known:
                problem = f"batch {index} holds ids from {int(ids.min())} to {int(ids.max())}; the model knows {known}"
                remedy = "prepare the data again, or raise model.vocab_size"
                raise ProcessError("data", self.config.data.folder, problem, remedy)
        return batches

    def _agree(self, positions: float, stop: bool) -> tuple[float, bool]:
        """Positions of all processes, and whether any of them was asked to stop."""
        both = torch.tensor([positions, float(stop)], dtype=torch.float64, device=self.device)
        dist.all_reduce(both)
        return float(both[0]), bool(both[1] > 0)

    def _everywhere(self, mine: bool | Tensor) -> bool:
        """Whether it is so on every process. The host waits for the device here, once an update."""
        flag = torch.as_tensor(mine, device=self.device).float()
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def _after_nonfinite(self, report: Report | None) -> None:
        """Do what ``config.nonfinite`` says after an update that was not finite; raises UserError where that
        has an end."""
        action, limit = self.config.nonfinite.action, self.config.nonfinite.limit
        self._nonfinite_in_a_row += 1
        what = f"loss or gradient of update {self.step} is not finite"
        if action == "rollback" and self._saved_step > 0 and self._rollbacks < limit:
            self._rollbacks += 1
            failed, skipped, history = self.step, self.state.skipped, self.state.history
            self.state = self._resume()
            self.state.skipped = skipped + failed - self.step
            self.state.history = [*history, {"step": self.step, "rollback_from": failed}]
            self._saved_step = self.step
            self.say(f"{what}: back to the checkpoint of step {self.step}, with later batches")
            if report is not None:
                report.rewind()
        elif action == "skip" and self._nonfinite_in_a_row <= limit:
            self.say(f"{what}: it changed no weight ({self._nonfinite_in_a_row} in a row)")
        else:
            raise self._diverged(f"training diverged at update {self.step}")

    def _check_weights(self) -> None:
        """UserError if the loss of a batch that was finite before its update is not finite any more."""
        if self._last_good is None:
            if self._nonfinite_in_a_row:
                raise self._diverged(f"training diverged at update {self.step}")
            return
        batch, keys = self._last_good
        with torch.no_grad(), uncompiled():
            total, _, _ = self.engines[self.block].module(batch.to(self.device), keys)
        if not self._everywhere(bool(total.isfinite())):
            raise self._diverged(f"training diverged before update {self.step + 1}")

    def _diverged(self, problem: str) -> UserError:
        remedy = (
            "lower optimizer.lr or optimizer.grad_clip, or warm up longer; earlier checkpoints are untouched"
        )
        return UserError("loss", float("nan"), problem, remedy)

    def _gather(self, mine: Any) -> list[Any]:
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, mine)
        return parts

    def _evaluate(self, report: Report | None) -> None:
        if not self._is_due(self.config.evaluation.interval_steps):
            return
        found = self._measure(report)
        if self.config.checkpoint.keep_best:
            self._keep_best(found)

    def _measure(self, report: Report | None) -> dict[str, float]:
        """Held-out figures of the weights as they are, recorded. Collective."""
        with uncompiled():
            found = held_out(self._whole(), self.config, self.corpus, self.device)
        if report is not None:
            report.held_out(found)
        return found

    def _is_due(self, interval: int) -> bool:
        """Whether what happens every ``interval`` updates, 0 for never, happens after this one."""
        return interval > 0 and (self.step % interval == 0 or self.step == self.config.schedule.steps)

    def _whole(self) -> Objective:
        """The network to evaluate. With resident blocks K is 1 (train/config_file.py), which is block 0."""
        one = len(self.engines) == 1 or self.config.resident is not None
        network: Objective = self.engines[0].module if one else self.network
        return network

    def _write_samples(self, report: Report | None) -> None:
        asked, tokenizer = self.config.samples, self.corpus.tokenizer
        if tokenizer is None or not self._is_due(asked.interval_steps):
            return
        with uncompiled():
            texts = written_texts(self._whole(), asked, tokenizer, self.config.model.max_seq_len, self.device)
        if report is not None:
            record(self.output / "samples.md", self.config.name, self.step, texts, report.held_out_log)

    def _keep_best(self, found: dict[str, float]) -> None:
        """Save and mark the checkpoint if its held-out figure is the best so far. Collective: all ranks have
        the same figures."""
        metric, value, sign = chosen_metric(found)
        record = resume.best_record(self.checkpoints)
        better = record is None or record["metric"] != metric or sign * value > sign * record["value"]
        if self._everywhere(math.isfinite(value) and better):
            self.save()
            if self.rank == 0:
                resume.mark_best(self.checkpoints, self.step, metric, value)
                resume.prune(self.checkpoints, self.step, self.config.checkpoint.keep)


def constant(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """The peak rate."""
    return peak


def cosine(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """Half a cosine from the peak to ``min_lr_ratio * peak`` at the last update."""
    floor = schedule.min_lr_ratio * peak
    span = max(1, schedule.steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def trapezoid(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """The peak rate, then linear to ``min_lr_ratio * peak`` over the last ``cooldown_steps`` updates (also
    called WSD)."""
    if not schedule.cooldown_steps:
        return peak
    floor = schedule.min_lr_ratio * peak
    remaining = max(0, schedule.steps - 1 - step)
    return floor + (peak - floor) * min(1.0, remaining / schedule.cooldown_steps)


SCHEDULES: dict[str, Callable[[ScheduleConfig, float, int], float]] = {
    "constant": constant,
    "cosine": cosine,
    "trapezoid": trapezoid,
}
"""Name -> rate of update ``step`` (0-based) after the warm-up, in 1 / update."""


def learning_rate(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """Rate of update ``step`` (0-based): a pure function, so that resuming needs no scheduler state.

    Warm-up is linear and reaches ``peak`` at ``step == warmup_steps``.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / (schedule.warmup_steps + 1)
    return SCHEDULES[schedule.kind](schedule, peak, step)


def chosen_metric(found: dict[str, float]) -> tuple[str, float, int]:
    """The held-out figure that decides which checkpoint is best: (name, value, 1 if more is better else -1).

    The accuracy at the largest K where there is one, else the NLL at the largest K, else the denoising loss.
    """
    accuracies = [name for name in found if name.startswith("accuracy")]
    name = (accuracies or list(found))[-1]
    return name, found[name], 1 if accuracies else -1
