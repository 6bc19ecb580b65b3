"""Blocks that rest: memory and time of resident training, memory of answering with few blocks, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.resident --out docs/results/raw/resident.json

Training: the model of benchmarks/memory.py and its way of counting, over one update of every block. Time is
that of moving blocks as a share of all of it, in CPU seconds of the process (copying through the page cache;
other load disturbs it little) and by the clock (a disk that must be waited for is in it, and so is other
load). Answering: peak resident set of `rdlm generate`, less that of the same command with a tiny checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import provenance, write_json
from benchmarks.memory import SHAPE, Arm, Run, apart, measure, start
from rdlm.checkpoints.folder import WEIGHTS, save
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import train_tokenizer
from rdlm.registry import build

MICRO_SIZE, SEQ_LEN = 2, 256
NETWORK = {"d_model": 768, "num_heads": 12, "mlp_width": 2048, "num_layers": 12}
ANSWERING_BLOCKS = 4


def moving(arm: Arm, visits: int, folder: str) -> dict[str, Any]:
    """Seconds of ``visits`` visits and of what moving blocks takes of them, after every block has been
    visited."""
    run = Run(arm.config(folder, SHAPE, MICRO_SIZE, SEQ_LEN), start(folder))
    trainer = run.trainer
    laps = arm.num_blocks * arm.visit_steps
    for step in range(0, laps, arm.visit_steps):  # one update of each block: moments exist from here on
        trainer.step = step
        run.update()
    trainer.step = laps
    clock, cpu, swap_clock, swap_cpu = (
        time.perf_counter(),
        time.process_time(),
        trainer.engines.swap_seconds,
        0.0,
    )
    for _ in range(visits * arm.visit_steps):
        begun = time.process_time()
        trainer.due()
        swap_cpu += time.process_time() - begun
        run.update()
    clock, cpu, swap_clock = (
        time.perf_counter() - clock,
        time.process_time() - cpu,
        trainer.engines.swap_seconds - swap_clock,
    )
    held = sum(p.numel() for p in trainer.engines[trainer.engines.active].module.parameters())
    return {
        **asdict(arm), "visits": visits, "parameters_of_a_block": held, "clock_s": clock, "cpu_s": cpu,
        "moving_clock_s": swap_clock,
        "moving_cpu_s": swap_cpu, "moving_share_clock": swap_clock / clock, "moving_share_cpu": swap_cpu / cpu,
    }  # fmt: skip


def network(folder: Path, shape: dict[str, int]) -> Path:
    """A random network of blocks as `rdlm generate` takes it."""
    tokenizer = train_tokenizer("bpe", iter(["in the beginning was the word"] * 9), 270)
    config = CheckpointConfig.model_validate({
        "name": "resident-benchmark", "objective": {"name": "evidence"}, "blocks": {"num_blocks": ANSWERING_BLOCKS},
        "model": {
            "family": "llama", "vocab_size": 4096, "max_seq_len": 64, "noise_conditioning": True, **shape,
        },
    })  # fmt: skip
    return save(folder, build(config, seed=0), config, tokenizer)


ANSWER = """
import sys
from rdlm.cli import app, run
ended = run(app, sys.argv[1:], "rdlm")
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1])
sys.exit(ended)
"""
"""`rdlm generate` that says its peak (KiB) at the end. What the kernel tells a parent (ru_maxrss) starts at
the parent's own size."""


def answering(checkpoint: Path, num_steps: int, resident: int | None) -> int:
    """Peak resident set of a `rdlm generate`, bytes."""
    command = [
        sys.executable,
        "-c",
        ANSWER,
        "generate",
        "--checkpoint",
        str(checkpoint),
        "--prompt",
        "in the beginning",
    ]
    command += ["--max-tokens", "4", "--num-steps", str(num_steps)]
    command += [] if resident is None else ["--resident-blocks", str(resident)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return int(done.stdout.splitlines()[-1]) * 1024


def main(out: Annotated[Path, typer.Option(help="JSON to write.")]) -> None:
    """Memory of blocks trained alone, jointly and one by one, the time of moving them, and memory of
    answering."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = network(
            Path(folder) / "tiny", {"d_model": 32, "num_heads": 2, "mlp_width": 64, "num_layers": 12}
        )
        whole = network(Path(folder) / "whole", NETWORK)
        fixed, rows = answering(tiny, 4, None), []
        for num_steps, resident in ((4, None), (4, 2), (4, 1), (1, None), (1, 1)):
            rows.append(
                {
                    "num_steps": num_steps,
                    "resident_blocks": resident,
                    "peak": answering(whole, num_steps, resident) - fixed,
                }
            )
            print(f"K={num_steps} resident {resident}: {rows[-1]['peak'] / 2**20:.0f} MiB", flush=True)
        answers = {
            "fixed": fixed,
            "weights": (whole / WEIGHTS).stat().st_size,
            "num_blocks": ANSWERING_BLOCKS,
            "rows": rows,
        }
    arms = [Arm("evidence")]
    arms += [
        Arm("evidence", blocks, mode=mode) for blocks in (2, 4) for mode in ("alone", "joint", "resident")
    ]
    memory = []
    for arm in arms:
        memory.append(apart(measure, arm, SHAPE, MICRO_SIZE, SEQ_LEN))
        print(f"{arm.mode} B={arm.num_blocks}: peak {memory[-1]['peak'] / 2**20:.0f} MiB", flush=True)
    time_of = []
    for visit_steps, visits in ((1, 8), (10, 4)):
        time_of.append(apart(moving, Arm("evidence", 4, mode="resident", visit_steps=visit_steps), visits))
        print(f"visits of {visit_steps}: {time_of[-1]['moving_share_cpu']:.1%} of the CPU time", flush=True)
    write_json(out, {
        "provenance": provenance(), "seed": 0, "threads": torch.get_num_threads(),
        "shape": {**SHAPE, "micro_size": MICRO_SIZE, "seq_len": SEQ_LEN}, "memory": memory, "time": time_of,
        "answering": {"shape": NETWORK, **answers},
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
