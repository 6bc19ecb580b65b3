"""A request that fails ends alone: whatever raises at whatever stage of a step, every other request gets what
it gets alone."""

from __future__ import annotations

import itertools
import json
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litestar.testing import TestClient

from rdlm.errors import UserError
from rdlm.exit_criteria import ExitRule
from rdlm.sampling_params import SamplingParams
from serve.api.app import create_app
from serve.engine import engine as engine_module
from serve.engine import masked_runner, runner
from serve.engine.engine import Engine, Served
from serve.engine.grammar import Grammar, Grammars, Guide, json_grammar
from serve.engine.masked_runner import MaskedSequence
from serve.engine.sequence import Event, Request, Sequence, StepBudget
from serve.settings import EngineSettings, HttpSettings

MARK = 299
"""The prompt token of a request that makes a stage fail."""
STAGES = (
    "encode",
    "core",
    "decode",
    "predict",
    "sample",
    "exit",
    "renoise",
    "logprobs",
    "mask",
    "accept",
    "append",
    "advance",
)
SETTINGS = EngineSettings(max_slots=4, chunk=8, prefill_rows=24)


@dataclass
class Injector:
    """Makes one stage of a step raise, or return NaN, from its ``first`` call on in which a request with MARK
    takes part."""

    stage: str = ""
    kind: str = "raise"
    first: int = 0
    calls: int = 0
    grammar: Grammar | None = None
    """Of constrained bystanders, and of the request that fails; None where the model cannot be constrained."""
    guides: list[Guide] = field(default_factory=list)

    def reset(self, stage: str = "", kind: str = "raise", first: int = 0) -> None:
        self.stage, self.kind, self.first, self.calls = stage, kind, first, 0
        self.guides = []


