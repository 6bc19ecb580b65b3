"""What a reader opens to understand one request: the files whose functions run in it."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from litestar.testing import TestClient

from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.loading import optimise
from serve.settings import EngineSettings, HttpSettings

REPO = Path(__file__).resolve().parents[2]


CARRIERS_OF = (
    "serve.api.openai_format",
    "serve.api.request_parsing",
    "serve.api.streaming",
    "serve.engine.sequence",
)
OF_A_STEP = {"StepResult", "Event", "Usage"}
"""What the engine hands over in a step or at the end."""


def test_a_request_runs_through_few_files(make_served: Callable[..., Served]) -> None:
    """A completion of four tokens, the second request of a server with a `single_pass` model; all threads."""
    settings = EngineSettings(max_slots=4, chunk=16, prefill_rows=32)
    lines, made, counts = defaultdict[str, set[int]](set), set[str](), threading.Event()

    def note(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if event == "call" and counts.is_set() and frame.f_code.co_name == "__init__":
            kind = type(frame.f_locals.get("self"))
            if kind.__module__ in CARRIERS_OF:
                made.add(kind.__name__)
        file = Path(frame.f_code.co_filename)
        if not file.is_relative_to(REPO) or ".venv" in file.parts or file.is_relative_to(REPO / "tests"):
            return None
        if event == "line" and counts.is_set():
            lines[str(file.relative_to(REPO))].add(frame.f_lineno)
        return note

    def load() -> Served:
        served = make_served("single_pass", settings=settings)
        optimise(served.runner.denoiser, settings)  # type: ignore[attr-defined]
        return served

    threading.settrace(note)  # the engine's thread and the event loop's begin below
    try:
        with Engine(load) as engine, TestClient(create_app(engine, HttpSettings())) as client:
            for is_second in (False, True):
                counts.set() if is_second else counts.clear()
                body = {"prompt": "in the beginning", "max_tokens": 4, "num_steps": 4, "ignore_eos": True}
                assert client.post("/v1/completions", json=body).status_code == 200
            counts.clear()
    finally:
        threading.settrace(None)
    assert {"serve/api/routes.py", "serve/engine/runner.py", "rdlm/models/recurrent.py"} <= lines.keys()
    assert len(lines) <= 26, sorted(lines)
    most = sorted(map(len, lines.values()), reverse=True)
    assert sum(most[:15]) >= 0.9 * sum(most), (most, sum(most))
    # its body and SamplingParams are made elsewhere; JsonRequest is the framework's
    carriers = {"CompletionAnswer", "EngineEvents", "Request", "StepBudget", "Sequence"}
    assert made - OF_A_STEP == carriers | {"JsonRequest"}
