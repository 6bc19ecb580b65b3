"""Training that starts from a checkpoint: its shape, its tokenizer, weights that do not move and weights that
move faster."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints.folder import load_config
from rdlm.checkpoints.retrofit import convert
from rdlm.config.base import parse
from rdlm.data.batch import Batch
from rdlm.data.tokenizer import train_tokenizer
from rdlm.errors import UserError
from rdlm.objectives.base import Keys
from rdlm.registry import build
from train.config_file import load
from train.export import export_run, initialize_from
from train.lora import add_adapters
from train.memory_plan import predict
from train.optim import build_optimizer
from train.patterns import matches
from train.pretrain import check
from train.settings import TrainConfig

PLAIN = {
    "family": "llama",
    "vocab_size": 8,
    "d_model": 32,
    "num_heads": 2,
    "mlp_width": 48,
    "num_layers": 3,
    "max_seq_len": 32,
}
ONESTEP: dict[str, Any] = {"objective": {"name": "onestep"}}


def plain(out: Path, **model: Any) -> Path:
    """A plain transformer as an import writes it."""
    document = {"name": "plain", "model": {**PLAIN, **model}, "objective": "next_token"}
    config = checkpoint.parse_config(document, "test")
    checkpoint.save(out, build(config, seed=0), config, None)
    (out / "generation_config.json").write_text('{"eos_token_id": [2, 7]}\n')
    return out


def converted(tmp_path: Path, injection: Any = "linear") -> Path:
    made = tmp_path / "looped"
    source = plain(tmp_path / "plain")
    return convert(source, made, prelude=1, core=1, coda=1, injection=injection, max_steps=16)


@pytest.fixture
def file(tmp_path: Path, document: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """A config file without the section model that starts from ``source``."""

    def write(source: Path | str, changes: dict[str, Any] | None = None) -> Path:
        found = document({"init_from": str(source), **ONESTEP, **(changes or {})})
        del found["model"]
        path = tmp_path / "finetune.yaml"
        with path.open("w") as stream:
            YAML(typ="safe", pure=True).dump(found, stream)
        return path

    return write


def trained(trainer: Any, changes: dict[str, Any], updates: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    """A run after some updates, and the weights it began with."""
    run = trainer(
        {"schedule.steps": updates, "schedule.warmup_steps": 0, "schedule.kind": "constant", **changes}
    )
    before = {name: weight.clone() for name, weight in run.weights().items()}
    run.fit()
    return run, before


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "bf16"), (0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
)
def test_frozen_parameters_do_not_move_and_the_others_do(trainer: Any, stage: int, precision: str) -> None:
    freeze = ["model.prelude.*", "model.wte", "model.core_block.0.attn"]
    changes = {"deepspeed.zero_stage": stage, "precision": precision, "optimizer.freeze": freeze}
    run, before = trained(trainer, {**changes, **ONESTEP})
    still = {name for name, weight in run.weights().items() if torch.equal(weight, before[name])}
    expected = {
        name
        for name in before
        if name.startswith(("model.prelude.", "model.wte.", "model.core_block.0.attn."))
    }
    assert still == expected


def test_frozen_parameters_take_no_memory_of_gradients_or_moments(
    document: Callable[..., dict[str, Any]],
) -> None:
    config = parse(
        TrainConfig, document({"optimizer.freeze": ["model.wte", "model.coda"], **ONESTEP}), "test"
    )
    denoiser = build(config.checkpoint_config, seed=0)
    optimizer = build_optimizer(denoiser, config)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    ids = torch.randint(0, 8, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 8, dtype=torch.bool))
    denoiser(batch, Keys(seed=0, step=0))[0].backward()
    silent = {name for name, p in denoiser.named_parameters() if p.grad is None}
    assert silent == {
        name for name, _ in denoiser.named_parameters() if name.startswith(("model.wte", "model.coda"))
    }
    assert held == {id(p) for name, p in denoiser.named_parameters() if name not in silent}


def test_a_rate_factor_multiplies_the_first_update(trainer: Any) -> None:
    """Adam's first update moves a weight by the rate; the last pattern that matches counts."""
    factors = {"model.core_block": 2, "model.core_block.0.mlp": 4, "model.adapter": 0.5}
    changes = {
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 0.0,
        "optimizer.lr_factors": factors,
        "precision": "fp32",
    }
    run, before = trained(trainer, {**changes, **ONESTEP}, updates=1)
    moved = {name: float((weight - before[name]).abs().max()) for name, weight in run.weights().items()}
    for name, rate in {
        "model.prelude.0.mlp.fc.weight": 1e-3,
        "model.core_block.0.attn.proj.weight": 2e-3,
        "model.core_block.0.mlp.fc.weight": 4e-3,
        "model.adapter.weight": 5e-4,
    }.items():
        assert moved[name] == pytest.approx(rate, rel=1e-2), name


