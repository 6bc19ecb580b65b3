"""Decoders in transformers' layout: plain ones (Llama, SmolLM2, Mistral, Qwen2, Qwen3, OLMo-2), and what
looped ones share with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import log
from typing import Any

from rdlm.checkpoints import safetensors_io as tensors
from rdlm.checkpoints.convert.base import (
    Fields,
    Importer,
    Shapes,
    Source,
    adjacent_pairs,
    own_config,
    recurrent,
    rows,
    split_halves,
    stacked,
)
from rdlm.checkpoints.safetensors_io import Entry
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import (
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    LoopConfig,
    RecurrentConfig,
    RopeConfig,
)
from rdlm.errors import UserError

PRE_NORMS = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
POST_NORMS = {"norm_1": "post_attention_layernorm", "norm_2": "post_feedforward_layernorm"}


ROPE_TYPES = ("default", "llama3", "linear", "yarn", "dynamic")


def rope_of(
    fields: Fields,
    head_dim: int,
    default_base: float | None = 10_000.0,
    types: Collection[str] = ROPE_TYPES,
) -> dict[str, Any]:
    """RopeConfig of ``rope_theta`` and ``rope_scaling``, or of ``rope_parameters`` as transformers 5 writes
    them. types: the rope types that the family's code and ours both compute.

    dynamic changes nothing up to ``max_position_embeddings``, where a context ends here.
    """
    given = fields.section("rope_parameters")
    base = given.get("rope_theta") or fields.number("rope_theta", default_base)
    scaling = given if given.data else fields.section("rope_scaling")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    share = scaling.get("partial_rotary_factor") or fields.get("partial_rotary_factor", 1.0)
    rope: dict[str, Any] = {"base": base}
    if share != 1.0:
        rope["num_dims"] = int(head_dim * share)
    if kind not in types:
        field = "rope_parameters" if given.data else "rope_scaling"
        raise fields.refused(field, f"rope type {kind!r} is not built here, only {', '.join(types)}")
    if kind == "linear":
        rope["scaling"] = {"factor": scaling.number("factor")}
    elif kind == "yarn":
        rope["scaling"] = _yarn(fields, scaling)
    elif kind == "llama3":
        rope["scaling"] = {
            "factor": scaling.number("factor"),
            "low_freq_factor": scaling.number("low_freq_factor"),
            "high_freq_factor": scaling.number("high_freq_factor"),
            "original_max_seq_len": scaling.number("original_max_position_embeddings"),
        }
    scaling.ignore("factor")
    return rope


def _yarn(fields: Fields, scaling: Fields) -> dict[str, Any]:
    """YarnScaling, with what transformers takes for fields that are left out."""
    length = fields.number("max_position_embeddings")
    original = scaling.get("original_max_position_embeddings", length)
    factor = scaling.get("factor") or length / original

    def size(scale: float) -> float:
        return 0.1 * scale * log(factor) + 1 if factor > 1 else 1.0

    scales = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return {
        "factor": factor,
        "original_max_seq_len": original,
        "attention_factor": scaling.get("attention_factor")
        or (size(scales[0]) / size(scales[1]) if all(scales) else size(1.0)),
        "beta_fast": scaling.get("beta_fast") or 32.0,
        "beta_slow": scaling.get("beta_slow") or 1.0,
        "truncate": bool(scaling.get("truncate", True)),
    }


def head_dim_of(fields: Fields) -> int:
    """Dimensions of a head, which a config may leave out."""
    return int(fields.get("head_dim") or fields.number("hidden_size") // fields.number("num_attention_heads"))


def layer_of(fields: Fields, **settings: Any) -> dict[str, Any]:
    """LayerConfig of a config of transformers, with rotary positions and a gated MLP of silu."""
    fields.only({"hidden_act": "silu", **({} if settings.get("mlp_bias") else {"mlp_bias": False})})
    fields.ignore("attention_dropout")
    head_dim = head_dim_of(fields)
    return {
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "num_heads": fields.number("num_attention_heads"),
        "num_kv_heads": fields.get("num_key_value_heads", fields.number("num_attention_heads")),
        "head_dim": head_dim,
        "mlp_width": fields.number("intermediate_size"),
        **settings,
        "rope": settings.get("rope") or rope_of(fields, head_dim),
    }


def size_of(fields: Fields, **settings: Any) -> dict[str, Any]:
    """The fields of RecurrentConfig that are not about layers or the loop."""
    return {
        "vocab_size": fields.number("vocab_size"),
        "d_model": fields.number("hidden_size"),
        "max_seq_len": fields.number("max_position_embeddings"),
        **settings,
    }


def refuse_windows(fields: Fields) -> None:
    """UserError for layers that see a window only."""
    kinds = set(fields.get("layer_types", [])) - {"full_attention"}
    if fields.get("use_sliding_window", False) or kinds:
        field = "layer_types" if kinds else "use_sliding_window"
        raise fields.refused(field, "layers that see a window only are not built here")
    fields.ignore("sliding_window", "max_window_layers")


def layer_tensors(
    source: Source, theirs: str, ours: str, layer: LayerConfig, d_model: int, norms: Mapping[str, str]
) -> dict[str, Entry]:
    """One layer. norms: our name -> theirs."""

    def take(name: str) -> tuple[str, Entry]:
        return f"{theirs}.{name}", source.take(f"{theirs}.{name}")

    def rotated(name: str) -> tuple[str, Entry]:
        path, entry = take(name)
        dims = None if layer.rope is None else layer.rope.num_dims
        return path, adjacent_pairs(entry, layer.head_width(d_model), dims)

    kinds = ("weight", "bias") if layer.bias in ("qkv", "qkvo") else ("weight",)
    found = {
        f"{ours}.attn.Wqkv.{kind}": stacked(
            source.where,
            [
                rotated(f"self_attn.q_proj.{kind}"),
                rotated(f"self_attn.k_proj.{kind}"),
                take(f"self_attn.v_proj.{kind}"),
            ],
        )
        for kind in kinds
    }
    if layer.qk_norm in ("full", "head"):
        for name in ("q_norm", "k_norm"):
            found[f"{ours}.attn.{name}.weight"] = rotated(f"self_attn.{name}.weight")[1]
    if layer.bias == "qkvo":
        found[f"{ours}.attn.proj.bias"] = take("self_attn.o_proj.bias")[1]
    for kind in ("weight", "bias") if layer.mlp_bias else ("weight",):
        gate_and_up = [take(f"mlp.gate_proj.{kind}"), take(f"mlp.up_proj.{kind}")]
        found[f"{ours}.mlp.fc.{kind}"] = stacked(source.where, gate_and_up)
        found[f"{ours}.mlp.proj.{kind}"] = take(f"mlp.down_proj.{kind}")[1]
    return {
        **found,
        f"{ours}.attn.proj.weight": take("self_attn.o_proj.weight")[1],
        **{f"{ours}.{name}.weight": take(f"{path}.weight")[1] for name, path in norms.items()},
    }


def is_tied(fields: Fields, shapes: Shapes, default: bool, head: str = "lm_head.weight") -> bool:
    """Whether the read-out is the embedding: where the file has no other, or where the config says so."""
    tied = bool(fields.get("tie_word_embeddings", default))
    return tied or head not in shapes


def head_tensors(
    source: Source, tied: bool, table: str = "model.embed_tokens.weight", head: str = "lm_head.weight"
) -> dict[str, Entry]:
    """Embedding and read-out; two copies of a tied pair must be equal, and either is enough."""
    if not tied:
        return {"model.wte.weight": source.take(table), "model.lm_head.weight": source.take(head)}
    if table in source and head in source and not tensors.same(source.take(table), source.take(head)):
        problem = f"differs from {table}, to which config.json ties it"
        raise UserError(f"{source.where}: weight", head, problem, "untie them there if both are meant")
    return {"model.wte.weight": source.take(table if table in source else head)}


@dataclass(frozen=True)
class Kind:
    """What a plain decoder of one ``model_type`` is. defaults: what transformers takes for fields that its
    config.json leaves out, where these differ from the usual ones. biases: those it may have, by the fields
    ``attention_bias`` and ``mlp_bias``."""

    layer: Mapping[str, Any]
    norms: Mapping[str, str]
    architecture: str
    defaults: Mapping[str, Any]
    has_window: bool = False
    biases: tuple[str, ...] = ()


KINDS = {
    "llama": Kind(
        {},
        PRE_NORMS,
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048},
        biases=("attention_bias", "mlp_bias"),
    ),
    "mistral": Kind(
        {},
        PRE_NORMS,
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072},
        has_window=True,
    ),
    "qwen2": Kind(
        {"bias": "qkv"},
        PRE_NORMS,
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32_768},
    ),
    "qwen3": Kind(
        {"qk_norm": "head"},
        PRE_NORMS,
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
        biases=("attention_bias",),
    ),
    "olmo2": Kind(
        {"norms": "post", "qk_norm": "full"},
        POST_NORMS,
        "Olmo2ForCausalLM",
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
        biases=("attention_bias",),
    ),
}
"""``model_type`` -> its settings. SmolLM2 is a llama."""
BIASES: dict[str, dict[str, Any]] = {"attention_bias": {"bias": "qkvo"}, "mlp_bias": {"mlp_bias": True}}
"""Field of transformers' configs -> what it changes in LayerConfig."""


