"""Percentile bootstrap (Efron 1979) over independent units: prompts, windows, images, or groups of texts;
and figures with their intervals as text. Every set that shares its units is resampled with the same draws,
so comparisons are paired."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Pair = tuple[float, Sequence[float]]
"""A figure and its interval."""

SAMPLES = 2000
FEWEST_UNITS = 5
"""With fewer units there is no interval: a resample of 2 or 3 things says nothing about their population.
"""


def resamples(count: int, seed: int) -> np.ndarray:
    """How often each of ``count`` units stands in each resample: fp64 [SAMPLES, count]."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), SAMPLES)
    return drawn.astype(np.float64)


def interval(samples: np.ndarray) -> list[float]:
    """The middle 95 %."""
    return [float(x) for x in np.quantile(samples, (0.025, 0.975))]


def mean_with_interval(values: np.ndarray, seed: int) -> dict[str, object]:
    """values [units] -> {"value": mean, "interval": 95 % or None with fewer than FEWEST_UNITS}."""
    few = len(values) < FEWEST_UNITS
    return {
        "value": float(values.mean()),
        "interval": None if few else interval(resamples(len(values), seed) @ values / len(values)),
    }


def mover(a: Pair, b: Pair) -> Pair:
    """a - b with its interval, from those of a and b taken as independent (Zou and Donner 2008, "MOVER")."""
    (x, (x_low, x_high)), (y, (y_low, y_high)) = a, b
    return x - y, [x - y - math.hypot(x - x_low, y_high - y), x - y + math.hypot(x_high - x, y - y_low)]


WITHIN_NOISE = " (within noise)"


def with_interval(value: float, interval: Sequence[float] | None, digits: str = ".3f") -> str:
    """ "0.512 [0.498, 0.526]"; without an interval the value alone."""
    return format(value, digits) + (
        "" if interval is None else f" [{interval[0]:{digits}}, {interval[1]:{digits}}]"
    )


def difference(value: float, interval: Sequence[float], digits: str = "+.3f", none: float = 0.0) -> str:
    """The same, and said to be within noise where the interval holds ``none``, the value of no difference."""
    inside = interval[0] <= none <= interval[1]
    return with_interval(value, interval, digits) + (WITHIN_NOISE if inside else "")


def or_dash(value: float | None, digits: str) -> str:
    """The value, or "-" where there is none."""
    return "-" if value is None else format(value, digits)
