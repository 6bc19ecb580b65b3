"""LoopUS (arXiv 2605.11011): a pretrained decoder whose middle layers loop, each step gated by a learned
share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rdlm.checkpoints.convert.base import Fields, Importer, Shapes, Source, recurrent
from rdlm.checkpoints.convert.decoder import (
    KINDS,
    context_of,
    head_tensors,
    layer_tensors,
    plain_layer,
    size_of,
)
from rdlm.checkpoints.safetensors_io import Entry
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import RecurrentConfig

PARTS = {"encoder": "prelude", "reasoning": "core_block", "decoder": "coda"}


class LoopUS(Importer):
    """Layers of the base model by index lists; j counts from 0 within each part."""

    family = "loopus"
    title = "LoopUS, e.g. Thrillcrazyer/Qwen3_1.7B_LoopUS"

    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        return data.get("model_type") == "lds"

    def tensor_name(self, name: str) -> str:
        """Old files say ``plateau`` for ``reasoning``, and keep the wrapper of a parallel module inside."""
        return super().tensor_name(name).replace(".module.", ".").replace("plateau.", "reasoning.", 1)

    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        fields.only({"model_type": "lds", "q_eval_interval": 1, "lma_window": 0})
        fields.defaults({"halting_strategy": "threshold", "q_threshold": 0.9, "N": 6})
        fields.ignore("lma_heads")
        fields.need("base_config_dict")
        base = fields.section("base_config_dict")
        if "num_hidden_layers" not in base.data:  # of a model that reads images too
            base = base.section("text_config")
        kind = base.get("model_type")
        if kind not in KINDS:
            raise base.refused("model_type", f"only {', '.join(KINDS)} are built here as base models")
        base.defaults(KINDS[kind].defaults)
        counts = self._counts(fields, base.number("num_hidden_layers"))
        fields.ignore("hidden_size", "vocab_size")
        gate_in = shapes.get("reasoning.gate.dt_input_proj.weight", (1,))
        model = size_of(
            base,
            origin=f"loopus-{kind}",
            tie_embeddings=False,
            layer=plain_layer(base, kind),
            loop={
                "num_prelude_layers": counts[0],
                "num_core_layers": counts[1],
                "num_coda_layers": counts[2],
                "state": "embedding",
                "step_gate_width": gate_in[0],
                "exit_gate": "norm_linear" if "q_head.0.weight" in shapes else "none",
            },
        )
        model["max_seq_len"], lost = context_of(base, kind, model["max_seq_len"])
        rule, threshold = fields.get("halting_strategy"), fields.get("q_threshold")
        if rule == "convergence":
            threshold = fields.get("convergence_epsilon", 1e-2)
        fields.ignore("convergence_epsilon")
        lost += [
            f"Its halting rule ({rule!r}, threshold {threshold}) is not applied: all K loops run unless a "
            "request asks for "
            "an exit criterion."
        ]
        criterion = {"threshold": "halt", "cdf": "gate"}.get(str(rule))
        own = {} if criterion is None else {criterion: threshold}
        return recurrent(name, model, fields.number("N"), fields.where, own), lost

    def _counts(self, fields: Fields, num_layers: int) -> list[int]:
        """Layers of each part: left out, encoder and decoder have none, and reasoning has all others."""
        counts: dict[str, int | None] = {}
        for part in PARTS:
            field = f"{part}_layer_indices"
            indices = fields.get(field, None if part == "reasoning" else [])
            if indices is not None and not (
                isinstance(indices, list) and all(isinstance(i, int) for i in indices)
            ):
                raise fields.refused(field, "is not a list of layers")
            if indices is not None and len(indices) == 1 and indices[0] < 0:  # [-n]: from n to the last one
                counts[part] = num_layers + indices[0]
            else:
                counts[part] = None if indices is None else len(indices)
        if counts["reasoning"] is None:
            counts["reasoning"] = num_layers - (counts["encoder"] or 0) - (counts["decoder"] or 0)
        return [counts[part] or 0 for part in PARTS]

    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        model = config.model
        assert isinstance(model, RecurrentConfig)
        loop = model.loop
        found = head_tensors(source, False, "encoder.embed_tokens.weight", "decoder.lm_head.weight")
        counts = (loop.num_prelude_layers, loop.num_core_layers, loop.num_coda_layers)
        norms = KINDS[(model.origin or "").removeprefix("loopus-")].norms
        for (theirs, ours), count in zip(PARTS.items(), counts, strict=True):
            for j in range(count):
                found |= layer_tensors(
                    source, f"{theirs}.layers.{j}", f"model.{ours}.{j}", model.layer, model.d_model, norms
                )
        if loop.exit_gate != "none":
            for kind in ("weight", "bias"):
                found[f"model.exit_gate.norm.{kind}"] = source.take(f"q_head.0.{kind}")
                found[f"model.exit_gate.linear.{kind}"] = source.take(f"q_head.1.{kind}")
        return {
            **found,
            "model.step_gate.A_log": source.take("reasoning.gate.A_log"),
            "model.step_gate.dt_in.weight": source.take("reasoning.gate.dt_input_proj.weight"),
            "model.step_gate.dt_out.weight": source.take("reasoning.gate.delta_proj.weight"),
            "model.step_gate.dt_out.bias": source.take("reasoning.gate.delta_proj.bias"),
            "model.ln_f.weight": source.take("decoder.norm.weight"),
        }
