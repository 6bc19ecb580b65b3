"""Networks of blocks: independence, one function from level to block, scoring and sampling through it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.objective import NoiseConfig
from rdlm.data.batch import Batch
from rdlm.diffusion.corruption import draw_levels
from rdlm.diffusion.partition import partition_of
from rdlm.errors import UserError
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from rdlm.objectives.blockwise import Blockwise, drawn_block
from rdlm.objectives.next_token import NextToken
from rdlm.registry import build

T, V = 10, 64


@pytest.fixture(scope="session")
def cut(tiny_config: Callable[..., CheckpointConfig]) -> Callable[..., CheckpointConfig]:
    """``cut("evidence", num_blocks=2)`` -> a tiny llama of 4 layers in blocks."""

    def make(objective: object = "evidence", block: int | None = None, **blocks: Any) -> CheckpointConfig:
        config = tiny_config("llama", objective, num_layers=4)
        section = {"num_blocks": 2, **blocks}
        return CheckpointConfig.model_validate({**config.model_dump(), "blocks": section, "block": block})

    return make


def batch() -> Batch:
    ids = torch.randint(0, V, (2, T + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, T, dtype=torch.bool))


@pytest.mark.parametrize("targets", ["frozen", "own"])
def test_a_block_built_alone_is_the_block_of_the_whole(cut, targets: str) -> None:
    """Same weights, same loss to the last bit, and no parameter of another block exists."""
    whole = build(cut(targets=targets, layers_per_block=(1, 3)), seed=5)
    for b, part in enumerate(whole.parts):
        alone = build(cut(targets=targets, layers_per_block=(1, 3), block=b), seed=5)
        assert not isinstance(alone, Blockwise)
        ours, theirs = dict(alone.named_parameters()), dict(part.named_parameters())
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert sum("layers" in name and "proj.weight" in name for name in ours) == 2 * (1, 3)[b]
        totals = [d.loss(batch(), Keys(seed=7, step=3)).total for d in (alone, part)]
        assert torch.equal(totals[0], totals[1])
    first, second = whole.parts
    assert not torch.equal(first.model.wte.weight, second.model.wte.weight), (
        "every block has a stem of its own"
    )
    shared = torch.equal(first.unit_table(), second.unit_table())
    assert shared is (targets == "frozen")


def test_frozen_targets_are_unit_rows_that_nothing_trains(cut) -> None:
    denoiser = build(cut(block=0), seed=0)
    rows = denoiser.unit_table()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(V))
    assert not rows.requires_grad and all(id(rows) != id(p) for p in denoiser.parameters())
    assert torch.equal(denoiser.clean(torch.tensor([[3, 9]])), rows[[3, 9]][None])
    assert not torch.equal(rows, build(cut(block=0, target_seed=1), seed=0).unit_table())
    with torch.inference_mode():
        table = build(cut(block=0, target_seed=2)).unit_table()
    assert not table.is_inference(), "a table first asked for by a server may be used in training"


@pytest.mark.parametrize("objective", ["paper", "evidence"])
def test_blocks_train_on_their_own_levels(cut, objective: str) -> None:
    config = cut(objective, num_blocks=4, overlap=0.1)
    drawn = []
    for b in range(4):
        denoiser = build(cut(objective, num_blocks=4, overlap=0.1, block=b))
        sigma, noised = draw_levels(
            config.objective.corruption,
            denoiser.noise,
            denoiser.block,
            (4000, 1),
            torch.Generator().manual_seed(0),
        )
        low, high = partition_of(config).training_range(b)
        assert low <= sigma[noised].min() and sigma[noised].max() <= high * (1 + 1e-6)
        drawn.append(sigma[noised].log().mean().item())
    assert drawn == sorted(drawn, reverse=True), "block 0 has the highest noise"


def test_the_noise_of_blocks_is_independent(cut, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step and seed must not give every block the same draws."""
    seen = []
    whole = build(cut("paper"), seed=0)
    real = NextToken.corrupt
    monkeypatch.setattr(
        NextToken, "corrupt", lambda d, t, rng: seen.append(torch.rand(64, generator=rng)) or real(d, t, rng)
    )
    for part in whole.parts:
        part.loss(batch(), Keys(seed=0, step=0))
    assert abs(float(torch.corrcoef(torch.stack(seen))[0, 1])) < 0.4


def test_visits_are_shuffled_laps() -> None:
    visits = [drawn_block(4, visit, seed=11) for visit in range(4000)]
    assert visits == [drawn_block(4, visit, seed=11) for visit in range(4000)]
    assert visits != [drawn_block(4, visit, seed=12) for visit in range(4000)]
    laps = [tuple(visits[i : i + 4]) for i in range(0, 4000, 4)]
    assert all(sorted(lap) == [0, 1, 2, 3] for lap in laps)
    assert len(set(laps)) == 24, "every order comes up"
    for place in range(4):
        assert all(200 < [lap[place] for lap in laps].count(b) < 300 for b in range(4)), "each place is fair"


