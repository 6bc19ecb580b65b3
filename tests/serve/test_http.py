"""The HTTP interface on a tiny model: answers, streams and every refusal, in OpenAI's form."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from litestar.testing import TestClient

from rdlm.data.tokenizer import Tokenizer
from rdlm.nn.kv_cache import PAGE
from rdlm.sampling_params import SamplingParams
from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.engine.sequence import Request, StepBudget
from serve.settings import EngineSettings, HttpSettings

GREEDY = {"temperature": 0, "max_tokens": 5}


@pytest.fixture(scope="module")
def client(make_served: Callable[..., Served]) -> Iterator[TestClient]:
    settings = EngineSettings(max_slots=4, chunk=16, prefill_rows=32)
    with Engine(lambda: make_served(settings=settings)) as engine:
        with TestClient(create_app(engine, HttpSettings()), raise_server_exceptions=False) as client:
            yield client


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={**GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client: TestClient, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    answer = client.post(path, json={**GREEDY, **body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert b"\r" not in answer.content
    events = answer.content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_completion_has_openai_shape_and_accounts_for_its_work(
    client: TestClient, tokenizer: Tokenizer
) -> None:
    answer = complete(client, prompt="in the beginning", num_steps=4, model="tiny")
    length = len(tokenizer.encode("in the beginning")) + 1  # and the beginning-of-text token
    assert (
        answer["object"] == "text_completion"
        and answer["id"].startswith("cmpl-")
        and answer["model"] == "tiny"
    )
    assert answer["choices"][0]["finish_reason"] == "length" and answer["choices"][0]["logprobs"] is None
    work = answer["usage"]["recurrence"]
    assert work.pop("flops") > 0  # tests/serve/test_cost.py
    assert (
        work.pop("kv_bytes") == PAGE * 4 * (32 + 2 * 32) * 4 and length + 4 <= PAGE
    )  # a page of positions: keys of 4 layers of 2 heads of 16 numbers of 4 bytes, values filled up to 32
    steps = {
        "num_steps": 4,
        "core_steps": 4 * (length + 4),
        "prefill_core_steps": 4 * length,
        "decode_core_steps": 16,
    }
    usage = {"prompt_tokens": length, "completion_tokens": 5, "total_tokens": length + 5, "recurrence": steps}
    assert answer["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}


def test_alias_chooses_k_and_default_applies(client: TestClient) -> None:
    def steps(**body: Any) -> int:
        return complete(client, prompt="and it", **body)["usage"]["recurrence"]["num_steps"]

    assert steps() == 2
    assert steps(model="tiny:k7") == 7
    assert steps(model="tiny:k7", num_steps=7) == 7
    assert complete(client, prompt="and it", model="tiny:k7")["model"] == "tiny:k7"
    by_alias, by_field = (
        complete(client, prompt="and it", **x)["choices"] for x in ({"model": "tiny:k8"}, {"num_steps": 8})
    )
    assert by_alias == by_field


def test_streamed_text_equals_text(client: TestClient) -> None:
    for prompt in ("in the", [[5, 6, 7], [8, 9]], ["days", "the word"]):
        whole = complete(client, prompt=prompt, n=2, temperature=1.0, seed=3)
        parts = stream(
            client, prompt=prompt, n=2, temperature=1.0, seed=3, stream_options={"include_usage": True}
        )
        assert parts[-1]["choices"] == [] and parts[-1]["usage"] == whole["usage"]
        texts = [""] * len(whole["choices"])
        for part in parts[:-1]:
            assert len(part["choices"]) == 1 and "usage" not in part
            texts[part["choices"][0]["index"]] += part["choices"][0]["text"]
        assert texts == [choice["text"] for choice in whole["choices"]]
        assert [choice["index"] for choice in whole["choices"]] == list(range(len(texts)))
        assert len(parts) - 1 == whole["usage"]["completion_tokens"]  # one chunk a token: clients count them


def test_seed_makes_sampling_repeatable_and_choices_differ(client: TestClient) -> None:
    body = {"prompt": "the word", "temperature": 1.5, "max_tokens": 12, "n": 3, "seed": 11}
    first, again = complete(client, **body), complete(client, **body)
    assert first["choices"] == again["choices"]
    assert len({choice["text"] for choice in first["choices"]}) == 3
    other = complete(client, **{**body, "seed": 12})
    assert other["choices"] != first["choices"]
    single = complete(client, **{**body, "n": 1})
    assert single["choices"][0]["text"] == first["choices"][0]["text"]


def test_echo_scores_the_prompt_as_lm_eval_reads_it(client: TestClient) -> None:
    """The arithmetic of lm-eval's parse_logprobs: sum(token_logprobs[ctxlen:-1]), is_greedy by equality with
    the best."""
    prompts = [[3, 9, 40, 41, 42, 77], [0, 9]]
    answer = complete(client, prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234, model="tiny:k4")
    for prompt, choice in zip(prompts, sorted(answer["choices"], key=lambda c: c["index"]), strict=True):
        logprobs = choice["logprobs"]
        assert {
            len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        } == {len(prompt) + 1}
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        for context in range(1, len(prompt)):
            values, tops = logprobs["token_logprobs"][context:-1], logprobs["top_logprobs"][context:-1]
            assert sum(values) < 0
            for value, top in zip(values, tops, strict=True):
                assert value in top.values() and max(top.values()) >= value
    alone = complete(client, prompt=prompts[0], max_tokens=1, logprobs=1, echo=True, model="tiny:k4")
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(
        answer["choices"][0]["logprobs"]["token_logprobs"], abs=1e-5
    )
    other_k = complete(client, prompt=prompts[0], max_tokens=1, logprobs=1, echo=True, model="tiny:k1")
    assert (
        other_k["choices"][0]["logprobs"]["token_logprobs"][1:-1]
        != alone["choices"][0]["logprobs"]["token_logprobs"][1:-1]
    )


def test_greedy_continuation_reads_as_greedy(client: TestClient) -> None:
    """What the model says greedily is, read back as a prompt, its own best at every place, at equal
    log-probabilities."""
    request = Request((5, 6, 7), StepBudget(1), 8, SamplingParams(temperature=0), logprobs=1)
    said = client.app.state.server.engine.generate([request])[0]
    prompt = [*request.prompt, *(event.token for event in said)]
    read = complete(client, prompt=prompt, logprobs=1, echo=True, max_tokens=0, num_steps=1)["choices"][0][
        "logprobs"
    ]
    assert len(read["tokens"]) == len(prompt)
    assert all(
        v == max(t.values())
        for v, t in zip(read["token_logprobs"][3:], read["top_logprobs"][3:], strict=True)
    )
    assert read["token_logprobs"][3:] == pytest.approx([event.logprobs.logprob for event in said], abs=1e-4)
    changed = [*prompt[:5], (prompt[5] + 1) % 256, *prompt[6:]]
    read = complete(client, prompt=changed, logprobs=1, echo=True, max_tokens=0, num_steps=1)["choices"][0][
        "logprobs"
    ]
    assert read["token_logprobs"][5] < max(read["top_logprobs"][5].values())


def test_end_of_text_still_fills_its_entry(client: TestClient, tokenizer: Tokenizer) -> None:
    """A predicted end token must not shorten the arrays, or lm-eval's ``-1`` would cut real data."""
    force = {str(tokenizer.eos_id): 100}
    answer = complete(client, prompt=[[5, 6, 7]], max_tokens=1, logprobs=1, echo=True, logit_bias=force)[
        "choices"
    ][0]
    assert answer["finish_reason"] == "stop" and len(answer["logprobs"]["token_logprobs"]) == 4
    assert answer["logprobs"]["tokens"][-1] == "<|endoftext|>" and answer["text"] == tokenizer.decode(
        [5, 6, 7]
    )
    ignored = complete(client, prompt=[[5, 6, 7]], max_tokens=4, logit_bias=force, ignore_eos=True)
    assert ignored["usage"]["completion_tokens"] == 4 and ignored["choices"][0]["finish_reason"] == "length"
    late = complete(client, prompt=[[5, 6, 7]], max_tokens=4, logit_bias=force, min_tokens=2)
    assert late["usage"]["completion_tokens"] == 3 and late["choices"][0]["finish_reason"] == "stop"


