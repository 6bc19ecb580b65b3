"""What stock clients send beside what they mean, and what they read: neutral fields, identifiers, token ids,
offsets, templates.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import TestClient

from rdlm.cli import app, run
from rdlm.data.tokenizer import Tokenizer, train_tokenizer
from rdlm.errors import UserError
from serve.api.app import create_app
from serve.api.chat_template import ChatTemplate
from serve.engine.engine import Engine, Served
from serve.errors import ApiError
from serve.loading import build_served
from serve.settings import EngineSettings, HttpSettings

MESSAGES = [{"role": "user", "content": "the word"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NEUTRAL: list[tuple[str, dict[str, Any]]] = [
    (path, field)
    for path in (COMPLETIONS, CHAT)
    for field in (
        {"user": "u-1"}, {"metadata": {"run": "3"}}, {"store": False}, {"store": None}, {"service_tier": "auto"},
        {"prompt_cache_key": "k"}, {"safety_identifier": "s"}, {"best_of": 1}, {"skip_special_tokens": True},
        {"response_format": {"type": "text"}}, {"response_format": None}, {"use_beam_search": False}, {"bad_words": []},
        {"top_k": -1}, {"n": None}, {"stop": None}, {"logit_bias": {}}, {"logit_bias": None}, {"guided_json": None},
    )
] + [(COMPLETIONS, {"suffix": None}), (COMPLETIONS, {"suffix": ""})] + [
    (CHAT, field)
    for field in (
        {"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"parallel_tool_calls": True}, {"verbosity": "medium"},
        {"modalities": ["text"]}, {"chat_template_kwargs": {}}, {"top_logprobs": 0}, {"audio": None}, {"functions": []},
        {"function_call": "none"}, {"add_generation_prompt": True}, {"web_search_options": None},
    )
]  # fmt: skip
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"suffix": "end"}, "suffix"), (COMPLETIONS, {"best_of": 3}, "best_of"),
    (CHAT, {"store": True}, "store"),
    (CHAT, {"response_format": {"type": "grammar"}}, "response_format.type"), (CHAT, {"verbosity": "low"}, "verbosity"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools.0.function"), (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"), (CHAT, {"skip_special_tokens": False},
        "skip_special_tokens"),
    (CHAT, {"guided_json": {"type": "object"}}, "guided_json"), (CHAT, {"chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.tool_calls"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
]  # fmt: skip


@pytest.fixture(scope="module")
def client(make_served: Callable[..., Served]) -> Iterator[TestClient]:
    with (
        Engine(
            lambda: make_served(settings=EngineSettings(max_slots=4, chunk=16, prefill_rows=32))
        ) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        yield client


def ask(client: TestClient, path: str = COMPLETIONS, **fields: Any) -> Any:
    start = {"messages": MESSAGES} if path == CHAT else {"prompt": "in the"}
    return client.post(path, json={**start, "temperature": 0, "max_tokens": 3, **fields})


@pytest.mark.parametrize(("path", "field"), NEUTRAL)
def test_a_field_that_changes_nothing_is_accepted(
    path: str, field: dict[str, Any], client: TestClient
) -> None:
    plain, given = ask(client, path), ask(client, path, **field)
    assert given.status_code == 200, given.text
    assert given.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize(("path", "field", "param"), REFUSED)
def test_what_would_change_the_answer_is_refused_by_name(
    path: str, field: dict[str, Any], param: str, client: TestClient
) -> None:
    refused = ask(client, path, **field)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text


def test_replies_can_be_sent_back(client: TestClient) -> None:
    """openai's ``messages.append(reply.model_dump())``, with the fields its models have, and caches' hints."""
    dumped = {"content": "god", "refusal": None, "role": "assistant", "annotations": [], "audio": None,
        "function_call": None,
              "tool_calls": None}  # fmt: skip
    hint = {"type": "ephemeral"}
    parts = [{"type": "text", "text": "the word", "cache_control": hint}]
    long = [{"role": "user", "content": parts, "cache_control": hint}, dumped, *MESSAGES]
    short = [*MESSAGES, {"role": "assistant", "content": "god"}, *MESSAGES]
    assert (
        ask(client, CHAT, messages=long).json()["choices"]
        == ask(client, CHAT, messages=short).json()["choices"]
    )


def test_identifiers_are_logged_and_nothing_else(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rdlm.serve.access")
    ask(client, CHAT, user="u-1", metadata={"run": "3"}, safety_identifier="s")
    facts = caplog.records[-1].facts  # type: ignore[attr-defined]
    assert {k: facts.get(k) for k in ("user", "metadata", "safety_identifier")} == {
        "user": "u-1", "metadata": {"run": "3"}, "safety_identifier": "s"
    }  # fmt: skip
    assert "the word" not in json.dumps(facts)


def test_token_ids_come_as_vllm_reports_them(client: TestClient, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("in the")
    body = {"prompt": [prompt, [5]], "n": 2, "max_tokens": 4, "ignore_eos": True, "return_token_ids": True}
    choices = ask(client, **body).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [prompt, prompt, [5], [5]]
    assert all(tokenizer.decode(c["token_ids"]) == c["text"] and len(c["token_ids"]) == 4 for c in choices)
    parts = [
        json.loads(line[6:])
        for line in ask(client, **body, stream=True).text.split("\n\n")
        if line[6:7] == "{"
    ]
    for choice in choices:
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert [p["prompt_token_ids"] for p in mine] == [choice["prompt_token_ids"], None, None, None]
        assert [i for p in mine for i in p["token_ids"]] == choice["token_ids"]
    chat = ask(client, CHAT, return_token_ids=True, ignore_eos=True).json()
    rendered = tokenizer.encode("<|endoftext|><user>the word\n<assistant>")
    assert chat["prompt_token_ids"] == rendered and len(chat["choices"][0]["token_ids"]) == 3
    assert "token_ids" not in ask(client).json()["choices"][0]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
@pytest.mark.parametrize(
    "prompt", ["Grüße 😀 日本 end", "plain", "<|endoftext|>after 日", "😀<|endoftext|>日本"]
)
def test_offsets_are_places_in_the_text(
    kind: Any, prompt: str, client: TestClient, tokenizer: Tokenizer
) -> None:
    from serve.api.openai_format import TextOffsets
    from serve.engine.detokenizer import TokenNames

    if kind == "sentencepiece":
        texts = iter(["in the beginning was the word and the word was with god"] * 50)
        tokenizer = train_tokenizer("sentencepiece", texts, 290)
    names = TokenNames(tokenizer)
    ids = tokenizer.encode(prompt)
    offsets = TextOffsets(names).of_prompt(ids, prompt)
    assert offsets == sorted(offsets) and offsets[0] == 0
    for token, start in zip(ids, offsets, strict=True):
        text = names.name(token)
        if "\ufffd" not in text:  # a whole number of characters: it stands where it says
            assert prompt.startswith(text, start), (text, start)
    assert all(start < len(prompt) for start in offsets)


def test_offsets_of_an_echo_stay_in_the_text(client: TestClient) -> None:
    body = {
        "prompt": "Grüße 😀 日本 end",
        "echo": True,
        "logprobs": 0,
        "max_tokens": 9,
        "ignore_eos": True,
        "temperature": 1,
        "seed": 4,
    }
    choice = ask(client, **body).json()["choices"][0]
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and max(offsets) <= len(choice["text"])
    streamed = [
        json.loads(line[6:])
        for line in ask(client, **body, stream=True).text.split("\n\n")
        if line[6:7] == "{"
    ]
    assert [x for part in streamed for x in part["choices"][0]["logprobs"]["text_offset"]] == offsets
    stop = choice["text"][-4:-2]
    cut = ask(client, **body, stop=stop).json()["choices"][0]
    assert max(cut["logprobs"]["text_offset"]) <= len(cut["text"])


def test_tokenizer_routes_know_their_model(client: TestClient) -> None:
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
        assert client.post(path, json={**body, "model": "tiny:k3"}).status_code == 200
        assert client.post(path, json={**body, "model": "other"}).status_code == 404


def test_head_is_get_without_a_body(client: TestClient) -> None:
    for path in ("/health", "/ready", "/v1/models", "/metrics", "/"):
        head, get = client.head(path), client.get(path)
        assert head.status_code == get.status_code == 200 and head.content == b"", path
        assert head.headers["content-type"] == get.headers["content-type"]
    assert client.head("/v1/completions").status_code == 405


def test_metrics_name_their_charset_once(client: TestClient) -> None:
    assert client.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_headers_of_the_openai_sdk_pass_a_preflight(make_served: Callable[..., Served]) -> None:
    asked = (
        "authorization, content-type, x-stainless-arch, x-stainless-retry-count, x-stainless-helper-method"
    )
    with TestClient(
        create_app(Engine(make_served), HttpSettings(cors_origins=("https://a.example",)))
    ) as client:
        headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
        answer = client.options(COMPLETIONS, headers={**headers, "access-control-request-headers": asked})
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert answer.status_code == 204 and all(name.strip() in allowed for name in asked.split(","))


def test_openais_responses_are_chat_in_another_form(client: TestClient) -> None:
    import openai

    sdk = openai.OpenAI(
        base_url="http://testserver.local/v1", api_key="unused", http_client=client, max_retries=0
    )  # type: ignore[arg-type]
    chat = ask(
        client, CHAT, messages=[{"role": "system", "content": "be brief"}, *MESSAGES], num_steps=3
    ).json()
    asked: dict[str, Any] = {"model": "tiny", "instructions": "be brief", "temperature": 0, "max_output_tokens": 3,
        "store": False,
                             "extra_body": {"num_steps": 3}}  # fmt: skip
    whole = sdk.responses.create(input="the word", **asked)
    assert whole.output_text == chat["choices"][0]["message"]["content"]
    assert (whole.status, whole.incomplete_details and whole.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert whole.usage is not None and whole.usage.total_tokens == chat["usage"]["total_tokens"]
    assert whole.usage.model_extra is not None and whole.usage.model_extra["recurrence"]["num_steps"] == 3
    events = list(sdk.responses.create(input=MESSAGES, stream=True, **asked))  # type: ignore[arg-type]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    assert events[-1].response.output_text == whole.output_text
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    ends = {"max_output_tokens": 50, "extra_body": {"logit_bias": {"0": 100}}}  # the end of text at once
    with sdk.responses.stream(input="the word", **{**asked, **ends}) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().status == "completed" and kinds[-1] == "response.completed"
    again = sdk.responses.create(input=[*MESSAGES, *whole.model_dump()["output"], *MESSAGES], **asked)  # type: ignore[list-item]
    texts = [*MESSAGES, {"role": "assistant", "content": whole.output_text}, *MESSAGES]
    longer = ask(
        client, CHAT, messages=[{"role": "system", "content": "be brief"}, *texts], num_steps=3
    ).json()
    assert again.output_text == longer["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"store": True}, "store"),
        ({"tools": [{}]}, "tools.0"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"), ({"max_tokens": 3}, "max_tokens"), ({"n": 2}, "n"),
        ({"input": []}, "input"), ({"input": [{"type": "function_call_output"}]}, "input"), ({"input": [3]}, "input"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"), ({"background": True}, "background"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.content"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 4000}, "max_output_tokens"), ({"input": [{"type": "reasoning"}]}, "input"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)  # fmt: skip
def test_what_responses_cannot_do_is_refused_by_name(
    field: dict[str, Any], param: str, client: TestClient
) -> None:
    refused = client.post("/v1/responses", json={"input": "x", **field})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text


def test_errors_within_a_stream_of_responses_are_events(client: TestClient) -> None:
    body = {"input": "x", "stream": True, "max_ms": 1, "max_output_tokens": 9}
    answer = client.post("/v1/responses", json=body)
    events = [json.loads(part.split("data: ")[1]) for part in answer.text.split("\n\n") if "data: " in part]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] in ("error", "response.incomplete")


def templated(tokenizer: Tokenizer, source: str | None) -> Tokenizer:
    import copy

    changed = copy.copy(tokenizer)
    changed.chat_template = source
    return changed


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "a<b> ü"}]'),
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "a<b> ü"),
        ("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}", "user"),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
        ("{{ bos_token }}{{ shout }}{% if add_generation_prompt %}!{% endif %}", "<|endoftext|>yes!"),
        ("{% if tools %}tools{% endif %}{% set ns = namespace(a=1) %}{{ ns.a }}", "1"),
    ],
)
def test_templates_run_in_the_environment_of_transformers(
    source: str, expected: str, tokenizer: Tokenizer
) -> None:
    template = ChatTemplate(templated(tokenizer, source))
    assert template.render([{"role": "user", "content": "a<b> ü"}], {"shout": "yes"}) == expected


def test_a_request_sets_no_global_of_the_template(tokenizer: Tokenizer) -> None:
    """``strftime_now`` is the operator's, whatever ``chat_template_kwargs`` says."""
    template = ChatTemplate(templated(tokenizer, "{{ strftime_now('%Y') }}{{ bos_token }}"))
    for name in ("strftime_now", "raise_exception", "range", "namespace", "dict", "bos_token", "eos_token",
                 "messages", "tools", "add_generation_prompt", "documents", "self"):  # fmt: skip
        with pytest.raises(ApiError, match=name):
            template.render([], {name: "x"})