@pytest.mark.parametrize(
    ("pattern", "name", "stands_for"),
    [
        ("model.prelude.*", "model.prelude.0.mlp.fc.weight", True),
        ("model.prelude", "model.prelude.0.mlp.fc.weight", True),
        ("model.pre", "model.prelude.0.mlp.fc.weight", False),
        ("*.norm_1", "model.core_block.0.norm_1.weight", True),
        ("model.adapter", "model.adapter.weight", True),
        ("adapter", "model.adapter.weight", False),
    ],
)
def test_a_pattern_stands_for_names_and_what_is_below_them(pattern: str, name: str, stands_for: bool) -> None:
    assert matches(name, pattern) is stands_for


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"optimizer.freeze": ["model.preludes.*"]},
            "optimizer.freeze='model.preludes.*': matches no parameter",
        ),
        ({"optimizer.lr_factors": {"adapter": 10}}, "optimizer.lr_factors='adapter': matches no parameter"),
        ({"optimizer.freeze": ["model"]}, "nothing is left to train"),
    ],
)
def test_a_pattern_that_is_wrong_is_one_line(document: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        check(parse(TrainConfig, document({**ONESTEP, **changes}), "test"), 1)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_with_frozen_weights_and_factors_resumes_bit_for_bit(
    trainer: Any, tmp_path: Path, stage: int
) -> None:
    changes = {
        "deepspeed.zero_stage": stage, "optimizer.freeze": ["model.prelude"],
        "optimizer.lr_factors": {"model.adapter": 10},
        "schedule.kind": "constant", "schedule.steps": 4, "schedule.warmup_steps": 0, **ONESTEP,
    }  # fmt: skip
    whole = trainer({**changes, "output": str(tmp_path / "whole")})
    whole.fit()
    expected = {name: weight.clone() for name, weight in whole.weights().items()}
    trainer({**changes, "schedule.steps": 2}).fit()
    again = trainer(changes)
    assert again.step == 2
    again.fit()
    for name, weight in again.weights().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("stage", [0, 2])
def test_a_resumed_run_may_freeze_and_thaw(trainer: Any, stage: int) -> None:
    """What is frozen is not the same as before, so neither are the optimizer's groups: weights and moments
    find their places."""
    changes = {
        "deepspeed.zero_stage": stage,
        "schedule.kind": "constant",
        "schedule.warmup_steps": 0,
        **ONESTEP,
    }
    first = trainer({**changes, "schedule.steps": 2, "optimizer.freeze": ["model.prelude"]})
    first.fit()
    before = {name: weight.clone() for name, weight in first.weights().items()}
    second = trainer({**changes, "schedule.steps": 4, "optimizer.freeze": ["model.coda"]})
    before |= {n: w.bfloat16().float() for n, w in before.items() if n.startswith("model.coda.")}  # no master
    assert all(torch.equal(weight, before[name]) for name, weight in second.weights().items())
    second.fit()
    still = {name for name, weight in second.weights().items() if torch.equal(weight, before[name])}
    assert still == {name for name in before if name.startswith("model.coda.")}


def test_the_section_model_is_taken_from_the_checkpoint(file: Any, tmp_path: Path) -> None:
    made = converted(tmp_path)
    ours = checkpoint.load_config(made).model
    assert load(file(made)).model == ours
    assert load(file(made), ["objective=single_pass"]).model == ours.model_copy(
        update={"noise_conditioning": True}
    )
    assert load(file("nowhere"), [f"init_from={made}", "model.max_seq_len=16"]).model.max_seq_len == 16


def test_a_run_and_its_checkpoints_bring_their_model_too(file: Any, trainer: Any, tmp_path: Path) -> None:
    run, _ = trained(trainer, ONESTEP)
    for source in (tmp_path / "run", tmp_path / "run/checkpoints/step_000002"):
        assert load(file(source)).model == run.config.model
    export_run(tmp_path / "run")
    assert load(file(tmp_path / "run")).model == run.config.model


def test_a_source_without_a_model_is_one_line(file: Any, tmp_path: Path) -> None:
    published = tmp_path / "published"
    published.mkdir()
    for path, text, words in (
        (tmp_path / "no", None, "is not a checkpoint folder"),
        (published, '{"model_type": "llama"}', "rdlm import"),
        (published, "{", "cannot be read"),
    ):
        if text is not None:
            (path / "config.json").write_text(text)
        with pytest.raises(UserError, match="init_from") as error:
            load(file(path))
        assert words in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_another_shape_is_refused(file: Any, tmp_path: Path) -> None:
    config = load(file(converted(tmp_path)), ["model.layer.mlp_width=64"])
    with pytest.raises(UserError, match=r"init_from.*has shape .* the model .*correct the section model"):
        check(config, 1)


def test_a_map_says_where_weights_of_another_shape_go(file: Any, tmp_path: Path) -> None:
    source = converted(tmp_path)
    wider = ["model.vocab_size=11", "model.loop.num_core_layers=2", "model.loop.num_coda_layers=0"]
    mapped = {
        "model.wte": "overlap",
        "model.core_block.0.attn": "skip",
        "model.core_block.1": "model.coda.0",
    }
    path = file(source, {"init_map": mapped, "data": {"kind": "group_product", "group": "s3", "length": 12}})
    config = load(path, wider)
    check(config, 1)
    theirs = load_file(source / "model.safetensors")
    network, fresh = build(config.checkpoint_config, seed=5), build(config.checkpoint_config, seed=5)
    lines = initialize_from(network, config.init_from or "", None, config.init_map)
    assert "initialized anew in part: model.wte.weight" in lines and "core_block.0.attn" in lines[-1]
    before = dict(fresh.named_parameters())
    for name, weight in network.named_parameters():
        if name == "model.wte.weight":
            assert torch.equal(weight[:8], theirs[name]) and torch.equal(weight[8:], before[name][8:])
        elif name.startswith("model.core_block.0.attn"):
            assert torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, theirs[name.replace("core_block.1", "coda.0")]), name


