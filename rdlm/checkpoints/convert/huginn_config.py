"""The ``config.json`` of Huginn-0125 (RavenConfig of seal-rg/recurrent-pretraining) and ours, each from the
other.

``rdlm`` is a field of our own in an exported file: the whole CheckpointConfig, so that nothing is lost on the
way back. Code that does not know it ignores it.
"""

from __future__ import annotations

import math
from typing import Any

from rdlm.checkpoints.folder import parse_config
from rdlm.config.base import parse
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import HuginnConfig, initial_std
from rdlm.errors import UserError
from rdlm.objectives.depth import gradient_window

ONLY: dict[str, Any] = {
    "model_type": "huginn_raven",
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "bias": False,
    "test_time_noise": 0,
}
"""Fields that name a variant of the architecture, and the one variant there is here. The published defaults,
so one may be absent."""

SHAPE = {
    "vocab_size": "padded_vocab_size",
    "d_model": "n_embd",
    "num_heads": "n_heads",
    "mlp_width": "intermediate_size",
    "num_prelude_layers": "n_layers_in_prelude",
    "num_core_layers": "n_layers_in_recurrent_block",
    "num_coda_layers": "n_layers_in_coda",
    "max_seq_len": "block_size",
    "rope_base": "rope_base",
    "norm_eps": "norm_eps",
    "qk_bias": "qk_bias",
    "tie_embeddings": "tie_embeddings",
}
"""Our field -> the published one."""

DEFAULTS: dict[str, Any] = {
    "rope_base": 50_000, "norm_eps": 1e-6, "qk_bias": True, "tie_embeddings": True, "block_size": 4096,
    "mean_recurrence": 32, "mean_backprop_depth": 8, "sampling_scheme": "poisson-lognormal-filling",
}  # fmt: skip
"""What the published configuration class takes for fields that a file leaves out."""

SCHEMES = {"lognormal_poisson": "poisson-lognormal-filling", "fixed": "fixed"}
STATES = {"normal": "like-init", "zero": "zero"}
READ = {
    *ONLY, *SHAPE.values(), "n_layers", "vocab_size", "num_key_value_heads", "head_dim", "effective_expected_depth",
    "state_init",
    "init_values", "sampling_scheme", "mean_recurrence", "mean_backprop_depth", "rdlm",
}  # fmt: skip
"""Fields the import reads or that follow from these; the others are listed in the card."""
_BOOKKEEPING = {
    "architectures",
    "auto_map",
    "torch_dtype",
    "padding_multiple",
    "init_strategy",
    "init_orthogonal",
    "rdlm",
}


def to_published(config: CheckpointConfig, dtype: str) -> dict[str, Any]:
    """The config.json of an exported folder. UserError where the published architecture cannot compute what
    the model computes.

    The reference draws its initial state with std ``init_values.std``; a model that starts from zero
    therefore says 0 there.
    """
    model, objective = config.model, config.objective
    if not isinstance(model, HuginnConfig):
        raise UserError(
            "model.family",
            model.family,
            "the published layout holds Huginn models only",
            "use `rdlm export hf`, which brings its own modelling code",
        )
    if model.noise_conditioning or objective.readout != "plain":
        raise UserError(
            "objective.name",
            objective.name,
            "a noise-conditioned core shifts, scales and gates its layers at z = 0 too, and the published "
            "architecture has no place "
            "for these weights",
            "use `rdlm export hf`, which brings its own modelling code, or export a model of onestep, bptt or "
            "next_token",
        )
    if model.has_exit_gate:
        problem = "the published architecture has no exit gate"
        raise UserError("model.exit_gate", model.exit_gate, problem, "use `rdlm export hf`")
    if objective.depth_in_training.distribution not in SCHEMES:
        raise UserError(
            "objective.depth.distribution",
            objective.depth_in_training.distribution,
            "the published layout has no name for it",
            f"export a model trained with {' or '.join(SCHEMES)}",
        )
    std, recurrence = initial_std(model.d_model), config.recurrence.default_steps
    depth = model.num_prelude_layers + model.num_coda_layers + model.num_core_layers * recurrence
    return {
        "architectures": ["RavenForCausalLM"],
        "auto_map": {
            "AutoConfig": "tomg-group-umd/huginn-0125--raven_config_minimal.RavenConfig",
            "AutoModelForCausalLM": "tomg-group-umd/huginn-0125--raven_modeling_minimal.RavenForCausalLM",
        },
        **ONLY,
        **{theirs: getattr(model, ours) for ours, theirs in SHAPE.items()},
        "vocab_size": model.vocab_size,
        "padding_multiple": 1,
        "n_layers": model.num_layers,
        "num_key_value_heads": model.num_heads,
        "head_dim": model.d_model // model.num_heads,
        "state_init": STATES[model.state_init],
        "init_strategy": "takase",
        "init_orthogonal": False,
        "init_values": {
            "std": std if model.state_init == "normal" else 0.0,
            "out_proj": std / math.sqrt(2 * depth),
            "embedding": std,
            "embed_scale": math.sqrt(model.d_model),
        },
        "sampling_scheme": SCHEMES[objective.depth_in_training.distribution],
        "mean_recurrence": recurrence,
        "mean_backprop_depth": gradient_window(objective.depth_in_training, 256),
        "effective_expected_depth": depth,
        "torch_dtype": dtype,
        "rdlm": config.model_dump(mode="json"),
    }


