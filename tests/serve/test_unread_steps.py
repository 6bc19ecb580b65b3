"""Core steps of which nothing is read are taken at once: what comes out is what single steps give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from rdlm.exit_criteria import ExitRule
from rdlm.sampling_params import SamplingParams
from serve.engine import engine as engine_module
from serve.engine.engine import Engine, Served
from serve.engine.sequence import Event, Request, Sequence, StepBudget, StepPredictions, StepResult
from serve.loading import optimise
from serve.settings import EngineSettings

SAMPLED = SamplingParams(temperature=0.9)
REQUESTS = [
    Request((5, 9, 20, 31, 7, 11), StepBudget(6), 5, seed=1),
    Request(tuple(range(20, 41)), StepBudget(6), 4, SAMPLED, seed=2, logprobs=2),
    Request(tuple(range(30, 40)), StepBudget(4), 0, prompt_logprobs=1),
    Request((17,), StepBudget(3), 7, SAMPLED, seed=3),
    Request((8, 9), StepBudget(6, schedule=(6, 2, 5)), 6, seed=4),
    Request((8, 10), StepBudget(6, exit=ExitRule("latent-diff", 0.5, 2)), 6, seed=5),
    Request((8, 11, 12), StepBudget(5), 3, seed=6, step_predictions=StepPredictions(2, 3)),
]
TIMES = ("queue_s", "first_token_s", "total_s")


def served_of(make: Callable[..., Served], objective: str, cache: str, kernels: bool) -> Served:
    served = make(objective, "huginn", EngineSettings(max_slots=4, chunk=8, prefill_rows=24, kv_cache=cache))
    if kernels:
        optimise(served.runner.denoiser, EngineSettings())  # type: ignore[attr-defined]
    return served


def told(answers: list[list[Event]]) -> list[list[dict[str, Any]]]:
    """Everything but times."""
    found = [[asdict(event) for event in events] for events in answers]
    for event in (event for events in found for event in events):
        event["usage"] = event["usage"] and {k: v for k, v in event["usage"].items() if k not in TIMES}
    return found


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("cache", ["shared", "full", "first"])
@pytest.mark.parametrize("objective", ["onestep", "single_pass"])
def test_steps_at_once_answer_as_single_steps(
    make_served: Callable[..., Served],
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    cache: str,
    kernels: bool,
) -> None:
    answers, steps, calls = {}, {}, {}
    for most in (0.0, 1.0):
        monkeypatch.setattr(engine_module, "MOST_UNREAD", most)
        served = served_of(make_served, objective, cache, kernels)
        taken: list[int] = []
        real = served.runner.run_unread

        def run_unread(batch: Any, steps: int, real: Any = real, taken: list[int] = taken) -> Any:
            taken.append(steps)
            return real(batch, steps)

        monkeypatch.setattr(served.runner, "run_unread", run_unread)
        with Engine(lambda served=served: served) as engine:  # type: ignore[misc]
            engine.generate(REQUESTS[:1])  # the cost of a step is known from here on
            answers[most] = [told(engine.generate([request])) for request in REQUESTS]
            answers[most].append(told(engine.generate(REQUESTS[:4])))
            steps[most], calls[most] = engine.counters.steps, taken
    assert answers[0.0] == answers[1.0]
    assert steps[0.0] == steps[1.0]
    assert not calls[0.0] and max(calls[1.0]) == 5  # all of K = 6 but the last


def test_a_long_step_leaves_none_to_be_taken_with_it(
    make_served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that arrives waits for MOST_UNREAD at most, as the cost of steps is known."""
    served = served_of(make_served, "onestep", "shared", False)
    with Engine(lambda: served) as engine:
        engine.generate(REQUESTS[:1])
        batch = [served.runner.sequence(0, REQUESTS[0], 8)]
        batch[0].open()
        for seconds, most in ((0.004, 1), (0.02, 0), (0.0001, 5)):
            monkeypatch.setattr(engine._deadlines.cost, "predict", lambda rows, seconds=seconds: seconds)
            assert engine._unread_steps(served, batch, 6) == most


def test_a_sequence_that_cannot_advance_ends_alone(
    make_served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MOST_UNREAD", 1.0)
    served = served_of(make_served, "onestep", "shared", False)
    with Engine(lambda: served) as engine:
        alone = told(engine.generate(REQUESTS[:1]))
        real = Sequence.advance

        def advance(self: Sequence, result: StepResult) -> None:
            if self.request.seed == 3 and self.step == 1:
                raise RuntimeError("injected")
            real(self, result)

        monkeypatch.setattr(Sequence, "advance", advance)
        both = engine.generate([REQUESTS[0], REQUESTS[3]])
        assert told(both[:1]) == alone
        assert [event.finish for event in both[1]] == ["error"]
        assert told(engine.generate(REQUESTS[:1])) == alone  # the engine goes on