def test_a_template_has_bounds_of_time_and_size(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.api import chat_template

    body = "{% for a in range(n) %}{% for b in range(n) %}{{ a }}{% endfor %}{% endfor %}"
    template = ChatTemplate(templated(tokenizer, body))
    assert template.render([], {"n": 2}) == "0011"
    monkeypatch.setattr(chat_template, "MAX_PROMPT", 1000)
    with pytest.raises(ApiError, match="more than"):
        template.render([], {"n": 90_000})
    monkeypatch.undo()
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.1)
    silent = ChatTemplate(templated(tokenizer, body.replace("{{ a }}", "{% set c = m.x %}")))
    with pytest.raises(ApiError, match="more than"):
        silent.render([], {"n": 90_000, "m": {"x": 1}})


def test_a_template_that_takes_long_does_not_keep_the_event_loop(
    make_served: Callable[..., Served], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.api import chat_template, routes

    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(routes, "QUICK_SECONDS", 0.01)
    slow = "{% for a in range(90000) %}{% for b in range(90000) %}{% set c = messages.x %}{% endfor %}{% endfor %}"
    source = "{{ messages[0].content }}{% if messages[0].content == 'slow' %}" + slow + "{% endif %}"
    made, threads, render = make_served(), [], ChatTemplate.render
    settings = EngineSettings(max_slots=4, chunk=16, prefill_rows=32)

    def spy(*args: Any, **kwargs: Any) -> str:
        threads.append(threading.current_thread().name)
        return render(*args, **kwargs)

    monkeypatch.setattr(ChatTemplate, "render", spy)

    def load() -> Served:
        changed = templated(tokenizer, source)
        return build_served(made.runner.denoiser, made.config, changed, settings)  # type: ignore[attr-defined]

    with Engine(load) as engine, TestClient(create_app(engine, HttpSettings())) as client:
        for text, status, most in (("quick", 200, 1), ("slow", 400, 2)):
            threads.clear()
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == status and len(threads) == most, (answer.text, threads)
            assert threads[-1].startswith("asyncio_") == (text == "slow"), threads


def test_templates_are_compiled_at_load_and_cannot_leave_their_sandbox(tokenizer: Tokenizer) -> None:
    assert ChatTemplate.of(templated(tokenizer, None)) is None
    with pytest.raises(UserError, match=r"chat_template.*line 2"):
        ChatTemplate.of(templated(tokenizer, "x\n{% for %}"))
    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
    ):
        with pytest.raises(ApiError, match="the chat template refuses them"):
            ChatTemplate(templated(tokenizer, source)).render([], {})


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "user", "content": None}, "input.content"), ({"role": 5, "content": "x"}, "input.role"),
        ({"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}, "input.function.arguments"),
        ({"type": "function_call", "call_id": 5, "name": "f", "arguments": "{}"}, "input"),
    ],
)  # fmt: skip
def test_a_wrong_item_of_a_response_is_named_as_it_was_sent(
    item: dict[str, Any], param: str, client: TestClient
) -> None:
    refused = client.post("/v1/responses", json={"input": [item]})
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == param and "messages" not in error["message"], (
        error
    )
    assert error["message"].startswith("input")


