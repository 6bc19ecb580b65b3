"""Constrained answers and tool calls over HTTP, with the openai client: chat, completions and responses."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from litestar.testing import TestClient
from pydantic import BaseModel, ConfigDict, Field

from rdlm.data.tokenizer import Tokenizer, load_tokenizer
from serve.api import constraints, tool_formats
from serve.api.app import create_app
from serve.api.chat_template import ChatTemplate
from serve.api.tool_formats import ToolFormat, tool_format
from serve.api.tools import CallReader, ToolChoice, tool_grammar
from serve.engine.engine import Engine, Served
from serve.engine.grammar import Grammars
from serve.errors import ApiError
from serve.loading import build_served
from serve.settings import EngineSettings, HttpSettings

SPACES = {str(i): -100 for i in (198, 199, 202, 221)}
"""A random model likes spaces, which JSON may have almost anywhere."""
HERMES = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{% endfor %}"
)
LLAMA = (
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{% if tools is not none %}"
    'Respond in the format {"name": function name, "parameters": dictionary of arguments}.{% endif %}'
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if 'tool_calls' in m %}"
    """{{ '{"name": "' + m.tool_calls[0].function.name + '", ' }}{{ '"parameters": ' }}"""
    "{{ m.tool_calls[0].function.arguments | tojson }}}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('ids') }}{% endif %}"
    "{% endfor %}[TOOL_CALLS] [{{ m.tool_calls[0].function | tojson }}]{% endif %}{% endfor %}"
)
ARGS = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}"
)
IDS = ARGS.replace("[ARGS]", "[CALL_ID]{{ c.id }}[ARGS]")
CODER = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for name, value in c.function.arguments | items %}<parameter={{ name }}>\n{{ value }}\n</parameter>\n"
    "{% endfor %}</function>\n</tool_call>{% endfor %}{% endfor %}"
)
PYTHON = (
    "{% if tools %}Use the format [func_name1(params_name1=params_value1, ...), func_name2(params)]. "
    "{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls %}[{{ c.function.name }}("
    "{% for name, value in c.function.arguments | items %}{{ name }}={{ value | tojson }}{% endfor %})]"
    "{% endfor %}{% endfor %}"
)
TEMPLATES = {
    "hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "args": ARGS, "ids": IDS, "coder": CODER, "python": PYTHON,
}  # fmt: skip
MARKS = {"hermes": "<", "coder": "<", "llama": "{", "python": "["}
"""First character of a call where no special token begins it."""
ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "x"}],
    "logit_bias": SPACES,
    "max_tokens": 300,
}


class Verse(BaseModel):
    """A verse."""

    model_config = ConfigDict(extra="forbid")
    b: Literal["Gen", "Job"]
    i: int = Field(ge=1, le=150)


FLAT = {
    "type": "function",
    "name": "find",
    "description": "finds",
    "parameters": Verse.model_json_schema(),
    "strict": True,
}
TOOL = {"type": "function", "function": {k: v for k, v in FLAT.items() if k != "type"}}
OTHER = {"type": "function", "function": {"name": "rest"}}


@pytest.fixture(scope="module")
def marked(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer with the special tokens [TOOL_CALLS] and [ARGS]."""
    folder = tmp_path_factory.mktemp("marked")
    tokenizer.save(folder)
    source = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, name in ((300, "[TOOL_CALLS]"), (301, "[ARGS]"), (302, "[CALL_ID]"), (303, "<|python_tag|>")):
        source["added_tokens"].append({"id": number, "content": name, "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(source))
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=TEMPLATES)
def world(
    request: pytest.FixtureRequest,
    make_served: Callable[..., Served],
    tokenizer: Tokenizer,
    marked: Tokenizer,
) -> Iterator[tuple[str, TestClient, openai.OpenAI]]:
    with serving(
        make_served, tokenizer if request.param in MARKS else marked, TEMPLATES[request.param]
    ) as client:
        yield request.param, client, sdk_of(client)


class serving:
    """A client of a server with this template."""

    def __init__(
        self, make_served: Callable[..., Served], tokenizer: Tokenizer, template: str | None, *args: Any
    ) -> None:
        changed = copy.copy(tokenizer)
        changed.chat_template = template
        settings = EngineSettings(max_slots=4, chunk=64, prefill_rows=128)

        def load() -> Served:
            made = make_served(*args, settings=settings, max_seq_len=1024, vocab_size=304)
            return build_served(made.runner.denoiser, made.config, changed, settings)  # type: ignore[attr-defined]

        self._engine = Engine(load)

    def __enter__(self) -> TestClient:
        self._engine.__enter__()
        self._client = TestClient(create_app(self._engine, HttpSettings()))
        return self._client.__enter__()

    def __exit__(self, *args: Any) -> None:
        self._client.__exit__(*args)
        self._engine.__exit__(*args)


def sdk_of(client: TestClient) -> openai.OpenAI:
    return openai.OpenAI(
        base_url="http://testserver.local/v1", api_key="unused", http_client=client, max_retries=0
    )  # type: ignore[arg-type]


def valid(arguments: str) -> Verse:
    return Verse.model_validate_json(arguments, strict=True)


def test_a_required_call_is_one_of_the_tools_with_arguments_that_fit(world: Any) -> None:
    kind, client, sdk = world
    choice = sdk.chat.completions.create(
        **ASKED, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, seed=3
    ).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "find" and valid(call.function.arguments)
    named = {"type": "function", "function": {"name": "find"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    for forced in (named, allowed):
        choices = sdk.chat.completions.create(
            **ASKED, tools=[OTHER, TOOL], tool_choice=forced, parallel_tool_calls=False, seed=4, n=3,
            extra_body={"num_steps": 5}
        ).choices  # fmt: skip
        assert len(choices) == 3 and all(c.message.tool_calls[0].function.name == "find" for c in choices)
        assert all(valid(c.message.tool_calls[0].function.arguments) for c in choices)
    # the answer can be sent back with what the function returned
    told = {"role": "tool", "tool_call_id": call.id, "content": "in the beginning"}
    again = [*ASKED["messages"], choice.message.model_dump(), told]
    assert sdk.chat.completions.create(**{**ASKED, "messages": again, "max_tokens": 3}, tools=[TOOL]).choices


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_streamed_call_is_the_whole_one_in_parts(seed: int, world: Any) -> None:
    kind, client, sdk = world
    asked = {
        **ASKED,
        "tools": [TOOL, OTHER],
        "tool_choice": "required",
        "seed": seed,
        "max_tokens": 220,
        "logprobs": True,
    }
    whole = sdk.chat.completions.create(**asked)
    chunks = list(sdk.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    calls: dict[int, dict[str, Any]] = {}
    for part in (
        part for chunk in chunks if chunk.choices for part in chunk.choices[0].delta.tool_calls or ()
    ):
        if part.index not in calls:
            assert part.id and part.type == "function" and part.function.name, "the first part has the name"
            calls[part.index] = {"name": part.function.name, "arguments": ""}
        else:
            assert part.id is None and part.function.name is None
        calls[part.index]["arguments"] += part.function.arguments
    expected = [
        {"name": c.function.name, "arguments": c.function.arguments}
        for c in whole.choices[0].message.tool_calls or ()
    ]
    assert [*calls.values()] == expected
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends[-1] == whole.choices[0].finish_reason and set(ends[:-1]) <= {None}
    assert whole.choices[0].finish_reason == ("tool_calls" if ends[-1] != "length" else "length")
    assert (
        chunks[-1].usage.completion_tokens
        == whole.usage.completion_tokens
        == len(whole.choices[0].logprobs.content)
    )
    if kind == "hermes":  # the client's own accumulation
        with sdk.chat.completions.stream(
            **{
                **asked,
                "tools": [openai.pydantic_function_tool(Verse, name="find")],
                "parallel_tool_calls": False,
            }
        ) as stream:
            final = stream.get_final_completion() if ends[-1] != "length" else None
        assert final is None or isinstance(
            final.choices[0].message.tool_calls[0].function.parsed_arguments, Verse
        )


def test_with_auto_an_answer_is_text_or_calls(world: Any, tokenizer: Tokenizer) -> None:
    kind, client, sdk = world
    mark = MARKS.get(kind)
    first = str(
        300 if mark is None else next(i for i, b in enumerate(tokenizer.token_bytes()) if b == mark.encode())
    )
    text = sdk.chat.completions.create(
        **{**ASKED, "max_tokens": 9, "logit_bias": {first: -100}}, tools=[TOOL], seed=1
    ).choices[0]
    assert (
        text.message.tool_calls is None and text.message.content and text.finish_reason in ("length", "stop")
    )
    if mark == "<":  # of several characters: text that only begins like it is text
        reader = CallReader(tool_format(HERMES), ())  # type: ignore[arg-type]
        assert "".join(d.text for d in reader.feed("a <tool") + reader.finish()) == "a <tool"
        return
    forced = {**ASKED, "logit_bias": {**SPACES, first: 100}, "temperature": 0}
    call = sdk.chat.completions.create(**forced, tools=[TOOL], parallel_tool_calls=False).choices[0]
    assert (
        call.finish_reason in ("tool_calls", "length") and call.message.tool_calls[0].function.name == "find"
    )
    none = sdk.chat.completions.create(
        **{**forced, "max_tokens": 9}, tools=[TOOL], tool_choice="none"
    ).choices[0]
    plain = sdk.chat.completions.create(**{**forced, "max_tokens": 9}).choices[0]
    assert none.message.content == plain.message.content and none.message.tool_calls is None


def test_a_call_that_is_cut_off_is_reported_as_far_as_it_goes(world: Any) -> None:
    kind, client, sdk = world
    asked = {**ASKED, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "seed": 3}
    whole = sdk.chat.completions.create(**asked)
    total = whole.usage.completion_tokens
    for cut in (2, total // 2, total - 3):
        part = sdk.chat.completions.create(**{**asked, "max_tokens": cut}).choices[0]
        assert part.finish_reason == "length"
        calls = part.message.tool_calls or []
        assert all(
            whole.choices[0].message.tool_calls[0].function.arguments.startswith(c.function.arguments)
            for c in calls
        )


def test_responses_call_functions(world: Any) -> None:
    kind, client, sdk = world
    asked = {
        "model": "tiny",
        "input": "x",
        "max_output_tokens": 300,
        "extra_body": {"logit_bias": SPACES, "seed": 3},
    }
    tools = {
        "tools": [FLAT],
        "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "name": "find"},
    }
    whole = sdk.responses.create(**asked, **tools)
    (call,) = whole.output
    assert (whole.status, call.type, call.name, call.status) == (
        "completed",
        "function_call",
        "find",
        "completed",
    )
    assert valid(call.arguments) and whole.tools[0].name == "find"
    events = list(sdk.responses.create(**asked, **tools, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[2] == "response.output_item.added" and kinds[-3:] == [
        "response.function_call_arguments.done", "response.output_item.done", "response.completed"
    ]  # fmt: skip
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments == events[-3].arguments
    told = {"type": "function_call_output", "call_id": call.call_id, "output": "god"}
    asked["input"] = [
        {"role": "user", "content": "x"},
        *[item.model_dump(exclude_none=True) for item in whole.output],
        told,
    ]
    asked["max_output_tokens"] = 3
    assert sdk.responses.create(**asked, **tools | {"tool_choice": "auto"}).status in (
        "incomplete",
        "completed",
    )
    with sdk.responses.stream(**{**asked, "max_output_tokens": 300}, **tools) as stream:
        final = [event for event in stream][-1]
    assert final.type == "response.completed"


@pytest.fixture(scope="module")
def plain(make_served: Callable[..., Served], tokenizer: Tokenizer) -> Iterator[TestClient]:
    """A server whose template knows no tools."""
    with serving(make_served, tokenizer, tokenizer.chat_template) as client:
        yield client


def test_answers_fit_a_schema_in_every_interface(plain: TestClient) -> None:
    sdk = sdk_of(plain)
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "verse", "schema": Verse.model_json_schema(), "strict": True},
    }
    for k in (1, 4):
        whole = sdk.chat.completions.create(
            **ASKED, response_format=schema, n=2, seed=5, extra_body={"num_steps": k}
        )
        assert all(valid(c.message.content) and c.finish_reason == "stop" for c in whole.choices)
        parts = sdk.chat.completions.create(
            **ASKED, response_format=schema, seed=5, stream=True, extra_body={"num_steps": k}
        )
        assert "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content
    parsed = sdk.chat.completions.parse(**ASKED, response_format=Verse, seed=6)
    assert isinstance(parsed.choices[0].message.parsed, Verse)
    with sdk.chat.completions.stream(**ASKED, response_format=Verse, seed=6) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed
    asked: dict[str, Any] = {
        "model": "tiny",
        "max_output_tokens": 300,
        "extra_body": {"logit_bias": SPACES, "seed": 7},
    }
    response = sdk.responses.parse(input="x", text_format=Verse, **asked)
    assert isinstance(response.output_parsed, Verse) and response.text.format.type == "json_schema"
    with sdk.responses.stream(input="x", text_format=Verse, **asked) as events:
        assert events.get_final_response().output_parsed == response.output_parsed
    body = {"model": "tiny", "prompt": "in", "max_tokens": 300, "logit_bias": SPACES, "seed": 8}
    completion = sdk.completions.create(**body, extra_body={"response_format": schema})
    assert valid(completion.choices[0].text)
    loose = sdk.chat.completions.create(
        **{**ASKED, "max_tokens": 60}, response_format={"type": "json_object"}, seed=1
    )
    assert loose.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"regex": r"(ab){2}c?"}, r"(ab){2}c?"), ({"choice": ["god", "in the word"]}, "god|in the word"),
        ({"grammar": 'start: "x" A\nA: /[0-9]{3}/'}, "x[0-9]{3}"), ({"json": '{"const": [1, "é"]}'}, r'\[1,"é"\]'),
        ({"json_object": True, "regex": None}, r"(?s)\{.*"),
    ],
)  # fmt: skip
def test_structured_outputs_in_vllms_form(value: dict[str, Any], expected: str, plain: TestClient) -> None:
    import re

    body = {"prompt": "in", "max_tokens": 40, "logit_bias": SPACES, "seed": 3, "structured_outputs": value}
    answer = plain.post("/v1/completions", json=body)
    assert answer.status_code == 200 and re.fullmatch(expected, answer.json()["choices"][0]["text"]), (
        answer.text
    )


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": 3}, "response_format", "json"),
    ({"response_format": {"type": "json_object", "a": 1}}, "response_format.a", "no such field"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema",
        "missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "", "schema": {}}}},
        "response_format.json_schema.name", "letters"),
    *(
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
            "response_format.json_schema.schema", says)
        for schema, says in (
            ({"not": {}}, "keyword not"), ({"type": "array", "uniqueItems": True}, "keyword uniqueItems"),
            ({"type": "foo"}, "foo"),
            ({"$ref": "#/$defs/x"}, "/$defs/x"), ({"$ref": "http://127.0.0.1/x"}, "127.0.0.1"),
            ({"type": "string", "format": "nope"}, "nope"),
            ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
            ({"minimum": 3, "maximum": 2, "type": "integer"}, "minimum"),
            ({"allOf": [{"type": "string", "pattern": f".*{c}.*{c}"} for c in "abcdefghijklmnopqrstuvwxyz"]},
                "too complex"),
            ({"enum": ["x" * 1000] * 200}, "131072"), (3, "object"), ({"x-guidance": {"lenient": True}, "not": {}},
                "keyword not"),
        )
    ),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs",
        "contradicts"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs.grammar", "foo"),
    ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice", "texts"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
    ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex", "text"),
]  # fmt: skip
ODD_JSON = {
    '{"a": NaN}': "JSON", '{"a": 1e999}': "JSON", '{"a": "\\ud800"}': "JSON", '{"a": 1, "a": 2}': "twice",
    '{"a": ' + "[" * 9999 + "]" * 9999 + "}": "nested", "[]": "object",
}  # fmt: skip


