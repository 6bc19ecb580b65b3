"""rdlm eval depth: counts and intervals against answers that are known, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.metrics.depth import choose_steps, evaluate_depth
from rdlm.checkpoints.folder import Loaded, save
from rdlm.cli import app, run
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.batch import Batch
from rdlm.data.synthetic import FilledIn, Generated, GroupProduct, LatinSquare, PointerChasing
from rdlm.errors import UserError
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys, Prediction
from rdlm.objectives.masked import MaskedDiffusion
from rdlm.registry import build
from rdlm.sampling_params import Order

Tiny = Callable[..., Objective]
TinyConfig = Callable[..., CheckpointConfig]


@pytest.fixture
def loaded(tiny: Tiny, tiny_config: TinyConfig) -> Loaded:
    return Loaded(
        tiny("huginn", "onestep", vocab_size=6).eval(), tiny_config("huginn", "onestep", vocab_size=6), None
    )


def _knows_k_factors(task: GroupProduct) -> Callable[..., dict[int, torch.Tensor]]:
    """Answers right at the first K positions and never after them."""

    def answers(
        self: Objective, input_ids: torch.Tensor, ks: Sequence[int], draws: object = None
    ) -> dict[int, torch.Tensor]:
        right = input_ids.clone().numpy()
        for i in range(1, task.length):
            right[:, i] = task.table[right[:, i - 1], right[:, i]]
        far = torch.arange(task.length)
        return {
            k: torch.where(far < k, torch.from_numpy(right), (torch.from_numpy(right) + 1) % 6) for k in ks
        }

    return answers


def test_accuracy_counts_positions_and_the_last_one(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    task = GroupProduct("s3", 8)
    monkeypatch.setattr(type(loaded.denoiser), "answer", _knows_k_factors(task))
    results = evaluate_depth(loaded, task, (1, 4, 8), rows=50, batch_size=16)
    assert [(r["K"], r["length"], r["accuracy"], r["last"]) for r in results] == [
        (1, 8, 1 / 8, 0),
        (4, 8, 1 / 2, 0),
        (8, 8, 1, 1),
    ]
    assert [r["delta"] for r in results] == [0, 3 / 8, 7 / 8] and [r["change"] for r in results] == [
        0,
        3 / 8,
        1 / 2,
    ]
    assert all(
        r["accuracy_interval"] == pytest.approx([r["accuracy"]] * 2) for r in results
    )  # every example is the same


def test_interval_is_that_of_a_mean_over_examples(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the examples wholly right: the examples are the units, not their positions."""
    task, rows = GroupProduct("s3", 8), 400

    def half(
        self: Objective, input_ids: torch.Tensor, ks: Sequence[int], draws: object = None
    ) -> dict[int, torch.Tensor]:
        right = _knows_k_factors(task)(self, input_ids, [8])[8]
        kept = (torch.arange(len(right)) % 2 == 0)[:, None]
        return {k: torch.where(kept, right, (right + 1) % 6) for k in ks}

    monkeypatch.setattr(type(loaded.denoiser), "answer", half)
    low, high = evaluate_depth(loaded, task, (1,), rows=rows, batch_size=100)[0]["accuracy_interval"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(rows), rel=0.1)


def test_a_state_that_settles_stays_at_128_steps_and_one_that_runs_away_is_seen(
    loaded: Loaded, tiny_config: TinyConfig
) -> None:
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
    sampler = Loaded(
        tiny("huginn", "evidence", vocab_size=6), tiny_config("huginn", "evidence", vocab_size=6), None
    )
    assert choose_steps(None, sampler) == (1, 2, 4, 8, 16, 32, 64)
    with pytest.raises(UserError, match="takes 1 to 64"):
        choose_steps([128], sampler)
    once = Loaded(
        tiny("llama", "next_token", vocab_size=6), tiny_config("llama", "next_token", vocab_size=6), None
    )
    assert choose_steps(None, once) == (1,)


