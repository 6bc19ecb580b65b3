"""Self-speculative decoding: greedy answers are those of plain decoding, sampled ones have its law."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from litestar.testing import TestClient

from rdlm.errors import UserError
from rdlm.sampling import verify
from rdlm.sampling_params import History, SamplingParams
from serve.api.app import create_app
from serve.engine.engine import Engine
from serve.engine.sequence import Event, Request, Speculation, StepBudget
from serve.loading import optimise
from serve.settings import EngineSettings, HttpSettings

K = 8
FULL = EngineSettings(kv_cache="full", max_slots=6, chunk=8, prefill_rows=16)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.4)
PROMPTS = [(5, 9, 20, 31, 7, 11), tuple(range(20, 41)), (17,)]


def request(prompt: tuple[int, ...], sampling: SamplingParams = SAMPLED, **more: Any) -> Request:
    return Request(prompt, StepBudget(K), 24, sampling, seed=3, logprobs=2, **more)


def speculating(plain: Request, draft_steps: int, draft_tokens: int) -> Request:
    return replace(plain, budget=replace(plain.budget, speculation=Speculation(draft_steps, draft_tokens)))


def answer(events: list[Event]) -> tuple[Any, ...]:
    drawn = [e for e in events if e.token is not None]
    return [e.token for e in drawn], [e.logprobs for e in drawn], [e.text for e in events], events[-1].finish


def used(events: list[Event]) -> Any:
    assert events[-1].usage is not None
    return events[-1].usage


def optimised(make_served: Callable[..., Any], initial: str = "zero") -> Any:
    """With the CPU kernels, which compute a row alone as they do in a batch, to the bit."""
    served = make_served("bptt", settings=FULL, state_init=initial)
    optimise(served.runner.denoiser, FULL)
    return served


@pytest.mark.parametrize("initial", ["normal", "zero"])
def test_drafts_change_no_greedy_answer_to_the_bit(make_served: Callable[..., Any], initial: str) -> None:
    """Drafts of every length, beside plain requests; log-probabilities and texts, too."""
    greedy = SamplingParams(temperature=0)
    plain = [request(prompt, greedy, stop_ids=frozenset({40, 60})) for prompt in PROMPTS]
    with Engine(lambda: optimised(make_served, initial)) as engine:
        expected = engine.generate(plain)
        for draft_steps, draft_tokens in ((1, 3), (3, 1), (6, 5), (7, 64)):
            mixed = [*(speculating(r, draft_steps, draft_tokens) for r in plain), *plain]
            found = engine.generate(mixed)
            assert [answer(events) for events in found] == [answer(events) for events in expected] * 2
            for events in found[:3]:
                assert used(events).drafted >= used(events).accepted
    assert sum(used(events).drafted for events in found[:3]) > sum(used(e).accepted for e in found[:3]) > 0


def test_a_sampled_answer_is_a_function_of_seed_and_draft(make_served: Callable[..., Any]) -> None:
    """Alone and in a batch with others; plain requests beside it do not notice."""
    plain = [request(prompt, stop_ids=frozenset({40, 60})) for prompt in PROMPTS]
    with Engine(lambda: optimised(make_served)) as engine:
        expected = [answer(events) for events in engine.generate(plain)]
        for draft in ((6, 1), (1, 5)):
            alone = [answer(engine.generate([speculating(r, *draft)])[0]) for r in plain]
            mixed = [*(speculating(r, *draft) for r in plain), *plain]
            assert [answer(events) for events in engine.generate(mixed)] == [*alone, *expected]
            assert alone != expected


EDGES = 41  # uniform numbers in the middle of as many equal parts


def test_verification_keeps_the_law_and_accepts_as_often_as_possible() -> None:
    """Over all tokens and a grid of both uniform numbers: the tokens that come out have law p, and the share of
    accepted ones is the sum of min(p, q) (Leviathan et al. 2023, theorem 3.5 and appendix A.1)."""
    rng, grid = torch.Generator().manual_seed(0), [(i + 0.5) / EDGES for i in range(EDGES)]
    pairs = [(a, b) for a in grid for b in grid]
    for spread in (0.3, 3.0):
        p, q = spread * torch.randn(5, generator=rng), spread * torch.randn(5, generator=rng)
        p[4], q[3] = -torch.inf, -torch.inf  # what is banned at one depth and not at the other
        laws, found, accepted = (p.double().softmax(-1), q.double().softmax(-1)), torch.zeros(5), 0.0
        for x in (0, 1, 2, 4):
            rows = len(pairs)
            ids, right = verify(
                p.expand(rows, 5), q.expand(rows, 5), [x] * rows, [History((), [])] * rows, pairs
            )
            found += float(laws[1][x]) * torch.bincount(ids, minlength=5) / rows
            accepted += float(laws[1][x]) * sum(right) / rows
        torch.testing.assert_close(found, laws[0].float(), atol=1.5 / EDGES, rtol=0)
        assert found[4] == 0
        assert accepted == pytest.approx(float(torch.minimum(*laws).sum()), abs=1.0 / EDGES)


SEEDS = 500


def test_the_law_of_sampled_answers_is_that_of_plain_decoding(make_served: Callable[..., Any]) -> None:
    """Two drafted tokens out of few, with all that shapes the distribution. The two samples of equal size are
    compared cell by cell (chi-square); the first draft alone, which is what a wrong acceptance would give away, is
    far from both."""
    shaping = SamplingParams(
        temperature=1.2, top_k=4, top_p=0.97, min_p=0.02, repetition_penalty=1.4, presence_penalty=0.3,
        logit_bias={7: 1.5},
    )  # fmt: skip
    plain = [Request((5, 9, 20), StepBudget(4), 3, shaping, seed=i) for i in range(SEEDS)]

    def counts(engine: Engine, requests: list[Request]) -> Counter[tuple[Any, ...]]:
        answers = engine.generate(requests)
        return Counter(tuple(e.token for e in events if e.token is not None) for events in answers)

    def distance(a: Counter[Any], b: Counter[Any]) -> float:
        """Chi-square over its degrees of freedom; cells with few counts are one."""
        cells = sorted({*a, *b}, key=lambda cell: -(a[cell] + b[cell]))
        common = [(a[cell], b[cell]) for cell in cells if a[cell] + b[cell] >= 10]
        common.append((SEEDS - sum(x for x, _ in common), SEEDS - sum(y for _, y in common)))
        common = [(x, y) for x, y in common if x + y]
        assert len(common) > 8
        return sum((x - y) ** 2 / (x + y) for x, y in common) / (len(common) - 1)

    with Engine(lambda: make_served("bptt", settings=FULL)) as engine:
        expected = counts(engine, plain)
        found = counts(engine, [speculating(r, 1, 2) for r in plain])
        shallow = counts(engine, [replace(r, budget=StepBudget(1)) for r in plain])
    assert (
        distance(found, expected) < 1.6
    )  # 0.999 quantile of chi-square / df for 30 cells or more is below 2
    assert distance(shallow, expected) > 3


def test_an_accepted_token_costs_what_it_costs_without_a_draft(make_served: Callable[..., Any]) -> None:
    """The states of a draft go on where it read them, so a drafted position takes K core steps, once."""
    plain = request(PROMPTS[0], SamplingParams(temperature=0))
    with Engine(lambda: make_served("bptt", settings=FULL)) as engine:
        (alone,) = engine.generate([plain])
        (found,) = engine.generate([speculating(plain, 4, 4)])
    assert answer(found)[0] == answer(alone)[0]
    usage, before = used(found), used(alone)
    assert before.drafted == 0 and before.decode_core_steps == (before.completion_tokens - 1) * K
    assert usage.decode_core_steps == usage.drafted * K
    assert 0 < usage.accepted <= min(usage.drafted, usage.completion_tokens - 1)


def test_min_tokens_and_the_last_token(make_served: Callable[..., Any]) -> None:
    stops = frozenset(range(0, 300, 3))
    plain = [
        replace(request(prompt, stop_ids=stops), min_tokens=most // 2, max_tokens=most)
        for prompt in PROMPTS
        for most in (1, 2, 5, 9)
    ]
    with Engine(lambda: make_served("bptt", settings=FULL)) as engine:
        found = [answer(events)[0] for events in engine.generate([speculating(r, 4, 3) for r in plain])]
    for r, tokens in zip(plain, found, strict=True):
        ends = [i for i, token in enumerate(tokens) if token in stops]
        assert all(i >= r.min_tokens for i in ends) and len(ends) <= 1
        assert len(tokens) == r.max_tokens or ends == [len(tokens) - 1]


def test_a_failed_step_of_a_neighbour_changes_nothing(
    make_served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that failed is repeated from the states before it, drafted ones included."""
    plain = [speculating(request(prompt), 3, 4) for prompt in PROMPTS]
    served = make_served("bptt", settings=FULL)
    with Engine(lambda: served) as engine:
        expected = [answer(events) for events in engine.generate(plain)]
        run, calls = served.runner.run, [0]

        def failing(batch: list[Any]) -> Any:
            calls[0] += 1
            results = run(batch)
            if len(batch) > 1 and calls[0] % 3 == 0:
                raise RuntimeError("after the step")
            return results

        monkeypatch.setattr(served.runner, "run", failing)
        found = [answer(events) for events in engine.generate(plain)]
    assert calls[0] > 30 and [f[0] for f in found] == [e[0] for e in expected]


