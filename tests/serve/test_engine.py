"""The engine on tiny models: what a request gets does not depend on what else runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rdlm.sampling_params import SamplingParams
from serve.engine import runner
from serve.engine.engine import Engine, Served
from serve.engine.sequence import Event, Request, StepBudget, StepPredictions
from serve.errors import EngineClosed, QueueFull
from serve.settings import EngineSettings

OBJECTIVES = ["onestep", "evidence", "single_pass", "paper"]
WARM = SamplingParams(temperature=0.9, top_p=0.95)


def tokens(events: list[Event]) -> list[int]:
    return [e.token for e in events if e.token is not None]


def request(length: int, k: int, seed: int = 0, max_tokens: int = 6, **kwargs: object) -> Request:
    ids = tuple((7 * i + 3 * length + seed) % 290 + 5 for i in range(length))
    return Request(ids, StepBudget(k), max_tokens, **{"sampling": WARM, "seed": seed, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [*OBJECTIVES, "next_token"])
def test_batched_equals_alone_among_strangers_of_other_k(
    objective: str, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(objective, family="llama" if objective == "next_token" else "huginn")
    shapes = [(3, 4), (37, 1), (1, 8), (16, 2), (20, 5), (50, 3)]
    mixed = [
        request(length, min(k, engine.served.max_steps), seed) for seed, (length, k) in enumerate(shapes)
    ]
    alone = [tokens(engine.generate([one])[0]) for one in mixed]
    together: list[list[Event]] = [[] for _ in mixed]
    done = threading.Semaphore(0)

    def sink(place: int) -> Callable[[Event], None]:
        def take(event: Event) -> None:
            together[place].append(event)
            if event.finish:
                done.release()

        return take

    for place, one in enumerate(mixed):  # more than the slots, arriving a step or two apart
        engine.submit([one], sink(place))
        time.sleep(0.003)
    for _ in mixed:
        assert done.acquire(timeout=30)
    assert [tokens(events) for events in together] == alone
    assert all(len(answer) == 6 for answer in alone)
    assert len({tuple(answer) for answer in alone}) == len(alone)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("k", [1, 3])
def test_prompt_logprobs_equal_whole_sequence_scoring(
    objective: str, k: int, make_served: Callable[..., Served]
) -> None:
    """Chunked prefill through the cache against one pass over the whole sequence (K steps exact in the full
    cache)."""
    settings = EngineSettings(max_slots=2, chunk=7, prefill_rows=9, kv_cache="full")
    served = make_served(objective, settings=settings)
    one = request(24, k, max_tokens=1, logprobs=1, prompt_logprobs=1)
    with Engine(lambda: served) as engine:
        events = engine.generate([one])[0]
    ids = torch.tensor([one.prompt])
    thinking = served.config.objective.k_meaning == "thinking"
    steps = k if thinking else 1
    expected = served.runner.denoiser.token_logprobs(ids[:, :-1], ids[:, 1:], [steps])[steps][0]  # type: ignore[attr-defined]
    found = torch.tensor([entry.logprob for entry in events[0].prompt_logprobs or []])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("objective", ["onestep", "single_pass"])
@pytest.mark.parametrize(("kv_cache", "k"), [("full", 5), ("shared", 1)])
def test_prefill_equals_step_by_step_decode(
    objective: str, kv_cache: str, k: int, make_served: Callable[..., Served]
) -> None:
    """Tokens decoded one by one score the same when they are read back as a prompt, within 1e-4."""
    served = make_served(
        objective, settings=EngineSettings(max_slots=2, chunk=16, prefill_rows=32, kv_cache=kv_cache)
    )
    with Engine(lambda: served) as engine:
        said = engine.generate([request(5, k, max_tokens=30, logprobs=0)])[0]
        whole = Request(
            (*request(5, k).prompt, *tokens(said)), StepBudget(k), 1, logprobs=0, prompt_logprobs=0
        )
        read = engine.generate([whole])[0][0].prompt_logprobs
    assert read is not None
    decoded = torch.tensor([e.logprobs.logprob for e in said if e.logprobs is not None])
    torch.testing.assert_close(
        torch.tensor([entry.logprob for entry in read[4:]]), decoded, atol=1e-4, rtol=0
    )


def test_k_changes_the_answer_and_the_work(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("onestep")
    few, many = (engine.generate([request(20, k, max_tokens=8)])[0] for k in (1, 8))
    assert tokens(few) != tokens(many)
    for events, k in ((few, 1), (many, 8)):
        usage = events[-1].usage
        assert usage is not None
        assert (usage.prefill_core_steps, usage.decode_core_steps) == (
            20 * k,
            7 * k,
        )  # the last token is never read back


def test_sampling_models_run_the_context_once(make_engine: Callable[..., Engine]) -> None:
    usage = make_engine("evidence").generate([request(20, 4, max_tokens=8)])[0][-1].usage
    assert usage is not None
    assert (usage.prefill_core_steps, usage.decode_core_steps) == (19 + 4, 7 * 4)


@pytest.mark.parametrize("objective", ["onestep", "evidence"])
def test_seeds_decide(objective: str, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(objective)
    first, again, other, choice = (
        tokens(engine.generate([request(9, 3, max_tokens=12, seed=0) if s is None else s])[0])
        for s in (
            None,
            None,
            Request(request(9, 3).prompt, StepBudget(3), 12, WARM, 5),
            Request(request(9, 3).prompt, StepBudget(3), 12, WARM, 0, 1),
        )
    )
    assert first == again
    assert len({tuple(x) for x in (first, other, choice)}) == 3


def test_abort_frees_the_slot_and_queue_is_bounded(make_served: Callable[..., Served]) -> None:
    served = make_served(settings=EngineSettings(max_slots=1, chunk=16, prefill_rows=32))
    with Engine(lambda: served, max_queue=2) as engine:
        seen: list[Event] = []
        ids = engine.submit([request(4, 8, max_tokens=100)], seen.append)
        while not seen:
            time.sleep(0.001)
        waiting = engine.submit([request(4, 1), request(5, 1)], seen.append)
        with pytest.raises(QueueFull) as refused:
            engine.submit([request(6, 1)], seen.append)
        assert refused.value.retry_after is not None and refused.value.retry_after >= 1
        engine.abort([*ids, waiting[0]])
        while sum(event.finish == "abort" for event in seen) < 2:
            time.sleep(0.001)
        assert len(tokens(engine.generate([request(6, 1)])[0])) == 6
        reasons = [event.finish for event in seen if event.finish]
        assert sorted(reasons) == ["abort", "abort", "length"]
        assert served.scheduler.free_slots == 1


def test_the_events_of_a_step_reach_another_thread_with_one_call(make_engine: Callable[..., Engine]) -> None:
    """However many requests get tokens, and whoever sent them; one whose thread is gone disturbs no other."""
    engine, done = make_engine(), threading.Event()
    calls: list[int] = []
    seen: dict[int, list[Event]] = {0: [], 1: []}

    def call_soon(function: Callable[..., None], kept: list[object]) -> None:
        calls.append(len(kept))
        function(kept)
        if all(events and events[-1].finish for events in seen.values()):
            done.set()

    def gone(*_: object) -> None:
        raise RuntimeError("Event loop is closed")

    engine.submit([request(40, 8, max_tokens=60)], lambda event: None, gone)
    for place in seen:
        engine.submit([request(4, 2, seed=place)], seen[place].append, call_soon)
    assert done.wait(30)
    assert [tokens(seen[i]) for i in seen] == [tokens(engine.generate([request(4, 2, i)])[0]) for i in seen]
    assert sum(calls) == 2 * 6 and len(calls) < sum(calls)
    assert engine.drain(30) and engine.counters.ended["abort"] == 1


def test_drain_finishes_what_was_accepted(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    seen: list[Event] = []
    engine.submit([request(4, 8, seed=i, max_tokens=10) for i in range(6)], seen.append)
    assert engine.drain(30)
    assert [e.finish for e in seen if e.finish] == ["length"] * 6
    with pytest.raises(EngineClosed):
        engine.submit([request(4, 1)], seen.append)


def test_a_failing_step_ends_its_requests_and_not_the_server(make_served: Callable[..., Served]) -> None:
    served = make_served()
    real, calls = served.runner.run, []

    def fails_once(batch: list) -> dict:
        calls.append(len(batch))
        if len(calls) == 3:
            raise RuntimeError("injected")
        return real(batch)

    served.runner.run = fails_once  # type: ignore[method-assign]
    with Engine(lambda: served) as engine:
        assert engine.generate([request(4, 2)])[0][-1].finish == "error"
        assert len(tokens(engine.generate([request(4, 2)])[0])) == 6
        assert served.scheduler.free_slots == served.scheduler.num_slots


def test_loading_failure_reaches_whoever_waits() -> None:
    def fails() -> Served:
        raise ValueError("no such model")

    engine = Engine(fails)
    engine.start()
    with pytest.raises(ValueError, match="no such model"):
        engine.wait_ready(5)
    with pytest.raises(EngineClosed):
        engine.submit([], lambda event: None)


def test_a_defect_stops_the_engine_visibly(make_served: Callable[..., Served]) -> None:
    served = make_served()

    def broken() -> list:
        raise KeyError("injected")

    served.scheduler.schedule = broken  # type: ignore[method-assign]
    with Engine(lambda: served) as engine:
        assert engine.generate([request(4, 2)])[0][-1].finish == "abort"
        with pytest.raises(EngineClosed):
            engine.submit([request(4, 2)], lambda event: None)
        assert isinstance(engine.error, KeyError)


def test_an_idle_engine_gives_memory_back(
    make_served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed = threading.Event()
    monkeypatch.setattr("serve.engine.engine.IDLE_SECONDS", 0.01)
    monkeypatch.setattr("serve.engine.engine.trim_heap", trimmed.set)
    with Engine(make_served) as engine:
        assert trimmed.wait(30)
        trimmed.clear()
        assert len(tokens(engine.generate([request(4, 2)])[0])) == 6 and trimmed.wait(30)


def test_the_full_cache_holds_nothing_once_its_requests_have_ended(
    make_served: Callable[..., Served],
) -> None:
    served = make_served(settings=EngineSettings(max_slots=4, chunk=16, prefill_rows=32, kv_cache="full"))
    pool = served.runner.cache  # type: ignore[attr-defined]
    with Engine(lambda: served) as engine:
        few, many = (engine.generate([request(20, k, max_tokens=2)])[0][-1].usage for k in (2, 8))
        assert few is not None and many is not None and 0 < few.kv_bytes < many.kv_bytes
        held: list[int] = []
        engine.generate([request(20, 8, max_tokens=4)], lambda event: held.append(pool.num_bytes))
        engine.generate([request(4, 1, max_tokens=1)])
        assert held[0] > 0 and pool.num_bytes == 0


@pytest.mark.parametrize("objective", ["onestep", "evidence", "masked"])
def test_ids_that_only_a_padded_vocabulary_has_are_neither_drawn_nor_reported(
    objective: str, make_served: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    """The model's vocabulary is twice the tokenizer's, which is worth a warning; every place that names
    tokens is asked."""
    family = "masked" if objective == "masked" else "huginn"
    with caplog.at_level("WARNING"):
        served = make_served(objective, family, vocab_size=600)
    assert "300 tokens and the model 600 ids" in caplog.text
    hot = SamplingParams(temperature=100.0)
    wanted = None if objective == "masked" else StepPredictions(1, 20)
    with Engine(lambda: served) as engine:
        requests = [
            request(6, 3, seed, max_tokens=10, sampling=hot, logprobs=20, prompt_logprobs=20)
            for seed in range(4)
        ]
        events = [event for answer in engine.generate(requests) for event in answer]
        for event in engine.generate([replace(one, step_predictions=wanted) for one in requests]):
            events += event
    entries = [e.logprobs for e in events if e.logprobs] + [
        x for e in events for x in e.prompt_logprobs or []
    ]
    named = {e.token for e in events if e.token is not None} | {i for entry in entries for i, _ in entry.top}
    named |= {i for e in events if e.step_prediction for i, _ in e.step_prediction.top}
    assert len(named) > 100 and max(named) < 300


def test_a_step_finds_the_packs_of_the_step_before(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of other K enter, iterate and are read out in packs of their own; each is built once while its
    rows stay where they are."""
    built: dict[int, int] = {}
    answers = []
    for kept in (1, 4):
        monkeypatch.setattr(runner, "PACKS", kept)
        engine, built[kept] = make_engine(), 0
        real = runner.PackedContext

        def count(*args: object, kept: int = kept, real: type = real) -> object:
            built[kept] += 1
            return real(*args)

        monkeypatch.setattr(runner, "PackedContext", count)
        answers.append([tokens(e) for e in engine.generate([request(3, k, k) for k in (3, 7, 8)])])
        monkeypatch.setattr(runner, "PackedContext", real)
    assert answers[0] == answers[1] and built[4] < built[1]
