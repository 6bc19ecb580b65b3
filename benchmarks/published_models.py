"""The published models' config.json, by the keys of the golden sets and the sizes that their authors report; no
weights. benchmarks/zoo.py counts memory and work of them, tests/rdlm/test_published_configs.py imports each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rdlm.checkpoints.convert.base import Fields
from rdlm.checkpoints.convert.importers import IMPORTERS
from rdlm.config.checkpoint import CheckpointConfig


def _merged(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Own values over those of the golden config, within sections too; None leaves a field out."""
    merged = {**base}
    for field, value in own.items():
        inner = merged.get(field)
        merged[field] = (
            _merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
        )
    return {field: value for field, value in merged.items() if value is not None}


LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
OURO = {
    "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128,
    "intermediate_size": 5632,
    "vocab_size": 49152, "max_position_embeddings": 65536,
}  # fmt: skip
HUGINN = {
    "n_embd": 5280, "n_heads": 55, "num_key_value_heads": 55, "head_dim": 96, "intermediate_size": 17920, "n_layers": 8,
    "n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 4, "n_layers_in_coda": 2, "vocab_size": 65536,
    "padded_vocab_size": 65536, "block_size": 4096, "mean_recurrence": 32, "mean_backprop_depth": 8,
    "init_values": None,
    "rope_base": 50000.0,
}  # fmt: skip
TINYLLAMA = {
    "n_embd": 2048, "n_heads": 32, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 5632,
    "n_layers_in_prelude": 4, "n_layers_in_recurrent_block": 8, "n_layers_in_coda": 4, "vocab_size": 32000,
    "padded_vocab_size": 32000, "block_size": 2048, "rope_scaling": None, "mean_recurrence": 16,
}  # fmt: skip
LLAMA32 = {
    "n_embd": 2048, "n_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
    "n_layers_in_prelude": 4, "n_layers_in_recurrent_block": 6, "n_layers_in_coda": 4, "vocab_size": 128256,
    "padded_vocab_size": 128256, "block_size": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA3,
    "mean_recurrence": 4,
}  # fmt: skip
OLMO2 = {
    "n_embd": 2048, "n_heads": 16, "num_key_value_heads": 16, "head_dim": 128, "intermediate_size": 8192,
    "n_layers_in_prelude": 4, "n_layers_in_recurrent_block": 6, "n_layers_in_coda": 4, "vocab_size": 100352,
    "padded_vocab_size": 100352, "block_size": 4096, "rope_theta": 500000.0, "rope_scaling": None, "norm_eps": 1e-6,
    "mean_recurrence": 32,
}  # fmt: skip


def parcae(n: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "n_layers_in_prelude": n, "n_layers_in_recurrent_block": n, "n_layers_in_coda": n, "n_embd": width,
        "recurrent_embedding_dimension": width, "intermediate_size": 4 * width,
        "recurrent_intermediation_embedding_dimension": 4 * width, "num_attention_heads": heads,
        "num_key_value_heads": heads, "vocab_size": 32768, "padded_vocab_size": 32768, "block_size": 2048,
    }  # fmt: skip


def looped_lm(width: int, heads: int, kv_heads: int, ffn: int) -> dict[str, Any]:
    return {
        "model": {
            "model_dim": width, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 64, "rope_head_dim": 64,
            "ffn_hidden_dim": ffn, "vocab_size": 64256,
        }
    }  # fmt: skip


