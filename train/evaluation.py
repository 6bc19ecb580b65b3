"""Held-out NLL against K during training, through rdlm/scoring.py; the processes share the windows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdlm.config import CheckpointConfig
from rdlm.denoiser import Denoiser
from rdlm.objectives import Batch, loss_terms
from rdlm.scoring import token_logprobs
from train.corpora import Corpus
from train.settings import TrainConfig


def held_out_nll(stage: nn.Module, config: TrainConfig, corpus: Corpus, device: torch.device) -> dict[str, float]:
    """{"K=4": nats per token} on the first ``evaluation.max_tokens`` of the validation split. Collective.

    stage: train.loop.Stage. rdlm/scoring.py says which of the values is a normalised likelihood. A block alone has no likelihood:
    it reports {"denoising": cross-entropy} of its own noise levels, with the same noise at every call.
    """
    rank, world, ks = dist.get_rank(), dist.get_world_size(), config.evaluation.steps
    names = ["denoising"] if config.block is not None else [f"K={k}" for k in ks]
    batches = list(corpus.windows(config.evaluation.max_tokens, config.batch.micro_size or 8))
    sums = torch.zeros(len(names) + 1, dtype=torch.float64)
    for first in range(0, len(batches), world):
        mine = first + rank
        batch = batches[min(mine, len(batches) - 1)]  # under ZeRO 3 every process must make the same calls
        here = batch.to(device)
        with torch.no_grad():
            if config.block is not None:
                totals = stage(_denoising, here, config.seed, mine).double()  # [1]
            else:
                scores = stage(_scores, config.checkpoint_config, here, ks)[:, here.mask]
                totals = -scores.double().sum(1)  # [len(ks)]
        if mine < len(batches):
            sums += torch.tensor([*totals.tolist(), float(batch.mask.sum())], dtype=torch.float64)
    sums = sums.to(device)
    dist.all_reduce(sums)
    return {name: float(sums[i] / sums[-1]) for i, name in enumerate(names)}


def _denoising(denoiser: Denoiser, batch: Batch, seed: int, index: int) -> Tensor:
    """Sum of the batch's cross-entropies at the objective's levels: [1]."""
    terms = loss_terms(denoiser, batch, step=0, seed=seed, micro=index)
    return (terms.metrics["ce"] * terms.count).unsqueeze(0)


def _scores(denoiser: Denoiser, config: CheckpointConfig, batch: Batch, ks: tuple[int, ...]) -> Tensor:
    """One tensor [len(ks), B, T]: DeepSpeed's hooks cannot read a dictionary with integer keys."""
    scores = token_logprobs(denoiser, config, batch.inputs, batch.targets, ks, mask=batch.mask)
    return torch.stack([scores[k] for k in ks])
