"""Sampling from a masked denoiser: against exact denoisers, its own parts, and the same texts alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rdlm.data.batch import Batch
from rdlm.diffusion import unmasking
from rdlm.diffusion.masked_likelihood import bound
from rdlm.diffusion.unmasking import Draft, fill, unmask
from rdlm.diffusion.unmasking_plan import unmasking_steps
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from rdlm.objectives.masked import MaskedDiffusion
from rdlm.registry import build
from rdlm.sampling_params import SamplingParams
from tests.rdlm.masked_laws import Exact, T, V, batch, distance, joint


def test_rows_of_a_task_are_asked_at_the_levels_and_by_the_blocks_that_learned_them(
    masked_config, awake, monkeypatch
) -> None:
    """Half of each row is always given: training, the sampler and the bound tell the network the hidden share
    of the other half."""
    seen: list[tuple[Any, Tensor, Tensor]] = []
    real = MaskedDiffusion.hidden
    monkeypatch.setattr(
        MaskedDiffusion,
        "hidden",
        lambda self, ids, level, lengths=None: (
            seen.append((self, ids, level)) or real(self, ids, level, lengths)
        ),
    )
    whole = awake(build(masked_config(num_blocks=2, overlap=0.0), seed=0))
    first, second = whole.parts
    ids = batch(200).targets
    mask = (torch.arange(T) >= T // 2).expand(ids.shape)
    for owner, low, high in ((first, 0.5, 1.0), (second, 0.0, 0.5)):
        owner.loss(Batch(ids, ids, mask), Keys(seed=0, step=0))
        hidden, told = (seen[-1][1] == V).float(), seen[-1][2]
        assert low <= told.min() and told.max() <= high + 1e-3 and told.max() - told.min() > 0.45
        assert not hidden[:, : T // 2].any() and hidden[:, T // 2 :].mean() == pytest.approx(
            float(told.mean()), abs=0.03
        )
    seen.clear()
    start = ids[:8].masked_fill(mask[:8], V)
    out = unmask(whole, start, 4, SamplingParams(), always_given=True)
    assert torch.equal(out[:, : T // 2], ids[:8, : T // 2])
    assert [(owner, level.unique().tolist()) for owner, _, level in seen] == [
        (first, [1.0]), (first, [0.75]), (second, [0.5]), (second, [0.25])
    ]  # fmt: skip
    seen.clear()
    nats = bound(whole, ids[:8], 4, mask=mask[:8], always_given=True, num_draws=4)
    assert not nats[:, : T // 2].any() and {level for _, _, levels in seen for level in levels.tolist()} == {
        0.25,
        0.5,
        0.75,
        1.0,
    }
    assert all((owner is first) == bool((levels > 0.5).all()) for owner, _, levels in seen if len(levels))
    plain = bound(whole, ids[:8], 4)
    everything = torch.ones_like(mask[:8])
    assert torch.equal(plain, bound(whole, ids[:8], 4, mask=everything, always_given=True)), (
        "text: nothing is given"
    )


def test_samples_of_an_exact_denoiser_follow_its_law_at_many_steps() -> None:
    law = joint(2, 3, seed=2) + 2 * torch.eye(2, dtype=torch.float64)[:, :, None]
    law = law / law.sum()
    denoiser: Any = Exact(law)
    start = torch.full((4000, 3), 2)
    far, near = (distance(law, unmask(denoiser, start, k, SamplingParams(), seed=1)) for k in (1, 64))
    assert near < 0.04 < 0.1 < far, (near, far)
    assert denoiser.calls <= 65, "one call a step"


@pytest.mark.parametrize("order", ["random", "left_to_right", "confidence"])
@pytest.mark.parametrize("num_steps", [1, 4, 30])
def test_a_token_in_sight_never_changes_and_none_stays_hidden(
    masked_config, awake, order: Any, num_steps: int
) -> None:
    denoiser = awake(build(masked_config(num_blocks=3, layers_per_block=(2, 1, 1)), seed=0))
    ids = torch.full((3, T), V)
    ids[1, :5], ids[2] = torch.arange(5), torch.arange(T)
    states: list[list[Tensor]] = [[row] for row in ids]
    real = unmasking.fill

    def spy(denoiser: Objective, drafts: Sequence[Draft], num_tokens: int | None = None) -> object:
        for draft in drafts:
            states[draft.choice].append(draft.ids.clone())
        return real(denoiser, drafts, num_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unmasking, "fill", spy)
        out = unmask(denoiser, ids, num_steps, SamplingParams(), seed=5, order=order, num_tokens=40)
    assert num_steps == 1 or len(states[0]) > 2 and len(states[2]) == 1, (
        "a row without hidden tokens asks nothing"
    )
    for row, end in zip(states, out, strict=True):
        for before, after in itertools.pairwise([*row, end]):
            assert torch.equal(before[before != V], after[before != V])
    assert (out != V).all() and out[ids == V].max() < 40
    assert torch.equal(
        out, unmask(denoiser, ids, num_steps, SamplingParams(), seed=5, order=order, num_tokens=40)
    )
    assert not torch.equal(
        out, unmask(denoiser, ids, num_steps, SamplingParams(), seed=6, order=order, num_tokens=40)
    )


def test_temperature_zero_takes_the_most_probable() -> None:
    law = joint(4, 1)
    denoiser: Any = Exact(law)
    drawn = unmask(denoiser, torch.full((20, 1), 4), 3, SamplingParams(temperature=0))
    assert (drawn == law.argmax()).all()
    top = unmask(denoiser, torch.full((200, 1), 4), 1, SamplingParams(top_k=2))
    assert set(top.flatten().tolist()) == set(law.topk(2).indices.tolist())


# Rows of any length -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "left_to_right", "confidence"])
def test_texts_of_any_length_are_filled_in_together_as_alone(masked_config, awake, order: Any) -> None:
    """Padding, neighbours at other levels and in other blocks change no token; neither does the number of
    rows before one."""
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
            plan = unmasking_steps(
                range(given, length), num_steps, (length - given) / length, order, 7, choice
            )
            found.append(Draft(ids, plan, params[choice], 7, choice, ends=range(30), ends_from=given + 2))
        return found

    alone = drafts()
    for draft in alone:
        while draft.next_step is not None:
            fill(denoiser, [draft], 50)
        assert draft.ids.max() < 50 and (draft.ids[shapes[draft.choice][1] :][:2] >= 30).all(), (
            "ends are not drawn before their place"
        )
    together = drafts()
    while open_ones := [draft for draft in together if draft.next_step is not None]:
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


def test_logits_of_few_texts_are_held_at_once(masked_config, awake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for those of 20 places: texts of 12 hidden tokens go one by one, and say what they say together."""
    denoiser = awake(build(masked_config(), seed=0))
    ids = torch.full((4, T), V)
    together = unmask(denoiser, ids, 1, SamplingParams(), seed=2)
    held: list[int] = []
    real = unmasking.read
    monkeypatch.setattr(unmasking, "read", lambda *given: held.append(len(given[1])) or real(*given))
    monkeypatch.setattr(unmasking, "LOGITS_AT_ONCE", 20 * V)
    assert torch.equal(together, unmask(denoiser, ids, 1, SamplingParams(), seed=2)) and held == [1] * 4
