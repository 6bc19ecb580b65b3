"""The same scores in process and through lm-eval's own HTTP client against the server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from rdlm.checkpoint import save
from rdlm.config import CheckpointConfig
from rdlm.registry import build
from rdlm.tokenizer import train_tokenizer

pytest.importorskip("lm_eval", reason="the harness is not installed")
pytest.importorskip("transformers", reason="lm-eval's HTTP client needs it to tokenise")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from eval.harness import RecurrentLM

pytestmark = pytest.mark.multiproc
PAIRS = [
    ("in the", " beginning was"), ("and it came to pass in those", " days"), ("", "the word was with"), ("with", " god"),
    ("in the beginning was the word and the word was " * 4, "with god"), ("xyz", " 123 xyz"), ("it", " came to pass"), ("the", " word"),
]  # fmt: skip
LONG = "in the beginning was the word and the word was with xyz " * 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained loud model of 512 positions, twice the server's prefill chunk."""
    tokenizer = train_tokenizer("bpe", iter(["in the beginning was the word and the word was with god"] * 20), 270)
    shape = {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1, "max_seq_len": 512}
    model = {"family": "huginn", "vocab_size": 270, "d_model": 32, "num_heads": 2, "mlp_width": 64, **shape}
    settings = {"model": model, "objective": {"name": "onestep"}, "recurrence": {"default_steps": 2, "max_steps": 8}}
    config = CheckpointConfig.model_validate({"name": "tiny", **settings})
    denoiser, loud = build(config, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3 if "wte" in name else parameter.shape[1] ** -0.5, generator=loud)
    return save(tmp_path_factory.mktemp("http") / "tiny", denoiser, config, tokenizer)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The server on loopback, with the cache that keeps every step's keys."""
    port_file = folder.parent / "port"
    options = ["--checkpoint", str(folder), "--port", "0", "--port-file", str(port_file), "--kv-cache", "full"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rdlm", "serve", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield _ready(process, port_file)
    finally:
        process.kill()  # it holds nothing that a clean end would save
        process.wait(60)


def _ready(process: subprocess.Popen[bytes], port_file: Path) -> str:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            found = f"http://127.0.0.1:{int(port_file.read_text())}"
            if httpx.get(f"{found}/ready").status_code == 200:
                return found
        except (FileNotFoundError, ValueError, httpx.TransportError):
            pass  # it has not bound its port, or does not listen yet
        time.sleep(0.1)
    raise AssertionError("the server did not become ready")


def _client(url: str, folder: Path, k: int, batch_size: int, concurrent: int) -> Any:
    arguments = {"model": f"tiny:k{k}", "base_url": f"{url}/v1/completions", "tokenizer": str(folder / "tokenizer")}
    more = {"tokenizer_backend": "huggingface", "num_concurrent": concurrent, "batch_size": batch_size, "max_length": 512}
    return get_model("local-completions").create_from_arg_obj({**arguments, **more})


def _asked(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=0, metadata=("task", i, 1))  # type: ignore[arg-type]
        for i, given in enumerate(arguments)
    ]


SETTINGS = [pytest.param(4, 4, 1)] + [
    pytest.param(k, batch_size, concurrent, marks=pytest.mark.slow)
    for k in (1, 4, 8)
    for batch_size in (1, 4)
    for concurrent in (1, 8)
    if (k, batch_size, concurrent) != (4, 4, 1)
]


@pytest.mark.parametrize(("k", "batch_size", "concurrent"), SETTINGS)
def test_scores_in_process_equal_scores_over_http(url: str, folder: Path, k: int, batch_size: int, concurrent: int) -> None:
    asked = _asked("loglikelihood", PAIRS)
    far = _client(url, folder, k, batch_size, concurrent).loglikelihood(asked, disable_tqdm=True)
    near = RecurrentLM(checkpoint=str(folder), num_steps=k, batch_size=4).loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in far] == [greedy for _, greedy in near]
    for (here, _), (there, _) in zip(near, far, strict=True):
        assert here == pytest.approx(there, abs=1e-4)


def test_texts_and_long_prompts_too(url: str, folder: Path) -> None:
    """A prompt of several prefill chunks needs the full cache, which this server has."""
    client, model = _client(url, folder, 8, 1, 1), RecurrentLM(checkpoint=str(folder), num_steps=8, kv_cache="full")
    assert 256 < len(model.text.encode(LONG)) < 500
    asked = _asked("loglikelihood", [(LONG, " god")])
    far, near = (m.loglikelihood(asked, disable_tqdm=True)[0][0] for m in (client, model))
    assert far == pytest.approx(near, abs=1e-4)
    texts = _asked("generate_until", [(p, {"until": ["\n"], "max_gen_toks": 10}) for p in ("in the", "and the word", LONG)])
    assert client.generate_until(texts, disable_tqdm=True) == model.generate_until(texts, disable_tqdm=True)
