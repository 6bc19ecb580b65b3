"""``rdlm convert``: a plain transformer made recurrent computes at K = 1 what its source computes, bit for
bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rdlm
from rdlm.checkpoints import folder, state_size
from rdlm.checkpoints.retrofit import convert, parse_layers
from rdlm.cli import app, run
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import train_tokenizer
from rdlm.errors import UserError
from rdlm.registry import build

LAYERS = 5
LAYER: dict[str, Any] = {
    "num_heads": 4, "num_kv_heads": 2, "rope": {"base": 10_000.0}, "mlp_width": 80,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"bias": "qkv"},
    "qwen3": {"qk_norm": "head", "head_dim": 16},
    "olmo2": {"norms": "post", "qk_norm": "full"},
}
"""Layer layouts of the published families."""
INJECTIONS = ("linear", "diagonal", "none")


def plain_model(kind: str) -> dict[str, Any]:
    shape = {"vocab_size": 300, "d_model": 48, "max_seq_len": 64}
    if kind == "own":
        return {"family": "llama", **shape, "num_heads": 4, "mlp_width": 80, "num_layers": LAYERS}
    return {
        "family": "recurrent", "origin": kind, **shape, "tie_embeddings": kind != "olmo2",
        "layer": {**LAYER, **KINDS[kind]},
        "loop": {"num_core_layers": LAYERS, "iterates": False, "injection": "replace"},
    }  # fmt: skip


def source(out: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A plain transformer as an import writes it, every parameter far from its initial value."""
    document = {"name": "plain", "model": plain_model(kind), "objective": "next_token", **fields}
    config = folder.parse_config(document, "test")
    objective = build(config, seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=rng))
    tokenizer = train_tokenizer("bpe", iter(["a text of words, and words again"] * 20), 270)
    folder.save(out, objective.to(dtype), config, tokenizer)
    (out / "generation_config.json").write_text('{"eos_token_id": [2, 7]}\n')
    return out


