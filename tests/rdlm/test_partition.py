"""Partitions beyond equal mass of the published noise: bands, equal information, explicit edges, grids over
blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rdlm.config.objective import CorruptionConfig, NoiseConfig
from rdlm.diffusion.partition import evidence_curve, partition
from rdlm.diffusion.schedules import BandSchedule
from rdlm.errors import UserError

BANDS = BandSchedule(CorruptionConfig())
NOISE = NoiseConfig()


def test_band_schedule_is_the_distribution_that_training_draws() -> None:
    """Half the mass log-uniform in [0.2, 2], half in [2, 80]; icdf inverts cdf, also where the bands leave a
    gap or overlap."""
    sigma = torch.tensor([0.2, math.sqrt(0.4), 2.0, math.sqrt(160.0), 80.0], dtype=torch.float64)
    torch.testing.assert_close(BANDS.cdf(sigma), torch.tensor([0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    q = torch.linspace(0, 1, 21, dtype=torch.float64)
    for low, high in (((0.2, 2.0), (2.0, 80.0)), ((0.2, 1.0), (3.0, 80.0)), ((0.2, 5.0), (1.0, 80.0))):
        schedule = BandSchedule(CorruptionConfig(low_band=low, high_band=high))
        torch.testing.assert_close(schedule.cdf(schedule.icdf(q)), q, atol=1e-9, rtol=0)


def test_blocks_follow_the_objectives_own_distribution() -> None:
    edges = partition(NOISE, 8, 4, schedule=BANDS).edges
    assert edges == pytest.approx((80.0, math.sqrt(160.0), 2.0, math.sqrt(0.4), 0.2))
    assert partition(NOISE, 8, 2, "log_uniform", schedule=BANDS).edges == pytest.approx((80.0, 4.0, 0.2))
    cut = partition(NOISE, 8, 4, schedule=BANDS, overlap=0.1)
    assert cut.training_range(0)[1] == pytest.approx(80.0) and cut.training_range(3)[0] == pytest.approx(0.2)
    drawn = cut.sample_level(1, (5000,), torch.Generator().manual_seed(0))
    low, high = cut.training_range(1)
    assert low <= drawn.min() * (1 + 1e-6) and drawn.max() <= high * (1 + 1e-6)


def test_explicit_edges_are_taken_as_they_are() -> None:
    assert partition(NOISE, 6, 3, "explicit", edges=(2.0, 0.4)).edges == (80.0, 2.0, 0.4, 0.002)
    for edges in ((0.4, 2.0), (2.0,), (90.0, 1.0)):
        with pytest.raises(UserError, match="^edges="):
            partition(NOISE, 6, 3, "explicit", edges=edges)


def test_equal_information_cuts_a_measured_curve_into_equal_drops() -> None:
    """Linear in log sigma between 0.1 and 10: the cut in two lies at 1; a kink moves it into the steep part."""
    flat = ((0.1, 0.0), (10.0, 4.0))
    assert partition(NOISE, 4, 2, "equal_information", curve=flat).edges[1] == pytest.approx(1.0, rel=5e-3)
    steep = ((0.1, 0.0), (0.2, 3.0), (10.0, 4.0))
    assert partition(NOISE, 4, 2, "equal_information", curve=steep).edges[1] == pytest.approx(
        0.1 * 2 ** (2 / 3), rel=5e-3
    )
    with pytest.raises(UserError, match="^curve="):
        partition(NOISE, 4, 2, "equal_information", curve=((0.1, 1.0), (10.0, 1.0)))


def test_closed_form_curve_against_simulation() -> None:
    """Posterior entropy of 300 orthogonal unit rows under a flat prior, by Monte Carlo: within 0.15 nats
    where the sum over the others is near its mean, and the level of half the information within 15 %."""
    tokens, rng = 300, np.random.default_rng(0)
    curve = evidence_curve(math.log(tokens), 0.1, 80.0)
    levels, closed = np.array(curve).T
    eps = rng.standard_normal((4000, tokens))

    def simulated(sigma: float) -> float:
        logits = eps / sigma
        logits[:, 0] += 1 / sigma**2
        return float(np.mean(np.logaddexp.reduce(logits, axis=1) - logits[:, 0]))

    for sigma in (80.0, 2.0, 1.0, 0.6, 0.45):
        assert np.interp(sigma, levels, closed) == pytest.approx(simulated(sigma), abs=0.15), sigma
    measured = [simulated(level) for level in levels[::8]]
    half = np.interp(measured[-1] / 2, measured, levels[::8])
    assert partition(NOISE, 4, 2, "equal_information", curve=curve).edges[1] == pytest.approx(half, rel=0.15)


def test_a_grid_of_as_many_levels_as_blocks_is_their_upper_edges() -> None:
    for kind, extra in (
        ("equi_probability", {}),
        ("log_uniform", {}),
        ("explicit", {"edges": (3.0, 1.0, 0.3)}),
    ):
        cut = partition(NOISE, 8, 4, kind, schedule=BANDS, **extra)
        assert cut.grid(4) == list(cut.edges[:-1])
        assert [cut.block_of(sigma) for sigma in cut.grid(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [cut.block_of(sigma) for sigma in cut.grid(2)] == [0, 2]
        assert all(a > b for a, b in zip(cut.grid(9), cut.grid(9)[1:], strict=False))
    cut = partition(NOISE, 8, 4)
    assert cut.grid(6)[1:] == pytest.approx(cut.schedule.grid(6)[1:]), (
        "equal mass is equal mass, however many levels"
    )
    assert cut.block_of(None) == 0
