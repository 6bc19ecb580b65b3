"""The general recurrent-depth model: families are settings of it, every setting can be trained, states are
opaque rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rdlm.config.base import parse
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import ModelConfig, RecurrentConfig
from rdlm.data.batch import Batch
from rdlm.errors import UserError
from rdlm.objectives.base import Keys
from rdlm.registry import build, build_model

SIZE: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "max_seq_len": 64}
LAYER: dict[str, Any] = {"num_heads": 4, "mlp_width": 48, "rope": {"base": 10_000.0}}
LOOPS: dict[str, dict[str, Any]] = {
    "looped layers": {
        "state": "embedding",
        "boundary_norm": "weighted",
        "final_norm": False,
        "exit_gate": "linear",
    },
    "diagonal injection": {
        "injection": "diagonal",
        "input_norm": True,
        "readout": "linear",
        "num_coda_layers": 1,
    },
    "orthogonal injection": {"injection": "diagonal_orthogonal", "boundary_norm": "unweighted"},
    "added injection": {"injection": "add", "state": "normal", "state_std": 0.1, "num_prelude_layers": 1},
    "gated steps": {"state": "embedding", "step_gate_width": 4},
    "linear injection with bias": {"injection": "linear", "injection_bias": True, "readout": "norm"},
}
LAYERS: dict[str, dict[str, Any]] = {
    "post norms, norms over all heads": {"norms": "post", "qk_norm": "full", "num_kv_heads": 2},
    "sandwich, norms per head": {"norms": "sandwich_branch", "qk_norm": "head", "head_dim": 16},
    "squared relu, unweighted q/k norms": {"mlp": "relu2", "mlp_scale": 0.5, "qk_norm": "head_unweighted"},
    "gelu, partial rotation, biases": {"mlp": "gelu", "rope": {"base": 100.0, "num_dims": 4}, "bias": "qkv"},
}


def general(layer: dict[str, Any], loop: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        **SIZE,
        "family": "recurrent",
        "layer": {**LAYER, **layer},
        "loop": {"num_core_layers": 2, **loop},
        **more,
    }


@pytest.mark.parametrize("family", ["huginn", "llama", "masked"])
def test_a_family_is_a_short_form_of_the_general_config(tiny_config, family: str) -> None:
    """The same parameters, drawn alike, and the same bits of output."""
    short = tiny_config(family, "masked" if family == "masked" else "next_token").model
    long = parse(ModelConfig, short.layout().model_dump(), "layout")
    models = [build_model(config) for config in (short, long)]
    for model in models:
        model.init_weights(torch.Generator().manual_seed(0))
    first, second = (model.state_dict() for model in models)
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    ids = torch.randint(0, 64, (2, 9))
    outputs = []
    for model in models:
        ctx = model.context(ids)
        e = model.encode(ids, ctx)
        outputs.append(model.logits(model.decode(model.core(model.initial_state(e), e, None, ctx), ctx)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "model",
    [general({}, loop) for loop in LOOPS.values()]
    + [general(layer, {"injection": "linear"}) for layer in LAYERS.values()]
    + [
        general(
            {}, {"injection": "linear", "num_coda_layers": 1}, value_embeddings=[0, 2], value_gate_width=8
        )
    ],
    ids=[*LOOPS, *LAYERS, "value embeddings"],
)
def test_every_setting_trains(model: dict[str, Any]) -> None:
    """The loss is finite at the start, and every parameter on the way to the logits has a gradient."""
    config = CheckpointConfig.model_validate(
        {
            "name": "x",
            "model": model,
            "objective": {"name": "onestep", "depth": {"distribution": "fixed", "mean": 2}},
        }
    )
    objective, ids = build(config, seed=0), torch.randint(0, 64, (2, 10))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 9, dtype=torch.bool))
    total = objective.loss(batch, Keys(0, 0)).total
    total.backward()
    assert torch.isfinite(total)
    blind = {"exit_gate"}  # trained apart, or in its source
    missing = [n for n, p in objective.named_parameters() if p.grad is None and not blind & set(n.split("."))]
    before_last_step = ("prelude", "wte") if model["loop"].get("state") == "embedding" else ()
    assert [name for name in missing if not any(part in name for part in before_last_step)] == []


def test_only_the_latent_of_a_state_counts_as_moved() -> None:
    """A coda's value embeddings ride in the state: they are no part of its latent, and no step changes them."""
    config = parse(
        RecurrentConfig, general({}, {"injection": "linear", "num_coda_layers": 1}, value_embeddings=[2]), "x"
    )
    model, ids = build_model(config), torch.randint(0, 64, (1, 5))
    model.init_weights(torch.Generator().manual_seed(0))
    ctx = model.context(ids)
    e = model.encode(ids, ctx)
    state = model.initial_state(e)
    after = model.core(state, e, None, ctx)
    assert state.shape[-1] == 64 and model.latent(after).shape[-1] == 32
    assert torch.equal(after[..., 32:], state[..., 32:]) and not torch.equal(
        model.latent(after), model.latent(state)
    )


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (general({"num_heads": 3}, {}), "multiple of num_heads"),
        (general({"num_kv_heads": 3}, {}), "multiple of num_kv_heads"),
        (general({"rope": {"base": 1e4, "num_dims": 16}}, {}), "RoPE"),
        (general({}, {"state": "normal"}), "state_std"),
        (general({}, {"boundary_norm": "weighted"}), "final_norm"),
        (general({}, {"final_norm": False}), "one weighted norm"),
        (general({}, {}, value_embeddings=[7]), "value_embeddings"),
        (general({}, {"injection": "replace"}, noise_conditioning=True), "replace"),
        (general({"norm": "pre"}, {}), "there is no such field"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(model: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        parse(ModelConfig, model, "config")
    assert words in str(error.value)
