"""``rdlm quantize``: what is stored, that every way of reading it computes the same, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rdlm
from rdlm.checkpoints import folder
from rdlm.cli import app, run
from rdlm.config.checkpoint import CheckpointConfig, WeightFormat
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError
from rdlm.nn.quantization import formats, quantized
from rdlm.registry import build
from rdlm.sampling_params import SamplingParams
from serve.engine.cpu.library import library
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.loading import load_served
from serve.settings import EngineSettings
from train.export import merge, weights_of

FORMATS: tuple[WeightFormat, ...] = ("int8", "int4")
SHAPES: dict[str, dict[str, Any]] = {
    "huginn": {"family": "huginn", "num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1,
               "tie_embeddings": False},
    "llama": {"family": "llama", "num_layers": 2},
    "noisy": {"family": "huginn", "num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1,
              "noise_conditioning": True},
    "masked": {"family": "masked", "num_layers": 2, "noise_conditioning": True},
    "blocks": {"family": "llama", "num_layers": 4, "noise_conditioning": True},
}  # fmt: skip
OBJECTIVES = {"llama": "next_token", "noisy": "single_pass", "masked": "masked", "blocks": "paper"}
SETTINGS = EngineSettings(max_slots=4, chunk=16, prefill_rows=32, dtype="float32", device="cpu")
needs_kernels = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


def quantize(source: Path, weights: str, *more: str) -> Path:
    out = source.parent / f"{source.name}-{weights}"
    assert run(app, ["quantize", str(source), str(out), "--weights", weights, *more], "rdlm") == 0
    return out


@pytest.fixture
def exact(tmp_path: Path, tokenizer: Tokenizer, request: pytest.FixtureRequest) -> Path:
    """A loud random checkpoint of the shape that a test names."""
    shape: str = getattr(request, "param", "huginn")
    sizes = {
        "vocab_size": tokenizer.vocab_size,
        "d_model": 48,
        "num_heads": 2,
        "mlp_width": 75,
        "max_seq_len": 64,
    }
    document = {
        "name": "tiny", "model": {**sizes, **SHAPES[shape]}, "objective": {"name": OBJECTIVES.get(shape, "onestep")},
        "recurrence": {"default_steps": 2, "max_steps": 8},
        "blocks": {"num_blocks": 2} if shape == "blocks" else None,
    }  # fmt: skip
    config = CheckpointConfig.model_validate(document)
    denoiser, rng = build(config, seed=1), torch.Generator().manual_seed(2)
    for parameter in denoiser.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, 0, parameter.shape[1] ** -0.5, generator=rng)
    return folder.save(tmp_path / "exact", denoiser, config, tokenizer, "## Data\n\nA sentence about data.")


def answers(source: Path, settings: EngineSettings) -> list[tuple[list[int], Tensor]]:
    """Tokens and log-probabilities of three requests."""
    most = folder.load_config(source).max_steps
    asked = [
        Request(
            tuple(range(5, 5 + n)), StepBudget(min(k, most)), 6, SamplingParams(temperature=0), logprobs=0
        )
        for n, k in ((3, 4), (20, 1), (9, 2))
    ]
    with Engine(lambda: load_served(source, settings)) as engine:
        found = [[e for e in events if e.logprobs is not None] for events in engine.generate(asked)]
    return [
        (
            [cast(int, e.token) for e in events],
            torch.tensor([e.logprobs.logprob for e in events if e.logprobs]),
        )
        for events in found
    ]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(7, 128), (5, 45), (3, 1)])
def test_weights_are_the_nearest_that_their_scales_allow(shape: tuple[int, int], group_size: int) -> None:
    weight = torch.randn(shape)
    weight[1] = 0
    groups = nn.functional.pad(weight, (0, -shape[1] % group_size)).unflatten(1, (-1, group_size))
    errors = {}
    for weights in FORMATS:
        found = quantized(weight, weights, group_size)
        assert found.weights == weights and found.values.shape[1] == (
            shape[1] if weights == "int8" else -(-shape[1] // 2)
        )
        errors[weights] = (found.dequantized() - weight).abs()
        step = found.scales.float().abs().repeat_interleave(group_size, 1)[:, : shape[1]]
        inside = weight.abs() <= 7 * step  # of int4 the outermost values may be cut off
        assert (errors[weights] <= step * 0.501)[inside].all() and found.dequantized()[1].eq(0).all()
        assert torch.equal(found[torch.tensor([2, 0])].dequantized(), found.dequantized()[[2, 0]])
    most = groups.abs().amax(2, keepdim=True).expand_as(groups).flatten(1)[:, : shape[1]]
    assert (errors["int8"] <= most / 127 * 0.501).all()
    plain = (groups / (most_of(groups) / -8)).round().clamp(-8, 7) * (most_of(groups) / -8)
    assert errors["int4"].norm() <= (plain.nan_to_num() - groups).norm() + 0.003 * weight.norm()


def most_of(groups: Tensor) -> Tensor:
    """The value of largest size of each group: what Q4_0 makes -8."""
    return groups.gather(2, groups.abs().argmax(2, keepdim=True))


@pytest.mark.parametrize("exact", SHAPES, indirect=True)
@pytest.mark.parametrize(("weights", "group"), [("int8", 64), ("int4", 32)])
def test_a_stored_checkpoint_is_the_network_with_rounded_weights(
    exact: Path, weights: WeightFormat, group: int
) -> None:
    out = quantize(exact, weights, "--group-size", str(group))
    expected, found = folder.load(exact).denoiser, folder.load(out)
    chosen = formats(expected, weights)
    assert len(chosen) > 8 and set(chosen.values()) == {weights, "int8"}
    for (name, weight), (_, stored) in zip(
        expected.named_parameters(), found.denoiser.named_parameters(), strict=True
    ):
        rounded = quantized(weight, chosen[name], group).dequantized() if name in chosen else weight
        assert torch.equal(stored, rounded), name
    assert found.config.quantization is not None and found.config.quantization.group_size == group
    files = [(path / folder.WEIGHTS).stat().st_size for path in (exact, out)]
    assert files[1] < files[0] * (0.4 if weights == "int8" else 0.35)
    card = (out / "README.md").read_text()
    assert f"{weights} in groups of {group}" in card and "A sentence about data." in card
    assert torch.equal(  # also in bf16, and where blocks come and go
        next(iter(folder.load(out, dtype=torch.bfloat16).denoiser.parameters())),
        next(iter(found.denoiser.parameters())).bfloat16(),
    )


@needs_kernels
@pytest.mark.parametrize("exact", ["huginn", "llama", "noisy", "blocks"], indirect=True)
@pytest.mark.parametrize("weights", FORMATS)
def test_kernels_read_stored_weights_as_they_are(exact: Path, weights: WeightFormat) -> None:
    """To the bit what quantising on loading gives, near what dequantised weights give, and no matrix of floats."""
    out = quantize(exact, weights)
    stored = answers(out, SETTINGS)
    made = answers(exact, SETTINGS.model_copy(update={"weights": weights}))
    plain = answers(out, SETTINGS.model_copy(update={"kernels": "torch"}))
    assert [tokens for tokens, _ in stored] == [tokens for tokens, _ in made]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(stored, made, strict=True))
    for (_, a), (_, b) in zip(stored, plain, strict=True):
        torch.testing.assert_close(a[:1], b[:1], atol=0.15, rtol=0)
    served = load_served(out, SETTINGS).runner.denoiser  # type: ignore[attr-defined]
    left = [t for t in (*served.parameters(), *served.buffers()) if t.ndim == 2 and t.numel() > 1000]
    assert not left


@pytest.mark.parametrize("exact", ["masked"], indirect=True)
def test_masked_models_are_served_dequantised(exact: Path) -> None:
    out = quantize(exact, "int4")
    request = Request((5, 6, 7), StepBudget(4), 6, SamplingParams(temperature=0))
    with Engine(lambda: load_served(out, SETTINGS)) as engine:
        assert engine.generate([request])[0][-1].finish in ("stop", "length")
    with pytest.raises(UserError, match="next-token models"):
        load_served(exact, SETTINGS.model_copy(update={"weights": "int4"}))


@pytest.mark.parametrize("exact", ["blocks"], indirect=True)
def test_blocks_that_come_and_go_are_dequantised_as_they_come(exact: Path) -> None:
    out = quantize(exact, "int8")
    few = answers(out, SETTINGS.model_copy(update={"resident_blocks": 1}))
    for (tokens, a), (other, b) in zip(
        few, answers(out, SETTINGS.model_copy(update={"kernels": "torch"})), strict=True
    ):
        assert tokens == other
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", FORMATS)
def test_without_a_compiler_weights_are_rounded_all_the_same(
    exact: Path, weights: WeightFormat, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve.engine.cpu.modules.library", lambda: None)
    monkeypatch.setattr("serve.loading.library", lambda: None)
    made = answers(exact, SETTINGS.model_copy(update={"weights": weights}))
    assert "neither smaller nor faster" in caplog.text
    for (tokens, a), (other, b) in zip(answers(quantize(exact, weights), SETTINGS), made, strict=True):
        assert tokens == other and torch.equal(a, b)


def test_python_reads_it(exact: Path) -> None:
    model, ids = rdlm.load(quantize(exact, "int4")), torch.arange(5, 15)[None]
    logits = model.logits(ids, num_steps=2)[2]
    error = (logits - rdlm.load(exact).logits(ids, num_steps=2)[2]).std() / logits.std()
    assert 0.001 < error < 0.6
    assert model.generate("in the", 2, max_tokens=3, temperature=0)[0].tokens
    again = folder.save(exact.parent / "again", model.denoiser, model.config, model.tokenizer)
    assert torch.equal(rdlm.load(again).logits(ids, num_steps=2)[2], logits)


def test_what_needs_exact_weights_refuses_rounded_ones(
    exact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, target = quantize(exact, "int4"), str(exact.parent / "target")
    convert = ["convert", str(out), target, "--prelude", "1", "--core", "1", "--coda", "1"]
    for command in (
        ["quantize", str(out), target, "--weights", "int8"], convert, ["export", "hf", str(out), target],
        ["export", "huginn", str(out), target], ["export", "gguf", str(out), f"{target}.gguf"],
    ):  # fmt: skip
        assert run(app, command, "rdlm") == 2
        error = capsys.readouterr().err
        assert "quantised to int4" in error and "give the checkpoint that it was made from" in error
    for use in (
        lambda: weights_of(out),
        lambda: weights_of(out, shapes_only=True),
        lambda: merge([out], Path(target)),
    ):
        with pytest.raises(UserError, match="quantised to int4"):
            use()
    assert not Path(target).exists()
    with pytest.raises(UserError, match="int4 already"):
        load_served(out, SETTINGS.model_copy(update={"weights": "int8"}))


def test_wrong_settings_and_weights_are_one_line(exact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = exact.parent / "out"
    command = ["quantize", str(exact), str(out), "--weights", "int4"]
    assert run(app, [*command, "--group-size", "48"], "rdlm") == 2
    assert "group_size=48" in capsys.readouterr().err
    weights = load_file(exact / folder.WEIGHTS)
    name = next(key for key in weights if key.endswith("core_block.0.mlp.proj.weight"))
    weights[name][1, 2] = float("nan")
    save_file(weights, exact / folder.WEIGHTS)
    assert run(app, command, "rdlm") == 2
    assert name in capsys.readouterr().err
    assert not out.exists() and [path.name for path in exact.parent.iterdir()] == ["exact"]


def test_damaged_files_are_one_line(exact: Path) -> None:
    out = quantize(exact, "int4")
    weights = load_file(out / folder.WEIGHTS)
    scales = next(key for key in weights if key.endswith("Wqkv.weight_scale"))
    packed = scales.removesuffix(folder.SCALES)
    for damaged, message in (
        ({key: weight for key, weight in weights.items() if key != scales}, "is missing"),
        ({**weights, packed: weights[packed].view(torch.int8)}, "config.json says int4"),
        ({**weights, scales: weights[scales][:, :1].contiguous()}, "shape of"),
    ):
        save_file(damaged, out / folder.WEIGHTS)
        with pytest.raises(UserError, match=message):
            folder.load(out)
    config = json.loads((out / folder.CONFIG).read_text())
    (out / folder.CONFIG).write_text(json.dumps({**config, "quantization": {"weights": "int3"}}))
    with pytest.raises(UserError, match="quantization.weights"):
        folder.load(out)