def plain_layer(fields: Fields, kind: str) -> dict[str, Any]:
    """LayerConfig of a plain decoder of that ``model_type``, whose defaults the fields have."""
    about = KINDS[kind]
    settings = dict(about.layer)
    for field, change in BIASES.items():
        if field in about.biases and fields.get(field, False):
            settings |= change
        elif field == "attention_bias" and kind != "qwen2":  # which does not read it
            fields.only({field: bool(field in about.biases and fields.get(field, False))})
    return layer_of(fields, **settings)


def context_of(fields: Fields, kind: str, max_seq_len: int) -> tuple[int, list[str]]:
    """Positions of a context in which no layer sees a window only, and a line for the card where that is fewer
    than the model has."""
    if not KINDS[kind].has_window:
        refuse_windows(fields)
        return max_seq_len, []
    window = fields.get("sliding_window")
    if window is None or window >= max_seq_len:
        return max_seq_len, []
    line = f"Layers see {window} tokens back; here the context ends there, where both are the same."
    return int(window), [line]


class PlainDecoder(Importer):
    """A transformer whose layers run once: K is 1."""

    family = "decoder"
    title = "plain decoders: Llama, SmolLM2, Mistral, Qwen2, Qwen3, OLMo-2"

    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        return data.get("model_type") in KINDS

    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        kind = fields.need("model_type")
        if kind not in KINDS:
            raise fields.refused("model_type", f"only {', '.join(KINDS)} are plain decoders here")
        if "rdlm" in fields.data:
            return own_config(fields, lambda config: to_published(config, kind)), []
        fields.defaults(KINDS[kind].defaults)
        fields.only({"pretraining_tp": 1})
        model = size_of(
            fields,
            origin=kind,
            tie_embeddings=is_tied(fields, shapes, False),
            layer=plain_layer(fields, kind),
            loop={
                "num_core_layers": fields.number("num_hidden_layers"),
                "iterates": False,
                "injection": "replace",
            },
        )
        model["max_seq_len"], lost = context_of(fields, kind, model["max_seq_len"])
        return recurrent(name, model, 1, fields.where), lost

    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        model = config.model.layout()  # type: ignore[union-attr]
        norms = POST_NORMS if model.layer.norms == "post" else PRE_NORMS
        found = head_tensors(source, model.tie_embeddings)
        for i in range(model.num_layers):
            found |= layer_tensors(
                source, f"model.layers.{i}", f"model.layers.{i}", model.layer, model.d_model, norms
            )
        return {**found, "model.ln_f.weight": source.take("model.norm.weight")}


