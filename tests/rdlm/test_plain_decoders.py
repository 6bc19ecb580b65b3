"""Plain decoders in transformers' layout: an import computes the logits that transformers computes, in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rdlm
from rdlm.checkpoints.convert.hf_export import export_hf
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.errors import UserError
from serve.engine.cpu.modules import use_kernels
from tests.rdlm.test_zoo import in_chunks

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'rdlm[serve]'"
)

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama with scaled rotations and its own head width": (
        "Llama",
        {"rope_parameters": LLAMA3, "head_dim": 16},
    ),
    "smollm2, tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "olmo2": ("Olmo2", {}),
    "llama of odd sizes": (
        "Llama",
        {
            "vocab_size": 97,
            "hidden_size": 45,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 14,
        },
    ),
    "mistral, one key-value head": (
        "Mistral",
        {"sliding_window": None, "num_key_value_heads": 1, "head_dim": 18},
    ),
    "qwen2, scaled": ("Qwen2", {"rope_parameters": LLAMA3, "num_key_value_heads": 1, "num_hidden_layers": 1}),
    "qwen3, tied": ("Qwen3", {"tie_word_embeddings": True, "vocab_size": 97, "head_dim": 10}),
    "olmo2, scaled": ("Olmo2", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-3}),
    "llama with all biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with biases of attention, tied": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama with biases of the feed-forward layer": ("Llama", {"mlp_bias": True, "intermediate_size": 77}),
    "qwen3 with biases": ("Qwen3", {"attention_bias": True, "head_dim": 14}),
    "olmo2 with biases": ("Olmo2", {"attention_bias": True, "num_key_value_heads": 1}),
    "llama, positions divided": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "llama, dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3, yarn, every setting": (
        "Qwen3",
        {
            "head_dim": 22,
            "rope_parameters": {
                **YARN,
                "attention_factor": 1.3,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
                "truncate": False,
            },
        },
    ),
    "llama, yarn, scales of its size": (
        "Llama",
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "rope_theta": 5e5}},
    ),
}


def published(folder: Path, kind: str, settings: dict[str, Any]) -> Any:
    """A random model of transformers, every parameter of it far from its initial value, saved as its library
    saves it."""
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().float()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=rng))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    theirs = published(tmp_path / "theirs", *CASES[case])
    model = rdlm.load(import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours"))
    ids = torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(model.logits(ids)[1], expected, atol=2e-5, rtol=0)
    assert model.config.max_steps == 1
    if theirs.config.rope_parameters["rope_type"] != "dynamic":  # which is no other model than it is without
        again = export_hf(tmp_path / "ours", tmp_path / "again", shard_bytes=1 << 30)
        assert again == type(theirs).__name__
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(back(ids).logits, expected, atol=1e-6, rtol=0)
        import_checkpoint(str(tmp_path / "again"), tmp_path / "back")
        made, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "ours"))
        assert made.keys() == kept.keys() and all(torch.equal(made[name], kept[name]) for name in kept)


@pytest.mark.parametrize("case", ["llama with all biases", "olmo2 with biases", "qwen3, yarn, every setting"])
def test_the_servers_kernels_compute_them_too(tmp_path: Path, case: str) -> None:
    """Prompts in chunks; biases that end within a vector."""
    theirs = published(tmp_path / "theirs", *CASES[case])
    model = rdlm.load(import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours"))
    ids = torch.randint(0, 96, (2, 24))
    if not use_kernels(model.denoiser):
        pytest.skip("needs a C++ compiler")
    with torch.no_grad():
        expected = theirs(ids).logits
    found = in_chunks(SimpleNamespace(model=model, ids=ids), 1, 8)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Llama", {}),
        (
            "Mistral",
            {"num_key_value_heads": 8, "num_attention_heads": 8, "hidden_size": 48, "sliding_window": 4096},
        ),
        ("Qwen2", {"num_key_value_heads": 32, "num_attention_heads": 32, "hidden_size": 64}),
        ("Qwen3", {"num_key_value_heads": 32, "num_attention_heads": 32, "head_dim": 128, "hidden_size": 64}),
        ("Olmo2", {"rms_norm_eps": 1e-5}),
    ],
)
def test_a_field_that_is_left_out_is_that_of_transformers(
    tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    """The class's own values, and then a config.json without them."""
    theirs = published(tmp_path / "theirs", kind, fields)
    file = tmp_path / "theirs" / "config.json"
    left = (
        "rms_norm_eps",
        "sliding_window",
        "tie_word_embeddings",
        "head_dim",
        "hidden_act",
        "rope_parameters",
        "layer_types",
    )
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in left}
    if kind not in ("Llama", "Olmo2"):  # whose default is the number of heads
        del kept["num_key_value_heads"]
    file.write_text(json.dumps(kept))
    again = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(tmp_path / "theirs").float()
    ids = torch.randint(0, 96, (1, 40))
    with torch.no_grad():
        expected = again(ids).logits
        torch.testing.assert_close(expected, theirs(ids).logits)
    model = rdlm.load(import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours"))
    torch.testing.assert_close(model.logits(ids)[1], expected, atol=1e-4, rtol=0)


def test_a_mistral_that_names_no_window_has_the_librarys(tmp_path: Path) -> None:
    published(tmp_path / "theirs", "Mistral", {"max_position_embeddings": 9000})
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    del config["sliding_window"]
    file.write_text(json.dumps(config))
    out = import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    assert rdlm.load(out).config.model.max_seq_len == 4096


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    published(tmp_path / "theirs", "Qwen2", {}).bfloat16().save_pretrained(tmp_path / "theirs")
    made = load_file(import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours") / "model.safetensors")
    assert {weight.dtype for weight in made.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "fields", "word"),
    [
        ("Mistral", {"attention_bias": True}, "attention_bias"),
        ("Qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}},
            "'longrope'",
        ),
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("Llama", {"num_hidden_layers": 4}, "model.layers.3"),
    ],
)
def test_variants_are_refused_by_name(tmp_path: Path, kind: str, fields: dict[str, Any], word: str) -> None:
    published(tmp_path / "theirs", kind, {})
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(UserError) as error:
        import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    assert word in str(error.value)


def test_a_window_ends_the_context(tmp_path: Path) -> None:
    """Up to the window's length the logits are those of transformers' own windowed attention; one more position, at
    which it begins to forget, is refused."""
    theirs = published(tmp_path / "theirs", "Mistral", {"sliding_window": 32})
    out = import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    model = rdlm.load(out)
    assert model.config.model.max_seq_len == 32
    assert "Layers see 32 tokens" in (out / "README.md").read_text()
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        windowed = theirs(ids).logits
        theirs.config.sliding_window = None
        assert not torch.allclose(theirs(ids).logits[:, 32:], windowed[:, 32:], atol=1e-2)
    torch.testing.assert_close(model.logits(ids[:, :32])[1], windowed[:, :32], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="32 positions"):
        model.logits(ids[:, :33])


def test_two_different_copies_of_a_tied_head_are_refused(tmp_path: Path) -> None:
    published(tmp_path / "theirs", "Qwen2", {"tie_word_embeddings": True})
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight.*differs"):
        import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
