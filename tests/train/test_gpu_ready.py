"""What a GPU will need of training, as far as a CPU can show it: settings of each stage, batches in one copy, counted
operations, traces, and backward passes that do not make the host wait. tests/gpu has the forward passes."""

from __future__ import annotations

import errno
import gzip
import inspect
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from rdlm.config.base import parse
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.batch import Batch, on_device
from rdlm.errors import UserError
from rdlm.flops import costs_of
from rdlm.registry import build
from train import pretrain
from train.cost import UpdateFlops, peak_flops
from train.data import Reader
from train.engines import ds_config
from train.memory_plan import predict
from train.metrics import read
from train.process import lock_output
from train.settings import TrainConfig
from train.trainer import Tally

REPO = Path(__file__).resolve().parents[2]
OURS = tuple(str(REPO / package) for package in ("rdlm", "train"))
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
}


class NoWaits(TorchDispatchMode):
    """Notes operations of our own lines for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in WAITS or masks:
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            if frames[-1].filename.startswith(OURS):
                self.found.append(f"{func} at {frames[-1].filename}:{frames[-1].lineno}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("objective", ["single_pass", "paper"])
def test_backward_pass_and_step_wait_for_nothing(trainer, objective: str, recomputed: bool) -> None:
    run = trainer(
        {
            "objective": objective,
            "activation_checkpointing": recomputed,
            "batch.micro_size": 2,
            "noise_source": "counter",
        }
    )
    engine, watch, calls = run.engines[0], NoWaits(), []

    def watched(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            with watch:
                return plain(*args)

        return call

    for name in ("backward", "step"):
        setattr(engine, name, watched(name, getattr(engine, name)))
    batches = run._batches(0)
    run.train_step(batches, float(sum(batch.mask.sum() for batch in batches)))
    assert calls == ["backward", "step"] * 2 and watch.found == []


def test_a_micro_batch_that_is_not_finite_spoils_its_update_alone(trainer) -> None:
    run = trainer({"batch.micro_size": 1, "schedule.kind": "constant", "schedule.warmup_steps": 0})
    engine, plain = run.engines[0], run.engines[0].module.forward

    def forward(batch: Any, keys: Any = None, **others: Any) -> Any:
        total, *rest = plain(batch, keys, **others)
        return total * float("nan") if keys is not None and (keys.step, keys.micro) == (
            2,
            3,
        ) else total, *rest

    engine.module.forward = forward
    assert run.fit()
    assert [record["step"] for record in read(run.output / "metrics.jsonl")] == [1, 2, 4, 5, 6]
    assert "update 3 is not finite" in run.terminal.getvalue()


@pytest.mark.parametrize("world", [1, 8, 64])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_accepts_the_settings_of_every_stage(document, stage: int, world: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    changes: dict[str, Any] = {
        "batch": {"global_size": 128, "micro_size": 2}, "deepspeed.zero_stage": stage, "compile": "blocks",
        "deepspeed.communication_dtype": "fp32",
    }  # fmt: skip
    if stage == 3:
        changes |= {
            "deepspeed.offload_optimizer": "cpu",
            "deepspeed.offload_param": "cpu",
            "deepspeed.live_elements": 10,
        }
    config = parse(TrainConfig, document(changes), "test")
    found = DeepSpeedConfig(
        ds_config(config, world), mpu=SimpleNamespace(get_data_parallel_world_size=lambda: world)
    )
    assert (found.train_batch_size, found.gradient_accumulation_steps) == (128, 64 // world)
    assert found.zero_config.stage == stage and found.communication_data_type == torch.float32
    assert found.zero_config.overlap_comm == (stage == 3), "stage 3 gathers weights on a stream of its own"
    if stage == 3:
        assert found.zero_config.leaf_module.classes == ["rdlm.nn.layers.TransformerLayer"]


def test_overlap_and_dtype_follow_the_config(document) -> None:
    plain = ds_config(parse(TrainConfig, document(), "test"), 1)
    assert "communication_data_type" not in plain and plain["zero_optimization"]["overlap_comm"] is False
    asked = ds_config(parse(TrainConfig, document({"deepspeed.overlap_comm": True}), "test"), 1)
    assert asked["zero_optimization"]["overlap_comm"] is True


def test_gradients_are_sent_in_fp32_where_asked(trainer) -> None:
    run = trainer({"deepspeed.communication_dtype": "fp32"})
    assert run.engines[0].communication_data_type == torch.float32


def test_batches_arrive_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through one buffer, whatever their types: the meta device stands for a GPU, its copy for the GPU's."""
    sent: list[torch.Tensor] = []
    monkeypatch.setattr("rdlm.data.batch.staged", lambda buffer, device: sent.append(buffer) or buffer)
    batches = [
        Batch(torch.randint(0, 99, (2, 5)), torch.randint(0, 99, (2, 5)), torch.rand(2, 5) > 0.5),
        Batch(torch.randn(3, 3, 4, 4), torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.bool),
              documents=torch.zeros(3, 1, dtype=torch.int64)),
    ]  # fmt: skip
    there = on_device(batches, torch.device("meta"))
    assert len(sent) == 1
    for mine, arrived in zip(batches, there, strict=True):
        for name in ("inputs", "targets", "mask", "documents"):
            one, other = getattr(mine, name), getattr(arrived, name)
            assert (one is None and other is None) or (one.dtype == other.dtype and torch.equal(one, other))
        assert arrived.mask_on_host is mine.mask
    assert on_device(batches, torch.device("cpu")) is batches


