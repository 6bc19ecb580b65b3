"""A run goes on with another number of processes: the same weights and moments, the same losses but for the
order of additions."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rdlm.config.base import parse
from train.settings import TrainConfig

pytestmark = pytest.mark.multiproc
REPO = Path(__file__).resolve().parents[2]
HALF = 3
BPTT = {"name": "bptt", "depth": {"mean": 2, "grad_steps": 2}}
NOISY = {"name": "single_pass"}
"""Its read-out's scale has one element: less than there are processes. Noise is keyed by process, so losses
cannot agree."""
VARIANTS = {
    "stage 0, fp32": (0, "fp32", BPTT), "stage 1, bf16": (1, "bf16", BPTT), "stage 2, fp32": (2, "fp32", BPTT),
    "stage 2, bf16": (2, "bf16", NOISY), "stage 3, bf16": (3, "bf16", BPTT), "stage 3, noisy": (3, "bf16", NOISY),
}  # fmt: skip
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3}
"""Relative, of every loss against the run that was not interrupted."""


def document(name: str, output: Path | str) -> dict[str, Any]:
    """A tiny run; its large eps keeps the order of additions from turning tiny gradients into updates."""
    stage, precision, objective = VARIANTS[name]
    return {
        "name": "tiny", "output": str(output), "seed": 3, "objective": objective, "precision": precision,
        "model": {
            "family": "huginn", "vocab_size": 8, "d_model": 32, "num_heads": 2, "mlp_width": 48, "max_seq_len": 32,
            "num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1, "noise_embed_dim": 16,
        },
        "data": {"kind": "group_product", "group": "s3", "length": 12}, "batch": {"global_size": 4, "micro_size": 1},
        "optimizer": {"lr": 0.01, "eps": 1e-3}, "schedule": {"kind": "cosine", "steps": 6, "warmup_steps": 2},
        "deepspeed": {"zero_stage": stage}, "checkpoint": {"interval_steps": 100, "keep": 9},
        "log": {"tensorboard": False},
    }  # fmt: skip


def train(job: dict[str, Any]) -> None:
    """Train to the end in this process, one of several perhaps; ``half.pt`` gets weights and moments as they
    are at HALF."""
    from train import engines
    from train.data import build_corpus
    from train.trainer import Trainer

    engines.PERSISTENT_ELEMENTS = (
        200  # ZeRO 3 cuts the matrices and keeps the norms whole, as in a large model
    )
    config = parse(TrainConfig, job, "test")
    trainer = Trainer(config, build_corpus(config.data), torch.device("cpu"), io.StringIO())
    if trainer.step < HALF:
        trainer.fit(lambda: trainer.step == HALF)
    assert trainer.step == HALF
    state = {"weights": trainer.weights() or {}}
    for key in ("exp_avg", "exp_avg_sq") if config.deepspeed.zero_stage else ():
        state[key] = moments(trainer, key)
    if trainer.rank == 0:
        torch.save(state, Path(config.output) / "half.pt")
    assert trainer.fit()
    trainer.close()


def moments(trainer: Any, key: str) -> dict[str, torch.Tensor]:
    """Whole optimizer state: by parameter at stage 3, as flat groups (without padding) at 1 and 2.
    Collective."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_optimizer_state

    optimizer = trainer.engines[0].optimizer
    if trainer.config.deepspeed.zero_stage == 3:
        return {
            name: safe_get_full_optimizer_state(p, key).clone()
            for name, p in trainer.network.named_parameters()
        }
    whole: dict[str, torch.Tensor] = {}
    for i, group in enumerate(optimizer.param_groups):
        parts: list[Any] = [None] * trainer.world
        dist.all_gather_object(parts, optimizer.state[group["params"][0]][key])
        size = sum(shape.numel() for shape in trainer.engines[0]._get_zero_param_shapes()[i].values())
        whole[f"group {i}"] = torch.cat(parts)[:size]
    return whole


def half_of(source: Path, target: Path) -> str:
    """A copy of a finished run as it stood at HALF."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("step_000006", "half.pt"))
    return str(target)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(one_process: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``<processes>/<variant>`` of whole runs and ``<before>-<after>/<variant>`` of runs that moved
    at HALF."""
    root = tmp_path_factory.mktemp("runs")
    for name in VARIANTS:
        train(document(name, root / "1" / name))
    jobs = [document(name, root / "2" / name) for name in VARIANTS]
    jobs += [document(name, half_of(root / "1" / name, root / "1-2" / name)) for name in VARIANTS]
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__, str(root)]
    pair = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=900)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], errors
    for name in VARIANTS:
        train(document(name, half_of(root / "2" / name, root / "2-1" / name)))
    return root


def member(root: Path, rank: int) -> None:
    """One of two processes: all jobs in turn."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2")
    import deepspeed
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=rank, world_size=2)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    for job in json.loads((root / "jobs.json").read_text()):
        train(job)
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_state(
    runs: Path, name: str, before: int, after: int
) -> None:
    moved, whole = runs / f"{before}-{after}" / name, runs / str(before) / name
    old, new = torch.load(whole / "half.pt"), torch.load(moved / "half.pt")
    assert old.keys() == new.keys()
    for kind, tensors in old.items():
        for parameter, value in tensors.items():
            assert torch.equal(new[kind][parameter], value), f"{kind} of {parameter} changed on the way"
            assert kind == "weights" or bool(value.any()), f"{kind} of {parameter}: nothing to compare"
    assert len(losses(moved)) == 6
    _, precision, objective = VARIANTS[name]
    if objective is not NOISY:
        assert losses(moved) == pytest.approx(losses(whole), rel=TOLERANCE[precision])


if __name__ == "__main__":
    member(Path(sys.argv[1]), int(sys.argv[2]))
