"""Masked diffusion as a user meets it: trained, resumed, cut into blocks, sampled, measured, and refused
where it has no answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rdlm.checkpoints.folder import load
from rdlm.cli import app, run
from rdlm.data.batch import Batch
from rdlm.diffusion.masked_likelihood import bound
from rdlm.errors import UserError
from rdlm.registry import build
from train.config_file import load as load_config
from train.data.prepare import Preparation, prepare
from train.export import export_run, merge
from train.memory_plan import block_counts, predict
from train.memory_trace import trace
from train.settings import TrainConfig

MASKED: dict[str, Any] = {
    "model": {
        "family": "masked", "vocab_size": 257, "d_model": 32, "num_heads": 2, "mlp_width": 48,
        "max_seq_len": 32, "num_layers": 3,
        "noise_embed_dim": 16,
    },
    "objective": {"name": "masked"},
    "recurrence": {"default_steps": 4, "max_steps": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes of a few verses: one token a character."""
    root = tmp_path_factory.mktemp("masked")
    rows = [{"text": f"Verse {i}: and {i * i} foxes." * (1 + i % 4)} for i in range(120)]
    (root / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        Preparation(str(root / "d.jsonl"), root / "out", vocab_size=257, valid_fraction=0.2), progress=False
    )
    return root / "out"


@pytest.fixture
def masked(trainer: Callable[..., Any], corpus: Path) -> Callable[..., Any]:
    """``masked({"blocks": ..})`` -> a Trainer of the tiny masked model on the corpus."""
    data = {"kind": "tokens", "path": str(corpus), "seq_len": 16}
    return lambda changes=None: trainer({**MASKED, "data": data, **(changes or {})})


def test_a_run_resumes_to_the_bit_and_learns(masked, tmp_path: Path) -> None:
    changes = {"schedule.steps": 30, "activation_checkpointing": True, "batch.micro_size": 2,
    "checkpoint.interval_steps": 100,
               "evaluation": {"interval_steps": 15, "steps": [1, 8], "max_tokens": 64}}  # fmt: skip
    whole = masked({**changes, "output": str(tmp_path / "whole")})
    assert whole.fit()
    calls = iter(range(99))
    first = masked(changes)
    assert not first.fit(lambda: next(calls) >= 17)
    second = masked(changes)
    assert second.step == 17 and second.fit()
    for name, weight in second.weights().items():
        assert torch.equal(weight, whole.weights()[name]), name
    held_out = [json.loads(line) for line in (tmp_path / "whole" / "held_out.jsonl").read_text().splitlines()]
    assert [record.keys() for record in held_out] == [{"step", "K=1", "K=8"}] * 2
    assert held_out[1]["K=1"] < held_out[0]["K=1"] < 5.55, "below ln 257 and falling"