@pytest.fixture(scope="module", params=["onestep", "evidence", "masked"])
def world(request: pytest.FixtureRequest, make_served: Callable[..., Served]) -> Iterator[Any]:
    """(engine, injector): stages of the runner's step are wrapped; which rows belong to whom is read off the
    batch."""
    objective = request.param
    served = make_served(objective, "masked" if objective == "masked" else "huginn", SETTINGS)
    injector = Injector()
    model: Any = served.runner
    marked: list[bool] = []

    def marking(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(batch: list[Any], **steps: int) -> Any:
            marked[:] = [any(MARK in s.request.prompt for s in batch)]
            return real(batch, **steps)

        return run

    def wrap(stage: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if injector.stage == stage and marked and marked[0]:
                injector.calls += 1
                if injector.calls > injector.first:
                    raise RuntimeError(f"injected into {stage}")
            return real(*args, **kwargs)

        return call

    patch = pytest.MonkeyPatch()
    patch.setattr(engine_module, "MOST_UNREAD", 1.0)  # whatever a step takes here
    for name in ("run", "run_unread"):
        patch.setattr(model, name, marking(getattr(model, name)))
    denoiser = model.denoiser
    if objective == "masked":
        for stage, name in (("core", "fill"), ("predict", "read"), ("decode", "logprobs_of")):
            patch.setattr(masked_runner, name, wrap(stage, getattr(masked_runner, name)))
    else:
        patch.setattr(denoiser.model, "encode", wrap("encode", denoiser.model.encode))
        patch.setattr(denoiser.model, "core", wrap("core", denoiser.model.core))
        patch.setattr(denoiser.model, "decode", wrap("decode", denoiser.model.decode))
        patch.setattr(denoiser, "predict", wrap("predict", denoiser.predict))
        patch.setattr(runner, "draw", wrap("sample", runner.draw))
        patch.setattr(runner, "exits_on_rows", wrap("exit", runner.exits_on_rows))
        patch.setattr(runner, "exits_on_states", wrap("exit", runner.exits_on_states))
        patch.setattr(runner, "renoise", wrap("renoise", runner.renoise))
        patch.setattr(runner, "logprobs_of", wrap("logprobs", runner.logprobs_of))
    wrap_own(patch, injector)
    if objective != "masked":
        grammars = Grammars(served.tokenizer, served.end_ids)
        injector.grammar = grammars.compile(
            json_grammar({"type": "array", "items": {"type": "integer"}}), "schema"
        )
    with Engine(lambda: served) as engine:
        yield engine, injector
    patch.undo()


def wrap_own(patch: pytest.MonkeyPatch, injector: Injector) -> None:
    """Stages outside of the shared step, which the engine takes for one request at a time."""

    def wrap(kind: type, name: str, stage: str, is_marked: Callable[[Any], bool]) -> None:
        real = getattr(kind, name)

        def call(self: Any, *args: Any) -> Any:
            if injector.stage == stage and is_marked(self):
                injector.calls += 1
                if injector.calls > injector.first:
                    raise RuntimeError(f"injected into {stage}")
            return real(self, *args)

        patch.setattr(kind, name, call)

    wrap(Guide, "compute", "mask", lambda guide: guide in injector.guides)
    wrap(Guide, "accept", "accept", lambda guide: guide in injector.guides)
    for kind in (Sequence, MaskedSequence):
        wrap(kind, "advance", "advance", lambda sequence: MARK in sequence.request.prompt)
    wrap(Sequence, "append", "append", lambda sequence: MARK in sequence.request.prompt)


class MarkedGrammar(Grammar):
    """The grammar of the request that fails."""

    def __init__(self, grammar: Grammar, injector: Injector) -> None:
        self._real, self._injector = grammar, injector

    def start(self, threads: Any) -> Guide:
        guide = self._real.start(threads)
        self._injector.guides.append(guide)
        return guide


def bystander(number: int, masked: bool, thinking: bool) -> Request:
    ids = tuple((7 * i + 3 * number) % 280 + 5 for i in range((5 * number) % 23 + 1))
    sampling = (SamplingParams(temperature=0.9, top_p=0.95), SamplingParams(temperature=0))[number % 2]
    rule = ExitRule("kl", 0.3, 2) if thinking and number % 3 == 1 else None
    budget = StepBudget(1 + number % 6, rule)
    scored = 0 if number % 4 == 2 and rule is None else None
    return Request(ids, budget, 4, sampling, seed=number, logprobs=number % 2, prompt_logprobs=scored)


HOSTILE: dict[str, dict[str, Any]] = {
    "none": {},
    "a bias beyond the vocabulary": {"sampling": SamplingParams(logit_bias={10**6: 1.0})},
    "a top_k that no tensor holds": {"sampling": SamplingParams(top_k=1 << 70)},
    "every token banned": {"stop_ids": frozenset(range(300)), "min_tokens": 2},
}


def outcome(events: list[Event]) -> tuple[list[int | None], list[float], str | None]:
    scores = [e.logprobs.logprob for e in events if e.logprobs is not None]
    return [e.token for e in events if e.token is not None], scores, events[-1].finish


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(st.integers(0, 23), min_size=1, max_size=6, unique=True),
    place=st.integers(0, 6),
    stage=st.sampled_from(("", *STAGES)),
    first=st.integers(0, 4),
    hostile=st.sampled_from(sorted(HOSTILE)),
    raising_sink=st.booleans(),
)
def test_bystanders_get_what_they_get_alone(
    world: Any, numbers: list[int], place: int, stage: str, first: int, hostile: str, raising_sink: bool
) -> None:
    engine, injector = world
    config = engine.served.config
    masked, thinking = config.objective.name == "masked", config.objective.k_meaning == "thinking"
    injector.reset()
    others = [bystander(number, masked, thinking) for number in numbers]
    others = [replace(one, grammar=injector.grammar if one.seed % 3 == 0 else None) for one in others]
    alone = [outcome(engine.generate([one])[0]) for one in others]
    villain = replace(bystander(24, masked, thinking), prompt=(MARK, 7, 8), logprobs=1, prompt_logprobs=0)
    villain = replace(villain, **HOSTILE[hostile])
    if injector.grammar is not None and stage in ("mask", "accept", "sample"):
        villain = replace(villain, grammar=MarkedGrammar(injector.grammar, injector))
    requests = [*others[:place], villain, *others[place:]]
    at = requests.index(villain)
    injector.reset(stage, first=first)
    events: list[list[Event]] = [[] for _ in requests]

    arrived: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def deliver(event: Event) -> None:
        arrived.put(event)
        if raising_sink and event.index == at:
            raise ValueError("injected into the sink")

    engine.submit(requests, deliver)
    unfinished = len(requests)
    while unfinished:
        event = arrived.get(timeout=60)
        events[event.index].append(event)
        unfinished -= event.finish is not None
    assert [outcome(events[i])[0::2] for i in range(len(requests)) if i != at] == [o[0::2] for o in alone]
    found = [outcome(events[i])[1] for i in range(len(requests)) if i != at]
    for scores, expected in zip(found, (o[1] for o in alone), strict=True):
        assert scores == pytest.approx(expected, abs=1e-4)
    injector.reset()
    again = engine.generate(others)  # nothing of the failure stays behind in slots or packs
    assert [outcome(one)[0::2] for one in again] == [o[0::2] for o in alone]


def test_a_failure_in_one_call_costs_nobody_an_answer(make_engine: Callable[..., Engine]) -> None:
    """A fault that a repetition does not meet again ends no request."""
    engine = make_engine("onestep", settings=SETTINGS)
    requests = [bystander(number, False, True) for number in range(4)]
    alone = [outcome(engine.generate([one])[0]) for one in requests]
    model: Any = engine.served.runner
    real, calls = model.denoiser.model.core, itertools.count()

    def step(*args: Any) -> Any:
        after = real(*args)
        if next(calls) == 2:
            raise RuntimeError("injected after the keys were written")
        return after

    model.denoiser.model.core = step
    together = engine.generate(requests)
    assert [outcome(events)[0::2] for events in together] == [o[0::2] for o in alone]


@pytest.mark.parametrize("kv_cache", ["shared", "full"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_in_their_row(
    value: float, kv_cache: str, make_served: Callable[..., Served]
) -> None:
    """A row whose states become NaN ends with an error, in its slot and in those that later own the slot
    nobody sees it."""
    settings = EngineSettings(max_slots=3, chunk=8, prefill_rows=24, kv_cache=kv_cache)  # type: ignore[arg-type]
    served = make_served("onestep", settings=settings)
    model: Any = served.runner
    others = [
        Request(tuple(range(5, 5 + length)), StepBudget(3), 16, SamplingParams(temperature=0))
        for length in (3, 30)
    ]
    long = replace(bystander(4, False, False), prompt=(MARK, *range(5, 40)), max_tokens=20)
    with Engine(lambda: served) as engine:
        alone = [outcome(engine.generate([one])[0]) for one in others]
        real = model.denoiser.model.encode

        def encode(ids: torch.Tensor, ctx: Any) -> torch.Tensor:
            e = real(ids, ctx)
            return torch.where((ids == MARK)[..., None], torch.full_like(e, value), e)

        model.denoiser.model.encode = encode
        for _ in range(3):  # each slot is owned by the row once
            together = engine.generate([long, *others])
            assert together[0][-1].finish == "error"
            assert [outcome(events)[0::2] for events in together[1:]] == [o[0::2] for o in alone]
            for order in (
                (0, 1, 0),
                (1, 0, 0),
                (0, 0, 1),
            ):  # short ones beside a long one: their rows are padded to its length
                after = engine.generate([others[i] for i in order])
                assert [outcome(events)[0::2] for events in after] == [alone[i][0::2] for i in order]


def test_a_request_that_bans_every_token_ends_with_what_to_mend(make_engine: Callable[..., Engine]) -> None:
    one = Request((5, 6), StepBudget(2), 4, stop_ids=frozenset(range(300)), min_tokens=1)
    last = make_engine("onestep").generate([one])[0][-1]
    assert (
        last.finish == "error" and isinstance(last.error, UserError) and last.error.field == "stop_token_ids"
    )
    assert last.token is None and last.usage is not None and last.usage.completion_tokens == 0


def test_requests_are_queued_all_or_none(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("onestep")
    with pytest.raises(UserError, match="num_steps"):
        engine.submit([Request((5,), StepBudget(2), 2), Request((5,), StepBudget(9), 2)], lambda event: None)
    assert engine.num_waiting == 0 and len(engine.generate([Request((5,), StepBudget(2), 2)])[0]) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_step_finds_wrong_with_a_request_is_the_clients_error(
    stream: bool, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args: Any) -> torch.Tensor:
        raise UserError("logit_bias", "...", "it leaves nothing to draw", "ban fewer tokens")

    monkeypatch.setattr(runner, "draw", refuses)
    body = {"prompt": "in the", "max_tokens": 4, "stream": stream}
    with TestClient(create_app(make_engine("onestep"), HttpSettings())) as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == (200 if stream else 400)
    text = answer.text.split("\n\n")[-3].removeprefix("data: ") if stream else answer.text
    error = json.loads(text)["error"]
    assert error["param"] == "logit_bias" and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("objective", ["onestep", "masked"])
@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"prompt": ()}, "prompt"),
        ({"prompt": (5, 300)}, "prompt"),
        ({"prompt": (-1,)}, "prompt"),
        ({"max_tokens": 127}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"budget": StepBudget(0)}, "num_steps"),
        ({"budget": StepBudget(2, schedule=(2, 99))}, "num_steps"),
    ],
)
def test_what_no_step_could_serve_is_refused_at_submission(
    objective: str, fields: dict[str, Any], names: str, make_engine: Callable[..., Engine]
) -> None:
    """In process nothing has checked a request before: it must not come as far as the thread that serves
    everybody."""
    engine = make_engine(objective, "masked" if objective == "masked" else "huginn")
    one = replace(Request((5, 6), StepBudget(2), 0, prompt_logprobs=0), **fields)
    if objective == "masked" and "budget" in fields and one.budget.schedule:
        return  # K does not vary there
    with pytest.raises(UserError) as refused:
        engine.submit([one], lambda event: None)
    assert refused.value.field == names
    assert engine.generate([Request((5, 6), StepBudget(2), 2)])[0][-1].finish == "length"
