"""CE by sigma against closed forms, edges of equal information, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eval.metrics.ce_by_sigma import equal_information_edges, evaluate_noise_curve
from eval.options import MOST_STEPS
from rdlm.checkpoints.folder import Loaded, save
from rdlm.cli import app, run
from rdlm.data.batch import Batch
from rdlm.data.token_shards import TokenStore
from rdlm.errors import UserError
from rdlm.objectives import Objective
from train.data.prepare import Preparation, prepare

VOCAB = 300


def _batch(rows: int = 4, length: int = 16) -> Batch:
    ids = torch.randint(0, 64, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(rows, length, dtype=torch.bool))


@pytest.fixture
def uniform(tiny: Callable[..., Objective], tiny_config: Callable) -> Loaded:
    """An evidence denoiser that says nothing about the next token: with the exact evidence scale it is the
    exact denoiser."""
    denoiser = tiny("huginn", "evidence", tie_embeddings=False).eval()
    with torch.no_grad():
        denoiser.model.head.weight.zero_()
    return Loaded(denoiser, tiny_config("huginn", "evidence", tie_embeddings=False), None)


def test_an_exact_denoiser_has_no_gap_and_a_scaled_one_has(uniform: Loaded) -> None:
    sigmas = [0.2, 0.5, 1.0, 3.0, 80.0]
    exact = evaluate_noise_curve(uniform, [_batch()], sigmas)
    assert exact["prior_ce"] == pytest.approx(math.log(64), abs=1e-5)
    for row in exact["results"]:
        assert row["ce"] == pytest.approx(row["reference"], abs=1e-4) and row["gap"] == pytest.approx(
            0, abs=1e-4
        )
    assert exact["results"][0]["ce"] < 0.5 < exact["results"][2]["ce"]
    assert exact["results"][-1]["ce"] == pytest.approx(math.log(64), abs=0.02)
    with torch.no_grad():
        uniform.denoiser.evidence_scale.fill_(0.3)  # type: ignore[union-attr]
    timid = evaluate_noise_curve(uniform, [_batch()], sigmas)
    assert timid["results"][1]["gap_interval"][0] > 0.1
    assert [r["reference"] for r in timid["results"]] == [r["reference"] for r in exact["results"]]


def test_the_reference_is_bayes_with_the_prior_at_zero(
    tiny: Callable[..., Objective], tiny_config: Callable
) -> None:
    """One position, one level: p(x | z) by hand from the model's own prior and the Gaussian density of z."""
    denoiser = tiny("huginn", "onestep").eval()
    loaded, batch, sigma = Loaded(denoiser, tiny_config("huginn", "onestep"), None), _batch(1, 1), 0.7
    found = evaluate_noise_curve(loaded, [batch], [sigma], num_steps=3)["results"][0]
    from rdlm.random_streams import generator

    table = F.normalize(denoiser.model.wte.weight.detach(), dim=-1)
    z = (
        table[batch.targets[0, 0]]
        + sigma * torch.randn((1, 1, table.shape[1]), generator=generator(0, 0, 0))[0, 0]
    )
    every = torch.arange(64)[:, None]
    prior = denoiser.token_logprobs(batch.inputs.expand(64, 1), every, [3])[3][:, 0]
    density = -(z - table).square().sum(1) / (2 * sigma**2)
    posterior = (prior + density).log_softmax(0)
    assert found["reference"] == pytest.approx(-float(posterior[batch.targets[0, 0]]), abs=1e-4)
    assert found["ce"] is None and found["gap"] is None


def test_masked_positions_do_not_count(uniform: Loaded) -> None:
    batch = _batch()
    batch.mask[:, 4:] = False
    short = evaluate_noise_curve(uniform, [batch], [80.0])
    assert short["tokens"] == 16 and short["prior_ce"] == pytest.approx(math.log(64), abs=1e-5)


def test_edges_cut_a_curve_into_equal_drops() -> None:
    curve = [(math.exp(x), 2.0 * x) for x in (0.0, 1.0, 3.0)]  # straight in log sigma
    assert np.log(equal_information_edges(curve, 3)) == pytest.approx([3, 2, 1, 0])
    flat_ends = [(0.1, 0.0), (0.2, 0.0), (2.0, 6.0), (80.0, 6.0)]
    edges = equal_information_edges(flat_ends, 2)
    assert edges[0] == pytest.approx(80) and edges[2] == pytest.approx(0.1)
    assert edges[1] == pytest.approx(math.sqrt(0.2 * 2.0))
    dented = [*flat_ends[:2], (0.5, 3.0), (0.6, 2.9), *flat_ends[2:]]
    assert 0.2 < equal_information_edges(dented, 4)[3] < equal_information_edges(dented, 4)[1] < 2.0
    assert equal_information_edges(curve, 1) == pytest.approx([math.exp(3), 1])