@pytest.mark.parametrize("stage", [0, 3])
def test_joint_blocks_stay_idle_until_drawn_and_export(
    masked, only_drawn_blocks_move, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.engines.PERSISTENT_ELEMENTS", 64)
    job = masked({"blocks": {"num_blocks": 3}, "deepspeed.zero_stage": stage, "optimizer.weight_decay": 0.3,
                  "evaluation": {"interval_steps": 6, "steps": [1, 5], "max_tokens": 64}})  # fmt: skip
    only_drawn_blocks_move(job, 3, 6)
    job.step = 5
    assert job.fit()
    export_run(job.output)
    loaded = load(Path(job.config.output) / "model")
    assert torch.isfinite(bound(loaded.denoiser, torch.randint(0, 257, (2, 16)), 5)).all()


def test_blocks_trained_alone_merge_and_resident_ones_are_the_joint_run(masked, tmp_path: Path) -> None:
    folders = []
    for b in range(2):
        alone = masked({"blocks": {"num_blocks": 2}, "block": b, "schedule.steps": 2, "output": str(tmp_path / f"b{b}"),
                        "evaluation": {"interval_steps": 2, "steps": [1], "max_tokens": 64}})  # fmt: skip
        assert alone.fit()
        export_run(alone.output)
        folders.append(tmp_path / f"b{b}")
    held_out = json.loads((folders[1] / "held_out.jsonl").read_text())
    assert held_out.keys() == {"step", "denoising"} and 3 < held_out["denoising"] < 7
    merged = load(merge(folders, tmp_path / "merged"))
    assert torch.isfinite(bound(merged.denoiser, torch.randint(0, 257, (2, 16)), 4)).all()
    assert "t in (" in (tmp_path / "merged" / "README.md").read_text()
    pair = []
    for name, section in (("joint", None), ("resident", {"visit_steps": 1})):
        job = masked(
            {
                "blocks": {"num_blocks": 2},
                "resident": section,
                "schedule.steps": 4,
                "output": str(tmp_path / name),
            }
        )
        assert job.fit()
        pair.append(job.weights())
    assert all(torch.equal(weight, pair[1][name]) for name, weight in pair[0].items())


TASKS: list[tuple[dict[str, Any], int, str]] = [
    ({"kind": "group_product", "group": "s3", "length": 12}, 24, "s3"),
    ({"kind": "pointer_chasing", "nodes": 6, "hops": 5}, 16, "pointer6"),
    ({"kind": "latin_square", "side": 5, "fewest_blanks": 3, "most_blanks": 12}, 25, "latin5"),
]


@pytest.mark.parametrize(("data", "length", "task"), TASKS)
def test_tasks_are_trained_on_as_rows_that_hold_their_inputs_and_measured(
    trainer, document, tmp_path: Path, data: dict[str, Any], length: int, task: str
) -> None:
    changes = {**MASKED, "data": data, "blocks": {"num_blocks": 2},
    "model": {**MASKED["model"], "vocab_size": 8}, "schedule.steps": 4,
               "evaluation": {"interval_steps": 4, "steps": [1, 8], "max_tokens": 200}}  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(document(changes)))
    assert load_config(tmp_path / "c.yaml").seq_len == length
    job = trainer(changes)
    assert job.corpus.seq_len == length and job.corpus.identity.endswith(":filled_in")
    before = job.weights()
    assert job.fit() and any(not torch.equal(weight, before[name]) for name, weight in job.weights().items())
    held_out = json.loads((Path(job.config.output) / "held_out.jsonl").read_text())
    assert 1.0 < held_out["K=1"] < 4 and 1.0 < held_out["K=8"] < 4, "nats of an answer, not of a position"
    export_run(job.output)
    model = str(Path(job.config.output) / "model")
    measured = [
        "--task",
        task,
        "--lengths",
        "5",
        "--num-steps",
        "1,4",
        "--num-examples",
        "20",
        "--out",
        str(tmp_path / "depth.json"),
    ]
    assert run(app, ["eval", "depth", "--checkpoint", model, *measured], "rdlm") == 0
    assert [r["K"] for r in json.loads((tmp_path / "depth.json").read_text())["results"]] == [1, 4]