def test_stop_strings_are_cut_wherever_tokens_end(client: TestClient) -> None:
    body = {"prompt": "and it came", "temperature": 1.0, "seed": 4, "max_tokens": 30, "ignore_eos": True}
    text = complete(client, **body)["choices"][0]["text"]
    for start in range(2, len(text) - 6, 5):
        stop = text[start : start + 4]
        if "\ufffd" in stop:
            continue
        answer = complete(client, **body, stop=[stop, "never said"])["choices"][0]
        assert (answer["text"], answer["finish_reason"]) == (text[: text.index(stop)], "stop")
        parts = stream(client, **body, stop=stop)
        assert "".join(part["choices"][0]["text"] for part in parts) == answer["text"]


def test_chat_answers_through_the_template(client: TestClient, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "word"}]}
    ]
    body = {**GREEDY, "messages": messages, "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 2}
    answer = client.post("/v1/chat/completions", json=body).json()
    rendered = "<|endoftext|><user>the word\n<assistant>"
    assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode(rendered))
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant" and len(choice["logprobs"]["content"]) == 5
    assert all(
        entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in choice["logprobs"]["content"]
    )
    assert all(
        bytes(e["bytes"]).decode(errors="replace") == e["token"] or not e["bytes"]
        for e in choice["logprobs"]["content"]
    )
    same = complete(client, prompt=[tokenizer.encode(rendered)])["choices"][0]["text"]
    assert choice["message"]["content"] == same
    parts = stream(client, "/v1/chat/completions", messages=messages, n=2)
    assert "role" in parts[0]["choices"][0]["delta"] and parts[0]["choices"][0]["delta"].keys() == {
        "role",
        "content",
    }
    text = "".join(
        part["choices"][0]["delta"]["content"] for part in parts if part["choices"][0]["index"] == 0
    )
    assert text == same
    refused = client.post("/v1/chat/completions", json={"messages": [{"role": "tool", "content": "x"}]})
    assert refused.status_code == 400 and "no tools here" in refused.json()["error"]["message"]


