"""The same scores in process and through lm-eval's own HTTP client against the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from rdlm.checkpoints.folder import save
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import train_tokenizer
from rdlm.registry import build

pytest.importorskip("lm_eval", reason="the harness is not installed")
pytest.importorskip("transformers", reason="lm-eval's HTTP client needs it to tokenise")
pytest.importorskip("tenacity", reason="lm-eval's HTTP client is not installed: pip install lm-eval[api]")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from eval.texts.lm_eval_adapter import RecurrentLM

pytestmark = pytest.mark.multiproc
REPO = Path(__file__).parents[2]
PAIRS = [
    ("in the", " beginning was"), ("and it came to pass in those", " days"), ("", "the word was with"),
    ("with", " god"),
    ("in the beginning was the word and the word was " * 4, "with god"), ("xyz", " 123 xyz"),
    ("it", " came to pass"), ("the", " word"),
]  # fmt: skip
LONG = "in the beginning was the word and the word was with xyz " * 16


def _loud(folder: Path, **document: Any) -> Path:
    """An untrained checkpoint whose answers depend on everything."""
    tokenizer = train_tokenizer(
        "bpe", iter(["in the beginning was the word and the word was with god"] * 20), 270
    )
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    shape = {
        "vocab_size": 270,
        "d_model": 32,
        "num_heads": 2,
        "mlp_width": 64,
        "max_seq_len": 512,
        **document.pop("model"),
    }
    recurrence = {"default_steps": 2, "max_steps": 8}
    config = CheckpointConfig.model_validate(
        {"name": "tiny", "model": shape, "recurrence": recurrence, **document}
    )
    denoiser, loud = build(config, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3 if "wte" in name else parameter.shape[1] ** -0.5, generator=loud)
    return save(folder, denoiser, config, tokenizer)


@contextmanager
def _server(folder: Path, *more: str) -> Iterator[str]:
    """Address of a server on loopback."""
    port_file = folder.parent / "port"
    options = ["--checkpoint", str(folder), "--port", "0", "--port-file", str(port_file), *more]
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 512 positions, twice the server's prefill chunk."""
    model = {"family": "huginn", "num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1}
    return _loud(tmp_path_factory.mktemp("http") / "tiny", model=model, objective={"name": "onestep"})


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """With the cache that keeps every step's keys."""
    with _server(folder, "--kv-cache", "full") as address:
        yield address


@pytest.fixture(scope="module")
def masked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of two layers each."""
    model = {"family": "masked", "num_layers": 4, "noise_conditioning": True}
    blocks = {"num_blocks": 2, "overlap": 0.0}
    return _loud(
        tmp_path_factory.mktemp("masked") / "tiny", model=model, objective={"name": "masked"}, blocks=blocks
    )


@pytest.fixture(scope="module")
def masked_url(masked_folder: Path) -> Iterator[str]:
    with _server(masked_folder) as address:
        yield address


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


def _client(url: str, folder: Path, model: str = "tiny", kind: str = "local-completions", **more: Any) -> Any:
    route = "chat/completions" if "chat" in kind else "completions"
    given = {
        "model": model,
        "base_url": f"{url}/v1/{route}",
        "tokenizer": str(folder / "tokenizer"),
        "max_length": 512,
    }
    return get_model(kind).create_from_arg_obj({**given, "tokenizer_backend": "huggingface", **more})


def _asked(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=0, metadata=("task", i, 1))  # type: ignore[arg-type]
        for i, given in enumerate(arguments)
    ]


UNTIL = {"until": ["\n"], "max_gen_toks": 10}
SCORED = _asked("loglikelihood", [*PAIRS, (LONG, " god")])
ROLLED = _asked("loglikelihood_rolling", [("in the beginning",), (LONG * 3,), ("xyz",)])
WRITTEN = _asked("generate_until", [(text, UNTIL) for text in ("in the", "and the word", "x", LONG, "with")])
SETTINGS = [pytest.param(4, 4, 1)] + [
    pytest.param(k, batch_size, concurrent, marks=pytest.mark.slow)
    for k in (1, 4, 8)
    for batch_size in (1, 4)
    for concurrent in (1, 8)
    if (k, batch_size, concurrent) != (4, 4, 1)
]


@pytest.mark.parametrize(("k", "batch_size", "concurrent"), SETTINGS)
def test_in_process_equals_http(url: str, folder: Path, k: int, batch_size: int, concurrent: int) -> None:
    """Log-likelihoods, rolling ones over several windows, and texts; prompts of several prefill chunks among
    them."""
    far = _client(url, folder, f"tiny:k{k}", batch_size=batch_size, num_concurrent=concurrent)
    # lm-eval's HTTP client keeps a position for the token it must ask for, and one for the context of a
    # window.
    near = RecurrentLM(checkpoint=str(folder), num_steps=k, batch_size=4, kv_cache="full", max_length=510)
    assert 256 < len(near.text.encode(LONG)) < 500
    there, here = (model.loglikelihood(SCORED, disable_tqdm=True) for model in (far, near))
    assert [greedy for _, greedy in there] == [greedy for _, greedy in here]
    assert [value for value, _ in there] == pytest.approx([value for value, _ in here], abs=1e-4, rel=0)
    there, here = (model.loglikelihood_rolling(ROLLED, disable_tqdm=True) for model in (far, near))
    for value, expected, (text,) in zip(there, here, (request.args for request in ROLLED), strict=True):
        assert value == pytest.approx(expected, abs=1e-4 * max(1, len(near.text.encode(text)) / 100), rel=0)
    assert far.generate_until(WRITTEN, disable_tqdm=True) == near.generate_until(WRITTEN, disable_tqdm=True)


def test_masked_models_have_the_same_scores_and_texts_over_http(masked_url: str, masked_folder: Path) -> None:
    """Exact likelihoods, one token a step from left to right, whatever K is; texts at K. lm-eval's client
    sends a seed of its own."""
    far = _client(masked_url, masked_folder, "tiny:k4", batch_size=4, num_concurrent=4, max_length=64)
    given = {"checkpoint": str(masked_folder), "seed": 1234, "batch_size": 4, "max_length": 62}
    near = RecurrentLM(num_steps=4, estimator="left_to_right", **given)  # type: ignore[arg-type]
    asked = _asked("loglikelihood", [*PAIRS[:4], *PAIRS[5:]])
    there, here = (model.loglikelihood(asked, disable_tqdm=True) for model in (far, near))
    assert [greedy for _, greedy in there] == [greedy for _, greedy in here]
    assert [value for value, _ in there] == pytest.approx([value for value, _ in here], abs=1e-4, rel=0)
    rolled = _asked(
        "loglikelihood_rolling", [("in the beginning",), ("in the beginning was the word " * 12,)]
    )
    there, here = (model.loglikelihood_rolling(rolled, disable_tqdm=True) for model in (far, near))
    assert (
        there == pytest.approx(here, abs=1e-3, rel=0)
        and len(near.text.encode("in the beginning was the word " * 12)) > 63
    )
    written = _asked("generate_until", [(text, UNTIL) for text in ("in the", "and the word", "x", "with")])
    texts = far.generate_until(written, disable_tqdm=True)
    assert texts == near.generate_until(written, disable_tqdm=True)
    other = RecurrentLM(num_steps=1, estimator="left_to_right", **given)  # type: ignore[arg-type]
    assert other.loglikelihood(asked, disable_tqdm=True) == near.loglikelihood(asked, disable_tqdm=True)
    assert other.generate_until(written, disable_tqdm=True) != texts


FAMILIES: dict[str, dict[str, Any]] = {
    "paper in blocks": {
        "model": {"family": "llama", "num_layers": 4, "noise_conditioning": True}, "objective": {"name": "paper"},
        "blocks": {"num_blocks": 2},
    },
    "evidence": {
        "model": {"family": "huginn", "num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1,
        "noise_conditioning": True},
        "objective": {"name": "evidence"},
    },
    "next token": {"model": {"family": "llama", "num_layers": 2}, "objective": {"name": "next_token"}},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["paper in blocks", *(pytest.param(n, marks=pytest.mark.slow) for n in list(FAMILIES)[1:])]
)
def test_other_families_have_the_same_scores_and_texts_over_http(name: str, tmp_path: Path) -> None:
    """Sampling models: likelihoods at K = 1, texts drawn through K = 4 levels with lm-eval's seed."""
    folder = _loud(tmp_path / "tiny", **FAMILIES[name])
    with _server(folder) as address:
        k = 1 if name == "next token" else 4
        far = _client(address, folder, f"tiny:k{k}", batch_size=4, num_concurrent=4, max_length=120)
        near = RecurrentLM(checkpoint=str(folder), num_steps=k, seed=1234, batch_size=4, max_length=118)
        asked = _asked("loglikelihood", PAIRS)
        there, here = (model.loglikelihood(asked, disable_tqdm=True) for model in (far, near))
        assert [greedy for _, greedy in there] == [greedy for _, greedy in here]
        assert [value for value, _ in there] == pytest.approx([value for value, _ in here], abs=1e-4, rel=0)
        warm = {**UNTIL, "do_sample": True, "temperature": 0.8}
        written = _asked("generate_until", [(text, warm) for text in ("in the", "and the word", "x", "with")])
        assert far.generate_until(written, disable_tqdm=True) == near.generate_until(
            written, disable_tqdm=True
        )


def test_k_by_header_and_by_gen_kwargs(url: str, folder: Path) -> None:
    """The two other ways to name K: a header for what has a fixed body, a field for texts."""
    few, many = (
        RecurrentLM(checkpoint=str(folder), num_steps=k, batch_size=4, kv_cache="full") for k in (2, 7)
    )
    asked = SCORED[:3]
    by_header = _client(url, folder, header={"X-Num-Steps": "7"}).loglikelihood(asked, disable_tqdm=True)
    expected = many.loglikelihood(asked, disable_tqdm=True)
    assert [value for value, _ in by_header] == pytest.approx(
        [value for value, _ in expected], abs=1e-4, rel=0
    )
    assert [value for value, _ in few.loglikelihood(asked, disable_tqdm=True)] != pytest.approx(
        [v for v, _ in expected], abs=0.01
    )
    by_field = _asked("generate_until", [(text, {**UNTIL, "num_steps": 7}) for text in ("in the", "with")])
    plain = _asked("generate_until", [(text, UNTIL) for text in ("in the", "with")])
    assert _client(url, folder).generate_until(by_field, disable_tqdm=True) == many.generate_until(
        plain, disable_tqdm=True
    )


def test_the_remote_tokenizer_is_the_checkpoints(url: str, folder: Path) -> None:
    """What ``tokenizer_backend=auto``, lm-eval's default, makes of this server."""
    remote = _client(url, folder, "tiny:k4", tokenizer=None, tokenizer_backend="auto")
    assert (
        remote.tokenizer_backend == "remote"
        and remote.eot_token_id == RecurrentLM(checkpoint=str(folder)).eot_token_id
    )
    local = _client(url, folder, "tiny:k4")
    assert remote.loglikelihood(SCORED[:3], disable_tqdm=True) == local.loglikelihood(
        SCORED[:3], disable_tqdm=True
    )


def test_chat_completions_answer_the_rendered_template(url: str, folder: Path) -> None:
    """local-chat-completions with --apply_chat_template, which sends messages and reads their content."""
    client = _client(url, folder, "tiny:k4", "local-chat-completions", tokenizer_backend=None)
    messages = client.apply_chat_template([{"role": "user", "content": "the word"}])
    asked = _asked("generate_until", [(messages, UNTIL)])
    model = RecurrentLM(checkpoint=str(folder), num_steps=4, kv_cache="full")
    rendered = _asked("generate_until", [("<user>the word<assistant>", UNTIL)])
    assert client.generate_until(asked, disable_tqdm=True) == model.generate_until(
        rendered, disable_tqdm=True
    )


def test_an_end_of_text_the_model_predicts_does_not_cut_the_score(url: str, folder: Path) -> None:
    """lm-eval drops the entry of the one drawn token unseen: it must be there even where that token is an end
    of text."""
    prompts = [[first, second] for first in range(5, 69) for second in range(5, 21)]
    body = {"model": "tiny:k4", "prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 0}
    choices = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"]
    ended = [prompts[c["index"]] for c in choices if c["finish_reason"] == "stop"]
    assert ended, "this random model says no end after any of these"
    asked = [(("", ""), [first], [second]) for first, second in ended]
    far = _client(url, folder, "tiny:k4")._loglikelihood_tokens(asked)
    near = RecurrentLM(checkpoint=str(folder), num_steps=4, batch_size=4)._loglikelihood_tokens(
        asked, disable_tqdm=True
    )
    assert [value for value, _ in far] == pytest.approx([value for value, _ in near], abs=1e-4, rel=0)
    assert all(value < -0.01 for value, _ in far)


TASKS = {
    "picks": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    },
    "reads": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "writes": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "x",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [("", "kv_cache=full"), ("masked_", "estimator=left_to_right,seed=1234")],
    ids=["huginn", "masked"],
)
def test_the_commands_agree(request: pytest.FixtureRequest, model: str, options: str, tmp_path: Path) -> None:
    """`lm_eval --model local-completions` as docs/serving.md has it beside `rdlm eval lm-eval` on the same
    tasks, sample by sample."""
    url, folder = (request.getfixturevalue(f"{model}{name}") for name in ("url", "folder"))
    rows = [
        {"question": f"{context or 'god'} ", "choices": [word, "god"], "label": 0} for context, word in PAIRS
    ]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
    }
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **task}))
    tokenizer = f"tokenizer={folder / 'tokenizer'},tokenizer_backend=huggingface"
    given = f"model=tiny:k4,base_url={url}/v1/completions,{tokenizer}"
    far = [
        "lm_eval",
        "--model",
        "local-completions",
        "--model_args",
        f"{given},num_concurrent=8,max_length=512",
    ]
    near = [
        "rdlm",
        "eval",
        "lm-eval",
        "--model",
        "rdlm",
        "--model_args",
        f"checkpoint={folder},num_steps=4,max_length=510,{options}",
    ]
    found = []
    for name, command in (("far", far), ("near", near)):
        out = [
            "--output_path",
            str(tmp_path / name),
            "--log_samples",
            "--include_path",
            str(tmp_path),
            "--tasks",
            ",".join(TASKS),
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "cache"),
        }
        ended = subprocess.run(
            [sys.executable, "-m", *command, *out],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
            cwd=REPO,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        found.append({task: _samples(tmp_path / name, task) for task in TASKS})
    assert all(len(samples) == len(PAIRS) for samples in found[0].values())
    for task in TASKS:
        for there, here in zip(found[0][task], found[1][task], strict=True):
            if task == "writes":
                assert there == here
            else:
                assert _numbers(there) == pytest.approx(_numbers(here), abs=1e-4, rel=0)


def _samples(folder: Path, task: str) -> list[Any]:
    """Responses of a task in the order of its documents."""
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [record["resps"] for record in sorted(records, key=lambda record: record["doc_id"])]


def _numbers(response: Any) -> list[float]:
    if isinstance(response, list):
        return [value for part in response for value in _numbers(part)]
    return (
        [float(response)]
        if response not in ("True", "False", True, False)
        else [float(str(response) == "True")]
    )
