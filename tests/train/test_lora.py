"""Adapters train in the place of the weights, for all core runs, and an exported model has them merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rdlm.checkpoints import folder as checkpoint
from rdlm.config.base import parse
from rdlm.data.batch import Batch
from rdlm.errors import UserError
from rdlm.objectives.base import Keys
from rdlm.registry import build
from train.config_file import _check as check_sections
from train.export import export_run
from train.lora import add_adapters, is_adapter, plain_name
from train.metrics import first_lines
from train.pretrain import check
from train.settings import LoraConfig, TrainConfig

LORA = {"rank": 3, "alpha": 6, "also_train": ["model.adapter"]}
THREE = {"name": "next_token", "depth": {"mean": 3, "grad_steps": 3}}


@pytest.fixture
def source(document: Any, tmp_path: Path) -> Path:
    """A checkpoint of the tiny model."""
    config = parse(TrainConfig, document({"objective": "onestep"}), "test").checkpoint_config
    return checkpoint.save(tmp_path / "source", build(config, seed=11), config, None)


@pytest.fixture
def changes(source: Path) -> dict[str, Any]:
    return {
        "init_from": str(source), "lora": LORA, "objective": "onestep", "precision": "fp32", "optimizer.lr": 0.02,
        "schedule.kind": "constant", "schedule.warmup_steps": 0, "schedule.steps": 4,
    }  # fmt: skip


def states(run: Any) -> int:
    """Elements of all moments that the optimizer holds."""
    inner = run.engines[0].optimizer
    inner = getattr(inner, "optimizer", inner)
    return sum(
        t.numel() for state in inner.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()
    )


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
)
def test_adapters_move_nothing_else_does_and_only_they_have_moments(
    trainer: Any, changes: dict[str, Any], stage: int, precision: str
) -> None:
    run = trainer({**changes, "deepspeed.zero_stage": stage, "precision": precision})
    before = {name: weight.clone() for name, weight in run.weights().items()}
    assert run.fit()
    moved = {name for name, weight in run.weights().items() if not torch.equal(weight, before[name])}
    trained = {name for name in before if is_adapter(name) or name == "model.adapter.weight"}
    assert moved == trained
    counted = sum(before[name].numel() for name in trained)
    assert f"parameters ({counted:,} of them train), family" in first_lines(run)[0]
    assert 2 * counted <= states(run) <= 2 * counted + 64  # two moments, padded by ZeRO


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_with_adapters_resumes_bit_for_bit(
    trainer: Any, changes: dict[str, Any], tmp_path: Path, stage: int, dropout: float
) -> None:
    given = {
        **changes,
        "deepspeed.zero_stage": stage,
        "lora": {**LORA, "dropout": dropout},
        "precision": "bf16",
    }
    whole = trainer({**given, "output": str(tmp_path / "whole")})
    whole.fit()
    expected = {name: weight.clone() for name, weight in whole.weights().items()}
    trainer({**given, "schedule.steps": 2}).fit()
    torch.manual_seed(99)
    again = trainer(given)
    assert again.step == 2
    again.fit()
    for name, weight in again.weights().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_exported_model_is_the_trained_one_merged(
    trainer: Any, changes: dict[str, Any], source: Path, stage: int
) -> None:
    run = trainer({**changes, "deepspeed.zero_stage": stage})
    run.fit()
    ids = torch.randint(0, 8, (2, 12), generator=torch.Generator().manual_seed(0))
    exported = checkpoint.load(export_run(Path(run.config.output)))
    with torch.no_grad():
        mine, theirs = (n.score(ids, ids, (1, 4)) for n in (run.network, exported.denoiser))
        before = checkpoint.load(source).denoiser.score(ids, ids, (1, 4))
    for k in (1, 4):
        torch.testing.assert_close(theirs[k].logprobs, mine[k].logprobs, atol=1e-5, rtol=0)
        assert float((theirs[k].logprobs - before[k].logprobs).abs().max()) > 1e-2
    names = {name for name, _ in build(exported.config, device="meta").named_parameters()}
    assert {name for name, _ in exported.denoiser.named_parameters()} == names
    card = (Path(run.config.output) / "model" / "README.md").read_text()
    assert "LoRA of rank 3, alpha 6, merged" in card


def test_a_fresh_adapter_changes_nothing_and_is_a_function_of_the_seed(document: Any) -> None:
    config = parse(TrainConfig, document({"objective": "onestep"}), "test").checkpoint_config
    ids = torch.randint(0, 8, (2, 12), generator=torch.Generator().manual_seed(0))
    networks = [build(config, seed=0) for _ in range(4)]
    for network, seed in zip(networks[1:], (5, 5, 6), strict=True):
        add_adapters(network, LoraConfig(rank=2), seed)
    with torch.no_grad():
        scores = [network.score(ids, ids, (2,))[2].logprobs for network in networks]
    assert all(torch.equal(scores[0], other) for other in scores[1:])
    drawn = [{n: p for n, p in network.named_parameters() if "lora_A" in n} for network in networks[1:]]
    assert all(torch.equal(p, drawn[1][n]) for n, p in drawn[0].items())
    assert not any(torch.equal(p, drawn[2][n]) for n, p in drawn[0].items())


def test_the_core_s_adapters_get_the_gradients_of_all_runs(document: Any) -> None:
    """W' = W + s B A, so dL/dA = s B^T dL/dW' and dL/dB = s dL/dW' A^T, with dL/dW' that of the plain network
    with the merged weights."""
    config = parse(TrainConfig, document({"objective": THREE}), "test").checkpoint_config
    lora = LoraConfig(rank=3, alpha=6)
    network, plain = build(config, seed=0), build(config, seed=0)
    add_adapters(network, lora, 1)
    rng = torch.Generator().manual_seed(2)
    mine = dict(network.named_parameters())
    with torch.no_grad():
        for name, parameter in mine.items():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
        for name, parameter in plain.named_parameters():
            stem = name.removesuffix(".weight")
            down, up = (mine.get(f"{stem}.lora_{part}.default.weight") for part in "AB")
            if down is not None and up is not None:
                parameter += 2.0 * up @ down
    ids = torch.randint(0, 8, (2, 13), generator=rng)
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 12, dtype=torch.bool))
    for objective in (network, plain):
        objective(batch, Keys(seed=0, step=0))[0].backward()
    whole = dict(plain.named_parameters())
    checked = 0
    for name, parameter in mine.items():
        if not is_adapter(name) or "core_block" not in name:
            continue
        stem = name.split(".lora_")[0]
        gradient = whole[f"{stem}.weight"].grad
        down, up = (mine[f"{stem}.lora_{part}.default.weight"].detach() for part in "AB")
        expected = 2.0 * (up.T @ gradient if "lora_A" in name else gradient @ down.T)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)
        checked += 1
    assert checked == 8


def test_a_run_on_adapters_starts_another_run(trainer: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    """Its weights are the merged ones, from the model folder and from the training checkpoint."""
    first = trainer(changes)
    first.fit()
    model = checkpoint.load(export_run(Path(first.config.output))).denoiser
    expected = dict(model.named_parameters())
    for place in ("", "/checkpoints/step_000004"):
        output = str(tmp_path / f"second{len(place)}")
        second = trainer({**changes, "init_from": str(first.output) + place, "output": output})
        for name, weight in second.weights().items():
            if not is_adapter(name):
                assert torch.equal(weight, expected[plain_name(name)]), name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"lora": {"targets": ["model.attention"]}},
            "lora.targets='model.attention': matches no linear layer",
        ),
        ({"lora": {"also_train": ["adapter"]}}, "lora.also_train='adapter': matches no parameter"),
        ({"optimizer.freeze": ["model"], "lora": {}}, "nothing is left to train"),
    ],
)
def test_a_mistake_is_one_line(
    document: Any, changes: dict[str, Any], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as error:
        check(parse(TrainConfig, document({**changes, **given}), "test"), 1)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_adapters_need_a_network_to_start_from(document: Any) -> None:
    with pytest.raises(UserError, match="lora.*set init_from"):
        check_sections(parse(TrainConfig, document({"lora": {}}), "test"))


def test_evaluation_draws_no_dropout(trainer: Any, changes: dict[str, Any]) -> None:
    given = {
        **changes,
        "lora": {**LORA, "dropout": 0.5},
        "evaluation": {"interval_steps": 4, "steps": [1], "max_tokens": 48},
    }
    run = trainer(given)
    run.fit()
    logged = json.loads((run.output / "held_out.jsonl").read_text().splitlines()[-1])["K=1"]
    model = checkpoint.load(export_run(run.output)).denoiser
    batches = list(run.corpus.windows(48, 8))
    nats = sum(-float(model.score(b.inputs, b.targets, (1,))[1].logprobs.sum()) for b in batches)
    assert logged == pytest.approx(nats / sum(b.targets.numel() for b in batches), abs=1e-5)
