"""Starts ``deepspeed --module train.pretrain`` with the right number of processes, and sees to their end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from rdlm.errors import UserError
from train.process import LAUNCHER_PID, die_with_launcher, fail
from train.settings import TrainConfig, load

ROOT = Path(__file__).resolve().parent.parent
CPU_PROCESSES = 2


def launch(path: str, overrides: list[str], num_procs: int | None, devices: list[int] | None = None) -> int:
    """Train in ``num_procs`` processes (None: one per GPU, or 2 on CPU); returns the exit status. Raises UserError before
    anything is started. devices: the GPUs to use, None for the first ``num_procs``.

    A SIGTERM or SIGINT is passed on: training finishes its update, writes a checkpoint, and the status is 128 + signal.
    """
    if LAUNCHER_PID in os.environ:  # started by train/parallel.py
        die_with_launcher()
    config = load(path, overrides)
    on_gpu, available = accelerators()
    world = num_procs or (available if on_gpu else min(CPU_PROCESSES, available))
    if on_gpu and world > available:
        raise UserError("--num-procs", world, f"there are {available} GPUs", f"use at most {available}")
    _check_devices(devices, world, available if on_gpu else 0)
    from train.run import check

    check(config, world)
    # DeepSpeed would ignore CUDA_VISIBLE_DEVICES beside a number: GPUs are chosen by name.
    which = (
        ["--num_accelerators", str(world)]
        if devices is None
        else ["--include", f"localhost:{_listed(devices)}"]
    )
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", *which, "--master_port", str(_free_port()),
        "--log_level", "critical", "--module", "train.pretrain", "--config", path, *overrides,
    ]  # fmt: skip
    status, received = _run(command, _environment(on_gpu))
    return _conclude(config, status, received)


def accelerators() -> tuple[bool, int]:
    """(whether there are GPUs, how many there are, or CPU cores)."""
    import torch

    on_gpu = torch.cuda.is_available()
    return on_gpu, torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0))


def _listed(devices: list[int]) -> str:
    return ",".join(map(str, devices))


def _check_devices(devices: list[int] | None, world: int, num_gpus: int) -> None:
    if devices is None:
        return
    if not num_gpus or not all(0 <= d < num_gpus for d in devices):
        raise UserError(
            "--devices",
            _listed(devices),
            f"there are {num_gpus} GPUs",
            "name GPUs of this machine, or leave it out",
        )
    if len(set(devices)) != world:
        raise UserError(
            "--devices", _listed(devices), f"does not name {world} GPUs", "set --num-procs to their number"
        )


def _environment(on_gpu: bool) -> dict[str, str]:
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    accelerator = "cuda" if on_gpu else "cpu"
    return {
        **os.environ,
        "PYTHONPATH": python_path,
        "DS_ACCELERATOR": accelerator,
        LAUNCHER_PID: str(os.getpid()),
    }


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, int | None]:
    """(exit status, the signal that was passed on). A session of its own: Ctrl-C reaches us alone, and we pass it on once;
    a second signal ends everything at once."""
    received: list[int] = []
    previous = {
        n: signal.signal(n, lambda number, _: received.append(number))
        for n in (signal.SIGTERM, signal.SIGINT)
    }
    told: set[int] = set()
    try:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        while process.poll() is None:
            if received:
                _signal_family(process.pid, told, kill=len(received) > 1)
            time.sleep(0.1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return process.returncode, received[0] if received else None


def _signal_family(launcher: int, told: set[int], kill: bool) -> None:
    """SIGTERM, once, to the training processes alone: DeepSpeed's launchers above them would kill instead of waiting for the
    checkpoint. ``kill``: SIGKILL to all of them."""
    try:
        chief = psutil.Process(launcher)
        family = [*chief.children(recursive=True), chief]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            words = process.cmdline()
            if kill:
                process.kill()
            elif (
                process.pid not in told
                and "train.pretrain" in words
                and not any("deepspeed" in word for word in words)
            ):
                told.add(process.pid)
                process.terminate()
        except psutil.NoSuchProcess:
            continue


def _conclude(config: TrainConfig, status: int, received: int | None) -> int:
    output = Path(config.output)
    if received is not None and status == 0:
        print(
            f"stopped; the same command goes on from the last checkpoint in {output / 'checkpoints'}",
            file=sys.stderr,
        )
    elif killed := _signal_of(status):
        fail(
            f"a training process {_death(killed)}; the same command goes on from the last checkpoint, logs are in {output / 'logs'}"
        )
    elif status not in (0, 2):
        fail(f"training ended with status {status}; what its processes wrote is in {output / 'logs'}")
    if received is not None:
        return 128 + received
    return 128 + killed if (killed := _signal_of(status)) else status


def _signal_of(status: int) -> int:
    """The signal that ended a process, 0 for none. DeepSpeed's launcher exits with the negative status of its worker, modulo 256."""
    number = -status if status < 0 else 256 - status
    return number if 0 < number < signal.NSIG else 0


def _death(number: int) -> str:
    if number == signal.SIGKILL:
        return "was killed (SIGKILL): where nobody did, memory ran out; `rdlm plan CONFIG --memory ...` says what would fit"
    return f"ended by {signal.Signals(number).name}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
