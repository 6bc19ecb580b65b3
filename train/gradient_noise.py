"""The gradient noise scale from AdamW's moments: the batch at which noise and signal of a gradient are equal
(McCandlish et al. 2018, arXiv 1812.06162, the "simple" scale tr(Sigma) / |G|^2).

Over the updates that the moments remember, E v = |G|^2 + N and E |m|^2 = |G|^2 + c N, element sums, with N =
tr(Sigma) / B and c the sum of squares of the weights in the first moment: two equations for |G|^2 and N.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

FEWEST_UPDATES = 10
"""Before them both moments are nearly of one gradient."""


def moment_sums(optimizer: Optimizer, betas: tuple[float, float]) -> tuple[float, float, float]:
    """(sum of squares of the first moments, sum of the second ones, updates made), with bias corrected."""
    squares = seconds = updates = 0.0
    for state in optimizer.state.values():
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            continue
        updates = float(torch.as_tensor(state["step"]))
        if not updates:
            continue
        squares += float(state["exp_avg"].double().square().sum()) / (1 - betas[0] ** updates) ** 2
        seconds += float(state["exp_avg_sq"].double().sum()) / (1 - betas[1] ** updates)
    return squares, seconds, updates


def noise_scale(squares: float, seconds: float, updates: float, beta: float, batch: int) -> float | None:
    """The noise scale in the unit of ``batch``; None where it cannot be estimated. beta: of the first
    moment."""
    if updates < FEWEST_UPDATES:
        return None
    share = (1 - beta) * (1 + beta**updates) / ((1 + beta) * (1 - beta**updates))
    noise = (seconds - squares) / (1 - share)
    signal = squares - share * noise
    return batch * noise / signal if signal > 0 and noise > 0 else None