@pytest.mark.parametrize(
    ("objective", "cache", "draft_steps", "message"),
    [
        ("bptt", "shared", 2, "--kv-cache full"),
        ("bptt", "full", K, "fewer core steps"),
        ("single_pass", "full", 2, None),
        ("evidence", "full", 2, "noise level"),
    ],
)
def test_what_cannot_be_verified_exactly_is_refused(
    make_served: Callable[..., Any], objective: str, cache: Any, draft_steps: int, message: str | None
) -> None:
    served = make_served(objective, settings=FULL.model_copy(update={"kv_cache": cache}))
    wanted = replace(speculating(request(PROMPTS[0]), draft_steps, 4), logprobs=None)
    if message is None:
        assert served.runner.sequence(0, wanted, 8).counts.num_steps == K
        return
    with pytest.raises(UserError, match=message):
        served.runner.sequence(0, wanted, 8)


@pytest.fixture(scope="module")
def client(make_served: Callable[..., Any]) -> Iterator[TestClient]:
    settings = HttpSettings()
    with (
        Engine(lambda: make_served("bptt", settings=FULL)) as engine,
        TestClient(create_app(engine, settings)) as client,
    ):
        yield client


BODY = {"model": "tiny", "prompt": "in the beginning", "max_tokens": 12, "num_steps": 6, "temperature": 0}