def sent(arguments: str = "{}", **more: Any) -> dict[str, Any]:
    """A body with an earlier call."""
    call = {"function": {"name": "a", "arguments": arguments}, **more}
    return {"messages": [{"role": "assistant", "tool_calls": [call]}]}


BAD_TOOLS: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools.0", "function"), ({"tools": [{"type": "function"}]},
        "tools.0.function", "missing"),
    ({"tools": [TOOL, TOOL]}, "tools", "twice"), ({"tools": [TOOL] * 200}, "tools", "128"),
    ({"tools": 3}, "tools", "list"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "letters"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
        "tools.0.function.parameters.type", "object"),
    ({"tools": [OTHER, {"type": "function", "function": {"name": "a",
                        "parameters": {"properties": {"x": {"not": {}}}}}}]}, "tools.1.function.parameters", "not"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"), ({"tools": [TOOL], "tool_choice": "any"},
        "tool_choice", "auto"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice", "nope"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]},
        "messages.tool_calls.function.arguments", "JSON"),
    *((sent(arguments=text), "messages.tool_calls.function.arguments", says) for text, says in ODD_JSON.items()),
    (sent(type="custom"), "messages.tool_calls", "custom"), (sent(zap=1), "messages.tool_calls", "zap"),
    *(({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": name}}}, "tool_choice",
            "among") for name in (["find"], {"a": 1}, 5)),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.tool_calls", "form"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "param", "says"), BAD + BAD_TOOLS)
def test_what_cannot_be_enforced_is_refused_by_name(
    field: dict[str, Any], param: str, says: str, world: Any
) -> None:
    kind, client, _ = world
    if kind != "hermes":
        pytest.skip("the same for every form")
    refused = client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **field},
    )
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == param and says in error["message"], refused.text
    assert len(refused.content) < 1000


