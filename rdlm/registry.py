"""The only place that knows which class a family is."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import DitConfig, ModelConfig, VitConfig
from rdlm.diffusion.blockwise import Blockwise, blocks_of
from rdlm.diffusion.partition import Block, partition_of
from rdlm.diffusion.targets import frozen_rows
from rdlm.errors import UserError
from rdlm.models.base import Backbone
from rdlm.models.recurrent import Recurrent
from rdlm.models.vision import Dit, Vit
from rdlm.objectives.denoiser import Denoiser
from rdlm.objectives.forward_forward import ForwardForward
from rdlm.objectives.image_denoiser import ImageDenoiser
from rdlm.objectives.masked_denoiser import MaskedDenoiser
from rdlm.random_streams import generator

_INIT_KEY = 5


OF_TEXT = ("single_pass", "onestep", "evidence", "paper", "bptt", "next_token")
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "recurrent": OF_TEXT,
    "huginn": OF_TEXT,
    "llama": OF_TEXT,
    "masked": ("masked",),
    "vit": ("classify", "paper", "evidence", "forward_forward"),
    "dit": ("edm",),
}
"""What each family can be trained with."""


def build_model(config: ModelConfig, layers: range | None = None) -> Backbone:
    """The network of a family, weights uninitialised; ``layers``: one block of it, None for all.

    Raises UserError where the family cannot be cut.
    """
    if layers is not None and len(layers) < config.num_layers and not config.can_be_cut:
        problem = "a recurrent core is one denoiser of every level: there is nothing to cut"
        raise UserError("blocks.num_blocks", "> 1", problem, "use num_blocks 1, or another family")
    match config:
        case VitConfig():
            return Vit(config, layers)
        case DitConfig():
            # It shares with the others what trainers and checkpoints ask of a network; only an ImageDenoiser runs it.
            return cast(Backbone, Dit(config, layers))
        case _:
            return Recurrent(config.layout(), layers)


def build(config: CheckpointConfig, seed: int | None = None, device: torch.device | str = "cpu") -> Denoiser:
    """The denoiser a checkpoint describes, in fp32 on ``device``; initialised from ``seed`` where given.

    A Blockwise where it has several blocks, one of them where ``config.block`` names one: the others are never allocated, and
    its weights are the same as when all are built. Raises UserError where objective, model and blocks contradict each other.
    """
    objective, model = config.objective, config.model
    if objective.name not in OBJECTIVES[model.family]:
        problem = f"family {model.family!r} cannot be trained with it"
        raise UserError(
            "objective.name",
            objective.name,
            problem,
            f"use {' or '.join(OBJECTIVES[model.family])}, or another family",
        )
    if objective.noisy != model.noise_conditioning:
        raise UserError(
            "model.noise_conditioning", model.noise_conditioning,
            f"objective '{objective.name}' {'has' if objective.noisy else 'has no'} levels to be told",
            "leave noise_conditioning to the trainer",
        )  # fmt: skip
    _check_blocks(config)
    cut = partition_of(config)
    if cut.num_blocks == 1:
        places: list[Block | None] = [None]
    else:
        places = [Block(cut, b) for b in (range(cut.num_blocks) if config.block is None else [config.block])]
    with torch.device(device):
        parts = [_denoiser(config, place) for place in places]
        denoiser = parts[0] if len(parts) == 1 else Blockwise(parts)
    if not model.iterates and (objective.depth.mean > 1 or objective.depth.distribution != "fixed"):
        raise UserError(
            "objective.depth",
            objective.depth.mean,
            f"family '{model.family}' runs its layers once",
            "use depth {distribution: fixed, mean: 1}",
        )
    if seed is not None:
        for part in blocks_of(denoiser):
            rng = (
                torch.Generator().manual_seed(seed)
                if part.block is None
                else generator(seed, _INIT_KEY, part.block.index)
            )
            part.model.init_weights(rng)
    return denoiser


def _denoiser(config: CheckpointConfig, block: Block | None) -> Denoiser:
    blocks, model = config.blocks, config.model
    layers = None if block is None else block.partition.layers[block.index]
    if config.objective.masking is not None:
        return MaskedDenoiser(build_model(model, layers), config.objective, config.noise, block)
    if config.objective.goodness is not None:
        return ForwardForward(build_model(model, layers), config.objective, config.noise, block)
    if isinstance(model, DitConfig):
        return ImageDenoiser(build_model(model, layers), config.objective, config.noise, block)
    targets = None
    if blocks is not None and blocks.targets == "frozen":
        targets = partial(frozen_rows, blocks.target_seed, model.vocab_size, model.d_model)
    return Denoiser(build_model(model, layers), config.objective, config.noise, block, targets)


def _check_blocks(config: CheckpointConfig) -> None:
    count = 1 if config.blocks is None else config.blocks.num_blocks
    if config.blocks is not None and not config.objective.noisy:
        problem = f"objective {config.objective.name!r} has no noise levels to share out"
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
        and config.objective.masking is not None
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
