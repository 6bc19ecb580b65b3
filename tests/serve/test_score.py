"""The K sweep: one pass gives what scoring at each K alone gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from litestar.testing import TestClient

from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.settings import EngineSettings, HttpSettings

KS = [1, 2, 5, 8]


@pytest.fixture(scope="module")
def served(make_served: Callable[..., Served]) -> Served:
    return make_served("single_pass", settings=EngineSettings(max_slots=3, chunk=8, prefill_rows=16))


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[TestClient]:
    with Engine(lambda: served) as engine, TestClient(create_app(engine, HttpSettings())) as client:
        yield client


def ids(length: int) -> list[int]:
    return [(7 * i + 3 * length) % 290 + 5 for i in range(length)]


def reference(served: Served, prompt: list[int], ks: list[int]) -> dict[int, torch.Tensor]:
    tokens = torch.tensor([prompt])
    denoiser = served.runner.denoiser  # type: ignore[attr-defined]
    return {k: v[0] for k, v in denoiser.token_logprobs(tokens[:, :-1], tokens[:, 1:], ks).items()}


def test_a_sweep_equals_scoring_at_each_k_among_strangers(client: TestClient, served: Served) -> None:
    """Prompts beyond a chunk and beyond prefill_rows too, in the shared cache, while others decode."""
    engine: Engine = client.app.state.server.engine
    from serve.engine.sequence import Request, StepBudget

    stranger = engine.submit([Request((5, 6, 7), StepBudget(3), 100)], lambda event: None)
    prompts = [ids(40), ids(9), ids(2), ids(25), ids(120)]
    answer = client.post("/v1/score", json={"prompt": prompts, "num_steps": [8, 1, 5, 2]}).json()
    engine.abort(stranger)
    assert answer["num_steps"] == KS and answer["estimator"] == "logits after K iterations"
    for prompt, scores in zip(prompts, answer["scores"], strict=True):
        expected = reference(served, prompt, KS)
        assert scores["token_ids"] == prompt and len(scores["tokens"]) == len(prompt)
        for k in KS:
            values = scores["token_logprobs"][str(k)]
            assert values[0] is None
            torch.testing.assert_close(torch.tensor(values[1:]), expected[k], atol=1e-4, rtol=0)
            assert scores["logprob"][str(k)] == pytest.approx(expected[k].sum().item(), abs=1e-2)
    assert not torch.allclose(expected[1], expected[8], atol=0.1)
    work = answer["usage"]["recurrence"]
    assert (
        work["core_steps"] == 8 * sum(map(len, prompts)) and work["decode_core_steps"] == 0
    )  # the price of the largest K
    assert answer["usage"]["completion_tokens"] == 0


def test_a_sweep_runs_the_core_as_often_as_its_largest_k(client: TestClient, served: Served) -> None:
    """Counted where it happens: forwards of the core, whatever the account says."""
    model, calls = served.runner.denoiser.model, []  # type: ignore[attr-defined]
    core = model.core
    model.core = lambda *args: (calls.append(args[0].shape[1]), core(*args))[1]
    try:
        for ks, times in ((KS, 8), ([8], 8), ([1, 2], 2)):
            calls.clear()
            assert client.post("/v1/score", json={"prompt": [ids(40)], "num_steps": ks}).status_code == 200
            assert calls == [40] * times
    finally:
        del model.core


def test_text_is_scored_as_completions_score_it(client: TestClient) -> None:
    scores = client.post("/v1/score", json={"prompt": "and it", "num_steps": [1]}).json()["scores"][0]
    body: dict[str, Any] = {"prompt": "and it", "num_steps": 1, "echo": True, "logprobs": 0, "max_tokens": 0}
    echoed = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert scores["tokens"] == echoed["tokens"]
    assert scores["token_logprobs"]["1"][1:] == pytest.approx(echoed["token_logprobs"][1:], abs=1e-5)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"num_steps": [1, 9]}, "num_steps", "1 to 8"),
        ({"num_steps": []}, "num_steps", "at least 1 item"),
        ({"num_steps": 4}, "num_steps", "list"),
        ({"num_steps": [1, 2], "model": "tiny:k2"}, "num_steps", "one of them"),
        ({"num_steps": [1], "prompt": [[]]}, "prompt", "no tokens"),
        ({"num_steps": [1], "prompt": [ids(129)]}, "prompt", "128"),
        ({"num_steps": [1], "top_p": 1}, "top_p", "no such field"),
    ],
)
def test_refusals(body: dict[str, Any], param: str, says: str, client: TestClient) -> None:
    answer = client.post("/v1/score", json={"prompt": "x", **body})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert says in answer.json()["error"]["message"]


def test_sampling_models_are_scored_at_one_step_only(make_served: Callable[..., Served]) -> None:
    for objective in ("evidence", "paper"):
        served = make_served(objective)
        with (
            Engine(lambda served=served: served) as engine,
            TestClient(create_app(engine, HttpSettings())) as client,
        ):  # type: ignore[misc]
            found = client.post("/v1/score", json={"prompt": [ids(30)], "num_steps": [1]}).json()["scores"][0]
            torch.testing.assert_close(
                torch.tensor(found["token_logprobs"]["1"][1:]),
                reference(served, ids(30), [1])[1],
                atol=1e-4,
                rtol=0,
            )
            refused = client.post("/v1/score", json={"prompt": [ids(30)], "num_steps": [1, 2]})
            assert refused.status_code == 400 and "K = 1" in refused.json()["error"]["message"]


@pytest.mark.parametrize("steps", ["3", "99", "many"])
def test_a_header_that_contradicts_the_steps_is_refused(steps: str, client: TestClient) -> None:
    body = {"prompt": "x", "num_steps": [1, 2]}
    answer = client.post("/v1/score", json=body, headers={"X-Num-Steps": steps})
    assert answer.status_code == 400 and "X-Num-Steps" in answer.json()["error"]["message"], answer.text
    agreed = client.post("/v1/score", json=body | {"num_steps": [2]}, headers={"X-Num-Steps": "2"})
    assert agreed.status_code == 200