def kind_of(config: CheckpointConfig) -> str | None:
    """The ``model_type`` of transformers that computes what the model computes; None where there is none."""
    model = config.model.layout() if not config.model.is_image else None  # type: ignore[union-attr]
    if not isinstance(model, RecurrentConfig) or config.objective.readout != "plain":
        return None
    layer, plain = model.layer, RecurrentConfig.model_fields
    plain_loop = LoopConfig(num_core_layers=model.loop.num_core_layers, iterates=False, injection="replace")
    for field in ("embed_scale", "masked", "value_embeddings", "noise_conditioning"):
        if getattr(model, field) != plain[field].default:
            return None
    if model.loop != plain_loop or layer.rope is None or layer.rope.num_dims is not None:
        return None
    sizes = ("norm_eps", "num_heads", "num_kv_heads", "head_dim", "rope", "mlp_width")
    like = layer.model_copy(update={"qk_norm_eps": None} if layer.qk_norm_eps == layer.norm_eps else {})
    for name in [model.origin] if model.origin in KINDS else KINDS:
        about = KINDS[name or ""]
        own = {size: getattr(layer, size) for size in sizes} | dict(about.layer)
        for field in _biases(layer):
            own |= BIASES[field] if field in about.biases else {}
        if like == LayerConfig(**own):
            return name
    return None


