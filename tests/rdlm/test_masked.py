"""Masked diffusion: what a hidden token may know, the bound against brute force, the sampler's law, blocks, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdlm.blockwise import Blockwise, blocks_of
from rdlm.checkpoint import load, save
from rdlm.config import CheckpointConfig, MaskingConfig, ObjectiveConfig
from rdlm.decoding_types import SamplingParams
from rdlm.denoiser import Denoiser, Prediction
from rdlm.errors import UserError
from rdlm.masked_denoiser import MaskedDenoiser
from rdlm.masking import LinearMasking, hide, spread
from rdlm.objectives import Batch, loss_terms
from rdlm.partition import partition_of
from rdlm.registry import build
from rdlm.scoring import estimator_of, token_logprobs, token_scores
from rdlm.unmasking import bound, unmask

V, T = 64, 12


@pytest.fixture(scope="session")
def config(tiny_config: Callable[..., CheckpointConfig]) -> Callable[..., CheckpointConfig]:
    """``config(num_blocks=2)`` -> a tiny masked model of 4 layers, in blocks where asked for."""

    def make(block: int | None = None, model: dict[str, Any] | None = None, **blocks: Any) -> CheckpointConfig:
        whole = tiny_config("masked", "masked", num_layers=4, **(model or {}))
        return CheckpointConfig.model_validate({**whole.model_dump(), "blocks": blocks or None, "block": block})

    return make


def awake(denoiser: Denoiser) -> Denoiser:
    """With AdaLN that does something: it starts at zero."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "modulation" in name:
                parameter.normal_(0.0, 0.2, generator=rng)
    return denoiser


def batch(rows: int = 4, mask: Tensor | None = None, vocab: int = V) -> Batch:
    ids = torch.randint(0, vocab, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(rows, T, dtype=torch.bool) if mask is None else mask)


