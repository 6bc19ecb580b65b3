"""Masked models behind the engine and over HTTP: the texts of rdlm.diffusion.unmasking and its exact
likelihood; what has no meaning is refused."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from litestar.testing import TestClient

from rdlm.data.tokenizer import Tokenizer
from rdlm.diffusion.masked_likelihood import left_to_right
from rdlm.diffusion.unmasking import mask_of, unmask
from rdlm.errors import UserError
from rdlm.sampling_params import SamplingParams
from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.engine.masked_runner import MaskedRunner
from serve.engine.sequence import Event, Request, StepBudget
from serve.settings import EngineSettings, HttpSettings

WARM = SamplingParams(temperature=0.9, top_p=0.95)
ORDERS: list[Any] = ["random", "left_to_right", "confidence"]
Make = Callable[..., Served]


@pytest.fixture(scope="module")
def served(make_served: Make) -> Served:
    """Three layers in two blocks, so that texts under way are read by one or the other."""
    settings = EngineSettings(max_slots=4, chunk=16, prefill_rows=64)
    return make_served(
        "masked", "masked", settings, blocks={"num_blocks": 2, "layers_per_block": [2, 1], "overlap": 0.0}
    )


@pytest.fixture(scope="module")
def engine(served: Served) -> Iterator[Engine]:
    with Engine(lambda: served) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, HttpSettings()), raise_server_exceptions=False) as client:
        yield client


def denoiser_of(served: Served) -> Any:
    return cast(MaskedRunner, served.runner).denoiser


def request(length: int, k: int, seed: int = 0, max_tokens: int = 6, **kwargs: Any) -> Request:
    ids = tuple((7 * i + 3 * length + seed) % 290 + 5 for i in range(length))
    return Request(ids, StepBudget(k), max_tokens, **{"sampling": WARM, "seed": seed, **kwargs})


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def filled(served: Served, one: Request) -> list[int]:
    """The answer of rdlm.diffusion.unmasking to the same request."""
    denoiser = denoiser_of(served)
    row = torch.tensor([[*one.prompt, *[mask_of(denoiser)] * one.max_tokens]])
    options: dict[str, Any] = {"seed": one.seed, "order": one.order, "first": one.choice}
    out = unmask(
        denoiser, row, one.budget.num_steps, one.sampling, num_tokens=served.tokenizer.vocab_size, **options
    )
    return out[0, len(one.prompt) :].tolist()


# The engine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_texts_are_those_of_the_sampler_alone_and_among_strangers(
    served: Served, engine: Engine, order: Any
) -> None:
    """Of other length, K and step, arriving while others are under way, in more texts than slots."""
    shapes = [(3, 4), (37, 1), (1, 8), (16, 2), (20, 5), (50, 3), (0, 6), (100, 8)]
    mixed = [
        request(length, k, seed, order=order, choice=seed % 3) for seed, (length, k) in enumerate(shapes)
    ]
    expected = [filled(served, one) for one in mixed]
    assert [tokens(engine.generate([one])[0]) for one in mixed] == expected
    together: list[list[Event]] = [[] for _ in mixed]
    done = threading.Semaphore(0)

    def sink(place: int) -> Callable[[Event], None]:
        return lambda event: (together[place].append(event), event.finish and done.release()) and None

    for place, one in enumerate(mixed):
        engine.submit([one], sink(place))
        time.sleep(0.003)
    for _ in mixed:
        assert done.acquire(timeout=30)
    assert [tokens(events) for events in together] == expected
    assert len({tuple(answer) for answer in expected}) == len(expected) and all(
        len(answer) == 6 for answer in expected
    )


def test_both_blocks_are_asked_and_answer_together(
    served: Served, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of blanks alone starts in block 0; behind a long prompt block 1 says everything. Texts of one
    block share its passes."""
    seen: list[tuple[int, int]] = []
    for index, block in enumerate(denoiser_of(served).parts):
        real = block.hidden  # type: ignore[operator]
        monkeypatch.setattr(
            block, "hidden", lambda ids, *rest, i=index, f=real: seen.append((i, len(ids))) or f(ids, *rest)
        )
    engine.generate([request(0, 4)])
    assert {index for index, _ in seen} == {0, 1}
    seen.clear()
    engine.generate([request(20, 4, seed, order="confidence") for seed in range(3)])
    assert seen == [(1, 3)] * 4


@pytest.mark.parametrize("order", ORDERS)
def test_tokens_arrive_in_order_as_soon_as_all_before_them_are_in_sight(engine: Engine, order: Any) -> None:
    events = engine.generate([request(4, 8, max_tokens=16, order=order, seed=3)])[0]
    steps = [event.steps for event in events if event.steps is not None]
    assert len(steps) == 16 and steps == sorted(steps) and steps[-1] <= 8
    assert steps == sorted([*range(1, 9), *range(1, 9)]) if order == "left_to_right" else steps[0] > 1
    assert events[-1].finish == "length" and all(event.finish is None for event in events[:-1])


