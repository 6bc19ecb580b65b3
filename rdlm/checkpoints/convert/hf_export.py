"""Checkpoints of text models as folders that transformers loads offline, and back.

A plain transformer becomes a model of one of transformers' own classes (rdlm/checkpoints/convert/decoder.py).
Every other one keeps its tensors, byte by byte under their names here, and takes its modelling code along
(hf_modeling/modeling_rdlm.py, copied as data).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints.convert import decoder
from rdlm.checkpoints.convert.base import (
    Fields,
    Importer,
    Shapes,
    Source,
    check_out,
    own_config,
    widest_dtype,
    write_published,
)
from rdlm.checkpoints.convert.unroll import read_checkpoint
from rdlm.checkpoints.safetensors_io import Entry
from rdlm.config.base import Strict
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import (
    HrmConfig,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    LoopConfig,
    LoopFormerConfig,
    RecurrentConfig,
    RopeConfig,
    YarnScaling,
)
from rdlm.errors import UserError
from rdlm.objectives.evidence import Evidence
from rdlm.registry import build

MODELING = "modeling_rdlm.py"
MODEL_TYPE, ARCHITECTURE = "rdlm", "RdlmForCausalLM"
COMPUTED: dict[type[Strict], set[str]] = {
    RecurrentConfig: {
        "family", "origin", "vocab_size", "d_model", "max_seq_len", "tie_embeddings", "embed_scale",
        "value_embeddings", "value_gate_width",
        "layer", "loop", "init", "noise_conditioning", "noise_embed_dim",
    },
    HrmConfig: {
        "family", "origin", "vocab_size", "d_model", "max_seq_len", "embed_scale", "num_stack_layers",
        "num_low_cycles", "layer", "prefix_lm",
        "noise_conditioning",
    },
    LoopFormerConfig: {
        "family", "origin", "vocab_size", "d_model", "max_seq_len", "num_layers", "tie_embeddings", "layer",
        "noise_conditioning",
    },
    LayerConfig: {
        "norms", "norm_eps", "norm_weights", "num_heads", "num_kv_heads", "head_dim", "rope", "qk_norm",
        "qk_norm_eps", "bias", "output_gate",
        "mlp", "mlp_width", "mlp_bias", "mlp_scale",
    },
    RopeConfig: {"base", "num_dims", "scaling"},
    **{kind: set(kind.model_fields) for kind in (Llama3Scaling, LinearScaling, YarnScaling)},
    LoopConfig: {
        "num_prelude_layers", "num_core_layers", "num_coda_layers", "iterates", "state", "state_std",
        "state_cut", "state_scale", "state_hash", "injection", "injection_eps",
        "injection_bias", "injection_state_scale", "input_norm", "boundary_norm", "step_gate_width",
        "readout", "final_norm", "exit_gate",
        "core_mlp_width",
    },
}  # fmt: skip
"""Fields that the modelling code computes or that change nothing at inference; any other one must have its
default value."""


def export_hf(
    folder: Path, out: Path, *, shard_bytes: int, unroll: int | None = None, force: bool = False
) -> str:
    """Write ``out`` from a checkpoint folder, weights in shards of at most ``shard_bytes``. Returns the class
    that loads it. unroll: the K at which a loop is written as plain layers, see unroll.py.

    UserError, before anything is written, where transformers has no place for the model.
    """
    check_out(out, folder, force)
    check_exportable(checkpoint.load_config(folder))
    config, found, tokenizer = read_checkpoint(folder, unroll, "`rdlm export hf`")
    ends = (None, None) if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id)
    about = {
        "dtype": widest_dtype(found),
        "bos_token_id": ends[0],
        "eos_token_id": ends[1],
        "pad_token_id": None,
        "rdlm": config.model_dump(mode="json"),
    }
    kind = decoder.kind_of(config)
    if unroll is not None and kind is None:
        problem = "transformers has no plain decoder with such layers"
        raise UserError("--unroll", unroll, problem, "leave it out: the loop is exported as it is")
    if kind is not None:
        architecture, code = decoder.KINDS[kind].architecture, {}
        published = {**decoder.to_published(config, kind), "architectures": [architecture], **about}
        weights = decoder.published_weights(found, cast(RecurrentConfig, config.model.layout()))  # type: ignore[union-attr]
    else:
        architecture, weights = ARCHITECTURE, dict(found)
        code = {MODELING: (Path(__file__).parent / "hf_modeling" / MODELING).read_text(encoding="utf-8")}
        module = MODELING.removesuffix(".py")
        auto_map = {"AutoConfig": f"{module}.RdlmConfig", "AutoModelForCausalLM": f"{module}.{ARCHITECTURE}"}
        published = {**to_published(config), "architectures": [architecture], "auto_map": auto_map, **about}
    card = _card(config, kind, has_tokenizer=tokenizer is not None)
    files = {**code, checkpoint.CARD: card}
    write_published(out, folder, published, weights, tokenizer, shard_bytes, files)
    return architecture


def check_exportable(config: CheckpointConfig) -> None:
    """UserError for models without a next token, networks of several blocks, and settings that the modelling
    code does not compute."""
    config.check_next_token("`rdlm export hf`")
    config.check_whole()
    if config.blocks is not None and config.blocks.num_blocks > 1:
        problem = "transformers' generation runs one network, and each block is one of its own"
        remedy = "use `rdlm serve` or `rdlm generate`"
        raise UserError("blocks.num_blocks", config.blocks.num_blocks, problem, remedy)
    model = config.model.layout()  # type: ignore[union-attr]
    if type(model) not in COMPUTED:
        problem = "the modelling code of `rdlm export hf` has no such network"
        raise UserError("model.family", model.family, problem, "use `rdlm serve` or `rdlm generate`")
    _check_computed(model, "model")


def _check_computed(section: Strict, path: str) -> None:
    for field, about in type(section).model_fields.items():
        value = getattr(section, field)
        if type(section) in COMPUTED and field not in COMPUTED[type(section)]:
            if value != about.get_default(call_default_factory=True):
                problem = "the modelling code of `rdlm export hf` does not compute it"
                raise UserError(f"{path}.{field}", value, problem, "use `rdlm serve` or `rdlm generate`")
        elif isinstance(value, Strict):
            _check_computed(value, f"{path}.{field}")


def to_published(config: CheckpointConfig) -> dict[str, Any]:
    """The fields of ``RdlmConfig`` that say what is computed, and those that tools of transformers look
    for."""
    objective = build(config, device="meta")
    model = config.model.layout()  # type: ignore[union-attr]
    thinks = config.objective.k_meaning == "thinking"
    read_out: dict[str, Any] = {}
    if model.noise_conditioning:
        sigma = objective.readout_level if isinstance(objective, Evidence) else None
        read_out["sigma"] = config.noise.sigma_max if sigma is None else sigma
    if getattr(objective, "evidence_scale", None) is not None:
        read_out["has_evidence_scale"] = True
    if config.objective.readout == "edm":
        read_out |= {
            "two_streams": True,
            "context_sigma": config.noise.sigma_max,
            "edm_sigma_data": config.noise.sigma_data,
        }
        read_out.setdefault("sigma", config.noise.sigma_max)
    return {
        "model_type": MODEL_TYPE,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": objective.model.num_cache_layers,
        "num_attention_heads": model.layer.num_heads,
        "num_key_value_heads": model.layer.num_kv_heads or model.layer.num_heads,
        "head_dim": model.layer.head_width(model.d_model),
        "max_position_embeddings": model.max_seq_len,
        "tie_word_embeddings": model.tie_embeddings,
        "num_steps": config.default_steps if thinks else 1,
        "max_num_steps": config.max_steps if thinks else 1,
        "read_out": read_out,
        "layout": model.model_dump(mode="json"),
    }


class ExportedHere(Importer):
    """What ``export_hf`` wrote with its own modelling code."""

    family = "rdlm"
    title = "folders of `rdlm export hf`"

    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        return data.get("model_type") == MODEL_TYPE

    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        fields.only({"model_type": MODEL_TYPE})
        return own_config(fields, to_published), []

    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        return {name: source.take(name) for name in source.entries}


def _card(config: CheckpointConfig, kind: str | None, has_tokenizer: bool) -> str:
    trust = "" if kind is not None else ", trust_remote_code=True"
    thinks = config.objective.k_meaning == "thinking" and config.max_steps > 1
    steps = f", num_steps={config.default_steps}" if thinks else ""
    tokens = [
        f'tokenizer = AutoTokenizer.from_pretrained("."{trust})',
        'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids',
    ]
    code = [
        "import torch",
        "from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else ""),
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{trust})',
        *(
            tokens
            if has_tokenizer
            else ["ids = torch.tensor([[1, 2, 3]])  # the checkpoint came without a tokenizer"]
        ),
        f"out = model.generate(ids, max_new_tokens=50, do_sample=False{steps})",
    ]
    notes = []
    if thinks:
        notes.append(
            f"- `num_steps` (K, 1 to {config.max_steps}, default {config.default_steps}) is an argument of "
            "`generate` and of the model's call: "
            f"{config.objective.k_description}. The KV cache holds the keys of every step."
        )
    if config.objective.k_meaning == "sampling":
        notes.append(
            "- This model samples each token through K noise levels. That sampler is not part of "
            "transformers: what is computed here is its "
            f"K = 1 prior ({config.objective.estimator}). For K > 1 import the folder (`rdlm import`) and "
            "use `rdlm serve`."
        )
    loop = getattr(config.model.layout(), "loop", None)  # type: ignore[union-attr]
    if loop is not None and loop.state == "normal":
        notes.append(
            "- The recurrent state starts from zero, where rdlm draws it; `input_states` [B, T, D] of the "
            "model's call gives another."
        )
    if loop is not None and loop.exit_gate != "none":
        notes.append("- The exit gate is carried along and not used: all K steps run.")
    text = [
        "---", "library_name: transformers", "---", f"# {config.name}", "",
        f"Exported with `rdlm export hf` (objective `{config.objective.name}`, {config.step:,} updates).", *notes, "",
        "```python", *code, "```", "",
        "Back to a checkpoint of rdlm: `rdlm import THIS_FOLDER OUT`.",
    ]  # fmt: skip
    return "\n".join(text) + "\n"
