"""The demo's handling of child processes: logs, failures, and nothing left behind."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from demo import chat
from demo import processes as module
from demo.processes import Processes, StepFailed
from rdlm.checkpoints.folder import save
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.errors import UserError
from rdlm.objectives import Objective

STUBBORN_FAMILY = """
import pathlib, signal, subprocess, sys, time
if sys.argv[1] == "parent":
    child = subprocess.Popen([sys.executable, "-c", sys.argv[3], "child", sys.argv[2], ""], start_new_session=True)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path(sys.argv[2]).write_text(str(__import__("os").getpid()))
time.sleep(60)
"""


def python(repo: Path, tmp_path: Path) -> Processes:
    return Processes(repo, tmp_path, program=(sys.executable, "-c"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_is_shown_and_logged(
    repo: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with python(repo, tmp_path) as processes:
        processes.run("hello", ["print('words'); import sys; print('more', file=sys.stderr)"])
    assert (tmp_path / "hello.log").read_text() == "words\nmore\n"


def test_failure_names_command_status_and_log(repo: Path, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="status 3") as caught, python(repo, tmp_path) as processes:
        processes.run("broken", ["print('reason'); raise SystemExit(3)"])
    assert caught.value.log.read_text() == "reason\n"


def test_leaving_the_block_ends_the_whole_family(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a grandchild in a session of its own that ignores SIGTERM is gone, also when the block ends by an
    exception."""
    monkeypatch.setattr(module, "GRACE_SECONDS", 1.0)
    pid_file = tmp_path / "pid"
    with pytest.raises(KeyboardInterrupt), python(repo, tmp_path) as processes:
        parent, _ = processes.start("family", [STUBBORN_FAMILY, "parent", str(pid_file), STUBBORN_FAMILY])
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.05)
        grandchild = int(pid_file.read_text())
        assert alive(grandchild)
        raise KeyboardInterrupt
    assert parent.returncode is not None
    for _ in range(50):
        if not alive(grandchild):
            return
        time.sleep(0.1)
    os.kill(grandchild, 9)
    raise AssertionError("the grandchild is still running")


def test_a_process_may_save_its_work_before_it_ends(repo: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    code = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.5); pathlib.Path(sys.argv[1]).write_text('yes'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(60)"
    )
    with python(repo, tmp_path) as processes:
        _, log = processes.start("saver", [code, str(saved)])
        while "ready" not in log.read_text():
            time.sleep(0.05)
    assert saved.read_text() == "yes"


def test_a_model_that_cannot_be_served_is_one_line_that_says_why(
    tmp_path: Path, tiny: Callable[..., Objective], tiny_config: Callable[..., CheckpointConfig]
) -> None:
    network, config = tiny("huginn", "onestep"), tiny_config("huginn", "onestep")
    save(tmp_path / "tiny", network, config, tokenizer=None)
    with pytest.raises(UserError, match="SOURCE='somewhere/tiny': cannot be served .*no tokenizer"):
        chat.main("somewhere/tiny", out=tmp_path)