class Exact(nn.Module):
    """The exact denoiser of a joint law p [V, .., V] over T tokens, which asks about all positions at once; at any level the same."""

    def __init__(self, law: Tensor) -> None:
        super().__init__()
        self.law, self.mask_id, self.calls = law, law.shape[0], 0
        self.known: dict[tuple[int, ...], Tensor] = {}

    def at(self, sigma: float | None) -> Exact:
        return self

    def hidden(self, ids: Tensor, level: Tensor) -> Tensor:
        """Log-probabilities of each position given the tokens in sight: [B, T, V]."""
        self.calls += 1
        rows = [self._marginals(tuple(row)) for row in ids.tolist()]
        return torch.stack(rows) if rows else torch.zeros(0, ids.shape[1], self.mask_id)

    def _marginals(self, row: tuple[int, ...]) -> Tensor:
        if row not in self.known:
            law, dims = self.law, range(len(row))
            for position, token in enumerate(row):
                if token != self.mask_id:
                    index = torch.tensor([token])
                    law = torch.zeros_like(law).index_copy_(position, index, law.index_select(position, index))
            law = law / law.sum()
            self.known[row] = torch.stack([law.sum([d for d in dims if d != i]) if len(row) > 1 else law for i in dims]).log()
        return self.known[row]

    def predict(self, states: Tensor) -> Prediction:
        return Prediction(states.clamp(min=-1e4).float())

    def loss(self, states: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        losses = -states.gather(1, targets.unsqueeze(1)).squeeze(1).float()
        return (losses * weight).sum(), losses


def joint(vocab: int, length: int, seed: int = 0) -> Tensor:
    law = torch.rand((vocab,) * length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return law / law.sum()


def expected_bound(denoiser: Any, row: Tensor, num_steps: int) -> float:
    """The bound in full: all levels, all 2^T ways to hide."""
    ways = torch.tensor(list(itertools.product([False, True], repeat=len(row))))
    total = 0.0
    for k in range(1, num_steps + 1):
        level = k / num_steps
        share = torch.where(ways, level, 1 - level).prod(1)
        ids = row.expand(ways.shape)
        states = denoiser.hidden(ids.masked_fill(ways, denoiser.mask_id), torch.full((len(ways),), level))[ways]
        losses = denoiser.loss(states, ids[ways], torch.ones(len(states)))[1]
        total += float((torch.zeros(ways.shape).masked_scatter(ways, losses).sum(1) * share).sum()) / k
    return total


# What is learned --------------------------------------------------------------------------------------------------------------


def test_a_hidden_token_never_reaches_a_prediction_and_one_in_sight_reaches_all(config) -> None:
    denoiser = awake(build(config(), seed=0))
    assert isinstance(denoiser, MaskedDenoiser)
    hidden_ones = torch.arange(T)[None].expand(2, T) % 3 == 0
    level, targets = torch.tensor([0.4, 0.4]), batch(2).targets

    def logits(ids: Tensor) -> Tensor:
        return denoiser.predict(denoiser.hidden(ids.masked_fill(hidden_ones, V), level)).logits()

    before = logits(targets)
    assert before.shape == (2, T, V), "the mask is no answer"
    for position in range(T):
        changed = targets.clone()
        changed[:, position] = (changed[:, position] + 7) % V
        moved = (logits(changed) - before).abs().amax(-1) > 1e-6
        assert not moved.any() if hidden_ones[0, position] else moved[hidden_ones].all(), position


def test_the_loss_hides_what_it_asks_and_touches_nothing_else(config, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(4, T, dtype=torch.bool)
    mask[:, 7:] = False
    data, denoiser = batch(mask=mask), awake(build(config(), seed=0))
    seen: list[tuple[Tensor, Tensor]] = []
    real = MaskedDenoiser.hidden
    monkeypatch.setattr(MaskedDenoiser, "hidden", lambda self, ids, level: seen.append((ids, level)) or real(self, ids, level))
    terms = loss_terms(denoiser, data, step=2, seed=9)
    ids, level = seen[0]
    hidden = ids == V
    assert not hidden[:, 7:].any() and torch.equal(ids[~hidden], data.targets[~hidden])
    logits = denoiser.predict(real(denoiser, ids, level)).logits()
    ce = -logits.log_softmax(-1).gather(2, data.targets.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(terms.total, (ce * hidden / level[:, None]).sum())
    assert terms.count == mask.sum()
    assert torch.equal(terms.total, loss_terms(denoiser, data, step=2, seed=9).total)
    for other in ({"step": 3}, {"seed": 8}, {"rank": 1}, {"micro": 1}):
        assert not torch.equal(terms.total, loss_terms(denoiser, data, **{"step": 2, "seed": 9, **other}).total)
    unseen = Batch((data.input_ids + 1) % V, data.targets, mask)
    assert torch.equal(terms.total, loss_terms(denoiser, unseen, step=2, seed=9).total), "it models the targets themselves"


def test_every_parameter_learns(config) -> None:
    denoiser = awake(build(config(model={"tie_embeddings": False}), seed=0))
    loss_terms(denoiser, batch(8), step=0, seed=0).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in denoiser.parameters())


def test_it_learns_what_one_token_says_of_another() -> None:
    """Arithmetic sequences modulo 12: tokens alone are uniform, so only context can lower the bound, and only beyond K = 1."""
    rng = torch.Generator().manual_seed(0)

    def rows(count: int) -> Batch:
        start, stride = torch.randint(12, (count, 1), generator=rng), torch.randint(1, 4, (count, 1), generator=rng)
        ids = (start + stride * torch.arange(16)) % 12
        return Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool))

    shape = {
        "family": "masked",
        "vocab_size": 12,
        "d_model": 64,
        "num_heads": 2,
        "mlp_width": 128,
        "num_layers": 3,
        "max_seq_len": 16,
    }
    document = {"name": "toy", "model": {**shape, "noise_conditioning": True}, "objective": {"name": "masked"}}
    denoiser = build(CheckpointConfig.model_validate(document), seed=0)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, step / 50)
        terms = loss_terms(denoiser, rows(16), step=step, seed=0)
        (terms.total / terms.count).backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    held_out = rows(64).targets
    alone, four, many = (float(bound(denoiser, held_out, k).sum(1).mean()) for k in (1, 4, 64))
    assert alone > 0.98 * 16 * math.log(12) and many < four < 0.75 * alone and many < 0.6 * alone, (alone, four, many)


