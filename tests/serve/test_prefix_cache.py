"""The prefix cache changes no answer, finds what it should, and keeps the KV cache at its size."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from litestar.testing import TestClient

from rdlm.errors import UserError
from rdlm.exit_criteria import ExitRule
from rdlm.nn.kv_cache import PAGE
from rdlm.sampling_params import SamplingParams
from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.engine.prefix_cache import Node, PrefixCache
from serve.engine.sequence import Event, Request, Speculation, StepBudget
from serve.settings import EngineSettings, HttpSettings

SHARED = EngineSettings(max_slots=12, chunk=32, prefill_rows=64, max_len=256)
FULL = SHARED.model_copy(update={"kv_cache": "full"})
GREEDY = SamplingParams(temperature=0)
MakeServed = Callable[..., Served]


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(4, 250), k=count))


def request(prompt: tuple[int, ...], k: int = 4, max_tokens: int = 5, **more: Any) -> Request:
    return Request(prompt, StepBudget(k), max_tokens, SamplingParams(temperature=0.8), logprobs=2, **more)


def drawn(events: list[Event]) -> list[int]:
    assert events[-1].finish in ("stop", "length"), events[-1]
    return [event.token for event in events if event.token is not None]


def cached(events: list[Event]) -> int:
    assert events[-1].usage is not None
    return events[-1].usage.cached_tokens


def run(engine: Engine, *requests: Request) -> list[list[Event]]:
    """One after the other."""
    return [engine.generate([wanted])[0] for wanted in requests]


def nodes(cache: PrefixCache) -> list[Node]:
    found, todo = [], [cache._root]
    while todo:
        node = todo.pop()
        below = [child for children in node.children.values() for child in children]
        found += below
        todo += below
    return found


def check_pages(served: Served) -> None:
    """Every page is free, or owned by one node; nothing is in use any more."""
    prefixes = served.runner._prefixes  # type: ignore[attr-defined]
    known = nodes(prefixes)
    assert not prefixes._paths and not any(node.users for node in known)
    assert set(prefixes._unused) == {node for node in known if not node.children}
    for index, store in enumerate(prefixes.cache.stores):
        held = [page for node in known for page in node.pages[index].values()]
        assert sorted([0, *held, *store._free]) == list(range(store.k.shape[1]))
        assert store.num_used == 0 and not store.k[:, store._free].any() and not store.v[:, store._free].any()


@pytest.mark.parametrize(
    ("objective", "family", "settings", "more"),
    [
        ("bptt", "huginn", SHARED, {}),
        ("bptt", "huginn", FULL, {}),
        ("bptt", "huginn", FULL, {"num_coda_layers": 0, "state_init": "zero"}),
        ("evidence", "huginn", SHARED, {}),
        ("next_token", "llama", SHARED, {}),
    ],
    ids=["thinking", "thinking-full", "no-coda", "evidence", "plain"],
)
def test_answers_are_those_without_the_cache(
    make_served: MakeServed, objective: str, family: str, settings: EngineSettings, more: dict[str, Any]
) -> None:
    """Prompts that share beginnings of every length, at mixed K, alone and together."""
    off = settings.model_copy(update={"prefix_cache": "off"})
    ks = (1,) if family == "llama" else (4, 1)
    base, other = tokens(150), tokens(150, 1)
    wanted = [
        request(base[:shared] + other[: total - shared], k, 3)
        for k in ks
        for shared, total in ((150, 150), (140, 170), (128, 128), (64, 65), (30, 40))
    ]
    model = {"max_seq_len": 256, **more}
    with Engine(lambda: make_served(objective, family, off, **model)) as engine:
        expected = run(engine, *wanted)
    served = make_served(objective, family, settings, **model)
    with Engine(lambda: served) as engine:
        for found in (run(engine, *wanted), engine.generate(wanted)):
            assert [drawn(events) for events in found] == [drawn(events) for events in expected]
            for events, alone in zip(found, expected, strict=True):
                for event, same in zip(events, alone, strict=True):
                    if event.logprobs is not None and same.logprobs is not None:
                        assert event.logprobs.logprob == pytest.approx(same.logprobs.logprob, abs=2e-5)
        for events, sent in zip(found, wanted, strict=True):  # the second time each finds all that it may
            assert cached(events) == (len(sent.prompt) - 1) // PAGE * PAGE
            usage, before = (
                events[-1].usage,
                cached(events) * served.runner.step_counts(sent.budget.num_steps).context,
            )
            assert usage is not None and usage.cached_core_steps == before
    check_pages(served)


def test_the_next_turn_of_a_chat_finds_the_answer_too(make_served: MakeServed) -> None:
    """Where decoding computes the keys that a prompt would compute: full cache, or one core step."""
    for objective, family, settings, k in (
        ("bptt", "huginn", FULL, 3), ("evidence", "huginn", SHARED, 4), ("next_token", "llama", SHARED, 1),
    ):  # fmt: skip
        first, later = request(tokens(100), k, 40), tokens(20, 5)
        off = settings.model_copy(update={"prefix_cache": "off"})
        with Engine(partial_make(make_served, objective, family, off)) as engine:
            answer = drawn(run(engine, first)[0])
            second = request((*first.prompt, *answer, *later), k)
            expected = drawn(run(engine, second)[0])
        with Engine(partial_make(make_served, objective, family, settings)) as engine:
            assert drawn(run(engine, first)[0]) == answer
            (found,) = run(engine, second)
        assert cached(found) == 128 and drawn(found) == expected


def partial_make(
    make: MakeServed, objective: str, family: str, settings: EngineSettings
) -> Callable[[], Served]:
    return lambda: make(objective, family, settings, max_seq_len=256)


def test_decoded_keys_of_a_shared_cache_are_not_those_of_a_prompt(make_served: MakeServed) -> None:
    first = request(tokens(100), 2, 40)
    with Engine(partial_make(make_served, "bptt", "huginn", SHARED)) as engine:
        answer = drawn(run(engine, first)[0])
        (found,) = run(engine, request((*first.prompt, *answer), 2))
    assert cached(found) == PAGE  # of the prompt


def test_k_is_part_of_the_key_where_keys_depend_on_it(make_served: MakeServed) -> None:
    def found(settings: EngineSettings, *ks: int, objective: str = "bptt", **model: Any) -> list[int]:
        with Engine(lambda: make_served(objective, "huginn", settings, max_seq_len=256, **model)) as engine:
            return [cached(events) for events in run(engine, *(request(tokens(70), k, 1) for k in ks))]

    any_steps = SHARED.model_copy(update={"prefix_cache": "any-steps"})
    assert found(SHARED, 4, 2, 4, 2, 6) == [0, 0, PAGE, PAGE, 0]
    assert found(FULL, 4, 2, 4) == [0, 0, PAGE]  # a coda has the keys of the last step
    assert found(FULL, 4, 2, 3, 6, 6, 5, num_coda_layers=0) == [0, PAGE, PAGE, 0, PAGE, PAGE]
    assert found(any_steps, 4, 2, 6) == [0, PAGE, PAGE]
    assert found(SHARED, 4, 2, 6, objective="evidence") == [0, PAGE, PAGE]  # one clean step, whatever K is


def test_a_random_initial_state_is_part_of_the_key(make_served: MakeServed) -> None:
    def found(mode: str) -> list[int]:
        settings = SHARED.model_copy(update={"prefix_cache": mode})
        sent = [request(tokens(70), seed=seed) for seed in (1, 2, 1)]
        make = lambda: make_served("bptt", "huginn", settings, max_seq_len=256, state_init="normal")  # noqa: E731
        with Engine(make) as engine:
            return [cached(events) for events in run(engine, *sent)]

    assert (
        found("exact") == [0, 0, PAGE] and found("any-steps") == [0, PAGE, PAGE] and found("off") == [0, 0, 0]
    )


def test_what_a_prefix_cannot_serve(make_served: MakeServed) -> None:
    """Prompt scores need every read-out; chunks that exit early leave keys of their own."""
    prompt, rule = tokens(150), ExitRule("latent-diff", threshold=0.5)
    exiting = Request(prompt, StepBudget(6, rule), 4, GREEDY)
    scored = replace(request(prompt), prompt_logprobs=0)
    for settings, expected in ((SHARED, [0, 0, 128, 0]), (FULL, [0, 0, 0, 0])):
        with Engine(partial_make(make_served, "bptt", "huginn", settings)) as engine:
            found = run(engine, request(prompt, 6), exiting, exiting, scored)
            assert [cached(events) for events in found] == expected
            decoding = replace(exiting, budget=StepBudget(6, replace(rule, prefill=False)))
            assert cached(run(engine, decoding)[0]) == 128
            scores = [event.prompt_logprobs for event in found[3] if event.prompt_logprobs]
            assert sum(map(len, scores)) == len(prompt) - 1


def test_drafts_become_findable_only_when_they_are_verified(make_served: MakeServed) -> None:
    plain = request(tokens(100), 4, 40)
    drafting = replace(plain, budget=replace(plain.budget, speculation=Speculation(1, 5)))
    with Engine(partial_make(make_served, "bptt", "huginn", FULL)) as engine:
        answer = drawn(run(engine, drafting)[0])
        (found,) = run(engine, request((*plain.prompt, *answer, 7), 4))
    off = FULL.model_copy(update={"prefix_cache": "off"})
    with Engine(partial_make(make_served, "bptt", "huginn", off)) as engine:
        assert drawn(run(engine, drafting)[0]) == answer
        (expected,) = run(engine, request((*plain.prompt, *answer, 7), 4))
    assert cached(found) == 128 and drawn(found) == drawn(expected)


@pytest.mark.parametrize("settings", [SHARED, FULL], ids=["shared", "full"])
def test_the_kv_cache_does_not_grow_for_prefixes(make_served: MakeServed, settings: EngineSettings) -> None:
    """Prompts for many times its size, some again and again: the old ones go, the others stay right."""
    settings = settings.model_copy(update={"max_slots": 3})
    served = make_served("bptt", "huginn", settings, max_seq_len=256)
    off = settings.model_copy(update={"prefix_cache": "off"})
    often = tokens(150, 99)
    sent = [request(often if i % 3 == 0 else tokens(240, i), 2, 2, seed=i) for i in range(12)]
    with Engine(partial_make(make_served, "bptt", "huginn", off)) as engine:
        expected = [drawn(events) for events in run(engine, *sent)]
    with Engine(lambda: served) as engine:
        stores = served.runner.cache.stores  # type: ignore[attr-defined]
        found = run(engine, *sent)
        assert [drawn(events) for events in found] == expected
        # The prompt that came often is found, but for its first time.
        assert [cached(events) > 0 for events in found] == [i > 0 and i % 3 == 0 for i in range(12)]
        again = [request(tokens(240, i), 2, 2) for i in range(1, 5)]
        assert [cached(events) for events in run(engine, *again)] == [0] * 4  # long gone
        for store in stores:  # four pages a slot, of each of the two steps where they are kept
            assert store.k.shape[1] <= (3 * 4 + 1) * min(2, store.num_steps)
    check_pages(served)


@pytest.mark.parametrize("seed", range(2))
def test_aborts_and_failures_leave_the_pages_in_order(
    make_served: MakeServed, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = random.Random(seed)
    settings = FULL.model_copy(update={"max_slots": 4})
    served = make_served("bptt", "huginn", settings, max_seq_len=256)
    bases = [tokens(200, i) for i in range(2)]
    sent = [
        request(
            draw.choice(bases)[: draw.randint(1, 200)] + tokens(draw.randint(0, 20), i), draw.randint(1, 4)
        )
        for i in range(24)
    ]
    off = settings.model_copy(update={"prefix_cache": "off"})
    with Engine(partial_make(make_served, "bptt", "huginn", off)) as engine:
        expected = [drawn(events) for events in engine.generate(sent)]
    whole = served.runner.run

    def failing(batch: list[Any]) -> Any:
        if draw.random() < 0.05:
            raise RuntimeError("before the step")
        results = whole(batch)
        if draw.random() < 0.05:
            raise RuntimeError("after the step")
        return results

    monkeypatch.setattr(served.runner, "run", failing)
    with Engine(lambda: served) as engine:
        aborted = engine.submit(sent[:10], lambda event: None)
        engine.abort(aborted[::2])
        answers = engine.generate(sent)
    for events, right in zip(answers, expected, strict=True):
        assert events[-1].finish == "error" or drawn(events) == right
    assert sum(events[-1].finish != "error" for events in answers) > 10
    check_pages(served)


def test_prompts_that_begin_alike_are_computed_once(make_served: MakeServed) -> None:
    """All at once: the choices of one prompt, prompts with a common beginning; also where the first is aborted."""
    begin, model = tokens(150), {"max_seq_len": 256, "state_init": "zero"}
    for settings in (SHARED, FULL):
        sent = [replace(request(begin, 3), choice=i) for i in range(4)]
        sent += [request(begin[:130] + tokens(30, i), 3, seed=i) for i in range(4)] + [
            request(tokens(100, 9), 3)
        ]
        off = settings.model_copy(update={"prefix_cache": "off"})
        with Engine(lambda off=off: make_served("bptt", "huginn", off, **model)) as engine:
            expected = [drawn(events) for events in engine.generate(sent)]
        served = make_served("bptt", "huginn", settings, **model)
        with Engine(lambda served=served: served) as engine:
            found = engine.generate(sent)
            assert [drawn(events) for events in found] == expected
            assert sorted(cached(events) for events in found) == [0, 0, *[128] * 7]
            other = [replace(wanted, prompt=(5, *wanted.prompt)) for wanted in sent[:4]]
            ids = engine.submit(other[:2], lambda event: None)
            engine.abort(ids[:1])
            again = engine.generate(other)
            assert all(events[-1].finish == "length" for events in again)
        assert not served.runner._prefixes._computed  # type: ignore[attr-defined]
        check_pages(served)


def test_nobody_waits_for_keys_that_are_not_kept(make_served: MakeServed) -> None:
    """A deadline may lower K, so its prompt is not findable."""
    lowering = Request(tokens(150), StepBudget(3, max_ms=1_000_000, lowers=True), 3, GREEDY)
    with Engine(partial_make(make_served, "bptt", "huginn", SHARED)) as engine:
        found = engine.generate([lowering, request(tokens(150), 3)])
        assert [cached(events) for events in found] == [0, 0]
        assert cached(run(engine, lowering)[0]) == 128


def test_over_http(make_served: MakeServed) -> None:
    served = make_served("next_token", "llama", SHARED, max_seq_len=256)
    with Engine(lambda: served) as engine, TestClient(create_app(engine, HttpSettings())) as client:
        body = {"prompt": list(tokens(150)), "max_tokens": 2, "temperature": 0, "n": 2}
        found = [client.post("/v1/completions", json=body).json()["usage"] for _ in range(2)]
        assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in found] == [0, 128]
        response = client.post("/v1/responses", json={"input": "a" * 150, "max_output_tokens": 2}).json()
        assert response["usage"]["input_tokens_details"]["cached_tokens"] == 0
        metrics = client.get("/metrics").text
    assert (
        "rdlm_cached_prompt_tokens_total 384.0" in metrics and "rdlm_cached_row_steps_total 384.0" in metrics
    )


def test_kept_prefixes_take_so_much_memory_and_no_more(make_served: MakeServed) -> None:
    served = make_served("next_token", "llama", SHARED, max_seq_len=256)
    prefixes = served.runner._prefixes  # type: ignore[attr-defined]
    page = sum(store.page_bytes for store in prefixes.cache.stores)
    prefixes.most_bytes = 5 * page
    with Engine(lambda: served) as engine:
        run(engine, *(request(tokens(150, i), 1) for i in range(4)))
        assert (
            prefixes.num_bytes == 5 * page == sum(prefixes._bytes_of(node.pages) for node in nodes(prefixes))
        )
        assert [
            cached(events) for events in run(engine, request(tokens(150, 3), 1), request(tokens(150), 1))
        ] == [128, 0]
    check_pages(served)


def test_any_steps_needs_the_shared_cache(make_served: MakeServed) -> None:
    settings = FULL.model_copy(update={"prefix_cache": "any-steps"})
    with pytest.raises(UserError, match="prefix_cache"):
        make_served("bptt", "huginn", settings, max_seq_len=256)


@pytest.mark.parametrize("prefix_cache", ["exact", "any-steps"])
def test_keys_that_are_not_numbers_serve_nobody(
    make_served: MakeServed, monkeypatch: pytest.MonkeyPatch, prefix_cache: str
) -> None:
    """A state that diverges leaves such keys in pages that later requests would read; who waited for them computes
    its own."""
    settings = SHARED.model_copy(update={"prefix_cache": prefix_cache})
    served = make_served("bptt", "huginn", settings, state_init="zero", max_seq_len=256)
    model, wanted, diverges = served.runner.denoiser.model, request(tokens(150)), [False]  # type: ignore[attr-defined]
    core = model.core
    monkeypatch.setattr(model, "core", lambda *given: core(*given) * (float("nan") if diverges[0] else 1))
    with Engine(lambda: served) as engine:
        expected = drawn(run(engine, wanted, request(tokens(3)))[0])
        while served.runner._prefixes.evict():  # type: ignore[attr-defined]
            pass
        diverges[0] = True
        failed = engine.generate([wanted, wanted])
        diverges[0] = False
        again, known = run(engine, wanted, wanted)
    assert [events[-1].finish for events in failed] == ["error", "error"]
    assert (cached(again), cached(known)) == (0, 128)
    assert drawn(again) == expected and (prefix_cache == "any-steps" or drawn(known) == expected)
    check_pages(served)
