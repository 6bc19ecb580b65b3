"""What a training process sets up before it trains: device, threads, allocator, output, signals, and ending
with its launcher."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import io
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

import psutil

from rdlm.errors import UserError

if TYPE_CHECKING:
    from train.settings import TrainConfig

LAUNCHER = "RDLM_LAUNCHER"
"""Set by ``rdlm train`` to its ``launcher_name``, so that training ends with it."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc malloc.h


class ProcessError(UserError):
    """A user's mistake that only one process finds, which has to say it: a write that failed, a batch that is
    damaged."""


def device_kind() -> Literal["cuda", "cpu"]:
    """Where training runs: what DS_ACCELERATOR names, else a GPU if there is one. UserError where it names
    what there is not."""
    import torch

    named = os.environ.get("DS_ACCELERATOR", "")
    if named not in ("", "cuda", "cpu"):
        raise UserError("DS_ACCELERATOR", named, "training runs on cuda or cpu", "unset it")
    if named == "cuda" and not torch.cuda.is_available():
        raise UserError("DS_ACCELERATOR", named, "torch sees no GPU", "unset it")
    return "cuda" if named != "cpu" and torch.cuda.is_available() else "cpu"


class Terminal(io.TextIOBase):
    """Where a training process writes its messages; the log, once nobody reads them there any more (``| head``, a
    window that was closed): that ends no run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._stream = sys.stderr
            self._stream.write(text)
        return len(text)


def capture_output(config: TrainConfig, rank: int) -> TextIO:
    """Send stdout and stderr, libraries' messages included, to ``logs/rank<n>.log``; returns the terminal for
    messages of our own, to which the traceback of an exception goes that nobody catches."""
    folder = Path(config.output) / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise UserError("output", config.output, problem, "set another output folder") from None
    terminal = cast(TextIO, Terminal(os.fdopen(os.dup(2), "w", buffering=1)))
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable(terminal)

    def defect(*error: Any) -> None:
        print(f"rdlm train: process {rank} failed:", file=terminal)
        traceback.print_exception(*error, file=terminal)
        os._exit(1)  # as at the end of train/pretrain.py

    sys.excepthook = defect
    logging.captureWarnings(True)
    return terminal


def tune_cpu(processes_here: int) -> None:
    """One thread per core and process, unless OMP_NUM_THREADS says otherwise, and an allocator that keeps
    what it has.

    glibc returns every large tensor to the system and faults it in again at the next step; docs/training.md
    has the figure.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes_here))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Give the system what glibc keeps of freed memory, by default or because of ``tune_cpu``."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to save and stop; that of a closed terminal unless it is ignored, as by nohup."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return numbers if ignored else (*numbers, signal.SIGHUP)


class StopSignal:
    """Remembers that one of ``stop_signals`` came; the training loop looks between two updates."""

    def __init__(self) -> None:
        self.received = False
        for number in stop_signals():
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.received = True


def launcher_name() -> str:
    """Names this process for LAUNCHER: its id, and when it began, since ids are used again."""
    return f"{os.getpid()}:{_began(os.getpid())}"


def _began(pid: int) -> str:
    """When a process began, on a clock that nobody sets (psutil's moves with the time of day). Raises
    psutil.NoSuchProcess."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):  # gone, or no Linux
        return str(psutil.Process(pid).create_time())


def die_with_launcher() -> None:
    """End this process as soon as one of the launchers above it is gone, however it died, and at once if it
    is gone already.

    A thread looks twice a second.
    """
    watched = [p for p in psutil.Process().parents() if any("deepspeed" in word for word in _words(p)[:4])]
    if LAUNCHER in os.environ:
        pid, _, began = os.environ[LAUNCHER].partition(":")
        try:
            chief = psutil.Process(int(pid))
            same = _began(chief.pid) == began
        except psutil.NoSuchProcess:
            os._exit(1)
        if not same or not _alive(chief):
            os._exit(1)
        watched.append(chief)

    def watch() -> None:
        while all(_alive(process) for process in watched):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="die-with-launcher", daemon=True).start()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def environment() -> tuple[int, int]:
    """(rank, processes on this machine) as deepspeed, torchrun or srun set them; 0 and 1 without one.

    srun names them otherwise: its variables are copied to the names that torch and DeepSpeed read.
    """
    if (
        "RANK" not in os.environ
        and int(os.environ.get("SLURM_NTASKS", 1)) > 1
        and "SLURM_PROCID" in os.environ
    ):
        local = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_NTASKS_PER_NODE", "1")
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1")
        job = int(os.environ.get("SLURM_JOB_ID", "0"))
        names = {
            "RANK": os.environ["SLURM_PROCID"],
            "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
            "WORLD_SIZE": os.environ["SLURM_NTASKS"],
            "LOCAL_SIZE": local.partition("(")[0].partition(",")[0],
            "MASTER_ADDR": _first_node(nodes),
            "MASTER_PORT": str(15000 + job % 10000),  # its own, since two jobs may share a node
        }
        for name, value in names.items():
            os.environ.setdefault(name, value)
    local_size = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
    return int(os.environ.get("RANK", 0)), int(local_size)


def _first_node(nodes: str) -> str:
    """Slurm's list of nodes -> the first one, on which rank 0 runs: "gpu[03-05,09],cpu1" -> "gpu03"."""
    prefix, bracket, rest = nodes.partition(",")[0].partition("[")
    return prefix + re.split(r"[-,\]]", rest)[0] if bracket else prefix


def fail(message: str, terminal: TextIO | None = None) -> None:
    """Print an error as one line, by default on stderr as it is when called."""
    tell(f"rdlm train: error: {' '.join(message.split())}", terminal)


def tell(line: str, terminal: TextIO | None = None) -> None:
    """Print a line, by default on stderr, whether or not somebody still reads there."""
    with contextlib.suppress(OSError):
        print(line, file=terminal or sys.stderr, flush=True)


def lost_peer(error: BaseException) -> bool:
    """Whether a collective operation failed because another process had ended: gloo's and NCCL's words."""
    text = str(error)
    return ("gloo" in text and "by peer" in text) or "remote process exited" in text


def lock_output(output: Path, warn: Callable[[str], None]) -> TextIO:
    """Hold the output folder for this run; the kernel releases it when the process ends, however it ends.

    Raises UserError where another run holds it or it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w", encoding="utf-8")
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise UserError("output", str(output), problem, "set another output folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            "output", str(output), "another run is writing there", "wait for it, or set another output folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warn(f"warning: {output} lies on a file system without locks: nothing keeps a second run out of it")
    return lock
