"""rdlm eval depth: counts and intervals against answers that are known, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval import depth
from eval.depth import choose_steps, evaluate_depth
from rdlm.checkpoint import Loaded, save
from rdlm.cli import app, run
from rdlm.config import CheckpointConfig
from rdlm.denoiser import Denoiser
from rdlm.errors import UserError
from rdlm.tasks import GroupProduct

Tiny = Callable[..., Denoiser]
TinyConfig = Callable[..., CheckpointConfig]


@pytest.fixture
def loaded(tiny: Tiny, tiny_config: TinyConfig) -> Loaded:
    return Loaded(tiny("huginn", "onestep", vocab_size=6).eval(), tiny_config("huginn", "onestep", vocab_size=6), None)


def _knows_k_factors(task: GroupProduct) -> Callable[..., dict[int, torch.Tensor]]:
    """Answers right at the first K positions and never after them."""

    def answers(denoiser: Any, config: Any, input_ids: torch.Tensor, ks: Sequence[int], seed: int = 0) -> dict[int, torch.Tensor]:
        right = input_ids.clone().numpy()
        for i in range(1, task.length):
            right[:, i] = task.table[right[:, i - 1], right[:, i]]
        far = torch.arange(task.length)
        return {k: torch.where(far < k, torch.from_numpy(right), (torch.from_numpy(right) + 1) % 6) for k in ks}

    return answers


def test_accuracy_counts_positions_and_the_last_one(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    task = GroupProduct("s3", 8)
    monkeypatch.setattr(depth, "greedy_answers", _knows_k_factors(task))
    results = evaluate_depth(loaded, task, (1, 4, 8), rows=50, batch_size=16)
    assert [(r["K"], r["length"], r["accuracy"], r["last"]) for r in results] == [
        (1, 8, 1 / 8, 0),
        (4, 8, 1 / 2, 0),
        (8, 8, 1, 1),
    ]
    assert [r["delta"] for r in results] == [0, 3 / 8, 7 / 8] and [r["change"] for r in results] == [0, 3 / 8, 1 / 2]
    assert all(r["accuracy_interval"] == pytest.approx([r["accuracy"]] * 2) for r in results)  # every example is the same


def test_interval_is_that_of_a_mean_over_examples(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the examples wholly right: the examples are the units, not their positions."""
    task, rows = GroupProduct("s3", 8), 400

    def half(denoiser: Any, config: Any, input_ids: torch.Tensor, ks: Sequence[int], seed: int = 0) -> dict[int, torch.Tensor]:
        right = _knows_k_factors(task)(denoiser, config, input_ids, [8])[8]
        kept = (torch.arange(len(right)) % 2 == 0)[:, None]
        return {k: torch.where(kept, right, (right + 1) % 6) for k in ks}

    monkeypatch.setattr(depth, "greedy_answers", half)
    low, high = evaluate_depth(loaded, task, (1,), rows=rows, batch_size=100)[0]["accuracy_interval"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(rows), rel=0.1)


def test_a_state_that_settles_stays_at_128_steps_and_one_that_runs_away_is_seen(loaded: Loaded, tiny_config: TinyConfig) -> None:
    """The core is made a contraction, then an expansion with its sign turned at every step."""
    task = GroupProduct("s3", 6)

    def last_change(factor: float) -> tuple[float, float]:
        model = loaded.denoiser.model
        model.core = lambda state, e, cond, ctx: factor * state + e  # type: ignore[method-assign]
        found = evaluate_depth(loaded, task, (1, 64, 127, 128), rows=200)
        return found[2]["accuracy"] - found[1]["accuracy"], found[3]["change"]

    assert last_change(0.5) == (0, 0)
    assert abs(last_change(-1.05)[1]) > 0


def test_batches_do_not_change_what_a_thinking_model_answers(loaded: Loaded) -> None:
    task = GroupProduct("s3", 12)
    whole, parts = (evaluate_depth(loaded, task, (1, 8), rows=40, batch_size=n) for n in (40, 7))
    assert whole == parts and 0 < whole[0]["accuracy"] < 0.5


def test_steps_reach_as_far_as_the_checkpoint(loaded: Loaded, tiny: Tiny, tiny_config: TinyConfig) -> None:
    """Iterations of one state may go on past what the checkpoint offers its users; noise levels may not."""
    assert choose_steps(None, loaded) == (1, 2, 4, 8, 16, 32, 64, 128)
    assert loaded.config.recurrence.max_steps == 64 and choose_steps([200, 1], loaded) == (1, 200)
    sampler = Loaded(tiny("huginn", "evidence", vocab_size=6), tiny_config("huginn", "evidence", vocab_size=6), None)
    assert choose_steps(None, sampler) == (1, 2, 4, 8, 16, 32, 64)
    with pytest.raises(UserError, match="takes 1 to 64"):
        choose_steps([128], sampler)
    once = Loaded(tiny("llama", "next_token", vocab_size=6), tiny_config("llama", "next_token", vocab_size=6), None)
    assert choose_steps(None, once) == (1,)


def _run(*arguments: object) -> int:
    return run(app, ["eval", "depth", *map(str, arguments)], "rdlm")


@pytest.fixture
def folder(loaded: Loaded, tmp_path: Path) -> Path:
    return save(tmp_path / "model", loaded.denoiser, loaded.config, None)


def test_command_writes_results_with_their_provenance_and_a_figure(folder: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "r" / "depth.json", "--plot", tmp_path / "r" / "depth.png"]
    assert _run("--checkpoint", folder, "--lengths", "4,6", "--steps", "4,1", "--rows", 30, *out) == 0
    report = json.loads((tmp_path / "r" / "depth.json").read_text())
    assert [(r["length"], r["K"]) for r in report["results"]] == [(4, 1), (4, 4), (6, 1), (6, 4)]
    assert report["chance"] == 1 / 6 and report["data"]["split"] == "test" and report["checkpoint"]["weights_sha256"]
    assert {"command", "git_commit", "cpu", "torch"} <= report["provenance"].keys()
    assert (tmp_path / "r" / "depth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("task", "counted", "whole"), [("pointer5", 3, "last"), ("latin5", 25, "valid")])
def test_command_measures_every_task(folder: Path, tmp_path: Path, task: str, counted: int, whole: str) -> None:
    out = tmp_path / "depth.json"
    assert _run("--checkpoint", folder, "--task", task, "--lengths", 3, "--steps", "1,4", "--rows", 40, "--out", out) == 0
    report = json.loads(out.read_text())
    assert report["data"]["whole"] == whole and report["chance"] == 1 / 5
    assert all(len(r["by_position"]) == counted and 0 <= r[whole] <= 1 for r in report["results"])
    assert [r["K"] for r in report["convergence"]["3"]["results"]] == [2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "16,65"], "--lengths=65: needs 65 positions, the model was built for 64 positions"),
        (["--lengths", "long"], "--lengths='long'"),
        (["--lengths", "0"], "data.length=0"),
        (["--task", "s5"], "--task='s5': has a vocabulary of 6, the task has 120 symbols"),
        (["--task", "s4"], "--task='s4': there is no such task"),
        (["--task", "latin3", "--lengths", "10"], "data.blanks=[10, 10]"),
        (["--steps", "1025"], "--steps=1025: is out of range; this checkpoint takes 1 to 1024"),
        (["--checkpoint", "nowhere"], "has no config.json"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert _run("--checkpoint", folder, "--rows", 8, *arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