REFUSALS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"prompt": "x", "num_steps": 9}, 400, "num_steps", "1 to 8"),
    ({"prompt": "x", "num_steps": 0}, 400, "num_steps", "at least 1"),
    ({"prompt": "x", "num_steps": "4"}, 400, "num_steps", "integer"),
    ({"prompt": "x", "model": "tiny:k99"}, 400, "model", "1 to 8"),
    ({"prompt": "x", "model": "tiny:k2", "num_steps": 3}, 400, "num_steps", "one of them"),
    ({"prompt": "x", "model": "gpt-4"}, 404, "model", "does not exist"),
    ({"prompt": "x", "best_of": 2}, 400, "best_of", "send 1"),
    ({"prompt": "x", "temperature": -1}, 400, "temperature", "greater"),
    ({"prompt": "x", "temperature": "hot"}, 400, "temperature", "number"),
    ({"prompt": "x", "top_p": 0}, 400, "top_p", "greater"),
    ({"prompt": "x", "logprobs": 99}, 400, "logprobs", "20"),
    ({"prompt": "x", "n": 0}, 400, "n", "greater"),
    ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens", "echo"),
    ({"prompt": "x", "max_tokens": 1000}, 400, "max_tokens", "128"),
    ({"prompt": [list(range(5, 250))]}, 400, "prompt", "128"),
    ({"prompt": [[5, 100000]]}, 400, "prompt", "below 300"),
    ({"prompt": []}, 400, "prompt", "empty"),
    ({"prompt": [[]]}, 400, "prompt", "no tokens"),
    ({"prompt": "x", "stop": ""}, 400, "stop", "empty"),
    ({"prompt": "x", "stop": ["a"] * 65}, 400, "stop", "64"),
    ({"prompt": "x", "stop_token_ids": [300], "min_tokens": 1}, 400, "stop_token_ids", "below 300"),
    ({"prompt": "x", "temperature": 1e-9}, 400, "temperature", "greedy"),
    ({"prompt": "x", "repetition_penalty": 1e-9}, 400, "repetition_penalty", "greater"),
    ({"prompt": "x", "logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias", "1024"),
    ({"prompt": "x", "min_tokens": 9, "max_tokens": 3}, 400, "min_tokens", "exceeds"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias", "token id"),
    ({"prompt": "x", "logit_bias": {"999999": 1}}, 400, "logit_bias", "below 300"),
    ({"prompt": "x", "stop": "a" * 513}, 400, "stop", "512"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
    (
        {"prompt": "x", "stream": True, "stream_options": {"include": True}},
        400,
        "stream_options.include",
        "did you mean include_",
    ),
    ({}, 400, "prompt", "required"),
]


@pytest.mark.parametrize(("body", "status", "param", "says"), REFUSALS)
def test_refusals_name_the_field_and_the_remedy(
    body: dict[str, Any], status: int, param: str, says: str, client: TestClient
) -> None:
    answer = client.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert says in error["message"] and error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}


def test_malformed_bodies_and_wrong_routes(client: TestClient) -> None:
    deep = b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    for content, status in (
        (b"{", 400),
        (b"[]", 400),
        (b'{"prompt": NaN}', 400),
        (b"", 400),
        (b"[" * 100_000, 400),
        (deep, 400),
    ):
        answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error", (
            content
        )
    nothing = client.get("/v1/nothing")
    assert nothing.status_code == 404 and "'/v1/nothing' here; /schema" in nothing.json()["error"]["message"]
    assert client.get("/v1/completions").json()["error"]["type"] == "invalid_request_error"
    assert client.post("/v1/chat/completions", json={"messages": []}).status_code == 400