def test_the_reader_is_one_update_ahead_and_hands_errors_on() -> None:
    threads: dict[int, str] = {}

    def read_batches(index: int) -> list[Batch]:
        threads[index] = threading.current_thread().name
        if index == 7:
            raise UserError("data", "x", "is damaged", "mend it")
        return [Batch(torch.tensor(index), torch.tensor(0), torch.tensor(True))]

    reader = Reader(read_batches)
    assert [int(reader.take(index, index + 1)[0].inputs) for index in (0, 1, 2)] == [0, 1, 2]
    assert int(reader.take(5, 6)[0].inputs) == 5, "after a rollback another one than was read ahead"
    assert threads[0] == "MainThread" and threads[1].startswith("reader") and threads[5] == "MainThread"
    reader.take(6, 7)
    with pytest.raises(UserError, match="is damaged"):
        reader.take(7, None)
    reader.close()


def test_operations_of_an_update_follow_r_and_agree_with_the_count_by_position(tiny_config) -> None:
    """Forward passes are those of rdlm/flops.py; where gradient is recorded a product costs three times as much, where
    it is not, once."""
    config: CheckpointConfig = tiny_config(
        "huginn",
        {"name": "onestep", "depth": {"mean": 4, "grad_steps": 2}},
        num_prelude_layers=2,
        num_core_layers=3,
    )
    length = 16
    found = UpdateFlops(config, length)
    costs = costs_of(build(config, seed=0))
    encode, core, decode = (getattr(costs, name).of_all(length) for name in ("encode", "core", "decode"))
    assert found.of(5) - found.of(4) == found.of(4) - found.of(3) == pytest.approx(core)
    assert found.of(2) - found.of(1) == pytest.approx(3 * core)
    assert found.of(1) == pytest.approx(3 * (encode + core + decode + length * costs.head), rel=0.06)
    assert found.of(2.5) == pytest.approx((found.of(2) + found.of(3)) / 2)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("Some new one", None)]
)
def test_peaks_are_looked_up_by_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_a_profile_records_the_updates_asked_for(trainer) -> None:
    run = trainer({"profile": {"start": 2, "steps": 2}})
    assert run.fit()
    file = run.output / "profile" / "rank0.json.gz"
    names = {event.get("name") for event in json.load(gzip.open(file))["traceEvents"]}
    assert {"ProfilerStep#2", "ProfilerStep#3"} <= names and "ProfilerStep#4" not in names
    assert f"wrote a trace of 2 updates to {file}" in run.terminal.getvalue()
    records = read(run.output / "metrics.jsonl")
    assert all(record["tflops"] > 0 for record in records)


def test_the_counter_trains_and_a_run_may_change_over_to_it(trainer) -> None:
    """Runs and checkpoints from before the field had the generator."""
    run = trainer({"schedule.steps": 2})
    assert run.config.noise_source == "generator" and run.fit()
    later = trainer({"noise_source": "counter"})
    assert later.step == 2 and later.state.history[-1]["noise_source"] == ["generator", "counter"]
    assert later.fit()


def test_deterministic_chooses_kernels_before_the_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "x")  # so that they are restored
        monkeypatch.delenv(name)
    pretrain.use_deterministic_algorithms()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and os.environ["NCCL_ALGO"] == "Ring"


def test_collectives_wait_while_one_process_reads_a_large_checkpoint() -> None:
    """DeepSpeed's 10 minutes end a start at about 20B parameters."""
    assert pretrain.COLLECTIVE_TIMEOUT.total_seconds() >= 3600
    assert "timeout=COLLECTIVE_TIMEOUT" in inspect.getsource(pretrain.train)


def test_a_file_system_without_locks_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lustre without ``-o flock``."""

    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("train.process.fcntl.flock", none)
    said: list[str] = []
    lock_output(tmp_path, said.append).close()
    assert len(said) == 1 and "without locks" in said[0]


def test_positions_are_counted_beyond_what_fp32_counts() -> None:
    tally = Tally()
    for _ in range(3):
        tally.add(torch.tensor(1.0), torch.tensor(float(2**24)), {})
    tally.add(torch.tensor(1.0), torch.tensor(1.0), {})
    assert tally.on_host().count == 3 * 2**24 + 1


def test_memory_and_operations_of_a_random_state_can_be_planned(document) -> None:
    """huginn_3b5 starts from one; drawing it by rejection depends on values, which a plan has none of."""
    config = parse(TrainConfig, document({"model.state_init": "normal"}), "test")
    assert predict(config, 1).total > 0
    assert UpdateFlops(config.checkpoint_config, 8).of(3) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["off", "blocks"])
def test_a_run_on_a_gpu_trains_resumes_and_has_an_mfu(
    tmp_path: Path, document: Callable[..., Any], mode: str
) -> None:
    """Through the launcher, on one GPU."""
    config = document(
        {
            "compile": mode,
            "noise_source": "counter",
            "deterministic": True,
            "model.d_model": 64,
            "schedule.steps": 6,
        }
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "rdlm", "train", str(tmp_path / "config.yaml"), "--num-procs", "1"]
    for steps in (4, 6):
        subprocess.run(
            [*command, f"schedule.steps={steps}", "schedule.warmup_steps=0"], check=True, timeout=300
        )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record["loss"] > 0 and record["tflops"] > 0 for record in records)
