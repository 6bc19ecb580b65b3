"""``make demo``: corpus, training, evaluation, server and questions in a row. A second run reuses what the
first one finished."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from rich.console import Console

from demo.ask import ask, wait_until_ready
from demo.processes import Processes, StepFailed
from train.config_file import native_precision

REPO = Path(__file__).resolve().parent.parent
CONFIG = "configs/demo.yaml"
DATA, RUN = Path("data/demo"), Path("runs/demo")
CHECKPOINT = RUN / "model"
QUALITY = RUN / "quality-against-k"
EVAL_TOKENS = 16_384
UPDATES_WITHOUT_BF16 = 500
"""Updates on a device that computes in fp32 alone."""

NEXT = f"""Go on with:
  . .venv/bin/activate
  rdlm generate --checkpoint {CHECKPOINT} --num-steps 8 --prompt "And it came to pass"
  rdlm serve --checkpoint {CHECKPOINT} --port 8000
  rdlm train {CONFIG} output=runs/mine schedule.steps=4000
  tensorboard --logdir {RUN}
  make test"""


class Steps:
    """Headings with number and time of each step."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._number = console, total, 0
        self._started = time.monotonic()

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        self._number += 1
        started = time.monotonic()
        self._console.rule(f"[{self._number}/{self._total}] {title}", align="left")
        yield
        self._console.print(
            f"{title}: {time.monotonic() - started:.0f} s, {time.monotonic() - self._started:.0f} s in all",
            style="dim",
        )


def demo(console: Console, processes: Processes) -> None:
    step = Steps(console, 5)
    with step("corpus"):
        processes.run("data", ["data", "prepare", "embedded", "--out", str(DATA)])
    with step("training"):
        shorter = [] if native_precision() == "bf16" else [f"schedule.steps={UPDATES_WITHOUT_BF16}"]
        if shorter:
            note = f"no bf16 instructions here: fp32 and {UPDATES_WITHOUT_BF16} updates, to stay near five minutes"
            console.print(note, style="dim")
        processes.run("train", ["train", CONFIG, *shorter])
    with step("held-out NLL against K"):
        processes.run(
            "eval",
            [
                *checkpoint_of("eval", "nll"),
                "--data",
                str(DATA),
                "--max-tokens",
                str(EVAL_TOKENS),
                "--out",
                f"{QUALITY}.json",
                "--plot",
                f"{QUALITY}.png",
            ],
        )
    with step("server and questions"):
        _serve_and_ask(console, processes)
    with step("results"):
        for path in (RUN / "loss.png", f"{QUALITY}.png", f"{QUALITY}.json", CHECKPOINT):
            console.print(f"  {path}", highlight=False)
    console.print(f"\n{NEXT}", highlight=False, soft_wrap=True)


def checkpoint_of(*command: str) -> list[str]:
    """A command on the demo's checkpoint, on the GPU where there is one."""
    return [
        *command,
        "--checkpoint",
        str(CHECKPOINT),
        "--device",
        "cuda" if torch.cuda.is_available() else "cpu",
    ]


def _serve_and_ask(console: Console, processes: Processes) -> None:
    port_file = REPO / RUN / "port"
    port_file.unlink(missing_ok=True)
    server, log = processes.start(
        "serve", [*checkpoint_of("serve"), "--port", "0", "--port-file", str(port_file)]
    )
    base = wait_until_ready(server, port_file, log)
    console.print(f"serving {CHECKPOINT} on {base}", highlight=False)
    ask(base, console)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    """Turn a signal into an exit through the ``with`` blocks, which stop every process."""
    sys.exit(128 + number)


def main() -> int:
    console = Console()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    try:
        with Processes(REPO, REPO / RUN / "logs") as processes:
            demo(console, processes)
    except StepFailed as error:
        console.print(
            f"demo failed: {error}; its output is in {error.log}", style="bold red", highlight=False
        )
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; `make demo` goes on from here", highlight=False)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
