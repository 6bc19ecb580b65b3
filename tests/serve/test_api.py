"""Fields and options that stock clients and operators expect: scored prompts, several ends of text, origins,
key files, limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import TestClient
from typer.testing import CliRunner

from rdlm.checkpoints.folder import save
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError
from serve.api.app import create_app
from serve.api.observability import traced
from serve.cli import _keys_of
from serve.cli import app as cli
from serve.engine.engine import Engine, Served
from serve.engine.sequence import Request, StepBudget
from serve.loading import load_served
from serve.settings import EngineSettings, HttpSettings

SMALL = EngineSettings(max_slots=4, chunk=16, prefill_rows=32)


@pytest.fixture(scope="module")
def client(make_served: Callable[..., Served]) -> Iterator[TestClient]:
    with (
        Engine(lambda: make_served(settings=SMALL)) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        yield client


def complete(client: TestClient, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    answer = client.post(path, json={"temperature": 0, "max_tokens": 3, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_prompt_logprobs_are_those_of_echo(client: TestClient, tokenizer: Tokenizer) -> None:
    prompt = [5, 9, 40, 41, 42, 77]
    scored = complete(client, prompt=[prompt], prompt_logprobs=2, num_steps=3)["choices"][0]
    echoed = complete(client, prompt=[prompt], echo=True, logprobs=2, num_steps=3)["choices"][0]["logprobs"]
    entries = scored["prompt_logprobs"]
    assert entries[0] is None and len(entries) == len(prompt) and scored["logprobs"] is None
    for token, entry, value in zip(prompt[1:], entries[1:], echoed["token_logprobs"][1:], strict=False):
        assert entry[str(token)]["logprob"] == pytest.approx(value, abs=1e-5) and len(entry) in (2, 3)
        ranks = {found["rank"]: found["logprob"] for found in entry.values()}
        assert ranks[1] > ranks[2] >= ranks.get(None, -1e9)
    assert "prompt_logprobs" not in complete(client, prompt=[prompt])["choices"][0]
    only = complete(client, prompt=[prompt], prompt_logprobs=0, max_tokens=0, num_steps=3)["choices"][0]
    assert only["text"] == "" and [list(entry) for entry in only["prompt_logprobs"][1:]] == [
        [str(i)] for i in prompt[1:]
    ]
    assert complete(client, prompt=[[5]], prompt_logprobs=1)["choices"][0]["prompt_logprobs"] == [None]
    messages = [{"role": "user", "content": "the word"}]
    chat = complete(client, "/v1/chat/completions", messages=messages, prompt_logprobs=1, n=2)
    assert all(len(c["prompt_logprobs"]) == chat["usage"]["prompt_tokens"] for c in chat["choices"])


def test_exits_may_spare_a_prompt_that_is_scored(client: TestClient) -> None:
    rule = {"threshold": 1e9, "prefill": False}
    body = {"prompt": [[5, 9, 40]], "echo": True, "logprobs": 0, "num_steps": 8}
    left, fixed = (complete(client, **body, **extra)["choices"][0] for extra in ({"exit": rule}, {}))
    assert left["logprobs"]["token_logprobs"][:3] == pytest.approx(
        fixed["logprobs"]["token_logprobs"][:3], abs=1e-5, nan_ok=True
    )
    assert left["recurrence"]["steps"] == [8, 1, 1]


def test_k_can_come_in_a_header(client: TestClient) -> None:
    """For clients whose bodies are fixed: lm-eval's log-likelihoods take ``header={"X-Num-Steps": ...}``."""

    def post(value: str, path: str = "/v1/completions", **body: Any) -> Any:
        return client.post(
            path, json={"prompt": [[5, 6]], "max_tokens": 1, **body}, headers={"x-num-steps": value}
        )

    assert post("7").json()["usage"]["recurrence"]["num_steps"] == 7
    assert post("7", num_steps=7, model="tiny:k7").json()["usage"]["recurrence"]["num_steps"] == 7
    chat = client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "x"}]},
        headers={"X-Num-Steps": "3"},
    )
    assert chat.json()["usage"]["recurrence"]["num_steps"] == 3
    for value, body in (
        ("9", {}),
        ("0", {}),
        ("many", {}),
        ("7", {"num_steps": 2}),
        ("7", {"model": "tiny:k2"}),
    ):
        refused = post(value, **body)
        assert refused.status_code == 400, value
        assert "x-num-steps" in refused.json()["error"]["message"].lower(), refused.text