def from_published(data: dict[str, Any], name: str, where: str) -> CheckpointConfig:
    """Our config of a published one. UserError where a field is missing, contradicts another, or names a
    variant not built here."""
    for field, only in ONLY.items():
        if data.get(field, only) != only:
            raise _refused(
                where, field, data[field], f"only {only!r} is built here", "import a model of that variant"
            )
    if "rdlm" in data:
        return _own(data, where)
    data = {**DEFAULTS, **data}
    missing = [
        f
        for f in (*SHAPE.values(), "mean_recurrence", "mean_backprop_depth", "sampling_scheme")
        if f not in data
    ]
    if missing:
        raise _refused(
            where, missing[0], None, "is missing", "give the config.json that was published with the weights"
        )
    schemes = {theirs: ours for ours, theirs in SCHEMES.items()}
    if data["sampling_scheme"] not in schemes:
        remedy = "correct it there: it describes the training, the weights compute the same"
        problem = f"only {' and '.join(schemes)} are known"
        raise _refused(where, "sampling_scheme", data["sampling_scheme"], problem, remedy)
    recurrence = data["mean_recurrence"]
    document = {
        "name": name,
        "model": {
            "family": "huginn",
            **{ours: data[theirs] for ours, theirs in SHAPE.items()},
            "state_init": _state_init(data, where),
            "adapter_init": "random",
        },
        "objective": {
            "name": "bptt",
            "depth": {
                "distribution": schemes[data["sampling_scheme"]],
                "mean": recurrence,
                "grad_steps": data["mean_backprop_depth"],
            },
        },
        "recurrence": {
            "default_steps": recurrence,
            "max_steps": max(64, 4 * recurrence) if isinstance(recurrence, int) else recurrence,
            "trained_steps": recurrence,
        },
    }
    config = parse_config(document, where)
    _check_derived(data, config, where)
    return config


def _own(data: dict[str, Any], where: str) -> CheckpointConfig:
    """The config of one of our exports, if the published fields beside it still say the same."""
    config = parse_config(data["rdlm"], f"{where}: rdlm")
    for field, value in to_published(config, "").items():
        if field not in _BOOKKEEPING and data.get(field) != value:
            remedy = "undo the change, or remove the rdlm field"
            raise _refused(
                where, field, data.get(field), f"the rdlm field of the same file says {value!r}", remedy
            )
    return config


def _state_init(data: dict[str, Any], where: str) -> str:
    for ours, theirs in STATES.items():
        if data.get("state_init", "like-init") == theirs:
            return ours
    raise _refused(
        where,
        "state_init",
        data["state_init"],
        f"only {' and '.join(STATES.values())} are built here",
        "import another",
    )


def _check_derived(data: dict[str, Any], config: CheckpointConfig, where: str) -> None:
    """Fields that follow from others; a model whose file contradicts itself may compute something else."""
    derived = to_published(config, "")
    for field in ("n_layers", "num_key_value_heads", "head_dim"):
        if data.get(field, derived[field]) != derived[field]:
            raise _refused(
                where, field, data[field], f"the other fields give {derived[field]}", "correct the file"
            )
    stated: dict[str, float] = parse(dict[str, float], data.get("init_values", {}), f"{where}: init_values")
    for field in ("std", "embed_scale"):
        expected = derived["init_values"][field]
        given = stated.get(field, expected)
        if not math.isclose(given, expected, rel_tol=1e-6):
            raise _refused(
                where,
                f"init_values.{field}",
                given,
                f"this architecture has {expected:.6g}",
                "import another model",
            )


def _refused(where: str, field: str, value: object, problem: str, remedy: str) -> UserError:
    return UserError(f"{where}: {field}", value, problem, remedy)