def test_an_end_of_text_ends_the_answer_as_soon_as_it_is_in_sight(served: Served, engine: Engine) -> None:
    one = request(4, 8, max_tokens=16, order="left_to_right")
    whole = filled(served, one)
    stop = whole[3]
    cut = engine.generate([request(4, 8, max_tokens=16, order="left_to_right", stop_ids=frozenset({stop}))])[
        0
    ]
    assert tokens(cut) == whole[: whole.index(stop) + 1] and cut[-1].finish == "stop"
    assert cut[-1].usage is not None and cut[-1].usage.decode_core_steps < 8 * 16, (
        "the steps after it are spared"
    )
    text = served.tokenizer.decode(whole)
    sought = text[5:8]
    stopped = engine.generate([request(4, 8, max_tokens=16, order="left_to_right", stop=(sought,))])[0]
    assert (
        "".join(event.text for event in stopped) == text[: text.index(sought)]
        and stopped[-1].finish == "stop"
    )


@pytest.mark.parametrize("order", ORDERS)
def test_min_tokens_keeps_ends_from_where_they_are_not_wanted(engine: Engine, order: Any) -> None:
    """With two thirds of all ids as ends."""
    ends = frozenset(range(200))
    answers = [
        tokens(
            engine.generate([request(4, 8, seed, max_tokens=16, order=order, stop_ids=ends, min_tokens=9)])[0]
        )
        for seed in range(6)
    ]
    assert all(9 < len(answer) and not ends.intersection(answer[:9]) for answer in answers)
    assert any(len(answer) < 16 and answer[-1] in ends for answer in answers)


def test_the_account_is_what_pytorch_counts(make_served: Make) -> None:
    from tests.serve.test_cost import counted

    for one in (
        request(5, 4, max_tokens=7),
        request(5, 8, max_tokens=7, order="confidence"),
        request(6, 2, max_tokens=3, prompt_logprobs=1, logprobs=2),
    ):
        account, truth = counted(make_served("masked", "masked", blocks={"num_blocks": 2}), one)
        assert account == truth > 0


def test_prompts_are_scored_by_the_chain_rule(served: Served, engine: Engine) -> None:
    """Entries of all prompt tokens but the first are rdlm.diffusion.masked_likelihood.left_to_right's given
    the first; so are those of a text that is written in this order, one token a step."""
    prompts = [
        request(length, 2, prompt_logprobs=3, max_tokens=max_tokens)
        for length, max_tokens in ((9, 0), (30, 2), (2, 5), (1, 1))
    ]
    for one, events in zip(prompts, engine.generate(prompts), strict=True):
        found = [entry for event in events for entry in event.prompt_logprobs or []]
        ids = torch.tensor([one.prompt])
        logprobs, greedy = left_to_right(denoiser_of(served), ids, torch.arange(len(one.prompt))[None] > 0)
        assert [entry.logprob for entry in found] == pytest.approx(logprobs[0, 1:].tolist(), abs=1e-5)
        assert [
            token == entry.top[0][0] for token, entry in zip(one.prompt[1:], found, strict=True)
        ] == greedy[0, 1:].tolist()
        assert events[-1].finish == "length" and tokens(events) == filled(served, one)
    one = request(5, 8, max_tokens=6, order="left_to_right", logprobs=0)
    said = engine.generate([one])[0]
    row = torch.tensor([[*one.prompt, *tokens(said)]])
    logprobs, _ = left_to_right(denoiser_of(served), row, torch.arange(11)[None] >= 5)
    assert [event.logprobs.logprob for event in said if event.logprobs] == pytest.approx(
        logprobs[0, 5:].tolist(), abs=1e-5
    )


def test_all_continuations_together_have_probability_one(served: Served, engine: Engine) -> None:
    asked = [
        Request((5, 6, i), StepBudget(1), 0, prompt_logprobs=0) for i in range(served.config.model.vocab_size)
    ]  # type: ignore[union-attr]
    scores = [events[-1].prompt_logprobs for events in engine.generate(asked)]
    assert sum(float(torch.tensor(score[1].logprob).exp()) for score in scores if score) == pytest.approx(
        1, abs=1e-4
    )


# HTTP -------------------------------------------------------------------------------------------------------


