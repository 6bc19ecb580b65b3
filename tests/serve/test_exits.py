"""Depth by need: exit rules end tokens where they say, alike alone and in a crowd, and the reply says what
each token took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from litestar.testing import TestClient

from rdlm.config.base import parse
from rdlm.config.checkpoint import RecurrenceConfig
from rdlm.errors import UserError
from rdlm.exit_criteria import (
    CRITERIA,
    KL,
    ArgmaxStability,
    Cosine,
    EntropyDiff,
    ExitRule,
    LatentDiff,
    MinPKL,
)
from rdlm.sampling_params import SamplingParams
from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.engine.exits import default_thresholds
from serve.engine.sequence import Event, Request, StepBudget
from serve.settings import EngineSettings, HttpSettings

WARM = SamplingParams(temperature=0.9)


def ask(k: int, rule: ExitRule | None, seed: int = 0, length: int = 9, tokens: int = 6) -> Request:
    ids = tuple((7 * i + 3 * length + seed) % 290 + 5 for i in range(length))
    return Request(ids, StepBudget(k, exit=rule), tokens, WARM, seed)


def said(events: list[Event]) -> list[tuple[int | None, int | None]]:
    return [(event.token, event.steps) for event in events]


def test_criteria_against_their_definitions() -> None:
    rows = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = [((a - b).norm() / b.norm()).item() for a, b in zip(*rows, strict=True)]
    assert LatentDiff.measure(rows[0], rows[1]).tolist() == pytest.approx(expected)
    assert LatentDiff.measure(torch.zeros(1, 8), rows[0, :1]).item() == pytest.approx(1)
    logp = rows.log_softmax(-1)
    kl = torch.nn.functional.kl_div(logp[1], logp[0], reduction="none", log_target=True).sum(-1)
    assert KL.measure(logp[1], list(logp[0]))[0].tolist() == pytest.approx(kl.tolist(), abs=1e-6)
    assert KL.measure(logp[0], list(logp[0]))[0].tolist() == [0] * 5


def test_further_criteria_against_their_definitions() -> None:
    rows = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    cosine = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=-1)
    assert Cosine.measure(rows[0], rows[1]).tolist() == pytest.approx((1 - cosine).tolist(), abs=1e-6)
    first, second = (3 * rows).log_softmax(-1)
    entropies = [torch.distributions.Categorical(logits=x).entropy() for x in (first, second)]
    values, kept = EntropyDiff.measure(first, [None] * 5)
    assert values.tolist() == pytest.approx((100 - entropies[0]).tolist(), abs=1e-4)
    values, _ = EntropyDiff.measure(second, kept)
    assert values.tolist() == pytest.approx((entropies[1] - entropies[0]).abs().tolist(), abs=1e-5)

    def kept_by_min_p(logp: torch.Tensor) -> torch.Tensor:
        p = logp.exp()
        p = torch.where(p < 0.1 * p.amax(-1, keepdim=True), torch.full_like(p, 1 / 8), p)
        return p / p.sum(-1, keepdim=True)

    before, after = kept_by_min_p(first), kept_by_min_p(second)
    values, kept = MinPKL.measure(first, [None] * 5)
    assert values.tolist() == pytest.approx(
        (torch.tensor(1 / 8) * (1 / (8 * before)).log()).sum(-1).tolist(), abs=1e-5
    )
    values, _ = MinPKL.measure(second, kept)
    assert values.tolist() == pytest.approx((before * (before / after).log()).sum(-1).tolist(), abs=1e-5)
    one = torch.tensor([[0.0, 1.0]]).log_softmax(-1)
    seen: list[Any] = [None]
    counts = []
    for logp in (one, one, one, one.flip(-1), one.flip(-1)):
        value, seen = ArgmaxStability.measure(logp, seen)
        counts.append(value.item())
    assert counts == [0, 1, 2, 0, 1]


def test_every_criterion_of_the_table_exits_at_its_extreme_threshold(
    make_engine: Callable[..., Engine],
) -> None:
    """Whoever adds a criterion finds it here: a threshold that any value satisfies exits at min_steps, 0
    never exits."""
    engine = make_engine()
    assert all(name == criterion.name and criterion.description for name, criterion in CRITERIA.items())
    for name in default_thresholds(engine.served.config):  # those of a gate: test_gates.py
        always = 1e-9 if name == "argmax-stability" else 1e9
        steps = [event.steps for event in engine.generate([ask(8, ExitRule(name, always, 3))])[0]]
        assert all(3 <= (taken or 0) <= 8 for taken in steps) and (
            name == "argmax-stability" or steps == [3] * 6
        )
        assert [event.steps for event in engine.generate([ask(8, ExitRule(name, 0.0, 3))])[0]] == [8] * 6


def test_the_documentation_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    for name, criterion in CRITERIA.items():
        threshold = f"{criterion.default_threshold:f}".rstrip("0").rstrip(".")
        assert f"| `{name}` | {threshold} | {criterion.description} |" in text


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (("entropy", 1.0), "exit.criterion"),
        (("kl", -1.0), "exit.threshold"),
        (("kl", float("nan")), "exit.threshold"),
        (("kl", 1.0, 0), "exit.min_steps"),
        (("kl", 1.0, 1, 0), "exit.check_every"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(fields: tuple[Any, ...], names: str) -> None:
    with pytest.raises(UserError) as refused:
        ExitRule(*fields)
    assert refused.value.field == names


@pytest.mark.parametrize("criterion", ["cosine", "minp-kl", "entropy-diff"])
def test_further_criteria_end_tokens(criterion: Any, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    events = engine.generate([ask(8, ExitRule(criterion, 1e9, 3), length=20)])[0]
    assert said(events) == said(engine.generate([ask(3, None, length=20)])[0])
    never = engine.generate([ask(8, ExitRule(criterion, 0.0))])[0]
    assert [event.steps for event in never] == [8] * 6


def test_argmax_stability_counts_equal_predictions(make_engine: Callable[..., Engine]) -> None:
    """Against what K = 1 .. 8 would say greedily: the exit is at the first step whose answer has repeated
    often enough."""
    engine = make_engine()
    greedy = SamplingParams(temperature=0)
    prompt = ask(8, None).prompt
    by_k = [engine.generate([Request(prompt, StepBudget(k), 1, greedy)])[0][0].token for k in range(1, 9)]
    for wanted in (1, 2):
        event = engine.generate(
            [Request(prompt, StepBudget(8, exit=ExitRule("argmax-stability", wanted)), 1, greedy)]
        )[0][0]
        repeated = (k for k in range(wanted + 1, 8) if len(set(by_k[k - wanted - 1 : k])) == 1)
        assert event.steps == next(repeated, 8)


def test_checks_can_be_rare_and_spare_the_prompt(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    for criterion in ("latent-diff", "kl"):
        rare = engine.generate([ask(8, ExitRule(criterion, 1e9, check_every=3), length=20)])[0]  # type: ignore[arg-type]
        assert [event.steps for event in rare] == [3] * 6
        spared = engine.generate([ask(8, ExitRule(criterion, 1e9, 2, prefill=False), length=20)])[0]  # type: ignore[arg-type]
        assert [event.steps for event in spared] == [8] + [2] * 5
        assert spared[-1].usage is not None and spared[-1].usage.prefill_core_steps == 20 * 8


@pytest.mark.parametrize("criterion", ["latent-diff", "kl"])
def test_huge_thresholds_leave_at_min_steps_and_zero_never(
    criterion: Any, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine()
    for least in (1, 3, 8):
        events = engine.generate([ask(8, ExitRule(criterion, 1e9, least), length=20)])[0]
        assert [event.steps for event in events] == [least] * 6
        usage = events[-1].usage
        assert usage is not None
        assert (usage.prefill_core_steps, usage.decode_core_steps) == (
            20 * least,
            5 * least,
        )  # chunks of the prompt leave too
        assert usage.saved_core_steps == 25 * (8 - least) and usage.exits == (6 if least < 8 else 0)
        assert usage.token_steps == 6 * least
        fixed = engine.generate([ask(least, None, length=20)])[0]
        assert said(events) == said(fixed)  # leaving after k steps is K = k
    never = engine.generate([ask(8, ExitRule(criterion, 0.0), length=20)])[0]
    assert said(never) == said(engine.generate([ask(8, None, length=20)])[0])
    assert [event.steps for event in never] == [8] * 6


def between(criterion: Any, engine: Engine) -> float:
    """A threshold at which the tiny random model leaves at different steps."""
    for exponent in range(-14, 8):
        events = engine.generate([ask(8, ExitRule(criterion, 1.4**exponent), tokens=12)])[0]
        if len({event.steps for event in events}) > 1:
            return 1.4**exponent
    raise AssertionError("no threshold separates tokens")


@pytest.mark.parametrize("criterion", ["latent-diff", "kl"])
@pytest.mark.parametrize("kv_cache", ["shared", "full"])
def test_batched_equals_alone_with_exits(
    criterion: Any, kv_cache: str, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(settings=EngineSettings(max_slots=4, chunk=16, prefill_rows=32, kv_cache=kv_cache))
    threshold = between(criterion, engine)
    mixed = [ask(8, ExitRule(criterion, threshold, 1 + i % 3), i, 3 + 7 * i) for i in range(5)]
    mixed += [ask(k, None, k, 11) for k in (1, 5, 8)]
    alone = [said(engine.generate([one])[0]) for one in mixed]
    assert [said(events) for events in engine.generate(mixed)] == alone
    taken = {steps for answer in alone[:5] for _, steps in answer}
    assert len(taken) > 1 and max(taken) <= 8


@pytest.fixture(scope="module")
def client(make_served: Callable[..., Served]) -> Iterator[TestClient]:
    settings = EngineSettings(max_slots=4, chunk=16, prefill_rows=32)
    with Engine(lambda: make_served(settings=settings)) as engine:
        with TestClient(create_app(engine, HttpSettings()), raise_server_exceptions=False) as client:
            yield client


def complete(client: TestClient, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    answer = client.post(path, json={"max_tokens": 5, "temperature": 0, "ignore_eos": True, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_reply_says_what_each_token_took(client: TestClient) -> None:
    rule = {"criterion": "kl", "threshold": 1e9, "min_steps": 2, "max_steps": 6}
    answer = complete(client, prompt=[[5, 6, 7]], exit=rule, n=2)
    assert [choice["recurrence"] for choice in answer["choices"]] == [{"steps": [2] * 5}] * 2
    found = answer["usage"]["recurrence"]
    assert found["num_steps"] == 6 and found["mean_steps"] == 2 and found["exits"] == 10
    assert found["exit"] == {
        "criterion": "kl",
        "threshold": 1e9,
        "min_steps": 2,
        "check_every": 1,
        "prefill": True,
    }
    assert found["core_steps"] == 2 * (3 + 4) * 2 and found["saved_core_steps"] == 2 * (3 + 4) * 4
    streamed = client.post(
        "/v1/completions", json={"prompt": [[5]], "exit": rule, "max_tokens": 3, "stream": True}
    )
    assert streamed.text.count('"recurrence":{"steps":[2]}') == 3
    chat = complete(client, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], exit=rule)
    assert chat["choices"][0]["recurrence"] == {"steps": [2] * 5}
    assert "recurrence" not in complete(client, prompt=[[5]], num_steps=2)["choices"][0]


def test_auto_and_effort(client: TestClient) -> None:
    auto = complete(client, prompt=[[5, 6, 7]], num_steps="auto")
    rule = {"criterion": "latent-diff", "threshold": 0.03, "min_steps": 1, "check_every": 1, "prefill": True}
    assert auto["usage"]["recurrence"]["exit"] == rule
    assert auto["usage"]["recurrence"]["num_steps"] == 8
    assert complete(client, prompt=[[5, 6, 7]], exit={})["choices"] == auto["choices"]
    capped = complete(client, prompt=[[5]], num_steps=3, exit={"threshold": 0})
    assert capped["choices"][0]["recurrence"]["steps"] == [3] * 5
    stated = client.get("/v1/models/tiny").json()["recurrence"]
    assert stated["reasoning_effort"] == {
        "none": 1,
        "minimal": 1,
        "low": 1,
        "medium": 2,
        "high": 4,
        "xhigh": 8,
    }
    assert stated["exits"] == ["latent-diff", "cosine", "kl", "minp-kl", "entropy-diff", "argmax-stability"]
    for effort, k in stated["reasoning_effort"].items():
        assert (
            complete(client, prompt=[[5]], reasoning_effort=effort)["usage"]["recurrence"]["num_steps"] == k
        )


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"exit": {"criterion": "entropy"}}, "exit.criterion", "latent-diff"),
        ({"exit": {"threshold": -1}}, "exit.threshold", "greater"),
        ({"exit": {"threshhold": 1}}, "exit.threshhold", "did you mean threshold"),
        ({"exit": {"max_steps": 9}}, "exit.max_steps", "1 to 8"),
        ({"exit": {"max_steps": 4}, "num_steps": 3}, "exit.max_steps", "contradicts"),
        ({"exit": {"min_steps": 4, "max_steps": 3}}, "exit.min_steps", "exceeds"),
        ({"num_steps": "often"}, "num_steps", "auto"),
        ({"num_steps": True}, "num_steps", "auto"),
        ({"num_steps": 3, "reasoning_effort": "high"}, "num_steps", "one of them"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort", "minimal"),
        ({"num_steps": "auto", "echo": True, "logprobs": 1}, "echo", "fixed K"),
    ],
)
def test_refusals(body: dict[str, Any], param: str, says: str, client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "x", **body})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert says in answer.json()["error"]["message"]


def test_models_that_need_every_step_refuse_exits(make_served: Callable[..., Served]) -> None:
    with (
        Engine(lambda: make_served("evidence")) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        for body, param in (({"num_steps": "auto"}, "num_steps"), ({"exit": {}}, "exit")):
            error = client.post("/v1/completions", json={"prompt": "x", **body}).json()["error"]
            assert error["param"] == param and "noise levels" in error["message"]
        assert client.get("/v1/models/tiny").json()["recurrence"]["exits"] == []


def test_a_threshold_of_a_criterion_that_there_is_not_is_refused() -> None:
    assert parse(RecurrenceConfig, {"exit_thresholds": {"halt": 0.9, "kl": 0.1}}, "recurrence")
    with pytest.raises(
        UserError, match="exit_thresholds.*no exit criterion 'latent_diff'; use latent-diff, "
    ):
        parse(RecurrenceConfig, {"exit_thresholds": {"halt": 0.9, "latent_diff": 0.1}}, "recurrence")