@pytest.mark.parametrize("wanted", [{}, {"draft_steps": 2}, {"draft_steps": 5, "draft_tokens": 2}])
def test_requests_choose_it_and_usage_reports_it(client: TestClient, wanted: dict[str, int]) -> None:
    plain = client.post("/v1/completions", json=BODY).json()
    found = client.post("/v1/completions", json={**BODY, "speculation": wanted}).json()
    assert found["choices"][0]["text"] == plain["choices"][0]["text"]
    details, about = found["usage"]["completion_tokens_details"], found["usage"]["recurrence"]["speculation"]
    drafted = details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"]
    assert drafted > 0 and about.pop("acceptance") == details["accepted_prediction_tokens"] / drafted
    assert about == {"draft_steps": 1, "draft_tokens": 4, **wanted}
    assert "completion_tokens_details" not in plain["usage"]


def test_a_stream_is_the_same_text(client: TestClient) -> None:
    plain = client.post("/v1/completions", json=BODY).json()["choices"][0]["text"]
    answer = client.post("/v1/completions", json={**BODY, "stream": True, "speculation": {"draft_steps": 4}})
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == plain


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"speculation": {"draft_steps": 6}}, "speculation.draft_steps"),
        ({"speculation": {"draft_steps": 0}}, "speculation.draft_steps"),
        ({"speculation": {"draft_tokens": 65}}, "speculation.draft_tokens"),
        ({"speculation": {"steps": 3}}, "speculation.steps"),
        ({"speculation": 3}, "speculation"),
        ({"speculation": {}, "num_steps": 1}, "speculation.draft_steps"),
        ({"speculation": {}, "exit": {"threshold": 0.1}}, "speculation"),
        ({"speculation": {}, "num_steps": None, "schedule": [2, 4]}, "speculation"),
        ({"speculation": {}, "max_ms": 9000}, "speculation"),
        ({"speculation": {}, "response_format": {"type": "json_object"}}, "speculation"),
    ],
)
def test_bad_requests_name_the_field(client: TestClient, more: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/completions", json={**BODY, **more})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_metrics_count_drafts(client: TestClient) -> None:
    client.post("/v1/completions", json={**BODY, "speculation": {"draft_steps": 5}})
    lines = client.get("/metrics").text.splitlines()
    counts = {
        line.split()[0]: float(line.split()[1])
        for line in lines
        if "draft_tokens_total" in line and line[0] != "#"
    }
    assert counts["rdlm_draft_tokens_total"] >= counts["rdlm_accepted_draft_tokens_total"] > 0
