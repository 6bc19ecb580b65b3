"""A wrong config is one line that names field, value and remedy, and status 2 before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rdlm.cli import app, run
from rdlm.errors import UserError
from train.config_file import load
from train.engines import ds_config


@pytest.fixture
def file(tmp_path: Path, document: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """``file({"optimizer.lr": 1})`` -> path of the tiny config with these changes."""

    def make(changes: dict[str, Any] | None = None) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(document(changes)))
        return path

    return make


LLAMA = {
    "family": "llama", "vocab_size": 64, "d_model": 32, "num_heads": 2, "mlp_width": 48, "max_seq_len": 64,
    "num_layers": 2,
}  # fmt: skip
BAD = [
    ({"optimiser": 1}, "optimiser"),
    ({"optimizer.learning_rate": 1}, "optimizer.learning_rate"),
    ({"optimizer.lr": "fast"}, "optimizer.lr"),
    ({"optimizer.lr": -1}, "optimizer.lr"),
    ({"optimizer.betas": [0.9, 1.0]}, "optimizer.betas"),
    ({"schedule.steps": 0}, "schedule.steps"),
    ({"schedule.warmup_steps": 7}, "schedule"),
    ({"schedule.cooldown_steps": 2}, "schedule"),
    ({"deepspeed.zero_stage": 4}, "deepspeed.zero_stage"),
    ({"deepspeed.zero_stage": 2, "deepspeed.offload_param": "cpu"}, "deepspeed"),
    ({"deepspeed.zero_stage": 0, "deepspeed.offload_optimizer": "cpu"}, "deepspeed"),
    ({"deepspeed.zero_stage": 2, "deepspeed.live_elements": 1000}, "deepspeed"),
    ({"model.num_heads": 5}, "model"),
    ({"model.noise_conditioning": False}, "model.noise_conditioning"),
    ({"objective.name": "next_token", "model.noise_conditioning": True}, "model.noise_conditioning"),
    ({"objective.name": "two_pass"}, "objective.name"),
    ({"data.length": 33}, "data.seq_len"),
    ({"data.kind": "sounds"}, "data.kind"),
    ({"data": {"kind": "images", "augment": "flip"}}, "data.path"),
    ({"data": {"kind": "images", "path": "d", "augment": "turn"}}, "data.augment"),
    ({"data": {"kind": "images", "path": "d", "length": 3}}, "data.length"),
    ({"precision": "fp8"}, "precision"),
    ({"evaluation": {"interval_steps": 1, "steps": [65]}}, "evaluation.steps"),
    (
        {
            "model": LLAMA,
            "objective": {"name": "next_token"},
            "evaluation": {"interval_steps": 1, "steps": [2]},
        },
        "evaluation.steps",
    ),
    ({"name": "a b"}, "name"),
    ({"schedule.steps": True}, "schedule"),
    ({"optimizer.betas": [True, 0.9]}, "optimizer"),
    ({"schedule.kind": "trapezoid"}, "schedule"),
    ({"objective": {"name": "bptt", "depth": {"mean": 8, "max_steps": 4}}}, "objective.depth.mean"),
    (
        {"objective": {"name": "bptt", "depth": {"mean": 2, "distribution": "fixed", "grad_steps": 3}}},
        "objective.depth.grad_steps",
    ),
    ({"output": "$NO_SUCH_VARIABLE/run"}, "output"),
]


@pytest.mark.parametrize(("changes", "field"), BAD)
def test_bad_config_names_the_field(file, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as error:
        load(file(changes))
    assert error.value.field == field
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimizer.lr=fast"], ["optimizer.lr", "fast"]),
        (["optimizer.lr"], ["optimizer.lr", "key.sub=value"]),
        (["seed.deep=1"], ["seed.deep", "section"]),
        (["batch.micro_size=3", "--num-procs", "1"], ["batch.micro_size", "3", "divisor of 4"]),
        (["--num-procs", "3"], ["batch.global_size", "3 processes"]),
        (["model.vocab_size=5", "--num-procs", "1"], ["model.vocab_size", "5", "6"]),
        (["data.group=s7", "--num-procs", "1"], ["data.group", "s7"]),
        (["data={kind: tokens, path: nowhere, seq_len: 8}", "--num-procs", "1"], ["nowhere"]),
    ],
)
def test_command_line_exits_2_with_one_line(file, capsys, arguments: list[str], words: list[str]) -> None:
    assert run(app, ["train", str(file()), *arguments], "rdlm") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("text", "word"),
    [(None, "No such file"), ("a: [", "not YAML"), ("- 1", "no mapping"), ("\udcff", "YAML")],
)
def test_unreadable_file(tmp_path: Path, text: str | None, word: str) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=word):
        load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2", 'line 2: found duplicate key "seed"'),
        ("model: {d_model: 8, d_model: 16}", "duplicate key"),
        ("a: " + "[" * 2000, "nested too deeply"),
        ("a: " + "9" * 6000, "is not YAML"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: *missing", "undefined alias"),
        ("\ta: 1", "line 1"),
    ],
)
def test_what_yaml_readers_accept_in_silence_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="CONFIG") as error:
        load(path)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimiser.lr=1", "did you mean optimizer?"),
        ("optimizer.beta=[0.9, 0.95]", "did you mean betas?"),
        ("model.num_head=2", "did you mean num_heads?"),
        ("data.grup=s3", "did you mean group?"),
        ("lr=1", "did you mean optimizer.lr?"),
        ("optimizer.warmup_steps=1", "did you mean schedule.warmup_steps?"),
        ("schedule.x=1", "use one of cooldown_steps, kind, min_lr_ratio, steps, warmup_steps"),
        ("model={d_model: 8}", "use one of 'dit', "),
        ("model.family=lama", "'llama'"),
        ("schedule.steps=2:00", "valid integer"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_one(file, override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load(file(), [override])
    assert words in str(error.value)


def test_numbers_are_read_as_yaml_1_2_writes_them(file) -> None:
    """1e3 is a number, a leading zero does not make octal, and yes is a word."""
    found = load(file(), ["schedule.steps=1e3", "schedule.warmup_steps=0120", "name=yes"])
    assert (found.schedule.steps, found.schedule.warmup_steps, found.name) == (1000, 120, "yes")


def test_an_objective_may_be_named_alone(file) -> None:
    assert (
        load(file({"objective": "bptt"})).objective == load(file({"objective": {"name": "bptt"}})).objective
    )
    assert load(file({"objective": "bptt"}), ["objective.depth.mean=4"]).objective.depth_in_training.mean == 4


def test_paths_mean_what_the_shell_would_make_of_them(file, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert load(file(), ["output=~/run"]).output == "/home/somebody/run"
    assert load(file(), ["output=$SCRATCH/run"]).output == "/scratch/run"


@pytest.mark.parametrize(
    "changes", [{"model.d_model": 2**40}, {"model.num_core_layers": 10**9},
    {"model.d_model": 2**17, "model.mlp_width": 2**20}]
)  # fmt: skip
def test_absurd_sizes_are_one_line(file, capsys, changes: dict[str, Any]) -> None:
    assert run(app, ["train", str(file(changes)), "--num-procs", "1"], "rdlm") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "model" in err, err


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, (1, 4, 16)),
        ({"recurrence": {"max_steps": 8, "default_steps": 2}}, (1, 4)),
        ({"model": LLAMA, "objective": {"name": "next_token"}}, (1,)),
    ],
)
def test_values_of_k_that_nobody_wrote_are_those_that_the_model_takes(
    file, changes: dict[str, Any], steps: tuple[int, ...]
) -> None:
    config = load(file({"evaluation": {"interval_steps": 1}, **changes}))
    assert config.evaluation.steps == config.samples.num_steps == steps


def test_a_value_that_is_refused_is_looked_for_in_overrides_too(file) -> None:
    with pytest.raises(UserError, match="compile='none'.* correct it in .*config.yaml or in an override"):
        load(file(), ["compile=none"])


def test_overrides_are_yaml_values(file) -> None:
    config = load(
        file(),
        ["optimizer.lr=3e-4", "optimizer.betas=[0.8, 0.9]", "log.tensorboard=false", "batch.micro_size=null"],
    )
    assert (config.optimizer.lr, config.optimizer.betas, config.log.tensorboard) == (3e-4, (0.8, 0.9), False)
    assert config.batch.micro_size is None


def test_noise_conditioning_follows_the_objective(file) -> None:
    assert load(file()).model.noise_conditioning
    assert not load(file(), ["objective.name=bptt"]).model.noise_conditioning


def test_deepspeed_gets_every_number_from_the_config(file) -> None:
    changes = {
        "batch": {"global_size": 12, "micro_size": 2},
        "optimizer.grad_clip": 0.7,
        "deepspeed": {"zero_stage": 3, "offload_param": "cpu", "live_elements": 1234},
    }
    result = ds_config(load(file(changes)), world=2)
    assert result["train_micro_batch_size_per_gpu"] * result["gradient_accumulation_steps"] * 2 == 12
    assert (result["gradient_clipping"], result["zero_optimization"]["stage"]) == (0.7, 3)
    zero = result["zero_optimization"]
    assert zero["offload_param"] == {"device": "cpu"}
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 1234


@pytest.mark.parametrize(("flags", "precision"), [("fpu avx2 avx512_bf16", "bf16"), ("fpu avx2", "fp32")])
def test_precision_auto_is_bf16_where_the_cpu_computes_in_it(
    file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, flags: str, precision: str
) -> None:
    """A CPU without bf16 instructions emulates them, many times slower."""
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, *a, **k: flags if str(self) == "/proc/cpuinfo" else real(self, *a, **k),
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert load(file(), ["precision=auto"]).precision == precision