def _biases(layer: LayerConfig) -> list[str]:
    """The fields of transformers' configs that say which biases a layer has."""
    return ["attention_bias"] * (layer.bias == "qkvo") + ["mlp_bias"] * layer.mlp_bias


def rope_scaling_of(rope: RopeConfig) -> dict[str, Any] | None:
    """``rope_scaling`` of transformers; None where frequencies are plain."""
    scaling = rope.scaling
    if scaling is None:
        return None
    kind = {Llama3Scaling: "llama3", LinearScaling: "linear"}.get(type(scaling), "yarn")
    fields = scaling.model_dump()
    if "original_max_seq_len" in fields:
        fields["original_max_position_embeddings"] = fields.pop("original_max_seq_len")
    return {"rope_type": kind, **fields}


def to_published(config: CheckpointConfig, kind: str) -> dict[str, Any]:
    """The fields of transformers' config of ``kind`` that say what is computed."""
    model = config.model.layout()  # type: ignore[union-attr]
    layer = model.layer
    assert layer.rope is not None
    scaling = rope_scaling_of(layer.rope) or {"rope_type": "default"}
    return {
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": layer.mlp_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads or layer.num_heads,
        "head_dim": layer.head_width(model.d_model),
        "hidden_act": "silu",
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": layer.norm_eps,
        "rope_parameters": {**scaling, "rope_theta": layer.rope.base},
        "tie_word_embeddings": model.tie_embeddings,
        **({"sliding_window": None} if KINDS[kind].has_window else {}),
        **dict.fromkeys(_biases(layer), True),
    }


def published_weights(
    found: Mapping[str, Entry],
    model: RecurrentConfig,
    part: str = "layers",
    norms: Mapping[str, str] | None = None,
) -> dict[str, Entry]:
    """Tensors of a checkpoint of ours under transformers' names: the inverse of ``PlainDecoder.weights``.

    part: our name of the layers. norms: our name -> theirs, None for those of a plain decoder.
    """
    norms = norms or (POST_NORMS if model.layer.norms == "post" else PRE_NORMS)
    layer, head_dim = model.layer, model.layer.head_width(model.d_model)
    q_end = layer.num_heads * head_dim
    k_end = q_end + (layer.num_kv_heads or layer.num_heads) * head_dim
    weights = {
        "model.embed_tokens.weight": found["model.wte.weight"],
        "model.norm.weight": found["model.ln_f.weight"],
    }
    if not model.tie_embeddings:
        weights["lm_head.weight"] = found["model.lm_head.weight"]
    for i in range(model.num_layers):
        at, ours = f"model.layers.{i}", f"model.{part}.{i}"
        attn, mlp = f"{at}.self_attn", f"{at}.mlp"
        for kind in ("weight", "bias") if layer.bias in ("qkv", "qkvo") else ("weight",):
            qkv = found[f"{ours}.attn.Wqkv.{kind}"]
            weights[f"{attn}.q_proj.{kind}"] = split_halves(rows(qkv, 0, q_end), head_dim)
            weights[f"{attn}.k_proj.{kind}"] = split_halves(rows(qkv, q_end, k_end), head_dim)
            weights[f"{attn}.v_proj.{kind}"] = rows(qkv, k_end, qkv.shape[0])
        for name in ("q_norm", "k_norm") if layer.qk_norm in ("full", "head") else ():
            weights[f"{attn}.{name}.weight"] = split_halves(found[f"{ours}.attn.{name}.weight"], head_dim)
        for kind in ("weight", "bias") if layer.bias == "qkvo" else ("weight",):
            weights[f"{attn}.o_proj.{kind}"] = found[f"{ours}.attn.proj.{kind}"]
        for kind in ("weight", "bias") if layer.mlp_bias else ("weight",):
            fused = found[f"{ours}.mlp.fc.{kind}"]
            weights |= {
                f"{mlp}.gate_proj.{kind}": rows(fused, 0, layer.mlp_width),
                f"{mlp}.up_proj.{kind}": rows(fused, layer.mlp_width, 2 * layer.mlp_width),
                f"{mlp}.down_proj.{kind}": found[f"{ours}.mlp.proj.{kind}"],
            }
        weights |= {f"{at}.{theirs}.weight": found[f"{ours}.{own}.weight"] for own, theirs in norms.items()}
    return weights
