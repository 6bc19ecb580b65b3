"""A checkpoint folder comes back equal, or is refused with a line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rdlm.checkpoints import folder as checkpoint
from rdlm.data.tokenizer import train_tokenizer
from rdlm.errors import UserError
from rdlm.nn.attention import CausalContext


@pytest.fixture
def folder(tmp_path: Path, tiny, tiny_config) -> Path:
    return checkpoint.save(tmp_path / "model", tiny(), tiny_config(), None, "Trained on nothing.")


def forward(denoiser) -> torch.Tensor:
    ids = torch.arange(10).view(1, 10)
    ctx = CausalContext(10)
    e = denoiser.model.encode(ids, ctx)
    state = denoiser.model.core(denoiser.model.initial_state(e), e, denoiser.condition(None, e), ctx)
    return denoiser.predict(denoiser.model.decode(state, ctx)).logits()


@pytest.mark.parametrize(
    ("family", "objective"), [("huginn", "single_pass"), ("huginn", "paper"), ("llama", "next_token")]
)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path: Path, tiny, tiny_config, family: str, objective: str, tied: bool) -> None:
    denoiser, config = (
        tiny(family, objective, tie_embeddings=tied),
        tiny_config(family, objective, tie_embeddings=tied),
    )
    loaded = checkpoint.load(checkpoint.save(tmp_path / "m", denoiser, config, None))
    assert loaded.config == config
    with torch.no_grad():
        assert torch.equal(forward(loaded.denoiser), forward(denoiser))
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert sum("lm_head" in name for name in stored) == (0 if tied else 1)
    assert not loaded.denoiser.training


def test_bfloat16_weights_stay_bfloat16_on_disk_and_widen_on_request(
    tmp_path: Path, tiny, tiny_config
) -> None:
    checkpoint.save(tmp_path / "m", tiny().bfloat16(), tiny_config(), None)
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in checkpoint.load(tmp_path / "m").denoiser.parameters()} == {torch.float32}
    assert {p.dtype for p in checkpoint.load(tmp_path / "m", dtype=torch.bfloat16).denoiser.parameters()} == {
        torch.bfloat16
    }


def test_tokenizer_and_card_travel_along(tmp_path: Path, tiny, tiny_config) -> None:
    tokenizer = train_tokenizer("bpe", iter(["the cat sat on the mat " * 20]), 262)
    config = tiny_config(vocab_size=262)
    loaded = checkpoint.load(
        checkpoint.save(tmp_path / "m", tiny(vocab_size=262), config, tokenizer, "Trained on a cat.")
    )
    assert loaded.tokenizer is not None and loaded.tokenizer.fingerprint == tokenizer.fingerprint
    card = (tmp_path / "m" / "README.md").read_text()
    assert "Trained on a cat." in card and "single_pass" in card and "normalised likelihood" in card
    assert f"{sum(p.numel() for p in loaded.denoiser.parameters()):,}" in card


def test_saving_again_replaces_and_a_failed_write_does_not(
    folder: Path, tiny, tiny_config, monkeypatch
) -> None:
    newer = tiny_config().model_copy(update={"step": 7})
    checkpoint.save(folder, tiny(), newer, None)
    assert checkpoint.load(folder).config.step == 7
    monkeypatch.setattr("rdlm.atomic.sync", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, tiny(), newer.model_copy(update={"step": 8}), None)
    assert checkpoint.load(folder).config.step == 7


def change_config(folder: Path, change) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(schema_version=3), ["schema_version", "3", "update rdlm"]),
        (lambda c: c.update(colour="red"), ["colour", "remove it"]),
        (lambda c: c["model"].update(colour="red"), ["model.colour"]),
        (lambda c: c["model"].update(num_heads=3), ["model", "num_heads"]),
        (lambda c: c["model"].update(mlp_width=72), ["mlp", "(128, 32)", "(144, 32)"]),
        (lambda c: c["model"].update(num_core_layers=2), ["core_block.1", "is missing"]),
        (lambda c: c["model"].update(num_coda_layers=0), ["coda.0", "no such weight"]),
        (lambda c: c.pop("model"), ["model", "required"]),
    ],
)
def test_config_that_does_not_fit_is_refused(folder: Path, change, words: list[str]) -> None:
    change_config(folder, change)
    with pytest.raises(UserError) as error:
        checkpoint.load(folder)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda w: w.pop("model.adapter.weight"), "model.adapter.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra"),
        (lambda w: w.update({"model.adapter.weight": torch.zeros(3, 3)}), "(3, 3)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, change, word: str) -> None:
    change_weights(folder, change)
    with pytest.raises(UserError, match="one export") as error:
        checkpoint.load(folder)
    assert word in str(error.value)


def test_missing_or_damaged_files_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match="is missing"):
        checkpoint.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        checkpoint.load(folder)
    with pytest.raises(UserError, match="has no config.json"):
        checkpoint.load(folder / "elsewhere")
