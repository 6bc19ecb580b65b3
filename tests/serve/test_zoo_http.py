"""Every published family behind HTTP: K per request, log-probabilities, sweeps, exits, streamed steps, a word beyond
the trained depth, chat. What is computed is held against the imported model itself, which is held against the
references elsewhere."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from litestar.testing import TestClient

import rdlm
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.data.tokenizer import train_tokenizer
from rdlm.inference import Model
from serve.api.app import create_app
from serve.api.chat_template import ChatTemplate
from serve.engine.engine import Engine
from serve.loading import load_served
from serve.settings import EngineSettings, HttpSettings

DRAWN = ("huginn", "retro_llama", "retro_olmo", "parcae", "ifm_p2", "ifm_p2_orthoinj", "ifm_p2_linear")
FAMILIES = (*DRAWN, "ouro", "nanbeige", "loopus", "loopformer", "hrm_text")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}assistant:"
GATED = ("ouro", "loopus")


class Zoo(NamedTuple):
    family: str
    model: Model
    client: TestClient

    def post(self, path: str, status: int = 200, **body: Any) -> Any:
        answer = self.client.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer


@pytest.fixture(scope="module", params=FAMILIES)
def zoo(
    request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Zoo]:
    """A golden checkpoint, imported with a tokenizer of its vocabulary and a chat template."""
    family, scratch = request.param, tmp_path_factory.mktemp(request.param)
    golden = shared_data.parent / "golden" / f"{family}_tiny"
    if not golden.is_dir():
        pytest.skip(f"no golden outputs at {golden}")
    source, rng = Path(shutil.copytree(golden, scratch / "source")), random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(400)]
    tokens = source / "tokenizer" if family.startswith("ifm") else source
    train_tokenizer("bpe", iter([" ".join(words)]), 320).save(tokens)
    settings = tokens / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    folder = import_checkpoint(str(source), scratch / "model", name="zoo", zero_state=family in DRAWN)
    engine = EngineSettings(kv_cache="full", max_slots=4, chunk=48, prefill_rows=48, max_len=48)
    with (
        Engine(lambda: load_served(folder, engine)) as running,
        TestClient(create_app(running, HttpSettings())) as client,
    ):
        yield Zoo(family, rdlm.load(folder), client)


PROMPT = [17, 250, 31, 8, 99, 140, 61, 5]


def test_k_per_request_with_logprobs(zoo: Zoo) -> None:
    """Greedy tokens and their log-probabilities at each K are those of whole sequences; an answer beyond the trained
    depth says so in its header and its body, others do not."""
    trained = zoo.model.config.trained_steps
    assert trained is not None
    for k in (1, 2, trained, trained + 1):
        body = {
            "prompt": PROMPT,
            "num_steps": k,
            "max_tokens": 4,
            "temperature": 0,
            "logprobs": 1,
            "ignore_eos": True,
        }
        answer = zoo.post("/v1/completions", **body, return_token_ids=True)
        choice, usage = answer.json()["choices"][0], answer.json()["usage"]
        whole = torch.tensor([[*PROMPT, *choice["token_ids"]]])
        if not zoo.model.denoiser.model.is_prefix_lm:  # whose prompts see themselves in both directions
            logprobs = zoo.model.logits(whole, k)[k][0, len(PROMPT) - 1 : -1].log_softmax(-1)
            assert choice["token_ids"] == logprobs.argmax(-1).tolist()
            found = torch.tensor(choice["logprobs"]["token_logprobs"])
            torch.testing.assert_close(found, logprobs.amax(-1), atol=1e-4, rtol=0)
        assert usage["recurrence"]["num_steps"] == k
        assert ("x-num-steps-warning" in answer.headers) == (k > trained)
        assert ("warnings" in answer.json()) == (k > trained)


def test_a_sweep_scores_every_k(zoo: Zoo) -> None:
    answer = zoo.post("/v1/score", prompt=[PROMPT], num_steps=[1, 3]).json()["scores"][0]
    for k, logits in zoo.model.logits(torch.tensor([PROMPT]), [1, 3]).items():
        expected = logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
        found = torch.tensor(answer["token_logprobs"][str(k)][1:])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_exits(zoo: Zoo) -> None:
    """Tokens that leave at once take one step and are those of K = 1; the trained gates where there are some."""
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": 3,
        "temperature": 0,
        "num_steps": 4,
        "ignore_eos": True,
    }
    exiting = {**body, "exit": {"criterion": "latent-diff", "threshold": 1e9}}
    choice = zoo.post("/v1/completions", **exiting).json()["choices"][0]
    assert choice["recurrence"]["steps"] == [1] * 3
    if not zoo.model.denoiser.model.depends_on_num_steps:  # LoopFormer's first step of four is none of one
        plain = zoo.post("/v1/completions", **{**body, "num_steps": 1}).json()["choices"][0]
        assert choice["text"] == plain["text"]
    for criterion in ("gate", "weighted", "halt"):
        gated = {**body, "exit": {"criterion": criterion}}
        answer = zoo.client.post("/v1/completions", json=gated)
        assert answer.status_code == (200 if zoo.family in GATED else 400), answer.text
        if zoo.family not in GATED:
            assert "gate" in answer.json()["error"]["message"]


def test_streamed_steps_and_chat(zoo: Zoo) -> None:
    """Read-outs of steps between, and a conversation through the template, whole and in pieces."""
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": 2,
        "temperature": 0,
        "num_steps": 3,
        "stream": True,
        "ignore_eos": True,
    }
    lines = zoo.post("/v1/completions", **body, stream_options={"include_steps": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [chunk["recurrence"]["step"] for chunk in chunks if not chunk["choices"]] == [1, 2, 1, 2]
    chat: dict[str, Any] = {
        "messages": [{"role": "user", "content": "the word"}], "num_steps": 2, "max_tokens": 4, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip
    said = zoo.post("/v1/chat/completions", **chat).json()["choices"][0]["message"]["content"]
    lines = zoo.post("/v1/chat/completions", **chat, stream=True).text.splitlines()
    pieces = [json.loads(line[6:])["choices"] for line in lines if line.startswith("data: {")]
    assert "".join(c["delta"].get("content") or "" for choices in pieces for c in choices) == said
    tokenizer = zoo.model.tokenizer
    assert tokenizer is not None
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    ids = tokenizer.encode(text := template.render(chat["messages"], {}))
    assert text == "user: the word assistant:"
    del chat["messages"]
    plain = zoo.post("/v1/completions", prompt=ids, **chat).json()
    assert plain["choices"][0]["text"] == said
