"""Counter-based noise: the same on every device, for any part of it, and normal."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from rdlm.config.objective import CorruptionConfig, NoiseConfig
from rdlm.data.batch import Batch
from rdlm.diffusion.corruption import draw_levels
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from rdlm.random_streams import CounterStream, counter_stream, generator, normals


def stream(key: int) -> CounterStream:
    return CounterStream(key, torch.Generator())


def test_integers_are_those_of_splitmix64() -> None:
    """Published outputs for the seed 1234567, as int64 holds them."""
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    found = stream(1234567).bits(torch.arange(5)).numpy().view(np.uint64)
    assert found.tolist() == published


@pytest.mark.parametrize("key", [-1, -(2**63), 2**63 - 1, 0])
def test_integers_wrap_as_unsigned_ones_do(key: int) -> None:
    counters = np.array([0, 1, 2**31, 2**40 + 7], dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = np.uint64(key % 2**64) + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found = stream(key).bits(torch.from_numpy(counters.astype(np.int64)))
    assert found.numpy().view(np.uint64).tolist() == (x ^ (x >> np.uint64(31))).tolist()


def test_numbers_are_normal() -> None:
    drawn = counter_stream(0, 1).normals(torch.arange(4000), 501)
    flat = drawn.flatten().double()
    assert abs(flat.mean()) < 4 / math.sqrt(flat.numel()) and abs(flat.var() - 1) < 0.01
    assert abs((flat**3).mean()) < 0.01 and abs((flat**4).mean() - 3) < 0.03
    share = [(flat.abs() < cut).double().mean().item() for cut in (0.5, 1.0, 2.0, 3.0)]
    assert share == pytest.approx([math.erf(cut / math.sqrt(2)) for cut in (0.5, 1.0, 2.0, 3.0)], abs=1e-3)
    table = torch.corrcoef(drawn[:, :8].T)
    assert (table - torch.eye(8)).abs().max() < 0.08, "columns are independent"
    assert abs(torch.corrcoef(torch.stack([drawn[:-1, 0], drawn[1:, 0]]))[0, 1]) < 0.08


def test_truncated_numbers_stay_inside_and_keep_their_shape() -> None:
    drawn = counter_stream(0, 2).normals(torch.arange(2000), 101, 3.0)
    flat = drawn.flatten().double()
    assert float(flat.abs().max()) <= 3.0 and len(flat.unique()) > 0.9 * len(flat)
    wanted = torch.nn.init.trunc_normal_(torch.empty(200_000), 0.0, 1.0, -3.0, 3.0).double()
    assert flat.std().item() == pytest.approx(wanted.std().item(), rel=0.01)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_a_row_does_not_depend_on_the_others(width: int) -> None:
    every, some = torch.arange(100), torch.tensor([3, 50, 99])
    for make in (generator, counter_stream):
        whole = normals(make(5, 6), every, 100, width, torch.device("cpu"))
        part = normals(make(5, 6), some, 100, width, torch.device("cpu"))
        assert whole.shape == (100, width)
        torch.testing.assert_close(part, whole[some], rtol=1e-6, atol=1e-6)
    assert not torch.equal(whole, counter_stream(5, 7).normals(every, width))


def test_a_counter_noises_the_share_exactly() -> None:
    """The number is rounded at random, so that its mean is the share also where few positions are drawn."""
    few = CorruptionConfig(share=0.3)
    counts = [
        int(draw_levels(few, NoiseConfig(), None, (1, 2), counter_stream(0, n))[1].sum()) for n in range(2000)
    ]
    assert set(counts) == {0, 1} and np.mean(counts) == pytest.approx(0.6, abs=0.05)
    quarter = CorruptionConfig(share=0.25)
    places = [draw_levels(quarter, NoiseConfig(), None, (4, 16), counter_stream(0, n))[1] for n in range(300)]
    assert {int(each.sum()) for each in places} == {16}
    assert (torch.stack(places).float().mean(0) - 0.25).abs().max() < 0.12, "every position alike"
    whole_rows = draw_levels(
        CorruptionConfig(share=0.5, per="sequence"), NoiseConfig(), None, (8, 16), counter_stream(0)
    )[1]
    assert int(whole_rows[:, 0].sum()) == 4 and bool((whole_rows == whole_rows[:, :1]).all())


@pytest.mark.parametrize("name", ["single_pass", "evidence", "paper"])
def test_the_loss_from_a_counter_is_pure_and_near_that_from_a_generator(
    tiny: Callable[..., Objective], name: str
) -> None:
    ids = torch.randint(0, 64, (8, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(8, 32, dtype=torch.bool))
    model = tiny("huginn", name)

    def loss(step: int, **key: int) -> float:
        return float(model.loss(batch, Keys(0, step, source="counter", **key)).total.detach())

    assert loss(3) == loss(3) and len({loss(3), loss(4), loss(3, rank=1), loss(3, micro=1)}) == 4
    counted = np.mean([loss(step) for step in range(20)])
    drawn = np.mean([float(model.loss(batch, Keys(0, step)).total.detach()) for step in range(20)])
    assert counted == pytest.approx(drawn, rel=0.05)


def test_a_random_state_comes_from_the_counter_too(tiny: Callable[..., Objective]) -> None:
    model = tiny("huginn", "onestep", state_init="normal").model
    e = torch.zeros(2, 500, 32)
    drawn = [model.initial_state(e, make(0, 1)) for make in (generator, counter_stream)]
    assert drawn[0].std().item() == pytest.approx(drawn[1].std().item(), rel=0.03)
    assert drawn[0].abs().max().item() == pytest.approx(drawn[1].abs().max().item(), rel=0.1)