def test_a_model_that_knows_no_tools_says_so(
    plain: TestClient, make_served: Callable[..., Served], tokenizer: Tokenizer
) -> None:
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    for field, param in (({"tools": [TOOL]}, "tools"), ({"messages": [called]}, "messages.tool_calls")):
        refused = plain.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], **field}
        )
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
        assert refused.json()["error"]["code"] == "tools_unsupported"
    refused = plain.post("/v1/responses", json={"input": "x", "tools": [FLAT]})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"
    assert (
        plain.post(
            "/v1/chat/completions",
            json={
                "messages": [{"role": "user", "content": "x"}],
                "tools": [TOOL],
                "tool_choice": "none",
                "max_tokens": 1,
            },
        ).status_code
        == 200
    )
    with serving(make_served, tokenizer, "{{ tools }}{{ messages }}") as unknown:
        refused = unknown.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}
        )
        assert refused.status_code == 400 and "form" in refused.json()["error"]["message"]


def test_masked_models_cannot_be_constrained(
    make_served: Callable[..., Served], tokenizer: Tokenizer
) -> None:
    with serving(make_served, tokenizer, HERMES, "masked", "masked") as client:
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
        for path, body, param in (
            ("/v1/chat/completions", {**chat, "response_format": {"type": "json_object"}}, "response_format"),
            ("/v1/chat/completions", {**chat, "tools": [TOOL]}, "tools"),
            ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
            ("/v1/responses", {"input": "x", "text": {"format": {"type": "json_object"}}}, "text"),
        ):  # fmt: skip
            refused = client.post(path, json=body)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
            assert "together" in refused.json()["error"]["message"]


