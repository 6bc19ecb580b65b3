"""Several machines, as far as one goes: a hostfile, and one DeepSpeed launcher per machine without ssh."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.multiproc
REPO = Path(__file__).resolve().parents[2]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def deepspeed(hosts: str, folder: Path, document: dict[str, Any], launchers: list[list[str]]) -> Path:
    """Run one DeepSpeed launcher per list of options, all with the same hostfile; returns the run's folder."""
    folder.mkdir()
    (folder / "hosts").write_text(hosts)
    (folder / "config.yaml").write_text(yaml.safe_dump({**document, "output": str(folder / "run")}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "DS_ACCELERATOR": "cpu"}
    common = ["--hostfile", str(folder / "hosts"), "--master_addr", "127.0.0.1", "--master_port", free_port()]
    training = ["--module", "train.pretrain", "--config", str(folder / "config.yaml")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "deepspeed.launcher.runner", *common, *options, *training],
            cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for options in launchers
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(launchers), "\n".join(outputs)
    return folder / "run"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_launcher_per_machine_equals_one_for_all(
    tmp_path: Path, document: Callable[..., dict[str, Any]]
) -> None:
    """Two launchers that know each other by the hostfile alone, one process each, train what one launcher
    with two trains."""
    without_ssh = [["--no_ssh", "--node_rank", "0"], ["--no_ssh", "--node_rank", "1"]]
    apart = deepspeed("first slots=1\nsecond slots=1\n", tmp_path / "apart", document(), without_ssh)
    together = deepspeed("localhost slots=2\n", tmp_path / "together", document(), [["--no_ssh_check"]])
    assert json.loads((apart / "checkpoints" / "step_000006" / "manifest.json").read_text())["world"] == 2
    assert len(losses(apart)) == 6
    assert losses(apart) == losses(together)
