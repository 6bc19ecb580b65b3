"""What a training process does for itself before it trains: threads, allocator, output, signals, and dying with its launcher."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

import psutil

LAUNCHER_PID = "RDLM_LAUNCHER_PID"
"""Set by ``rdlm train``: its process id, so that training ends with it."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc malloc.h


def capture_output(folder: Path, rank: int) -> TextIO:
    """Send stdout and stderr, libraries' chatter included, to ``logs/rank<n>.log``; returns the terminal for our own words."""
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable(terminal)
    logging.captureWarnings(True)
    return terminal


def tune_cpu(processes_here: int) -> None:
    """One thread per core and process, unless OMP_NUM_THREADS says otherwise, and an allocator that keeps what it has.

    glibc returns every large tensor to the system and faults it in again at the next step; docs/training.md has the figure.
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


class StopSignal:
    """Remembers that SIGTERM or SIGINT came; the training loop asks between two updates."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.received = True


def die_with_launcher() -> None:
    """End this process as soon as one of the launchers above it is gone, however it died: a thread looks twice a second."""
    watched = _launchers()

    def watch() -> None:
        while all(_alive(process) for process in watched):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="die-with-launcher", daemon=True).start()


def _launchers() -> list[psutil.Process]:
    chief = os.environ.get(LAUNCHER_PID)
    above = psutil.Process().parents()
    return [p for p in above if str(p.pid) == chief or any("deepspeed" in word for word in p.cmdline()[:4])]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def environment() -> tuple[int, int]:
    """(rank, processes on this machine) as the launcher set them; 0 and 1 without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_SIZE", 1))


def fail(message: str, terminal: TextIO | None = None) -> None:
    """One line on the terminal, by default stderr as it is when called."""
    print(f"rdlm train: error: {' '.join(message.split())}", file=terminal or sys.stderr, flush=True)