def ids() -> torch.Tensor:
    return torch.randint(0, 280, (2, 33), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("kind", ["own", *KINDS])
def test_logits_at_k_1_are_the_sources_bit_for_bit(tmp_path: Path, kind: str, injection: Any) -> None:
    plain = source(tmp_path / "plain", kind)
    made = convert(plain, tmp_path / "made", prelude=1, core=3, coda=1, injection=injection)
    expected = rdlm.load(plain).logits(ids())[1]
    assert torch.equal(rdlm.load(made).logits(ids(), 1)[1], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_it_is_exact_in_16_bits_too_whatever_the_dtype_it_runs_in(
    tmp_path: Path, injection: Any, dtype: torch.dtype
) -> None:
    plain = source(tmp_path / "plain", dtype=dtype)
    made = convert(plain, tmp_path / "made", prelude=1, core=3, coda=1, injection=injection)
    for runs_in in (torch.float32, dtype):
        expected = rdlm.load(plain, dtype=runs_in).logits(ids())[1]
        assert torch.equal(rdlm.load(made, dtype=runs_in).logits(ids(), 1)[1], expected)


@pytest.mark.parametrize(("prelude", "core", "coda"), [(0, 5, 0), (0, 3, 2), (4, 1, 0)])
def test_every_split_into_all_layers_is_exact(tmp_path: Path, prelude: int, core: int, coda: int) -> None:
    plain = source(tmp_path / "plain")
    made = convert(plain, tmp_path / "made", prelude=prelude, core=core, coda=coda)
    assert torch.equal(rdlm.load(made).logits(ids(), 1)[1], rdlm.load(plain).logits(ids())[1])


@pytest.mark.parametrize(("injection", "changes"), [("diagonal", True), ("none", True), ("linear", False)])
def test_more_steps_differ_unless_the_injection_ignores_the_state(
    tmp_path: Path, injection: Any, changes: bool
) -> None:
    """[0, I] of linear ignores the state: every K begins with e until training has moved the adapter."""
    made = convert(
        source(tmp_path / "plain"), tmp_path / "made", prelude=1, core=3, coda=1, injection=injection
    )
    logits = rdlm.load(made).logits(ids(), [1, 4])
    assert torch.equal(logits[1], logits[4]) is not changes


@pytest.mark.parametrize("prelude", [0, 2])
@pytest.mark.parametrize("kind", ["own", "qwen3"])
def test_the_state_is_scaled_to_the_size_of_what_it_is_read_with(
    tmp_path: Path, kind: str, prelude: int
) -> None:
    """What is measured is what the model itself computes; the scale is the power of two next to their ratio."""
    plain = source(tmp_path / "plain", kind)
    weights = load_file(plain / "model.safetensors")
    for name in weights:  # a core that adds much to a small e
        if name.startswith("model.layers.3.") and name.endswith("mlp.proj.weight"):
            weights[name] *= 300
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    made = convert(plain, tmp_path / "made", prelude=prelude, core=5 - prelude, coda=0, say=said.append)
    loaded = folder.load(made)
    model = loaded.denoiser.model
    text = torch.tensor([loaded.tokenizer.encode(state_size.TEXT)[:64]])
    with torch.no_grad():
        ctx = model.context(text)
        e = model.encode(text, ctx)
        state = model.core(model.initial_state(e), e, None, ctx)
    of_e, of_state = (float(x.square().mean().sqrt()) for x in (e, state))
    scale = folder.load_config(made).model.loop.injection_state_scale  # type: ignore[union-attr]
    assert scale == 2.0 ** round(math.log2(of_e / of_state)) < 0.1
    assert said == [
        f"state scale of the injection {scale:g}: the root mean square of e is {of_e:.3g}, that of the state "
        f"{of_state:.3g}"
    ]
    assert said[0][1:] in (made / "README.md").read_text()
    assert torch.equal(rdlm.load(made).logits(ids(), 1)[1], rdlm.load(plain).logits(ids())[1])


def test_a_scale_may_be_given_and_no_tokenizer_is_needed(tmp_path: Path) -> None:
    plain = source(tmp_path / "plain")
    given = convert(plain, tmp_path / "given", prelude=1, core=3, coda=1, state_scale=0.3)
    assert folder.load_config(given).model.loop.injection_state_scale == 0.3  # type: ignore[union-attr]
    shutil.rmtree(plain / "tokenizer")
    said: list[str] = []
    convert(plain, tmp_path / "ids", prelude=1, core=3, coda=1, say=said.append)
    assert "root mean square" in said[0]
    made = convert(plain, tmp_path / "none", prelude=1, core=3, coda=1, injection="none")
    assert folder.load_config(made).model.loop.injection_state_scale == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(("e", "state"), [(0.0, 1.0), (1.0, 0.0), (1.0, math.inf), (math.nan, 1.0)])
def test_sizes_that_say_nothing_scale_nothing(e: float, state: float) -> None:
    assert state_size.balancing_scale(e, state) == 1


def test_looping_without_training_is_running_the_middle_layers_again(tmp_path: Path) -> None:
    """none at K = 2 is the plain transformer whose middle layers stand there twice."""
    plain = source(tmp_path / "plain")
    made = convert(plain, tmp_path / "made", prelude=1, core=3, coda=1, injection="none")
    unrolled, order = tmp_path / "unrolled", [0, 1, 2, 3, 1, 2, 3, 4]
    unrolled.mkdir()
    config = json.loads((plain / "config.json").read_text())
    config["model"]["loop"]["num_core_layers"] = len(order)
    (unrolled / "config.json").write_text(json.dumps(config))
    weights = load_file(plain / "model.safetensors")
    rest = {name: weight for name, weight in weights.items() if ".layers." not in name}
    again = {
        f"model.layers.{i}.{name.split('.', 3)[3]}": weight.clone()
        for i, layer in enumerate(order)
        for name, weight in weights.items()
        if name.startswith(f"model.layers.{layer}.")
    }
    save_file({**rest, **again}, unrolled / "model.safetensors")
    assert torch.equal(rdlm.load(made).logits(ids(), 2)[2], rdlm.load(unrolled).logits(ids())[1])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, [0, 2, 3, 4]),  # what is left out stands between prelude and core
        ({"keep_layers": [1, 0, 2, 4]}, [1, 0, 2, 4]),
    ],
)
def test_layers_that_are_kept_are_the_sources(tmp_path: Path, given: Any, kept: list[int]) -> None:
    plain = source(tmp_path / "plain")
    made = convert(plain, tmp_path / "made", prelude=1, core=2, coda=1, **given)
    before, after = load_file(plain / "model.safetensors"), load_file(made / "model.safetensors")
    for layer, place in zip(kept, ("prelude.0", "core_block.0", "core_block.1", "coda.0"), strict=True):
        ours = [name for name in after if name.startswith(f"model.{place}.")]
        assert len(ours) == sum(name.startswith("model.layers.0.") for name in before)
        for name in ours:
            assert torch.equal(after[name], before[name.replace(f"model.{place}.", f"model.layers.{layer}.")])


def test_tinyllama_4_8_4_keeps_the_layers_of_the_published_retrofit(tmp_path: Path) -> None:
    plain = source(tmp_path / "plain", model={**plain_model("own"), "num_layers": 22})
    made = convert(plain, tmp_path / "made", prelude=4, core=8, coda=4)
    card = (made / "README.md").read_text()
    assert "prelude 0, 1, 2, 3; core 10, 11, 12, 13, 14, 15, 16, 17; coda 18, 19, 20, 21" in card
    assert "Layers left out: 4, 5, 6, 7, 8, 9;" in card and "from `plain`" in card


