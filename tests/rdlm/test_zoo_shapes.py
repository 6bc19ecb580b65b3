"""Imports of random checkpoints of unusual shapes and storage, in every published layout, through `rdlm logits`,
against the formulas of zoo_reference.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rdlm
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.cli import app, run
from rdlm.errors import UserError
from tests.rdlm import zoo_reference as zoo

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 42, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 77, "rms_norm_eps": 1e-5, "rope_theta": 5e4,
}  # fmt: skip
OURO = {**SIZES, "model_type": "ouro", "total_ut_steps": 3}
NANBEIGE = {**SIZES, "model_type": "nanbeige", "num_loops": 2}
RAVEN: dict[str, Any] = {
    "model_type": "huginn_raven", "n_embd": 60, "n_heads": 3, "intermediate_size": 46, "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 3, "n_layers_in_coda": 2, "norm_eps": 1e-5, "vocab_size": 99,
    "padded_vocab_size": 101, "block_size": 50, "rope_theta": 3e4, "rope_base": 7e3,
    "mean_recurrence": 3, "mean_backprop_depth": 2,
    "sampling_scheme": "poisson-lognormal-filling", "init_values": {"std": 0.3, "embed_scale": 1.0},
}  # fmt: skip
HUGINN = {
    **RAVEN, "qk_bias": True, "tie_embeddings": True, "n_layers": 6,
    "init_values": {"std": (2 / 300) ** 0.5, "embed_scale": 60**0.5},
}  # fmt: skip
PARCAE: dict[str, Any] = {
    "_class_name": "ParcaeConfig", "n_embd": 66, "num_attention_heads": 3, "num_key_value_heads": 3,
    "recurrent_embedding_dimension": 66, "recurrent_intermediation_embedding_dimension": 70, "intermediate_size": 50,
    "n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 3, "n_layers_in_coda": 2, "vocab_size": 99,
    "padded_vocab_size": 101, "norm_eps": 1e-5, "qk_norm": True, "prelude_norm": True, "block_size": 50,
    "mean_recurrence": 3, "mean_backprop_depth": 2, "tie_embeddings": True, "rope_settings": {"rope_base": 9000},
    "norm_class_name": "RMSNorm", "nonlin_name": "ReLU2", "init_strategy": "scaled-zero",
}  # fmt: skip
IFM: dict[str, Any] = {
    "arch": "huginn", "model_dim": 36, "num_heads": 6, "num_kv_heads": 3, "head_dim": 10, "ffn_hidden_dim": 50,
    "vocab_size": 101, "rope_base": 3e4, "rmsnorm_eps": 1e-5, "loop_times": 3, "huginn_prelude_layers": 2,
    "huginn_recurrent_layers": 1, "huginn_coda_layers": 2, "huginn_input_injection": "diagonal",
    "swiglu": True, "apply_rmsnorm": True, "huginn_state_init": "normal",
}  # fmt: skip
LOOPUS: dict[str, Any] = {
    "model_type": "lds", "N": 3, "q_threshold": 0.9, "base_config_dict": {**SIZES, "num_hidden_layers": 4},
    "encoder_layer_indices": [0], "reasoning_layer_indices": [1, 2], "decoder_layer_indices": [3],
}  # fmt: skip
LOOPFORMER: dict[str, Any] = {
    "n_embd": 33, "n_head": 3, "n_layer": 2, "intermediate_dim": 50, "block_size": 40, "vocab_size": 101,
}  # fmt: skip
HRM: dict[str, Any] = {
    "model_type": "hrm_text", "H_cycles": 2, "L_cycles": 2, "head_dim": 14, "hidden_size": 36, "intermediate_size": 50,
    "num_attention_heads": 3, "num_hidden_layers": 1, "rms_norm_eps": 1e-5, "rope_theta": 3e4, "vocab_size": 101,
    "max_position_embeddings": 60, "embedding_scale": 3.0,
}  # fmt: skip


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def loopus(kind: str, **base: Any) -> dict[str, Any]:
    return {**LOOPUS, "base_config_dict": {**LOOPUS["base_config_dict"], "model_type": kind, **base}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ouro, grouped heads": ("ouro", OURO),
    "ouro, tied, scaled": ("ouro", {**OURO, "tie_word_embeddings": True, "rope_scaling": LLAMA3}),
    "ouro, no head_dim": ("ouro", {**without(OURO, "head_dim"), "num_attention_heads": 3, "num_key_value_heads": 1}),
    "nanbeige": ("nanbeige", NANBEIGE),
    "nanbeige, final norm once": ("nanbeige", {**NANBEIGE, "skip_loop_final_norm": True}),
    "huginn": ("huginn", HUGINN),
    "huginn, fields left out": (
        "huginn",
        without(HUGINN, "qk_bias", "tie_embeddings", "norm_eps", "rope_base", "mean_recurrence", "sampling_scheme"),
    ),
    "huginn, no prelude": ("huginn", {**HUGINN, "n_layers_in_prelude": 0, "n_layers": 5}),
    "huginn, own head, no bias": ("huginn", {**HUGINN, "tie_embeddings": False, "qk_bias": False}),
    "retrofit": ("retro_llama", {**RAVEN, "num_key_value_heads": 1, "head_dim": 16, "rope_scaling": LLAMA3}),
    "retrofit, tied": ("retro_llama", {**RAVEN, "tie_embeddings": True}),
    "retrofit, bias, scale": (
        "retro_llama", {**RAVEN, "bias": True, "init_values": {"std": 0.3, "embed_scale": 1.7}},
    ),
    "retrofit, no coda": ("retro_llama", {**RAVEN, "n_layers_in_coda": 0}),
    "retrofit, positions divided, no init values": (
        "retro_llama", {**without(RAVEN, "init_values"), "rope_scaling": {"type": "linear", "factor": 2.5}},
    ),
    "retrofit of OLMo, core alone": (
        "retro_olmo", {**RAVEN, "n_layers_in_prelude": 0, "n_layers_in_coda": 0, "tie_embeddings": True},
    ),
    "retrofit of OLMo": ("retro_olmo", {**RAVEN, "num_key_value_heads": 1, "head_dim": 16}),
    "parcae": ("parcae", PARCAE),
    "parcae, own head": (
        "parcae", {**PARCAE, "tie_embeddings": False, "qk_norm": False, "prelude_norm": False, "mean_recurrence": 4},
    ),
    "parcae, no rope settings": ("parcae", without(PARCAE, "rope_settings")),
    "parcae, linear injection, bias, plain GELU": (
        "parcae",
        {
            **PARCAE, "injection_type": "linear", "qk_bias": True, "nonlin_name": "GELU",
            "rope_settings": {"rope_condense_ratio": 2},
        },
    ),
    "parcae, added input, gated SiLU, no rotations, scaled embeddings": (
        "parcae",
        {
            **PARCAE, "injection_type": "add", "mlp_class_name": "GatedMLP", "nonlin_name": "SiLU",
            "init_strategy": "takase", "rope_settings": {"use_rope": False},
        },
    ),
    "looped_lm": ("ifm_p2", {"model": IFM}),
    "looped_lm, fields left out": (
        "ifm_p2", {"model": without(IFM, "num_kv_heads", "rope_base", "rmsnorm_eps", "huginn_input_injection")},
    ),
    "looped_lm, no injection, no rotations": (
        "ifm_p2",
        {"model": {**IFM, "huginn_input_injection": "none", "rope_head_dim": 0, "huginn_state_init": "input"}},
    ),
    "looped_lm, orthogonal, its own eps": (
        "ifm_p2_orthoinj",
        {"model": {**IFM, "huginn_prelude_orthogonal": True, "huginn_ortho_projection_eps": 3.0}},
    ),
    "looped_lm, part of a head": ("ifm_p2", {"model": {**IFM, "rope_head_dim": 6, "huginn_prelude_norm": "rms"}}),
    "looped_lm, orthogonal": ("ifm_p2_orthoinj", {"model": {**IFM, "huginn_prelude_orthogonal": True}}),
    "looped_lm, linear": (
        "ifm_p2_linear",
        {"model": {**IFM, "huginn_input_injection": "linear", "huginn_recurrent_exit_norm": "parameterless_rms"}},
    ),
    "loopus of llama": ("loopus", loopus("llama")),
    "loopus of qwen2": ("loopus", loopus("qwen2")),
    "loopus of qwen3": ("loopus", {**loopus("qwen3"), "decoder_layer_indices": [-3]}),
    "loopus of llama with biases": (
        "loopus",
        {
            **without(loopus("llama", attention_bias=True, mlp_bias=True), "reasoning_layer_indices", "N"),
            "decoder_layer_indices": [-2],
        },
    ),
    "loopus of olmo2": ("loopus", {**loopus("olmo2"), "encoder_layer_indices": []}),
    "loopformer": ("loopformer", LOOPFORMER),
    "loopformer with biases, other names": (
        "loopformer",
        {
            **without(LOOPFORMER, "n_embd", "n_head", "n_layer", "intermediate_dim", "block_size"), "bias": True,
            "model_type": "gpt_looped", "hidden_size": 33, "num_attention_heads": 3, "num_hidden_layers": 2,
            "n_positions": 40,
        },
    ),
    "hrm_text": ("hrm_text", HRM),
    "hrm_text, no scale": (
        "hrm_text", {**without(HRM, "embedding_scale"), "initializer_range": 0.1, "num_hidden_layers": 4},
    ),
    "hrm_text, fields left out": (
        "hrm_text", without(HRM, "H_cycles", "L_cycles", "head_dim", "rms_norm_eps", "rope_theta"),
    ),
}  # fmt: skip


DEFAULTS = {  # of the published code, where a config.json leaves a field out
    "huginn": {"qk_bias": True, "tie_embeddings": True, "norm_eps": 1e-6, "rope_base": 50_000},
    "hrm_text": {"L_cycles": 3, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
    "retro_llama": {"init_values": {"embed_scale": 60**0.5}},
    "loopus": {"reasoning_layer_indices": [1]},
    "loopformer": {"n_embd": 33, "n_head": 3, "n_layer": 2, "intermediate_dim": 132, "block_size": 40},
}
IFM_DEFAULTS = {
    "num_kv_heads": 6, "rope_base": 100_000, "rmsnorm_eps": 1e-6, "huginn_input_injection": "diagonal",
}  # fmt: skip


def tensors_of(family: str, c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    match family:
        case "ouro":
            return zoo.decoder_tensors(c, "ouro", gate=True)
        case "nanbeige":
            return zoo.decoder_tensors(c, "llama")
        case "huginn" | "retro_llama" | "retro_olmo":
            return zoo.raven_tensors(c, family)
        case "parcae":
            return zoo.parcae_tensors(c)
        case "loopus":
            return zoo.loopus_tensors(c)
        case "loopformer":
            return zoo.loopformer_tensors(c)
        case "hrm_text":
            return zoo.hrm_tensors(c, 2 if c["num_hidden_layers"] == 4 else c["num_hidden_layers"])
    return zoo.looped_lm_tensors(c)


def checked(tmp_path: Path, source: Path, family: str, config: dict[str, Any], weights: zoo.Weights) -> None:
    """`rdlm import` and `rdlm logits` give the formula's logits from zero and given states, and of a prefix."""
    out = tmp_path / "model"
    import_checkpoint(str(source), out)
    ids = torch.randint(0, 101, (2, 31), generator=torch.Generator().manual_seed(1))
    width = next(v.shape[1] for n, v in weights.items() if v.shape[:1] == (101,) and "value" not in n)
    from_input = config.get("model", {}).get("huginn_state_init") == "input"
    draws = (
        not from_input
        and family in ("huginn", "retro_llama", "retro_olmo", "parcae")
        or family.startswith("ifm")
        and not from_input
    )
    given = {"input_states": torch.randn(2, 31, width)} if draws else {}
    prefix = {"token_type_ids": (torch.arange(31) < torch.tensor([[9], [20]])).long()}
    runs: list[tuple[list[str], dict[str, torch.Tensor]]] = [(["--zero-state"], {}), ([], given)]
    for flags, more in [*runs, ([], prefix)] if family == "hrm_text" else runs:
        save_file({"input_ids": ids, **more}, tmp_path / "in.safetensors")
        command = ["logits", str(out), str(tmp_path / "in.safetensors"), "--num-steps", "1,3"]
        assert run(app, [*command, "--out", str(tmp_path / "out.safetensors"), *flags], "rdlm") == 0
        found = load_file(tmp_path / "out.safetensors")
        state = more.get("input_states", torch.zeros(2, 31, width))
        for k in (1, 3):
            expected = zoo.LOGITS[family](
                weights, config, ids, k, state=state, types=more.get("token_type_ids")
            )
            torch.testing.assert_close(found[f"logits_K{k}"], expected, atol=1e-4, rtol=0)
            assert expected.std() > 0.2