def test_a_batch_in_which_nothing_is_hidden_costs_nothing(config) -> None:
    denoiser = build(config(), seed=0)
    terms = loss_terms(denoiser, batch(mask=torch.zeros(4, T, dtype=torch.bool)), step=0, seed=0)
    terms.total.backward()
    assert terms.total == 0 and terms.metrics["ce"] == 0 and all(p.grad.abs().sum() == 0 for p in denoiser.parameters())


def test_levels_cover_the_interval_and_tokens_are_hidden_at_their_rate() -> None:
    rng = torch.Generator().manual_seed(0)
    levels = spread(50, rng).sort().values
    torch.testing.assert_close(levels.diff(), torch.full((49,), 0.02, dtype=torch.float64))
    rate = hide(torch.tensor([0.1, 0.5, 1.0]), torch.ones(3, 20_000, dtype=torch.bool), rng).float().mean(1)
    torch.testing.assert_close(rate, torch.tensor([0.1, 0.5, 1.0]), atol=0.02, rtol=0)
    schedule, q = LinearMasking(MaskingConfig(t_min=0.01)), torch.rand(9, dtype=torch.float64)
    torch.testing.assert_close(schedule.cdf(schedule.icdf(q)), q)
    assert schedule.widen(0.4, 0.6, 0.5) == pytest.approx((0.3, 0.7)) and schedule.widen(0.01, 1.0, 0.5) == (0.01, 1.0)


# The bound --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_no_model_gives_more_than_all_probability(config, num_steps: int) -> None:
    """Sum over all 3^3 sequences of exp(-bound) <= 1: an untrained network whose output depends on everything."""
    denoiser = awake(build(config(model={"vocab_size": 3}, num_blocks=2), seed=0))
    whole: Any = _Levels(denoiser, 3)
    with torch.no_grad():
        mass = sum(math.exp(-expected_bound(whole, torch.tensor(x), num_steps)) for x in itertools.product(range(3), repeat=3))
    assert 0.5 < mass <= 1 + 1e-6
    if num_steps == 1:
        assert mass == pytest.approx(1, abs=1e-5), "independent tokens: a likelihood"


class _Levels(nn.Module):
    """Asks the block that owns the level."""

    def __init__(self, denoiser: Denoiser, mask_id: int) -> None:
        super().__init__()
        self.denoiser, self.mask_id = denoiser, mask_id

    def hidden(self, ids: Tensor, level: Tensor) -> Tensor:
        self.owner: Any = self.denoiser.at(float(level[0]))
        return self.owner.hidden(ids, level)

    def loss(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        return self.owner.loss(*args)


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_draws_agree_with_the_bound_in_full(num_steps: int) -> None:
    denoiser: Any = Exact(joint(3, 3))
    row = torch.tensor([2, 0, 1])
    drawn = [bound(denoiser, row[None], num_steps, seed=seed, num_draws=4).sum() for seed in range(120)]
    error = float(torch.stack(drawn).std()) / math.sqrt(120)
    assert float(torch.stack(drawn).mean()) == pytest.approx(expected_bound(denoiser, row, num_steps), abs=4 * error + 1e-5)


def test_bound_of_an_exact_denoiser_falls_to_the_likelihood() -> None:
    """With one token at every K, with three as K grows (each step then brings at most one of them into sight)."""
    one: Any = Exact(joint(5, 1))
    assert float(bound(one, torch.tensor([[3]]), 1)) == pytest.approx(-math.log(one.law[3]), rel=1e-5)
    for k in (1, 7, 64):
        assert expected_bound(one, torch.tensor([3]), k) == pytest.approx(-math.log(one.law[3]), rel=1e-5)
    law = joint(3, 3, seed=4)
    exact: Any = Exact(law)
    gaps = []
    for k in (1, 4, 16, 64):
        mean = sum(float(law[x]) * expected_bound(exact, torch.tensor(x), k) for x in itertools.product(range(3), repeat=3))
        gaps.append(mean + float((law * law.log()).sum()))
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] > 0 and gaps[-1] < gaps[0] / 15, gaps


