"""Whatever fits the OpenAPI document, and whatever does not, is answered: never with a 5xx. Needs
schemathesis, which is no dependency of this package (pip install schemathesis)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.settings import EngineSettings, HttpSettings

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
pytestmark = pytest.mark.slow
HEALTH = list(hypothesis.HealthCheck)
EXAMPLES = 40


def check(case: Any) -> None:
    answer = case.call()
    assert answer.status_code < 500, f"{answer.status_code}: {answer.text}\n{case.as_curl_command()}"
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("model", [("onestep", "huginn"), ("masked", "masked")], ids=lambda model: model[1])
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_server_errors(mode: Any, model: tuple[str, str], make_served: Callable[..., Served]) -> None:
    """Operation by operation: bodies and parameters as documented, then such as are not."""
    settings = EngineSettings(max_slots=8, chunk=16, prefill_rows=32, max_len=40)
    asked: list[str] = []
    with Engine(lambda: make_served(*model, settings=settings), max_queue=2048) as engine:
        document = schemathesis.openapi.from_asgi("/schema/openapi.json", create_app(engine, HttpSettings()))
        for found in document.get_all_operations():
            operation = found.ok()
            try:
                cases = operation.as_strategy(generation_mode=mode)
                few = hypothesis.settings(
                    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=HEALTH
                )
                few(hypothesis.given(case=cases)(check))()
            except (
                hypothesis.errors.Unsatisfiable
            ):  # a route that takes nothing cannot be sent anything wrong
                continue
            asked.append(operation.path)
        assert engine.error is None and engine.counters.ended["error"] == 0
    assert {"/v1/completions", "/v1/chat/completions", "/v1/score", "/tokenize", "/detokenize"} <= set(asked)