def test_a_row_of_a_task_must_fit_with_its_answers(document, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(document({**MASKED, "data.length": 17})))
    with pytest.raises(UserError, match="data.seq_len=34: longer than model.max_seq_len"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("vocab_size", [64, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_planned_from_what_the_objective_allocates(
    document, allocated, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vocab_size: int
) -> None:
    """The plan takes every token as hidden, the most there can be; then the same count on real tensors."""
    shape = {**MASKED["model"], "vocab_size": vocab_size, "d_model": 64, "mlp_width": 96}
    settings = TrainConfig.model_validate(document({**MASKED, "model": shape})).checkpoint_config
    traced = trace(build(settings, device="meta"), 4, 32, dtype, 1)
    denoiser = build(settings, seed=0).to(dtype)
    monkeypatch.setattr("rdlm.objectives.masked.mask_tokens", lambda level, countable, rng: countable)
    ids = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0))
    forward, peak = allocated(denoiser, Batch(ids[:, :-1], ids[:, 1:], torch.ones(4, 32, dtype=torch.bool)))
    assert traced.forward == pytest.approx(forward, rel=0.05)
    assert traced.peak == pytest.approx(peak, rel=0.05)


def test_blocks_and_batches_are_planned(document) -> None:
    """More blocks, less memory; more sequences, more activations."""

    def planned(**changes: Any) -> Any:
        return predict(TrainConfig.model_validate(document({**MASKED, **changes})), 1)

    whole, block = planned(), planned(blocks={"num_blocks": 3}, block=0)
    assert block.parameters < whole.parameters and block.activations < whole.activations
    assert planned(batch={"global_size": 8}).activations > 1.5 * whole.activations
    counts = block_counts(TrainConfig.model_validate(document(MASKED)))
    assert counts == [1, 3]


@pytest.mark.multiproc
def test_from_a_config_to_text_and_figures_on_the_command_line(
    document, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through the launcher, then every command that can use the model, and every one that cannot."""
    data = {"kind": "tokens", "path": str(corpus), "seq_len": 32}
    changes = {**MASKED, "blocks": {"num_blocks": 2}, "data": data, "schedule.steps": 4}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(document(changes)))

    def rdlm(*arguments: object) -> tuple[int, str, str]:
        status = run(app, [str(a) for a in arguments], "rdlm")
        out, err = capfd.readouterr()
        return status, out, err

    assert rdlm("train", tmp_path / "c.yaml", "--num-procs", 1)[0] == 0
    model = tmp_path / "run" / "model"
    given = ("--checkpoint", model)

    status, out, err = rdlm(
        "generate", *given, "--prompt", "Verse 1", "--max-tokens", 20, "--num-steps", "1,4", "--top-k", 5
    )
    assert status == 0 and out.count("Verse 1") == 2 and "K = 4" in out and "core steps" in out, err
    again = rdlm(
        "generate", *given, "--prompt", "Verse 1", "--max-tokens", 20, "--num-steps", 4, "--top-k", 5
    )[1]
    assert again.splitlines()[1] in out
    status, out, _ = rdlm(
        "generate",
        *given,
        "--prompt",
        "",
        "--order",
        "confidence",
        "--resident-blocks",
        1,
        "--temperature",
        0,
    )
    assert status == 2, "64 tokens exceed 32 positions"
    status, out, _ = rdlm(
        "generate", *given, "--prompt", "", "--order", "confidence", "--resident-blocks", 1, "--max-tokens", 9
    )
    assert status == 0

    figures = tmp_path / "nll.json"
    wanted = ("--num-steps", "1,8", "--num-draws", 4, "--out", figures, "--plot", tmp_path / "p.png")
    status, out, err = rdlm("eval", "nll", *given, "--data", corpus, *wanted)
    assert status == 0, err
    first, second = json.loads(figures.read_text())["results"]
    assert (
        first["estimator"].startswith("upper bound of the NLL, not its value: K = 1")
        and "4 stratified draws" in second["estimator"]
    )
    assert (
        first["bits_per_byte"] == pytest.approx(first["bits_per_character"])
        and first["nll_interval"][0] < first["nll"]
    )
    assert (tmp_path / "p.png").exists() and "upper bound" in out

    short = ("--num-prompts", 2, "--prompt-tokens", 4, "--max-tokens", 4, "--cache", tmp_path / "cache")
    for command, problem in (
        (["serve", *given, "--kv-cache", "full"], "keeps no keys"),
        (["eval", "ce-by-sigma", *given, "--data", corpus], "no next token"),
        (["eval", "convergence", *given, "--data", corpus], "not an iteration of one state"),
        (["eval", "depth", *given, "--task", "s3", "--lengths", "4"], "is a model of text"),
        (["eval", "gen-ppl", *given, "--data", corpus, *short, "--bridge", "euler"], "there is no ODE"),
        (["eval", "nll", *given, "--data", corpus, "--num-steps", "4000"], "is out of range"),
        (["generate", *given, "--prompt", "a", "--max-tokens", "4", "--bridge", "euler"], "there is no ODE"),
        (["generate", *given, "--prompt", "a", "--kv-cache", "full"], "keeps no keys"),
        (["generate", *given, "--prompt", "a", "--max-tokens", "4", "--num-steps", "17"], "takes 1 to 16"),
        (["generate", *given, "--prompt", "a" * 40], "exceed the context of 32"),
    ):
        status, _, err = rdlm(*command)
        assert status == 2 and problem in err and "Traceback" not in err, (command, err)
