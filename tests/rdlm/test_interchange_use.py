"""An imported Huginn is a checkpoint like any other: the reference's logits, answers over HTTP, `rdlm eval
nll`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from litestar.testing import TestClient
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints.convert.huginn import export_huginn
from rdlm.cli import app, run
from rdlm.diffusion.samplers import run as iterate
from rdlm.nn.attention import CausalContext
from serve.api.app import create_app
from serve.engine.engine import Engine
from serve.loading import load_served
from serve.settings import EngineSettings, HttpSettings
from train.data.prepare import Preparation, prepare

SPECIAL = ["<|begin_text|>", "<|end_text|>", "<|begin_header|>", "<|end_header|>", "<|end_turn|>", "<|pad|>"]
TEMPLATE = (  # that of Huginn-0125
    "{% for message in messages %}{% set content = '<|begin_header|>' + ('Huginn' if message['role'] == "
    "'assistant' else "
    "message['role']) + '<|end_header|>\n\n' + message['content'] | trim + '<|end_turn|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin_header|>Huginn<|end_header|>\n\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level BPE of 300 and Huginn's special tokens after them, in the files transformers writes.
    Returns the special ids."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog and the raven thinks about it " * 5], trainer
    )
    made.add_special_tokens(SPECIAL)
    made.save(str(folder / "tokenizer.json"))
    ids = {token: made.token_to_id(token) for token in SPECIAL}
    added = {str(i): {"content": token, "special": True, "lstrip": False} for token, i in ids.items()}
    config = {
        "added_tokens_decoder": added,
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[5],
    }
    config |= {
        "chat_template": TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ends = {"eos_token_id": [ids["<|end_text|>"], ids["<|end_turn|>"]], "bos_token_id": ids["<|begin_text|>"]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return ids


@pytest.fixture
def golden(shared_data: Path) -> Path:
    folder = shared_data.parent / "golden" / "huginn_tiny"
    if not folder.is_dir():
        pytest.skip(f"no golden outputs at {folder}")
    return folder


def imported(source: Path, out: Path) -> Path:
    assert (
        run(app, ["import", "huginn", str(source), str(out), "--name", "raven", "--zero-state"], "rdlm") == 0
    )
    return out


def test_golden_logits_through_the_command(golden: Path, tmp_path: Path) -> None:
    """seal-rg/recurrent-pretraining computed these logits in fp32 from a random checkpoint; 5e-6 is fp32
    rounding over 16 steps."""
    folder = imported(golden, tmp_path / "m")
    model, outputs = checkpoint.load(folder).denoiser.model, load_file(golden / "outputs.safetensors")
    ctx = CausalContext(outputs["input_ids"].shape[1])
    with torch.no_grad():
        e = model.encode(outputs["input_ids"], ctx)
        for name, start in (("zero_init", model.initial_state(e)), ("given_state", outputs["input_states"])):
            for k in (1, 4, 16):
                state = iterate(lambda s, _: model.core(s, e, None, ctx), start, k)
                got = model.logits(model.decode(state, ctx))
                torch.testing.assert_close(got, outputs[f"logits_{name}_K{k}"], atol=5e-6, rtol=0)
    theirs = export_huginn(folder, tmp_path / "theirs", shard_bytes=1 << 40)
    given, written = load_file(golden / "model.safetensors"), load_file(theirs / "model.safetensors")
    torch.testing.assert_close(written.pop("freqs_cis"), given.pop("freqs_cis"), atol=1e-6, rtol=0)
    del given["lm_head.weight"]  # the same as the token table
    assert written.keys() == given.keys() and all(torch.equal(written[name], given[name]) for name in given)
    stated, said = (json.loads((where / "config.json").read_text()) for where in (golden, theirs))
    ours = {
        "rdlm",
        "auto_map",
        "padding_multiple",
        "torch_dtype",
        "state_init",
        "init_values",
    }  # --zero-state is in the last two
    assert {key: stated.get(key) for key in said.keys() - ours} == {
        key: said[key] for key in said.keys() - ours
    }


@pytest.fixture(params=["golden", "tiny"])
def source(request: pytest.FixtureRequest, tmp_path: Path, tiny, tiny_config) -> Path:
    """A Huginn of 320 tokens in Hugging Face layout with the special tokens and the template of Huginn-0125."""
    folder = tmp_path / "source"
    if request.param == "golden":
        shutil.copytree(request.getfixturevalue("golden"), folder)
    else:
        shape = {"vocab_size": 320, "max_seq_len": 128}
        ours = checkpoint.save(
            tmp_path / "t", tiny("huginn", "bptt", **shape), tiny_config("huginn", "bptt", **shape), None
        )
        export_huginn(ours, folder, shard_bytes=50_000)
    write_tokenizer(folder)
    return folder


def test_imported_model_serves_and_scores(source: Path, tmp_path: Path) -> None:
    folder = imported(source, tmp_path / "m")
    tokenizer = checkpoint.load(folder).tokenizer
    assert tokenizer is not None and tokenizer.chat_template == TEMPLATE
    special = tokenizer.special_tokens
    assert (tokenizer.bos_id, tokenizer.eos_id) == (special["<|begin_text|>"], special["<|end_text|>"])
    assert tokenizer.encode("<|end_turn|>the fox")[0] == special["<|end_turn|>"]
    settings = EngineSettings(max_slots=2, chunk=32, prefill_rows=64)
    with (
        Engine(lambda: load_served(folder, settings)) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        body = {"prompt": "the raven", "max_tokens": 3, "num_steps": 4, "temperature": 0}
        first, second = (
            client.post("/v1/completions", json={**body, "seed": seed}).json() for seed in (1, 2)
        )
        assert (
            first["choices"][0]["text"] == second["choices"][0]["text"]
        )  # from zero, greedy depends on no seed
        asked = {
            "messages": [{"role": "user", "content": " the fox "}],
            "max_tokens": 8,
            "num_steps": 1,
            "temperature": 0,
        }
        for token, reason in (("<|end_turn|>", "stop"), ("<|end_text|>", "stop"), ("<|pad|>", "length")):
            answer = client.post(
                "/v1/chat/completions", json={**asked, "logit_bias": {str(special[token]): 100}}
            ).json()
            assert answer["choices"][0]["finish_reason"] == reason, token
        text = (
            "<|begin_text|><|begin_header|>user<|end_header|>\n\nthe "
            "fox<|end_turn|><|begin_header|>Huginn<|end_header|>\n\n"
        )
        assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode(text))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 400)
    wanted = Preparation(
        str(tmp_path / "text.txt"),
        tmp_path / "data",
        tokenizer=str(folder / "tokenizer"),
        valid_fraction=0.5,
        test_fraction=0,
    )
    prepare(wanted, progress=False)
    report = tmp_path / "nll.json"
    command = [
        "eval",
        "nll",
        "--checkpoint",
        str(folder),
        "--data",
        str(tmp_path / "data"),
        "--num-steps",
        "1,4",
    ]
    assert run(app, [*command, "--max-tokens", "256", "--out", str(report)], "rdlm") == 0
    results = json.loads(report.read_text())["results"]
    assert [r["K"] for r in results] == [1, 4] and all(
        4 < r["nll"] < 9 for r in results
    )  # untrained: about log 320 = 5.8
