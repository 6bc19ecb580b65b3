"""Steps of given lengths per request (LoopFormer): what a server, Python and the commands answer is what whole
sequences give with the same list (rdlm.load(...).logits, which is held against the reference elsewhere)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from litestar.testing import TestClient
from safetensors.torch import save_file

import rdlm
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.cli import app, run
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError
from rdlm.inference import Model
from rdlm.sampling_params import SamplingParams
from serve.api.app import create_app
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.loading import build_served, load_served
from serve.settings import EngineSettings, HttpSettings
from tests.rdlm import zoo_reference as zoo
from tests.serve.tape import Tape

CONFIG = {
    "model_type": "loopformer", "n_embd": 48, "n_head": 3, "n_layer": 2, "intermediate_dim": 60, "block_size": 256,
    "vocab_size": 300,
}  # fmt: skip
SIZES = [0.5, 0.1, 0.25, 0.15]
OTHER = [0.7, 0.3]
PROMPT = [17, 250, 31, 8, 99, 140, 61, 5, 77, 201, 33]
SETTINGS: dict[str, Any] = {"kv_cache": "full", "max_slots": 6, "chunk": 4, "prefill_rows": 8}


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("loopformer")
    (source / "config.json").write_text(json.dumps(CONFIG))
    save_file(zoo.drawn(zoo.loopformer_tensors(CONFIG), seed=3), source / "model.safetensors")
    tokenizer.save(source)
    return import_checkpoint(str(source), source / "model", name="zoo")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return rdlm.load(folder)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with (
        Engine(lambda: load_served(folder, EngineSettings(**SETTINGS))) as engine,
        TestClient(create_app(engine, HttpSettings())) as running,
    ):
        yield running


def post(client: TestClient, status: int = 200, **body: Any) -> Any:
    given = {
        "prompt": PROMPT,
        "max_tokens": 5,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = client.post("/v1/completions", json=given | body)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def test_a_list_per_request_is_that_of_whole_sequences(client: TestClient, model: Model) -> None:
    """In chunks and token by token, over HTTP and from Python; another order of the same lengths is another answer."""
    texts = {}
    for sizes in (SIZES, SIZES[::-1], OTHER, [1.0]):
        answer = post(client, step_sizes=sizes, logprobs=1)
        choice, recurrence = answer["choices"][0], answer["usage"]["recurrence"]
        whole = torch.tensor([[*PROMPT, *choice["token_ids"]]])
        logits = model.logits(whole, step_sizes=sizes)[len(sizes)][0, len(PROMPT) - 1 : -1].log_softmax(-1)
        assert choice["token_ids"] == logits.argmax(-1).tolist()
        found = torch.tensor(choice["logprobs"]["token_logprobs"])
        torch.testing.assert_close(found, logits.amax(-1), atol=1e-4, rtol=0)
        assert (recurrence["num_steps"], recurrence["step_sizes"]) == (len(sizes), sizes)
        options: dict[str, Any] = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
        python = model.generate(
            [PROMPT], step_sizes=torch.tensor(sizes).double(), kv_cache="full", **options
        )[0]
        assert python.tokens == choice["token_ids"] and python.steps == [len(sizes)] * 5
        texts[tuple(sizes)] = (choice["token_ids"], found.tolist())
    assert len({str(text) for text in texts.values()}) == 4


def test_equal_lengths_are_those_of_k(client: TestClient) -> None:
    plain, equal = post(client, num_steps=4, logprobs=1), post(client, step_sizes=[0.25] * 4, logprobs=1)
    assert plain["choices"][0] == equal["choices"][0]
    assert post(client, step_sizes=SIZES, num_steps=4)["choices"] == post(client, step_sizes=SIZES)["choices"]


@pytest.mark.parametrize("replay", [False, True])
def test_lists_and_numbers_share_a_batch(model: Model, replay: bool) -> None:
    """Each as it would be alone, drafts and wavefronts too, where passes are replayed as well."""
    budgets = [
        StepBudget(4, step_sizes=tuple(SIZES)), StepBudget(4), StepBudget(2, step_sizes=tuple(OTHER)), StepBudget(3),
        StepBudget(4, step_sizes=tuple(SIZES[::-1])),
    ]  # fmt: skip
    params = SamplingParams(temperature=0.8)
    requests = [Request(tuple(PROMPT[i:]), b, 6, params, seed=i) for i, b in enumerate(budgets)]
    assert model.tokenizer is not None
    settings = EngineSettings(**SETTINGS, prefix_cache="off")
    served = build_served(model.denoiser, model.config, model.tokenizer, settings)
    if replay:
        runner = served.runner
        made = type(runner)(
            model.denoiser, model.config, num_slots=6, max_len=256, max_steps=8, num_tokens=300, kv_cache="full",
            replay=(tape := Tape()),
        )  # type: ignore[call-arg]  # fmt: skip
        served = replace(served, runner=made)
    with Engine(lambda: served) as engine:
        together = [tokens(events) for events in engine.generate(requests)]
        alone = [tokens(engine.generate([request])[0]) for request in requests]
    assert together == alone
    assert not replay or tape.replays


def tokens(events: list[Any]) -> list[int]:
    assert events[-1].error is None
    return [event.token for event in events if event.token is not None]


def test_drafts_and_wavefronts_take_the_lengths_too(client: TestClient) -> None:
    plain = post(client, step_sizes=SIZES, max_tokens=8)["choices"][0]["token_ids"]
    drafted = post(client, step_sizes=SIZES, max_tokens=8, speculation={"draft_steps": 2})
    waving = post(
        client, step_sizes=SIZES, max_tokens=8, wavefront={"positions": 3, "inner_steps": 1, "threshold": 0}
    )
    assert drafted["choices"][0]["token_ids"] == waving["choices"][0]["token_ids"] == plain


def test_a_prefix_belongs_to_its_lengths(client: TestClient) -> None:
    def cached(**body: Any) -> int:
        usage = post(client, prompt=[*range(3, 90)], **body)["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [cached(step_sizes=SIZES), cached(step_sizes=SIZES)] == [0, 64]
    assert [cached(step_sizes=SIZES[::-1]), cached(num_steps=4)] == [0, 0]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"step_sizes": []}, "step_sizes", "at least 1"),
        ({"step_sizes": [0.5, 0]}, "step_sizes.1", "greater than 0"),
        ({"step_sizes": [0.5, 1.5]}, "step_sizes.1", "less than or equal to 1"),
        ({"step_sizes": "0.5,0.5"}, "step_sizes", "list"),
        ({"step_sizes": [0.01] * 65}, "step_sizes", "takes 1 to 64"),
        ({"step_sizes": SIZES, "num_steps": 3}, "step_sizes", "contradict"),
        ({"step_sizes": SIZES, "model": "zoo:k2"}, "step_sizes", "contradict"),
        ({"step_sizes": SIZES, "schedule": [4, 2]}, "schedule", "step_sizes"),
        ({"step_sizes": SIZES, "max_ms": 50_000}, "max_ms", "step_sizes"),
    ],
)
def test_what_cannot_be_is_refused(client: TestClient, body: dict[str, Any], param: str, words: str) -> None:
    error = post(client, 400, **body)
    assert error["param"] == param and words in error["message"]


@pytest.mark.parametrize(
    ("objective", "family"), [("bptt", "huginn"), ("single_pass", "huginn"), ("masked", "masked")]
)
def test_models_without_lengths_refuse_them(
    make_served: Callable[..., Any], objective: str, family: str
) -> None:
    served = make_served(objective, family)
    with Engine(lambda: served) as engine, TestClient(create_app(engine, HttpSettings())) as running:
        error = post(running, 400, step_sizes=[0.5, 0.5])
        assert error["param"] == "step_sizes"


def test_python_and_the_commands(
    folder: Path, client: TestClient, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="step_sizes says how many"):
        model.generate([PROMPT], 2, step_sizes=SIZES)
    with pytest.raises(UserError, match=r"0\.5,0\.25,0\.25"):
        model.generate([PROMPT], step_sizes=[2.0])
    command = ["generate", "--checkpoint", str(folder), "--prompt", "the word was", "--temperature", "0"]
    sizes = [part for size in SIZES for part in ("--step-size", str(size))]
    assert (
        run(app, [*command, "--max-tokens", "5", "--ignore-eos", "--kv-cache", "full", *sizes], "rdlm") == 0
    )
    out = capsys.readouterr().out
    text = post(client, prompt="the word was", step_sizes=SIZES)["choices"][0]["text"]
    assert "K = 4" in out and f"the word was{text}" in out
