"""What the launcher decides before it starts anything, and what its processes look at first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rdlm.errors import UserError
from train import launcher, pretrain
from train.config_file import load, read_checked, written_checked
from train.process import LAUNCHER, _first_node, device_kind, environment

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path: Path, document: Callable[..., dict[str, Any]]) -> Callable[..., str]:
    def make(changes: dict[str, Any] | None = None) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(document(changes)))
        return str(path)

    return make


@pytest.mark.parametrize(
    ("visible", "devices", "included"),
    [
        (None, None, "0,1"),
        (None, [1, 3], "1,3"),
        ("4,5", None, "4,5"),
        ("4, 5,7", [0, 2], "4,7"),
        ("", None, "0,1"),
    ],
)
def test_gpus_are_those_that_this_process_sees(
    file, monkeypatch: pytest.MonkeyPatch, visible: str | None, devices: list[int] | None, included: str
) -> None:
    seen: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(launcher, "accelerators", lambda: (True, 4))
    monkeypatch.setattr(launcher, "_run", lambda *given: (seen.append(given), (0, None))[1])
    assert launcher.launch(file(), [], 2, devices) == 0
    ((command, variables),) = seen
    assert command[command.index("--include") + 1] == f"localhost:{included}"
    assert "CUDA_VISIBLE_DEVICES" not in variables and "--num_accelerators" not in command


def test_gpus_without_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-4ad5,MIG-1")
    with pytest.raises(UserError, match="by number, not by UUID"):
        launcher._physical([0])


def test_the_cpu_can_be_named_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert device_kind() == "cpu" and launcher.accelerators()[0] is False
    monkeypatch.delenv("DS_ACCELERATOR")
    assert device_kind() == "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match="torch sees no GPU"):
        device_kind()


def test_bf16_needs_a_device_that_computes_in_it(file) -> None:
    config = load(file())
    pretrain.check_precision(config, True)
    with pytest.raises(UserError, match="precision='bf16'"):
        pretrain.check_precision(config, False)
    pretrain.check_precision(load(file(), ["precision=fp32"]), False)


def test_srun_says_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.setenv(name, "x")  # so that they are restored
        monkeypatch.delenv(name)
    for name, value in {
        "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "gpu[03-05,09]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_JOB_ID": "4271234",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert environment() == (5, 4)
    found = [os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["1", "8", "gpu03", "16234"], "rank 0 runs on the first node, not where srun was called"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("a[1-3]", "a1"),
        ("a[07,09]", "a07"),
        ("a[7],b[1-2]", "a7"),
        ("n-1-[2-3]", "n-1-2"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert _first_node(nodes) == first


def test_a_process_whose_launcher_is_gone_ends_at_once() -> None:
    """Killed during start-up, the launcher leaves no process that trains to its end; an id that is used again
    does not help."""
    code = "from train.process import die_with_launcher; die_with_launcher(); print('went on')"
    for launched_by in ("999999999:0.0", f"{os.getpid()}:1.0"):
        variables = {**os.environ, "PYTHONPATH": str(REPO), LAUNCHER: launched_by}
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")


def test_the_processes_get_the_checked_config(file) -> None:
    config = load(file(), ["optimizer.lr=0.5"])
    Path(config.output).mkdir()
    with written_checked(config) as path:
        assert read_checked(path) == config
        assert json.loads(path.read_text())["optimizer"]["lr"] == 0.5
    assert not path.exists()


def test_what_would_fail_late_is_found_before_anything_starts(
    file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output=.*cannot be written"):
        pretrain.check_output(load(file({"output": str(tmp_path / "file" / "run")})))
    config = load(file())
    monkeypatch.setattr(pretrain.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="are free; a checkpoint takes"):
        pretrain.check_output(config)


def test_a_missing_held_out_split_is_found_before_anything_starts(
    file, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any) -> Any:
        raise UserError("data", "nowhere", "has no split valid", "prepare one")
        yield

    monkeypatch.setattr("train.data.corpus.GeneratedCorpus.windows", nothing)
    pretrain.check(load(file()), 1)
    with pytest.raises(UserError, match="no split valid"):
        pretrain.check(load(file({"evaluation.interval_steps": 2})), 1)
