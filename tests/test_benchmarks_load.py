"""The load generators: what they count, what they complain about, and one short run of each against a server."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path

import pytest
import torch

from benchmarks import engine, serve, soak
from benchmarks.client import Sample, closed_loop, open_loop, parse_steps
from rdlm.checkpoints.folder import save
from rdlm.cli import run
from rdlm.errors import UserError
from serve.engine.engine import Engine
from serve.loading import build_served
from serve.settings import EngineSettings


def sample(
    due: float, *tokens: float, status: int = 200, k: int = 4, done: bool = True, kind: str = "stream"
) -> Sample:
    return Sample(kind, k, due, status, list(tokens), asked=len(tokens), done=done)


def test_figures_count_what_arrived_in_time_and_within_the_bounds() -> None:
    samples = [
        sample(0.0, 1.0, 1.1, 1.2),
        sample(1.0, 0.5, 2.5, k=8),  # 2 s between its tokens: complete, not good
        sample(8.0, 1.0, 3.0),  # its second token arrives after the 10 s
        sample(2.0, status=429, done=False),
        sample(3.0, 1.0, done=False),
    ]
    found = serve.figures(samples, 10.0, 0.0, ttft_bound=1.0, itl_bound=1.0)
    assert found["by_status"] == {"200": 4, "429": 1} and found["sent"] == 5 and found["complete"] == 3
    assert len(found["broken"]) == 1
    assert found["tokens_per_s"] == pytest.approx(7 / 10)
    assert (found["requests_per_s"], found["goodput_per_s"]) == pytest.approx((0.2, 0.1))
    assert found["share_within_bounds"] == pytest.approx(1 / 5)
    assert found["itl_s_by_steps"]["8"]["p50"] == pytest.approx(2.0) and found["ttft_s"]["max"] == 1.0


def test_open_loop_waits_for_nobody_and_closed_loop_for_each() -> None:
    async def slow(due: float) -> Sample:
        await asyncio.sleep(0.3)
        return sample(due, time.monotonic() - due)

    began = time.monotonic()
    samples = asyncio.run(open_loop(0.6, 60.0, random.Random(0), slow))
    assert len(samples) > 20 and time.monotonic() - began < 5
    gaps = [b.due - a.due for a, b in zip(samples, samples[1:], strict=False)]
    rng = random.Random(0)
    drawn = [rng.expovariate(60.0) for _ in range(len(samples))]
    assert gaps == pytest.approx(drawn[1:]), "arrivals are those drawn, however long the answers take"
    lanes = asyncio.run(closed_loop(0.5, 3, slow))
    assert len(lanes) == 6


def test_steps_of_a_mix() -> None:
    assert parse_steps("4,8:2") == {4: 1.0, 8: 2.0}
    for bad in ("", "0", "4:0", "many"):
        with pytest.raises(UserError, match="steps"):
            parse_steps(bad)


@pytest.mark.parametrize(
    ("seen", "wrong"),
    [
        (sample(0, 0.1, 0.2), False),
        (sample(0, status=429, done=False), False),
        (sample(0, 0.1, done=False), True),
        (sample(0, status=500, done=False), True),
        (sample(0, status=0, done=False), True),
        (sample(0, status=0, done=False, kind="leave-plain"), False),
        (sample(0, 0.1, done=False, kind="leave-stream"), False),
        (sample(0, status=503, done=False, kind="leave-stream"), True),
        (Sample("stream", 4, 0.0, 200, [0.1], asked=2, done=True), True),
        (Sample("malformed", 0, 0.0, 400), False),
        (Sample("malformed", 0, 0.0, 500, problem="400 was promised"), True),
    ],
)
def test_what_a_soak_complains_about(seen: Sample, wrong: bool) -> None:
    assert (soak.complaint(seen) is not None) == wrong


def test_memory_that_grows_is_seen() -> None:
    flat = soak.memory([(float(t), 500.0 + t % 3) for t in range(100)], 1000)
    leak = soak.memory([(float(t), 500.0 + t) for t in range(100)], 1000)
    assert abs(flat["growth_mib"]) < 2 and leak["growth_mib"] == pytest.approx(50.0)
    assert leak["growth_kib_per_request"] == pytest.approx(50 * 1024 / 500)


def test_the_naive_loop_says_what_the_engine_says() -> None:
    denoiser, config, tokenizer = engine.build_model(64, 300, 64)
    prompts = torch.randint(5, 300, (15, 6), generator=torch.Generator().manual_seed(0))
    with Engine(lambda: build_served(denoiser, config, tokenizer, EngineSettings(max_slots=15))) as running:
        found = engine.against_naive(denoiser, running, prompts, 3, 4, 1)
        mix = engine.against_mean_k(running, prompts, 1, 1)
    assert found["share_of_equal_tokens"] > 0.9, "only ties may fall differently"
    assert found["rows_per_step"] > 15 and set(found["tokens_per_s"]) == {"naive", "limit", "engine"}
    assert mix["mean_k"] == 15 and mix["mix"]["rows_per_step"] > 14, "all lanes are to end together"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "model"
    save(folder, *engine.build_model(64, 300, 256))
    return folder


@pytest.mark.multiproc
def test_serve_measures_a_server(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    options = [
        "--clients",
        "2",
        "--rate",
        "2",
        "--load",
        "",
        "--seconds",
        "2",
        "--steps",
        "1,2",
        "--num-tokens",
        "4",
    ]
    assert run(serve.app, ["--checkpoint", str(checkpoint), "--out", str(out), *options], "serve") == 0
    report = json.loads(out.read_text())
    closed, poisson = report["points"]
    assert (closed["mode"], poisson["mode"]) == ("closed", "open") and set(closed["by_status"]) == {"200"}
    assert (
        closed["complete"] == closed["sent"] > 0
        and not closed["broken"]
        and closed["engine"]["core_steps_per_s"] > 0
    )
    assert (
        closed["engine"]["rows_per_step"] >= 1
        and 1 <= closed["engine"]["mean_k"] <= 2
        and report["provenance"]["command"]
    )


def test_options_that_contradict_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "x.json")]
    assert run(serve.app, [*out, "--url", "http://127.0.0.1:1", "--checkpoint", "x"], "serve") == 2
    assert run(serve.app, [*out, "--clients", ""], "serve") == 2
    assert "already running" in (said := capsys.readouterr().err) and "relative to closed loops" in said


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_short_soak(checkpoint: Path, tmp_path: Path) -> None:
    """Everything but latency, which a busy machine decides."""
    out = tmp_path / "soak.json"
    options = [
        "--minutes",
        "0.3",
        "--calibrate",
        "3",
        "--max-slots",
        "4",
        "--max-queue",
        "4",
        "--ttft-factor",
        "100",
    ]
    status = run(
        soak.app, ["--checkpoint", str(checkpoint), "--out", str(out), "--steps", "1,2", *options], "soak"
    )
    report = json.loads(out.read_text())
    assert status == 0, report["first_complaints"]
    statuses = report["status_by_kind"]
    assert "429" in statuses["stream"]
    assert set(statuses["oversized"]) <= {"0", "413", "429"}  # a full server reads no body
    assert (
        sum(n for statuses in report["status_by_kind"].values() for n in statuses.values()) == report["sent"]
    )
