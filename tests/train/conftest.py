"""A tiny training config and, for tests inside this process, a process group of one."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "model": {
        "family": "huginn", "vocab_size": 8, "d_model": 32, "num_heads": 2, "mlp_width": 48, "max_seq_len": 32,
        "num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1, "noise_embed_dim": 16,
    },
    "objective": {"name": "single_pass"},
    "data": {"kind": "group_product", "group": "s3", "length": 12},
    "batch": {"global_size": 4},
    "optimizer": {"lr": 0.01, "weight_decay": 0.1},
    "schedule": {"kind": "cosine", "steps": 6, "warmup_steps": 2},
    "precision": "bf16",
    "checkpoint": {"interval_steps": 2, "keep": 2},
    "log": {"tensorboard": False},
}  # fmt: skip


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``{"section.field": value}`` put in; a dictionary as value replaces the section."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return result


@pytest.fixture
def document(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``document({"batch.micro_size": 2})`` -> the tiny config as YAML would hold it; its output lies in
    ``tmp_path/run``."""
    return lambda changes=None: merged({**TINY, "output": str(tmp_path / "run")}, changes or {})


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torch.distributed over gloo with this process alone, as DeepSpeed expects to find it."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("store") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in train/pretrain.py
    deepspeed.init_distributed("gloo", verbose=False)
    yield
    dist.destroy_process_group()


@pytest.fixture
def trainer(
    one_process: None, document: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """``trainer({"deepspeed.zero_stage": 0})`` -> a Trainer of the tiny config with these changes, in this
    process.

    The trainers made before let go of their output folders, as if their processes had ended;
    ``alongside=True`` keeps them.
    """
    import io

    import torch

    from rdlm.config.base import parse
    from train.data import build_corpus
    from train.settings import TrainConfig
    from train.trainer import Trainer

    monkeypatch.setattr(
        "train.engines.PERSISTENT_ELEMENTS", 0
    )  # or ZeRO 3 would partition nothing of so small a model
    made: list[Trainer] = []

    def make(changes: dict[str, Any] | None = None, alongside: bool = False) -> Trainer:
        for earlier in () if alongside else made:
            earlier.close()
        config = parse(TrainConfig, document(changes), "test")
        made.append(
            Trainer(config, build_corpus(config.data, config.fills_in), torch.device("cpu"), io.StringIO())
        )
        return made[-1]

    return make


@pytest.fixture(scope="session")
def only_drawn_blocks_move() -> Callable[[Any, int, int], None]:
    """``only_drawn_blocks_move(trainer, num_blocks, updates)``: in each update the drawn block moves, and no
    other."""
    import torch

    from rdlm.objectives.blockwise import drawn_block

    def check(running: Any, num_blocks: int, updates: int) -> None:
        order = [drawn_block(num_blocks, step, seed=TINY["seed"]) for step in range(updates)]
        for running.step in range(updates):
            before = running.weights()
            batches = running._batches(running.step)
            running.train_step(batches, float(sum(batch.mask.sum() for batch in batches)))
            moved = {
                name.split(".")[1]
                for name, weight in running.weights().items()
                if not torch.equal(weight, before[name])
            }
            assert moved == {str(order[running.step])}

    return check


@pytest.fixture(scope="session")
def allocated() -> Callable[..., tuple[int, int]]:
    """``allocated(denoiser, batch)`` -> bytes alive when the real loss is known, and at the peak of both
    passes."""
    from rdlm.objectives.base import Keys
    from train.memory_trace import _LiveBytes

    def count(denoiser: Any, batch: Any) -> tuple[int, int]:
        with _LiveBytes() as counted:
            total = denoiser.loss(batch, Keys(seed=0, step=0)).total
            forward = counted.live
            total.backward()
        return forward, counted.peak

    return count
