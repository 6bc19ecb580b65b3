"""Parcae (arXiv 2604.12946): diagonal injection, gated value embeddings, half squared ReLU, a matrix between
loop and coda."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from rdlm.checkpoints.convert.base import Fields, Importer, Shapes, Source, recurrent, stacked
from rdlm.checkpoints.convert.decoder import head_tensors
from rdlm.checkpoints.safetensors_io import Entry
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import RecurrentConfig

FP32_EPS = 1.1920928955078125e-07
"""What torch takes for the eps of a norm that is given none."""
PREFIXES = re.compile(r"^(module\.|_orig_mod\.|model\.)+")
PARTS = ("prelude", "core_block", "coda")


class Parcae(Importer):
    """Files are ``config.json`` and safetensors, or a pickled state dict of tensors."""

    family = "parcae"
    title = "Parcae, e.g. SandyResearch/parcae-140m"

    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        return data.get("_class_name") == "ParcaeConfig" or any(
            name.endswith("transformer.adapter.A_log") for name in names
        )

    def tensor_name(self, name: str) -> str:
        return PREFIXES.sub("", name)

    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        width, heads = fields.number("n_embd"), fields.number("num_attention_heads")
        fields.only(
            {
                "_class_name": "ParcaeConfig",
                "injection_type": "diagonal",
                "recurrent_embedding_dimension": width,
                "num_key_value_heads": heads,
                "recurrent_num_attention_heads": heads,
                "qk_bias": False,
                "bias": False,
                "mlp_class_name": "BaseMLP",
                "nonlin_name": "ReLU2",
                "norm_class_name": "RMSNorm",
                "block_class_name": "TransformerPreNormBlock",
                "mup_model_scaling_factor": 1,
                "init_strategy": "scaled-zero",
                "center_attention": False,
                "debias_attention": False,
                "use_abacus": False,
            }
        )
        for field in ("clip_qkv", "logit_softcap", "randomize_positions_from"):
            if fields.get(field) is not None:
                raise fields.refused(field, "is not built here")
        state = fields.get("state_init", "like-init")
        if state not in ("like-init", "zero"):
            raise fields.refused("state_init", "only like-init and zero are built here")
        rope = fields.section("rope_settings")
        rope.only({"rope_condense_ratio": 1})
        counts = [
            fields.number(key)
            for key in ("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda")
        ]
        paths = [f"{part}.{i}" for part, count in zip(PARTS, counts, strict=True) for i in range(count)]
        gates = {j for j, path in enumerate(paths) if f"transformer.{path}.attn.ve_gate.weight" in shapes}
        tables = {j for j in range(len(paths)) if f"value_embeds.{j}.weight" in shapes}
        used = sorted(gates & tables)
        inner = fields.number("intermediate_size")
        model = {
            "origin": "parcae",
            "vocab_size": fields.get("padded_vocab_size") or fields.number("vocab_size"),
            "d_model": width,
            "max_seq_len": fields.number("block_size"),
            "tie_embeddings": bool(fields.get("tie_embeddings", True)),
            "value_embeddings": used,
            "layer": {
                "norm_eps": fields.number("norm_eps"),
                "num_heads": heads,
                "rope": {"base": rope.number("rope_base", 50_000)} if rope.get("use_rope", True) else None,
                "qk_norm": "head_unweighted" if fields.get("qk_norm", False) else "none",
                "qk_norm_eps": FP32_EPS,
                "mlp": "relu2",
                "mlp_width": inner,
                "mlp_scale": 0.5,
            },
            "loop": {
                "num_prelude_layers": counts[0],
                "num_core_layers": counts[1],
                "num_coda_layers": counts[2],
                "state": "normal" if state == "like-init" else "zero",
                "state_std": math.sqrt(2 / (5 * width)) if state == "like-init" else None,
                "injection": "diagonal",
                "input_norm": bool(fields.get("prelude_norm", False)),
                "readout": "linear",
                "core_mlp_width": fields.get("recurrent_intermediation_embedding_dimension", inner),
            },
        }
        if used:
            first = f"transformer.{paths[used[0]]}.attn.ve_gate.weight"
            model["value_gate_width"] = shapes[first][-1]
        lost = [
            f"Layer {j} has a value embedding {'without a gate' if j in tables else 'gate without a table'}; "
            "the reference does not use it."
            for j in sorted(gates ^ tables)
        ]
        fields.ignore("vocab_size", "padding_multiple")
        return recurrent(name, model, fields.number("mean_recurrence"), fields.where), lost

    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        model = config.model
        assert isinstance(model, RecurrentConfig)
        loop = model.loop
        found = head_tensors(source, model.tie_embeddings, "transformer.wte.weight")
        counts = (loop.num_prelude_layers, loop.num_core_layers, loop.num_coda_layers)
        paths = [f"{part}.{i}" for part, count in zip(PARTS, counts, strict=True) for i in range(count)]
        for j, path in enumerate(paths):
            theirs, ours = f"transformer.{path}", f"model.{path}"
            qkv = [f"{theirs}.attn.{name}.weight" for name in ("c_q", "c_k", "c_v")]
            found[f"{ours}.attn.Wqkv.weight"] = stacked(source.where, [(n, source.take(n)) for n in qkv])
            found[f"{ours}.attn.proj.weight"] = source.take(f"{theirs}.attn.c_proj.weight")
            for name in ("mlp.fc", "mlp.proj", "norm_1", "norm_2"):
                found[f"{ours}.{name}.weight"] = source.take(f"{theirs}.{name}.weight")
            gate, table = f"{theirs}.attn.ve_gate.weight", f"value_embeds.{j}.weight"
            if j in model.value_embeddings:
                found[f"{ours}.attn.value_gate.weight"] = source.take(gate)
                found[f"model.value_embeds.{j}.weight"] = source.take(table)
            source.drop(gate, table)
        if loop.input_norm:
            found["model.input_norm.weight"] = source.take("transformer.ln_prelude.weight")
        return {
            **found,
            "model.adapter.A_log": source.take("transformer.adapter.A_log"),
            "model.adapter.dt_bias": source.take("transformer.adapter.dt_bias"),
            "model.adapter.B.weight": source.take("transformer.adapter.B"),
            "model.readout.weight": source.take("transformer.C.weight"),
            "model.ln_f.weight": source.take("transformer.ln_f.weight"),
        }
