"""The one loop over K, the plan of what each step does, and the bridges between noise levels.

Training, scoring and image sampling run whole sequences through ``run``. The server interleaves the same steps of many requests
(serve/engine/engine.py) and takes plan and bridges from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.diffusion.noise import LogNormalSchedule, geometric_grid
from rdlm.diffusion.partition import partition_of
from rdlm.objectives.denoiser import Denoiser, Prediction

S = TypeVar("S")


def run(
    step: Callable[[S, int], S],
    state: S,
    num_steps: int,
    grad_steps: int = 0,
    on_step: Callable[[int, S], None] | None = None,
) -> S:
    """state = step(state, k) for k = 0 .. num_steps - 1; the last ``grad_steps`` of them record gradient.

    on_step(k + 1, state) is called after each step. Core iterations, steps of ODE solvers and hard bridges are all ``step``.
    """
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
    blocks: which block's layers run; each keeps keys of its own, so each one that is used fills the cache at z = 0 first.
    append_own: an uncommitted step sees its own key beside the position's committed one instead of in its place.
    num_draws_skipped: read-outs whose prediction is discarded because they only fill the cache.
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


def sampling_levels(config: CheckpointConfig, num_steps: int) -> list[float | None]:
    """Noise levels of ``num_steps`` network calls, noisiest first; the first is z = 0 (None).

    Band-trained models use a geometric grid over the low band, where almost all information about a token is decided;
    models trained on the published distribution use its equal-mass grid; models of blocks spread the levels over their blocks.
    """
    if config.blocks is not None and config.blocks.num_blocks > 1:
        return [None, *partition_of(config).grid(num_steps)[1:]]
    corruption = config.objective.corruption
    if corruption.distribution == "bands":
        return [None, *geometric_grid(corruption.low_band[1], corruption.low_band[0], num_steps - 1)]
    return [None, *LogNormalSchedule(config.noise).grid(num_steps)[1:-1]]


def step_plan(config: CheckpointConfig, num_steps: int) -> StepPlan:
    """The plan of one token at K = num_steps for this checkpoint (thinking: K iterations; sampling: K noise levels)."""
    k = num_steps
    if config.objective.k_meaning == "thinking":
        return StepPlan((None,) * k, (False,) * (k - 1) + (True,), (True,) * k, (0,) * k)
    levels, cut = sampling_levels(config, k), partition_of(config)
    owners = [cut.block_of(level) for level in levels]
    # Block 0 comes last: in place its first prediction is itself the pass that fills its cache. In ``paper`` a clean pass fills
    # every cache, then each level is a noisy row beside it.
    beside = config.objective.name == "paper"
    fills = [block for block in sorted(set(owners), reverse=True) if block or beside]
    committing = len(fills) + (not beside)
    count = len(fills) + k
    return StepPlan(
        (None,) * len(fills) + tuple(levels), (True,) * count, (True,) * committing + (False,) * (count - committing),
        (*fills, *owners), append_own=beside, num_draws_skipped=len(fills),
    )  # fmt: skip


def renoise(denoiser: Denoiser, token_ids: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Hard bridge: z = y + sigma * eps of drawn tokens. ids, sigma [...], noise [..., D] standard normal -> z [..., D] fp32.

    Exact at any K if the denoiser is: the joint law of (token, z at the next level) is the forward process itself.
    """
    return denoiser.clean(token_ids) + sigma.unsqueeze(-1) * noise


def soft_bridge(logits: Tensor, unit_table: Tensor) -> Tensor:
    """x0 = softmax(logits) @ E with unit rows: logits [..., V], table [V, D] -> [..., D] (DiffusionBlocks App. E.4).

    The mixture is shorter than a unit row, which training never shows: biased even with an exact denoiser.
    """
    return torch.softmax(logits, dim=-1) @ unit_table


Solver = Literal["euler", "heun", "multistep"]
"""euler: first order, one network call a step. heun: second order, two. multistep: second order, one, from the step before."""
Denoise = Callable[[Tensor, float], Tensor]
"""(z, sigma) -> x0 of z's shape."""


