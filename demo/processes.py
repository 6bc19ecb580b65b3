"""Child processes of the demo: shown live, copied to a log file each, and never left behind."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

GRACE_SECONDS = 60.0
"""Time for a stopped process to save its work (training writes a checkpoint on SIGTERM) before it is killed.
"""


class StepFailed(Exception):
    """A command ended with an error. ``log`` holds everything it printed."""

    def __init__(self, command: str, problem: str, log: Path) -> None:
        super().__init__(f"`{command}` {problem}")
        self.log = log


class Processes:
    """Starts commands, each in its own session; leaving the ``with`` block stops whatever still runs."""

    def __init__(
        self, repo: Path, logs: Path, program: tuple[str, ...] = (sys.executable, "-m", "rdlm")
    ) -> None:
        self._repo, self._logs, self._program = repo, logs, program
        self._running: list[subprocess.Popen[bytes]] = []
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._running):
            _stop(process)

    def run(self, name: str, args: list[str], env: dict[str, str] | None = None) -> None:
        """Run ``rdlm ARGS`` to its end with its output on the terminal and in ``logs/NAME.log``; raises
        StepFailed."""
        log = self._logs / f"{name}.log"
        # A terminal of its own keeps the child's progress bars alive while their output is copied.
        reader, writer = pty.openpty() if sys.stdout.isatty() else os.pipe()
        if sys.stdout.isatty():
            termios.tcsetwinsize(writer, termios.tcgetwinsize(sys.stdout.fileno()))
        process = self._start(args, writer, env)
        os.close(writer)
        copier = threading.Thread(target=_copy, args=(reader, log), daemon=True)
        copier.start()
        status = process.wait()
        _stop(process)  # nothing of its group may outlive it and hold the output open
        self._running.remove(process)
        copier.join()
        if status:
            raise StepFailed(f"rdlm {' '.join(args)}", f"ended with status {status}", log)

    def start(
        self, name: str, args: list[str], env: dict[str, str] | None = None
    ) -> tuple[subprocess.Popen[bytes], Path]:
        """Start ``rdlm ARGS`` in the background with its output in ``logs/NAME.log``; returns the process and
        the log."""
        log = self._logs / f"{name}.log"
        with log.open("wb") as out:
            return self._start(args, out.fileno(), env), log

    def _start(self, args: list[str], output: int, env: dict[str, str] | None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*self._program, *args],
            cwd=self._repo,
            env={**os.environ, "PYTHONPATH": str(self._repo), "PYTHONUNBUFFERED": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        self._running.append(process)
        return process


def _copy(reader: int, log: Path) -> None:
    """Copy everything from a file descriptor to the terminal and a log, byte by byte as it comes."""
    with log.open("wb") as out:
        while chunk := _read(reader):
            out.write(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
    os.close(reader)


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # EIO: how a terminal says that its other side is closed
        return b""


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all its descendants: politely, then after GRACE_SECONDS (or a second Ctrl-C) by
    force."""
    family = _descendants(process.pid)
    try:
        if process.poll() is None:
            process.terminate()  # it passes the word on to its workers
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline and (process.poll() is None or any(map(_alive, family))):
                family |= _descendants(
                    process.pid
                )  # while the parent lives: an orphan can no longer be found
                time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for member in filter(_alive, family):  # those in groups of their own: launchers, compilers
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
