"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from train.settings import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """Rate of update ``step`` (0-based), in 1 / update. Warm-up is linear and reaches ``peak`` at ``step == warmup_steps``.

    cosine: half a cosine from peak to ``min_lr_ratio * peak`` at the last step. trapezoid: peak, then linear to that value over
    the last ``cooldown_steps``. constant: peak.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / (schedule.warmup_steps + 1)
    floor = schedule.min_lr_ratio * peak
    if schedule.kind == "cosine":
        span = max(1, schedule.steps - 1 - schedule.warmup_steps)
        progress = min(1.0, (step - schedule.warmup_steps) / span)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "trapezoid" and schedule.cooldown_steps:
        remaining = max(0, schedule.steps - 1 - step)
        return floor + (peak - floor) * min(1.0, remaining / schedule.cooldown_steps)
    return peak