def complete(client: TestClient, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    answer = client.post(path, json={"max_tokens": 5, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_request_chooses_k_order_and_seed(client: TestClient, served: Served) -> None:
    for k, order in itertools.product((1, 3, 8), ORDERS):
        body = {
            "prompt": [[5, 6, 7]],
            "seed": 4,
            "n": 2,
            "order": order,
            "temperature": 0.9,
            "top_p": 0.95,
            "ignore_eos": True,
        }
        answer = complete(client, model=f"tiny:k{k}", **body)
        assert answer["usage"]["recurrence"]["num_steps"] == k and answer["usage"]["completion_tokens"] == 10
        for choice in answer["choices"]:
            expected = filled(
                served, Request((5, 6, 7), StepBudget(k), 5, WARM, 4, choice=choice["index"], order=order)
            )
            assert choice["text"] == served.tokenizer.decode(expected) and choice["finish_reason"] == "length"
        assert complete(client, num_steps=k, **body)["choices"] == answer["choices"]
    assert complete(client, prompt=[[]], max_tokens=4, ignore_eos=True)["usage"]["completion_tokens"] == 4


def test_streams_say_the_same(client: TestClient) -> None:
    body = {
        "prompt": "in the",
        "max_tokens": 12,
        "seed": 3,
        "num_steps": 4,
        "n": 2,
        "echo": True,
        "logprobs": 1,
    }
    whole = complete(client, **body)
    raw = client.post("/v1/completions", json={**body, "stream": True}).content.decode().split("\n\n")
    parts = [json.loads(event.removeprefix("data: ")) for event in raw if event.startswith("data: {")]
    for choice in whole["choices"]:
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert (
            "".join(part["text"] for part in mine) == choice["text"]
            and mine[-1]["finish_reason"] == choice["finish_reason"]
        )
        assert [x for part in mine for x in part["logprobs"]["token_logprobs"]] == choice["logprobs"][
            "token_logprobs"
        ]
    assert len(parts) == whole["usage"]["completion_tokens"]


def test_chat_and_models(client: TestClient) -> None:
    messages = [{"role": "user", "content": "the word"}]
    chat = complete(
        client,
        "/v1/chat/completions",
        messages=messages,
        seed=1,
        order="confidence",
        logprobs=True,
        top_logprobs=2,
    )
    assert len(chat["choices"][0]["logprobs"]["content"]) == chat["usage"]["completion_tokens"]
    card = client.get("/v1/models").json()["data"][0]["recurrence"]
    assert (
        card["orders"] == ORDERS
        and card["exits"] == []
        and card["max_steps"] == 8
        and "left to right" in card["meaning"]
    )
    assert card["estimator"] == "normalised: one token a step, from left to right"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"repetition_penalty": 1.1}, "repetition_penalty"), ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"), ({"bridge": "euler"}, "bridge"),
        ({"num_steps": "auto"}, "num_steps"),
        ({"exit": {}}, "exit"), ({"schedule": [4, 2]}, "schedule"), ({"max_ms": 50}, "max_ms"),
        ({"num_steps": 9}, "num_steps"),
        ({"order": "backwards"}, "order"), ({"prompt": [[]], "echo": True}, "prompt"),
        ({"max_tokens": 127}, "max_tokens"),
        ({"stream": True, "stream_options": {"include_steps": True}}, "stream_options"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(client: TestClient, body: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/completions", json={"prompt": "in the", **body})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "repetition_penalty": 1,
        "bridge": "hard",
        "logit_bias": {"7": 3},
    }
    assert (
        client.post("/v1/completions", json={"prompt": "in the", "max_tokens": 2, **neutral}).status_code
        == 200
    )


def test_scores_at_several_k_are_refused(client: TestClient) -> None:
    answer = client.post("/v1/score", json={"prompt": "in the", "num_steps": [1, 4]})
    assert answer.status_code == 400 and "echo and logprobs" in answer.json()["error"]["message"]


def test_a_prompt_may_be_all_that_is_asked_about(client: TestClient, tokenizer: Tokenizer) -> None:
    only = complete(client, prompt="in the", echo=True, max_tokens=0)
    assert only["choices"][0]["text"] == "in the" and only["usage"]["recurrence"]["core_steps"] == 0
    for prompt in ([5], [5, 6, 7]):
        scored = complete(client, prompt=[prompt], echo=True, logprobs=1, max_tokens=0)["choices"][0]
        assert scored["text"] == tokenizer.decode(prompt) and len(
            scored["logprobs"]["token_logprobs"]
        ) == len(prompt)
        assert scored["logprobs"]["token_logprobs"][0] is None and scored["finish_reason"] == "length"


def test_biases_and_bans_hold(client: TestClient, tokenizer: Tokenizer) -> None:
    answer = complete(client, prompt="in", logit_bias={"40": 100}, num_steps=3, max_tokens=6)
    assert answer["choices"][0]["text"] == tokenizer.decode([40] * 6)


def test_a_deadline_of_the_server_ends_with_what_is_certain(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--request-seconds: K stays as it was asked for."""
    real = served.runner.run
    monkeypatch.setattr(served.runner, "run", lambda batch: (time.sleep(0.05), real(batch))[1])
    with (
        Engine(lambda: served) as engine,
        TestClient(create_app(engine, HttpSettings(request_seconds=0.2))) as client,
    ):
        answer = complete(
            client, prompt="in", order="left_to_right", num_steps=8, max_tokens=8, ignore_eos=True
        )
    assert answer["usage"]["recurrence"]["deadline_hit"] and 0 < answer["usage"]["completion_tokens"] < 8
    assert (
        answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["recurrence"]["num_steps"] == 8
    )


def test_others_have_no_order_and_no_cache_of_keys(make_served: Make) -> None:
    with Engine(make_served) as engine, TestClient(create_app(engine, HttpSettings())) as client:
        answer = client.post("/v1/completions", json={"prompt": "in", "order": "random"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "order"
        assert client.get("/v1/models").json()["data"][0]["recurrence"]["orders"] == []
    with pytest.raises(UserError, match="keeps no keys"):
        make_served("masked", "masked", EngineSettings(kv_cache="full"))
