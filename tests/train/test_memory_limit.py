"""ZeRO 3 with offload over two processes trains what neither could hold alone, in processes that may not
allocate more.

On a CPU there is no device whose memory offload could spare: what fits the model in is that ZeRO 3 cuts
weights, masters, moments and gradients in two; offload puts DeepSpeedCPUAdam in the place of torch's AdamW,
which needs no temporaries.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]
REPO = Path(__file__).resolve().parents[2]
SHAPE = {"d_model": 512, "num_heads": 8, "mlp_width": 1376, "num_layers": 8, "vocab_size": 1024}
BYTES_PER_PARAMETER = 16
"""What a process may allocate. bf16 at ZeRO 0 holds 14 between updates (2 weights, 4 masters, 8 moments) and
takes 6 more for gradients and their fp32 copies; cut in two, with the sums of gradients that DeepSpeed keeps,
it is about 12."""
OFFLOAD = {
    "zero_stage": 3,
    "offload_optimizer": "cpu",
    "offload_param": "cpu",
    "bucket_elements": 2_000_000,
    "live_elements": 4_000_000,
}


def config(folder: Path, shape: dict[str, int], deepspeed: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "limit", "output": str(folder), "model": {"family": "llama", "max_seq_len": 16, **shape},
        "objective": {"name": "next_token"}, "data": {"kind": "group_product", "group": "s3", "length": 16},
        "batch": {"global_size": 2}, "optimizer": {"lr": 1e-3}, "schedule": {"steps": 2, "kind": "constant"},
        "deepspeed": deepspeed, "precision": "bf16", "log": {"tensorboard": False},
    }  # fmt: skip


def data_bytes() -> int:
    """What RLIMIT_DATA counts."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")
    )
    return int(line.split()[1]) * 1024


def work(folder: Path, deepspeed_section: dict[str, Any], rank: int, world: int) -> None:
    """Two updates of a small model, which load every library, then in the limit two of the large one."""
    ctypes.CDLL(None).mallopt(
        -3, 65_536
    )  # M_MMAP_THRESHOLD: tensors go back to the system when they are freed
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_SIZE=str(world),
    )
    import deepspeed
    import torch
    import torch.distributed as dist

    from rdlm.config.base import parse
    from train.data import build_corpus
    from train.settings import TrainConfig
    from train.trainer import Trainer

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)

    def train(document: dict[str, Any], limit: int | None) -> None:
        if limit is not None:
            bound = data_bytes() + limit
            resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
        checked = parse(TrainConfig, document, "test")
        trainer = Trainer(checked, build_corpus(checked.data), torch.device("cpu"), io.StringIO())
        for trainer.step in range(2):
            batches = trainer._batches(trainer.step)
            positions, _ = trainer._agree(sum(float(b.mask.sum()) for b in batches), False)
            tally = trainer.train_step(batches, positions)
            print(json.dumps({"loss": tally.total, "data": data_bytes()}), flush=True)
        trainer.close()

    small = {"d_model": 32, "num_heads": 2, "mlp_width": 48, "num_layers": 2, "vocab_size": 8}
    train(config(folder / "small", small, deepspeed_section), None)
    print("small done", flush=True)
    d, mlp = SHAPE["d_model"], SHAPE["mlp_width"]
    parameters = SHAPE["num_layers"] * (4 * d * d + 3 * d * mlp) + SHAPE["vocab_size"] * d
    train(config(folder / "large", SHAPE, deepspeed_section), BYTES_PER_PARAMETER * parameters)


def launch(folder: Path, section: dict[str, Any], world: int) -> list[subprocess.CompletedProcess[str]]:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, __file__, str(folder), json.dumps(section)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=900) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def large_updates(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "small done" in done.stdout, done.stderr
    return done.stdout.partition("small done\n")[2].splitlines()


def test_two_processes_hold_what_one_cannot(tmp_path: Path) -> None:
    for done in launch(tmp_path / "zero3", OFFLOAD, 2):
        assert done.returncode == 0 and len(large_updates(done)) == 2, done.stderr
    for name, section, world in (("zero0", {"zero_stage": 0}, 2), ("alone", OFFLOAD, 1)):
        for done in launch(tmp_path / name, section, world):
            assert done.returncode != 0 and large_updates(done) == []
            assert "allocate memory" in done.stderr or "Cannot allocate memory" in done.stderr, done.stderr


if __name__ == "__main__":
    work(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