NANBEIGE = {
    "hidden_size": 3072, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "kv_channels": 128,
    "intermediate_size": 10752, "vocab_size": 166144, "num_hidden_layers": 22, "max_position_embeddings": 262144,
}  # fmt: skip
HRM = {
    "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 128,
    "intermediate_size": 4096,
    "vocab_size": 151808, "num_hidden_layers": 16, "max_position_embeddings": 4096, "embedding_scale": None,
    "initializer_range": 0.02,
}  # fmt: skip
LOOPFORMER = {
    "n_embd": 2048, "n_head": 32, "n_layer": 3, "intermediate_dim": 5120, "vocab_size": 50304, "block_size": 1024,
}  # fmt: skip
QWEN3 = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "layer_types": ["full_attention"] * 28,
}  # fmt: skip
LOOPUS = {
    "base_config_dict": QWEN3, "encoder_layer_indices": list(range(8)), "reasoning_layer_indices": list(range(8, 20)),
    "decoder_layer_indices": [-20],
}  # fmt: skip
GATE = ("model.early_exit_gate.weight", "lm_head.weight")
OLMO_NAMES = ("transformer.prelude.0.attn.q_norm.weight", "lm_head.weight")
MODELS: dict[str, tuple[str, Mapping[str, Any], tuple[str, ...], float, int]] = {
    "ByteDance/Ouro-1.4B": (
        "ouro",
        {**OURO, "num_hidden_layers": 24, "layer_types": ["full_attention"] * 24},
        GATE,
        1.4,
        4,
    ),
    "ByteDance/Ouro-2.6B": (
        "ouro",
        {**OURO, "num_hidden_layers": 48, "layer_types": ["full_attention"] * 48},
        GATE,
        2.6,
        4,
    ),
    "tomg-group-umd/huginn-0125": ("huginn", HUGINN, ("transformer.prelude.0.norm_3.weight",), 3.5, 32),
    "smcleish/Recurrent-TinyLlama-3T-train-recurrence-16": (
        "retro_llama",
        TINYLLAMA,
        ("lm_head.weight",),
        0.84,
        16,
    ),
    "smcleish/Recurrent-Llama-3.2-train-recurrence-4": ("retro_llama", LLAMA32, ("lm_head.weight",), 1.4, 4),
    "smcleish/Recurrent-OLMo-2-0425-train-recurrence-32": ("retro_olmo", OLMO2, OLMO_NAMES, 1.35, 32),
    "SandyResearch/parcae-140m": ("parcae", parcae(2, 768, 6), (), 0.14, 8),
    "SandyResearch/parcae-370m": ("parcae", parcae(4, 1024, 8), (), 0.37, 8),
    "SandyResearch/parcae-770m": ("parcae", parcae(6, 1280, 10), (), 0.77, 8),
    "SandyResearch/parcae-1.3b": ("parcae", parcae(8, 1536, 12), (), 1.3, 8),
    "IFM/LoopedLM-P2-huginn-s-fixed-r5": ("ifm_p2", looped_lm(1536, 24, 6, 4352), (), 0.3, 5),
    "IFM/LoopedLM-P2-huginn-m-fixed-r5": ("ifm_p2", looped_lm(3072, 48, 12, 8704), (), 0.8, 5),
    "IFM/LoopedLM-P2-huginn-l-fixed-r5": ("ifm_p2", looped_lm(6144, 96, 24, 17408), (), 2.5, 5),
    "IFM/LoopedLM-P2-huginn-s-huginn-linear": ("ifm_p2_linear", looped_lm(1536, 24, 6, 4352), (), 0.3, 5),
    "IFM/LoopedLM-P2-huginn-s-orthoinj": ("ifm_p2_orthoinj", looped_lm(1536, 24, 6, 4352), (), 0.3, 5),
    "IFM/LoopedLM-P2-huginn-s-parcae": (
        "ifm_p2",
        _merged(looped_lm(1536, 24, 6, 4352), {"model": {"huginn_prelude_norm": "rms"}}),
        (),
        0.3,
        5,
    ),
    "Nanbeige/Nanbeige4.2-3B": ("nanbeige", NANBEIGE, ("lm_head.weight",), 4.2, 2),
    "sapientinc/HRM-Text-1B": ("hrm_text", HRM, ("lm_head.weight",), 1.35, 2),
    "armenjeddi/loopformer": ("loopformer", LOOPFORMER, (), 0.25, 8),
    "Thrillcrazyer/Qwen3_1.7B_LoopUS": ("loopus", LOOPUS, ("q_head.0.weight",), 2.0, 6),
}
"""Model -> the golden set whose keys its config has, its own values, telling tensors, 1e9 parameters, trained K."""


def published_config(name: str, golden: Path) -> CheckpointConfig:
    """What an import of the published model has as its config; golden: folder of the golden sets."""
    family, own, tensors, _, _ = MODELS[name]
    data = _merged(json.loads((golden / f"{family}_tiny" / "config.json").read_text()), own)
    importer = next(i for i in IMPORTERS.values() if i.recognises(data, tensors))
    shapes = dict.fromkeys(tensors, (1,)) | _counted(family, data)
    return importer.config(Fields(data, "config.json"), name.rpartition("/")[2], shapes)[0]


def _counted(family: str, data: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes that an importer counts: layers of HRM-Text's stacks, value embeddings (odd layers) and injection of
    Parcae, the gate of LoopUS."""
    if family == "hrm_text":
        return {
            f"model.L_module.layers.{i}.attn.o_proj.weight": (1,) for i in range(data["num_hidden_layers"])
        }
    if family == "loopus":
        return {"reasoning.gate.dt_input_proj.weight": (128, 2048)}
    if family == "parcae":
        n, parts = data["n_layers_in_prelude"], ("prelude", "core_block", "coda")
        odd = [
            (j, f"transformer.{part}.{j % n}") for j, part in ((j, parts[j // n]) for j in range(1, 3 * n, 2))
        ]
        tables = {f"value_embeds.{j}.weight": (32768, data["n_embd"]) for j, _ in odd}
        adapter = {"transformer.adapter.A_log": (data["n_embd"],)}
        return {**adapter, **tables} | {
            f"{layer}.attn.ve_gate.weight": (data["num_attention_heads"], 32) for _, layer in odd
        }
    return {}
