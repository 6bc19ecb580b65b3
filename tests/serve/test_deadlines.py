"""Depth that varies by plan or by clock: schedules, deadlines, brown-out, and what a stream tells between
tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from litestar.testing import TestClient

from rdlm.sampling_params import SamplingParams
from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.engine.scheduler import Deadlines, StepCost
from serve.engine.sequence import Request, Sequence, StepBudget, StepCounts
from serve.settings import EngineSettings, HttpSettings

GREEDY = SamplingParams(temperature=0)
IDS = [(7 * i) % 290 + 5 for i in range(20)]


@pytest.fixture(scope="module")
def client(make_served: Callable[..., Served]) -> Iterator[TestClient]:
    settings = EngineSettings(max_slots=4, chunk=16, prefill_rows=32)
    with (
        Engine(lambda: make_served(settings=settings)) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        yield client


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post(
        "/v1/completions", json={"temperature": 0, "max_tokens": 5, "ignore_eos": True, **body}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_schedule_gives_each_token_its_steps(client: TestClient) -> None:
    answer = complete(client, prompt=[IDS], schedule=[3, 1, 8])
    assert answer["choices"][0]["recurrence"]["steps"] == [3, 1, 8, 8, 8]
    work = answer["usage"]["recurrence"]
    assert (work["prefill_core_steps"], work["decode_core_steps"]) == (20 * 3, 1 + 8 + 8 + 8)
    assert work["schedule"] == [3, 1, 8] and work["num_steps"] == 8 and work["mean_steps"] == 28 / 5
    same = complete(client, prompt=[IDS], schedule={"prefill": 3, "decode": [1, 8]})
    assert same["choices"] == answer["choices"]
    constant = complete(client, prompt=[IDS], schedule={"prefill": 4, "decode": 4})
    assert constant["choices"][0]["text"] == complete(client, prompt=[IDS], num_steps=4)["choices"][0]["text"]
    assert answer["choices"][0]["text"] != complete(client, prompt=[IDS], num_steps=8)["choices"][0]["text"]


@pytest.mark.parametrize("objective", ["single_pass", "paper"])
def test_scheduled_answers_do_not_depend_on_strangers(
    objective: str, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(objective)
    mixed = [
        Request(tuple(IDS[: 3 + 4 * i]), StepBudget(8, schedule=(1 + i, 8 - i, 2)), 5, seed=i)
        for i in range(4)
    ]
    alone = [[event.token for event in engine.generate([one])[0]] for one in mixed]
    assert [[event.token for event in events] for events in engine.generate(mixed)] == alone


def test_step_costs_are_learned() -> None:
    cost = StepCost()
    assert cost.predict(5) == 0
    for rows in (1, 4, 16, 64) * 5:
        cost.observe(rows, 0.002 + 0.0001 * rows)
    assert cost.predict(32) == pytest.approx(0.0052, rel=1e-6) and cost.predict(1) == pytest.approx(
        0.0021, rel=1e-6
    )
    steady = StepCost()
    for _ in range(5):
        steady.observe(3, 0.01)
    assert steady.predict(3) == steady.predict(7) == pytest.approx(0.01)


def at_ten_milliseconds(budget: StepBudget) -> tuple[Deadlines, Sequence]:
    """Deadlines that have seen a step take 10 ms, with one sequence submitted at time 0."""
    sequence = Sequence(0, Request((5, 6), budget, 10), StepCounts(8, 8, 8, 8), 16)
    deadlines = Deadlines()
    deadlines.cost.observe(1, 0.01)
    deadlines.add(sequence)
    return deadlines, sequence


def test_a_deadline_lowers_k_to_what_fits() -> None:
    def steps(now: float, **fields: Any) -> int:
        deadlines, sequence = at_ten_milliseconds(StepBudget(8, **fields))
        deadlines.update(now, 1, lambda k, blocks: StepCounts(k, k, k, k))
        return sequence.counts.num_steps

    assert steps(0.0, max_ms=10_000, lowers=True) == 8
    assert steps(0.0, max_ms=430, lowers=True) == 4  # one chunk and nine tokens at 10 ms a step
    assert steps(0.4, max_ms=430, lowers=True) == 1
    assert steps(0.4, max_ms=430, lowers=True, min_steps=3) == 3
    assert steps(0.4, max_ms=430) == 8  # the server's limit ends an answer and never lowers K
    deadlines, sequence = at_ten_milliseconds(StepBudget(8, max_ms=430))
    assert deadlines.expired(0.42) == [] and deadlines.expired(0.43) == [sequence]


def test_steps_that_only_queued_their_kernels_share_the_time_of_the_one_that_waited() -> None:
    """On an accelerator seven launches return at once and the eighth step waits for all: each step took an
    eighth of the sum."""
    cost = StepCost()
    for _ in range(5):
        for _ in range(7):
            cost.observe(4, 0.001, finished=False)
        cost.observe(4, 0.073)
    assert cost.predict(4) == pytest.approx(0.01)
    cost.observe(4, 100.0, finished=False)
    assert cost.predict(4) == pytest.approx(0.01)


def slow(served: Served, seconds: float) -> Served:
    real = served.runner.run

    def run(batch: list[Sequence]) -> Any:
        time.sleep(seconds)
        return real(batch)

    served.runner.run = run  # type: ignore[method-assign]
    return served


def test_deadlines_over_http(make_served: Callable[..., Served]) -> None:
    """K falls first; an answer that still does not fit ends with what there is; one that never began is a
    504."""
    served = slow(make_served(settings=EngineSettings(max_slots=1)), 0.01)
    with (
        Engine(lambda: served) as engine,
        TestClient(create_app(engine, HttpSettings(request_seconds=20))) as client,
    ):
        free = complete(client, prompt=[[5]], num_steps=8, max_tokens=3, max_ms=20_000)
        assert (
            free["choices"][0]["recurrence"]["steps"] == [8] * 3
            and not free["usage"]["recurrence"]["deadline_hit"]
        )
        tight = complete(client, prompt=[[5]], num_steps=8, max_tokens=120, max_ms=1000)
        took, work = tight["choices"][0]["recurrence"]["steps"], tight["usage"]["recurrence"]
        assert set(took) == {1} and work["deadline_hit"] and len(took) < 120
        assert work["lowered"] - len(took) in (0, 1)  # one may have been cut off
        assert tight["choices"][0]["finish_reason"] == "length" and 900 < tight["timings"]["total_ms"] < 3000
        stubborn = complete(client, prompt=[[5]], num_steps=8, max_tokens=60, max_ms=600, min_steps=8)
        assert (
            set(stubborn["choices"][0]["recurrence"]["steps"]) == {8}
            and stubborn["usage"]["recurrence"]["deadline_hit"]
        )
        hold = engine.submit([Request((5,), StepBudget(8), 100)], lambda event: None)
        late = client.post("/v1/completions", json={"prompt": "x", "max_ms": 50})
        engine.abort(hold)
        assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
        assert engine.counters.ended["expired"] == 1 and engine.counters.overdue == 3


def test_the_servers_limit_ends_what_names_none(make_served: Callable[..., Served]) -> None:
    served = slow(make_served(), 0.01)
    with (
        Engine(lambda: served) as engine,
        TestClient(create_app(engine, HttpSettings(request_seconds=2))) as client,
    ):
        answer = complete(client, prompt=[[5]], num_steps=8, max_tokens=120)
        assert (
            answer["choices"][0]["finish_reason"] == "length"
            and answer["usage"]["recurrence"]["deadline_hit"]
        )
        said, work = answer["usage"]["completion_tokens"], answer["usage"]["recurrence"]
        assert (
            work["prefill_core_steps"] == 8 and 8 * (said - 1) <= work["decode_core_steps"] < 8 * said
        )  # K stayed
        scored = client.post("/v1/score", json={"prompt": [IDS * 6], "num_steps": [8]})
        assert scored.status_code == 200  # 8 steps fit


def test_brown_out_lowers_the_default_and_nothing_else(make_served: Callable[..., Served]) -> None:
    served = make_served(settings=EngineSettings(max_slots=1, default_steps=6))
    settings = HttpSettings(brownout_queue=2)
    with Engine(lambda: served) as engine, TestClient(create_app(engine, settings)) as client:
        calm = complete(client, prompt=[[5]], max_tokens=1)["usage"]["recurrence"]
        assert calm["num_steps"] == 6 and "brownout" not in calm
        waiting = type(engine).num_waiting
        try:
            for queued, k in ((1, 6), (2, 3), (5, 2), (100, 1)):
                type(engine).num_waiting = property(lambda self, queued=queued: queued)  # type: ignore[assignment,misc]
                lowered = complete(client, prompt=[[5]], max_tokens=1)["usage"]["recurrence"]
                assert (lowered["num_steps"], lowered.get("brownout", False)) == (k, k < 6)
                for fields, kept in (
                    ({"num_steps": 6}, 6),
                    ({"reasoning_effort": "medium"}, 6),
                    ({"model": "tiny:k8"}, 8),
                ):
                    explicit = complete(client, prompt=[[5]], max_tokens=1, **fields)["usage"]["recurrence"]
                    assert explicit["num_steps"] == kept and "brownout" not in explicit
                assert client.get("/v1/models/tiny").json()["recurrence"]["default_steps"] == 6
        finally:
            type(engine).num_waiting = waiting  # type: ignore[method-assign]


@pytest.mark.parametrize("objective", ["onestep", "single_pass", "evidence"])
def test_a_stream_tells_every_step(objective: str, make_served: Callable[..., Served]) -> None:
    with (
        Engine(lambda: make_served(objective)) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        body = {"prompt": [IDS[:9]], "num_steps": 6, "temperature": 0, "max_tokens": 3, "ignore_eos": True}
        options = {"include_steps": True, "steps_every": 2, "steps_top": 3}
        raw = client.post("/v1/completions", json={**body, "stream": True, "stream_options": options}).text
        assert "event:" not in raw
        chunks = [json.loads(line.removeprefix("data: ")) for line in raw.split("\n\n")[:-2]]
        told = [c["recurrence"] for c in chunks if not c["choices"]]
        assert [(t["index"], t["step"]) for t in told] == [(0, 2), (0, 4)] * 3
        assert all(len(t["top"]) == 3 and t["delta"] > 0 for t in told)
        plain = complete(client, **body)
        assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == plain["choices"][0]["text"]
        if objective == "evidence":
            return
        for number, k in enumerate((2, 4)):  # what a step says of the first token is what K = step answers
            first = complete(client, **{**body, "num_steps": k, "max_tokens": 1, "logprobs": 1})["choices"][
                0
            ]["logprobs"]
            assert told[number]["top"][0]["token"] == first["tokens"][0]
            assert told[number]["top"][0]["logprob"] == pytest.approx(first["token_logprobs"][0], abs=1e-4)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"schedule": [1, 9]}, "schedule", "1 to 8"),
        ({"schedule": []}, "schedule", "list of 1"),
        ({"schedule": {"prefill": 2}}, "schedule", "decode"),
        ({"schedule": [True]}, "schedule", "core steps"),
        ({"schedule": [2], "num_steps": 2}, "schedule", "itself"),
        ({"schedule": [2], "model": "tiny:k2"}, "schedule", "itself"),
        ({"max_steps": 4}, "max_steps", "varies"),
        ({"min_steps": 4}, "min_steps", "max_ms"),
        ({"min_steps": 4, "num_steps": 2, "max_ms": 5}, "min_steps", "exceeds"),
        ({"num_steps": "auto", "max_steps": 9}, "max_steps", "1 to 8"),
        ({"exit": {"min_steps": 2}, "min_steps": 3}, "exit.min_steps", "contradicts"),
        ({"max_ms": 0}, "max_ms", "greater"),
        ({"max_ms": 100, "echo": True, "logprobs": 0}, "echo", "fixed K"),
        ({"stream": True, "stream_options": {"steps_every": 2}}, "stream_options", "include_steps"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "streams"),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 2}, "prompt_logprobs", "contradicts"),
    ],
)
def test_refusals(body: dict[str, Any], param: str, says: str, client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "x", **body})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert says in answer.json()["error"]["message"]


def test_bounds_of_a_varying_depth_may_stand_beside_it(client: TestClient) -> None:
    inside = complete(client, prompt=[IDS], exit={"threshold": 1e9, "min_steps": 3, "max_steps": 5})
    beside = complete(client, prompt=[IDS], exit={"threshold": 1e9}, min_steps=3, max_steps=5)
    assert inside["choices"] == beside["choices"] and inside["choices"][0]["recurrence"]["steps"] == [3] * 5
    assert beside["usage"]["recurrence"]["num_steps"] == 5
    none = complete(client, prompt=[IDS], exit={"criterion": "none"}, num_steps=5)
    assert "exit" not in none["usage"]["recurrence"] and none["usage"]["recurrence"]["num_steps"] == 5