def heun_step(denoise: Denoise, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Second-order step, two network calls; Euler where sigma_next is 0 (Karras et al. 2022, Alg. 1)."""
    slope = (z - denoise(z, sigma)) / sigma
    z_next = z + (sigma_next - sigma) * slope
    if sigma_next == 0:
        return z_next
    slope_next = (z_next - denoise(z_next, sigma_next)) / sigma_next
    return z + (sigma_next - sigma) * (slope + slope_next) / 2


def extrapolated(
    x0: Tensor, x0_before: Tensor, sigma_before: float, sigma: float, sigma_next: float
) -> Tensor:
    """x0 half a step ahead, on the line in log sigma through the last two: what makes Euler's step one of second order.

    DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Alg. 2) where alpha = 1. At sigma_next = 0, infinitely far in log sigma, x0 itself.
    """
    if sigma_next == 0:
        return x0
    ahead = 0.5 * math.log(sigma / sigma_next) / math.log(sigma_before / sigma)
    return x0 + ahead * (x0 - x0_before)


@dataclass(frozen=True)
class Flow:
    """z [..., D] under way, and the call before: its estimate x0 [..., D] and its level, None at the first level."""

    z: Tensor
    before: tuple[Tensor, float] | None = None


def flow_step(at: Flow, x0: Tensor, sigma: float, sigma_next: float, multistep: bool = False) -> Flow:
    """From z at ``sigma``, whose denoised estimate is x0, to z at ``sigma_next``: z + (sigma_next - sigma) (z - x0) / sigma.

    Euler's step (Karras et al. 2022, Alg. 1), which ends in x0 at sigma_next = 0; multistep takes the estimate half a step ahead.
    Equations 3-5 of DiffusionBlocks print the opposite sign, under which noise would grow.
    """
    ahead = extrapolated(x0, *at.before, sigma, sigma_next) if multistep and at.before is not None else x0
    return Flow(at.z + (sigma_next - sigma) * (at.z - ahead) / sigma, (x0, sigma))


def solve(denoise: Denoise, z: Tensor, grid: list[float], solver: Solver = "euler") -> Tensor:
    """Probability-flow ODE from grid[0] down to grid[-1], falling levels of which the last may be 0."""
    if solver == "heun":
        return run(lambda state, k: heun_step(denoise, state, grid[k], grid[k + 1]), z, len(grid) - 1)

    def step(at: Flow, k: int) -> Flow:
        return flow_step(at, denoise(at.z, grid[k]), grid[k], grid[k + 1], solver == "multistep")

    return run(step, Flow(z), len(grid) - 1).z


def hard_bridge_chain(
    predict: Callable[[Tensor | None, float | None], Prediction],
    draw: Callable[[Prediction], Tensor],
    renoise_ids: Callable[[Tensor, float], Tensor],
    levels: list[float | None],
) -> tuple[Tensor, Prediction]:
    """Draw tokens through K levels: predict at z = 0, draw, re-noise to the next level, and again. -> (ids, last prediction)."""

    def step(
        carry: tuple[Tensor | None, Prediction | None], k: int
    ) -> tuple[Tensor | None, Prediction | None]:
        ids, sigma = carry[0], levels[k]
        z = None if sigma is None or ids is None else renoise_ids(ids, sigma)
        prediction = predict(z, sigma)
        return draw(prediction), prediction

    start: tuple[Tensor | None, Prediction | None] = (None, None)
    ids, prediction = run(step, start, len(levels))
    assert ids is not None and prediction is not None
    return ids, prediction


def soft_bridge_chain(
    predict: Callable[[Tensor | None, float | None], Prediction],
    estimate: Callable[[Prediction, float | None], Tensor],
    start: Tensor,
    levels: list[float | None],
    top: float,
    multistep: bool = False,
) -> Prediction:
    """Follow the ODE through K levels and read out at the last. start: z [..., D] at level ``top``, which stands for z = 0 (None).

    estimate: prediction and its level -> x0 [..., D], ``soft_bridge`` of its logits and the table of the level's owner.
    """

    def step(carry: tuple[Flow, Prediction | None], k: int) -> tuple[Flow, Prediction | None]:
        at, sigma = carry[0], levels[k]
        prediction = predict(None if sigma is None else at.z, sigma)
        if k + 1 < len(levels):
            at = flow_step(at, estimate(prediction, sigma), sigma or top, levels[k + 1] or 0.0, multistep)
        return at, prediction

    begin: tuple[Flow, Prediction | None] = (Flow(start), None)
    prediction = run(step, begin, len(levels))[1]
    assert prediction is not None
    return prediction
