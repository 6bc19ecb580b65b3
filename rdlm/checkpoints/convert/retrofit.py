"""Transformers retrofitted with recurrence (arXiv 2511.07384): Llama and OLMo-2 layers in Huginn's files
(``model_type: huginn_raven``).

The three are told apart by the names of their tensors: Huginn has ``norm_3``, the OLMo form ``attn.q_norm``,
the Llama form neither.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import sqrt
from typing import Any, cast

from rdlm.checkpoints.convert.base import (
    Fields,
    Importer,
    Shapes,
    Source,
    adjacent_pairs,
    own_config,
    recurrent,
    split_halves,
)
from rdlm.checkpoints.convert.decoder import head_tensors, rope_of, rope_scaling_of
from rdlm.checkpoints.safetensors_io import Entry
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import RecurrentConfig, RopeConfig

STATES = {"like-init": "normal", "zero": "zero"}
TABLE = "transformer.wte.weight"


class Retrofit(Importer):
    """Prelude, core and coda of layers of a pretrained transformer; no norm between core and coda."""

    family = "retrofit"
    title = "retrofitted recurrence, e.g. smcleish/Recurrent-TinyLlama-3T-train-recurrence-8"

    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        return data.get("model_type") == "huginn_raven" and not any(".norm_3." in name for name in names)

    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        if "rdlm" in fields.data:
            return own_config(fields, self.to_published), []
        fields.only(
            {
                "model_type": "huginn_raven",
                "qk_bias": False,
                "injection_type": "linear",
                "test_time_noise": 0,
                "nonlin_name": "SiLU",
                "mlp_class_name": "GatedMLP",
                "norm_class_name": "RMSNorm_llama",
            }
        )
        if any(".norm_3." in key for key in shapes):
            raise fields.refused("model_type", "layers with four norms are Huginn's", "import it as huginn")
        fields.ignore(  # leftovers of Huginn's config, and what follows from the rest
            "rope_base", "effective_expected_depth", "init_strategy", "n_layers", "block_class_name",
            "tie_word_embeddings", "tie_embeddings", "bias",
            "vocab_size", "padding_multiple", "architecture_class_name", "max_position_embeddings",
        )  # fmt: skip
        mode = fields.get("initial_state_mode", "random")
        if mode not in ("random", "embed-init"):
            raise fields.refused("initial_state_mode", "only random and embed-init are built here")
        is_olmo = any(key.endswith("attn.q_norm.weight") for key in shapes)
        values = fields.section("init_values")
        width = fields.number("n_embd")  # of the scales: as the published class computes them
        embed_scale = values.number("embed_scale", 1.0 if values.data else sqrt(width))
        state = fields.get("state_init", "like-init")
        if state not in STATES:
            raise fields.refused("state_init", f"only {' and '.join(STATES)} are built here")
        is_drawn = state == "like-init" and mode == "random"
        heads = fields.number("n_heads")
        head_dim = int(fields.get("head_dim") or fields.number("n_embd") // heads)
        model = {
            "origin": "retrofit-olmo2" if is_olmo else "retrofit-llama",
            "vocab_size": shapes[TABLE][0] if TABLE in shapes else fields.number("padded_vocab_size"),
            "d_model": width,
            "max_seq_len": fields.number("block_size", fields.get("max_position_embeddings", 4096)),
            "embed_scale": embed_scale,
            "tie_embeddings": "lm_head.weight" not in shapes,
            "layer": {
                "norms": "post" if is_olmo else "pre",
                "qk_norm": "full" if is_olmo else "none",
                "norm_eps": fields.number("norm_eps", 1e-6),
                "num_heads": heads,
                "num_kv_heads": fields.get("num_key_value_heads", heads),
                "head_dim": head_dim,
                "rope": rope_of(fields, head_dim, None, ("default", "llama3", "linear", "yarn")),
                "mlp_width": fields.number("intermediate_size"),
            },
            "loop": {
                "num_prelude_layers": fields.number("n_layers_in_prelude"),
                "num_core_layers": fields.number("n_layers_in_recurrent_block"),
                "num_coda_layers": fields.number("n_layers_in_coda"),
                "state": STATES[state] if mode == "random" else "embedding",
                "state_std": values.number("std", sqrt(2 / (5 * width))) if is_drawn else None,
                "state_scale": embed_scale if is_drawn else 1.0,
                "injection": "linear",
                "injection_bias": "transformer.adapter.bias" in shapes,
            },
            "init": {"adapter": "random"},
        }
        return recurrent(name, model, fields.number("mean_recurrence"), fields.where), []

    def to_published(self, config: CheckpointConfig) -> dict[str, Any]:
        model = cast(RecurrentConfig, config.model)
        layer, loop, depth = model.layer, model.loop, config.recurrence.default_steps
        rope = layer.rope or RopeConfig(base=10_000.0)
        std = (loop.state_std or 0.0) if loop.state == "normal" else 0.0
        states = {ours: theirs for theirs, ours in STATES.items()}
        parent = "OLMo-2-0425" if layer.norms == "post" else "TinyLlama-3T"
        code = f"smcleish/Recurrent-{parent}-train-recurrence-4--raven_"
        return {
            "model_type": "huginn_raven",
            "architectures": ["RavenForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{code}config_minimal.RavenConfig",
                "AutoModelForCausalLM": f"{code}modeling_minimal.RavenForCausalLM",
            },
            "n_embd": model.d_model,
            "n_heads": layer.num_heads,
            "num_key_value_heads": layer.num_kv_heads or layer.num_heads,
            "head_dim": layer.head_width(model.d_model),
            "intermediate_size": layer.mlp_width,
            "n_layers": model.num_layers,
            "n_layers_in_prelude": loop.num_prelude_layers,
            "n_layers_in_recurrent_block": loop.num_core_layers,
            "n_layers_in_coda": loop.num_coda_layers,
            "norm_eps": layer.norm_eps,
            "vocab_size": model.vocab_size,
            "padded_vocab_size": model.vocab_size,
            "padding_multiple": 1,
            "block_size": model.max_seq_len,
            "max_position_embeddings": model.max_seq_len,
            "rope_theta": rope.base,
            "rope_scaling": rope_scaling_of(rope),
            "tie_embeddings": model.tie_embeddings,
            "tie_word_embeddings": model.tie_embeddings,
            "bias": loop.injection_bias,
            "qk_bias": False,
            "injection_type": "linear",
            "initial_state_mode": "embed-init" if loop.state == "embedding" else "random",
            "state_init": "like-init" if loop.state == "embedding" else states.get(loop.state, loop.state),
            "init_values": {"std": std, "embed_scale": model.embed_scale},
            "test_time_noise": 0,
            "nonlin_name": "SiLU",
            "mlp_class_name": "GatedMLP",
            "norm_class_name": "RMSNorm_llama",
            "block_class_name": "SandwichBlock",
            "architecture_class_name": "RecurrentGPT",
            "sampling_scheme": "poisson-lognormal-filling",
            "mean_recurrence": depth,
            "mean_backprop_depth": config.objective.depth_in_training.grad_steps,
        }

    def published_weights(self, found: Mapping[str, Entry], model: RecurrentConfig) -> dict[str, Entry]:
        layer, head_dim = model.layer, model.layer.head_width(model.d_model)
        rotated = layer.num_heads + (layer.num_kv_heads or layer.num_heads)
        weights = {}
        for name, entry in found.items():
            theirs = name.removeprefix("model.")
            if theirs.endswith("attn.Wqkv.weight"):
                entry = split_halves(entry, head_dim, rotated)
            elif theirs.endswith(("q_norm.weight", "k_norm.weight")):
                entry = split_halves(entry, head_dim)
            weights[theirs if theirs.startswith("lm_head") else f"transformer.{theirs}"] = entry
        return weights

    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        model = config.model
        assert isinstance(model, RecurrentConfig)
        layer, loop = model.layer, model.loop
        found = head_tensors(source, model.tie_embeddings, TABLE)
        for kind in ("weight", "bias") if loop.injection_bias else ("weight",):
            found[f"model.adapter.{kind}"] = source.take(f"transformer.adapter.{kind}")
        counts = {
            "prelude": loop.num_prelude_layers,
            "core_block": loop.num_core_layers,
            "coda": loop.num_coda_layers,
        }
        head_dim, rotated = (
            layer.head_width(model.d_model),
            layer.num_heads + (layer.num_kv_heads or layer.num_heads),
        )
        assert layer.rope is not None
        for part in (f"{part}.{i}" for part, count in counts.items() for i in range(count)):
            names = ["attn.proj", "mlp.fc", "mlp.proj", "norm_1", "norm_2"]
            for name in names:
                found[f"model.{part}.{name}.weight"] = source.take(f"transformer.{part}.{name}.weight")
            fused = source.take(f"transformer.{part}.attn.Wqkv.weight")
            found[f"model.{part}.attn.Wqkv.weight"] = adjacent_pairs(
                fused, head_dim, layer.rope.num_dims, num_heads=rotated
            )
            for name in ("q_norm", "k_norm") if layer.qk_norm == "full" else ():
                weight = source.take(f"transformer.{part}.attn.{name}.weight")
                found[f"model.{part}.attn.{name}.weight"] = adjacent_pairs(
                    weight, head_dim, layer.rope.num_dims
                )
        return {**found, "model.ln_f.weight": source.take("transformer.ln_f.weight")}