@pytest.mark.parametrize("objective", ["evidence", "paper"])
@pytest.mark.parametrize("targets", ["frozen", "own"])
def test_scoring_asks_the_owner_of_each_level(cut, objective: str, targets: str) -> None:
    """K = 1 is block 0 alone; at K = 2 both blocks matter; a block nobody asked changes nothing."""
    config = cut(objective, num_blocks=4, targets=targets)
    whole = build(config, seed=0)
    data = batch()

    def scores(ks: list[int]) -> dict[int, torch.Tensor]:
        return whole.token_logprobs(data.inputs, data.targets, ks, num_draws=2)

    def spoil(b: int) -> None:
        with torch.no_grad():
            whole.parts[b].model.head.weight.mul_(-1.5)

    before = scores([1, 2])
    alone = build(cut(objective, num_blocks=4, targets=targets, block=0), seed=0)
    assert torch.equal(before[1], alone.token_logprobs(data.inputs, data.targets, [1])[1])
    assert [partition_of(config).block_of(s) for s in build(config, device="meta").sampling_levels(4)] == [
        0,
        1,
        2,
        3,
    ]
    assert [partition_of(config).block_of(s) for s in build(config, device="meta").sampling_levels(2)] == [
        0,
        2,
    ]
    for b in (1, 3):
        spoil(b)
    after = scores([1, 2])
    assert torch.equal(after[1], before[1]) and torch.equal(after[2], before[2])
    spoil(2)
    after = scores([1, 2])
    assert torch.equal(after[1], before[1]) and not torch.allclose(after[2], before[2])
    torch.testing.assert_close(scores([2])[2].exp().max() < 1, torch.tensor(True))


def test_a_level_must_be_asked_of_its_owner(cut) -> None:
    whole = build(cut(), seed=0)
    with pytest.raises(TypeError, match="at\\(sigma\\)"):
        whole.clean(torch.tensor([1]))
    with pytest.raises(AssertionError, match="at\\(sigma\\)"):
        whole.condition(torch.tensor([[0.3]]), torch.zeros(1))


@pytest.mark.parametrize(
    ("objective", "blocks", "field"),
    [
        ("next_token", {}, "blocks"),
        ("evidence", {"num_blocks": 5}, "num_blocks"),
        ("evidence", {"layers_per_block": (1, 4)}, "layers_per_block"),
        ("evidence", {"block": 2}, "block"),
        ("evidence", {"partition": "explicit", "edges": (90.0,)}, "edges"),
        ("evidence", {"partition": "equal_information", "curve": ((2.0, 1.0), (1.0, 2.0))}, "curve"),
    ],
)
def test_impossible_blocks_are_refused_by_field(cut, objective: str, blocks: dict, field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}="):
        build(cut(objective, **blocks), device="meta")


@pytest.mark.parametrize("objective", ["single_pass", {"name": "evidence", "depth": {"mean": 2}}])
def test_thinking_objectives_have_no_blocks(cut, objective: object) -> None:
    with pytest.raises(UserError, match="^blocks.num_blocks=2: .* iterates its layers"):
        build(cut(objective), device="meta")


def test_a_recurrent_core_cannot_be_cut(tiny_config) -> None:
    config = tiny_config("huginn", "evidence")
    with pytest.raises(UserError, match="^blocks.num_blocks="):
        build(
            CheckpointConfig.model_validate({**config.model_dump(), "blocks": {"num_blocks": 2}}),
            device="meta",
        )


@pytest.mark.parametrize(
    "section",
    [
        {"num_blocks": 2, "edges": (1.0,)},
        {"num_blocks": 2, "partition": "explicit"},
        {"num_blocks": 2, "partition": "equal_information"},
        {"num_blocks": 2, "prior_nats": 4.0},
        {"num_blocks": 2, "overlap": 1.5},
        {"num_blocks": 0},
    ],
)
def test_fields_that_would_be_ignored_are_errors(tiny_config, section: dict) -> None:
    with pytest.raises(ValueError, match="blocks"):
        CheckpointConfig.model_validate({**tiny_config("llama", "evidence").model_dump(), "blocks": section})


def test_one_block_is_the_network_as_it_was(tiny, tiny_config) -> None:
    """num_blocks 1 with the table of the model itself: the same weights and loss as without the section."""
    config = tiny_config("llama", "evidence")
    one = build(
        CheckpointConfig.model_validate(
            {**config.model_dump(), "blocks": {"num_blocks": 1, "targets": "own"}}
        ),
        seed=0,
    )
    plain: Objective = tiny("llama", "evidence")
    totals = [d.loss(batch(), Keys(seed=2, step=1)).total for d in (one, plain)]
    assert torch.equal(totals[0], totals[1]) and math.isfinite(totals[0].item())
    assert NoiseConfig() == one.noise
