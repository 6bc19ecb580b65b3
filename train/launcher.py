"""``rdlm train``: checks a config once, starts ``deepspeed --module train.pretrain`` and waits for its end.

With ``--parallel`` each block is a launch of its own, restarted from its last checkpoint where it dies, and
merged at the end. The launches share nothing but the config: what runs is ``rdlm train CONFIG --block N``, as
one would type it on as many machines.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from rdlm.errors import UserError
from train.config_file import block_folder, load, written_checked
from train.process import LAUNCHER, device_kind, die_with_launcher, fail, launcher_name, stop_signals, tell
from train.settings import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
CPU_PROCESSES = 2
VISIBLE = "CUDA_VISIBLE_DEVICES"


def launch(path: str, overrides: list[str], num_procs: int | None, devices: list[int] | None = None) -> int:
    """Train in ``num_procs`` processes (None: one per GPU, or 2 on CPU); returns the exit status. Raises
    UserError before anything is started. devices: the GPUs to use as this process numbers them, None for the
    first ``num_procs``.

    A SIGTERM, SIGINT or SIGHUP is passed on: training finishes its update, writes a checkpoint, and the status is 128
    + signal.
    """
    die_with_launcher()  # this may be one of the launches of --parallel
    config = load(path, overrides)
    on_gpu, available = accelerators()
    world = num_procs or (available if on_gpu else min(CPU_PROCESSES, available))
    if on_gpu and world > available:
        raise UserError("--num-procs", world, f"there are {available} GPUs", f"use at most {available}")
    _check_devices(devices, world, available if on_gpu else 0)
    from train.pretrain import check, check_output

    check(config, world)
    check_output(config)
    which = (
        ["--include", f"localhost:{_physical(devices or list(range(world)))}"]
        if on_gpu
        else ["--num_accelerators", str(world)]
    )
    with written_checked(config) as checked:
        command = [
            sys.executable, "-m", "deepspeed.launcher.runner", *which, "--master_port", str(_free_port()),
            "--log_level", "critical", "--module", "train.pretrain", "--checked", str(checked),
        ]  # fmt: skip
        where = "on GPUs" if on_gpu else "on the CPU"
        tell(
            f"rdlm train: processes {where}: {world}; importing torch and DeepSpeed comes first; "
            f"logs are in {config.output}/logs"
        )
        status, received = _run(command, _environment(on_gpu))
    return _conclude(config, status, received)


def accelerators() -> tuple[bool, int]:
    """(whether training runs on GPUs, how many there are, or CPU cores)."""
    import torch

    on_gpu = device_kind() == "cuda"
    return on_gpu, torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0))


def _listed(devices: list[int]) -> str:
    return ",".join(map(str, devices))


def _physical(devices: list[int]) -> str:
    """The numbers that DeepSpeed's launcher needs: it ignores CUDA_VISIBLE_DEVICES where GPUs are chosen by
    name or by number."""
    visible = [entry.strip() for entry in os.environ.get(VISIBLE, "").split(",") if entry.strip()]
    chosen = [visible[device] for device in devices] if visible else [str(device) for device in devices]
    unnumbered = [entry for entry in chosen if not entry.isdecimal()]
    if unnumbered:
        problem = "DeepSpeed's launcher chooses GPUs by number, not by UUID or MIG name"
        raise UserError(VISIBLE, os.environ[VISIBLE], problem, "name them by their numbers in nvidia-smi")
    return ",".join(chosen)


def _check_devices(devices: list[int] | None, world: int, num_gpus: int) -> None:
    if devices is None:
        return
    if not num_gpus or not all(0 <= d < num_gpus for d in devices):
        problem = f"there are {num_gpus} GPUs"
        raise UserError("--devices", _listed(devices), problem, "name GPUs of this machine, or leave it out")
    if len(set(devices)) != world:
        problem = f"does not name {world} GPUs"
        raise UserError("--devices", _listed(devices), problem, "set --num-procs to their number")


def _environment(on_gpu: bool) -> dict[str, str]:
    """Environment of the DeepSpeed launcher; its choice of GPUs is on its command line."""
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = {name: value for name, value in os.environ.items() if not (on_gpu and name == VISIBLE)}
    accelerator = "cuda" if on_gpu else "cpu"
    return {
        **inherited,
        "PYTHONPATH": python_path,
        "DS_ACCELERATOR": accelerator,
        LAUNCHER: launcher_name(),
    }


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals to stop that arrive meanwhile, in their order. A terminal that closes is told of several times:
    that is one request."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if number != signal.SIGHUP or not received:
            received.append(number)

    previous = {number: signal.signal(number, note) for number in stop_signals()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, int | None]:
    """(exit status, the signal that was passed on). A session of its own: Ctrl-C reaches this process alone,
    which passes it on once; a second signal ends everything at once."""
    signalled: set[int] = set()
    with _signals() as received:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        while process.poll() is None:
            if received:
                _signal_family(process.pid, signalled, kill=len(received) > 1)
            time.sleep(0.1)
    return process.returncode, received[0] if received else None


def _signal_family(launcher: int, signalled: set[int], kill: bool) -> None:
    """SIGTERM, once, to the training processes alone: DeepSpeed's launchers above them would kill instead of
    waiting for the checkpoint. ``kill``: SIGKILL to all of them."""
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
                process.pid not in signalled
                and "train.pretrain" in words
                and not any("deepspeed" in word for word in words)
            ):
                signalled.add(process.pid)
                process.terminate()
        except psutil.NoSuchProcess:
            continue


def _conclude(config: TrainConfig, status: int, received: int | None) -> int:
    """Say how training ended -> the exit status of `rdlm train`."""
    output, killed = Path(config.output), _signal_of(status)
    if received is not None and status == 0:
        line = f"stopped; the same command goes on from the last checkpoint in {output / 'checkpoints'}"
        tell(line)
    elif killed:
        remedy = "the same command goes on from the last checkpoint"
        fail(f"a training process {_death(killed)}; {remedy}, logs are in {output / 'logs'}")
    elif status not in (0, 2):
        fail(f"training ended with status {status}; what its processes wrote is in {output / 'logs'}")
    if received is not None:
        return 128 + received
    return 128 + killed if killed else status


def _signal_of(status: int) -> int:
    """The signal that ended a process, 0 for none. DeepSpeed's launcher exits with the negative status of its
    worker, modulo 256."""
    number = -status if status < 0 else 256 - status
    return number if 0 < number < signal.NSIG else 0


def _death(number: int) -> str:
    if number == signal.SIGKILL:
        return (
            "was killed (SIGKILL): if nobody did that, memory ran out; "
            "`rdlm plan CONFIG --memory ...` says what would fit"
        )
    return f"ended by {signal.Signals(number).name}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch_blocks(
    path: str, overrides: list[str], num_procs: int | None, at_once: int | None, retries: int
) -> int:
    """Train all blocks, ``num_procs`` processes each, and merge them into ``output/model``; returns the exit
    status.

    None: the GPUs are shared out evenly, on a CPU one process each; as many launches at a time as fit. A
    launch that dies is started again at most ``retries`` times. SIGTERM and SIGINT are passed on. Raises
    UserError before anything is started.
    """
    config = load(path, overrides)
    if config.blocks is None or config.blocks.num_blocks == 1 or config.block is not None:
        found = "block" if config.block is not None else "blocks"
        problem = "--parallel needs several blocks to train"
        raise UserError(found, getattr(config, found), problem, "set blocks.num_blocks above 1")
    if config.resident is not None:
        problem = "with --parallel every block has a launch of its own"
        raise UserError("resident", config.resident.model_dump(), problem, "drop the section")
    on_gpu, available = accelerators()
    count = config.blocks.num_blocks
    world = num_procs or (max(1, available // count) if on_gpu else 1)
    if on_gpu and world > available:
        raise UserError("--num-procs", world, f"there are {available} GPUs", f"use at most {available}")
    lanes = min(at_once or count, count, max(1, available // world))
    from train.pretrain import check, check_output

    check(config, world)
    check_output(config)
    command = [sys.executable, "-m", "rdlm", "train", path, *overrides, "--num-procs", str(world)]
    launches = _Launches(command, world if on_gpu else 0, retries)
    status = launches.run(list(range(count)), lanes)
    if status == 0:
        _merge(config, count)
    return status


def _merge(config: TrainConfig, count: int) -> None:
    from train.export import merge

    merged = merge([block_folder(config, b) for b in range(count)], Path(config.output) / "model")
    tell(f"merged {count} blocks into {merged}")


@dataclass
class _Launches:
    """The launches of one command. gpus: how many each takes; lane n has GPUs n * gpus and following."""

    command: list[str]
    gpus: int
    retries: int
    running: dict[int, tuple[int, subprocess.Popen[str]]] = field(default_factory=dict)
    """Lane -> (block, its launch)."""
    failures: dict[int, int] = field(default_factory=dict)

    def run(self, waiting: list[int], lanes: int) -> int:
        """Run all blocks, at most ``lanes`` at a time -> the exit status."""
        status, passed_on = 0, 0
        with _signals() as received:
            while self.running or (waiting and not status and not received):
                while passed_on < len(received):
                    passed_on += 1
                    self._terminate()
                for lane in range(lanes):
                    if lane not in self.running and waiting and not status and not received:
                        self._start(lane, waiting.pop(0))
                time.sleep(0.1)
                status = self._collect(waiting, status, bool(received))
        return 128 + received[0] if received else status

    def _start(self, lane: int, block: int) -> None:
        gpus = range(lane * self.gpus, (lane + 1) * self.gpus)
        where = ["--devices", ",".join(map(str, gpus))] if self.gpus else []
        python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": python_path, LAUNCHER: launcher_name()}
        process = subprocess.Popen(
            [*self.command, "--block", str(block), *where], env=environment, start_new_session=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        threading.Thread(target=_relay, args=(process.stdout, block), daemon=True).start()
        self.running[lane] = (block, process)

    def _collect(self, waiting: list[int], status: int, stopping: bool) -> int:
        """Deal with launches that have ended -> the status of the whole so far; a block that is given up ends
        the others."""
        for lane, (block, process) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[lane]
            if code == 0 or stopping or status:
                continue
            self.failures[block] = self.failures.get(block, 0) + 1
            if code != 2 and self.failures[block] <= self.retries:
                tell(f"block {block}: ended with status {code}; restarting it")
                waiting.insert(0, block)
                continue
            status = code if code == 2 else 1
            given_up = "" if code == 2 else f" after {self.retries} restarts"
            fail(f"block {block} ended with status {code}{given_up}", sys.stderr)
            self._terminate()
        return status

    def _terminate(self) -> None:
        """Ask every launch to save and stop; after a second request they stop at once."""
        for _, process in self.running.values():
            process.terminate()


def _relay(stream: IO[str], block: int) -> None:
    with stream:
        for line in stream:
            tell(f"block {block}: {line.rstrip()}")
