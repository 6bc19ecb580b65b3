"""Diffusion forcing: what a wavefront computes, where its answers are those of plain decoding, and that nobody
else notices it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from litestar.testing import TestClient

from rdlm.errors import UserError
from rdlm.exit_criteria import ExitRule
from rdlm.nn.kv_cache import KVCache, PackedContext, Segment
from rdlm.random_streams import generator
from rdlm.sampling_params import SamplingParams, uniform
from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Event, Request, Speculation, StepBudget, StepResult, Wavefront
from serve.loading import optimise
from serve.settings import EngineSettings, HttpSettings

K = 6
SHARED = EngineSettings(max_slots=6, chunk=8, prefill_rows=16)
FULL = SHARED.model_copy(update={"kv_cache": "full"})
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.4)
GREEDY = SamplingParams(temperature=0)
PROMPTS = [(5, 9, 20, 31, 7, 11), tuple(range(20, 41)), (17,)]


def request(prompt: tuple[int, ...], sampling: SamplingParams = SAMPLED, **more: Any) -> Request:
    return Request(prompt, StepBudget(K), 20, sampling, seed=3, logprobs=2, **more)


def waving(plain: Request, positions: int, inner_steps: int, threshold: float = 0.0, **more: Any) -> Request:
    wavefront = Wavefront(positions, inner_steps, threshold, **more)
    return replace(plain, budget=replace(plain.budget, wavefront=wavefront))


def answer(events: list[Event]) -> tuple[Any, ...]:
    drawn = [e for e in events if e.token is not None]
    texts = [e.text for e in events]
    return (
        [e.token for e in drawn],
        [e.steps for e in drawn],
        [e.logprobs for e in drawn],
        texts,
        events[-1].finish,
    )


def tokens(events: list[Event]) -> list[int | None]:
    return [e.token for e in events if e.token is not None]


def used(events: list[Event]) -> Any:
    assert events[-1].usage is not None
    return events[-1].usage


def packed(make_served: Callable[..., Any], settings: EngineSettings, initial: str = "normal") -> Served:
    """A model whose rows are the same to the bit in every batch."""
    served: Served = make_served("bptt", settings=settings, state_init=initial)
    optimise(served.runner.denoiser, settings)  # type: ignore[attr-defined]
    return served


@pytest.mark.parametrize("initial", ["normal", "zero"])
@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_with_the_full_cache_answers_are_those_of_plain_decoding_to_the_bit(
    make_served: Callable[..., Any], sampling: SamplingParams, initial: str
) -> None:
    """A position whose token changes begins again; log-probabilities and texts are the same, too."""
    plain = [request(prompt, sampling, stop_ids=frozenset({40, 60})) for prompt in PROMPTS]
    with Engine(lambda: packed(make_served, FULL, initial)) as engine:
        expected = engine.generate(plain)
        for positions, inner_steps in ((1, 4), (2, 1), (64, 2), (3, 5)):
            found = engine.generate([*(waving(r, positions, inner_steps) for r in plain), *plain])
            assert [answer(events) for events in found] == [answer(events) for events in expected] * 2
            if positions > 1:
                assert sum(used(e).drafted for e in found[:3]) > sum(used(e).accepted for e in found[:3]) > 0


@pytest.mark.parametrize(("positions", "inner_steps"), [(1, 1), (1, 4), (64, K), (64, 99)])
def test_one_position_or_k_inner_steps_are_plain_decoding(
    make_served: Callable[..., Any], positions: int, inner_steps: int
) -> None:
    """With the shared cache too, in which a position sees the last keys of all before it."""
    plain = [request(prompt) for prompt in PROMPTS]
    with Engine(lambda: packed(make_served, SHARED)) as engine:
        expected = [answer(events) for events in engine.generate(plain)]
        found = engine.generate([waving(r, positions, inner_steps) for r in plain])
    assert [answer(events) for events in found] == expected
    assert all(used(events).decode_core_steps == 19 * K for events in found)


def published(served: Served, plain: Request, wavefront: Wavefront) -> tuple[list[int], list[int]]:
    """Greedy tokens and their core steps by the sampler's definition, one sequence and the shared cache: state of
    every position in a list of its own."""
    denoiser = served.runner.denoiser  # type: ignore[attr-defined]
    model = denoiser.model
    cache = KVCache(model.num_cache_layers, 1, 128, model.num_kv_heads, model.head_dim)

    def initial(position: int, count: int = 1, *stream: int) -> torch.Tensor:
        like = torch.zeros(1, count, model.config.d_model)
        return torch.as_tensor(model.initial_state(like, generator(plain.seed, 0, position, *stream or (2,))))

    def context(start: int, count: int) -> PackedContext:
        return PackedContext(cache, [Segment(0, start, count)])

    def read(state: torch.Tensor, ctx: PackedContext) -> list[int]:
        return list(denoiser.predict(model.decode(state, ctx)[0]).prior.argmax(-1).tolist())

    ids = list(plain.prompt)
    ctx = context(0, len(ids))
    e = model.encode(torch.tensor([ids]), ctx)
    state = initial(0, len(ids))
    for _ in range(K):
        state = model.core(state, e, None, ctx)
    answer, steps = read(state, ctx)[-1:], [K]
    start, inputs, states, taken = len(ids), list(answer), [initial(len(ids))], [0]
    averages: dict[int, torch.Tensor] = {}
    while len(answer) < plain.max_tokens:
        ctx = context(start, len(inputs))
        e, before = model.encode(torch.tensor([inputs]), ctx), torch.cat(states, 1)
        for i in range(len(inputs)):
            old = averages.get(start + i)
            if old is not None:
                e[:, i] = (1 - wavefront.average) * e[:, i] + wavefront.average * old
            averages[start + i] = e[:, i].clone()
        after = before.clone()
        for i, count in enumerate(taken):
            share = wavefront.noise / (1 + count if wavefront.noise_decays else 1)
            if share:
                after[:, i] = (1 - share) * after[:, i] + share * initial(start + i, 1, count, 6)[:, 0]
        for _ in range(min(wavefront.inner_steps - taken[0] % wavefront.inner_steps, K - taken[0])):
            after = model.core(after, e, None, ctx)
            taken = [count + 1 for count in taken]
        drawn = read(after, ctx)
        change = (after - before).norm(dim=-1)[0] / after.norm(dim=-1)[0]
        left = 0
        while left < len(drawn) and (taken[left] == K or change[left] < wavefront.threshold):
            left += 1
            if left < len(drawn) and drawn[left - 1] != inputs[left]:
                break
        answer, steps = answer + drawn[:left], steps + taken[:left]
        start, taken = start + left, taken[left:]
        end = taken.index(K) if K in taken else len(taken)  # spent on a token that was then replaced
        drawn, taken = drawn[: left + end], taken[:end]
        states, inputs = [after[:, i : i + 1] for i in range(left, len(drawn))], [answer[-1], *drawn[left:]]
        averages = {at: old for at, old in averages.items() if at < start + len(states)}
        if not states:
            states, taken = [initial(start)], [0]
        else:
            for i in range(wavefront.headway):
                if len(states) < min(wavefront.positions, plain.max_tokens - len(answer)):
                    states, taken = [*states, initial(start + len(states))], [*taken, 0]
                    if i:
                        guess = uniform(plain.seed, 0, start + len(states) - 1, 0, 7)
                        inputs.append(int(guess * served.tokenizer.vocab_size))
        inputs = inputs[: len(states)]
    return answer, steps


PUBLISHED = {"noise": 0.5, "average": 0.1}


@pytest.mark.parametrize(
    ("wavefront", "more", "initial"),
    [
        ((64, 1, 0.0), {}, "zero"),
        ((3, 1, 0.0), {}, "normal"),
        ((64, 2, 0.3), {}, "zero"),
        ((4, 4, 0.6), {}, "zero"),
        ((64, 1, 0.2), {}, "zero"),
        ((64, 2, 0.3), PUBLISHED, "normal"),
        ((64, 4, 0.0), {"noise": 0.3, "noise_decays": False}, "normal"),
        ((8, 2, 0.2), {"average": 0.6}, "zero"),
        ((8, 1, 0.3), {"headway": 3}, "zero"),
        ((5, 2, 0.4), {**PUBLISHED, "headway": 2}, "normal"),
    ],
)
@torch.no_grad()
def test_with_the_shared_cache_it_is_the_published_sampler(
    make_served: Callable[..., Any], wavefront: tuple[int, int, float], more: dict[str, Any], initial: str
) -> None:
    plain = [
        replace(request(prompt, GREEDY), logprobs=None) for prompt in PROMPTS if len(prompt) <= SHARED.chunk
    ]
    alone = make_served("bptt", state_init=initial)
    expected = [published(alone, r, Wavefront(*wavefront, **more)) for r in plain]
    if more:
        assert expected != [published(alone, r, Wavefront(*wavefront)) for r in plain]
    with Engine(lambda: make_served("bptt", settings=SHARED, state_init=initial)) as engine:
        found = engine.generate([waving(r, *wavefront, **more) for r in plain])
    assert [answer(events)[:2] for events in found] == expected
    for events, (_, steps) in zip(found, expected, strict=True):
        assert used(events).exits == sum(count < K for count in steps)
        assert used(events).saved_core_steps == sum(K - count for count in steps)


def test_positions_that_leave_at_once_take_the_inner_steps(make_served: Callable[..., Any]) -> None:
    """A threshold that every state meets: after the prompt it is plain decoding at the inner steps."""
    plain = [request(prompt, GREEDY) for prompt in PROMPTS]
    fewer = [replace(r, budget=StepBudget(K, schedule=(K, 2))) for r in plain]
    with Engine(lambda: packed(make_served, SHARED)) as engine:
        expected = [answer(events) for events in engine.generate(fewer)]
        found = engine.generate([waving(r, 64, 2, 1e9) for r in plain])
    assert [answer(events) for events in found] == expected
    assert [used(events).exits for events in found] == [19] * 3


def test_a_wavefront_is_the_same_alone_and_beside_others(make_served: Callable[..., Any]) -> None:
    """Nor does a step that fails and is repeated in halves change one, or a neighbour."""
    waves = [waving(request(prompt), 8, 2, 0.2) for prompt in PROMPTS]
    waves[0] = waving(request(PROMPTS[0]), 8, 2, 0.2, noise=0.5, average=0.3, headway=2)
    plain = [request(prompt) for prompt in PROMPTS]
    served = packed(make_served, SHARED)
    run, calls = served.runner.run, [0]

    def failing(batch: list[Any]) -> Any:
        calls[0] += 1
        results = run(batch)
        if len(batch) > 1 and calls[0] % 3 == 0:
            raise RuntimeError("after the step")
        return results

    with Engine(lambda: served) as engine:
        expected = [answer(engine.generate([one])[0]) for one in [*waves, *plain]]
        served.runner.run = failing
        found = [answer(events) for events in engine.generate([*waves, *plain])]
    assert calls[0] > 30 and found == expected
    assert expected[:3] != expected[3:]  # what a wavefront computes is another thing


def test_choices_min_tokens_and_the_last_token(make_served: Callable[..., Any]) -> None:
    stops = frozenset(range(0, 300, 3))
    plain = [
        replace(request(prompt, stop_ids=stops, choice=choice), min_tokens=most // 2, max_tokens=most)
        for prompt in PROMPTS
        for most in (1, 2, 5, 9)
        for choice in (0, 1)
    ]
    with Engine(lambda: make_served("bptt", settings=FULL)) as engine:
        expected = [tokens(events) for events in engine.generate(plain)]
        found = [tokens(events) for events in engine.generate([waving(r, 4, 2) for r in plain])]
    assert found == expected


def test_an_aborted_wavefront_leaves_nothing(make_served: Callable[..., Any]) -> None:
    served = make_served("bptt", settings=SHARED)
    with Engine(lambda: served) as engine:
        seen: list[Event] = []

        def abort_after_two(event: Event) -> None:
            seen.append(event)
            if len(seen) == 2:
                engine.abort(ids)

        ids = engine.submit([waving(request(PROMPTS[0]), 8, 1)], abort_after_two)
        engine.drain(60)
    assert seen[-1].finish == "abort" and len(seen) < 20
    assert served.runner.cache.num_bytes == 0


def test_a_prompt_does_not_wait_for_a_wavefront_to_end(make_served: Callable[..., Any]) -> None:
    """Its rows do not count among those of prompts, of which there may be ``prefill_rows``."""
    runner, scheduler = make_served("bptt", settings=SHARED).runner, Scheduler(2, prefill_rows=8, chunk=8)
    wave = runner.sequence(0, waving(request((17,)), 4, 1), 8)
    scheduler.add(wave)
    scheduler.admit()
    scheduler.schedule()
    for _ in range(K):
        wave.advance(StepResult())
    wave.output.append(5)
    scheduler.schedule()
    wave.advance(StepResult(guesses=[7]))
    prompt = runner.sequence(1, request(tuple(range(20, 28))), 8)
    scheduler.add(prompt)
    scheduler.admit()
    assert scheduler.schedule() == [wave, prompt] and (wave.length, prompt.length) == (2, 8)


@pytest.mark.parametrize(
    ("objective", "more", "message"),
    [
        ("evidence", {}, "noise level"),
        ("bptt", {"exit": ExitRule("latent-diff", 0.1)}, "exit"),
        ("bptt", {"schedule": (2, 4)}, "schedule"),
        ("bptt", {"max_ms": 9000, "lowers": True}, "max_ms"),
        ("bptt", {"speculation": Speculation(2, 2)}, "wavefront"),
    ],
)
def test_what_it_cannot_go_with_is_refused(
    make_served: Callable[..., Any], objective: str, more: dict[str, Any], message: str
) -> None:
    runner = make_served(objective, settings=FULL).runner
    wanted = replace(waving(request(PROMPTS[0]), 4, 2), logprobs=None)
    with pytest.raises(UserError, match=message):
        runner.sequence(0, replace(wanted, budget=replace(wanted.budget, **more)), 8)


def test_masked_models_refuse_it_and_speculation(make_served: Callable[..., Any]) -> None:
    runner = make_served("masked", "masked").runner
    for name, value in (("wavefront", Wavefront(4, 2, 0.0)), ("speculation", Speculation(1, 2))):
        wanted = Request(PROMPTS[0], StepBudget(K, **{name: value}), 20)
        with pytest.raises(UserError, match=name):
            runner.sequence(0, wanted, 8)


@pytest.fixture(scope="module")
def client(make_served: Callable[..., Any]) -> Iterator[TestClient]:
    with (
        Engine(lambda: make_served("bptt", settings=SHARED)) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        yield client


BODY = {"model": "tiny", "prompt": "in the beginning", "max_tokens": 12, "num_steps": 6, "seed": 1}


def test_requests_choose_it_and_usage_reports_it(client: TestClient) -> None:
    """A single position is plain decoding by default."""
    plain = client.post("/v1/completions", json=BODY).json()
    found = client.post("/v1/completions", json={**BODY, "wavefront": {"positions": 1}}).json()
    assert found["choices"][0]["text"] == plain["choices"][0]["text"]
    others = {"noise": 0.0, "noise_decays": True, "average": 0.0, "headway": 1}
    wanted = {"positions": 1, "inner_steps": 4, "threshold": 0.0, "acceptance": None, **others}
    assert found["usage"]["recurrence"]["wavefront"] == wanted
    found = client.post("/v1/completions", json={**BODY, "wavefront": {}, "logprobs": 1, "n": 2}).json()
    recurrence = found["usage"]["recurrence"]
    assert 0 <= recurrence["wavefront"].pop("acceptance") <= 1
    assert recurrence["wavefront"] == {"positions": 64, "inner_steps": 4, "threshold": 0.03, **others}
    nothing = {"noise": 0, "noise_decays": False, "average": 0, "headway": 1}
    body = {**BODY, "wavefront": {"inner_steps": 2}}
    without = client.post("/v1/completions", json=body).json()["choices"]
    body["wavefront"] |= nothing
    assert client.post("/v1/completions", json=body).json()["choices"] == without
    assert recurrence["exits"] >= 0 and 0 < recurrence["mean_steps"] <= 6
    assert all(len(c["logprobs"]["tokens"]) == len(c["recurrence"]["steps"]) for c in found["choices"])
    details = found["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0


@pytest.mark.parametrize("stop", [None, "e"])
def test_a_stream_is_the_same_text(client: TestClient, stop: str | None) -> None:
    """Several tokens may leave at a time; a stop string ends the answer at the same place."""
    body = {**BODY, "stop": stop, "wavefront": {"inner_steps": 2, "threshold": 0.4}}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]
    answer = client.post("/v1/completions", json={**body, "stream": True})
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == whole["text"]
    assert stop is None or stop not in whole["text"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"wavefront": {"positions": 0}}, "wavefront.positions"),
        ({"wavefront": {"positions": 65}}, "wavefront.positions"),
        ({"wavefront": {"inner_steps": 0}}, "wavefront.inner_steps"),
        ({"wavefront": {"threshold": -1}}, "wavefront.threshold"),
        ({"wavefront": {"noise": 1.1}}, "wavefront.noise"),
        ({"wavefront": {"average": 1}}, "wavefront.average"),
        ({"wavefront": {"headway": 0}}, "wavefront.headway"),
        ({"wavefront": {"noise_decays": 1}}, "wavefront.noise_decays"),
        ({"wavefront": {"steps": 3}}, "wavefront.steps"),
        ({"wavefront": 3}, "wavefront"),
        ({"wavefront": {}, "exit": {"threshold": 0.1}}, "wavefront"),
        ({"wavefront": {}, "num_steps": None, "schedule": [2, 4]}, "wavefront"),
        ({"wavefront": {}, "max_ms": 9000}, "wavefront"),
        ({"wavefront": {}, "response_format": {"type": "json_object"}}, "wavefront"),
        ({"wavefront": {}, "stream": True, "stream_options": {"include_steps": True}}, "wavefront"),
    ],
)
def test_bad_requests_name_the_field(client: TestClient, more: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/completions", json={**BODY, **more})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("objective", "family", "kv_cache", "expected"),
    [
        ("onestep", "huginn", "full", ["speculation", "wavefront"]),
        ("onestep", "huginn", "first", ["speculation", "wavefront"]),
        ("onestep", "huginn", "shared", ["wavefront"]),
        ("next_token", "llama", "shared", []),
        ("evidence", "huginn", "shared", []),
        ("masked", "masked", "shared", []),
    ],
)
def test_models_name_the_ways_to_guess_that_they_accept(
    objective: str, family: str, kv_cache: str, expected: list[str], make_served: Callable[..., Served]
) -> None:
    settings = SHARED.model_copy(update={"kv_cache": kv_cache})
    with (
        Engine(lambda: make_served(objective, family, settings)) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        card = client.get("/v1/models").json()["data"][0]["recurrence"]
        assert card["capabilities"] == expected
        for name in ("speculation", "wavefront"):
            body = {"prompt": [[5, 9]], "max_tokens": 3, "num_steps": min(4, card["max_steps"]), name: {}}
            status = client.post("/v1/completions", json=body).status_code
            assert status == 200 if name in expected else card["max_steps"] == 1 or status == 400, name
