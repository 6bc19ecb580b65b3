"""A memory limit in which one block trains and the whole network is killed, by the ordinary command in a
memory cgroup.

    python -m benchmarks.memory_limit --out docs/results/raw/memory_limit.json

Each arm is `rdlm train` with its launcher and one worker, all of them in a control group that may hold
``--limit-mib`` of memory (Linux, root; v1 or v2): beyond it the kernel kills, as it does in a container. What
is counted is everything: libraries, launcher, weights, and file pages that cannot be given back. Swap must be
off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.common import provenance, write_json
from rdlm.cli import run
from rdlm.errors import UserError

SHAPE = {
    "family": "llama",
    "vocab_size": 128,
    "d_model": 768,
    "num_heads": 12,
    "mlp_width": 2048,
    "num_layers": 12,
}
NUM_BLOCKS, UPDATES = 4, 3
HIERARCHIES = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))
"""Of cgroups v1 and v2: folder, file of the limit."""


class MemoryGroup:
    """A control group of its own with a limit in bytes; processes enter by ``enter``. Raises UserError where
    none can be made."""

    def __init__(self, limit: int) -> None:
        for root, file in HIERARCHIES:
            self.folder = Path(root) / f"rdlm-{os.getpid()}-{time.monotonic_ns()}"
            try:
                self.folder.mkdir()
                (self.folder / file).write_text(str(limit))
                return
            except OSError:
                if self.folder.is_dir():
                    self.folder.rmdir()
        raise UserError(
            "--limit-mib",
            limit >> 20,
            "no memory control group can be made here",
            "run as root on Linux with one",
        )

    def enter(self) -> None:
        """Put the calling process and all that it starts into the group."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        """Forget the group; its processes must have ended."""
        for _ in range(50):
            try:
                return self.folder.rmdir()
            except OSError:
                time.sleep(0.1)


def config_of(output: Path, seed: int, num_blocks: int) -> dict[str, Any]:
    return {
        "name": "limit", "output": str(output), "seed": seed, "model": {**SHAPE, "max_seq_len": 256},
        "precision": "fp32",
        "objective": {"name": "evidence"}, "recurrence": {"default_steps": 4, "max_steps": 8},
        "data": {"kind": "group_product", "group": "s5", "length": 256}, "batch": {"global_size": 2},
        "optimizer": {"lr": 1e-4}, "schedule": {"steps": UPDATES, "warmup_steps": 0},
        "checkpoint": {"interval_steps": UPDATES}, "log": {"tensorboard": False},
        **({"blocks": {"num_blocks": num_blocks}} if num_blocks > 1 else {}),
    }  # fmt: skip


def trained(num_blocks: int, limit: int, seed: int) -> dict[str, Any]:
    """How `rdlm train` ends: of the whole network, or of block 0 of several."""
    with tempfile.TemporaryDirectory() as folder:
        output, file = Path(folder) / "run", Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config_of(output, seed, num_blocks)))
        block = ["--block", "0"] if num_blocks > 1 else []
        group = MemoryGroup(limit)
        done = subprocess.run(
            [sys.executable, "-m", "rdlm", "train", str(file), *block, "--num-procs", "1"],
            preexec_fn=group.enter, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        metrics = (output / "block_0" if block else output) / "metrics.jsonl"
        updates = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        last_line = (done.stderr.strip().splitlines() or [""])[-1].replace(folder, "FOLDER")
        row = {
            "num_blocks": num_blocks,
            "status": done.returncode,
            "updates": updates,
            "of_updates": UPDATES,
            "last_line": last_line,
        }
        group.close()
        return row


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    limit_mib: Annotated[
        int, typer.Option(min=1, help="Memory of launcher and worker together, MiB.")
    ] = 2048,
    seed: Annotated[int, typer.Option(help="Of the run.")] = 0,
) -> int:
    """Train the whole network and one of four blocks of it in the same limit; print and write how each ended."""
    rows = [trained(num_blocks, limit_mib << 20, seed) for num_blocks in (1, NUM_BLOCKS)]
    for row in rows:
        print(json.dumps(row), flush=True)
    write_json(
        out,
        {
            "provenance": provenance(),
            "seed": seed,
            "shape": SHAPE,
            "limit_bytes": limit_mib << 20,
            "arms": rows,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(app, sys.argv[1:], "memory_limit"))
