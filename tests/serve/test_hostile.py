"""Whatever a client sends, the answer is a 4xx in OpenAI's form, soon, and everybody else's work goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litestar.testing import TestClient

from serve.api import request_parsing
from serve.api.app import create_app
from serve.api.json_text import decode
from serve.api.responses import ResponsesRequest
from serve.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, ScoreRequest, TokenizeRequest
from serve.engine.engine import Engine, Served
from serve.errors import ApiError
from serve.settings import EngineSettings, HttpSettings

JSON = {"content-type": "application/json"}
MESSAGES = [{"role": "user", "content": "x"}]
ROUTES: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "x", "max_tokens": 1}),
    "/v1/chat/completions": (ChatRequest, {"messages": MESSAGES, "max_tokens": 1}),
    "/v1/responses": (ResponsesRequest, {"input": "x", "max_output_tokens": 1}),
    "/v1/score": (ScoreRequest, {"prompt": "and it", "num_steps": [1]}),
    "/tokenize": (TokenizeRequest, {"prompt": "x"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}),
}
NUMBERS = [
    "0",
    "-1",
    "1",
    "2147483647",
    "2147483648",
    "-2147483649",
    "9223372036854775807",
    "9223372036854775808",
]
NUMBERS += [
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "1e400",
    "-1e308",
    "1e-320",
    "1.5",
    "NaN",
]
NUMBERS += ["Infinity", "9" * 400, "9" * 5000]
VALUES = [
    *NUMBERS,
    "true",
    "null",
    '""',
    '"x"',
    "[]",
    "{}",
    "[[]]",
    '[1e308, "a"]',
    '{"a": 1}',
    '{"5": 1e308}',
    '"auto"',
]
VALUES += [
    "[" + ",".join(NUMBERS[:12]) + "]",
    '{"' + "9" * 5000 + '": 1}',
    '{"\\u0665": 1}',
    "[" * 3000 + "]" * 3000,
]


@pytest.fixture(scope="module")
def client(make_served: Callable[..., Served]) -> Iterator[TestClient]:
    with (
        Engine(
            lambda: make_served(settings=EngineSettings(max_slots=4, chunk=16, prefill_rows=32))
        ) as engine,
        TestClient(create_app(engine, HttpSettings()), raise_server_exceptions=False) as client,
    ):
        yield client
        assert engine.error is None and engine.counters.ended["error"] == 0


def check(answer: Any, *, refused: bool = False) -> None:
    is_late = answer.status_code == 504 and answer.json()["error"]["param"] == "max_ms"  # a deadline of 1 ms
    assert (answer.status_code < 500 or is_late) and (answer.status_code >= 400 or not refused), answer.text[
        :500
    ]
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.content) < 2000, "it repeats what was sent"


@pytest.mark.parametrize("path", ROUTES)
def test_no_value_of_any_field_is_a_server_error(path: str, client: TestClient) -> None:
    """Every field of every request, each with numbers beyond 32 and 64 bits, floats without an end, wrong
    types and deep nesting.
    """
    model, body = ROUTES[path]
    for field in model.model_fields:
        for value in VALUES:
            sent = {**body, "stream": True} if field == "stream_options" else dict(body)
            sent.pop(field, None)
            text = json.dumps(sent)[:-1] + (", " if sent else "") + f'"{field}": {value}}}'
            check(client.post(path, content=text.encode(), headers=JSON))


@pytest.mark.parametrize("field", ["stream_options", "exit", "schedule"])
def test_no_value_of_a_nested_field_is_a_server_error(field: str, client: TestClient) -> None:
    names = {
        "stream_options": ["steps_every", "steps_top", "include_usage"],
        "exit": ["criterion", "threshold", "min_steps", "max_steps", "check_every", "prefill"],
        "schedule": ["prefill", "decode"],
    }
    for name in names[field]:
        for value in VALUES:
            inner = '"include_steps": true, ' if field == "stream_options" else ""
            text = (
                f'{{"prompt": "x", "max_tokens": 1, "stream": true, "{field}": {{{inner}"{name}": {value}}}}}'
            )
            check(client.post("/v1/completions", content=text.encode(), headers=JSON))


BYTES = [
    b"",
    b" ",
    b"{",
    b"[]",
    b"null",
    b"0",
    b'"x"',
    b"\xff",
    b'{"prompt": "\xff"}',
    b'{"prompt": "a\xc3"}',
    b"\xef\xbb\xbf{}",
]
BYTES += ['{"prompt": "x"}'.encode(code) for code in ("utf-16", "utf-32", "utf-16-le")]
BYTES += [
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\u0000", "prompt": 3}',
    b"[" * 100_000,
    b'{"a":' * 5000 + b"1" + b"}" * 5000,
]
BYTES += [
    b'{"prompt": "x", ' + b'"' + b"k" * 100_000 + b'": 1}',
    b'{"prompt": "x"} trailing',
    b"\x00" * 1000,
    b"\x1f\x8b\x08\x00gzip",
]


@pytest.mark.parametrize("path", ROUTES)
def test_bodies_that_are_not_the_json_they_claim_are_refused(path: str, client: TestClient) -> None:
    for content in BYTES:
        check(client.post(path, content=content, headers=JSON), refused=True)
    assert "the body is empty" in client.post(path, headers=JSON).text


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt": "x", "prompt": "y"}', '{"prompt": "x", "max_tokens": 1, "logit_bias": {"5": 1, "5": 2}}',
        '{"prompt": "x", "metadata": {"a": "1", "\\u0061": "2"}}',
        '{"prompt": "x", "exit": {"min_steps": 1, "min_steps": 1}}',
    ],
)  # fmt: skip
def test_a_key_that_is_there_twice_is_refused(body: str, client: TestClient) -> None:
    """Proxies and libraries differ in which of the two they read."""
    answer = client.post("/v1/completions", content=body.encode(), headers=JSON)
    assert answer.status_code == 400 and "twice" in answer.json()["error"]["message"], answer.text


def test_large_bodies_are_read_off_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    threads, decode = [], request_parsing.decode
    monkeypatch.setattr(
        request_parsing,
        "decode",
        lambda body: (threads.append(threading.current_thread().name), decode(body))[1],
    )
    client.post("/v1/completions", json={"prompt": [5] * 100_000})
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert threads[0].startswith("asyncio_") and not threads[1].startswith("asyncio_")


def test_a_content_type_other_than_json_is_refused(client: TestClient) -> None:
    """A page of another site may send a form or plain text here without the browser asking this server first."""
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
        "multipart/form-data; boundary=a", "",
                 "application/json; charset=utf-16", "application/jsonp", "text/json", "application/json, text/plain",
                 "\xff", "a" * 5000):  # fmt: skip
        answer = client.post(
            "/v1/completions", content=body, headers={"content-type": kind.encode("latin-1")}
        )
        check(answer, refused=True)
        assert answer.status_code == 415, kind
    assert client.post("/v1/completions", content=body).status_code == 415, "no content type"
    twice = "application/json; charset=utf-8; charset=utf-16"
    assert client.post("/v1/completions", content=body, headers={"content-type": twice}).status_code == 415
    for coding in ("gzip", "br", "identity, gzip", ""):
        answer = client.post("/v1/completions", content=body, headers={**JSON, "content-encoding": coding})
        check(answer, refused=True)
        assert answer.status_code == 415, coding
    given = {**JSON, "content-encoding": "identity"}
    assert client.post("/v1/completions", content=body, headers=given).status_code == 200
    for kind in ("application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"'):
        assert (
            client.post("/v1/completions", content=body, headers={"content-type": kind}).status_code == 200
        ), kind


def test_no_host_is_a_server_error_with_or_without_a_key(
    client: TestClient, make_served: Callable[..., Served]
) -> None:
    """Frameworks put URLs together from it, also while they handle an error."""
    hosts = ["a:99999", "a:b", "a:-1", "[", "[::1", "a b", "", ":", "\xff", "a" * 5000, "a/b?c#d", "a@b:c@d"]
    with TestClient(create_app(Engine(make_served), HttpSettings(api_keys=("one",)))) as closed:
        for host in hosts:
            headers = {"host": host.encode("latin-1"), **JSON}
            check(client.post("/v1/completions", content=b'{"prompt": 1}', headers=headers), refused=True)
            check(client.get("/nowhere", headers=headers), refused=True)
            assert client.get("/health", headers=headers).status_code in (200, 400)
            assert closed.post("/v1/completions", content=b"{}", headers=headers).status_code in (400, 401)


def test_loopback_names_are_the_only_hosts_where_hosts_are_limited(
    make_served: Callable[..., Served],
) -> None:
    """A page whose name was rebound to 127.0.0.1 sends its own name."""
    allowed = HttpSettings(allowed_hosts=("localhost", "127.0.0.1", "[::1]"))
    with TestClient(create_app(Engine(make_served), allowed)) as client:
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
            assert client.get("/health", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil", ""):
            answer = client.get("/v1/models", headers={"host": host})
            assert answer.status_code == 403 and "--allowed-host" in answer.json()["error"]["message"], host
    with TestClient(create_app(Engine(make_served), HttpSettings(allowed_hosts=("*",)))) as client:
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 200


@pytest.mark.parametrize(
    "value", ["٣", "+3", "3_0", " ", "", "3.0", "0x3", "9" * 5000, "3,4", "3,", "\xb2", "NaN", "-1", "0"]
)
def test_odd_numbers_in_the_header_are_refused(value: str, client: TestClient) -> None:
    headers = {"x-num-steps": value.encode(), **JSON}
    check(client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers), refused=True)


def test_two_headers_must_agree(client: TestClient) -> None:
    def steps(*values: str) -> Any:
        headers = [("x-num-steps", value) for value in values] + [("content-type", "application/json")]
        return client.post("/v1/completions", content=b'{"prompt": "x", "max_tokens": 1}', headers=headers)

    assert steps("3", "3").json()["usage"]["recurrence"]["num_steps"] == 3
    refused = steps("3", "4")
    assert refused.status_code == 400 and "contradict" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "key", ["9" * 5000, "\u0665", "+5", " 5", "5.0", "1e3", "0x5", "-5", "", "4294967301"]
)
def test_keys_of_logit_bias_are_plain_token_ids(key: str, client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "x", "logit_bias": {key: 1}})
    check(answer, refused=True)
    assert answer.json()["error"]["param"] == "logit_bias"


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
HUGE: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": "a" * 15_000_000}, "exceed the context"),
    ("/v1/completions", {"prompt": [5] * 3_000_000}, "values exceed"),
    ("/v1/completions", {"prompt": "x", "nothing": [[]] * 5_000_000}, "values exceed"),
    ("/v1/completions", {"prompt": [[5] * 300_000] * 10}, "exceed"),
    ("/v1/completions", {"prompt": ["a"] * 2_000_000}, "exceed"),
    ("/v1/completions", {"prompt": [[]] * 500_000}, "exceed"),
    ("/v1/completions", {"prompt": "x", "stop": ["a"] * 1_000_000}, "64"),
    ("/v1/completions", {"prompt": "x", "stop": "a" * 3_000_000}, "512"),
    ("/v1/completions", {"prompt": "x", "stop_token_ids": [-1] * 1_000_000}, "stop_token_ids"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {str(i): 1 for i in range(100_000)}}, "1024"),
    ("/v1/completions", {"prompt": "x", "model": "m" * 10_000_000}, "256"),
    ("/v1/completions", {"prompt": "x", "schedule": [0] * 1_000_000}, "4096"),
    ("/v1/completions", {"prompt": "x", **{f"field{i}": 0 for i in range(100_000)}}, "no such field"),
    ("/v1/completions", {"prompt": "x", "metadata": {str(i): "x" for i in range(300_000)}}, "16"),
    ("/v1/score", {"prompt": "x", "num_steps": [0] * 1_000_000}, "num_steps"),
    ("/v1/chat/completions", {"messages": [{}] * 200_000}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 15_000_000}]}, "exceed the context"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}] * 200_000}]}, "content"),
    ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"x": [{}] * 1_000_000}}, "4096"),
    ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"x": [[{"y": 0}] * 100] * 1000}}, "4096"),
    ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {str(i): 0 for i in range(100_000)}}, "4096"),
    ("/tokenize", {"prompt": "a" * 15_000_000}, "1048576"),
    ("/detokenize", {"tokens": [5] * 1_050_000}, "1048576"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "says"), HUGE, ids=lambda value: None if isinstance(value, dict) else str(value)
)
def test_huge_bodies_are_refused_before_they_cost_anything(
    path: str, body: dict[str, Any], says: str, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is tokenised or copied to the engine, and the errors do not list what was wrong a million
    times.
    """
    tokenizer = client.app.state.server.served.tokenizer
    monkeypatch.setattr(tokenizer, "encode", lambda text: pytest.fail(f"tokenised {len(text)} characters"))
    answer = client.post(path, content=json.dumps(body, separators=(",", ":")).encode(), headers=JSON)
    check(answer, refused=True)
    assert says in answer.json()["error"]["message"]


