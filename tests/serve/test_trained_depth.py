"""K beyond the steps that a model was trained with: the answer says so, and an operator can forbid it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import TestClient
from typer.testing import CliRunner

from rdlm.checkpoints import folder
from rdlm.config.checkpoint import CheckpointConfig, RecurrenceConfig
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError
from rdlm.registry import build
from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.generate_cli import app as generate
from serve.loading import build_served
from serve.settings import EngineSettings, HttpSettings

HEADER = "x-num-steps-warning"
WARNING = "K = 5 exceeds the 4 core steps that test was trained with: answers may be worse"
CHAT = {"messages": [{"role": "user", "content": "the word"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def client(make_served: Callable[..., Served]) -> Iterator[TestClient]:
    def load() -> Served:
        served = make_served(settings=EngineSettings(max_slots=4))
        recurrence = RecurrenceConfig(default_steps=2, max_steps=served.max_steps, trained_steps=4)
        config = served.config.model_copy(update={"recurrence": recurrence, "name": "test"})
        return replace(served, config=config, default_steps=2)

    settings = HttpSettings(cors_origins=("https://page.test",))
    with Engine(load) as engine, TestClient(create_app(engine, settings)) as client:
        yield client


def ask(client: TestClient, path: str = "/v1/completions", **fields: Any) -> Any:
    start = {"prompt": "in the", "max_tokens": 2} if path == "/v1/completions" else {}
    answer = client.post(path, json={**start, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {}),
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {"input": "the word", "max_output_tokens": 2}),
    ],
)
def test_an_answer_beyond_the_trained_depth_says_so_and_others_do_not(
    client: TestClient, path: str, fields: dict[str, Any]
) -> None:
    beyond, within = (ask(client, path, **fields, num_steps=k) for k in (5, 4))
    assert (beyond.headers[HEADER], beyond.json()["warnings"]) == (WARNING, [WARNING])
    assert HEADER not in within.headers and "warnings" not in within.json()


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_the_last_chunk_of_a_stream_says_so(client: TestClient, options: dict[str, Any]) -> None:
    answer = ask(client, num_steps=5, stream=True, n=2, **options)
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    assert answer.headers[HEADER] == WARNING
    assert [chunk.get("warnings") for chunk in chunks] == [None] * (len(chunks) - 1) + [[WARNING]]


def test_scores_schedules_and_exits_say_so(client: TestClient) -> None:
    scores = client.post("/v1/score", json={"prompt": "in the word", "num_steps": [1, 5]})
    assert (scores.headers[HEADER], scores.json()["warnings"]) == (WARNING, [WARNING])
    assert ask(client, schedule=[5, 1]).headers[HEADER] == WARNING
    assert ask(client, exit={"max_steps": 5}).headers[HEADER] == WARNING


def test_what_names_no_k_stays_within_the_trained_depth(client: TestClient) -> None:
    assert HEADER not in ask(client, num_steps="auto").headers
    card = client.get("/v1/models").json()["data"][0]["recurrence"]
    assert card["trained_steps"] == 4 and card["max_steps"] > 4
    assert card["reasoning_effort"]["xhigh"] == 4


def test_pages_of_other_origins_may_read_the_header(client: TestClient) -> None:
    answer = client.post(
        "/v1/completions", json={"prompt": "in", "num_steps": 5}, headers={"Origin": "https://page.test"}
    )
    assert HEADER in answer.headers["access-control-expose-headers"]


def checkpoint(out: Path, tokenizer: Tokenizer, trained: int | None) -> Path:
    model = {
        "family": "huginn", "vocab_size": tokenizer.vocab_size, "d_model": 32, "num_heads": 2, "mlp_width": 32,
        "max_seq_len": 64,
    }  # fmt: skip
    recurrence = {"default_steps": 8, "max_steps": 16, "trained_steps": trained}
    document = {"name": "test", "model": model, "objective": "onestep", "recurrence": recurrence}
    config = CheckpointConfig.model_validate(document)
    return folder.save(out, build(config, seed=0), config, tokenizer)


def test_an_operator_can_forbid_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = folder.load_config(checkpoint(tmp_path / "model", tokenizer, 4))
    settings = EngineSettings(forbid_beyond_trained=True)
    with (
        Engine(lambda: build_served(build(config, seed=0), config, tokenizer, settings)) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        refused = client.post("/v1/completions", json={"prompt": "in the", "num_steps": 5})
        assert refused.status_code == 400 and "takes 1 to 4" in refused.json()["error"]["message"]
        assert ask(client).json()["usage"]["recurrence"]["num_steps"] == 4  # the default was 8
    unknown = folder.load_config(checkpoint(tmp_path / "unknown", tokenizer, None))
    with pytest.raises(UserError, match="does not say at which K"):
        build_served(build(unknown, seed=0), unknown, tokenizer, settings)


def test_generate_says_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = checkpoint(tmp_path / "model", tokenizer, 4)
    arguments = ["--checkpoint", str(model), "--prompt", "in the", "--num-steps", "4,5", "--max-tokens", "2"]
    done = CliRunner().invoke(generate, arguments)
    assert done.exit_code == 0 and done.stderr.count(WARNING) == done.stderr.count("exceeds") == 1
