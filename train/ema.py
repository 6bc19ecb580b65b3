"""Exponential moving averages of the weights (Polyak and Juditsky 1992), kept where the optimizer keeps its
moments: they are cut, saved, restored and moved with these, at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

KEY = "ema"
"""Key of an average in the optimizer's state of a parameter, fp32 and of its shape."""


def keep_average(optimizer: Optimizer, decay: float) -> None:
    """Let every update of ``optimizer`` move the averages of the parameters that it moved.

    Update n weighs the average with min(decay, (1 + n) / (10 + n)), n counted from 0, so that the first weights
    are soon forgotten.
    """

    def average(changed: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter in (p for group in changed.param_groups for p in group["params"]):
            state = changed.state[parameter]
            if parameter.grad is None or not state:
                continue
            if KEY not in state:
                state[KEY] = parameter.detach().clone()
            updates = float(state["step"]) - 1
            share = min(decay, (1 + updates) / (10 + updates))
            with torch.no_grad():
                state[KEY].lerp_(parameter, 1 - share)

    optimizer.register_step_post_hook(average)
