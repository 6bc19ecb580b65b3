"""The launcher from outside: signals, kills, process counts, and the DeepSpeed command written by hand."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.train.test_blocks import BLOCKS
from train.config_file import load
from train.launcher import _conclude

pytestmark = pytest.mark.multiproc
REPO = Path(__file__).resolve().parents[2]
CLOCKS = (
    "seconds",
    "cpu_seconds",
    "step_s",
    "tokens_per_s",
    "targets_per_s",
    "peak_memory_bytes",
    "tflops",
    "swap_share",
)


class Run:
    """One tiny run: its config file and output folder."""

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        self.output = folder / "run"
        self.config = folder / "config.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump({**document, "output": str(self.output)}))

    def start(self, processes: int = 1, file_bytes: int | None = None) -> subprocess.Popen[str]:
        """file_bytes: a file that would become larger cannot be written."""
        command = ["-m", "rdlm", "train", str(self.config), "--num-procs", str(processes)]
        return self._popen(command, file_bytes)

    def by_hand(self, processes: int) -> subprocess.Popen[str]:
        """What docs/training.md tells users who prefer DeepSpeed's own command."""
        launcher = [
            "-m",
            "deepspeed.launcher.runner",
            "--num_accelerators",
            str(processes),
            "--master_port",
            "29743",
        ]
        return self._popen([*launcher, "--module", "train.pretrain", "--config", str(self.config)])

    def _popen(self, arguments: list[str], file_bytes: int | None = None) -> subprocess.Popen[str]:
        def limited() -> None:
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPO,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limited,
        )

    def finish(self, processes: int = 1) -> Run:
        process = self.start(processes)
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, out + err
        return self

    def steps(self) -> list[int]:
        return [record["step"] for record in self.records()]

    def records(self) -> list[dict[str, Any]]:
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "model" / "model.safetensors")

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 300
        while not self.steps() or self.steps()[-1] < step:
            assert time.monotonic() < deadline, "training did not get so far"
            time.sleep(0.02)


@pytest.fixture
def run(tmp_path: Path, document: Callable[..., dict[str, Any]]) -> Callable[..., Run]:
    return lambda name, changes=None: Run(tmp_path / name, document(changes))


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    """No process with our config on its command line outlives a test."""
    yield
    deadline = time.monotonic() + 20
    while family := [p for p in psutil.process_iter() if any(str(tmp_path) in word for word in _words(p))]:
        if time.monotonic() > deadline:
            for process in family:
                process.kill()
            pytest.fail(f"left behind: {family}")
        time.sleep(0.2)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return []


def assert_equal(one: Run, other: Run) -> None:
    assert one.records() == other.records()
    for name, weight in one.weights().items():
        assert torch.equal(weight, other.weights()[name]), name


LONG = {"schedule.steps": 60, "checkpoint.interval_steps": 4}


def test_sigterm_saves_and_resuming_equals_an_uninterrupted_run(run) -> None:
    whole, stopped = run("whole", LONG).finish(), run("stopped", LONG)
    process = stopped.start()
    stopped.wait_for_step(6)
    process.terminate()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "goes on from the last checkpoint" in err
    newest = sorted((stopped.output / "checkpoints").iterdir())[-1].name
    assert newest == f"step_{stopped.steps()[-1]:06d}", "the update under way was finished and saved"
    assert stopped.steps()[-1] < 60
    assert_equal(stopped.finish(), whole)
    _, err = stopped.start().communicate(timeout=300)
    assert "all updates are made" in err and f"wrote {stopped.output / 'model'}" in err


def test_kill_9_of_everything_then_resuming_equals_an_uninterrupted_run(run) -> None:
    """All processes die at once in the middle of training that checkpoints after every update."""
    changes = {**LONG, "checkpoint.interval_steps": 1}
    whole, killed = run("whole", changes).finish(), run("killed", changes)
    process = killed.start()
    killed.wait_for_step(5)
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.kill()
    process.communicate(timeout=60)
    assert killed.steps()[-1] < 60
    assert_equal(killed.finish(), whole)
    assert killed.steps() == list(range(1, 61))


@pytest.mark.parametrize(
    ("of_launcher", "status", "words"),
    [
        (
            256 - signal.SIGKILL,
            128 + signal.SIGKILL,
            "was killed (SIGKILL): if nobody did that, memory ran out; `rdlm plan",
        ),
        (256 - signal.SIGSEGV, 128 + signal.SIGSEGV, "ended by SIGSEGV"),
        (-signal.SIGKILL, 128 + signal.SIGKILL, "was killed"),
        (3, 3, "ended with status 3"),
        (2, 2, ""),
        (0, 0, ""),
    ],
)
def test_how_a_training_process_ended_is_said(run, capsys, of_launcher: int, status: int, words: str) -> None:
    """DeepSpeed's launcher exits with its worker's negative status, modulo 256."""
    config = load(str(run("one").config))
    assert _conclude(config, of_launcher, None) == status
    err = capsys.readouterr().err
    assert words in err and bool(err) == bool(words)


def test_workers_end_when_the_command_is_killed(run) -> None:
    """The fixture proves that nothing is left behind."""
    training = run("run", {**LONG, "schedule.steps": 100_000})
    process = training.start()
    training.wait_for_step(2)
    process.kill()
    process.communicate(timeout=60)