def test_what_cannot_be_taken_is_refused_before_its_body_is_read(make_served: Callable[..., Served]) -> None:
    async def post(app: Any, path: str) -> list[dict[str, Any]]:
        async def receive() -> Any:
            raise AssertionError("the body was read")

        async def send(message: Any) -> None:
            sent.append(message)

        sent: list[dict[str, Any]] = []
        headers = [(b"content-type", b"application/json"), (b"content-length", b"16000000")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
        }
        await app(
            {
                **scope,
                "headers": headers,
                "scheme": "http",
                "server": ("x", 80),
                "client": None,
                "http_version": "1.1",
            },
            receive,
            send,
        )
        return sent

    engine = Engine(lambda: make_served(settings=EngineSettings(max_slots=1)), max_queue=0)
    app = create_app(engine, HttpSettings())
    paths = ("/v1/completions", "/v1/chat/completions", "/v1/score")
    assert [asyncio.run(post(app, path))[0]["status"] for path in paths] == [503] * 3, "still loading"
    with engine:
        held = engine.submit([Request((5,), StepBudget(8), 100)], lambda event: None)
        answers = [asyncio.run(post(app, path))[0] for path in paths]
        engine.abort(held)
    assert [answer["status"] for answer in answers] == [429] * 3
    assert all(b"retry-after" in dict(answer["headers"]) for answer in answers)


def test_a_thinking_model_has_no_noise_levels_to_sample_through(client: TestClient) -> None:
    body = {"prompt": [5, 9, 40], "max_tokens": 2}
    for field, value in (("sampler", "euler"), ("bridge", "euler"), ("bridge", "stone"), ("sampler", "heun")):
        answer = client.post("/v1/completions", json={**body, field: value})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field
    for fields in ({"bridge": "hard"}, {"sampler": "renoise"}, {"sampler": "renoise", "bridge": "hard"}):
        assert client.post("/v1/completions", json={**body, **fields}).status_code == 200
    both = client.post("/v1/completions", json={**body, "sampler": "renoise", "bridge": "multistep"})
    assert both.status_code == 400 and "older name" in both.json()["error"]["message"]