@pytest.mark.parametrize(
    ("mapped", "words"),
    [
        ({}, "model.wte.weight has shape .*init_map"),
        ({"model.wte": "overlap", "model.zzz": "skip"}, "init_map.model.zzz='skip': matches no parameter"),
        ({"model.wte": "overlap", "model.ln_f": "model.nothing"}, "has no weight model.nothing.weight"),
        ({"model.wte": "model.ln_f"}, "model.ln_f.weight has shape"),
    ],
)
def test_a_map_that_does_not_fit_is_one_line(
    file: Any, tmp_path: Path, mapped: dict[str, str], words: str
) -> None:
    path = file(converted(tmp_path), {"init_map": mapped} if mapped else {})
    with pytest.raises(UserError, match=words) as error:
        check(load(path, ["model.vocab_size=11"]), 1)
    assert "\n" not in str(error.value)


def test_a_run_from_other_weights_reports_k_before_and_after(trainer: Any, tmp_path: Path) -> None:
    """The figures before are those of the source; the run itself is the same without them."""
    changes = {
        "init_from": str(converted(tmp_path)), "model": load_config(tmp_path / "looped").model.model_dump(), **ONESTEP,
        "schedule": {"kind": "constant", "steps": 4}, "precision": "fp32",
    }  # fmt: skip
    measured = {"evaluation": {"interval_steps": 4, "steps": [1, 4], "max_tokens": 96}}
    run = trainer({**changes, **measured})
    run.fit()
    first, last = (json.loads(line) for line in (run.output / "held_out.jsonl").read_text().splitlines())
    assert (first["step"], last["step"]) == (0, 4) and first["K=1"] == first["K=4"] != last["K=4"]
    said = run.terminal.getvalue()
    assert f"before training: K=1 {first['K=1']:.4f}, K=4 {first['K=4']:.4f}" in said
    assert f"after update 4: K=1 {last['K=1']:.4f}, K=4 {last['K=4']:.4f}" in said
    assert (run.output / "k_curve.png").is_file()
    assert "Held out before training: K=1: " in (export_run(run.output) / "README.md").read_text()
    plainly = trainer({**changes, "output": str(tmp_path / "plainly")})
    plainly.fit()
    for name, weight in plainly.weights().items():
        assert torch.equal(weight, run.weights()[name]), name


