"""What the DeepSpeed launcher starts on every process: ``deepspeed --module train.pretrain --config CONFIG
[key=value ...]``.

`rdlm train` has parsed and checked the config already and passes ``--checked FILE``. Everything that can be
wrong is looked for here, by ``check``, before a weight is allocated.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import psutil

from rdlm.errors import UserError, out_of_memory, reason
from rdlm.registry import build
from train.config_file import load, read_checked
from train.data import Corpus, build_corpus
from train.process import (
    ProcessError,
    StopSignal,
    capture_output,
    device_kind,
    die_with_launcher,
    environment,
    fail,
    lock_output,
    lost_peer,
    tell,
    tune_cpu,
)
from train.settings import TrainConfig
from train.wandb_sink import wandb_module

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Longest wait of a collective operation: exporting or reading a large checkpoint exceeds DeepSpeed's 10
minutes."""
PATIENCE_SECONDS = 10.0
"""Wait of a process whose peer has ended; DeepSpeed's launcher looks every second."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.ESTALE)
BYTES = {"bf16": 14, "fp32": 16}
"""Bytes of a parameter in a checkpoint: weights, fp32 masters and two moments."""


def main() -> int:
    """Exit status: 0 trained or stopped by a signal after a checkpoint, 2 the user's mistake. Any other exception is a
    defect of ours and keeps its traceback (``capture_output``); its status is 1."""
    parser = argparse.ArgumentParser(prog="train.pretrain")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="YAML file, to be checked here")
    source.add_argument("--checked", help="JSON file that `rdlm train` has checked")
    parser.add_argument("--local_rank", type=int, help="set by the launcher; LOCAL_RANK says the same")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    rank, _ = environment()
    terminal = sys.stderr
    try:
        die_with_launcher()
        config = (
            load(arguments.config, arguments.overrides)
            if arguments.checked is None
            else read_checked(Path(arguments.checked))
        )
        stop = StopSignal()
        if rank == 0:
            tell(f"rdlm train: building {config.name}", terminal)
        terminal = capture_output(config, rank)
        train(config, stop, terminal)
        return 0
    except UserError as error:
        if rank == 0 or isinstance(error, ProcessError):  # other mistakes are found by every rank
            fail(str(error), terminal)
        return 2
    except (OSError, MemoryError, RuntimeError) as error:
        if lost_peer(error):
            traceback.print_exc()  # into the log
            _leave_the_word_to_others(stop)
            return 1
        found = _of_the_machine(error, config)
        if found is None:
            raise
        traceback.print_exc()  # into the log
        fail(str(found), terminal)
        return 2


def _leave_the_word_to_others(stop: StopSignal) -> None:
    """Wait for the launcher to notice the process that ended first, and how: that is what it reports."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not stop.received and time.monotonic() < until:
        time.sleep(0.1)


def _of_the_machine(error: Exception, config: TrainConfig) -> UserError | None:
    """What a user can do about a disk or a memory that is full; None for any other error."""
    if out_of_memory(error):
        remedy = "lower it, or ask `rdlm plan CONFIG --memory ...` what fits"
        size = config.batch.micro_size or config.batch.global_size
        return UserError("batch.micro_size", size, f"memory ran out ({reason(error)})", remedy)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        problem = f"cannot be written or read any more ({reason(error)})"
        return UserError(
            "output", config.output, problem, "make room or restore it; the same command goes on"
        )
    return None


def check(config: TrainConfig, world: int) -> Corpus:
    """Everything that can be found wrong before a process is started or a weight allocated; raises UserError."""
    config.batch.accumulation(world)
    count = count_parameters(config)
    memory, size = psutil.virtual_memory().total, 2 if config.precision == "bf16" else 4
    if size * count > memory:
        problem = f"{count:,} parameters in {config.precision} do not fit into {memory / 2**30:.0f} GiB of host memory"
        raise UserError(
            "model", config.model.family, problem, "make the model smaller, or train its blocks separately"
        )
    _check_optimizer(config)
    if config.log.wandb is not None:
        wandb_module()
    from train.samples import check_samples

    corpus = build_corpus(config.data, config.fills_in)
    if config.init_from is not None or config.branch_from is not None:
        _check_origin(config, corpus)
    if config.resident is not None and config.resident.rest == "host" and device_kind() == "cpu":
        problem = "without GPUs blocks train in host memory"
        raise UserError("resident.rest", "host", problem, "set resident.rest=disk")
    corpus.check_model(config.model)
    check_samples(config, corpus.tokenizer)
    if config.evaluation.interval_steps:
        next(iter(corpus.windows(1, 1)))  # the held-out split is there and long enough
    return corpus