@pytest.mark.parametrize("case", CASES)
def test_logits_of_other_shapes(tmp_path: Path, case: str) -> None:
    family, written = CASES[case]
    config = {**DEFAULTS.get(family, {}), **written}
    if family.startswith("ifm"):
        config = {"model": {**IFM_DEFAULTS, **config["model"]}}
    weights = zoo.drawn(tensors_of(family, config), seed=3, offsets=family.startswith("ifm"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(written))
    save_file(weights, source / "model.safetensors")
    checked(tmp_path, source, family, config, weights)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("ouro, grouped heads", torch.bfloat16),
        ("retrofit", torch.float16),
        ("parcae, own head", torch.bfloat16),
        ("looped_lm", torch.float16),
        ("hrm_text", torch.bfloat16),
        ("loopus of qwen3", torch.bfloat16),
    ],
)
def test_shards_of_half_precision_wrapped_names_and_buffers(
    tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    """Weights keep their dtype and are computed with in fp32; tables of rotations in a file are left out."""
    family, config = CASES[case]
    weights = zoo.drawn(tensors_of(family, config), seed=4, offsets=family.startswith("ifm"))
    weights = {name: value.to(dtype) for name, value in weights.items()}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    stored = {f"module._orig_mod.{name}": value for name, value in weights.items()}
    stored |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5), "freqs_cis": torch.ones(1, 3)}
    where = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(stored)}
    for file in set(where.values()):
        save_file({name: stored[name] for name in stored if where[name] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    checked(tmp_path, source, family, config, {name: value.float() for name, value in weights.items()})
    made = load_file(tmp_path / "model" / "model.safetensors")
    kept = {value.dtype for name, value in made.items() if value.dim() > 1}
    assert kept == {dtype}


def test_pickled_shards_and_a_state_dict_under_another_name(tmp_path: Path) -> None:
    """As transformers wrote large models before safetensors, and as LoopUS' code writes its own."""
    weights = zoo.drawn(tensors_of("ouro", OURO), seed=5)
    shards = tmp_path / "shards"
    shards.mkdir()
    where = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(weights)}
    for file in set(where.values()):
        torch.save({name: weights[name] for name in weights if where[name] == file}, shards / file)
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (shards / "config.json").write_text(json.dumps(OURO))
    checked(tmp_path, shards, "ouro", OURO, weights)
    family, config = CASES["loopus of qwen3"]
    weights = zoo.drawn(tensors_of(family, config), seed=5)
    old = tmp_path / "old"
    old.mkdir()
    torch.save(
        {n.replace("reasoning.", "plateau."): v for n, v in weights.items()}, old / "combined_model.pt"
    )
    (old / "config.json").write_text(json.dumps(config))
    (tmp_path / "second").mkdir()
    checked(tmp_path / "second", old, family, config, weights)


@pytest.mark.parametrize("content", [[torch.ones(2)], 3, None])
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OURO))
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a file of tensors alone"):
        import_checkpoint(str(tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    "case", ["ouro, grouped heads", "huginn", "retrofit", "parcae", "looped_lm", "loopformer"]
)
def test_an_import_takes_k_far_beyond_its_training(tmp_path: Path, case: str) -> None:
    """K = 64 of models that were trained at three; the largest K is no matter of the family."""
    family, written = CASES[case]
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(written))
    offsets = family.startswith("ifm")
    save_file(zoo.drawn(tensors_of(family, written), seed=3, offsets=offsets), source / "model.safetensors")
    model = rdlm.load(import_checkpoint(str(source), tmp_path / "model"))
    found = model.logits(torch.arange(5)[None], [1, 64], zero_state=True)
    assert model.config.default_steps < 10 and found[64].isfinite().all()
