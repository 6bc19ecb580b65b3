"""Held-out figures during training, through the code that evaluates checkpoints; the processes share the windows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdlm.answers import greedy_answers
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.batch import Batch
from rdlm.diffusion.blockwise import blocks_of
from rdlm.objectives.denoiser import Denoiser
from rdlm.objectives.losses import loss_terms
from rdlm.scoring import class_scores, token_logprobs
from train.data import Corpus
from train.settings import TrainConfig


def held_out(stage: nn.Module, config: TrainConfig, corpus: Corpus, device: torch.device) -> dict[str, float]:
    """Means over the first ``evaluation.max_tokens`` targets of the validation split. Collective.

    Text: {"K=4": nats per token}; rdlm/scoring.py says which of the values is a normalised likelihood. ViT: {"K=1": nats per image,
    "accuracy at K=4": share}. A block alone and DiT have neither: {"denoising": loss} of their own noise levels, with the same noise at
    every call. stage: train.trainer.Stage.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    names, function = _asked(config, corpus.unit)
    batches = list(corpus.windows(config.evaluation.max_tokens, config.batch.micro_size or 8))
    sums = torch.zeros(len(names) + 1, dtype=torch.float64)
    for first in range(0, len(batches), world):
        mine = first + rank
        batch = batches[min(mine, len(batches) - 1)]  # under ZeRO 3 every process must make the same calls
        with torch.no_grad():
            totals = stage(function, batch.to(device), mine).double()  # [len(names)]
        if mine < len(batches):
            sums += torch.tensor([*totals.tolist(), float(batch.mask.sum())], dtype=torch.float64)
    sums = sums.to(device)
    dist.all_reduce(sums)
    return {name: float(sums[i] / sums[-1]) for i, name in enumerate(names)}


def _asked(config: TrainConfig, unit: str) -> tuple[list[str], Callable[[Denoiser, Batch, int], Tensor]]:
    """Names, and a function of (denoiser, batch, its number) to their sums over the batch. It returns one tensor: DeepSpeed's hooks
    cannot read a dictionary with integer keys."""
    ks = config.evaluation.steps
    if config.block is not None or config.objective.name == "edm":
        return ["denoising"], partial(_denoising, config.seed)
    if unit == "image":
        return ["K=1", *(f"accuracy at K={k}" for k in ks)], partial(_classes, config.checkpoint_config, ks)
    return [f"K={k}" for k in ks], partial(_tokens, config.checkpoint_config, ks)


def _denoising(seed: int, denoiser: Denoiser, batch: Batch, index: int) -> Tensor:
    """Mean over the blocks."""
    parts = [loss_terms(block, batch, step=0, seed=seed, micro=index) for block in blocks_of(denoiser)]
    totals = [terms.metrics["ce"] * terms.count if "ce" in terms.metrics else terms.total for terms in parts]
    return torch.stack(totals).mean(0, keepdim=True)


def _classes(
    config: CheckpointConfig, ks: tuple[int, ...], denoiser: Denoiser, batch: Batch, index: int
) -> Tensor:
    answers = greedy_answers(denoiser, config, batch.inputs, ks, seed=index)
    right = [(answers[k] == batch.targets).sum() for k in ks]
    return torch.stack([-class_scores(denoiser, batch.inputs, batch.targets).logprobs.sum(), *right])


def _tokens(
    config: CheckpointConfig, ks: tuple[int, ...], denoiser: Denoiser, batch: Batch, index: int
) -> Tensor:
    scores = token_logprobs(denoiser, config, batch.inputs, batch.targets, ks, mask=batch.mask)
    return torch.stack([-scores[k][batch.mask].double().sum() for k in ks])
