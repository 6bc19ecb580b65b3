"""Noise schedule, EDM coefficients and partitions against the published numbers (DiffusionBlocks Sec. 3.3,
App. C)."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from rdlm.config.objective import NoiseConfig
from rdlm.diffusion.partition import partition
from rdlm.diffusion.schedules import LogNormalSchedule, denoise_scalings, edm_weight, geometric_grid
from rdlm.errors import UserError

SCHEDULE = LogNormalSchedule(NoiseConfig())


def test_cdf_is_the_truncated_normal_of_log_sigma() -> None:
    low, high = ((math.log(s) + 1.2) / 1.2 for s in (0.002, 80.0))
    reference = stats.truncnorm(low, high, loc=-1.2, scale=1.2)
    sigma = torch.tensor([0.002, 0.01, 0.1, 0.3, 1.0, 5.0, 80.0], dtype=torch.float64)
    expected = torch.from_numpy(reference.cdf(sigma.log().numpy()))
    torch.testing.assert_close(SCHEDULE.cdf(sigma), expected, atol=1e-12, rtol=0)


def test_icdf_inverts_cdf() -> None:
    q = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(SCHEDULE.cdf(SCHEDULE.icdf(q)), q, atol=1e-9, rtol=0)


def test_three_block_edges_are_the_published_ones() -> None:
    edges = partition(NoiseConfig(), num_layers=12, num_blocks=3).edges
    assert [round(edge, 4) for edge in edges] == [80.0, 0.5050, 0.1796, 0.002]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 6])
def test_blocks_have_equal_mass(num_blocks: int) -> None:
    edges = torch.tensor(partition(NoiseConfig(), 12, num_blocks).edges, dtype=torch.float64)
    mass = -SCHEDULE.cdf(edges).diff()
    torch.testing.assert_close(mass, torch.full_like(mass, 1 / num_blocks), atol=1e-9, rtol=0)


def test_uniform_partitions() -> None:
    assert partition(NoiseConfig(), 4, 2, "uniform").edges[1] == pytest.approx((80 + 0.002) / 2)
    assert partition(NoiseConfig(), 4, 2, "log_uniform").edges[1] == pytest.approx(math.sqrt(80 * 0.002))


def test_high_noise_belongs_to_early_layers_and_ownership_is_exact() -> None:
    blocks = partition(NoiseConfig(), 12, 3, layers_per_block=[3, 6, 3])
    assert [blocks.block_of(sigma) for sigma in (80.0, 0.51, 0.5, 0.18, 0.17, 0.002)] == [0, 0, 1, 1, 2, 2]
    assert [list(r) for r in blocks.layers] == [[0, 1, 2], [3, 4, 5, 6, 7, 8], [9, 10, 11]]
    assert blocks.block_of(blocks.edges[1]) == 1  # block b owns (edges[b + 1], edges[b]]


def test_every_grid_level_belongs_to_the_block_of_the_same_index() -> None:
    blocks = partition(NoiseConfig(), 12, 4)
    levels = SCHEDULE.grid(4)
    assert len(levels) == 4 and levels[0] == pytest.approx(80.0)
    assert [blocks.block_of(sigma) for sigma in levels] == [0, 1, 2, 3]


def test_samples_follow_the_training_distribution_inside_the_widened_range() -> None:
    blocks = partition(NoiseConfig(), 12, 3, overlap=0.1)
    low, high = blocks.training_range(1)
    ratio = (blocks.edges[1] / blocks.edges[2]) ** 0.1
    assert low == pytest.approx(blocks.edges[2] / ratio) and high == pytest.approx(blocks.edges[1] * ratio)
    assert blocks.training_range(0)[1] == 80.0 and blocks.training_range(2)[0] == 0.002  # clipped
    drawn = blocks.sample_level(1, (20_000,), torch.Generator().manual_seed(0)).double()
    assert low <= drawn.min() and drawn.max() <= high
    bounds = SCHEDULE.cdf(torch.tensor([low, high], dtype=torch.float64))
    uniform = (SCHEDULE.cdf(drawn) - bounds[0]) / (bounds[1] - bounds[0])
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"num_blocks": 13}, "num_blocks"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_blocks": 3, "layers_per_block": [4, 4, 5]}, "layers_per_block"),
        ({"num_blocks": 3, "overlap": -0.1}, "overlap"),
    ],
)
def test_impossible_partitions_name_the_field(arguments: dict, field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}="):
        partition(NoiseConfig(), 12, **arguments)


def test_edm_coefficients() -> None:
    """Karras et al. 2022, Table 1, by hand at sigma = 0.5 = sigma_data and in the limits."""
    c = denoise_scalings(torch.tensor([0.5, 1e-6, 1e6], dtype=torch.float64), 0.5)
    torch.testing.assert_close(
        c.c_skip, torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(
        c.c_out, torch.tensor([0.5 / math.sqrt(2), 1e-6, 0.5], dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(
        c.c_in, torch.tensor([math.sqrt(2), 2.0, 1e-6], dtype=torch.float64), atol=1e-9, rtol=0
    )
    assert c.c_noise[0].item() == pytest.approx(math.log(0.5) / 4)
    sigma = torch.tensor([0.002, 0.3, 80.0], dtype=torch.float64)
    torch.testing.assert_close(edm_weight(sigma, 0.5), 1 / denoise_scalings(sigma, 0.5).c_out.square())
    assert edm_weight(sigma, 0.5)[0].item() == pytest.approx(2.5e5, rel=1e-4)


def test_scaled_input_has_unit_variance() -> None:
    """c_in is defined by Var[c_in (y + sigma eps)] = 1 for data of standard deviation sigma_data."""
    rng = torch.Generator().manual_seed(0)
    for sigma in (0.05, 0.5, 20.0):
        z = 0.5 * torch.randn(200_000, generator=rng) + sigma * torch.randn(200_000, generator=rng)
        assert (denoise_scalings(torch.tensor(sigma), 0.5).c_in * z).std().item() == pytest.approx(
            1.0, abs=0.01
        )


def test_geometric_grid() -> None:
    assert geometric_grid(2.0, 0.2, 3) == pytest.approx([2.0, math.sqrt(0.4), 0.2])
    assert geometric_grid(2.0, 0.2, 1) == [2.0] and geometric_grid(2.0, 0.2, 0) == []
