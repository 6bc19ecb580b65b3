"""Sampling against plain definitions, one row at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rdlm.errors import UserError
from rdlm.sampling import (
    History,
    SamplingParams,
    drawn,
    packed,
    process,
    read_tokens,
    sample,
    top_logprobs,
    unpacked,
)
from rdlm.sampling_params import uniform

VOCAB = 20


def reference_support(logits: list[float], p: SamplingParams) -> set[int]:
    """Tokens that survive, by the definitions: min-p against the best, then k likeliest, then smallest set
    with mass top_p."""
    scaled = [x / p.temperature for x in logits]
    norm = math.fsum(math.exp(x - max(scaled)) for x in scaled)
    probs = [math.exp(x - max(scaled)) / norm for x in scaled]
    order = sorted(range(len(logits)), key=lambda i: -probs[i])
    kept = [i for i in order if probs[i] >= p.min_p * probs[order[0]]][: p.top_k or None]
    mass, total, out = 0.0, math.fsum(probs[i] for i in kept), set()
    for i in kept:
        if mass / total >= p.top_p:
            break
        out.add(i)
        mass += probs[i]
    return out


params = st.builds(
    SamplingParams,
    temperature=st.floats(0.3, 3),
    top_k=st.integers(0, VOCAB),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(st.permutations(range(VOCAB)), params), min_size=1, max_size=5))
def test_truncation_keeps_what_the_definitions_keep(rows: list[tuple[list[int], SamplingParams]]) -> None:
    logits = torch.tensor([[0.37 * x + 0.011 * x * x for x in row] for row, _ in rows], dtype=torch.float32)
    kept = process(logits, [p for _, p in rows], [History()] * len(rows))
    for row, (values, p) in enumerate(zip(logits.tolist(), [p for _, p in rows], strict=True)):
        found = {i for i, x in enumerate(kept[row].tolist()) if x > -math.inf}
        expected = reference_support(values, p)
        assert found == expected or _is_borderline(values, p, found ^ expected)
        survivors = sorted(found)
        assert kept[row, survivors].tolist() == pytest.approx(
            [values[i] / p.temperature for i in survivors], rel=1e-5
        )


def _is_borderline(values: list[float], p: SamplingParams, difference: set[int]) -> bool:
    """fp32 may decide the one token whose threshold holds with equality otherwise."""
    wider, narrower = (
        reference_support(
            values, SamplingParams(p.temperature, p.top_k, min(1.0, p.top_p * f), min(1.0, p.min_p / f))
        )
        for f in (1 + 1e-5, 1 - 1e-5)
    )
    return difference <= wider ^ narrower


def test_frequencies_follow_the_softmax_of_prior_over_temperature_plus_evidence() -> None:
    prior, evidence = torch.randn(1, 6), torch.randn(1, 6)
    count = 4000
    grid = [(i + 0.5) / count for i in range(count)]
    p = SamplingParams(temperature=0.5)
    ids = sample(prior.expand(count, -1), [p] * count, [History()] * count, grid, evidence.expand(count, -1))
    expected = (prior / 0.5 + evidence).softmax(-1)[0]
    torch.testing.assert_close(
        torch.bincount(ids, minlength=6) / count, expected, atol=1.5 / count * 2, rtol=0
    )


def test_rows_do_not_see_each_other() -> None:
    logits = torch.randn(7, VOCAB)
    mixed = [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.3, temperature=2),
        SamplingParams(min_p=0.2),
        SamplingParams(repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.2),
        SamplingParams(logit_bias={3: 5.0}),
    ]
    histories = [History([1, 2], [2, 3, 3], ())] * 7
    uniforms = [uniform(5, row) for row in range(7)]
    together = sample(logits, mixed, histories, uniforms)
    for row in range(7):
        alone = sample(logits[row : row + 1], [mixed[row]], [histories[row]], [uniforms[row]])
        assert alone[0] == together[row]


def test_greedy_ignores_evidence_and_uniform_but_not_bias() -> None:
    prior = torch.tensor([[0.0, 2.0, 1.0]])
    evidence = torch.tensor([[9.0, 0.0, 0.0]])
    for u in (0.0, 0.999999):
        assert sample(prior, [SamplingParams(temperature=0)], [History()], [u], evidence).tolist() == [1]
    assert sample(
        prior, [SamplingParams(temperature=0, logit_bias={2: 3.0})], [History()], [0.5]
    ).tolist() == [2]


def test_penalties_and_bans() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    history = History(prompt=[0], output=[1, 2, 2], banned=[3])
    p = SamplingParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    out = process(logits, [p], [history])[0].tolist()
    assert out == [1.0, -4.0 - 0.5 - 0.25, 0.5 - 1.0 - 0.25, -math.inf]
    assert logits[0].tolist() == [
        2.0,
        -2.0,
        1.0,
        0.5,
    ]  # the caller's logits, of which log-probabilities are taken, stay


def test_zero_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    ids = [
        sample(logits, [SamplingParams()], [History()], [u]).item() for u in (0.0, 0.4999, 0.5, 1 - 2**-53)
    ]
    assert ids == [1, 1, 3, 3]


def test_log_probabilities_are_the_same_floats_chosen_or_top() -> None:
    logits = torch.randn(600, 33)
    best = logits.argmax(-1)
    chosen, values, ids = top_logprobs(logits, best, 2, chunk=256)
    assert torch.equal(chosen, values[:, 0]) and torch.equal(ids[:, 0], best)
    torch.testing.assert_close(chosen, logits.log_softmax(-1).amax(-1))


def test_uniform_is_a_function_of_its_key() -> None:
    drawn = [
        uniform(seed, 0, position, step) for seed in range(10) for position in range(20) for step in range(5)
    ]
    assert len(set(drawn)) == 1000 and uniform(3, 0, 2, 1) == uniform(3, 0, 2, 1)
    assert abs(sum(drawn) / 1000 - 0.5) < 0.03 and 0 <= min(drawn) and max(drawn) < 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("top_k", -2),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3),
    ],
)
def test_settings_out_of_range_name_themselves(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_a_row_without_a_token_to_draw_is_an_error() -> None:
    """All ids banned, or logits that are no numbers: the first id would be drawn."""
    one, logits = SamplingParams(), torch.zeros(1, 5)
    for params in (one, SamplingParams(temperature=0), SamplingParams(top_k=2)):
        with pytest.raises(UserError, match="banned"):
            sample(logits, [params], [History(banned=range(5))], [0.5])
        for value in (float("nan"), float("inf"), float("-inf")):
            bad = logits.clone()
            bad[:, 1 if value == value and value > 0 else slice(None)] = value
            with pytest.raises(UserError, match="fewer core steps|banned"):
                sample(bad, [params], [History()], [0.5])
    assert sample(logits, [one], [History(banned=range(4))], [0.5]).tolist() == [4]


def test_top_k_of_any_size_is_cut_to_the_vocabulary() -> None:
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    off = sample(logits, [SamplingParams(min_p=0.01)], [History()], [0.4])
    for k in (0, -1, 7, 1 << 62, 1 << 70):
        assert torch.equal(off, sample(logits, [SamplingParams(min_p=0.01, top_k=k)], [History()], [0.4]))
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    with pytest.raises(UserError, match="^top_k=-2"):
        SamplingParams(top_k=-2)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.permutations(range(VOCAB)), params, st.floats(0, 0.999)), min_size=1, max_size=5
    ),
    is_edited=st.booleans(),
    spare=st.integers(0, 3),
    offset=st.integers(0, 3),
)
def test_settings_in_a_buffer_draw_the_same_tokens(
    rows: list[tuple[list[int], SamplingParams, float]], is_edited: bool, spare: int, offset: int
) -> None:
    """Wherever they lie in it, and however many rows fill it up."""
    logits = torch.tensor([row for row, *_ in rows], dtype=torch.float32) / 3
    chosen = [
        replace(p, repetition_penalty=1.5, frequency_penalty=0.3, logit_bias={i: 2.0}) if is_edited else p
        for i, (_, p, _) in enumerate(rows)
    ]
    histories = [History((1, 2), (3,) * i, {4} if is_edited else ()) for i in range(len(rows))]
    uniforms = [u for *_, u in rows]
    columns, kind = packed(chosen, histories, uniforms, len(rows) + spare)
    buffer = torch.from_numpy(np.concatenate([np.zeros((len(columns), offset), np.int32), columns], 1))
    filled = torch.cat([logits, torch.zeros(spare, VOCAB)])
    found = drawn(filled, unpacked(buffer[:, offset:], kind), kind)[: len(rows)]
    assert read_tokens(found.tolist(), histories) == sample(logits, chosen, histories, uniforms).tolist()
