"""Every block in a launch of its own: started, watched, restarted from its last checkpoint, merged at the end.

The launches share nothing but the config: what runs here is ``rdlm train CONFIG --block N``, as one would type it on B machines.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rdlm.errors import UserError
from train.launch import ROOT, accelerators
from train.process import LAUNCHER_PID, fail
from train.settings import TrainConfig, block_folder, load


def launch_blocks(
    path: str, overrides: list[str], num_procs: int | None, at_once: int | None, retries: int
) -> int:
    """Train all blocks, ``num_procs`` processes each, and merge them into ``output/model``; returns the exit status.

    None: the GPUs are shared out evenly, on a CPU one process each; as many launches at a time as fit. A launch that dies is started
    again at most ``retries`` times. SIGTERM and SIGINT are passed on. Raises UserError before anything is started.
    """
    config = load(path, overrides)
    if config.blocks is None or config.blocks.num_blocks == 1 or config.block is not None:
        found = "block" if config.block is not None else "blocks"
        raise UserError(
            found,
            getattr(config, found),
            "--parallel needs several blocks to train",
            "set blocks.num_blocks above 1",
        )
    if config.resident is not None:
        section = config.resident.model_dump()
        raise UserError(
            "resident",
            section,
            "with --parallel every block is resident in a launch of its own",
            "drop the section",
        )
    on_gpu, available = accelerators()
    count = config.blocks.num_blocks
    world = num_procs or (max(1, available // count) if on_gpu else 1)
    if on_gpu and world > available:
        raise UserError("--num-procs", world, f"there are {available} GPUs", f"use at most {available}")
    lanes = min(at_once or count, count, max(1, available // world))
    from train.run import check

    check(config, world)
    command = [sys.executable, "-m", "rdlm", "train", path, *overrides, "--num-procs", str(world)]
    crew = _Crew(command, world if on_gpu else 0, retries)
    status = crew.work(list(range(count)), lanes)
    if status == 0:
        _merge(config, count)
    return status


def _merge(config: TrainConfig, count: int) -> None:
    from train.merge import merge

    merged = merge([block_folder(config, b) for b in range(count)], Path(config.output) / "model")
    print(f"merged {count} blocks into {merged}", file=sys.stderr)


@dataclass
class _Crew:
    """The launches of one command. gpus: how many each takes; lane n has GPUs n * gpus and following."""

    command: list[str]
    gpus: int
    retries: int
    running: dict[int, tuple[int, subprocess.Popen[str]]] = field(default_factory=dict)
    """Lane -> (block, its launch)."""
    failures: dict[int, int] = field(default_factory=dict)
    received: list[int] = field(default_factory=list)

    def work(self, waiting: list[int], lanes: int) -> int:
        """Run all blocks, at most ``lanes`` at a time -> the exit status."""
        previous = {
            n: signal.signal(n, lambda number, _: self.received.append(number))
            for n in (signal.SIGTERM, signal.SIGINT)
        }
        status, told = 0, 0
        try:
            while self.running or (waiting and not status and not self.received):
                while told < len(self.received):
                    told += 1
                    self._tell()
                for lane in range(lanes):
                    if lane not in self.running and waiting and not status and not self.received:
                        self._start(lane, waiting.pop(0))
                time.sleep(0.1)
                status = self._collect(waiting, status)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 128 + self.received[0] if self.received else status

    def _start(self, lane: int, block: int) -> None:
        where = (
            ["--devices", ",".join(str(lane * self.gpus + i) for i in range(self.gpus))] if self.gpus else []
        )
        python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": python_path, LAUNCHER_PID: str(os.getpid())}
        process = subprocess.Popen(
            [*self.command, "--block", str(block), *where], env=environment, start_new_session=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        threading.Thread(target=_relay, args=(process.stdout, block), daemon=True).start()
        self.running[lane] = (block, process)

    def _collect(self, waiting: list[int], status: int) -> int:
        """Deal with launches that have ended -> the status of the whole so far; a block that is given up ends the others."""
        for lane, (block, process) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[lane]
            if code == 0 or self.received or status:
                continue
            self.failures[block] = self.failures.get(block, 0) + 1
            if code != 2 and self.failures[block] <= self.retries:
                print(f"block {block}: ended with status {code}; restarting it", file=sys.stderr, flush=True)
                waiting.insert(0, block)
                continue
            status = code if code == 2 else 1
            given_up = "" if code == 2 else f" after {self.retries} restarts"
            fail(f"block {block} ended with status {code}{given_up}", sys.stderr)
            self._tell()
        return status

    def _tell(self) -> None:
        """Ask every launch to save and stop; asked again, they stop at once."""
        for _, process in self.running.values():
            process.terminate()


def _relay(stream: IO[str], block: int) -> None:
    with stream:
        for line in stream:
            print(f"block {block}: {line}", end="", file=sys.stderr, flush=True)
