"""IFM LoopedLM P2: Llama layers 1-2-1 around four kinds of injection. Norm weights are stored as offsets from
1."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rdlm.checkpoints.convert.base import Fields, Importer, Shapes, Source, converted, recurrent, stacked
from rdlm.checkpoints.safetensors_io import Entry
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import RecurrentConfig

PRELUDE_NORM = "huginn_prelude_norm_module.weight"


class LoopedLM(Importer):
    """``config.json`` is {"model": {...}, "tokenizer": {...}}; layers are numbered through."""

    family = "looped_lm"
    title = "IFM LoopedLM P2, e.g. IFM/LoopedLM-P2-huginn-s-fixed-r5"

    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        return isinstance(data.get("model"), dict) and "arch" in data["model"]

    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        fields.ignore("tokenizer")
        model_fields = fields.section("model")
        model_fields.only(
            {
                "arch": "huginn",
                "huginn_hierarchical_state": "none",
                "qknorm": False,
                "apply_attn_gate": False,
                "attn_act_func": "softmax",
                "scale_emb": False,
                "swiglu": True,
                "apply_rmsnorm": True,
                "layernorm_num_groups": 1,
                "norm_affine": True,
                "huginn_state_init": "normal",
            }
        )
        for field in model_fields.data:
            if ("moe" in field or "mova" in field or "expert" in field) and model_fields.get(field):
                raise model_fields.refused(field, "mixtures of experts are not built here")
        if model_fields.get("residual_func", "base") not in ("base", "add"):
            raise model_fields.refused("residual_func", "only base and add are built here")
        injection = self._injection(model_fields)
        exit_norm = model_fields.get("huginn_recurrent_exit_norm", "none")
        if exit_norm not in ("none", "parameterless_rms"):
            raise model_fields.refused("huginn_recurrent_exit_norm", "only parameterless_rms is built here")
        input_norm = model_fields.get("huginn_prelude_norm", "none")
        if input_norm not in ("none", "rms"):
            raise model_fields.refused("huginn_prelude_norm", "only rms is built here")
        width, head_dim = model_fields.number("model_dim"), model_fields.number("head_dim")
        rotated = model_fields.get("rope_head_dim", head_dim)
        document = {
            "origin": "looped_lm",
            "vocab_size": model_fields.number("vocab_size"),
            "d_model": width,
            "max_seq_len": model_fields.number("max_seq_len", 8192),
            "tie_embeddings": False,
            "layer": {
                "norm_eps": model_fields.number("rmsnorm_eps", 1e-6),
                "num_heads": model_fields.number("num_heads"),
                "num_kv_heads": model_fields.get("num_kv_heads", model_fields.number("num_heads")),
                "head_dim": head_dim,
                "rope": {
                    "base": model_fields.number("rope_base"),
                    "num_dims": None if rotated == head_dim else rotated,
                },
                "mlp_width": model_fields.number("ffn_hidden_dim"),
            },
            "loop": {
                "num_prelude_layers": model_fields.number("huginn_prelude_layers"),
                "num_core_layers": model_fields.number("huginn_recurrent_layers"),
                "num_coda_layers": model_fields.number("huginn_coda_layers"),
                "state": "normal",
                "state_std": 1 / math.sqrt(width),
                "state_cut": None,
                "injection": injection,
                "injection_bias": injection == "linear" and "input_injection.adapter.bias" in shapes,
                "input_norm": input_norm == "rms",
                "boundary_norm": "unweighted" if exit_norm == "parameterless_rms" else "none",
            },
        }
        lost = [
            "The published evaluation draws its initial state from a hash of the position; here it is drawn "
            "from the seed."
        ]
        return recurrent(name, document, model_fields.number("loop_times", 5), fields.where), lost

    def _injection(self, fields: Fields) -> str:
        kind, is_orthogonal = (
            fields.get("huginn_input_injection", "diagonal"),
            fields.get("huginn_prelude_orthogonal", False),
        )
        if kind not in ("diagonal", "linear") or (is_orthogonal and kind != "diagonal"):
            raise fields.refused(
                "huginn_input_injection", "only diagonal (plain or orthogonal) and linear are built here"
            )
        return "diagonal_orthogonal" if is_orthogonal else str(kind)

    def tokenizer_folder(self, folder: Path) -> Path:
        return folder / "tokenizer"

    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        model = config.model
        assert isinstance(model, RecurrentConfig)
        loop = model.loop

        def norm(name: str) -> Entry:
            entry = source.take(name)  # stored in fp32: 1 + offset has more digits than the offset
            return converted(entry, entry.shape, lambda offset: offset.float() + 1, "F32")

        found = {
            "model.wte.weight": source.take("embed.weight"),
            "model.lm_head.weight": source.take("output.output.weight"),
            "model.ln_f.weight": norm("output.final_norm.weight"),
        }
        parts = [
            ("prelude", loop.num_prelude_layers),
            ("core_block", loop.num_core_layers),
            ("coda", loop.num_coda_layers),
        ]
        for i, ours in enumerate(f"model.{part}.{n}" for part, count in parts for n in range(count)):
            attn, mlp = f"layers.{i}.attention", f"layers.{i}.nffn"
            qkv = [f"{attn}.{name}.weight" for name in ("wq", "wk", "wv")]
            gate_and_up = [f"{mlp}.fc1.weight", f"{mlp}.fc3.weight"]
            found |= {
                f"{ours}.attn.Wqkv.weight": stacked(source.where, [(n, source.take(n)) for n in qkv]),
                f"{ours}.attn.proj.weight": source.take(f"{attn}.wo.weight"),
                f"{ours}.mlp.fc.weight": stacked(source.where, [(n, source.take(n)) for n in gate_and_up]),
                f"{ours}.mlp.proj.weight": source.take(f"{mlp}.fc2.weight"),
                f"{ours}.norm_1.weight": norm(f"{attn}.norm.weight"),
                f"{ours}.norm_2.weight": norm(f"{mlp}.norm.weight"),
            }
        if loop.input_norm:
            found["model.input_norm.weight"] = norm(PRELUDE_NORM)
        if loop.injection == "linear":
            for kind in ("weight", "bias") if loop.injection_bias else ("weight",):
                found[f"model.adapter.{kind}"] = source.take(f"input_injection.adapter.{kind}")
        else:
            found["model.adapter.A_log"] = source.take("input_injection.A_log")
            found["model.adapter.dt_bias"] = source.take("input_injection.dt_bias")
            found["model.adapter.B.weight"] = source.take("input_injection.input_adapter.weight")
        return found
