"""The only place that knows which class a family is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import DitConfig, HrmConfig, LoopFormerConfig, ModelConfig, VitConfig
from rdlm.config.objective import VARIANTS
from rdlm.diffusion.partition import Block, partition_of
from rdlm.diffusion.targets import frozen_rows
from rdlm.errors import UserError, reason
from rdlm.models.base import Backbone
from rdlm.models.hrm import Hrm
from rdlm.models.loopformer import LoopFormer
from rdlm.models.recurrent import Recurrent
from rdlm.models.vision import Dit, Vit
from rdlm.objectives import Objective, objective_class
from rdlm.objectives.blockwise import blockwise
from rdlm.random_streams import generator

_INIT_KEY = 5
MOST_LAYERS = 10_000


def build_model(config: ModelConfig, layers: range | None = None) -> Backbone:
    """The network of a family, weights uninitialised; ``layers``: one block of it, None for all.

    Raises UserError where the family cannot be cut.
    """
    if layers is not None and len(layers) < config.num_layers and not config.can_be_cut:
        problem = "a recurrent core denoises at every level, so it cannot be cut into blocks"
        raise UserError("blocks.num_blocks", "> 1", problem, "use num_blocks 1, or another family")
    match config:
        case VitConfig():
            return Vit(config, layers)
        case DitConfig():
            # It shares with the others what trainers and checkpoints ask of a network; only the edm objective
            # runs it.
            return cast(Backbone, Dit(config, layers))
        case HrmConfig():
            return Hrm(config)
        case LoopFormerConfig():
            return LoopFormer(config)
        case _:
            return Recurrent(config.layout(), layers)


def build(config: CheckpointConfig, seed: int | None = None, device: torch.device | str = "cpu") -> Objective:
    """The network a checkpoint describes, under its objective, in fp32 on ``device``; initialised from
    ``seed`` where given.

    A Blockwise where it has several blocks, one of them where ``config.block`` names one: the others are
    never allocated, and its weights are the same as when all are built. Raises UserError where objective,
    model and blocks contradict each other, or sizes are beyond what can be built.
    """
    if config.model.num_layers > MOST_LAYERS:
        raise UserError("model", config.model.num_layers, f"more than {MOST_LAYERS} layers", "use fewer")
    _check_objective(config)
    _check_blocks(config)
    _check_depth(config)
    cut = partition_of(config)
    if cut.num_blocks == 1:
        places: list[Block | None] = [None]
    else:
        places = [Block(cut, b) for b in (range(cut.num_blocks) if config.block is None else [config.block])]
    try:
        with torch.device(device):
            parts = [_build_part(config, place) for place in places]
            objective = parts[0] if len(parts) == 1 else blockwise(parts)
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, OverflowError, MemoryError) as error:
        problem = f"cannot be built: {reason(error)}"
        raise UserError("model", config.model.family, problem, "use smaller sizes") from error
    if seed is not None:
        for part in objective.parts:
            part.model.init_weights(_init_stream(part, seed))
    return objective


def _init_stream(part: Objective, seed: int) -> torch.Generator:
    if part.block is None:
        return torch.Generator().manual_seed(seed)
    return generator(seed, _INIT_KEY, part.block.index)


def materialize(
    objective: Objective, seed: int, dtype: torch.dtype, keep: Callable[[nn.Parameter], None]
) -> None:
    """Give a network that ``build`` made on meta the weights that it has with this ``seed``, in ``dtype``.

    One weight at a time is in memory in fp32; ``keep`` is called with each parameter and may cut it.
    """
    for part in objective.parts:
        names: dict[int, list[str]] = {}
        for name, parameter in part.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        weights = dict(part.named_parameters())

        def take(
            name: str, value: Tensor, part: Objective = part, names: Any = names, weights: Any = weights
        ) -> None:
            made = nn.Parameter(value.to(dtype))
            for place in names[id(weights[name])]:
                module, _, own = place.rpartition(".")
                setattr(part.get_submodule(module), own, made)
            keep(made)

        part.model.init_weights(_init_stream(part, seed), lambda name, value: take(f"model.{name}", value))
        for name, value in part.own_weights.items():
            take(name, value)


def objectives_of(model: ModelConfig) -> list[str]:
    """Names of the objectives that can train a model."""
    return [str(v.model_fields["name"].default) for v in VARIANTS if model.task in v.tasks]


def _build_part(config: CheckpointConfig, block: Block | None) -> Objective:
    layers = None if block is None else block.partition.layers[block.index]
    part = objective_class(config.objective)(config, build_model(config.model, layers), block)
    if config.blocks is not None and config.blocks.targets == "frozen" and part.noises_rows:
        blocks, model = config.blocks, config.model
        part.targets = partial(frozen_rows, blocks.target_seed, model.vocab_size, model.d_model)
    return part


def _check_objective(config: CheckpointConfig) -> None:
    objective, model = config.objective, config.model
    if objective.name not in objectives_of(model):
        problem = f"family {model.family!r} cannot be trained with it"
        remedy = f"use {' or '.join(objectives_of(model))}, or another family"
        raise UserError("objective.name", objective.name, problem, remedy)
    if objective.needs_exit_gate and not model.has_exit_gate:
        field = "model.exit_gate" if model.family == "huginn" else "model.loop.exit_gate"
        problem = f"objective {objective.name!r} trains an exit gate, and the model has none"
        remedy = f"set {field}=linear (family huginn or recurrent)"
        raise UserError("objective.name", objective.name, problem, remedy)
    if objective.noise_conditioned != model.noise_conditioning:
        has = "has" if objective.noise_conditioned else "has no"
        raise UserError(
            "model.noise_conditioning", model.noise_conditioning,
            f"objective '{objective.name}' {has} noise levels to condition on",
            "leave noise_conditioning to the trainer",
        )  # fmt: skip


def _check_depth(config: CheckpointConfig) -> None:
    depth, model = config.objective.depth_in_training, config.model
    if not model.iterates and not depth.is_single:
        problem = f"family '{model.family}' runs its layers once"
        raise UserError("objective.depth", depth.mean, problem, "use depth {distribution: fixed, mean: 1}")


def _check_blocks(config: CheckpointConfig) -> None:
    count = 1 if config.blocks is None else config.blocks.num_blocks
    if config.blocks is not None and not config.objective.noise_conditioned:
        problem = f"objective {config.objective.name!r} has no noise levels to divide among blocks"
        raise UserError(
            "blocks",
            f"num_blocks {count}",
            problem,
            "use objective paper, evidence, masked or edm, or drop the section",
        )
    if count > 1 and config.objective.k_meaning == "thinking":
        problem = f"objective {config.objective.name!r} iterates its layers, which blocks do not share"
        raise UserError(
            "blocks.num_blocks", count, problem, "use objective paper or evidence, or num_blocks 1"
        )
    if (
        config.blocks is not None
        and config.blocks.partition == "equal_information"
        and not config.objective.levels_are_sigma
    ):
        problem = "its curve is one over sigma, and objective 'masked' has none"
        raise UserError(
            "blocks.partition",
            config.blocks.partition,
            problem,
            "use equi_probability, which cuts alpha evenly",
        )
    if config.block is not None and count == 1:
        raise UserError(
            "block", config.block, "the network is not cut into blocks", "set blocks.num_blocks above 1"
        )
    if config.block is not None and config.block >= count:
        raise UserError("block", config.block, f"there are {count} blocks", f"choose 0 to {count - 1}")
