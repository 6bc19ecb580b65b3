"""HRM-Text (arXiv 2605.20613), as published and as transformers writes it again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rdlm.checkpoints.convert.base import Fields, Importer, Shapes, Source, adjacent_pairs, imported, rows
from rdlm.checkpoints.convert.decoder import head_dim_of, rope_of
from rdlm.checkpoints.safetensors_io import Entry
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import HrmConfig

STACKS = {"L_module": "low", "H_module": "high"}
DEFAULTS = {
    "H_cycles": 2, "L_cycles": 3, "head_dim": 128, "initializer_range": 0.02, "max_position_embeddings": 2048,
    "prefix_lm": True,
}  # fmt: skip
"""What transformers takes for fields that a config.json leaves out."""


class HrmText(Importer):
    """K is the number of high cycles."""

    family = "hrm"
    title = "HRM-Text, e.g. sapientinc/HRM-Text-1B"

    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        return data.get("model_type") == "hrm_text"

    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        fields.defaults(DEFAULTS)
        heads, low, high = (fields.number(f) for f in ("num_attention_heads", "L_cycles", "H_cycles"))
        fields.only(
            {
                "model_type": "hrm_text",
                "tie_word_embeddings": False,
                "num_key_value_heads": heads,
                "attention_bias": False,
                "mlp_bias": False,
                "hidden_act": "silu",
            }
        )
        count = self._layers(fields, shapes, low, high)
        head_dim = head_dim_of(fields)
        rope = rope_of(fields, head_dim, types=("default",))
        scale = fields.get("embedding_scale")
        if scale is None:
            scale = 1 / fields.number("initializer_range")
        fields.ignore("initializer_range", "L_bp_steps", "L_bp_cycles", "attention_dropout")
        model = {
            "family": "hrm",
            "origin": "hrm-text",
            "vocab_size": fields.number("vocab_size"),
            "d_model": fields.number("hidden_size"),
            "max_seq_len": fields.number("max_position_embeddings"),
            "embed_scale": scale,
            "num_stack_layers": count,
            "num_low_cycles": low,
            "prefix_lm": bool(fields.get("prefix_lm")),
            "layer": {
                "norm_eps": fields.number("rms_norm_eps", 1e-6),
                "norm_weights": False,
                "num_heads": heads,
                "head_dim": head_dim,
                "rope": rope,
                "output_gate": True,
                "mlp_width": fields.number("intermediate_size"),
            },
        }
        lost = []
        if model["prefix_lm"]:
            lost.append(
                "It was trained on prompts whose tokens see each other in both directions: the server reads them "
                "so. Likelihoods of texts are those of reading from left to right."
            )
        return imported(name, model, high, fields.where), lost

    def _layers(self, fields: Fields, shapes: Shapes, low: int, high: int) -> int:
        """Layers of a stack, by the tensors: configs count them in three ways."""
        prefix = "model.L_module.layers."
        count = len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})
        if fields.get("num_layers_per_stack", count) != count:
            raise fields.refused(
                "num_layers_per_stack", f"the file holds {count} layers in each stack", "correct it there"
            )
        if fields.get("num_hidden_layers", count) not in (count, 2 * count, count * high * (low + 1)):
            raise fields.refused(
                "num_hidden_layers", f"the file holds {count} layers in each stack", "correct it there"
            )
        return count

    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        model = config.model
        assert isinstance(model, HrmConfig)
        head_dim, heads = model.layer.head_width(model.d_model), model.layer.num_heads
        dims = None if model.layer.rope is None else model.layer.rope.num_dims
        width = heads * head_dim
        found = {
            "model.wte.weight": source.take("model.embed_tokens.weight"),
            "model.lm_head.weight": source.take("lm_head.weight"),
            "model.low_init.weight": source.take("model.z_L_init"),
        }
        for theirs, ours in (
            (f"model.{stack}.layers.{i}", f"model.{name}.{i}")
            for stack, name in STACKS.items()
            for i in range(model.num_stack_layers)
        ):
            fused = source.take(f"{theirs}.attn.gqkv_proj.weight")  # gate first
            qkv = rows(fused, width, fused.shape[0])
            found |= {
                f"{ours}.attn.output_gate.weight": rows(fused, 0, width),
                f"{ours}.attn.Wqkv.weight": adjacent_pairs(qkv, head_dim, dims, num_heads=2 * heads),
                f"{ours}.attn.proj.weight": source.take(f"{theirs}.attn.o_proj.weight"),
                f"{ours}.mlp.fc.weight": source.take(f"{theirs}.mlp.gate_up_proj.weight"),
                f"{ours}.mlp.proj.weight": source.take(f"{theirs}.mlp.down_proj.weight"),
            }
        return found
