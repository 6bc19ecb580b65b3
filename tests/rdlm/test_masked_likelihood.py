"""The bound on a masked model's likelihood, and the exact one from left to right: against brute force, exact
denoisers, and the batch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from rdlm.diffusion.masked_likelihood import bound, left_to_right
from rdlm.diffusion.unmasking import unmask
from rdlm.errors import UserError
from rdlm.objectives import Objective
from rdlm.registry import build
from rdlm.sampling_params import SamplingParams
from tests.rdlm.masked_laws import Exact, Levels, T, V, batch, distance, expected_bound, joint

# The bound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_no_model_gives_more_than_all_probability(masked_config, awake, num_steps: int) -> None:
    """Sum over all 3^3 sequences of exp(-bound) <= 1: an untrained network whose output depends on
    everything."""
    denoiser = awake(build(masked_config(model={"vocab_size": 3}, num_blocks=2), seed=0))
    whole: Any = Levels(denoiser, 3)
    with torch.no_grad():
        mass = sum(
            math.exp(-expected_bound(whole, torch.tensor(x), num_steps))
            for x in itertools.product(range(3), repeat=3)
        )
    assert 0.5 < mass <= 1 + 1e-6
    if num_steps == 1:
        assert mass == pytest.approx(1, abs=1e-5), "independent tokens: a likelihood"


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_draws_agree_with_the_bound_in_full(num_steps: int) -> None:
    denoiser: Any = Exact(joint(3, 3))
    row = torch.tensor([2, 0, 1])
    drawn = [bound(denoiser, row[None], num_steps, seed=seed, num_draws=4).sum() for seed in range(120)]
    error = float(torch.stack(drawn).std()) / math.sqrt(120)
    assert float(torch.stack(drawn).mean()) == pytest.approx(
        expected_bound(denoiser, row, num_steps), abs=4 * error + 1e-5
    )


def test_bound_of_an_exact_denoiser_falls_to_the_likelihood() -> None:
    """With one token at every K, with three as K grows (each step then brings at most one of them into
    sight)."""
    one: Any = Exact(joint(5, 1))
    assert float(bound(one, torch.tensor([[3]]), 1)) == pytest.approx(-math.log(one.law[3]), rel=1e-5)
    for k in (1, 7, 64):
        assert expected_bound(one, torch.tensor([3]), k) == pytest.approx(-math.log(one.law[3]), rel=1e-5)
    law = joint(3, 3, seed=4)
    exact: Any = Exact(law)
    gaps = []
    for k in (1, 4, 16, 64):
        mean = sum(
            float(law[x]) * expected_bound(exact, torch.tensor(x), k)
            for x in itertools.product(range(3), repeat=3)
        )
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
        for part in denoiser.parts[1:]:
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
    drawn = torch.stack(
        [bound(whole, row, num_steps, mask=mask, seed=seed, num_draws=2).sum() for seed in range(200)]
    )
    error = float(drawn.std()) / math.sqrt(200)
    assert float(drawn.mean()) == pytest.approx(
        expected_bound(given, row[0, 1:], num_steps), abs=4 * error + 1e-5
    )


def test_bound_of_a_continuation_tells_the_layers_the_share_that_is_hidden(masked_config, awake) -> None:
    """As the sampler does: K = 1 with a third hidden is one pass at level 1/3, whose owner may be another
    block."""
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
    found = denoiser.token_logprobs(data.inputs, data.targets, [1, 4], num_draws=3)
    assert found[4].shape == (2, T) and torch.equal(-found[4], bound(denoiser, data.targets, 4, num_draws=3))
    assert (
        shape.objective.estimator_at(4, 3)
        == "upper bound of the NLL, not its value: K = 4 unmasking steps, 3 stratified draws"
    )
    with pytest.raises(UserError, match="no next token"):
        denoiser.score(data.inputs, data.targets, [1])


# Left to right ----------------------------------------------------------------------------------------------


@pytest.fixture
def loud(masked_config, awake) -> Objective:
    """Three tokens, two blocks, predictions far from uniform."""
    denoiser = awake(build(masked_config(model={"vocab_size": 3}, num_blocks=2), seed=0))
    with torch.no_grad():
        for part in denoiser.parts:
            part.model.wte.weight.mul_(20)
    return denoiser


ALL = torch.tensor(list(itertools.product(range(3), repeat=3)))


def test_left_to_right_is_a_likelihood_and_that_of_its_sampler(loud: Objective) -> None:
    """All 3^3 sequences together have probability 1, and ``unmask`` draws them as often as that; more steps
    than tokens change nothing."""
    probability = left_to_right(loud, ALL)[0].double().sum(1).exp()
    assert (
        float(probability.sum()) == pytest.approx(1, abs=1e-5)
        and float(probability.max() / probability.min()) > 10
    )
    start = torch.full((4000, 3), 3)
    drawn = unmask(loud, start, 3, SamplingParams(), seed=4, order="left_to_right")
    assert distance(probability.view(3, 3, 3), drawn) < 0.04
    assert torch.equal(
        drawn[:50], unmask(loud, start[:50], 3, SamplingParams(), seed=4, order="left_to_right")
    )
    assert torch.equal(
        drawn[:50], unmask(loud, start[:50], 64, SamplingParams(), seed=4, order="left_to_right")
    )
    other = unmask(loud, start, 3, SamplingParams(), seed=4)
    assert distance(probability.view(3, 3, 3), other) > 0.06, "in random order the law is another one"


def test_left_to_right_of_a_continuation(loud: Objective) -> None:
    """Behind a token in sight all continuations together have probability 1, each token has what it has where
    its context is modelled too, and samples agree."""
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
        patch.setattr("rdlm.diffusion.masked_likelihood.POSITIONS_AT_ONCE", 3 * T)
        torch.testing.assert_close(left_to_right(denoiser, data, mask)[0], found)
    torch.testing.assert_close(left_to_right(denoiser, data[3:4], mask[3:4])[0], found[3:4])
    best = unmask(denoiser, torch.full((1, T), V), T, SamplingParams(temperature=0), order="left_to_right")
    assert left_to_right(denoiser, best)[1].all() and not left_to_right(denoiser, best.roll(1))[1].all()


def test_left_to_right_of_an_exact_denoiser_is_its_law() -> None:
    law = joint(3, 3, seed=3)
    denoiser: Any = Exact(law)
    found = (
        left_to_right(denoiser, torch.tensor(list(itertools.product(range(3), repeat=3))))[0]
        .double()
        .sum(1)
        .exp()
    )
    torch.testing.assert_close(found, law.flatten(), atol=1e-6, rtol=1e-4)


def test_the_bound_is_that_of_the_very_sampler(masked_config, awake) -> None:
    """Of a network that is no exact denoiser, in blocks: the law of three steps by recursion over which
    tokens are hidden is what ``unmask`` draws from, and no sequence is more probable under the bound than
    under it."""
    denoiser, num_steps = awake(build(masked_config(model={"vocab_size": 3}, num_blocks=2), seed=0)), 3
    with torch.no_grad():
        for part in denoiser.parts:
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

    whole: Any = Levels(denoiser, 3)
    with torch.no_grad():
        law = torch.zeros(3, 3, 3, dtype=torch.float64)
        for x in itertools.product(range(3), repeat=3):
            law[x] = probability(x, num_steps, frozenset(range(3)))
            assert expected_bound(whole, torch.tensor(x), num_steps) >= -math.log(law[x]) - 1e-5
    assert float(law.sum()) == pytest.approx(1, abs=1e-5) and float(law.max() / law.min()) > 3
    assert (
        distance(law, unmask(denoiser, torch.full((6000, 3), 3), num_steps, SamplingParams(), seed=4)) < 0.04
    )
