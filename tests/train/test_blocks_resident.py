"""One block on the device at a time: the bits of joint training, the memory of a block alone."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from rdlm.checkpoints.folder import load
from rdlm.cli import app, run
from rdlm.diffusion.targets import frozen_rows
from rdlm.errors import UserError
from rdlm.nn.attention import rotary_table
from rdlm.objectives.blockwise import drawn_block
from tests.train.test_blocks import BLOCKS
from train.config_file import load as load_config
from train.export import export_run
from train.launcher import launch_blocks
from train.memory_plan import arms
from train.offload import InHost, Mover, OnDisk


def residing(steps: int = 1) -> dict[str, Any]:
    return {**BLOCKS, "resident": {"visit_steps": steps}}


SLOW = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in ((0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"))
]
STAGES = [(0, "fp32"), (2, "bf16"), (3, "bf16"), *SLOW]


def records(trainer: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trainer.output / "metrics.jsonl").read_text().splitlines()]


def live_bytes(ignored: set[int]) -> int:
    """Bytes of all storages in the process, but for those that ``ignored`` names."""
    gc.collect()
    storages = {}
    for item in tensors():
        if item.device.type == "cpu":
            storage = item.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in ignored:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def tensors() -> list[torch.Tensor]:
    """All there are, but for those without memory that another test of this process may have left."""
    found = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    return [tensor for tensor in found if not isinstance(tensor, FakeTensor)]


def storages_now() -> set[int]:
    """Those there are, without the tables that are kept for the whole process: what runs next makes them
    anew, whoever ran before."""
    rotary_table.cache_clear()
    frozen_rows.cache_clear()
    gc.collect()
    return {tensor.untyped_storage().data_ptr() for tensor in tensors()}


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_visits_of_one_update_are_joint_training_to_the_bit(
    trainer, tmp_path: Path, stage: int, precision: str
) -> None:
    changes = {"deepspeed.zero_stage": stage, "precision": precision}
    joint, resident = (
        trainer({**BLOCKS, **changes, "output": str(tmp_path / "joint")}),
        trainer({**residing(), **changes}, alongside=True),
    )
    assert joint.fit() and resident.fit()
    wanted = joint.weights()
    assert wanted.keys() == resident.weights().keys()
    for name, weight in resident.weights().items():
        assert torch.equal(weight, wanted[name]), name
    for mine, theirs in zip(records(resident), records(joint), strict=True):
        assert (mine["loss"], mine["grad_norm"], mine["block"]) == (
            theirs["loss"],
            theirs["grad_norm"],
            theirs["block"],
        )
        assert 0 < mine["swap_share"] < 1 or mine["step"] > 1


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_nothing_of_a_resting_block_is_in_memory(trainer, tmp_path: Path, stage: int, precision: str) -> None:
    """All tensors of the process together are those of a run of the one block alone."""
    changes = {
        "deepspeed.zero_stage": stage,
        "precision": precision,
        "blocks": {"num_blocks": 3, "layers_per_block": [1, 1, 1]},
    }
    before = storages_now()
    alone = trainer({**BLOCKS, **changes, "block": 0, "output": str(tmp_path / "alone")})
    assert alone.fit()
    wanted = live_bytes(before)
    assert wanted > 0
    before = storages_now()
    resident = trainer({**residing(), **changes}, alongside=True)
    assert resident.fit()
    for _ in resident.engines:
        assert live_bytes(before) == wanted
    assert {path.name for path in resident.output.iterdir()} == {path.name for path in alone.output.iterdir()}


def test_a_visit_lasts_and_training_resumes_inside_one_to_the_bit(trainer, tmp_path: Path) -> None:
    changes = {
        **BLOCKS, "resident": {"visit_steps": 4}, "schedule.steps": 16, "checkpoint.interval_steps": 100,
        "evaluation": {"interval_steps": 3, "steps": [1], "max_tokens": 24},
    }  # fmt: skip
    whole = trainer({**changes, "output": str(tmp_path / "whole")})
    assert whole.fit()
    wanted = whole.weights()
    calls = iter(range(99))
    first = trainer(changes)
    assert not first.fit(lambda: next(calls) >= 6)
    second = trainer(changes)
    assert second.step == 6 and second.fit()
    for name, weight in second.weights().items():
        assert torch.equal(weight, wanted[name]), name
    assert [r["block"] for r in records(second)] == [drawn_block(2, step // 4, seed=3) for step in range(16)]
    held_out = [json.loads(line) for line in (second.output / "held_out.jsonl").read_text().splitlines()]
    assert [r["step"] for r in held_out] == [3, 6, 9, 12, 15, 16] and held_out[-1].keys() == {"step", "K=1"}
    export_run(second.output)
    loaded = load(second.output / "model")
    assert loaded.config.block is None and loaded.config.step == 16
    for name, weight in loaded.denoiser.named_parameters():
        assert torch.equal(weight, wanted[name]), name


@pytest.mark.parametrize("rest", ["disk", "host"])
def test_storages_leave_and_come_back_under_their_views(tmp_path: Path, rest: str) -> None:
    flat = torch.randn(4_000_000)
    layer = nn.Linear(1000, 1000)
    layer.weight.data = flat[:1_000_000].view(1000, 1000)
    layer.weight.grad = torch.randn(1000, 1000)
    layer.flat, layer.odd = flat[1:], [torch.arange(5), {"a": torch.tensor(7.0)}]  # type: ignore[assignment]
    copies = [
        t.clone() for t in (flat, layer.weight.grad, layer.bias.data, *layer.odd[:1], layer.odd[1]["a"])
    ]
    mover = Mover(layer, OnDisk(tmp_path) if rest == "disk" else InHost(), torch.device("cpu"))
    for _ in range(2):
        full = psutil.Process().memory_info().rss
        mover.leave()
        everything = (flat, layer.weight, layer.weight.grad, layer.bias, layer.odd[0], layer.odd[1]["a"])
        assert all(t.untyped_storage().nbytes() == 0 for t in everything)
        if rest == "disk":
            assert full - psutil.Process().memory_info().rss > 18 << 20, "16 MB of weights, 4 of gradients"
        mover.come_back()
        for found, wanted in zip(
            (flat, layer.weight.grad, layer.bias.data, layer.odd[0], layer.odd[1]["a"]), copies, strict=True
        ):
            assert torch.equal(found, wanted)
        assert layer.weight.data_ptr() == flat.data_ptr()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": None}, "blocks.num_blocks=None: resident training needs several blocks"),
        ({"blocks": {"num_blocks": 1}}, "blocks.num_blocks=1: resident training needs several blocks"),
        ({"block": 1}, "block=1: a block that is trained alone is always on the device"),
        (
            {"resident.visit_steps": 4},
            "resident.visit_steps=4: with 2 blocks some would not be visited in 6 steps; use at most 3",
        ),
        ({"resident": {"visit_steps": 0}}, "resident.visit_steps=0"),
        (
            {"evaluation": {"interval_steps": 2, "steps": [1, 4]}},
            "evaluation.steps=4: K > 1 runs several blocks",
        ),
        ({"resident": {"rest": "host", "visit_steps": 1}}, "resident.rest='host': without GPUs"),
        ({"resident": {"rest": "tape"}}, "resident.rest='tape'"),
    ],
)
def test_mistakes_are_one_line(
    document, tmp_path: Path, capsys, changes: dict[str, Any], message: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(document({**residing(), **changes})))
    assert run(app, ["train", str(config), "--num-procs", "1"], "rdlm") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err, err


def test_parallel_launches_have_no_residents(document, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(document(residing())))
    assert load_config(config).resident is not None
    with pytest.raises(UserError, match="every block has a launch of its own"):
        launch_blocks(str(config), [], 1, None, 0)


def test_what_a_plan_suggests_for_one_device_keeps_one_block_on_it(document, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(document({**BLOCKS, "evaluation": {"interval_steps": 2}})))
    suggested = [arm for arm in arms(load_config(config), 1, False) if arm.num_blocks == 3]
    assert suggested and {arm.mode for arm in suggested} == {"resident"}
    planned = load_config(config, suggested[0].settings)
    assert planned.resident is not None and planned.resident.visit_steps == 2 and planned.block is None


def test_a_run_does_not_change_the_length_of_its_visits(trainer) -> None:
    trainer(residing()).fit()
    with pytest.raises(UserError, match="resident.visit_steps=2: the run in .* was started with 1"):
        trainer({**residing(), "resident": {"visit_steps": 2}})
    with pytest.raises(UserError, match="resident"):
        trainer(BLOCKS)


@pytest.mark.slow
@pytest.mark.multiproc
def test_processes_of_the_launcher_share_a_resident_block(document, tmp_path: Path) -> None:
    """`rdlm train` with two processes and ZeRO 2: the model of the joint run, bit for bit, and nothing left
    lying about."""
    repo, models = Path(__file__).resolve().parents[2], []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo), "DS_ACCELERATOR": "cpu"}
    for name, changes in (("joint", BLOCKS), ("resident", residing())):
        config = tmp_path / f"{name}.yaml"
        config.write_text(
            yaml.safe_dump(document({**changes, "deepspeed.zero_stage": 2, "output": str(tmp_path / name)}))
        )
        command = [sys.executable, "-m", "rdlm", "train", str(config), "--num-procs", "2"]
        subprocess.run(command, cwd=repo, env=environment, check=True, capture_output=True, timeout=900)
        models.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    assert models[0].keys() == models[1].keys() and all(
        torch.equal(models[0][name], models[1][name]) for name in models[0]
    )
    assert sorted(os.listdir(tmp_path / "joint")) == sorted(os.listdir(tmp_path / "resident"))