def test_models_state_what_k_is(client: TestClient) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["tiny", "tiny:k1", "tiny:k2", "tiny:k4", "tiny:k8"]
    entry = listed[0]["recurrence"]
    assert (entry["min_steps"], entry["max_steps"], entry["default_steps"], entry["num_steps"]) == (
        1,
        8,
        2,
        2,
    )
    assert [card["recurrence"] for card in listed[1:]] == [{"num_steps": k} for k in (1, 2, 4, 8)]
    assert "iterations" in entry["meaning"] and entry["estimator"] == "logits after K iterations"
    assert client.get("/v1/models/tiny:k3").json()["recurrence"]["num_steps"] == 3
    assert client.get("/v1/models/tiny:k9").status_code == 400
    assert client.get("/v1/models/other").status_code == 404


def test_tokenizer_routes_suit_lm_eval(client: TestClient, tokenizer: Tokenizer) -> None:
    info = client.get("/tokenizer_info").json()
    tokens = client.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()[
        "tokens"
    ]
    assert tokens == [tokenizer.eos_id]
    ids = client.post("/tokenize", json={"prompt": "ærlig talt"}).json()["tokens"]
    assert ids[0] == tokenizer.bos_id
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "ærlig talt"}
    assert client.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_operations_routes_and_documentation(client: TestClient) -> None:
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    document = client.get("/schema/openapi.json").json()
    assert "num_steps" in document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert "/v1/chat/completions" in document["paths"]


def test_keys_limits_and_states(make_served: Callable[..., Served]) -> None:
    engine = Engine(lambda: (gate.wait(10), make_served())[1], max_queue=0)
    gate = threading.Event()
    app = create_app(engine, HttpSettings(api_keys=("one", "two"), max_body_bytes=2048))
    engine.start()
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/health").status_code == 200 and client.get("/ready").status_code == 503
        for headers in (
            {},
            {"authorization": "Bearer "},
            {"authorization": "Bearer on"},
            {"authorization": "one"},
        ):
            answer = client.get("/tokenizer_info", headers=headers)
            if headers.get("authorization") != "one":
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", (
                    headers
                )
        headers = {"authorization": "Bearer two"}
        loading = client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
        assert (
            loading.status_code == 503
            and loading.json()["error"]["code"] == "loading"
            and "retry-after" in loading.headers
        )
        gate.set()
        engine.wait_ready(10)
        assert client.post("/v1/completions", json={"prompt": "x"}, headers=headers).status_code == 200
        assert client.post("/v1/completions", json={"prompt": "x" * 4000}, headers=headers).status_code == 413
        never = client.post("/v1/completions", json={"prompt": ["x"] * 5}, headers=headers)
        assert never.status_code == 400 and "4 choices" in never.json()["error"]["message"]
        held = engine.submit([Request((5,), StepBudget(8), 100)] * 3, lambda event: None)
        full = client.post("/v1/completions", json={"prompt": ["x"] * 2}, headers=headers)
        engine.abort(held)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["type"] == "rate_limit_error"
        engine.refuse()
        assert client.get("/ready").status_code == 503
        assert client.post("/v1/completions", json={"prompt": "x"}, headers=headers).status_code == 503
        engine.stop()
        assert client.get("/health").status_code == 503


def test_usage_within_a_stream_says_no_work_before_it_is_known(client: TestClient) -> None:
    body = {"prompt": "x", "max_tokens": 3, "n": 2, "ignore_eos": True, "stream": True}
    options = {"stream_options": {"continuous_usage_stats": True, "include_usage": True}}
    text = client.post("/v1/completions", json=body | options).text
    usages = [json.loads(line[6:])["usage"] for line in text.splitlines() if line.startswith("data: {")]
    assert [usage["completion_tokens"] for usage in usages] == [1, 2, 3, 4, 5, 6, 6]
    assert all("recurrence" not in usage for usage in usages[:-2])
    assert usages[-2] == usages[-1] and usages[-1]["recurrence"]["core_steps"] > 0


def test_a_streamed_response_takes_the_stream_options_that_change_nothing(client: TestClient) -> None:
    body = {"input": "x", "max_output_tokens": 1, "stream": True}
    accepted = client.post("/v1/responses", json=body | {"stream_options": {"include_obfuscation": False}})
    assert accepted.status_code == 200 and "response.output_text.done" in accepted.text
    refused = client.post("/v1/responses", json=body | {"stream_options": {"include_usage": True}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "stream_options"
