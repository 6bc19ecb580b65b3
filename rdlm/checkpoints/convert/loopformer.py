"""LoopFormer (arXiv 2602.11451)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from rdlm.checkpoints.convert.base import Fields, Importer, Shapes, Source, imported
from rdlm.checkpoints.convert.decoder import head_tensors
from rdlm.checkpoints.convert.parcae import FP32_EPS
from rdlm.checkpoints.safetensors_io import Entry
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import LoopFormerConfig

TABLE = "transformer.wte.weight"
PREFIXES = re.compile(r"^(gpt\.|model\.|module\.|_orig_mod\.)+")
OTHERS = ("base", "base_loop", "tmlt")
"""Models of the same repository without steps of given length."""
ALIASES = {
    "block_size": ("n_positions", "max_position_embeddings"),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_embd": ("hidden_size",),
    "intermediate_dim": ("n_inner",),
}
"""Field -> the names that the published loader takes in its place."""
MASK = re.compile(r"\.attn\.(bias|masked_bias)$")
"""The causal mask, which some files keep as a buffer; the model has no bias there."""


class LoopFormer(Importer):
    """K steps of length 1 / K each unless a call gives their lengths."""

    family = "loopformer"
    title = "LoopFormer, e.g. of the collection armenjeddi/loopformer"

    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        return data.get("model_type") == "loopformer" or any(".adaLN_modulation." in name for name in names)

    def tensor_name(self, name: str) -> str:
        return PREFIXES.sub("", name)

    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        kind, sizes_steps = fields.get("model_type"), any(name.startswith("dt_embedder.") for name in shapes)
        if kind in OTHERS or not (kind == "loopformer" or sizes_steps):
            raise fields.refused(
                "model_type", "is another model of the same repository", "import a loopformer"
            )
        for field, others in ALIASES.items():  # hub files may have the names of transformers
            known = [other for other in others if fields.get(field) is None and fields.get(other) is not None]
            if known:
                fields.data = {**fields.data, field: fields.data[known[0]]}
        fields.ignore("dropout", "resid_pdrop")
        has_bias = bool(fields.get("bias", False))
        model = {
            "family": "loopformer",
            "origin": "loopformer",
            "vocab_size": fields.number("vocab_size"),
            "d_model": fields.number("n_embd"),
            "max_seq_len": fields.number("block_size"),
            "num_layers": fields.number("n_layer"),
            "layer": {
                "norm_eps": FP32_EPS,
                "norm_weights": False,
                "num_heads": fields.number("n_head"),
                "mlp": "gelu",
                "mlp_width": fields.number("intermediate_dim", 4 * fields.number("n_embd")),
                "bias": "qkvo" if has_bias else "none",
                "mlp_bias": has_bias,
            },
        }
        return imported(name, model, 8, fields.where), []

    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        model = config.model
        assert isinstance(model, LoopFormerConfig)
        found = head_tensors(source, True, TABLE)
        source.drop(*(name for name in source.entries if MASK.search(name)))
        for i in range(model.num_layers):
            theirs, ours = f"transformer.h.blocks.{i}", f"model.core_block.{i}"
            for kind in ("weight", "bias") if model.layer.mlp_bias else ("weight",):
                for a, b in (("c_attn", "Wqkv"), ("c_proj", "proj")):
                    found[f"{ours}.attn.{b}.{kind}"] = source.take(f"{theirs}.attn.{a}.{kind}")
                for a, b in (("c_fc", "fc"), ("c_proj", "proj")):
                    found[f"{ours}.mlp.{b}.{kind}"] = source.take(f"{theirs}.mlp.{a}.{kind}")
            for kind in ("weight", "bias"):
                found[f"model.modulation.{i}.{kind}"] = source.take(f"{theirs}.adaLN_modulation.1.{kind}")
        for a, b in (("time", "time"), ("dt", "length")):
            for number, layer in ((0, "fc_1"), (2, "fc_2")):
                for kind in ("weight", "bias"):
                    found[f"model.{b}.{layer}.{kind}"] = source.take(f"{a}_embedder.mlp.{number}.{kind}")
        found["model.wpe.weight"] = source.take("transformer.wpe.weight")
        return {**found, "model.ln_f.weight": source.take("transformer.norm_f.weight")}
