"""AdamW with weight decay on the matrices of linear layers alone."""

from __future__ import annotations

import torch
from torch import nn

from train.extensions import building
from train.settings import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """torch's AdamW; DeepSpeedCPUAdam (compiled once, about two minutes) where the optimizer is offloaded."""
    spec = config.optimizer
    groups = parameter_groups(model, spec.weight_decay)
    if config.deepspeed.offload_optimizer == "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        with building("cpu_adam"):
            return DeepSpeedCPUAdam(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weights of nn.Linear decay; norms, biases (qk_bias too), scalars and token tables never do."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
