"""Constrained answers in the engine: whatever a random model draws, the whole answer fits the grammar."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from rdlm.data.tokenizer import Tokenizer, train_tokenizer
from rdlm.errors import UserError
from rdlm.exit_criteria import ExitRule
from rdlm.sampling_params import SamplingParams
from serve.api.constraints import MAX_ENUM
from serve.engine.engine import Engine
from serve.engine.grammar import Grammars, choice_grammar, explain, json_grammar, regex_grammar, special_rule
from serve.engine.sequence import Event, Request, StepBudget
from serve.settings import EngineSettings


class Verse(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    b: Literal["Gen", "Job"]
    n: list[Annotated[int, Field(ge=0, le=9)]] = Field(min_length=1, max_length=2)
    i: int = Field(ge=1, le=150)
    s: str = Field(max_length=3)
    o: bool | None


SCHEMA = Verse.model_json_schema()
PROMPT = tuple(range(5, 25))
WIDE = EngineSettings(max_slots=8, chunk=16, prefill_rows=64)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    assert tokenizer.eos_id is not None
    return Grammars(tokenizer, {tokenizer.eos_id})


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events)


SPACES = {i: -100.0 for i in (198, 199, 202, 221)}


def request(grammar: Any, seed: int = 0, k: int = 2, **fields: Any) -> Request:
    """A random model likes spaces, which JSON may have almost anywhere: they are made unlikely."""
    made = Request(PROMPT, StepBudget(k), 90, seed=seed, stop_ids=frozenset({0}), grammar=grammar)
    sampling = fields.pop("sampling", made.sampling)
    biased = replace(sampling, logit_bias={**SPACES, **sampling.logit_bias})
    return replace(made, sampling=biased, **fields)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("onestep", {"k": 1}), ("onestep", {"k": 8}), ("evidence", {"k": 1}), ("evidence", {"k": 6}),
        ("evidence", {"k": 6, "sampling": SamplingParams(sampler="euler")}), ("paper", {"k": 4}),
        ("evidence", {"k": 4, "sampling": SamplingParams(sampler="dpmpp_2m", temperature=0)}),
        ("onestep", {"budget": StepBudget(8, ExitRule("kl", 0.5, 1))}),
        ("onestep", {"budget": StepBudget(8, ExitRule("latent-diff", 0.9, 2))}),
        ("onestep", {"budget": StepBudget(8, schedule=(4, 1, 7))}),
        ("onestep", {"sampling": SamplingParams(temperature=0)}),
        ("onestep", {"sampling": SamplingParams(temperature=1.3, top_p=0.7, top_k=5, min_p=0.01)}),
        ("onestep", {"sampling": SamplingParams(repetition_penalty=2, frequency_penalty=1, logit_bias={9: 100.0})}),
    ],
)  # fmt: skip
def test_every_complete_answer_fits_the_schema(
    objective: str, options: dict[str, Any], make_engine: Callable[..., Engine], grammars: Grammars
) -> None:
    """At every K, under exits, schedules and samplers that draw several times per token."""
    engine = make_engine(objective, settings=WIDE, max_seq_len=256)
    grammar = grammars.compile(json_grammar(SCHEMA), "schema")
    k = options.pop("k", 3)
    answers = engine.generate([request(grammar, seed, k, max_tokens=200, **options) for seed in range(4)])
    finished = [text(events) for events in answers if events[-1].finish == "stop"]
    assert finished and all(Verse.model_validate_json(answer) for answer in finished)
    for events in answers:
        assert events[-1].finish in ("stop", "length")
        if events[-1].finish == "length":  # cut off, and so far right
            with pytest.raises(ValueError):
                json.loads(text(events))


def test_constrained_answers_change_nobody_elses(
    make_engine: Callable[..., Engine], grammars: Grammars
) -> None:
    """Bit for bit: the same tokens and log-probabilities beside constrained answers as without them."""
    engine = make_engine("onestep", settings=WIDE, max_seq_len=256)
    grammar = grammars.compile(json_grammar(SCHEMA), "schema")
    others = [request(None, seed, 1 + seed, max_tokens=12, logprobs=2) for seed in range(3)]
    plain = [request(None, seed + 9, 2, max_tokens=40) for seed in range(3)]
    beside = engine.generate([*others, *plain])[:3]
    mixed = engine.generate([*others, *(replace(one, grammar=grammar) for one in plain)])[:3]
    for one, other in zip(beside, mixed, strict=True):
        assert [e.token for e in one] == [e.token for e in other]
        scores = [[e.logprobs.logprob for e in answer if e.logprobs] for answer in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_choices_of_one_grammar_go_their_own_ways(
    make_engine: Callable[..., Engine], grammars: Grammars
) -> None:
    engine = make_engine("onestep", settings=WIDE)
    grammar = grammars.compile(regex_grammar("[ab]{8}"), "regex")
    first = request(grammar, 3)
    answers = engine.generate([replace(first, choice=i) for i in range(6)])
    texts = [text(events) for events in answers]
    assert all(re.fullmatch("[ab]{8}", one) for one in texts) and len(set(texts)) > 1
    alone = text(engine.generate([replace(first, choice=4)])[0])
    assert alone == texts[4]


def test_the_end_is_allowed_only_where_the_grammar_is_complete(
    make_engine: Callable[..., Engine], grammars: Grammars
) -> None:
    engine = make_engine("onestep")
    biases = {i: -100.0 for i in range(1, 300)} | {0: 100.0}
    forced = SamplingParams(logit_bias=biases)  # the end of text, wherever it may come
    least = grammars.compile(regex_grammar("(in the ){2,9}"), "regex")
    (events,) = engine.generate([request(least, sampling=forced)])
    assert text(events) == "in the in the " and events[-1].finish == "stop" and events[-1].token == 0
    (events,) = engine.generate([request(least, sampling=forced, stop_ids=frozenset())])
    assert text(events) == "in the in the " and events[-1].finish == "stop", "without ends of its own"
    longer = request(least, sampling=forced, min_tokens=len("in the ") * 3)
    (events,) = engine.generate([longer])
    assert len(text(events)) >= 21 and events[-1].finish == "stop"
    one = grammars.compile(choice_grammar(["god"]), "choice")
    (events,) = engine.generate([request(one, min_tokens=50)])
    assert text(events) == "god" and events[-1].finish == "stop", "nothing can follow"
    (events,) = engine.generate([request(least, stop=("the i",))])
    assert text(events) == "in " and events[-1].finish == "stop"


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_every_kind_of_tokenizer_spells_what_the_grammar_says(
    kind: Any, make_engine: Callable[..., Engine], make_served: Callable[..., Any]
) -> None:
    """Byte-level and byte-fallback vocabularies, with characters that no token has whole, and without an end."""
    from serve.loading import build_served

    words = ["in the beginning was the word and the word was with god"] * 50
    trained = train_tokenizer(kind, iter(words), 280 if kind == "bpe" else 290)
    wanted = 'ærlig "talt" 日本 😀\n'
    for ends in (set[int](), {trained.eos_id or 0}):
        grammar = Grammars(trained, ends).compile(choice_grammar([wanted]), "choice")
        made = make_served()
        with Engine(
            lambda made=made: build_served(made.runner.denoiser, made.config, trained, WIDE)
        ) as engine:  # type: ignore[misc]
            (events,) = engine.generate([Request(PROMPT, StepBudget(2), 90, seed=1, grammar=grammar)])
        assert text(events) == wanted and events[-1].finish == "stop"


def test_a_slow_mask_holds_its_own_answer_only(
    make_engine: Callable[..., Engine], grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.engine import grammar as module

    engine = make_engine("onestep", settings=WIDE)
    slow = grammars.compile(regex_grammar("[xy]{3}"), "regex")
    other = request(None, 5, max_tokens=20, stop_ids=frozenset())
    alone = [event.token for event in engine.generate([other])[0]]
    expected = text(engine.generate([request(slow)])[0])
    gate, compute = threading.Event(), module.Guide.compute
    monkeypatch.setattr(module.Guide, "compute", lambda self: (gate.wait(60), compute(self))[1])
    order: list[int] = []

    def see(event: Event) -> None:
        if event.finish is not None:
            order.append(event.index)
            gate.set()

    answers = engine.generate([request(slow), other], see)
    assert order == [1, 0], "the other ended while the mask was computed"
    assert [event.token for event in answers[1]] == alone and text(answers[0]) == expected


@pytest.mark.parametrize("failure", ["raises", "never comes", "is empty"])
def test_a_mask_that_fails_ends_its_own_request(
    failure: str,
    make_engine: Callable[..., Engine],
    grammars: Grammars,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from serve.engine import grammar as module

    engine = make_engine("onestep", settings=WIDE)
    bad = grammars.compile(regex_grammar("[xy]{4}"), "regex")
    other = request(None, 5, max_tokens=30, stop_ids=frozenset())
    alone = [event.token for event in engine.generate([other])[0]]
    gate = threading.Event()

    def compute(self: Any) -> bytearray:
        if failure == "raises":
            raise MemoryError("injected")
        if failure == "is empty":
            return bytearray(300)
        gate.wait(60)
        raise RuntimeError

    monkeypatch.setattr(module.Guide, "compute", compute)
    monkeypatch.setattr(module, "MASK_SECONDS", 0.2)
    answers = engine.generate([request(bad), other])
    gate.set()
    assert answers[0][-1].finish == "error"
    assert (answers[0][-1].error is None) == (failure == "raises")
    assert [event.token for event in answers[1]] == alone
    monkeypatch.undo()
    assert re.fullmatch("[xy]{4}", text(engine.generate([request(bad)])[0]))


def test_grammars_are_compiled_once_and_refused_within_their_time(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.engine import grammar as module

    first = grammars.compile(regex_grammar("q{3}"), "regex")
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
    again = grammars.compile(regex_grammar("q{3}"), "other")
    assert again._matcher is first._matcher and (again.field, first.field) == ("other", "regex")
    monkeypatch.undo()
    hours = json_grammar(
        {"allOf": [{"type": "string", "pattern": f".*{c}.*{c}"} for c in "abcdefghijklmnopqrstuvw"]}
    )
    began = time.process_time()
    for _ in range(2):
        with pytest.raises(UserError, match=r"schema=.*too complex"):
            grammars.compile(hours, "schema")
    assert time.process_time() - began < 5, "in another process, which ends"


def test_guides_of_one_grammar_are_independent(grammars: Grammars) -> None:
    grammar = grammars.compile(regex_grammar("ab|ac"), "regex")
    with ThreadPoolExecutor(1) as pool:
        one, two = grammar.start(pool), grammar.start(pool)
        while not (one.ready and two.ready):
            time.sleep(0.01)
        assert one.allowed == two.allowed
        a, b, c = (next(i for i in range(1, 300) if grammars._tokenizer.decode([i]) == x) for x in "abc")
        assert not one.accept(a)
        while not one.ready:
            time.sleep(0.01)
        assert one.allowed is not None and one.allowed[b] and one.allowed[c] and not one.allowed[a]
        assert two.allowed is not None and two.allowed[a] and not two.allowed[b]
        assert one.accept(c)
        with pytest.raises(RuntimeError, match="does not allow"):
            two.accept(b)


def test_as_many_choices_as_a_request_may_have_can_be_followed(grammars: Grammars) -> None:
    grammar = grammars.compile(choice_grammar([f"in the {i}" for i in range(MAX_ENUM)]), "choice")
    with ThreadPoolExecutor(1) as pool:
        guide = grammar.start(pool)
        for token in grammars._tokenizer.encode("in the 77"):
            while not guide.ready:
                time.sleep(0.01)
            assert guide.allowed is not None and guide.allowed[token] and not guide.accept(token)


def test_a_limit_of_the_library_names_the_field_that_was_sent(grammars: Grammars) -> None:
    alternatives = " | ".join(f'"in" " the {i}"' for i in range(3000))
    grammar = grammars.compile(f"start: {alternatives}", "structured_outputs.grammar")
    again = grammars.compile(f"start: {alternatives}", "tools")
    for one, field in ((grammar, "structured_outputs.grammar"), (again, "tools")):
        with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match=rf"{field}=.*complex") as refused:
            guide = one.start(pool)
            for token in grammars._tokenizer.encode("in the 77"):
                while not guide.ready:
                    time.sleep(0.01)
                guide.accept(token)
        assert refused.value.field == field


def test_a_grammar_that_no_text_fits_says_so(grammars: Grammars) -> None:
    for empty in ("start: start", "start: a\na: b\nb: a"):
        with pytest.raises(UserError, match="no text fits"):
            grammars.compile(empty, "grammar")


def test_errors_of_the_library_become_one_line() -> None:
    text = 'at 2(8): failed to compile JSON schema: Unimplemented keys: ["not", "if"]\n   2 | start: ...\n      ^\n'
    assert explain(text) == "this server cannot enforce the keyword not, if"
    assert (
        explain("regex parse error:\n    (a\n    ^\nerror: unclosed group")
        == "regex parse error: (a error: unclosed group"
    )


def test_special_tokens_of_a_fixed_text_are_tokens() -> None:
    assert special_rule('a"<x> b<xy>', {"<x>": 7, "<xy>": 9}) == r'"a\"" <[7]> " b" <[9]>'
    assert special_rule("", {}) == "" and special_rule("a", {"": 3}) == '"a"'
