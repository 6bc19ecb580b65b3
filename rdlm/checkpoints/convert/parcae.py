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
DEFAULTS = {
    "injection_type": "diagonal", "n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 4, "n_layers_in_coda": 1,
    "mlp_class_name": "BaseMLP", "nonlin_name": "GELU", "norm_class_name": "LayerNorm", "norm_eps": 1e-5,
    "num_attention_heads": 32, "block_size": 4096, "vocab_size": 50_254, "tie_embeddings": False,
    "mean_recurrence": 32, "recurrent_intermediation_embedding_dimension": 3520, "init_strategy": "scaled",
    "recurrent_embedding_dimension": 1024,
}  # fmt: skip
"""What the published configuration takes for fields that a config.json leaves out."""
FEED_FORWARD: dict[tuple[str, str], dict[str, Any]] = {
    ("BaseMLP", "ReLU2"): {"mlp": "relu2", "mlp_scale": 0.5},
    ("BaseMLP", "GELU"): {"mlp": "gelu"},
    ("GatedMLP", "SiLU"): {"mlp": "swiglu"},
}
"""Class and activation -> LayerConfig."""
PREFIXES = re.compile(r"^(module\.|_orig_mod\.|model\.)+")
PARTS = ("prelude", "core_block", "coda")
TABLE = "transformer.wte.weight"
INJECTIONS = {
    "diagonal": "transformer.adapter.A_log",
    "linear": "transformer.adapter.adapter.weight",
    "add": None,
}
"""Kind -> a tensor that it has."""


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
        fields.defaults(DEFAULTS)
        width, heads = fields.number("n_embd"), fields.number("num_attention_heads")
        fields.only(
            {
                "_class_name": "ParcaeConfig",
                "recurrent_embedding_dimension": width,
                "num_key_value_heads": heads,
                "recurrent_num_attention_heads": heads,
                "bias": False,
                "norm_class_name": "RMSNorm",
                "block_class_name": "TransformerPreNormBlock",
                "mup_model_scaling_factor": 1,
                "center_attention": False,
                "debias_attention": False,
                "use_abacus": False,
            }
        )
        for field in ("clip_qkv", "logit_softcap", "randomize_positions_from"):
            if fields.get(field) is not None:
                raise fields.refused(field, "is not built here")
        if fields.get("init_strategy") not in ("scaled", "scaled-zero", "small", "takase"):
            raise fields.refused("init_strategy", "its scales of embeddings and logits are not built here")
        injection = fields.get("injection_type")
        if injection not in INJECTIONS or (INJECTIONS[injection] or "") not in {"", *shapes}:
            problem = f"only {', '.join(INJECTIONS)} are built here, with their tensors"
            raise fields.refused("injection_type", problem)
        feed_forward = fields.get("mlp_class_name"), fields.get("nonlin_name")
        if feed_forward not in FEED_FORWARD:
            classes = {name for name, _ in FEED_FORWARD}
            field = "nonlin_name" if feed_forward[0] in classes else "mlp_class_name"
            known = "; ".join(" of ".join(reversed(pair)) for pair in FEED_FORWARD)
            raise fields.refused(field, f"only {known} are built here")
        embed_scale = math.sqrt(width) if fields.get("init_strategy") == "takase" else 1.0
        like_init = math.sqrt(2 / (5 * width))
        stds = {"like-init": like_init, "zero": None, "normal": 1.0, "embed": 1 / math.sqrt(width)}
        state = fields.get("state_init", "like-init")
        if state not in stds:
            raise fields.refused("state_init", f"only {', '.join(stds)} are built here")
        rope = fields.section("rope_settings")
        ratio = rope.number("rope_condense_ratio", 1)
        rotations = {
            "base": rope.number("rope_base", 50_000),
            **({} if ratio == 1 else {"scaling": {"factor": ratio}}),
        }
        counts = [
            fields.number(key)
            for key in ("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda")
        ]
        paths = [f"{part}.{i}" for part, count in zip(PARTS, counts, strict=True) for i in range(count)]
        gates = {j for j, path in enumerate(paths) if f"transformer.{path}.attn.ve_gate.weight" in shapes}
        tables = {j for j in range(len(paths)) if f"value_embeds.{j}.weight" in shapes}
        used = sorted(gates & tables)
        inner = fields.number("intermediate_size", 4 * width)
        model = {
            "origin": "parcae",
            "vocab_size": shapes[TABLE][0] if TABLE in shapes else fields.number("padded_vocab_size"),
            "d_model": width,
            "embed_scale": embed_scale,
            "max_seq_len": fields.number("block_size"),
            "tie_embeddings": bool(fields.get("tie_embeddings")),
            "value_embeddings": used,
            "layer": {
                "norm_eps": fields.number("norm_eps"),
                "num_heads": heads,
                "rope": rotations if rope.get("use_rope", True) else None,
                "bias": "qk" if fields.get("qk_bias", False) else "none",
                "qk_norm": "head_unweighted" if fields.get("qk_norm", False) else "none",
                "qk_norm_eps": FP32_EPS,
                "mlp_width": inner,
                **FEED_FORWARD[feed_forward],
            },
            "loop": {
                "num_prelude_layers": counts[0],
                "num_core_layers": counts[1],
                "num_coda_layers": counts[2],
                "state": "zero" if state == "zero" else "normal",
                "state_std": stds[state],
                "state_cut": 3.0 if state == "like-init" else None,
                "state_scale": embed_scale if state == "like-init" else 1.0,
                "injection": injection,
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
        fields.ignore("vocab_size", "padded_vocab_size", "padding_multiple")
        return recurrent(name, model, fields.number("mean_recurrence"), fields.where), lost

    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        model = config.model
        assert isinstance(model, RecurrentConfig)
        loop = model.loop
        found = head_tensors(source, model.tie_embeddings, TABLE)
        counts = (loop.num_prelude_layers, loop.num_core_layers, loop.num_coda_layers)
        paths = [f"{part}.{i}" for part, count in zip(PARTS, counts, strict=True) for i in range(count)]
        for j, path in enumerate(paths):
            theirs, ours = f"transformer.{path}", f"model.{path}"
            qkv = [f"{theirs}.attn.{name}.weight" for name in ("c_q", "c_k", "c_v")]
            found[f"{ours}.attn.Wqkv.weight"] = stacked(source.where, [(n, source.take(n)) for n in qkv])
            found[f"{ours}.attn.proj.weight"] = source.take(f"{theirs}.attn.c_proj.weight")
            for name in ("mlp.fc", "mlp.proj", "norm_1", "norm_2"):
                found[f"{ours}.{name}.weight"] = source.take(f"{theirs}.{name}.weight")
            if model.layer.bias == "qk":
                found[f"{ours}.attn.qk_bias"] = source.take(f"{theirs}.attn.qk_bias")
            gate, table = f"{theirs}.attn.ve_gate.weight", f"value_embeds.{j}.weight"
            if j in model.value_embeddings:
                found[f"{ours}.attn.value_gate.weight"] = source.take(gate)
                found[f"model.value_embeds.{j}.weight"] = source.take(table)
            source.drop(gate, table)
        if loop.input_norm:
            found["model.input_norm.weight"] = source.take("transformer.ln_prelude.weight")
        names = {
            "diagonal": {"A_log": "A_log", "dt_bias": "dt_bias", "B.weight": "B"},
            "linear": {"weight": "adapter.weight"},
        }.get(loop.injection, {})
        return {
            **found,
            **{
                f"model.adapter.{n}": source.take(f"transformer.adapter.{theirs}")
                for n, theirs in names.items()
            },
            "model.readout.weight": source.take("transformer.C.weight"),
            "model.ln_f.weight": source.take("transformer.ln_f.weight"),
        }