@pytest.mark.parametrize("curve", [[(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)], [(1.0, 2.0), (2.0, 1.0)]])
def test_a_curve_without_a_drop_is_refused(curve: list[tuple[float, float]]) -> None:
    with pytest.raises(UserError, match="curve"):
        equal_information_edges(curve, 2)


@pytest.fixture
def command(tmp_path: Path, tiny: Callable[..., Objective], tiny_config: Callable) -> Callable[..., int]:
    rows = [{"text": f"Verse {i}: and {i * i} foxes ran." * (1 + i % 4)} for i in range(200)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        Preparation(str(tmp_path / "d.jsonl"), tmp_path / "data", vocab_size=VOCAB, valid_fraction=0.4),
        progress=False,
    )
    tokenizer = TokenStore(tmp_path / "data", "valid").tokenizer()
    for objective in ("evidence", "single_pass"):
        config = tiny_config("huginn", objective, vocab_size=VOCAB)
        save(tmp_path / objective, tiny("huginn", objective, vocab_size=VOCAB), config, tokenizer)

    def call(name: str, objective: str, *options: object) -> int:
        fixed = ["--checkpoint", tmp_path / objective, "--data", tmp_path / "data", "--max-tokens", 640]
        return run(app, ["eval", name, *map(str, [*fixed, *options])], "rdlm")

    return call


def test_command_labels_the_curve_and_prints_edges(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "r.json", tmp_path / "r.png"
    options = ["--sigmas", "2,0.3,80", "--blocks", 2, "--out", out, "--plot", plot]
    assert command("ce-by-sigma", "evidence", *options) == 0
    report = json.loads(out.read_text())
    shown = " ".join(capsys.readouterr().out.split())
    assert "NOT a likelihood" in shown and report["evaluation"] == "ce-by-sigma"
    assert [r["sigma"] for r in report["results"]] == [0.3, 2, 80] and plot.read_bytes().startswith(
        b"\x89PNG"
    )
    edges = report["equal_information_edges"]
    assert (
        set(edges) == {"ce", "reference"}
        and edges["ce"][0] == pytest.approx(80)
        and 0.3 < edges["ce"][1] < 80
    )


def test_a_curve_that_falls_has_no_edges_and_is_written_all_the_same(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def falling(*args: Any, **kwargs: Any) -> dict[str, Any]:
        measured = evaluate_noise_curve(*args, **kwargs)
        for row in measured["results"]:
            row["ce"] = 9.0 - row["sigma"] / 100
        return measured

    monkeypatch.setattr("eval.metrics.ce_by_sigma.evaluate_noise_curve", falling)
    out = tmp_path / "r.json"
    assert command("ce-by-sigma", "evidence", "--sigmas", "2,0.3,80", "--out", out) == 0
    assert set(json.loads(out.read_text())["equal_information_edges"]) == {"reference"}


def test_convergence_command_follows_the_state(command: Callable[..., int], tmp_path: Path) -> None:
    out, plot = tmp_path / "c.json", tmp_path / "c.png"
    assert command("convergence", "single_pass", "--num-steps", 6, "--out", out, "--plot", plot) == 0
    report = json.loads(out.read_text())
    assert [r["K"] for r in report["results"]] == [2, 3, 4, 5, 6] and report["tokens"] == 640
    assert len(report["picture"]["distance"]) == 5 and plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "objective", "options", "message"),
    [
        ("ce-by-sigma", "evidence", ["--sigmas", "0,1"], "not positive"),
        ("ce-by-sigma", "evidence", ["--num-steps", "2"], "--num-steps=2"),
        ("ce-by-sigma", "evidence", ["--sigmas", "1"], "at least two"),
        ("convergence", "evidence", [], "not an iteration"),
        ("convergence", "single_pass", ["--num-steps", str(MOST_STEPS + 1)], "out of range"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    command: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    name: str,
    objective: str,
    options: list[str],
    message: str,
) -> None:
    assert command(name, objective, *options) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and message in lines[0]
