"""The one loop over K, the plan of what each of its steps does, and the samplers that lead from one noise
level to the next.

Training, scoring and image sampling run whole sequences through ``run``. The server interleaves the same
steps of many requests (serve/engine/engine.py) and takes plans and samplers from here. This module imports torch
only where it computes, so that the HTTP interface and ``--help`` can read the table.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from rdlm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S")
P = TypeVar("P")


def run(
    step: Callable[[S, int], S],
    state: S,
    num_steps: int,
    grad_steps: int = 0,
    on_step: Callable[[int, S], None] | None = None,
) -> S:
    """state = step(state, k) for k = 0 .. num_steps - 1; the last ``grad_steps`` of them record gradient.

    on_step(k + 1, state) is called after each step. Core iterations and the steps of all samplers are
    ``step``.
    """
    import torch

    for k in range(num_steps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and k >= num_steps - grad_steps):
            state = step(state, k)
        if on_step is not None:
            on_step(k + 1, state)
    return state


@dataclass(frozen=True)
class StepPlan:
    """What each core step of one token does. All tuples have one entry per core step.

    sigmas: level of the step; None = z is zero, read at sigma_max. readout: run coda and head after the step.
    commit: the step's keys and values become the position's own in the cache (the last committing step wins).
    blocks: which block's layers run; each keeps keys of its own, so each one that is used fills the cache at
    z = 0 first. append_own: an uncommitted step sees its own key beside the position's committed one instead
    of in its place. num_draws_skipped: read-outs whose prediction is discarded because they only fill the
    cache.
    """

    sigmas: tuple[float | None, ...]
    readout: tuple[bool, ...]
    commit: tuple[bool, ...]
    blocks: tuple[int, ...]
    append_own: bool = False
    num_draws_skipped: int = 0

    @property
    def num_core_steps(self) -> int:
        return len(self.sigmas)


def expected_target(logits: Tensor, unit_table: Tensor) -> Tensor:
    """x0 = softmax(logits) @ E with unit rows: logits [..., V], table [V, D] -> [..., D] (DiffusionBlocks
    App. E.4).

    The mixture is shorter than a unit row, which training never shows: biased even with an exact denoiser.
    """
    return logits.softmax(dim=-1) @ unit_table


@dataclass(frozen=True)
class Flow:
    """A sample on its way to sigma = 0: z [..., D], and the call before, its estimate x0 [..., D] and its
    level (None at first)."""

    z: Tensor
    before: tuple[Tensor, float] | None = None


Denoise = Callable[["Tensor", float], "Tensor"]
"""(z, sigma) -> the denoised estimate x0, of z's shape."""
Noise = Callable[[], "Tensor"]
"""-> standard normal numbers of z's shape, the same at every call of one step. Nothing is drawn for a sampler
that does not call it."""


class Sampler(ABC):
    """How a sample goes from one noise level to the next lower one."""

    draws_tokens: ClassVar[bool] = False
    """Whether a token is drawn at every level and its embedding noised again, instead of following the mean
    estimate."""
    starts_from_noise: ClassVar[bool] = False
    """Whether the network's first call sees z = sigma_max eps, conditioned on sigma_max; otherwise z = 0
    at the read-out level that its training covers (``objective.readout_quantile``)."""
    for_text: ClassVar[bool] = True
    """Whether text can be sampled this way: it needs the network once a level."""
    description: ClassVar[str]

    @abstractmethod
    def step(self, flow: Flow, x0: Tensor, sigma: float, sigma_next: float, noise: Noise) -> Flow:
        """From z at ``sigma``, whose estimate is x0, to z at ``sigma_next``; noise: for samplers that add
        some."""

    def advance(self, denoise: Denoise, flow: Flow, sigma: float, sigma_next: float, noise: Noise) -> Flow:
        """``step`` with the estimate of ``denoise``."""
        return self.step(flow, denoise(flow.z, sigma), sigma, sigma_next, noise)


class Renoise(Sampler):
    """z = y + sigma * eps of the token just drawn.

    Exact at any K if the denoiser is: the joint law of (token, z at the next level) is the forward process
    itself.
    """

    draws_tokens = True
    description = (
        "draw a token at every level and noise its embedding again; exact at every K if the denoiser is"
    )

    def step(self, flow: Flow, x0: Tensor, sigma: float, sigma_next: float, noise: Noise) -> Flow:
        return Flow(x0 + sigma_next * noise())


class Euler(Sampler):
    """z + (sigma_next - sigma) (z - x0) / sigma, first order (Karras et al. 2022, Alg. 1); it ends in x0 at
    sigma_next = 0.

    Equations 3-5 of DiffusionBlocks print the opposite sign, under which noise would grow.
    """

    description = "the probability-flow ODE by Euler's method, one network call a level"

    def step(self, flow: Flow, x0: Tensor, sigma: float, sigma_next: float, noise: Noise) -> Flow:
        return Flow(flow.z + (sigma_next - sigma) * (flow.z - x0) / sigma, (x0, sigma))


class Published(Euler):
    """The sampler of the DiffusionBlocks paper (App. C, E.4): Euler's method from z = sigma_max eps over levels of
    equal mass. The paper takes four of them and decodes greedily."""

    starts_from_noise = True
    description = (
        "Euler's method as DiffusionBlocks published it, from pure noise at sigma_max; "
        "for models trained with objective paper"
    )