def test_samplers_of_noise_levels_have_an_older_name(make_served: Callable[..., Served]) -> None:
    with (
        Engine(lambda: make_served("evidence")) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        listed = client.get("/v1/models").json()["data"][0]["recurrence"]["samplers"]
        assert listed == ["renoise", "euler", "dpmpp_2m"]
        body = {
            "prompt": [[5, 9, 40]],
            "max_tokens": 6,
            "num_steps": 4,
            "seed": 3,
            "temperature": 1,
            "ignore_eos": True,
        }
        texts = {}
        for sampler, bridge in zip(listed, ("hard", "euler", "multistep"), strict=True):
            new, old = (
                complete(client, **body, **fields)["choices"]
                for fields in ({"sampler": sampler}, {"bridge": bridge})
            )
            assert new == old
            texts[sampler] = new[0]["text"]
        assert len(set(texts.values())) > 1


def test_timings_add_up(client: TestClient) -> None:
    times = complete(client, prompt="x", max_tokens=9)["timings"]
    assert 0 <= times["queue_ms"] < times["first_token_ms"] < times["total_ms"]


def test_greedy_answers_need_no_seed(make_served: Callable[..., Served]) -> None:
    """Even of a model whose recurrent state starts from noise."""
    with Engine(lambda: make_served(settings=SMALL, state_init="normal")) as engine:
        with TestClient(create_app(engine, HttpSettings())) as client:
            body = {
                "prompt": [[5, 6, 7]],
                "num_steps": 1,
                "max_tokens": 12,
                "ignore_eos": True,
                "logprobs": 0,
            }
            first, again, other = (
                complete(client, **body, **seed)["choices"] for seed in ({}, {}, {"seed": 1})
            )
            assert first == again != other


def test_several_ids_end_a_text(
    make_served: Callable[..., Served], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    served, folder = make_served(), tmp_path / "tiny"
    save(folder, served.runner.denoiser, served.config, tokenizer)  # type: ignore[attr-defined]
    assert load_served(folder, SMALL).end_ids == {tokenizer.eos_id}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [77, 78], "temperature": 0.7}))
    with (
        Engine(lambda: load_served(folder, SMALL)) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        for end in (77, 78, tokenizer.eos_id):
            force = {"prompt": [[5]], "max_tokens": 4, "logit_bias": {str(end): 100}}
            stopped = complete(client, **force)
            assert (stopped["choices"][0]["finish_reason"], stopped["choices"][0]["text"]) == ("stop", "")
            assert complete(client, **force, ignore_eos=True)["usage"]["completion_tokens"] == 4
    for wrong in ({"eos_token_id": 10**6}, {"eos_token_id": "x"}, []):
        (folder / "generation_config.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="generation_config"):
            load_served(folder, SMALL)


def test_a_model_brings_its_sampling_defaults(
    make_served: Callable[..., Served], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As in vLLM: what a request names counts, then generation_config.json, then the model as it is."""
    served, folder = make_served(), tmp_path / "tiny"
    save(folder, served.runner.denoiser, served.config, tokenizer)  # type: ignore[attr-defined]
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.0, "top_k": 7, "top_p": None}))
    sampled, texts = {"prompt": [[5, 6, 7]], "max_tokens": 12, "ignore_eos": True, "seed": 3}, {}
    for source in ("auto", "none"):
        settings = SMALL.model_copy(update={"generation_config": source})
        with (
            Engine(lambda settings=settings: load_served(folder, settings)) as engine,
            TestClient(create_app(engine, HttpSettings())) as client,
        ):
            card = client.get("/v1/models").json()["data"][0]
            assert card["sampling_defaults"] == ({"temperature": 0, "top_k": 7} if source == "auto" else {})
            for name, more in (
                ("default", {"temperature": None}),
                ("greedy", {"temperature": 0}),
                ("one", {"temperature": 1, "top_k": 0}),
            ):
                texts[source, name] = complete(client, **sampled, **more)["choices"][0]["text"]
    assert texts["auto", "default"] == texts["auto", "greedy"] == texts["none", "greedy"]
    assert texts["none", "default"] == texts["none", "one"] == texts["auto", "one"] != texts["none", "greedy"]
    for wrong in ({"temperature": -1}, {"top_p": "0.9"}, {"top_k": 1.5}, {"min_p": True}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=next(iter(wrong))):
            load_served(folder, SMALL)


def test_origins_are_allowed_one_by_one(make_served: Callable[..., Served]) -> None:
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    keyed = HttpSettings(api_keys=("one",), cors_origins=("https://a.example",))
    with TestClient(create_app(Engine(make_served), keyed)) as client:
        asked = client.options("/v1/completions", headers={"origin": "https://a.example", **preflight})
        assert (
            asked.status_code in (200, 204)
            and asked.headers["access-control-allow-origin"] == "https://a.example"
        )
        refused = client.post("/v1/completions", json={}, headers={"origin": "https://a.example"})
        assert (
            refused.status_code == 401
            and refused.headers["access-control-allow-origin"] == "https://a.example"
        )
        other = client.get("/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
    with TestClient(create_app(Engine(make_served), HttpSettings())) as client:
        assert (
            "access-control-allow-origin"
            not in client.get("/health", headers={"origin": "https://a.example"}).headers
        )


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# team a\none\n\n two  # b\n")
    assert _keys_of(path) == ["one", "two"] and _keys_of(None) == []
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert _keys_of(path) == ["one", "two"], "a byte order mark would be part of a key that nobody can send"
    path.write_text("# nothing\n")
    for wrong in (path, tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="--api-key-file"):
            _keys_of(wrong)
    with pytest.raises(ValueError, match="at least 1 character"):
        HttpSettings(api_keys=("",))  # it would let everybody in


def test_keys_come_from_options_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[HttpSettings] = []
    monkeypatch.setattr(
        "serve.process.run_server", lambda checkpoint, engine, http, port_file: found.append(http)
    )
    (tmp_path / "keys").write_text("three\n")
    command = ["--checkpoint", str(tmp_path), "--api-key-file", str(tmp_path / "keys")]
    for options, environment in (
        ([], {"RDLM_API_KEYS": "one two"}),
        (["--api-key", "one", "--api-key", "two"], {}),
    ):
        ended = CliRunner().invoke(cli, [*command, *options], env=environment)
        assert ended.exit_code == 0, ended.output
    assert [http.api_keys for http in found] == [("one", "two", "three")] * 2


def test_text_without_special_tokens_is_scored_as_its_ids(client: TestClient, tokenizer: Tokenizer) -> None:
    scored = {"max_tokens": 0, "echo": True, "logprobs": 1, "num_steps": 2}
    ids = tokenizer.encode("in the beginning")
    for text, same in (({"add_special_tokens": False}, ids), ({}, [tokenizer.bos_id, *ids])):
        by_text, by_ids = (
            complete(client, **scored, **prompt)
            for prompt in ({"prompt": "in the beginning", **text}, {"prompt": [same]})
        )
        assert by_text["choices"][0]["logprobs"] == by_ids["choices"][0]["logprobs"]
        assert by_text["usage"] == by_ids["usage"]


def test_a_request_is_a_span(make_served: Callable[..., Served]) -> None:
    memory = pytest.importorskip(
        "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="extra otel is not installed"
    )
    pytest.importorskip("opentelemetry.instrumentation.asgi", reason="extra otel is not installed")
    exporter = memory.InMemorySpanExporter()
    app = create_app(Engine(make_served), HttpSettings())
    app.asgi_handler = traced(app.asgi_handler, exporter)
    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    with TestClient(app) as client:
        client.get("/health")
        client.post("/v1/completions", json={"prompt": "x"}, headers={"traceparent": parent})
    (span,) = exporter.get_finished_spans()
    assert span.attributes["http.status_code"] == 503 and f"{span.context.trace_id:032x}" == "ab" * 16


def test_tracing_without_its_packages_is_one_clear_line(
    make_served: Callable[..., Served], monkeypatch: Any
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UserError, match="extra otel"):
        create_app(Engine(make_served), HttpSettings(tracing=True))


def test_a_model_whose_layers_run_once_takes_no_other_k(make_served: Callable[..., Served]) -> None:
    """Whatever its ``recurrence`` says: more passes through the same layers would be another, untrained
    network."""
    with (
        Engine(lambda: make_served("next_token", "llama")) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        card = client.get("/v1/models").json()["data"]
        assert engine.served.config.recurrence.max_steps == 8
        assert [entry["id"] for entry in card] == ["tiny", "tiny:k1"] and card[0]["recurrence"][
            "max_steps"
        ] == 1
        assert complete(client, prompt="in the")["usage"]["recurrence"]["num_steps"] == 1
        refused = client.post("/v1/completions", json={"prompt": "in the", "num_steps": 2})
        assert refused.status_code == 400 and "takes 1 to 1" in refused.json()["error"]["message"]