def _run(*arguments: object) -> int:
    return run(app, ["eval", "depth", *map(str, arguments)], "rdlm")


@pytest.fixture
def folder(loaded: Loaded, tmp_path: Path) -> Path:
    return save(tmp_path / "model", loaded.denoiser, loaded.config, None)


def test_command_writes_results_with_their_provenance_and_a_figure(folder: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "r" / "depth.json", "--plot", tmp_path / "r" / "depth.png"]
    assert (
        _run("--checkpoint", folder, "--lengths", "4,6", "--num-steps", "4,1", "--num-examples", 30, *out)
        == 0
    )
    report = json.loads((tmp_path / "r" / "depth.json").read_text())
    assert [(r["length"], r["K"]) for r in report["results"]] == [(4, 1), (4, 4), (6, 1), (6, 4)]
    assert (
        report["chance"] == 1 / 6
        and report["data"]["split"] == "test"
        and report["checkpoint"]["weights_sha256"]
    )
    assert {"command", "git_commit", "cpu", "torch"} <= report["provenance"].keys()
    assert (tmp_path / "r" / "depth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("task", "counted", "whole"), [("pointer5", 3, "last"), ("latin5", 25, "valid")])
def test_command_measures_every_task(
    folder: Path, tmp_path: Path, task: str, counted: int, whole: str
) -> None:
    out = tmp_path / "depth.json"
    assert (
        _run(
            "--checkpoint",
            folder,
            "--task",
            task,
            "--lengths",
            3,
            "--num-steps",
            "1,4",
            "--num-examples",
            40,
            "--out",
            out,
        )
        == 0
    )
    report = json.loads(out.read_text())
    assert report["data"]["whole"] == whole and report["chance"] == 1 / 5
    assert all(len(r["by_position"]) == counted and 0 <= r[whole] <= 1 for r in report["results"])
    assert [r["K"] for r in report["convergence"]["3"]["results"]] == [2, 3, 4]


# Masked diffusion -------------------------------------------------------------------------------------------


@pytest.fixture
def masked(masked_config: TinyConfig, awake: Callable[[Objective], Objective]) -> Loaded:
    """Untrained, in two blocks; offers K up to 64."""
    config = masked_config(model={"vocab_size": 6}, num_blocks=2)
    return Loaded(awake(build(config, seed=0)).eval(), config, None)


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("task", [GroupProduct("s3", 6), PointerChasing(5, 4), LatinSquare(5, 8, 8)])
def test_hidden_answers_tell_nothing_and_inputs_do(
    masked: Loaded, monkeypatch: pytest.MonkeyPatch, task: Generated, order: Order
) -> None:
    """All that the network says while evaluate_depth asks it, with the truth, then the inputs changed behind
    its back."""
    said: list[torch.Tensor] = []
    real_rows, real_predict = task.rows, MaskedDiffusion.predict

    def predict(self: MaskedDiffusion, hidden: torch.Tensor) -> Prediction:
        said.append(real_predict(self, hidden).logits())
        return real_predict(self, hidden)

    def says(inputs_by: int, answers_by: int) -> list[torch.Tensor]:
        def rows(*arguments: Any) -> Batch:
            batch = real_rows(*arguments)
            return Batch(
                (batch.inputs + inputs_by) % 6,
                torch.where(batch.mask, (batch.targets + answers_by) % 5, 0),
                batch.mask,
            )

        monkeypatch.setattr(task, "rows", rows)
        said.clear()
        evaluate_depth(masked, FilledIn(task), (3,), rows=40, order=order)
        return list(said)

    monkeypatch.setattr(MaskedDiffusion, "predict", predict)
    before = says(0, 0)
    assert len(before) == 3 and all(map(torch.equal, before, says(0, 1)))
    monkeypatch.undo()
    monkeypatch.setattr(MaskedDiffusion, "predict", predict)
    assert not torch.equal(before[0], says(1, 0)[0])


def test_a_masked_model_learns_a_task_and_its_squares_get_whole_with_more_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = FilledIn(LatinSquare(3, 4, 6))
    shape = {
        "family": "masked",
        "vocab_size": 4,
        "d_model": 48,
        "num_heads": 2,
        "mlp_width": 96,
        "num_layers": 3,
        "max_seq_len": 9,
    }
    document = {
        "name": "toy",
        "model": {**shape, "noise_conditioning": True},
        "objective": {"name": "masked"},
    }
    config = CheckpointConfig.model_validate(document)
    denoiser = build(config, seed=0)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(150):
        terms = denoiser.loss(
            task.rows(np.arange(step * 32, step * 32 + 32), seed=0), Keys(seed=0, step=step)
        )
        (terms.total / terms.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = FilledIn(LatinSquare(3, 5, 5))
    found = evaluate_depth(
        Loaded(denoiser.eval(), config, None), held_out, (1, 2, 8), rows=300, order="random"
    )
    print([(r["K"], round(r["accuracy"], 3), round(r["valid"], 3)) for r in found])
    assert found[0]["accuracy_interval"][0] > 1 / 3 + 0.1 and found[-1]["valid_interval"][0] > 0.1, (
        "a guess is valid in 3^-5"
    )


def test_command_measures_masked_checkpoints_in_both_orders(
    masked: Loaded, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "masked", masked.denoiser, masked.config, None)
    for i, order in enumerate([[], ["--order", "confidence"]]):
        out = ["--out", tmp_path / f"{i}.json", "--plot", tmp_path / "p.png"]
        assert (
            _run(
                "--checkpoint",
                folder,
                "--task",
                "latin5",
                "--lengths",
                "9,5",
                "--num-examples",
                30,
                *order,
                *out,
            )
            == 0
        )
        name = ["random", "confidence"][i]
        assert f"in {name} order" in " ".join(capfd.readouterr().out.split())
        report = json.loads((tmp_path / f"{i}.json").read_text())
        assert (
            report["order"] == name
            and report["checkpoint"]["k_meaning"] == "sampling"
            and not report["convergence"]
        )
        assert [r["K"] for r in report["results"][:7]] == [1, 2, 4, 8, 16, 32, 64]
        assert len(report["results"][0]["by_position"]) == 25
    reports = [json.loads((tmp_path / f"{i}.json").read_text())["results"] for i in range(2)]
    assert reports[0][0] == reports[1][0] and reports[0] != reports[1], "one step has no order"
    files = [str(tmp_path / f"{i}.json") for i in range(2)]
    assert run(app, ["eval", "report", *files, "--out", str(tmp_path / "r")], "rdlm") == 0
    assert "confidence order" in (tmp_path / "r" / "report.md").read_text()
    for arguments, message in (
        (["--num-steps", "65"], "--num-steps=65: is out of range; this checkpoint takes 1 to 64"),
        (["--lengths", "33"], "--lengths=33: needs 66 positions, the model was built for 64 positions"),
        (["--task", "s5"], "has a vocabulary of 6"),
    ):
        assert _run("--checkpoint", folder, "--num-examples", 8, *arguments) == 2
        assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "16,65"], "--lengths=65: needs 65 positions, the model was built for 64 positions"),
        (["--lengths", "long"], "--lengths='long'"),
        (["--lengths", "0"], "data.length=0"),
        (["--task", "s5"], "--task='s5': has a vocabulary of 6, the task has 120 symbols"),
        (["--task", "s4"], "--task='s4': there is no such task"),
        (["--task", "latin3", "--lengths", "10"], "data.blanks=[10, 10]"),
        (["--num-steps", "1025"], "--num-steps=1025: is out of range; this checkpoint takes 1 to 1024"),
        (["--checkpoint", "nowhere"], "has no config.json"),
        (["--order", "random"], "--order='random': this model gives all answers at once"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert _run("--checkpoint", folder, "--num-examples", 8, *arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
