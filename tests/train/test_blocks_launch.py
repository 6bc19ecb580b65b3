"""Blocks in launches of their own: the same bits as alone, whatever dies on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rdlm.checkpoints.folder import load
from rdlm.cli import app, run
from rdlm.errors import UserError
from rdlm.objectives.blockwise import Blockwise
from train.export import export_run, merge
from train.launcher import launch

REPO = Path(__file__).resolve().parents[2]
BLOCKS: dict[str, Any] = {
    "model": {
        "family": "llama", "vocab_size": 8, "d_model": 32, "num_heads": 2, "mlp_width": 48, "max_seq_len": 32,
        "num_layers": 3,
        "noise_embed_dim": 16, "noise_conditioning": True,
    },
    "objective": {"name": "paper"},
    "blocks": {"num_blocks": 2, "layers_per_block": [2, 1]},
    "schedule.steps": 40,
    "checkpoint.interval_steps": 1,
}  # fmt: skip


def steps_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "DS_ACCELERATOR": "cpu"}
TRAIN = [sys.executable, "-m", "rdlm", "train"]


def trained_alone(config: Path, output: Path) -> list[Path]:
    """Both blocks trained by a command each -> their output folders."""
    for b in range(2):
        command = [
            *TRAIN,
            str(config),
            f"output={output}",
            "checkpoint.interval_steps=100",
            "--block",
            str(b),
            "--num-procs",
            "1",
        ]
        subprocess.run(command, cwd=REPO, env=ENVIRONMENT, check=True, capture_output=True, timeout=600)
    return [output / f"block_{b}" for b in range(2)]


@pytest.mark.multiproc
def test_parallel_blocks_with_one_killed_equal_blocks_trained_alone(document, tmp_path: Path) -> None:
    """One command trains both; block 1 is killed -9 with all its processes in the middle, and the merge has
    the same bits."""
    config, output = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(document(BLOCKS)))
    command = [*TRAIN, str(config), "--parallel", "--num-procs", "1"]
    process = subprocess.Popen(
        command, cwd=REPO, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 900
    while steps_of(output / "block_1") < 3:
        assert time.monotonic() < deadline and process.poll() is None, "block 1 did not get so far"
        time.sleep(0.02)
    victims = [p for p in psutil.Process(process.pid).children() if p.cmdline()[-1] == "1"]
    assert len(victims) == 1
    for victim in [*victims[0].children(recursive=True), *victims]:
        victim.kill()
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert (
        "block 1: ended with status -9; restarting it" in err
        and "resumed tiny at step" in err
        and "merged 2 blocks" in err
    )
    assert steps_of(output / "block_0") == steps_of(output / "block_1") == 40
    merged = load(output / "model")
    assert isinstance(merged.denoiser, Blockwise) and merged.config.block is None and merged.config.step == 80
    alone = trained_alone(config, tmp_path / "alone")
    by_hand = merge(alone[::-1], tmp_path / "by_hand")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output / "model", by_hand))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for b, folder in enumerate(alone):
        for name, weight in load_file(folder / "model" / "model.safetensors").items():
            assert torch.equal(ours[f"blocks.{b}.{name}"], weight), name


def test_merge_refuses_what_are_not_the_blocks_of_one_network(trainer, tmp_path: Path) -> None:
    def trained(name: str, changes: dict[str, Any]) -> Path:
        one = trainer({**BLOCKS, "schedule.steps": 2, "output": str(tmp_path / name), **changes})
        one.fit()
        export_run(one.output)
        return tmp_path / name

    first, second = trained("first", {"block": 0}), trained("second", {"block": 1})
    other = trained(
        "other", {"block": 1, "blocks": {"num_blocks": 2, "overlap": 0.05, "layers_per_block": [2, 1]}}
    )
    joint = trained("joint", {})
    for runs, problem in (
        ([first], r"of 2 blocks, \[1\] are missing"),
        ([first, first / "model"], "is block 0, as"),
        ([first, other], "another blocks than"),
        ([joint, second], "holds no single block"),
    ):
        with pytest.raises(UserError, match=problem):
            merge(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(app, ["merge", str(second), str(first), "--out", str(tmp_path / "out")], "rdlm") == 0
    assert isinstance(load(tmp_path / "out").denoiser, Blockwise)


@pytest.mark.parametrize(
    ("changes", "options", "problem"),
    [
        ({"blocks": None}, ["--parallel"], "blocks=None: --parallel needs several blocks"),
        ({}, ["--parallel", "--block", "1"], "--block=1: --parallel trains all blocks"),
        ({}, ["--block", "2"], "block=2: there are 2 blocks"),
        ({"blocks": None}, ["--block", "0", "--num-procs", "1"], "block=0"),
        ({"blocks": {"num_blocks": 4}}, ["--parallel"], "num_blocks=4: the model has 3 layers"),
        ({}, ["--block", "0", "--devices", "0"], "--devices='0': there are 0 GPUs"),
        ({}, ["--devices", "a"], "--devices='a': is not a list of numbers"),
    ],
)
def test_mistakes_are_one_line(
    document, tmp_path: Path, capsys, changes: dict, options: list[str], problem: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(document({**BLOCKS, **changes})))
    assert run(app, ["train", str(config), *options], "rdlm") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and problem in err, err


def test_gpus_are_chosen_by_name(document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed ignores CUDA_VISIBLE_DEVICES beside a number of GPUs: two launches would share the first
    ones."""
    seen: list[list[str]] = []
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(document(BLOCKS)))
    monkeypatch.setattr("train.launcher.accelerators", lambda: (True, 4))
    monkeypatch.setattr(
        "train.launcher._run", lambda command, environment: (seen.append(command), (0, None))[1]
    )
    assert launch(str(config), ["block=1"], 2, devices=[2, 3]) == 0
    assert seen[0][seen[0].index("--include") + 1] == "localhost:2,3" and "--num_accelerators" not in seen[0]
    with pytest.raises(UserError, match="does not name 2 GPUs"):
        launch(str(config), ["block=1"], 2, devices=[2, 2])
