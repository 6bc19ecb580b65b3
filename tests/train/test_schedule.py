"""Learning rates at the steps where they are known."""

from __future__ import annotations

import pytest

from train.settings import ScheduleConfig
from train.trainer import learning_rate


def rates(**settings) -> list[float]:
    schedule = ScheduleConfig(**settings)
    return [learning_rate(schedule, 1.0, step) for step in range(schedule.steps)]


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    assert rates(kind="constant", steps=6, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_cosine_ends_at_its_floor_and_is_half_way_in_the_middle() -> None:
    values = rates(kind="cosine", steps=13, warmup_steps=2, min_lr_ratio=0.2)
    assert values[2] == pytest.approx(1.0)
    assert values[7] == pytest.approx(0.6)
    assert values[12] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(values[2:], values[3:], strict=False))


def test_trapezoid_is_flat_then_linear() -> None:
    values = rates(kind="trapezoid", steps=10, warmup_steps=2, cooldown_steps=4, min_lr_ratio=0.0)
    assert values[2:6] == pytest.approx([1, 1, 1, 1])
    assert values[6:] == pytest.approx([0.75, 0.5, 0.25, 0])


def test_one_step_run_has_a_rate() -> None:
    assert rates(kind="cosine", steps=1) == pytest.approx([1.0])