def test_two_processes_equal_one(run) -> None:
    """fp32, objective without noise (noise is keyed by process): losses to 1e-5, the order of additions being
    the difference."""
    changes = {
        "objective": {"name": "bptt", "depth": {"mean": 2, "grad_steps": 2}},
        "precision": "fp32",
        "optimizer.eps": 1e-3,
    }
    one, two = run("one", changes).finish(1), run("two", changes).finish(2)
    assert [r["loss"] for r in two.records()] == pytest.approx([r["loss"] for r in one.records()], rel=1e-5)
    for name, weight in two.weights().items():
        torch.testing.assert_close(weight, one.weights()[name], rtol=1e-3, atol=1e-4)


def test_deepspeed_by_hand_equals_rdlm_train(run) -> None:
    ours, by_hand = run("ours").finish(2), run("by_hand")
    process = by_hand.by_hand(2)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    assert_equal(by_hand, ours)


def test_a_defect_of_a_worker_shows_its_traceback_on_the_terminal(tmp_path: Path) -> None:
    code = (
        "import sys, types; from train.process import capture_output\n"
        "capture_output(types.SimpleNamespace(output=sys.argv[1]), 3)\nprint('a library'); 1 / 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("rdlm train: process 3 failed:\nTraceback")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n") and "a library" not in done.stderr


def test_a_mistake_found_by_the_workers_is_one_line_and_status_2(run) -> None:
    """Only the workers can see that the checkpoints in the output folder are another run's."""
    training = run("run").finish()
    training.config.write_text(training.config.read_text().replace("seed: 3", "seed: 4"))
    process = training.start()
    out, err = process.communicate(timeout=900)
    assert process.returncode == 2
    assert out == "" and "Traceback" not in err, out + err
    assert [line for line in err.splitlines() if "error" in line] == err.splitlines()[-1:] and "seed=4" in err


def test_a_disk_that_is_full_for_one_process_is_one_line_and_the_same_command_goes_on(run) -> None:
    """A real write that fails, at a checkpoint: torch.save has words of its own for it, and the other process sees
    a connection that ends. The limit of a file's size stands for a disk."""
    training = run("run", {"schedule.steps": 4, "deepspeed.zero_stage": 3})
    process = training.start(2, file_bytes=50_000)
    out, err = process.communicate(timeout=900)
    lines = [line for line in err.splitlines() if "error" in line]
    assert process.returncode == 2 and "Traceback" not in err, out + err
    assert 1 <= len(lines) <= 2 and all("could not be written" in x and "make room" in x for x in lines), err
    assert not list((training.output / "checkpoints").glob("*step*")), "nothing half written takes up room"
    assert training.finish(2).steps() == [1, 2, 3, 4]


INTERRUPTED = {
    "zero 3": {"deepspeed.zero_stage": 3},
    "resident": {**BLOCKS, "deepspeed.zero_stage": 2, "resident": {"visit_steps": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERRUPTED)
def test_random_interruptions_of_two_processes_change_nothing(case: str, run) -> None:
    changes = {**LONG, **INTERRUPTED[case]}
    rng = random.Random(0)
    whole, training = run("whole", changes).finish(2), run("interrupted", changes)
    for _ in range(10):
        process, seen, began = training.start(2), len(training.steps()), time.monotonic()
        wanted, patience = seen + rng.randint(1, 6), rng.choice([5.0, 300.0])  # some before the first update
        while (
            process.poll() is None and len(training.steps()) < wanted and time.monotonic() - began < patience
        ):
            time.sleep(0.05)
        chief = psutil.Process(process.pid)
        family = [chief, *chief.children(recursive=True)]
        number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        for one in rng.choice([[chief], family, [rng.choice(family)]]):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)
        process.communicate(timeout=300)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
    assert_equal(training.finish(2), whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_cpu_offload_trains_and_resumes(run, stage: int) -> None:
    """DeepSpeedCPUAdam, compiled at first use (about two minutes); losses stay near those of torch's AdamW (1
    %)."""
    changes: dict[str, Any] = {
        "objective": {"name": "bptt", "depth": {"mean": 2, "grad_steps": 2}},
        "deepspeed.zero_stage": stage,
    }
    offload = {**changes, "deepspeed.offload_optimizer": "cpu"}
    if stage == 3:
        offload["deepspeed.offload_param"] = "cpu"
    plain, offloaded = run("plain", changes).finish(), run("offloaded", offload).finish()
    assert [r["loss"] for r in offloaded.records()] == pytest.approx(
        [r["loss"] for r in plain.records()], rel=1e-2
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_two_processes_with_muon_are_one(
    tmp_path: Path, document: Callable[..., dict[str, Any]], stage: int
) -> None:
    """Its matrices are cut between them: updates are those of one process, but for the last bits of gradients, which
    it orthogonalises in bf16."""
    changes = {
        "objective": "next_token", "precision": "fp32", "optimizer.name": "muon", "optimizer.grad_clip": 0,
        "schedule.steps": 3, "schedule.warmup_steps": 0, "evaluation.interval_steps": 0,
    }  # fmt: skip
    found = [
        Run(tmp_path / str(count), document({**changes, "deepspeed.zero_stage": zero}))
        .finish(count)
        .weights()
        for count, zero in ((1, 0), (2, stage))
    ]
    start = (
        Run(tmp_path / "start", document({**changes, "schedule.steps": 1, "optimizer.lr": 1e-12}))
        .finish()
        .weights()
    )
    moved, apart = (
        sum(float((found[0][name] - other[name]).square().sum()) for name in start) ** 0.5
        for other in (start, found[1])
    )
    assert moved > 0 and apart < 6e-2 * moved
