"""A loop of fixed K as a plain stack: the same layers one behind the other, for engines that know no loop."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints import safetensors_io as tensors
from rdlm.checkpoints.convert.base import check, tokenizer_of
from rdlm.checkpoints.safetensors_io import Entry
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import LoopConfig, RecurrentConfig
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError


def read_checkpoint(
    folder: Path, unroll: int | None, command: str
) -> tuple[CheckpointConfig, dict[str, Entry], Tokenizer | None]:
    """Config, weights and tokenizer of a checkpoint that is to be exported, unrolled where ``unroll`` is a K.

    UserError where a file is not what the config says, the model has no next token, or no such form.
    """
    config = checkpoint.load_config(folder)
    config.check_next_token(command)
    config.check_whole()
    config.check_exact(command)
    found = tensors.stored(folder / checkpoint.WEIGHTS)
    check(str(folder / checkpoint.WEIGHTS), found, config, "use the config and weights of one export")
    tokenizer = tokenizer_of(folder / checkpoint.TOKENIZER, config)
    if unroll is not None:
        config, found = unrolled(config, found, unroll)
    return config, found, tokenizer


def unrolled(
    config: CheckpointConfig, found: Mapping[str, Entry], num_steps: int
) -> tuple[CheckpointConfig, dict[str, Entry]]:
    """The model at K = num_steps as one whose layers run once: prelude, K times the core, coda.

    UserError, which names the setting, where a step does more than run its layers.
    """
    model = config.model.layout() if not config.model.is_image else None  # type: ignore[union-attr]
    if not isinstance(model, RecurrentConfig):
        problem = "a step of this family does more than run its layers"
        raise UserError("--unroll", num_steps, problem, "use `rdlm export hf` without it")
    loop = model.loop
    if not 1 <= num_steps <= config.max_steps:
        problem, remedy = "is out of range", f"this model takes 1 to {config.max_steps}"
        raise UserError("--unroll", num_steps, problem, remedy)
    once = num_steps == 1
    for setting, value, allowed in (
        ("injection", loop.injection, ("none", "replace") if once else ("none",)),
        ("state", loop.state if loop.injection != "replace" else "embedding", ("embedding",)),
        ("boundary_norm", loop.boundary_norm, ("none", "weighted") if once else ("none",)),
        ("step_gate_width", loop.step_gate_width, (None,)),
        ("readout", loop.readout, ("direct",)),
        ("core_mlp_width", loop.core_mlp_width, (None, model.layer.mlp_width)),
        ("input_norm", loop.input_norm, (False,)),
        ("value_embeddings", model.value_embeddings, ((),)),
        ("noise_conditioning", model.noise_conditioning, (False,)),
    ):
        if value not in allowed:
            problem = f"at K = {num_steps} plain layers cannot express it"
            raise UserError(f"model.loop.{setting}", value, problem, "use `rdlm export hf` without --unroll")
    if loop.boundary_norm == "weighted" and loop.num_coda_layers:
        problem = "plain layers have no norm before the coda"
        raise UserError("model.loop.boundary_norm", "weighted", problem, "use `rdlm export hf`")
    parts = (("prelude", loop.num_prelude_layers, 1), ("core_block", loop.num_core_layers, num_steps))
    order = [
        f"model.{part if loop.iterates or part != 'core_block' else 'layers'}.{i}."
        for part, count, times in (*parts, ("coda", loop.num_coda_layers, 1))
        for _ in range(times)
        for i in range(count)
    ]
    inside = re.compile(r"model\.(prelude|core_block|layers|coda|exit_gate)\.")
    weights = {name: entry for name, entry in found.items() if not inside.match(name)}
    for number, prefix in enumerate(order):
        weights |= {
            f"model.layers.{number}.{name.removeprefix(prefix)}": entry
            for name, entry in found.items()
            if name.startswith(prefix)
        }
    plain = LoopConfig(num_core_layers=len(order), iterates=False, injection="replace")
    flat = model.model_copy(update={"loop": plain})
    recurrence = config.recurrence.model_copy(update={"default_steps": 1})
    update = {"model": flat, "recurrence": recurrence}
    return config.model_copy(update=update), weights
