"""Sampling from a masked denoiser and the bound on its likelihood: against brute force, exact denoisers, and the batch."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdlm import unmasking
from rdlm.blockwise import blocks_of
from rdlm.decoding_types import SamplingParams
from rdlm.denoiser import Denoiser, Prediction
from rdlm.errors import UserError
from rdlm.masked_denoiser import MaskedDenoiser
from rdlm.objectives import Batch, loss_terms
from rdlm.registry import build
from rdlm.scoring import estimator_of, token_logprobs, token_scores
from rdlm.turns import turns
from rdlm.unmasking import Draft, bound, fill, left_to_right, unmask

V, T = 64, 12


def batch(rows: int) -> Batch:
    ids = torch.randint(0, V, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(rows, T, dtype=torch.bool))


class Exact(nn.Module):
    """The exact denoiser of a joint law p [V, .., V] over T tokens, which asks about all positions at once; at any level the same."""

    def __init__(self, law: Tensor) -> None:
        super().__init__()
        self.law, self.mask_id, self.calls = law, law.shape[0], 0
        self.known: dict[tuple[int, ...], Tensor] = {}

    def at(self, sigma: float | None) -> Exact:
        return self

    def hidden(self, ids: Tensor, level: Tensor, lengths: Tensor | None = None) -> Tensor:
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


# The bound --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_no_model_gives_more_than_all_probability(masked_config, awake, num_steps: int) -> None:
    """Sum over all 3^3 sequences of exp(-bound) <= 1: an untrained network whose output depends on everything."""
    denoiser = awake(build(masked_config(model={"vocab_size": 3}, num_blocks=2), seed=0))
    whole: Any = _Levels(denoiser, 3)
    with torch.no_grad():
        mass = sum(math.exp(-expected_bound(whole, torch.tensor(x), num_steps)) for x in itertools.product(range(3), repeat=3))
    assert 0.5 < mass <= 1 + 1e-6
    if num_steps == 1:
        assert mass == pytest.approx(1, abs=1e-5), "independent tokens: a likelihood"


def test_rows_of_a_task_are_asked_at_the_levels_and_by_the_blocks_that_learned_them(masked_config, awake, monkeypatch) -> None:
    """Half of each row is always given: training, the sampler and the bound tell the network the hidden share of the other half."""
    seen: list[tuple[Any, Tensor, Tensor]] = []
    real = MaskedDenoiser.hidden
    monkeypatch.setattr(
        MaskedDenoiser,
        "hidden",
        lambda self, ids, level, lengths=None: seen.append((self, ids, level)) or real(self, ids, level, lengths),
    )
    whole = awake(build(masked_config(num_blocks=2, overlap=0.0), seed=0))
    first, second = blocks_of(whole)
    ids = batch(200).targets
    mask = (torch.arange(T) >= T // 2).expand(ids.shape)
    for owner, low, high in ((first, 0.5, 1.0), (second, 0.0, 0.5)):
        loss_terms(owner, Batch(ids, ids, mask), step=0, seed=0)
        hidden, told = (seen[-1][1] == V).float(), seen[-1][2]
        assert low <= told.min() and told.max() <= high + 1e-3 and told.max() - told.min() > 0.45
        assert not hidden[:, : T // 2].any() and hidden[:, T // 2 :].mean() == pytest.approx(float(told.mean()), abs=0.03)
    seen.clear()
    start = ids[:8].masked_fill(mask[:8], V)
    out = unmask(whole, start, 4, SamplingParams(), always_given=True)
    assert torch.equal(out[:, : T // 2], ids[:8, : T // 2])
    assert [(owner, level.unique().tolist()) for owner, _, level in seen] == [
        (first, [1.0]), (first, [0.75]), (second, [0.5]), (second, [0.25])
    ]  # fmt: skip
    seen.clear()
    nats = bound(whole, ids[:8], 4, mask=mask[:8], always_given=True, num_draws=4)
    assert not nats[:, : T // 2].any() and {level for _, _, levels in seen for level in levels.tolist()} == {0.25, 0.5, 0.75, 1.0}
    assert all((owner is first) == bool((levels > 0.5).all()) for owner, _, levels in seen if len(levels))
    plain = bound(whole, ids[:8], 4)
    everything = torch.ones_like(mask[:8])
    assert torch.equal(plain, bound(whole, ids[:8], 4, mask=everything, always_given=True)), "text: nothing is given"


class _Levels(nn.Module):
    """Asks the block that owns the level."""

    def __init__(self, denoiser: Denoiser, mask_id: int) -> None:
        super().__init__()
        self.denoiser, self.mask_id = denoiser, mask_id

    def hidden(self, ids: Tensor, level: Tensor, lengths: Tensor | None = None) -> Tensor:
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


def test_bound_does_not_depend_on_the_batch_and_asks_the_owners(masked_config, awake) -> None:
    data = batch(6).targets
    denoiser = awake(build(masked_config(num_blocks=4), seed=0))
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


@pytest.mark.parametrize("num_steps", [1, 3])
def test_bound_of_a_continuation_is_that_of_the_law_given_its_context(num_steps: int) -> None:
    """Two hidden tokens behind one in sight against the bound in full of the conditional law."""
    law = joint(3, 3, seed=2)
    whole: Any = Exact(law)
    given: Any = Exact(law[1] / law[1].sum())
    row, mask = torch.tensor([[1, 2, 0]]), torch.tensor([[False, True, True]])
    drawn = torch.stack([bound(whole, row, num_steps, mask=mask, seed=seed, num_draws=2).sum() for seed in range(200)])
    error = float(drawn.std()) / math.sqrt(200)
    assert float(drawn.mean()) == pytest.approx(expected_bound(given, row[0, 1:], num_steps), abs=4 * error + 1e-5)


def test_bound_of_a_continuation_tells_the_layers_the_share_that_is_hidden(masked_config, awake) -> None:
    """As the sampler does: K = 1 with a third hidden is one pass at level 1/3, whose owner may be another block."""
    data, mask = batch(3).targets, torch.arange(T).expand(3, T) >= T - 4
    denoiser = awake(build(masked_config(num_blocks=4), seed=0))
    found = bound(denoiser, data, 1, mask=mask)
    owner: Any = denoiser.at(1 / 3)
    with torch.no_grad():
        states = owner.hidden(data.masked_fill(mask, owner.mask_id), torch.full((3,), 1 / 3))
        logprobs = owner.predict(states).logits().log_softmax(-1).gather(2, data.unsqueeze(2)).squeeze(2)
    assert owner is not denoiser.at(1.0)
    torch.testing.assert_close(found, torch.where(mask, -logprobs, 0.0))
    assert torch.equal(bound(denoiser, data[1:2], 1, mask=mask[1:2]), found[1:2])


def test_scores_are_named_a_bound_and_tokens_have_none(masked_config) -> None:
    shape, data = masked_config(), batch(2)
    denoiser = build(shape, seed=0)
    found = token_logprobs(denoiser, shape, data.inputs, data.targets, [1, 4], num_draws=3)
    assert found[4].shape == (2, T) and torch.equal(-found[4], bound(denoiser, data.targets, 4, num_draws=3))
    assert estimator_of(shape, 4, 3) == "upper bound of the NLL, not its value: K = 4 unmasking steps, 3 stratified draws"
    with pytest.raises(UserError, match="no next token"):
        token_scores(denoiser, shape, data.inputs, data.targets, [1])


# Left to right ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def loud(masked_config, awake) -> Denoiser:
    """Three tokens, two blocks, predictions far from uniform."""
    denoiser = awake(build(masked_config(model={"vocab_size": 3}, num_blocks=2), seed=0))
    with torch.no_grad():
        for part in blocks_of(denoiser):
            part.model.wte.weight.mul_(20)
    return denoiser


ALL = torch.tensor(list(itertools.product(range(3), repeat=3)))


def test_left_to_right_is_a_likelihood_and_that_of_its_sampler(loud: Denoiser) -> None:
    """All 3^3 sequences together have probability 1, and ``unmask`` draws them as often as that; more steps than tokens change nothing."""
    probability = left_to_right(loud, ALL)[0].double().sum(1).exp()
    assert float(probability.sum()) == pytest.approx(1, abs=1e-5) and float(probability.max() / probability.min()) > 10
    start = torch.full((4000, 3), 3)
    drawn = unmask(loud, start, 3, SamplingParams(), seed=4, order="left_to_right")
    assert distance(probability.view(3, 3, 3), drawn) < 0.04
    assert torch.equal(drawn[:50], unmask(loud, start[:50], 3, SamplingParams(), seed=4, order="left_to_right"))
    assert torch.equal(drawn[:50], unmask(loud, start[:50], 64, SamplingParams(), seed=4, order="left_to_right"))
    other = unmask(loud, start, 3, SamplingParams(), seed=4)
    assert distance(probability.view(3, 3, 3), other) > 0.06, "in random order the law is another one"


def test_left_to_right_of_a_continuation(loud: Denoiser) -> None:
    """Behind a token in sight all continuations together have probability 1, each token has what it has where its context is modelled
    too, and samples agree."""
    mask = torch.tensor([False, True, True]).expand(len(ALL), 3)
    found, whole = left_to_right(loud, ALL, mask)[0], left_to_right(loud, ALL)[0]
    assert torch.equal(found[:, 0], torch.zeros(len(ALL)))
    torch.testing.assert_close(found[:, 1:], whole[:, 1:])
    mass = found.double().sum(1).exp().view(3, 9)
    torch.testing.assert_close(mass.sum(1), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)
    start = torch.tensor([[2, 3, 3]]).repeat(3000, 1)
    drawn = unmask(loud, start, 2, SamplingParams(), seed=1, order="left_to_right")
    assert distance(mass[2].view(3, 3), drawn[:, 1:]) < 0.03 and (drawn[:, 0] == 2).all()


def test_left_to_right_by_its_definition_in_any_batch(masked_config, awake) -> None:
    """One pass a token, told the share that is hidden; tokens in sight may stand anywhere."""
    data, denoiser = batch(5).targets, awake(build(masked_config(num_blocks=4), seed=0))
    mask = torch.rand(5, T, generator=torch.Generator().manual_seed(0)) < 0.7
    found, greedy = left_to_right(denoiser, data, mask)
    for b, i in mask.nonzero().tolist():
        hidden = mask[b] & (torch.arange(T) >= i)
        level = int(hidden.sum()) / T
        owner: Any = denoiser.at(level)
        with torch.no_grad():
            states = owner.hidden(data[b : b + 1].masked_fill(hidden, owner.mask_id), torch.tensor([level]))
            table = owner.predict(states[0, i]).logits().log_softmax(-1)
        assert float(found[b, i]) == pytest.approx(float(table[data[b, i]]), abs=1e-5)
        assert bool(greedy[b, i]) == (int(table.argmax()) == int(data[b, i]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rdlm.unmasking.POSITIONS_AT_ONCE", 3 * T)
        torch.testing.assert_close(left_to_right(denoiser, data, mask)[0], found)
    torch.testing.assert_close(left_to_right(denoiser, data[3:4], mask[3:4])[0], found[3:4])
    best = unmask(denoiser, torch.full((1, T), V), T, SamplingParams(temperature=0), order="left_to_right")
    assert left_to_right(denoiser, best)[1].all() and not left_to_right(denoiser, best.roll(1))[1].all()


def test_left_to_right_of_an_exact_denoiser_is_its_law() -> None:
    law = joint(3, 3, seed=3)
    denoiser: Any = Exact(law)
    found = left_to_right(denoiser, torch.tensor(list(itertools.product(range(3), repeat=3))))[0].double().sum(1).exp()
    torch.testing.assert_close(found, law.flatten(), atol=1e-6, rtol=1e-4)


# Sampling ---------------------------------------------------------------------------------------------------------------------


def law_of(drawn: Tensor) -> dict[tuple[int, ...], float]:
    counts = Counter(map(tuple, drawn.tolist()))
    return {x: n / len(drawn) for x, n in counts.items()}


def distance(law: Tensor, drawn: Tensor) -> float:
    """Total variation."""
    found = law_of(drawn)
    return sum(abs(float(law[x]) - found.get(x, 0.0)) for x in itertools.product(range(law.shape[0]), repeat=law.dim())) / 2


def test_samples_of_an_exact_denoiser_follow_its_law_at_many_steps() -> None:
    law = joint(2, 3, seed=2) + 2 * torch.eye(2, dtype=torch.float64)[:, :, None]
    law = law / law.sum()
    denoiser: Any = Exact(law)
    start = torch.full((4000, 3), 2)
    far, near = (distance(law, unmask(denoiser, start, k, SamplingParams(), seed=1)) for k in (1, 64))
    assert near < 0.04 < 0.1 < far, (near, far)
    assert denoiser.calls <= 65, "one call a step"


def test_the_bound_is_that_of_the_very_sampler(masked_config, awake) -> None:
    """Of a network that is no exact denoiser, in blocks: the law of three steps by recursion over which tokens are hidden is what
    ``unmask`` draws from, and no sequence is more probable under the bound than under it."""
    denoiser, num_steps = awake(build(masked_config(model={"vocab_size": 3}, num_blocks=2), seed=0)), 3
    with torch.no_grad():
        for part in blocks_of(denoiser):
            part.model.wte.weight.mul_(20)  # tied: predictions far from uniform

    def probability(x: tuple[int, ...], k: int, hidden: frozenset[int]) -> float:
        """Of drawing x at the hidden positions in the steps k, k - 1, .., 1."""
        if not hidden:
            return 1.0
        ids = torch.tensor([[3 if i in hidden else token for i, token in enumerate(x)]])
        owner: Any = denoiser.at(k / num_steps)
        chances = owner.predict(owner.hidden(ids, torch.tensor([k / num_steps]))[0]).logits().softmax(-1)
        total = 0.0
        for size in range(len(hidden) + 1):
            for shown in itertools.combinations(sorted(hidden), size):
                share = (1 / k) ** size * (1 - 1 / k) ** (len(hidden) - size)
                if share:
                    drawn = math.prod(float(chances[i, x[i]]) for i in shown)
                    total += share * drawn * probability(x, k - 1, hidden - set(shown))
        return total

    whole: Any = _Levels(denoiser, 3)
    with torch.no_grad():
        law = torch.zeros(3, 3, 3, dtype=torch.float64)
        for x in itertools.product(range(3), repeat=3):
            law[x] = probability(x, num_steps, frozenset(range(3)))
            assert expected_bound(whole, torch.tensor(x), num_steps) >= -math.log(law[x]) - 1e-5
    assert float(law.sum()) == pytest.approx(1, abs=1e-5) and float(law.max() / law.min()) > 3
    assert distance(law, unmask(denoiser, torch.full((6000, 3), 3), num_steps, SamplingParams(), seed=4)) < 0.04


@pytest.mark.parametrize("order", ["random", "left_to_right", "confidence"])
@pytest.mark.parametrize("num_steps", [1, 4, 30])
def test_a_token_in_sight_never_changes_and_none_stays_hidden(masked_config, awake, order: Any, num_steps: int) -> None:
    denoiser = awake(build(masked_config(num_blocks=3, layers_per_block=(2, 1, 1)), seed=0))
    ids = torch.full((3, T), V)
    ids[1, :5], ids[2] = torch.arange(5), torch.arange(T)
    states: list[list[Tensor]] = [[row] for row in ids]
    real = unmasking.fill

    def spy(denoiser: Denoiser, drafts: Sequence[Draft], num_tokens: int | None = None) -> object:
        for draft in drafts:
            states[draft.choice].append(draft.ids.clone())
        return real(denoiser, drafts, num_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unmasking, "fill", spy)
        out = unmask(denoiser, ids, num_steps, SamplingParams(), seed=5, order=order, num_tokens=40)
    assert num_steps == 1 or len(states[0]) > 2 and len(states[2]) == 1, "a row without hidden tokens asks nothing"
    for row, end in zip(states, out, strict=True):
        for before, after in itertools.pairwise([*row, end]):
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


# Rows of any length ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "left_to_right", "confidence"])
def test_texts_of_any_length_are_filled_in_together_as_alone(masked_config, awake, order: Any) -> None:
    """Padding, neighbours at other levels and in other blocks change no token; neither does the number of rows before one."""
    denoiser = awake(build(masked_config(num_blocks=3, layers_per_block=(2, 1, 1)), seed=0))
    rng = torch.Generator().manual_seed(3)
    shapes = [(12, 0, 5), (9, 3, 4), (10, 9, 2), (4, 1, 8), (12, 6, 1)]
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=3),
        SamplingParams(),
        SamplingParams(min_p=0.2),
    ]

    def drafts() -> list[Draft]:
        found = []
        for choice, (length, given, num_steps) in enumerate(shapes):
            ids = torch.full((length,), V)
            ids[:given] = torch.randint(0, 50, (given,), generator=rng.manual_seed(choice))
            plan = turns(range(given, length), num_steps, (length - given) / length, order, 7, choice)
            found.append(Draft(ids, plan, params[choice], 7, choice, ends=range(30), ends_from=given + 2))
        return found

    alone = drafts()
    for draft in alone:
        while draft.turn is not None:
            fill(denoiser, [draft], 50)
        assert draft.ids.max() < 50 and (draft.ids[shapes[draft.choice][1] :][:2] >= 30).all(), (
            "ends are not drawn before their place"
        )
    together = drafts()
    while open_ones := [draft for draft in together if draft.turn is not None]:
        fill(denoiser, open_ones, 50)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(alone, together, strict=True))
    row = drafts()[1].ids
    whole = unmask(denoiser, torch.stack([row, row]), 4, params[1], seed=7, order=order, first=3)
    assert torch.equal(whole[1], unmask(denoiser, row[None], 4, params[1], seed=7, order=order, first=4)[0])


def test_padding_is_not_seen(masked_config, awake) -> None:
    """Hidden states of a short row beside a longer one, whatever lies in its padding."""
    denoiser: Any = awake(build(masked_config(), seed=0))
    ids = batch(2).targets
    level, lengths = torch.tensor([0.3, 0.8]), torch.tensor([T, 7])
    with torch.no_grad():
        alone = denoiser.hidden(ids[1:, :7], level[1:])
        for other in (0, V):
            ids[1, 7:] = other
            padded = denoiser.hidden(ids, level, lengths)
            torch.testing.assert_close(padded[1:, :7], alone)
        assert not torch.allclose(denoiser.hidden(ids, level)[1:, :7], alone, atol=1e-3)