def test_bound_does_not_depend_on_the_batch_and_asks_the_owners(config) -> None:
    data = batch(6).targets
    denoiser = awake(build(config(num_blocks=4), seed=0))
    together = bound(denoiser, data, 16, seed=2)
    apart = torch.cat([bound(denoiser, row[None], 16, seed=2) for row in data.flip(0)]).flip(0)
    torch.testing.assert_close(together, apart)
    assert not torch.equal(together, bound(denoiser, data, 16, seed=3))
    first = bound(denoiser, data, 1)
    with torch.no_grad():
        for part in blocks_of(denoiser)[1:]:
            part.model.head.weight.mul_(-1.5)
    assert torch.equal(first, bound(denoiser, data, 1)), "all hidden is block 0's"
    assert not torch.equal(together, bound(denoiser, data, 16, seed=2))


def test_scores_are_named_a_bound_and_tokens_have_none(config) -> None:
    shape, data = config(), batch(2)
    denoiser = build(shape, seed=0)
    found = token_logprobs(denoiser, shape, data.input_ids, data.targets, [1, 4], num_draws=3)
    assert found[4].shape == (2, T) and torch.equal(-found[4], bound(denoiser, data.targets, 4, num_draws=3))
    assert estimator_of(shape, 4, 3) == "upper bound of the NLL, not its value: K = 4 unmasking steps, 3 stratified draws"
    with pytest.raises(UserError, match="no next token"):
        token_scores(denoiser, shape, data.input_ids, data.targets, [1])


# Sampling ---------------------------------------------------------------------------------------------------------------------


def law_of(drawn: Tensor) -> dict[tuple[int, ...], float]:
    counts = Counter(map(tuple, drawn.tolist()))
    return {x: n / len(drawn) for x, n in counts.items()}


def distance(law: Tensor, drawn: Tensor) -> float:
    """Total variation."""
    found = law_of(drawn)
    return sum(abs(float(law[x]) - found.get(x, 0.0)) for x in itertools.product(range(law.shape[0]), repeat=law.dim())) / 2


def test_samples_of_an_exact_denoiser_follow_its_law_at_many_steps() -> None:
    law = joint(2, 3, seed=2)
    law = (law + torch.eye(2, dtype=torch.float64)[:, :, None] * 2).div(
        (law + torch.eye(2, dtype=torch.float64)[:, :, None] * 2).sum()
    )
    denoiser: Any = Exact(law)
    start = torch.full((4000, 3), 2)
    far, near = (distance(law, unmask(denoiser, start, k, SamplingParams(), seed=1)) for k in (1, 64))
    assert near < 0.04 < 0.1 < far, (near, far)
    assert denoiser.calls <= 65, "one call a step"


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("num_steps", [1, 4, 30])
def test_a_token_in_sight_never_changes_and_none_stays_hidden(config, order: Any, num_steps: int) -> None:
    denoiser = awake(build(config(num_blocks=3, layers_per_block=(2, 1, 1)), seed=0))
    ids = torch.full((3, T), V)
    ids[1, :5], ids[2] = torch.arange(5), torch.arange(T)
    states = [ids]
    real = MaskedDenoiser.hidden

    def spy(self: MaskedDenoiser, ids: Tensor, level: Tensor) -> Tensor:
        if len(ids) == 3:
            states.append(ids)
        return real(self, ids, level)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedDenoiser, "hidden", spy)
        out = unmask(denoiser, ids, num_steps, SamplingParams(), seed=5, order=order, num_tokens=40)
    for before, after in itertools.pairwise([*states, out]):
        assert torch.equal(before[before != V], after[before != V])
    assert (out != V).all() and out[ids == V].max() < 40
    assert torch.equal(out, unmask(denoiser, ids, num_steps, SamplingParams(), seed=5, order=order, num_tokens=40))
    assert not torch.equal(out, unmask(denoiser, ids, num_steps, SamplingParams(), seed=6, order=order, num_tokens=40))


def test_temperature_zero_takes_the_most_probable() -> None:
    law = joint(4, 1)
    denoiser: Any = Exact(law)
    drawn = unmask(denoiser, torch.full((20, 1), 4), 3, SamplingParams(temperature=0))
    assert (drawn == law.argmax()).all()
    top = unmask(denoiser, torch.full((200, 1), 4), 1, SamplingParams(top_k=2))
    assert set(top.flatten().tolist()) == set(law.topk(2).indices.tolist())


# Blocks, checkpoints, refusals ------------------------------------------------------------------------------------------------