def test_long_texts_are_tokenised_off_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    tokenizer, threads = client.app.state.server.served.tokenizer, []
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda text: (threads.append(threading.current_thread().name), encode(text))[1]
    )
    text = "the word " * (2 * request_parsing.SMALL // 9)
    assert client.post("/tokenize", json={"prompt": text}).json()["count"] > 1000
    client.post("/v1/completions", json={"prompt": [text[:200]] * 40, "max_tokens": 1, "n": 1})
    assert threads and all(name.startswith("asyncio_") for name in threads)


def test_a_request_that_can_never_fit_is_not_told_to_try_again(make_served: Callable[..., Served]) -> None:
    with Engine(make_served, max_queue=2) as engine, TestClient(create_app(engine, HttpSettings())) as client:
        for body in ({"prompt": "x", "n": 7}, {"prompt": ["x"] * 7}, {"prompt": ["x"] * 4, "n": 2}):
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 400 and "exceed the 6 choices" in answer.json()["error"]["message"]


def test_no_id_left_to_draw_is_refused(client: TestClient) -> None:
    body = {"prompt": "x", "stop_token_ids": list(range(300)), "min_tokens": 1}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "stop_token_ids"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
        max_size=4), max_leaves=8)  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/score"])
def test_no_combination_of_fields_is_a_server_error(path: str, client: TestClient) -> None:
    """Bodies put together from fields that exist and values that mostly do not fit."""
    model, body = ROUTES[path]
    names = st.sampled_from([*model.model_fields, *model.neutral])

    @settings(
        max_examples=150,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.dictionaries(names, TREES, max_size=5))
    def send(fields: dict[str, Any]) -> None:
        sent = {**body, **fields}
        if isinstance(sent.get("max_tokens"), int):
            sent["max_tokens"] = min(sent["max_tokens"], 2)
        check(client.post(path, content=json.dumps(sent).encode(errors="surrogatepass"), headers=JSON))

    send()


