"""Cost of one update under every objective, same model and batch, against truncated BPTT.

    OMP_NUM_THREADS=2 python -m benchmarks.train_step --out docs/results/raw/train_step.json

Arms are interleaved in one process (a slow minute of the machine hits all alike), each timed over several
rounds after a warm-up; the median counts. Random recurrence is replaced by its mean, so that a handful of
updates estimates the cost. FLOPs are counted by torch, the matmul peak is measured in the same process. Peak
memory comes from one fresh process per arm (CPU) or the CUDA allocator.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import provenance, read_json, write_json
from rdlm.config.base import parse
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.objective import ObjectiveConfig
from rdlm.data.batch import Batch
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from rdlm.registry import build

ARMS: dict[str, dict[str, Any]] = {
    "bptt 32/8": {"name": "bptt", "depth": {"distribution": "fixed", "mean": 33, "grad_steps": 8}},
    "bptt 8/4": {"name": "bptt", "depth": {"distribution": "fixed", "mean": 9, "grad_steps": 4}},
    "paper": {"name": "paper"},
    "evidence": {"name": "evidence"},
    "single_pass": {"name": "single_pass", "depth": {"distribution": "fixed", "mean": 3}},
    "onestep": {"name": "onestep", "depth": {"distribution": "fixed", "mean": 3}},
    "next_token": {"name": "next_token"},
}
"""Fixed r is the mean of the arm's schedule: 1 + 32, 1 + 8 and 1 + 2."""


class Arm:
    """One objective's model, optimizer and batch; ``update`` is one optimizer step."""

    def __init__(
        self,
        settings: dict[str, Any],
        shape: dict[str, Any],
        batch_size: int,
        seq_len: int,
        device: str,
        dtype: torch.dtype = torch.bfloat16,
        blocks: dict[str, Any] | None = None,
    ) -> None:
        """settings: an objective; shape: a model, of family huginn unless it says so; blocks: how it is cut,
        then block 0 is timed."""
        noisy = parse(ObjectiveConfig, settings, "arm").noise_conditioned
        model = {"family": "huginn", **shape, "max_seq_len": seq_len, "noise_conditioning": noisy}
        cut = {} if blocks is None else {"blocks": blocks, "block": 0}
        config = parse(
            CheckpointConfig, {"name": "bench", "model": model, "objective": settings, **cut}, "arm"
        )
        self.denoiser: Objective = build(config, seed=0).to(device=device, dtype=dtype)
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=1e-4, fused=True)
        ids = torch.randint(
            0, shape["vocab_size"], (batch_size, seq_len + 1), generator=torch.Generator().manual_seed(0)
        ).to(device)
        self.batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))
        self.device, self.step = device, 0

    def update(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Run one update; returns its seconds on ``clock``."""
        started = clock()
        terms = self.denoiser.loss(self.batch, Keys(seed=0, step=self.step))
        (terms.total / terms.count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.device == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            terms = self.denoiser.loss(self.batch, Keys(seed=0, step=0))
            (terms.total / terms.count).backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops()


def interleaved_medians(
    arms: dict[str, Arm], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of one update of every arm after one warm-up each, the arms taking turns.

    clock: wall time, or time.process_time for CPU seconds, which other processes on the machine disturb less.
    """
    for arm in arms.values():
        arm.update()
    timed: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            timed[name].append(arm.update(clock))
    return {name: statistics.median(values) for name, values in timed.items()}


def kept_seconds_per_update(
    file: Path, arms: Callable[[], dict[str, Arm]], rounds: int = 9
) -> dict[str, float]:
    """Median CPU seconds of one update of every arm on one thread, kept in ``file`` so that all later calls share
    one measurement. arms: makes them, only where there is none yet."""
    if not file.exists():
        torch.set_num_threads(1)
        write_json(file, interleaved_medians(arms(), rounds, time.process_time))
    return read_json(file)


def matmul_peak(device: str, seconds: float = 1.0) -> float:
    """Measured bf16 matmul rate in FLOP/s, square 2048 (CPU) or 8192 (GPU)."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def peak_resident() -> int:
    """Peak resident bytes of this program. Not ru_maxrss, which a child inherits from the process that
    started it."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024


def peak_memory(name: str, arguments: list[str]) -> int:
    """Peak bytes of one update in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--memory-of", name, *arguments]
    return int(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
    )


def main(
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed updates of each arm.")] = 5,
    d_model: int = 512,
    num_heads: int = 8,
    mlp_width: int = 1792,
    vocab_size: int = 4096,
    batch_size: int = 4,
    seq_len: int = 256,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Step time, tokens/s, memory and share of the matmul peak of every objective."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = {"vocab_size": vocab_size, "d_model": d_model, "num_heads": num_heads, "mlp_width": mlp_width}
    if memory_of is not None:
        arm = Arm(ARMS[memory_of], shape, batch_size, seq_len, device)
        arm.update()
        arm.update()
        print(torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident())
        return
    passed = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in {**shape, "batch_size": batch_size, "seq_len": seq_len}.items()
    ]
    arms = {name: Arm(settings, shape, batch_size, seq_len, device) for name, settings in ARMS.items()}
    before = matmul_peak(device)
    medians = interleaved_medians(arms, rounds)
    peak = max(before, matmul_peak(device))  # a busy second once halved what was measured before alone
    rows, baseline = {}, medians["bptt 32/8"]
    for name, arm in arms.items():
        median, flops = medians[name], arm.flops()
        rows[name] = {
            "step_s": median, "tokens_per_s": batch_size * seq_len / median, "flops": flops,
            "bptt_over_this": baseline / median, "share_of_matmul_peak": flops / median / peak,
            "peak_memory_bytes": peak_memory(name, passed),
        }  # fmt: skip
    bptt = rows["bptt 32/8"]
    for row in rows.values():
        row["flops_bptt_over_this"] = bptt["flops"] / row["flops"]
    parameters = sum(p.numel() for p in arms["next_token"].denoiser.parameters())
    result = {"provenance": provenance(),
    "shape": {**shape, "batch_size": batch_size, "seq_len": seq_len, "parameters": parameters},
              "matmul_peak_flops": peak, "arms": rows}  # fmt: skip
    show(result)
    if out:
        write_json(out, result)


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"one update, matmul peak {result['matmul_peak_flops'] / 1e9:.0f} GFLOP/s")
    for column in (
        "objective",
        "s/update",
        "tokens/s",
        "BPTT / this",
        "FLOPs ratio",
        "share of peak",
        "peak MiB",
    ):
        table.add_column(column, justify="left" if column == "objective" else "right")
    for name, row in result["arms"].items():
        table.add_row(
            name, f"{row['step_s']:.3f}", f"{row['tokens_per_s']:.0f}", f"{row['bptt_over_this']:.2f}",
            f"{row['flops_bptt_over_this']:.2f}",
            f"{row['share_of_matmul_peak']:.2f}", f"{row['peak_memory_bytes'] / 2**20:.0f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
