"""The only place that knows which class a family is."""

from __future__ import annotations

import torch

from rdlm.config import CheckpointConfig, HuginnConfig, LlamaConfig, ModelConfig
from rdlm.denoiser import Denoiser
from rdlm.errors import UserError
from rdlm.models.huginn import Huginn
from rdlm.models.llama import Llama
from rdlm.models.text import TextModel


def build_model(config: ModelConfig) -> TextModel:
    """The network of a family, weights uninitialised."""
    match config:
        case HuginnConfig():
            return Huginn(config)
        case LlamaConfig():
            return Llama(config)


def build(config: CheckpointConfig, seed: int | None = None, device: torch.device | str = "cpu") -> Denoiser:
    """The denoiser a checkpoint describes, in fp32 on ``device``; initialised from ``seed`` where given.

    Raises UserError where objective and model contradict each other.
    """
    objective, model = config.objective, config.model
    if objective.noisy != model.noise_conditioning:
        raise UserError(
            "model.noise_conditioning", model.noise_conditioning,
            f"objective '{objective.name}' has corruption.share {objective.corruption.share}",
            "leave noise_conditioning to the trainer, or set it to whether share is above 0",
        )  # fmt: skip
    with torch.device(device):
        network = build_model(model)
        denoiser = Denoiser(network, objective, config.noise)
    if not network.is_recurrent and (objective.depth.mean > 1 or objective.depth.distribution != "fixed"):
        raise UserError(
            "objective.depth",
            objective.depth.mean,
            f"family '{model.family}' runs its layers once",
            "use depth {distribution: fixed, mean: 1}",
        )
    if seed is not None:
        network.init_weights(torch.Generator().manual_seed(seed))
    return denoiser
