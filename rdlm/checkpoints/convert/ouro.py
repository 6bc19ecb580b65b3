"""Looped decoders in transformers' layout whose loop is all layers: Ouro (arXiv 2510.25741) and Nanbeige4.2
(arXiv 2607.22083)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

from rdlm.checkpoints.convert.base import Fields, Importer, Shapes, Source, own_config, recurrent
from rdlm.checkpoints.convert.decoder import (
    PRE_NORMS,
    head_dim_of,
    head_tensors,
    is_tied,
    layer_of,
    layer_tensors,
    published_weights,
    refuse_windows,
    rope_of,
    rope_scaling_of,
    size_of,
)
from rdlm.checkpoints.safetensors_io import Entry
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import RecurrentConfig, RopeConfig

OURO_NORMS = {
    "norm_1": "input_layernorm",
    "norm_2": "input_layernorm_2",
    "norm_3": "post_attention_layernorm",
    "norm_4": "post_attention_layernorm_2",
}
DEFAULTS = {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32_768}
"""What the published configuration of Ouro takes for fields that a config.json leaves out."""
NOT_BUILT = (
    "enable_double_loop_split", "loop_middle_layers", "loop_share_kv", "enable_hyper_connection", "enable_mhc",
    "enable_depth_attention", "qk_layernorm", "emb_neighbor_num", "emb_split_num", "insert_ngram_layer_idx",
    "rope_scaling",
)  # fmt: skip
"""Variants that Nanbeige's code has and no release uses."""


class Ouro(Importer):
    """Norms around each branch, the final norm at the end of every loop, a trained exit gate."""

    family = "ouro"
    title = "Ouro, e.g. ByteDance/Ouro-1.4B"

    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        return data.get("model_type") == "ouro"

    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        if "rdlm" in fields.data:
            return own_config(fields, self.to_published), []
        fields.defaults(DEFAULTS)
        fields.only({"model_type": "ouro", "attention_bias": False})
        refuse_windows(fields)
        threshold, step = fields.get("early_exit_threshold"), fields.get("early_exit_step")
        lost = []
        if (threshold is not None and threshold < 1) or step is not None:
            lost.append(
                f"Its config stops early by itself (early_exit_threshold {threshold}, early_exit_step {step}); here "
                f"all K loops run "
                "unless a request asks for an exit criterion."
            )
        model = size_of(
            fields,
            origin="ouro",
            tie_embeddings=is_tied(fields, shapes, False),
            layer=layer_of(fields, norms="sandwich_branch"),
            loop={
                "num_core_layers": fields.number("num_hidden_layers"),
                "state": "embedding",
                "boundary_norm": "weighted",
                "final_norm": False,
                "exit_gate": "linear" if "model.early_exit_gate.weight" in shapes else "none",
            },
        )
        if model["loop"]["exit_gate"] == "none":
            lost.append("The file holds no early_exit_gate: exit criteria that read it are refused.")
        steps = fields.number("total_ut_steps", 4)
        return recurrent(name, model, steps, fields.where, {"gate": threshold}), lost

    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        model = config.model
        assert isinstance(model, RecurrentConfig)
        found = _looped_layers(source, model, OURO_NORMS)
        if model.loop.exit_gate != "none":
            for kind in ("weight", "bias"):
                found[f"model.exit_gate.linear.{kind}"] = source.take(f"model.early_exit_gate.{kind}")
        return found

    def to_published(self, config: CheckpointConfig) -> dict[str, Any]:
        model = cast(RecurrentConfig, config.model)
        layer, code = model.layer, "ByteDance/Ouro-1.4B--"
        rope = layer.rope or RopeConfig(base=10_000.0)
        return {
            "model_type": "ouro",
            "architectures": ["OuroForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{code}configuration_ouro.OuroConfig",
                "AutoModelForCausalLM": f"{code}modeling_ouro.OuroForCausalLM",
            },
            "vocab_size": model.vocab_size,
            "hidden_size": model.d_model,
            "intermediate_size": layer.mlp_width,
            "num_hidden_layers": model.loop.num_core_layers,
            "layer_types": ["full_attention"] * model.loop.num_core_layers,
            "num_attention_heads": layer.num_heads,
            "num_key_value_heads": layer.num_kv_heads or layer.num_heads,
            "head_dim": layer.head_width(model.d_model),
            "hidden_act": "silu",
            "max_position_embeddings": model.max_seq_len,
            "rms_norm_eps": layer.norm_eps,
            "rope_theta": rope.base,
            "rope_scaling": rope_scaling_of(rope),
            "total_ut_steps": config.recurrence.default_steps,
            "early_exit_threshold": config.recurrence.exit_thresholds.get("gate", 1.0),
            "tie_word_embeddings": model.tie_embeddings,
            "use_sliding_window": False,
            "sliding_window": None,
        }

    def published_weights(self, found: Mapping[str, Entry], model: RecurrentConfig) -> dict[str, Entry]:
        weights = published_weights(found, model, "core_block", OURO_NORMS)
        for kind in ("weight", "bias") if model.loop.exit_gate != "none" else ():
            weights[f"model.early_exit_gate.{kind}"] = found[f"model.exit_gate.linear.{kind}"]
        return weights


class Nanbeige(Importer):
    """A Llama whose layers run ``num_loops`` times, with the final norm after each."""

    family = "nanbeige"
    title = "Nanbeige4.2, e.g. Nanbeige/Nanbeige4.2-3B"

    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        return data.get("model_type") == "nanbeige"

    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        fields.only({"model_type": "nanbeige", "attention_bias": False, "pretraining_tp": 1})
        for field in fields.data:
            variant = field in NOT_BUILT or field.startswith("mhc_") or "ngram" in field
            if variant and fields.get(field) not in (None, False, 0, [], {}, ""):
                raise fields.refused(field, "this variant is not built here")
        refuse_windows(fields)
        weights = fields.get("loop_loss_weights", [])
        num_loops = len(weights) + 1 if weights else fields.number("num_loops", 1)
        skips = bool(fields.get("skip_loop_final_norm", False))
        fields.ignore("num_loops", "kv_channels")
        model = size_of(
            fields,
            origin="nanbeige",
            tie_embeddings=is_tied(fields, shapes, False),
            layer=layer_of(fields, rope=rope_of(fields, head_dim_of(fields), types=("default",))),
            loop={
                "num_core_layers": fields.number("num_hidden_layers"),
                "state": "embedding",
                "boundary_norm": "none" if skips else "weighted",
                "final_norm": skips,
            },
        )
        return recurrent(name, model, num_loops, fields.where), []

    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        assert isinstance(config.model, RecurrentConfig)
        return _looped_layers(source, config.model, PRE_NORMS)


def _looped_layers(source: Source, model: RecurrentConfig, norms: Mapping[str, str]) -> dict[str, Entry]:
    found = head_tensors(source, model.tie_embeddings)
    for i in range(model.num_layers):
        ours = f"model.core_block.{i}"
        found |= layer_tensors(source, f"model.layers.{i}", ours, model.layer, model.d_model, norms)
    return {**found, "model.ln_f.weight": source.take("model.norm.weight")}
