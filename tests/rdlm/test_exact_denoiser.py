"""The closed-form posterior as a test double: an exact denoiser must give the exact law of the token at every
K.

With clean context, prior p and unit rows E, p(x | z, sigma) is proportional to p(x) exp(<E_x, z> / sigma^2).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import HuginnConfig
from rdlm.config.objective import NoiseConfig, objective_config
from rdlm.diffusion.samplers import SAMPLERS, Flow, Noise, Sampler, expected_target, renoise_chain, solve
from rdlm.diffusion.schedules import LogNormalSchedule, geometric_grid
from rdlm.objectives import Objective
from rdlm.objectives.base import Prediction
from rdlm.objectives.next_token import renoise
from rdlm.registry import build

V, D, N = 7, 16, 60_000
PRIOR = torch.softmax(torch.linspace(0.0, 2.0, V), 0)


@pytest.fixture(scope="module")
def denoiser() -> Objective:
    """An evidence denoiser whose hidden state is log p in the first V coordinates and whose head reads
    exactly that."""
    config = HuginnConfig(
        vocab_size=V,
        d_model=D,
        num_heads=2,
        mlp_width=16,
        max_seq_len=8,
        tie_embeddings=False,
        noise_conditioning=True,
    )
    built = build(
        CheckpointConfig(name="exact", model=config, objective=objective_config.validate_python("evidence")),
        seed=0,
    )
    with torch.no_grad():
        built.model.head.weight.copy_(torch.eye(V, D))
    return built


def exact(denoiser: Objective, z: torch.Tensor | None, sigma: float | None, rows: int = N) -> Prediction:
    hidden = F.pad(PRIOR.log(), (0, D - V)).expand(rows, D)
    levels = None if sigma is None else torch.full((rows,), sigma)
    return denoiser.predict(hidden, z, levels)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 2.0])
def test_evidence_readout_is_bayes_rule(denoiser: Objective, sigma: float) -> None:
    """Against the posterior from Gaussian densities, which knows nothing of the identity."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.multinomial(PRIOR, 500, replacement=True, generator=rng)
    z = renoise(denoiser, ids, torch.full((500,), sigma), torch.randn(500, D, generator=rng))
    density = (
        torch.distributions.Normal(denoiser.unit_table(), sigma).log_prob(z.unsqueeze(1)).sum(-1)
    )  # [500, V]
    expected = torch.softmax(PRIOR.log() + density, -1)
    with torch.no_grad():
        got = torch.softmax(exact(denoiser, z, sigma, 500).logits(), -1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
@torch.no_grad()
def test_renoise_samples_the_exact_law_at_every_k(denoiser: Objective, num_steps: int) -> None:
    rng = torch.Generator().manual_seed(num_steps)
    levels: list[float | None] = [None, *geometric_grid(2.0, 0.2, num_steps - 1)]
    ids, _ = renoise_chain(
        lambda z, sigma: exact(denoiser, z, sigma),
        lambda prediction: torch.multinomial(
            torch.softmax(prediction.logits(), -1), 1, generator=rng
        ).squeeze(1),
        lambda ids, sigma: renoise(denoiser, ids, torch.full((N,), sigma), torch.randn(N, D, generator=rng)),
        levels,
    )
    frequencies = torch.bincount(ids, minlength=V) / N
    four_sigma = 4 * (PRIOR * (1 - PRIOR) / N).sqrt()
    assert bool(((frequencies - PRIOR).abs() < four_sigma).all()), (frequencies, PRIOR)


@torch.no_grad()
def test_temperature_on_the_prior_means_the_same_at_every_k(denoiser: Objective) -> None:
    """Sharpening the prior and keeping the evidence samples the sharpened prior whatever K is."""
    rng, target = torch.Generator().manual_seed(5), torch.softmax(PRIOR.log() / 0.5, -1)

    def draw(prediction: Prediction) -> torch.Tensor:
        logits = prediction.prior / 0.5 + (0.0 if prediction.evidence is None else prediction.evidence)
        return torch.multinomial(torch.softmax(logits, -1), 1, generator=rng).squeeze(1)

    ids, _ = renoise_chain(
        lambda z, sigma: exact(denoiser, z, sigma),
        draw,
        lambda ids, sigma: renoise(denoiser, ids, torch.full((N,), sigma), torch.randn(N, D, generator=rng)),
        [None, 2.0, 0.6, 0.2],
    )
    torch.testing.assert_close(torch.bincount(ids, minlength=V) / N, target, atol=0.01, rtol=0)


SOLVERS: dict[str, int] = {"euler": 1, "heun": 2, "multistep": 2}
"""Each solver with its order."""


def test_a_perfect_denoiser_is_recovered_by_every_solver_at_every_k() -> None:
    y = torch.randn(4, D)
    z = y + 80.0 * torch.randn(4, D)
    for num_steps in (1, 2, 5, 17):
        for solver in SOLVERS:
            torch.testing.assert_close(
                solve(lambda z, s: y, z, [*LogNormalSchedule(NoiseConfig()).grid(num_steps), 0.0], solver), y
            )


def even(num_steps: int) -> list[float]:
    return geometric_grid(2.0, 0.2, num_steps + 1)


def uneven(num_steps: int) -> list[float]:
    """Steps of falling length in log sigma: a multistep rule that took them for equal would lose its order
    (EDM Eq. 5, rho = 3)."""
    ends = 2.0 ** (1 / 3), 0.2 ** (1 / 3)
    return [(ends[0] + k / num_steps * (ends[1] - ends[0])) ** 3 for k in range(num_steps + 1)]


def test_solvers_converge_at_their_order() -> None:
    """y ~ N(0, 0.25): the ODE's solution is z(s) = z0 sqrt((s^2 + sd^2) / (s0^2 + sd^2)); a second order
    falls twice as fast."""
    variance, z0, high, low = 0.25, torch.tensor([3.0], dtype=torch.float64), 2.0, 0.2
    truth = z0 * ((low**2 + variance) / (high**2 + variance)) ** 0.5
    for solver, order in SOLVERS.items():
        few, many = (
            (solve(lambda z, s: z * variance / (variance + s**2), z0, uneven(n), solver) - truth).abs().item()
            for n in (80, 160)
        )
        assert few / many == pytest.approx(2**order, rel=0.15), solver


@pytest.mark.parametrize("grid", [even, uneven])
def test_solvers_follow_the_exact_denoiser_of_tokens(
    denoiser: Objective, grid: Callable[[int], list[float]]
) -> None:
    """The posterior mean over tokens, which bends: orders hold. On even steps multistep errs least for
    equally many calls."""
    table = denoiser.unit_table().double()
    start = 2.0 * torch.randn(400, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    calls = 0

    def mean(z: torch.Tensor, sigma: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return expected_target(PRIOR.double().log() + z @ table.T / sigma**2, table)

    truth = solve(mean, start, grid(1500), "heun")

    def error(solver: str, num_steps: int) -> float:
        return (solve(mean, start, grid(num_steps), solver) - truth).norm(dim=1).mean().item()

    for solver, order in SOLVERS.items():
        assert error(solver, 100) / error(solver, 200) == pytest.approx(2**order, rel=0.15), solver
    if grid is not even:
        return
    errors = {}
    for solver, num_steps in (("euler", 32), ("heun", 16), ("multistep", 32)):
        calls = 0
        errors[solver] = error(solver, num_steps)
        assert calls == 32
    assert errors["multistep"] < errors["heun"] < errors["euler"], errors


def test_heun_falls_back_to_euler_at_zero() -> None:
    z, heun = torch.randn(3, D), SAMPLERS["heun"]
    end = heun.advance(lambda z, s: 0.25 * z, Flow(z), 0.3, 0.0, lambda: z)
    torch.testing.assert_close(end.z, 0.25 * z)


class Ancestral(Sampler):
    """z_next ~ N(x0 + r (z - x0), sigma_next^2 (1 - r)) with r = sigma_next^2 / sigma^2 (Ho et al. 2020, Eq. 7)."""

    description = "adds noise on its way"

    def step(self, flow: Flow, x0: Tensor, sigma: float, sigma_next: float, noise: Noise) -> Flow:
        rest = sigma_next**2 / sigma**2
        return Flow(x0 + rest * (flow.z - x0) + sigma_next * (1 - rest) ** 0.5 * noise())


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_a_sampler_that_adds_noise_keeps_the_law_of_the_forward_process(
    monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    """z - y ~ N(0, sigma^2) at every level, for which each step's noise must be fresh."""
    monkeypatch.setitem(SAMPLERS, "ancestral", Ancestral())
    rng, y = torch.Generator().manual_seed(0), torch.full((200_000, 1), 0.7)
    start = y + 2.0 * torch.randn(y.shape, generator=rng)
    levels = geometric_grid(2.0, 0.5, num_steps + 1)
    end = solve(lambda z, s: y, start, levels, "ancestral", lambda k: torch.randn(y.shape, generator=rng))
    assert (end - y).std().item() == pytest.approx(0.5, rel=0.01)
    assert (end - y).mean().item() == pytest.approx(0, abs=0.005)


def test_the_mean_estimate_is_the_mean_row_and_shrinks_when_uncertain() -> None:
    table = F.normalize(torch.randn(50, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    certain = torch.full((1, 50), -100.0)
    certain[0, 3] = 100.0
    torch.testing.assert_close(expected_target(certain, table)[0], table[3])
    assert expected_target(torch.zeros(1, 50), table).norm() < 0.5


def test_plans() -> None:
    thinking = CheckpointConfig(
        name="a", model=_shape(True), objective=objective_config.validate_python("single_pass")
    )
    plan = build(thinking, device="meta").step_plan(4)
    assert (
        plan.sigmas == (None,) * 4
        and plan.readout == (False, False, False, True)
        and plan.commit == (True,) * 4
    )
    sampling = CheckpointConfig(
        name="a", model=_shape(True), objective=objective_config.validate_python("evidence")
    )
    plan = build(sampling, device="meta").step_plan(3)
    assert (
        plan.sigmas == (None, *geometric_grid(2.0, 0.2, 2))
        and all(plan.readout)
        and plan.commit == (True, False, False)
    )
    paper = CheckpointConfig(
        name="a", model=_shape(True), objective=objective_config.validate_python("paper")
    )
    plan = build(paper, device="meta").step_plan(3)
    assert (
        plan.num_core_steps == 4
        and plan.num_draws_skipped == 1
        and plan.append_own
        and plan.commit == (True, *(False,) * 3)
    )
    assert build(paper, device="meta").sampling_levels(3)[1:] == LogNormalSchedule(NoiseConfig()).grid(3)[1:]


def _shape(noisy: bool) -> HuginnConfig:
    return HuginnConfig(
        vocab_size=V, d_model=D, num_heads=2, mlp_width=16, max_seq_len=8, noise_conditioning=noisy
    )