def test_what_no_route_takes_is_refused_in_the_form_of_all_errors(client: TestClient) -> None:
    for method in ("GET", "PUT", "DELETE"):
        answer = client.request(method, "/v1/completions")
        check(answer, refused=True)
        assert answer.status_code == 405 and "POST" in answer.headers["allow"] and "POST" in answer.text
    for path in ("/nope", "/schema/nope", "/v1/models/nope", "/v1/models/%ff"):
        answer = client.get(path)
        check(answer, refused=True)
        assert answer.status_code == 404
    assert client.get("/schema/openapi.json").json()["info"]["title"] == "rdlm"
    assert client.get("/schema").status_code == 200
    large = client.post("/v1/completions", content=b" " * (1 << 25), headers=JSON)
    check(large, refused=True)
    assert large.status_code == 413 and "--max-body-bytes" in large.text and str(1 << 24) in large.text


def test_the_server_still_answers(client: TestClient) -> None:
    assert client.post("/v1/completions", json={"prompt": "in the", "max_tokens": 3}).status_code == 200
    assert client.get("/metrics").text.count('rdlm_refusals_total{status="500"}') == 0


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("n", "x", '"x"'),
        ("max_tokens", 2**63, str(2**63)),
        ("top_p", float("nan"), "NaN"),
        ("stream", 1.5, "1.5"),
    ],
)
def test_messages_of_ranges_and_types_name_the_value(field: str, value: object, shown: str) -> None:
    with pytest.raises(ApiError, match=rf"^{field}: .*, got {shown}$"):
        CompletionRequest.parse({"prompt": "a", field: value})


def test_numbers_that_python_does_not_write_are_refused_in_one_line() -> None:
    with pytest.raises(ApiError, match=r"^seed: [^,]*$"):
        CompletionRequest.parse({"prompt": "a", "seed": 10**5000})


def test_a_key_that_comes_again_after_very_many_is_found_in_linear_time() -> None:
    """With a search among those before it, one such body held every thread for an hour: this test would not end."""
    names = [f'"k{i}":1' for i in range(1_000_000)]
    with pytest.raises(ApiError, match="'k0' twice in one object"):
        decode("{" + ",".join([*names, names[0]]) + "}")
