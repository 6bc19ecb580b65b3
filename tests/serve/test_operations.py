"""What an operator sees: metrics, request ids, log lines."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from litestar.testing import TestClient
from prometheus_client.parser import text_string_to_metric_families

from rdlm import __version__
from serve.api.app import create_app
from serve.api.observability import JsonLines, configure
from serve.engine.engine import Engine, Served
from serve.settings import EngineSettings, HttpSettings


@pytest.fixture
def client(make_served: Callable[..., Served]) -> Iterator[TestClient]:
    with Engine(
        lambda: make_served(settings=EngineSettings(max_slots=4, chunk=16, prefill_rows=32))
    ) as engine:
        with TestClient(create_app(engine, HttpSettings()), raise_server_exceptions=False) as client:
            yield client


def scrape(client: TestClient) -> dict[str, float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[sample.name + "".join(f"[{value}]" for value in sample.labels.values())] = sample.value
    return found


def test_metrics_count_what_was_done(client: TestClient) -> None:
    before = scrape(client)
    assert (
        before["rdlm_tokens_total"] == before["rdlm_core_steps_total"] == 0 and before["rdlm_kv_slots"] == 4
    )
    body: dict[str, Any] = {"prompt": [[5, 6, 7]], "max_tokens": 5, "ignore_eos": True}
    for k in (1, 4):
        assert client.post("/v1/completions", json={**body, "num_steps": k}).status_code == 200
    assert client.post("/v1/completions", json={**body, "num_steps": 99}).status_code == 400
    assert client.get("/nowhere").status_code == 404
    after = scrape(client)
    assert after["rdlm_tokens_total"] == 10 and after["rdlm_prompt_tokens_total"] == 6
    assert (
        after["rdlm_core_steps_total"] == after["rdlm_rows_per_core_step_count"] == 5 * 1 + 5 * 4
    )  # one after the other
    assert after["rdlm_rows_per_core_step_sum"] == (3 + 4) * 1 + (3 + 4) * 4
    assert (
        after["rdlm_steps_per_token_sum"] / after["rdlm_steps_per_token_count"] == 2.5
    )  # mean K over tokens
    assert after["rdlm_steps_per_token_bucket[1.0]"] == 5 and after["rdlm_steps_per_token_bucket[4.0]"] == 10
    assert (
        after["rdlm_time_to_first_token_seconds_count"] == 2 and after["rdlm_inter_token_seconds_count"] == 8
    )
    assert after["rdlm_request_seconds_sum"] >= after["rdlm_time_to_first_token_seconds_sum"] > 0
    assert after["rdlm_sequences_total[length]"] == 2 and after["rdlm_sequences_total[abort]"] == 0
    assert after["rdlm_refusals_total[400]"] == after["rdlm_refusals_total[404]"] == 1
    assert (
        after["rdlm_queue_sequences"] == after["rdlm_running_sequences"] == after["rdlm_kv_slots_used"] == 0
    )
    assert 0 < after["rdlm_model_seconds_total"] <= after["rdlm_busy_seconds_total"]


def test_metrics_belong_to_one_application_and_ask_for_its_key(
    client: TestClient, make_served: Callable[..., Served]
) -> None:
    client.post("/v1/completions", json={"prompt": [[5]], "max_tokens": 1})
    engine = Engine(make_served)
    with TestClient(create_app(engine, HttpSettings(api_keys=("one",)))) as other:
        assert other.get("/metrics").status_code == 401
        answer = other.get("/metrics", headers={"authorization": "Bearer one"})
        assert "rdlm_tokens_total 0.0" in answer.text and "rdlm_ready 0.0" in answer.text  # not even loaded


def test_cancellations_are_counted(client: TestClient) -> None:
    from serve.engine.sequence import Request, StepBudget

    engine = client.app.state.server.engine
    seen: list[Any] = []
    engine.abort(engine.submit([Request((5, 6), StepBudget(8), 100)], seen.append))
    while not any(event.finish for event in seen):
        pass
    found = scrape(client)
    assert found["rdlm_sequences_total[abort]"] == 1 and found["rdlm_request_seconds_count"] == 0


def test_request_ids_come_back_and_are_in_the_log(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rdlm")
    formatter = JsonLines()
    lines: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(formatter.format(record)))

    handler = Keep()
    logging.getLogger("rdlm").addHandler(handler)
    try:
        body = {"prompt": [[5, 6]], "max_tokens": 2}
        given = client.post("/v1/completions", json=body, headers={"x-request-id": "abc-1"})
        made = client.get("/nowhere")
        forged = client.get("/health", headers={"x-request-id": "a b"})
        streamed = client.post(
            "/v1/completions", json={**body, "stream": True}, headers={"x-request-id": "abc-2"}
        )
    finally:
        logging.getLogger("rdlm").removeHandler(handler)
    assert given.headers["x-request-id"] == "abc-1" and streamed.headers["x-request-id"] == "abc-2"
    assert len(made.headers["x-request-id"]) == 24 and forged.headers["x-request-id"] != "a b"
    assert [line["request_id"] for line in lines] == [
        r.headers["x-request-id"] for r in (given, made, forged, streamed)
    ]
    assert [(line["path"], line["status"]) for line in lines[:2]] == [
        ("/v1/completions", 200),
        ("/nowhere", 404),
    ]
    assert lines[0]["level"] == "info" and lines[0]["seconds"] > 0 and lines[0]["method"] == "POST"
    for line in (lines[0], lines[3]):  # in one piece, and streamed
        assert (line["tokens"], line["num_steps"]) == (2, 2)
        assert re.fullmatch(r"POST /v1/completions 200 \d+ ms, 2 tokens, K = 2", line["message"])
    assert "tokens" not in lines[1] and re.fullmatch(r"GET /nowhere 404 \d+ ms", lines[1]["message"])


def test_the_text_log_has_a_line_for_each_answer_but_those_to_probes(
    client: TestClient, capsys: pytest.CaptureFixture[str]
) -> None:
    root, levels = (
        logging.getLogger(),
        {name: logging.getLogger(name).level for name in ("", "rdlm.serve.access")},
    )
    kept = root.handlers[:]
    try:
        configure("text")
        for path in ("/health", "/ping", "/ready", "/metrics", "/v1/models", "/a%0Ab"):
            client.get(path)
        logging.getLogger("rdlm.serve").info("not shown")
    finally:
        root.handlers[:] = kept
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    first, second = capsys.readouterr().err.splitlines()
    assert "GET /v1/models 200 " in first and "GET /a\\nb 404 " in second


def test_version_and_ping_are_answered_without_a_key(make_served: Callable[..., Served]) -> None:
    engine = Engine(make_served)
    with TestClient(create_app(engine, HttpSettings(api_keys=("one",)))) as client:
        assert client.get("/version").json() == {"version": __version__}
        assert client.get("/ping").json() == client.get("/health").json() == {"status": "loading"}


def test_metrics_tell_whose_cpu_time_it_was(client: TestClient) -> None:
    before = scrape(client)
    client.post("/v1/completions", json={"prompt": [[5, 6]], "max_tokens": 30})
    after = scrape(client)
    spent = {of: after[name] - before[name] for of in ("engine", "event_loop", "process")
             for name in [f"rdlm_cpu_seconds_total[{of}]"]}  # fmt: skip
    assert all(value > 0 for value in spent.values())
    assert spent["engine"] + spent["event_loop"] <= spent["process"]


def test_a_traceback_is_one_json_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord(
            "rdlm", logging.ERROR, "f", 1, "broken %s", ("x",), (type(error), error, None)
        )
    text = JsonLines().format(record)
    assert (
        "\n" not in text
        and json.loads(text)["message"] == "broken x"
        and "ValueError" in json.loads(text)["traceback"]
    )
