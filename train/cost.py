"""What updates cost in floating-point operations, without making one: for runs of equal FLOPs.

Counted are the matrix products and attention of the forward and the backward pass of the objective's own code, on
tensors without data. Recomputed activations are not counted: a run's FLOPs are those of its model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from rdlm.config.base import parse
from rdlm.config.objective import DepthConfig
from rdlm.data.batch import Batch
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from rdlm.objectives.depth import drawn_depths
from rdlm.registry import build
from train.flop_trace import FlopCounter
from train.settings import ImagesConfig, TrainConfig

ROWS = 4
"""Sequences that are counted: of objectives that draw what they noise or mask, enough for a mean."""


def update_flops(config: TrainConfig) -> Callable[[int], float]:
    """Number of an update (0-based) -> its FLOPs over all processes.

    They are linear in r up to the gradient window and linear beyond it, so three counts give all.
    """
    depth = config.objective.depth_in_training

    @cache
    def counted(num_steps: int) -> float:
        return _sequence_flops(_at_depth(config, num_steps))

    def of_sequence(num_steps: int) -> float:
        knee = depth.window(num_steps)
        if num_steps <= 2 or num_steps in (knee, knee + 1):
            return counted(num_steps)
        if num_steps > knee:
            return counted(knee) + (num_steps - knee) * (counted(knee + 1) - counted(knee))
        return counted(1) + (num_steps - 1) * (counted(2) - counted(1))

    def of_update(step: int) -> float:
        if depth.is_single:
            return config.batch.global_size * counted(1)
        drawn = drawn_depths(depth, Keys(config.seed, step), config.batch.global_size)
        return sum(of_sequence(r) for r in drawn)

    return of_update


def updates_within(config: TrainConfig, budget: float, limit: int = 10**7) -> int:
    """How many updates fit into ``budget`` FLOPs."""
    cost, spent = update_flops(config), 0.0
    for step in range(limit):
        spent += cost(step)
        if spent > budget:
            return step
    return limit


def _at_depth(config: TrainConfig, num_steps: int) -> TrainConfig:
    """The config with r fixed."""
    if config.objective.depth_in_training.is_single:
        return config
    depth = config.objective.depth_in_training
    fixed = {"distribution": "fixed", "mean": num_steps, "max_steps": max(depth.max_steps, num_steps)}
    changed: DepthConfig = parse(DepthConfig, {**fixed, "grad_steps": depth.grad_steps}, "objective.depth")
    return config.model_copy(update={"objective": config.objective.model_copy(update={"depth": changed})})


def _sequence_flops(config: TrainConfig) -> float:
    """Of one sequence, forward and backward; the mean over the blocks where there are some, of which an update
    trains one."""
    objective = build(config.checkpoint_config, device="meta")
    found = [_part_flops(part, config) for part in objective.parts]
    return sum(found) / len(found)


def _part_flops(part: Objective, config: TrainConfig) -> float:
    with torch.device("cpu"):
        on_host = torch.ones(ROWS, config.seq_len, dtype=torch.bool)
    inputs = part.model.empty_inputs(ROWS, config.seq_len).to("meta")
    length = 1 if isinstance(config.data, ImagesConfig) else config.seq_len
    targets = torch.empty(ROWS, length, dtype=torch.int64, device="meta")
    batch = Batch(inputs, targets, on_host[:, :length].to("meta"), None, on_host[:, :length])
    counter = FlopCounter()
    with counter:
        part.loss(batch, Keys(config.seed, 0)).total.backward()
    return counter.total / ROWS
