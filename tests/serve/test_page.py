"""The page at /: it is served, it names nothing outside this server, and what it sends exists."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files

from litestar.testing import TestClient

from serve.api.app import create_app
from serve.api.schemas import ChatRequest, CompletionRequest
from serve.engine.engine import Engine, Served
from serve.settings import HttpSettings

PAGE = files("serve").joinpath("page.html").read_text()


def test_it_is_served_without_a_key_and_nothing_else_is(make_served: Callable[..., Served]) -> None:
    with TestClient(create_app(Engine(make_served), HttpSettings(api_keys=("one",)))) as client:
        answer = client.get("/")
        assert (
            answer.status_code == 200
            and answer.headers["content-type"].startswith("text/html")
            and answer.text == PAGE
        )
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert client.get("/v1/models").status_code == client.get("/metrics").status_code == 401


def test_it_calls_relative_addresses_only(make_served: Callable[..., Served]) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|\bsrc=", PAGE)
    assert re.findall(r'href="([^"]*)"', PAGE) == ["data:,"]
    called = set(re.findall(r"\"(v1/[^\"]+)\"", PAGE))
    assert called == {"v1/models", "v1/completions", "v1/score", "v1/chat/completions"}
    assert PAGE.count("fetch(") == 1, "all through ask()"
    app = create_app(Engine(make_served), HttpSettings())
    assert {f"/{path}" for path in called} <= {route.path for route in app.routes}


def test_every_field_it_sends_exists() -> None:
    sent = re.search(r"const asked = \{ (num_steps.*?)\};", PAGE, re.DOTALL)
    assert sent is not None
    names = set(re.findall(r"(\w+):", sent[1].replace("include_usage:", ""))) | set(
        re.findall(r"asked\.(\w+) =", PAGE)
    )
    assert {"exit", "order", "schedule", "logprobs", "stop"} < names
    assert names <= set(CompletionRequest.model_fields) and names - {"logprobs"} <= set(
        ChatRequest.model_fields
    )


def test_labels_name_their_fields() -> None:
    fields = set(re.findall(r'<(?:input|select|textarea) id="(\w+)"', PAGE))
    assert fields and fields == set(re.findall(r'<label for="(\w+)"', PAGE)) | {
        "k"
    }  # its label is that of the slider
    assert "prefers-color-scheme: dark" in PAGE and 'name="viewport"' in PAGE