def test_forms_are_told_from_templates(tokenizer: Tokenizer) -> None:
    def form(source: str) -> Any:
        changed = copy.copy(tokenizer)
        changed.chat_template = source
        return ChatTemplate(changed).tool_format

    known: dict[str, ToolFormat] = {
        HERMES: tool_formats.HERMES,
        LLAMA: tool_formats.LLAMA,
        ARGS: tool_formats.MISTRAL,
    }
    known |= {IDS: tool_formats.MISTRAL_IDS, CODER: tool_formats.QWEN_CODER, PYTHON: tool_formats.PYTHON}
    for template, expected in known.items():
        assert form(template) is expected
    assert (
        form(MISTRAL).open == "[TOOL_CALLS] [" and form(MISTRAL.replace("] [", "][")).open == "[TOOL_CALLS]["
    )
    assert form("{{ messages }}<tool_call>") is None, "no tools are shown"
    assert form("{{ tools }}<tool_call><function=x>") is None and form("{{ tools }}") is None


MANY = {
    "type": "object",
    "properties": {
        "a": {"type": "string"}, "b": {"type": "boolean"}, "c": {"$ref": "#/$defs/n"}, "d": {"enum": ["x", "y z"]},
        "e": {"type": "object", "properties": {"k": {"type": "boolean"}}}, "f": {"type": "string", "maxLength": 3},
    },
    "required": ["a", "c"],
    "$defs": {"n": {"type": "integer", "minimum": 3}},
}  # fmt: skip
TEXT = 'a "b\\"\n</parameter> é, c=1)'
CODED = "<parameter=a>\n{}\n</parameter>\n{}<parameter=c>\n3\n</parameter>\n{}</function>\n</tool_call>"
FULL = CODED.format(
    "",
    "<parameter=b>\nfalse\n</parameter>\n",
    "<parameter=d>\ny z\n</parameter>\n"
    '<parameter=e>\n{"k": true}\n</parameter>\n<parameter=f>\n"abc"\n</parameter>\n',
)
QUOTED = json.dumps(TEXT, ensure_ascii=False)
SPELT: dict[str, tuple[ToolFormat, list[tuple[str, dict[str, Any]]]]] = {
    "hm <tool_call>\n<function=many>\n" + CODED.format(TEXT, "", ""): (
        tool_formats.QWEN_CODER,
        [("many", {"a": TEXT, "c": 3})],
    ),
    f"<tool_call>\n<function=many>\n{FULL}\n<tool_call>\n<function=none>\n</function>\n</tool_call>": (
        tool_formats.QWEN_CODER,
        [("many", {"a": "", "b": False, "c": 3, "d": "y z", "e": {"k": True}, "f": "abc"}), ("none", {})],
    ),
    f"[many(a={QUOTED}, b=True, c=12, e={{}}), none()]": (
        tool_formats.PYTHON,
        [("many", {"a": TEXT, "b": True, "c": 12, "e": {}}), ("none", {})],
    ),
    "[none(), maybe(x=False)]": (tool_formats.PYTHON, [("none", {}), ("maybe", {"x": False})]),
    "[maybe()]": (tool_formats.PYTHON, [("maybe", {})]),
    "[maybe(y=None)]": (tool_formats.PYTHON, [("maybe", {"y": None})]),
    '[TOOL_CALLS]maybe[CALL_ID]a1B2c3D4e[ARGS]{"x": true}': (
        tool_formats.MISTRAL_IDS,
        [("maybe", {"x": True})],
    ),
    '<|python_tag|>{"name": "maybe", "parameters": {"x": true}}': (
        tool_formats.LLAMA,
        [("maybe", {"x": True})],
    ),
    '{"name": "none", "parameters": {}}': (tool_formats.LLAMA, [("none", {})]),
}
TOOLS = constraints.tool_list(
    [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name, parameters in {
            "many": MANY, "none": {"type": "object"},
            "maybe": {"type": "object", "properties": {"x": {"type": "boolean"}, "y": {"type": "null"}}},
        }.items()
    ]
)  # fmt: skip