def test_blocks_cut_alpha_evenly_and_train_on_their_own_levels(config, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = partition_of(config(num_blocks=4, overlap=0.1))
    low = MaskingConfig().t_min
    assert cut.edges == pytest.approx([1 - b / 4 * (1 - low) for b in range(5)])
    assert [cut.block_of(t) for t in (None, 1.0, 0.76, 0.5, 0.3, 0.01, 1e-6)] == [0, 0, 0, 2, 2, 3, 3]
    seen: list[Tensor] = []
    real = MaskedDenoiser.hidden
    monkeypatch.setattr(MaskedDenoiser, "hidden", lambda self, ids, level: seen.append(level) or real(self, ids, level))
    for b in range(4):
        alone = build(config(num_blocks=4, overlap=0.1, block=b), seed=0)
        loss_terms(alone, batch(64), step=0, seed=0)
        lowest, highest = cut.training_range(b)
        assert lowest <= seen[-1].min() and seen[-1].max() <= highest + 1e-6
        assert seen[-1].max() - seen[-1].min() > 0.9 * (highest - lowest)


def test_a_block_built_alone_is_the_block_of_the_whole_and_learns_alone(config, tmp_path) -> None:
    whole = build(config(num_blocks=2), seed=5)
    assert isinstance(whole, Blockwise)
    for b, part in enumerate(blocks_of(whole)):
        alone = build(config(num_blocks=2, block=b), seed=5)
        totals = [loss_terms(d, batch(), step=3, seed=7).total for d in (alone, part)]
        assert torch.equal(totals[0], totals[1])
        totals[1].backward()
        assert all(p.grad is None for other in blocks_of(whole)[b + 1 :] for p in other.parameters())
    save(tmp_path / "m", whole, config(num_blocks=2), None)
    again = load(tmp_path / "m")
    assert torch.equal(bound(again.denoiser, batch().targets, 8), bound(whole, batch().targets, 8))
    lazily = load(tmp_path / "m", resident_blocks=1).denoiser
    assert torch.equal(bound(lazily, batch().targets, 8), bound(whole, batch().targets, 8))
    card = (tmp_path / "m" / "README.md").read_text()
    assert "tokens are hidden" in card and "rdlm serve" not in card


@pytest.mark.parametrize(
    ("objective", "problem"),
    [
        ({"name": "masked", "corruption": {"share": 0.5}}, "hides tokens"),
        ({"name": "masked", "loss_weighting": "edm"}, "hides tokens"),
        ({"name": "masked", "readout": "evidence"}, "hides tokens"),
        ({"name": "evidence", "masking": {}}, "masking belongs to objective 'masked'"),
        ({"name": "masked", "masking": {"t_min": 0}}, "greater than 0"),
    ],
)
def test_dials_that_would_be_ignored_are_errors(objective: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ObjectiveConfig.model_validate(objective)


@pytest.mark.parametrize(
    ("family", "objective"), [("llama", "masked"), ("huginn", "masked"), ("masked", "evidence"), ("masked", "next_token")]
)
def test_family_and_objective_need_each_other(tiny_config, family: str, objective: str) -> None:
    with pytest.raises(UserError, match="need each other"):
        build(tiny_config(family, objective), device="meta")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"blocks": {"num_blocks": 2, "partition": "equal_information", "prior_nats": 4.0}}, "curve is one over sigma"),
        ({"objective": {"name": "masked", "depth": {"mean": 2}}}, "runs its layers once"),
    ],
)
def test_what_masked_models_cannot_be(config, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        build(CheckpointConfig.model_validate({**config().model_dump(), **changes}), device="meta")


def test_sequences_are_seen_from_both_sides(config) -> None:
    """The first position hears of the last one, and the other way round."""
    denoiser: Any = awake(build(config(), seed=0))

    def first_and_last(ids: Sequence[int]) -> Tensor:
        return denoiser.hidden(torch.tensor([ids]), torch.tensor([0.5]))[0, [0, -1]]

    base = first_and_last([V, 3, 4, V])
    assert not torch.allclose(base[0], first_and_last([V, 3, 5, V])[0]) and not torch.allclose(
        base[1], first_and_last([V, 2, 4, V])[1]
    )
