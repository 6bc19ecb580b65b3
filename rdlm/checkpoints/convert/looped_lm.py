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
STATES = {"normal": "normal", "zero": "zero", "input": "embedding"}
"""Their name of the initial state -> ours."""
DEFAULTS = {
    "model_dim": 1024, "num_layers": 8, "num_heads": 1, "ffn_hidden_dim": 2048, "vocab_size": -1, "output_size": -1,
    "rmsnorm_eps": 1e-6, "rope_base": 100_000, "swiglu": False, "apply_rmsnorm": False, "loop_times": 1,
    "huginn_prelude_layers": 1, "huginn_coda_layers": 1, "huginn_state_init": "zero",
    "huginn_input_injection": "diagonal", "huginn_ortho_projection_eps": 1e-6,
}  # fmt: skip
"""What the published code takes for fields that a config.json leaves out."""


class LoopedLM(Importer):
    """``config.json`` is {"model": {...}, "tokenizer": {...}}; layers are numbered through."""

    family = "looped_lm"
    title = "IFM LoopedLM P2, e.g. IFM/LoopedLM-P2-huginn-s-fixed-r5"

    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        return isinstance(data.get("model"), dict) and "arch" in data["model"]

    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        fields.ignore("tokenizer")
        model_fields = fields.section("model")
        model_fields.defaults(DEFAULTS)
        model_fields.only(
            {
                "arch": "huginn",
                "huginn_hierarchical_state": "none",
                "qknorm": False,
                "apply_attn_gate": False,
                "attn_act_func": "softmax",
                "scale_emb": False,
                "layernorm_num_groups": 1,
                "norm_affine": True,
                "output_size": -1,
            }
        )
        for field in ("swiglu", "apply_rmsnorm"):
            if model_fields.get(field) is not True:
                raise model_fields.refused(field, "only true is built here")
        for field in model_fields.data:
            if ("moe" in field or "mova" in field or "expert" in field) and model_fields.get(field):
                raise model_fields.refused(field, "mixtures of experts are not built here")
        if model_fields.get("residual_func", "base") not in ("base", "add"):
            raise model_fields.refused("residual_func", "only base and add are built here")
        width, heads = model_fields.number("model_dim"), model_fields.number("num_heads")
        head_dim = model_fields.get("head_dim", width // heads)
        rotated = model_fields.get("rope_head_dim", head_dim)
        num_dims = None if rotated == head_dim else rotated
        vocabulary = model_fields.number("vocab_size")
        if vocabulary < 1:  # the tokenizer's
            vocabulary = shapes.get("embed.weight", (0,))[0]
        document = {
            "origin": "looped_lm",
            "vocab_size": vocabulary,
            "d_model": width,
            "max_seq_len": model_fields.number("max_seq_len", 8192),
            "tie_embeddings": False,
            "layer": {
                "norm_eps": model_fields.number("rmsnorm_eps"),
                "num_heads": heads,
                "num_kv_heads": model_fields.get("num_kv_heads", heads),
                "head_dim": head_dim,
                "rope": {"base": model_fields.number("rope_base"), "num_dims": num_dims} if rotated else None,
                "mlp_width": model_fields.number("ffn_hidden_dim"),
            },
            "loop": self._loop(model_fields, width, shapes),
        }
        return recurrent(name, document, model_fields.number("loop_times"), fields.where), []

    def _loop(self, fields: Fields, width: int, shapes: Shapes) -> dict[str, Any]:
        prelude, coda = fields.number("huginn_prelude_layers"), fields.number("huginn_coda_layers")
        core = fields.get("huginn_recurrent_layers", fields.number("num_layers") - prelude - coda)
        injection = self._injection(fields)
        exit_norm = fields.get("huginn_recurrent_exit_norm", "none")
        if exit_norm not in ("none", "parameterless_rms"):
            raise fields.refused("huginn_recurrent_exit_norm", "only parameterless_rms is built here")
        input_norm = fields.get("huginn_prelude_norm", "none")
        if input_norm not in ("none", "rms"):
            raise fields.refused("huginn_prelude_norm", "only rms is built here")
        state = fields.get("huginn_state_init")
        if state not in STATES:
            raise fields.refused("huginn_state_init", f"only {', '.join(STATES)} are built here")
        is_drawn = state == "normal"
        return {
            "num_prelude_layers": prelude,
            "num_core_layers": core,
            "num_coda_layers": coda,
            "state": STATES[state],
            "state_std": 1 / math.sqrt(width) if is_drawn else None,
            "state_cut": None,
            "state_hash": is_drawn,
            "injection": injection,
            "injection_bias": injection == "linear" and "input_injection.adapter.bias" in shapes,
            "injection_eps": fields.number("huginn_ortho_projection_eps"),
            "input_norm": input_norm == "rms",
            "boundary_norm": "unweighted" if exit_norm == "parameterless_rms" else "none",
        }

    def _injection(self, fields: Fields) -> str:
        kind, is_orthogonal = (
            fields.get("huginn_input_injection"),
            fields.get("huginn_prelude_orthogonal", False),
        )
        if kind not in ("diagonal", "linear", "none") or (is_orthogonal and kind != "diagonal"):
            problem = "only none, diagonal (plain or orthogonal) and linear are built here"
            raise fields.refused("huginn_input_injection", problem)
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
        elif loop.injection != "none":
            found["model.adapter.A_log"] = source.take("input_injection.A_log")
            found["model.adapter.dt_bias"] = source.take("input_injection.dt_bias")
            found["model.adapter.B.weight"] = source.take("input_injection.input_adapter.weight")
        return found