def test_tokenizer_generation_config_dtype_and_options_come_along(tmp_path: Path) -> None:
    plain = source(tmp_path / "plain", dtype=torch.bfloat16)
    made = convert(plain, tmp_path / "made", prelude=1, core=3, coda=1, num_steps=4, max_steps=16, name="x")
    for file in ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "generation_config.json"):
        assert (made / file).read_bytes() == (plain / file).read_bytes()
    assert {weight.dtype for weight in load_file(made / "model.safetensors").values()} == {torch.bfloat16}
    config = folder.load_config(made)
    assert (config.name, config.default_steps, config.max_steps) == ("x", 4, 16)
    assert config.objective.name == "next_token" and config.objective.k_meaning == "thinking"


def test_the_command_converts_and_other_commands_read_the_result(tmp_path: Path, capsys: Any) -> None:
    plain = source(tmp_path / "plain")
    made = tmp_path / "made"
    split = ["--prelude", "1", "--core", "2", "--coda", "1", "--keep-layers", "0,2-4", "--injection", "none"]
    assert run(app, ["convert", str(plain), str(made), *split, "--num-steps", "2"], "rdlm") == 0
    assert run(app, ["inspect", str(made)], "rdlm") == 0
    assert "1 prelude, 2 core, 1 coda layers; state embedding, injection none" in capsys.readouterr().out
    save_file({"input_ids": ids()}, tmp_path / "in.safetensors")
    asked = [
        str(tmp_path / "in.safetensors"),
        "--num-steps",
        "1,4",
        "--out",
        str(tmp_path / "out.safetensors"),
    ]
    assert run(app, ["logits", str(made), *asked], "rdlm") == 0
    assert set(load_file(tmp_path / "out.safetensors")) == {"logits_K1", "logits_K4"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"core": 5}, "7 layers are needed, the source has 5"),
        ({"keep_layers": [0, 1]}, "names 2 layers"),
        ({"keep_layers": [0, 1, 2, 3, 5]}, "the source has 5 layers"),
        ({"keep_layers": [0, 1, 2, 3, 3]}, "named twice"),
        ({"num_steps": 8, "max_steps": 4}, "exceeds max_steps"),
        ({"state_scale": 0.0}, "--state-scale"),
        ({"state_scale": 0.5, "injection": "none"}, "does not scale the state"),
        ({"name": "a b"}, "name"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    plain = source(tmp_path / "plain")
    with pytest.raises(UserError, match=words):
        convert(plain, tmp_path / "made", **{"prelude": 1, "core": 3, "coda": 1, **options})
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("model", "objective", "words"),
    [
        ({"family": "huginn", "num_prelude_layers": 1}, "bptt", "recurrent already"),
        ({"family": "masked", "num_layers": 2, "noise_conditioning": True}, "masked", "no next token"),
        ({"family": "llama", "num_layers": 2, "noise_conditioning": True}, "evidence", "on noise"),
        ({"family": "vit", "num_layers": 2}, "classify", "images"),
    ],
)
def test_what_is_no_plain_transformer_is_refused(
    tmp_path: Path, model: dict[str, Any], objective: str, words: str
) -> None:
    text = {"vocab_size": 64, "max_seq_len": 16}
    image = {"image_size": 8, "patch_size": 4, "num_classes": 2}
    shape = {"d_model": 16, "num_heads": 2, "mlp_width": 16, **(image if model["family"] == "vit" else text)}
    config = CheckpointConfig.model_validate(
        {"name": "x", "model": {**shape, **model}, "objective": objective}
    )
    folder.save(tmp_path / "plain", build(config, seed=0), config, None)
    with pytest.raises(UserError, match=words):
        convert(tmp_path / "plain", tmp_path / "made", prelude=0, core=2, coda=0)


def test_an_existing_folder_stays_without_force(tmp_path: Path) -> None:
    plain = source(tmp_path / "plain")
    with pytest.raises(UserError, match="would replace the source"):
        convert(plain, plain, prelude=1, core=3, coda=1, force=True)
    made = convert(plain, tmp_path / "made", prelude=1, core=3, coda=1)
    with pytest.raises(UserError, match="holds something already"):
        convert(plain, made, prelude=0, core=5, coda=0)
    convert(plain, made, prelude=0, core=5, coda=0, force=True)
    assert "0 prelude, 5 core" in folder.load_config(made).model.layout().topology()  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["", "1-", "3-1", "a", "1,,2", "-1"])
def test_a_wrong_list_of_layers_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="is not a list of layers"):
        parse_layers(text)


def test_a_list_of_layers_keeps_its_order() -> None:
    assert parse_layers("0-2, 7,5") == [0, 1, 2, 7, 5]