@pytest.mark.parametrize("text", SPELT)
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_what_the_grammar_allows_is_read_as_it_arrives(
    mode: Literal["auto", "required"], text: str, marked: Tokenizer
) -> None:
    form, calls = SPELT[text]
    text = text if mode == "auto" else text.removeprefix("hm ")
    special = marked.special_tokens
    source, lines = tool_grammar(form, TOOLS, ToolChoice(mode), True, special)
    assert set(lines.values()) == {0, 1, 2}
    grammar, ids = Grammars(marked, [marked.eos_id or 0]).compile(source, "tools"), marked.encode(text)
    with ThreadPoolExecutor(1) as pool:
        guide = grammar.start(pool)
        for i, token in enumerate(ids):
            while not guide.ready:
                time.sleep(0.001)
            assert guide.allowed is not None and guide.allowed[token], (text, marked.decode(ids[:i]))
            if guide.accept(token):
                assert i == len(ids) - 1, marked.decode(ids[i:])
    for size in (1, 3, 1000):
        reader = CallReader(form, TOOLS)
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        if text.startswith(form.tag) and form.tag:
            pieces = [form.tag, *text.removeprefix(form.tag)]
        deltas = [delta for piece in pieces for delta in reader.feed(piece)] + reader.finish()
        names = [delta.name for delta in deltas if delta.id]
        arguments = ["".join(d.text for d in deltas if d.call == i) for i in range(len(names))]
        assert [(name, json.loads(given)) for name, given in zip(names, arguments, strict=True)] == calls
        assert reader.is_whole and "".join(
            d.text for d in deltas if d.call is None
        ) == "hm " * text.startswith("hm ")
        if form.short_ids:
            assert [d.id for d in deltas if d.id] == ["a1B2c3D4e"]


@pytest.mark.parametrize("form", [tool_formats.QWEN_CODER, tool_formats.PYTHON])
@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"anyOf": []}, "anyOf"), ({"properties": []}, "properties"), ({"required": "a"}, "required"),
        ({"properties": {"a\n>b": {}}}, "name a parameter"), ({"properties": {"a": 5}}, "schema of a property"),
    ],
)  # fmt: skip
def test_what_single_parameters_cannot_be_held_to_is_refused(
    parameters: dict[str, Any], says: str, form: ToolFormat
) -> None:
    tools = constraints.tool_list([{"type": "function", "function": {"name": "a", "parameters": parameters}}])
    with pytest.raises(ApiError, match=says) as refused:
        tool_grammar(form, tools, ToolChoice("auto"), True, {})
    assert refused.value.status == 400 and refused.value.param == "tools.0.function.parameters"