class DPMpp2M(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Alg. 2) where alpha = 1: second order with one
    network call a level.

    Euler's step with x0 half a step ahead, on the line in log sigma through the last two estimates.
    """

    description = "DPM-Solver++(2M): second order, one network call a level"

    def step(self, flow: Flow, x0: Tensor, sigma: float, sigma_next: float, noise: Noise) -> Flow:
        ahead = x0 if flow.before is None else extrapolated(x0, *flow.before, sigma, sigma_next)
        return Flow(flow.z + (sigma_next - sigma) * (flow.z - ahead) / sigma, (x0, sigma))


class Heun(Sampler):
    """Second order with two network calls a level; Euler's step where sigma_next is 0 (Karras et al. 2022,
    Alg. 1)."""

    for_text = False
    description = "the probability-flow ODE by Heun's method, two network calls a level"

    def step(self, flow: Flow, x0: Tensor, sigma: float, sigma_next: float, noise: Noise) -> Flow:
        return Euler().step(flow, x0, sigma, sigma_next, noise)

    def advance(self, denoise: Denoise, flow: Flow, sigma: float, sigma_next: float, noise: Noise) -> Flow:
        slope = (flow.z - denoise(flow.z, sigma)) / sigma
        z_next = flow.z + (sigma_next - sigma) * slope
        if sigma_next == 0:
            return Flow(z_next)
        slope_next = (z_next - denoise(z_next, sigma_next)) / sigma_next
        return Flow(flow.z + (sigma_next - sigma) * (slope + slope_next) / 2)


SAMPLERS: dict[str, Sampler] = {
    "renoise": Renoise(),
    "euler": Euler(),
    "published": Published(),
    "dpmpp_2m": DPMpp2M(),
    "heun": Heun(),
}
"""Samplers by the name that requests, options and results give them."""
OLD_NAMES = {"hard": "renoise", "multistep": "dpmpp_2m"}
"""Names of earlier versions, still accepted."""


def sampler_named(name: str, field: str = "sampler") -> Sampler:
    """The sampler of that name. Raises UserError for a name that none has."""
    found = SAMPLERS.get(OLD_NAMES.get(name, name))
    if found is None:
        raise UserError(field, name, "there is no such sampler", f"use one of {', '.join(SAMPLERS)}")
    return found


def extrapolated(
    x0: Tensor, x0_before: Tensor, sigma_before: float, sigma: float, sigma_next: float
) -> Tensor:
    """x0 half a step ahead, on the line in log sigma through the last two; x0 itself at sigma_next = 0,
    infinitely far away."""
    if sigma_next == 0:
        return x0
    ahead = 0.5 * math.log(sigma / sigma_next) / math.log(sigma_before / sigma)
    return x0 + ahead * (x0 - x0_before)


def no_noise(step: int) -> Tensor:
    """What stands in the place of ``noise`` for a sampler that adds none."""
    raise TypeError("this sampler adds noise, and none was given")


def solve(
    denoise: Denoise,
    z: Tensor,
    grid: list[float],
    sampler: str = "euler",
    noise: Callable[[int], Tensor] = no_noise,
) -> Tensor:
    """Sample from z at grid[0] down to grid[-1]: falling levels of which the last may be 0.

    noise: number of the step -> standard normal of z's shape, for samplers that add some.
    """
    chosen = sampler_named(sampler)

    def step(flow: Flow, k: int) -> Flow:
        return chosen.advance(denoise, flow, grid[k], grid[k + 1], lambda: noise(k))

    return run(step, Flow(z), len(grid) - 1).z


def renoise_chain(
    predict: Callable[[Tensor | None, float | None], P],
    draw: Callable[[P], Tensor],
    renoise_ids: Callable[[Tensor, float], Tensor],
    levels: list[float | None],
) -> tuple[Tensor, P]:
    """Draw tokens through K levels: predict at z = 0, draw, re-noise to the next level, and again. -> (ids,
    last prediction)."""

    def step(carry: tuple[Tensor | None, P | None], k: int) -> tuple[Tensor | None, P | None]:
        ids, sigma = carry[0], levels[k]
        z = None if sigma is None or ids is None else renoise_ids(ids, sigma)  # None first: z = 0
        prediction = predict(z, sigma)
        return draw(prediction), prediction

    start: tuple[Tensor | None, P | None] = (None, None)
    ids, prediction = run(step, start, len(levels))
    assert ids is not None and prediction is not None
    return ids, prediction


def ode_chain(
    predict: Callable[[Tensor | None, float | None], P],
    estimate: Callable[[P, float | None], Tensor],
    start: Tensor,
    levels: list[float | None],
    top: float,
    sampler: Sampler,
    noise: Callable[[int], Tensor],
) -> P:
    """Lead z through K levels by mean estimates and read out at the last. start: z [..., D] at level ``top``,
    which the network reads as z = 0 unless the sampler starts from noise.

    estimate: prediction and its level -> x0 [..., D], ``expected_target`` of its logits and the table of the
    level's owner. noise: see ``solve``.
    """

    def step(carry: tuple[Flow, P | None], k: int) -> tuple[Flow, P | None]:
        at, sigma = carry[0], levels[k]
        prediction = predict(at.z if k or sampler.starts_from_noise else None, sigma)
        if k + 1 < len(levels):
            x0, level = estimate(prediction, sigma), sigma if k and sigma else top
            at = sampler.step(at, x0, level, levels[k + 1] or 0.0, lambda: noise(k))
        return at, prediction

    begin: tuple[Flow, P | None] = (Flow(start), None)
    prediction = run(step, begin, len(levels))[1]
    assert prediction is not None
    return prediction
