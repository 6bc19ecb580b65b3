"""What updates cost in floating-point operations, found without making one: for runs of equal FLOPs, and for the share
of a device's peak that training reaches.

Counted are the matrix products of the forward and the backward pass of the objective's own code, on tensors without
data. They are model FLOPs (Chowdhery et al. 2022, App. B): attention in full, causal or not, and no recomputed
activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from rdlm.config.base import parse
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.objective import DepthConfig
from rdlm.data.batch import Batch
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from rdlm.objectives.depth import drawn_depths, gradient_window
from rdlm.registry import build
from train.lora import add_adapters
from train.optim import moving_groups
from train.settings import TrainConfig

ROWS = 4
"""Sequences that are counted: of objectives that draw what they noise or mask, enough for a mean."""
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense 16-bit operations per second of a device whose name contains the key, from NVIDIA's data sheets. The first
key that fits counts."""


def peak_flops(device: torch.device) -> float | None:
    """Operations per second that the device could do in 16 bits, None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


class UpdateFlops:
    """Operations of one sequence by the number r of core steps, forward and backward; of a network of blocks the mean
    over them, of which an update trains one."""

    def __init__(
        self,
        config: CheckpointConfig,
        seq_len: int,
        seed: int = 0,
        prepare: Callable[[Objective], object] = lambda network: None,
    ) -> None:
        """prepare: what is done to a network before it is trained: adapters, and weights that do not move."""
        self._config, self._seq_len, self._seed, self._prepare = config, seq_len, seed, prepare
        self._counted = cache(self._count)

    @classmethod
    def of_run(cls, config: TrainConfig) -> UpdateFlops:
        """FLOPs of the updates of a run. Gradients of frozen weights are not computed, and not counted."""

        def prepare(network: Objective) -> None:
            add_adapters(network, config.lora, config.seed)
            moving_groups(network, config)

        return cls(config.checkpoint_config, config.seq_len, config.seed, prepare)

    def of(self, core_steps: float) -> float:
        """They are linear in r up to the gradient window and linear beyond it; r may be a mean of several."""
        knee = gradient_window(self._config.objective.depth_in_training, math.ceil(core_steps))
        first = knee if core_steps > knee else 1
        start = self._counted(first)
        if core_steps == first:
            return start
        return start + (core_steps - first) * (self._counted(first + 1) - start)

    def _count(self, core_steps: int) -> float:
        objective = build(_at_depth(self._config, core_steps), device="meta")
        found = [self._count_part(part) for part in objective.parts]
        return sum(found) / len(found)

    def _count_part(self, part: Objective) -> float:
        self._prepare(part)
        inputs = part.model.empty_inputs(ROWS, self._seq_len).to("meta")
        shape = part.model.target_shape(inputs)
        targets, mask = (
            torch.empty(shape, dtype=torch.int64, device="meta"),
            torch.ones(shape, dtype=torch.bool),
        )
        batch = Batch(inputs, targets, mask.to("meta"), None, mask)
        with FlopCounterMode(display=False) as counter:
            part.loss(batch, Keys(self._seed, 0)).total.backward()
        return counter.get_total_flops() / ROWS


def _at_depth(config: CheckpointConfig, core_steps: int) -> CheckpointConfig:
    """The config with r fixed."""
    depth = config.objective.depth_in_training
    if depth.is_single:
        return config
    fixed = {"distribution": "fixed", "mean": core_steps, "max_steps": max(depth.max_steps, core_steps)}
    changed: DepthConfig = parse(DepthConfig, {**fixed, "grad_steps": depth.grad_steps}, "objective.depth")
    return config.model_copy(update={"objective": config.objective.model_copy(update={"depth": changed})})


def update_flops(config: TrainConfig) -> Callable[[int], float]:
    """Number of an update (0-based) -> its FLOPs over all processes."""
    depth, sequence = config.objective.depth_in_training, UpdateFlops.of_run(config)

    def of_update(step: int) -> float:
        if depth.is_single:
            return config.batch.global_size * sequence.of(1)
        drawn = drawn_depths(depth, Keys(config.seed, step), config.batch.global_size)
        return sum(sequence.of(r) for r in drawn)

    return of_update


def updates_within(config: TrainConfig, budget: float, limit: int = 10**7) -> int:
    """How many updates fit into ``budget`` FLOPs."""
    cost, spent = update_flops(config), 0.0
    for step in range(limit):
        spent += cost(step)
        if spent > budget:
            return step
    return limit
