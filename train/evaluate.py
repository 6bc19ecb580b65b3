"""Held-out figures during training, through the code that evaluates checkpoints; the processes share the
windows."""

from __future__ import annotations

import torch
import torch.distributed as dist

from rdlm.objectives import Objective
from rdlm.objectives.base import HeldOut
from train.data import Corpus
from train.settings import TrainConfig


def held_out(
    network: Objective, config: TrainConfig, corpus: Corpus, device: torch.device
) -> dict[str, float]:
    """Means over the first ``evaluation.max_tokens`` targets of the validation split. Collective.

    Text: {"K=4": nats per token}; ``config.objective.estimator_at`` says which of the values is a normalised
    likelihood. Image classifiers: {"K=1": nats per image, "accuracy at K=4": share}. A block alone and
    denoisers of images have neither: {"denoising": loss} at their own noise levels, with the same noise at
    every call.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = list(corpus.windows(config.evaluation.max_tokens, config.batch.micro_size or 8))
    sums: dict[str, float] = {}
    count = 0.0
    training = network.training
    network.eval()
    for first in range(0, len(batches), world):
        mine = first + rank
        batch = batches[min(mine, len(batches) - 1)]  # under ZeRO 3 every process must make the same calls
        asked = HeldOut(config.evaluation.steps, config.seed, mine, denoising=config.block is not None)
        with torch.no_grad():
            found = network(batch.to(device), held_out=asked)
        for name, total in found.items():
            sums[name] = sums.get(name, 0.0) + (float(total.double()) if mine < len(batches) else 0.0)
        count += float(batch.mask.sum()) if mine < len(batches) else 0.0
    network.train(training)
    every = torch.tensor([*sums.values(), count], dtype=torch.float64).to(device)
    dist.all_reduce(every)
    return {name: float(every[i] / every[-1]) for i, name in enumerate(sums)}
