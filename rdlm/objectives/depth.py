"""How often the core runs in training (r): its distributions, curricula of its mean, and rows of a batch that
run differently often.

Every r is a pure function of the seed, the update and, where sequences draw their own, the process and the
micro-batch. Nothing here needs a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from rdlm.config.objective import CurriculumConfig, DepthConfig
from rdlm.objectives.base import Keys

_DEPTH_KEY = 1

Draw = Callable[[float, DepthConfig, np.random.Generator, int], np.ndarray]
"""(mean, settings, generator, count) -> r of ``count`` rows, int64, at least 1 and not yet clipped."""


def fixed(mean: float, depth: DepthConfig, rng: np.random.Generator, count: int) -> np.ndarray:
    """r = mean, rounded."""
    return np.full(count, max(1, round(mean)))


def uniform(mean: float, depth: DepthConfig, rng: np.random.Generator, count: int) -> np.ndarray:
    """r in 1 .. 2 mean - 1, the mean rounded."""
    return rng.integers(1, 2 * max(1, round(mean)), size=count)


def poisson(mean: float, depth: DepthConfig, rng: np.random.Generator, count: int) -> np.ndarray:
    """1 + Poisson(mean - 1)."""
    return 1 + rng.poisson(mean - 1, size=count)


def lognormal_poisson(mean: float, depth: DepthConfig, rng: np.random.Generator, count: int) -> np.ndarray:
    """1 + Poisson(rate), log rate ~ N(log mean - spread^2/2, spread^2) (Geiping et al. 2025, Sec. 3.3; the code
    adds the 1, so a mean of 32 runs 33 times on average)."""
    return 1 + rng.poisson(rng.lognormal(np.log(mean) - depth.spread**2 / 2, depth.spread, size=count))


DISTRIBUTIONS: dict[str, Draw] = {
    "fixed": fixed,
    "uniform": uniform,
    "poisson": poisson,
    "lognormal_poisson": lognormal_poisson,
}
"""What ``objective.depth.distribution`` may name."""


def linear(start: float, end: float, progress: float) -> float:
    """A straight line."""
    return start + (end - start) * progress


def one_minus_sqrt(start: float, end: float, progress: float) -> float:
    """Slow at first: 1 - sqrt(1 - progress) of the way (McLeish et al. 2025, arXiv 2511.07384)."""
    return start + (end - start) * (1 - math.sqrt(1 - progress))


def geometric(start: float, end: float, progress: float) -> float:
    """Equal factors in equal times: 1, 2, 4, 8."""
    return start * (end / start) ** progress


CURRICULA: dict[str, Callable[[float, float, float], float]] = {
    "linear": linear,
    "one_minus_sqrt": one_minus_sqrt,
    "geometric": geometric,
}
"""What ``objective.depth.curriculum.kind`` may name: (first mean, last mean, share of the updates) -> mean."""


def mean_at(depth: DepthConfig, step: int) -> float:
    """The mean of r in update ``step`` (0-based)."""
    ramp: CurriculumConfig | None = depth.curriculum
    if ramp is None or step >= ramp.updates:
        return float(depth.mean)
    return CURRICULA[ramp.kind](float(ramp.start), float(depth.mean), step / ramp.updates)


def gradient_window(depth: DepthConfig, num_steps: int) -> int:
    """How many of the last of ``num_steps`` core runs record gradient."""
    return num_steps if depth.grad_steps == "all" else min(depth.grad_steps, num_steps)


def num_recurrences(depth: DepthConfig, step: int, seed: int) -> int:
    """r of one optimizer step: a pure function of (step, seed), the same on every rank and micro-batch."""
    return _drawn(depth, step, [seed & 0xFFFF_FFFF_FFFF_FFFF, _DEPTH_KEY, step], 1)[0]


def drawn_depths(depth: DepthConfig, keys: Keys, count: int) -> list[int]:
    """r of each of ``count`` sequences of a micro-batch, falling.

    The rows of a batch are exchangeable, so handing the largest r to the first row changes no expectation, and
    a pass over rows in this order needs no sorting (``NextToken.run_core``).
    """
    if depth.per == "update":
        return [num_recurrences(depth, keys.step, keys.seed)] * count
    key = [keys.seed & 0xFFFF_FFFF_FFFF_FFFF, _DEPTH_KEY, keys.step, keys.rank, keys.micro]
    return sorted(_drawn(depth, keys.step, key, count), reverse=True)


def _drawn(depth: DepthConfig, step: int, key: list[int], count: int) -> list[int]:
    rng = np.random.default_rng(key)
    drawn = DISTRIBUTIONS[depth.distribution](mean_at(depth, step), depth, rng, count)
    return [min(int(r), depth.max_steps) for r in drawn]


def rows_at_work(depths: list[int]) -> list[int]:
    """How many of the leading rows take each step of a pass in which all rows end together: depths, falling,
    -> a count for each of the max(depths) steps.

    A row of depth r joins in r steps before the end, so no row waits for a deeper one, and the last steps,
    which record gradient, are the same for all.
    """
    most = depths[0]
    return [sum(r >= most - k for r in depths) for k in range(most)]