def _check_origin(config: TrainConfig, corpus: Corpus) -> None:
    """UserError where the weights that the run starts from are not there or do not fit. A run that resumes does
    not read them again."""
    from train.checkpoints import checkpoints_in
    from train.export import check_init_from, find_checkpoint

    if checkpoints_in(Path(config.output) / "checkpoints"):
        return
    if config.init_from is not None:
        check_init_from(config, config.init_from, corpus.tokenizer)
    if config.branch_from is not None:
        find_checkpoint(Path(config.branch_from), "last", lambda text: None, "branch_from")


def count_parameters(config: TrainConfig) -> int:
    """Parameters of the network, or of the one block that is trained. UserError for a model that cannot be
    built."""
    return sum(p.numel() for p in build(config.checkpoint_config, device="meta").parameters())


def _check_optimizer(config: TrainConfig) -> None:
    from train.lora import add_adapters
    from train.optim import NOT_OFFLOADED, OPTIMIZERS, check_patterns

    name = config.optimizer.name
    if name not in OPTIMIZERS:
        raise UserError(
            "optimizer.name", name, "there is no such optimizer", f"use one of {', '.join(OPTIMIZERS)}"
        )
    if config.deepspeed.offload_optimizer == "cpu" and name in NOT_OFFLOADED:
        problem = f"optimizer {name!r} does not run on the CPU while the weights are elsewhere"
        raise UserError("deepspeed.offload_optimizer", "cpu", problem, "set it to none, or use adamw")
    if config.optimizer.freeze or config.optimizer.lr_factors or config.lora is not None:
        parts = build(config.checkpoint_config, device="meta").parts
        names = [name for part in parts for name, _ in part.named_parameters()]
        check_patterns(names, config.optimizer, config.lora)
        for part in parts:
            add_adapters(part, config.lora, config.seed)


def check_output(config: TrainConfig) -> None:
    """UserError where the output folder cannot be written, another run holds it, or not even one checkpoint
    fits on its disk."""
    lock_output(Path(config.output), lambda text: None).close()
    try:
        with tempfile.TemporaryFile(dir=config.output):
            free = shutil.disk_usage(config.output).free
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise UserError("output", config.output, problem, "set another output folder") from None
    count = count_parameters(config)
    one, model = BYTES[config.precision] * count, 4 * count
    if free < one + model:
        problem = (
            f"{free / 1e9:.1f} GB are free; a checkpoint takes {one / 1e9:.1f} GB and the model "
            f"{model / 1e9:.1f} GB"
        )
        raise UserError("output", config.output, problem, "make room, or set another output folder")
    kept = (config.checkpoint.keep + 1) * one + model
    there = sum(p.stat().st_size for p in Path(config.output, "checkpoints").rglob("*") if p.is_file())
    if free + there < kept:
        line = (
            f"{free / 1e9:.1f} GB are free in {config.output}; checkpoint.keep={config.checkpoint.keep} takes "
            f"{kept / 1e9:.1f} GB"
        )
        tell(f"rdlm train: warning: {line}")


def check_precision(config: TrainConfig, bf16_supported: bool) -> None:
    """UserError for bf16 on a device without it."""
    if config.precision == "bf16" and not bf16_supported:
        raise UserError("precision", "bf16", "this device does not compute in bf16", "set precision=fp32")


def train(config: TrainConfig, stop: StopSignal, terminal: TextIO) -> bool:
    """Train, or go on training; export the model at the end or after ``stop``. False if ``stop`` came first.
    Raises UserError."""
    rank, processes_here = environment()
    tune_cpu(processes_here)
    import torch

    on_gpu = device_kind() == "cuda"
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    if config.deterministic:
        use_deterministic_algorithms()
    import deepspeed
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    from train.export import export_run
    from train.trainer import Trainer

    # An all-reduce for inference that training never calls: compiling it costs the first run a minute and a
    # C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    check_precision(config, get_accelerator().is_bf16_supported())
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False, timeout=COLLECTIVE_TIMEOUT)
    try:
        corpus = check(config, dist.get_world_size())
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        trainer = Trainer(config, corpus, device, terminal)
        finished = trainer.fit(lambda: stop.received)
        if rank == 0 and trainer.step:
            model = export_run(trainer.output)
            trainer.say(f"wrote {model}; `rdlm inspect {model}` says what can be done with it")
        trainer.close()
        return finished
    finally:
        dist.destroy_process_group()


def use_deterministic_algorithms() -> None:
    """Kernels that give the same bits every time; what has none raises. To be called before CUDA is used."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    # All memory is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written. Taking the interpreter down beside the threads of gloo and torch now and then
    # aborts, which the
    # launcher would report as a failed run.
    os._exit(status)