def test_a_model_may_be_named_as_on_the_hub(make_served: Callable[..., Served]) -> None:
    with (
        Engine(make_served) as engine,
        TestClient(create_app(engine, HttpSettings(model_name="org/name"))) as client,
    ):
        for name in ("org/name", "org/name:k3"):
            for path in (name, name.replace("/", "%2F")):
                assert client.get(f"/v1/models/{path}").json()["id"] == name
            assert ask(client, model=name).status_code == 200
        assert client.get("/v1/models/org/other").json()["error"]["code"] == "model_not_found"


def test_criteria_of_the_schema_are_those_of_the_engine(client: TestClient) -> None:
    from rdlm.exit_criteria import CRITERIA

    document = client.get("/schema/openapi.json").json()
    properties = document["components"]["schemas"]["ExitBody"]["properties"]
    assert properties["criterion"]["enum"] == [*CRITERIA, "none"]
    listed = client.get("/v1/models").json()["data"][0]["recurrence"]["exit_criteria"]
    assert {name: entry["default_threshold"] for name, entry in listed.items()} == {
        name: criterion.default_threshold for name, criterion in CRITERIA.items() if criterion.reads != "gate"
    }
    unknown = ask(client, exit={"criterion": "kll"})
    assert unknown.status_code == 400 and "latent-diff" in unknown.json()["error"]["message"]


def test_old_names_of_options_work_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[EngineSettings] = []
    monkeypatch.setattr(
        "serve.process.run_server", lambda checkpoint, engine, http, port_file: found.append(engine)
    )
    for names in (("--num-steps", "--max-num-steps"), ("--default-steps", "--max-steps")):
        given = ["serve", "--checkpoint", str(tmp_path), names[0], "3", names[1], "7"]
        assert run(app, given, "rdlm") == 0
        said = capsys.readouterr().err.splitlines()
        assert len(said) == (2 if "--max-steps" in names else 0)
    assert found[0] == found[1] and found[0].default_steps == 3 and found[0].max_steps == 7


def test_the_documented_snippet_runs_in_process(
    make_served: Callable[..., Served], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    from rdlm.checkpoints.folder import save

    served = make_served()
    save(tmp_path / "model", served.runner.denoiser, served.config, served.tokenizer)  # type: ignore[attr-defined]
    document = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    snippet = re.findall(r"```python\n(.*?)```", document, re.DOTALL)[-1]
    exec(snippet.replace("runs/demo/model", str(tmp_path / "model")), {})
    assert capsys.readouterr().out.strip()