@pytest.mark.parametrize("injection", ["linear", "diagonal", "none"])
def test_a_converted_checkpoint_trains_from_its_weights(
    file: Any, trainer: Any, tmp_path: Path, injection: Any
) -> None:
    made = converted(tmp_path, injection)
    config = load(file(made))
    check(config, 1)
    run, before = trained(
        trainer, {"model": config.model.model_dump(), "init_from": str(made), "precision": "fp32", **ONESTEP}
    )
    stored = load_file(made / "model.safetensors")
    assert stored.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in stored.items())
    assert any(not torch.equal(weight, before[name]) for name, weight in run.weights().items())
    model = export_run(tmp_path / "run")
    assert json.loads((model / "generation_config.json").read_text()) == {"eos_token_id": [2, 7]}
    assert f"Started from the weights of `{made}`" in (model / "README.md").read_text()


def test_data_of_another_tokenizer_are_refused(file: Any, tmp_path: Path) -> None:
    from train.data.prepare import Preparation, prepare

    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"some words {i} and others"}) for i in range(400)))
    source = plain(tmp_path / "large", vocab_size=300)
    ours = train_tokenizer("bpe", iter(["quite another text"]), 257)
    ours.save(source / "tokenizer")
    for name, how in (("same", {"tokenizer": str(source / "tokenizer")}), ("other", {"vocab_size": 260})):
        prepare(Preparation(str(text), tmp_path / name, valid_fraction=0.1, **how))  # type: ignore[arg-type]
    data = {"kind": "tokens", "path": str(tmp_path / "same"), "seq_len": 16}
    check(load(file(source, {"data": data, "objective": "next_token"})), 1)
    other = load(file(source, {"data": {**data, "path": str(tmp_path / "other")}, "objective": "next_token"}))
    with pytest.raises(UserError, match="not those of the tokenizer of init_from"):
        check(other, 1)
    check(other.model_copy(update={"allow_changes": True}), 1)


@pytest.mark.parametrize(
    "changes", [{"optimizer.freeze": ["model.prelude", "model.wte"]}, {"lora": {"rank": 2}}]
)
def test_a_plan_counts_moments_of_what_moves_alone(document: Any, changes: dict[str, Any]) -> None:
    config = parse(TrainConfig, document({**ONESTEP, **changes}), "test")
    denoiser = build(config.checkpoint_config, device="meta")
    add_adapters(denoiser, config.lora, 0)
    build_optimizer(denoiser, config)
    moved = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    assert 0 < moved < sum(p.numel() for p in denoiser.parameters())
    found = predict(config, 1)
    assert found.optimizer == 12 * moved  # bf16: two moments and a master
    assert found.parameters == 2 * sum(p.numel() for p in denoiser.parameters())
