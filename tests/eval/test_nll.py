"""`rdlm eval nll` against closed forms, and its refusals."""

import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eval.metrics.nll import evaluate_nll
from eval.options import check_steps
from rdlm.checkpoints.folder import Loaded, save
from rdlm.cli import app, run
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.token_shards import TokenStore
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError
from rdlm.models.base import Backbone, Take
from rdlm.nn.attention import AttentionContext
from rdlm.nn.layers import Condition, TokenTable
from rdlm.objectives import Objective
from rdlm.objectives.next_token import NextToken
from train.data.prepare import Preparation, prepare

VOCAB = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rows = [{"text": f"Verse {i}: é and {i * i} foxes." * (1 + i % 4)} for i in range(200)]
    (root / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        Preparation(str(root / "d.jsonl"), root / "out", vocab_size=VOCAB, valid_fraction=0.4), progress=False
    )
    return root / "out"


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Tokenizer:
    return TokenStore(data, "valid").tokenizer()


@pytest.fixture
def loaded(tiny: Callable[..., Objective], tiny_config: Callable, tokenizer: Tokenizer) -> Loaded:
    return Loaded(
        tiny("huginn", "onestep", vocab_size=VOCAB).eval(),
        tiny_config("huginn", "onestep", vocab_size=VOCAB),
        tokenizer,
    )


def test_a_model_that_knows_nothing_scores_log_vocabulary(loaded: Loaded, data: Path) -> None:
    with torch.no_grad():
        loaded.denoiser.model.head.weight.zero_()
    store = TokenStore(data, "valid")
    report = evaluate_nll(loaded, store.windows(32, None, 7), (1, 4))
    targets = store.read(1, store.num_windows(32) * 32)
    text = targets[targets != store.manifest.eos_id]
    num_bytes = sum(len(loaded.tokenizer.token_bytes()[i]) for i in text)  # type: ignore[union-attr]
    assert report["tokens"] == len(targets) and report["bytes"] == num_bytes and 0 < len(text) < len(targets)
    for result in report["results"]:
        assert result["nll"] == pytest.approx(math.log(VOCAB), abs=1e-5)
        assert result["perplexity"] == pytest.approx(VOCAB, rel=1e-4)
        assert result["bits_per_byte"] == pytest.approx(math.log2(VOCAB) * len(text) / num_bytes, rel=1e-5)
        characters = len(loaded.tokenizer.decode(text.tolist()))  # type: ignore[union-attr]
        assert characters < num_bytes
        assert result["bits_per_character"] == pytest.approx(
            result["bits_per_byte"] * num_bytes / characters, rel=0.01
        )
        assert result["nll_interval"] == pytest.approx([math.log(VOCAB)] * 2, abs=1e-5)


class Bigram(Backbone):
    """Logits are ln(count(token, next) + 1): the state is the one-hot token, the read-out the table of
    counts. A core step keeps the state, so every K says the same."""

    noise_embedding, lm_head, core_layers = None, None, nn.ModuleList()

    def __init__(self, text: torch.Tensor, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.wte = vocab_size, TokenTable(vocab_size, vocab_size)
        counts = torch.zeros((vocab_size, vocab_size), dtype=torch.float64)  # [next, token]
        counts.index_put_(
            (text[1:], text[:-1]), torch.ones(len(text) - 1, dtype=torch.float64), accumulate=True
        )
        self.wte.weight.data = (counts + 1).log().float()

    def encode(self, input_ids: torch.Tensor, ctx: AttentionContext) -> torch.Tensor:
        return nn.functional.one_hot(input_ids, self.vocab_size).float()

    def core(
        self, state: torch.Tensor, e: torch.Tensor, cond: Condition | None, ctx: AttentionContext
    ) -> torch.Tensor:
        return e

    def decode(self, state: torch.Tensor, ctx: AttentionContext) -> torch.Tensor:
        return state

    def init_weights(self, generator: torch.Generator, take: Take | None = None) -> None:
        raise NotImplementedError


def test_a_bigram_model_scores_what_its_counts_say(
    tiny_config: Callable, tokenizer: Tokenizer, data: Path
) -> None:
    """p(b | a) = (count(a, b) + 1) / (count(a) + V), multiplied out in plain Python over the same windows."""
    store = TokenStore(data, "valid")
    config, train = (
        tiny_config("huginn", "onestep", vocab_size=VOCAB),
        TokenStore(data, "train").read(0, 3000).tolist(),
    )
    denoiser = NextToken(config, Bigram(torch.tensor(train), VOCAB)).eval()
    report = evaluate_nll(Loaded(denoiser, config, tokenizer), store.windows(32, 640, 8), (1, 4))
    pairs, singles = Counter(pairwise(train)), Counter(train[:-1])
    read = store.read(0, 641).tolist()
    nats = [-math.log((pairs[a, b] + 1) / (singles[a] + VOCAB)) for a, b in pairwise(read)]
    assert report["tokens"] == len(nats) == 640 and 1 < sum(nats) / 640 < math.log(VOCAB) - 1
    for result in report["results"]:
        assert result["nll"] == pytest.approx(sum(nats) / 640, rel=1e-5)
        assert report["window_nll"][str(result["K"])] == pytest.approx(
            [sum(nats[i : i + 32]) for i in range(0, 640, 32)], abs=1e-3
        )
    text = [i for i, token in enumerate(read[1:]) if token != store.manifest.eos_id]
    num_bytes = sum(len(tokenizer.token_bytes()[read[i + 1]]) for i in text)
    assert report["results"][0]["bits_per_byte"] == pytest.approx(
        sum(nats[i] for i in text) / math.log(2) / num_bytes, rel=1e-5
    )


def test_nll_is_the_mean_of_the_scored_tokens_whatever_the_batch_size(loaded: Loaded, data: Path) -> None:
    store = TokenStore(data, "valid")
    rows = store.rows(np.arange(5), 32)
    expected = -loaded.denoiser.token_logprobs(rows.inputs, rows.targets, (2,))[2].mean()
    for batch_size in (1, 5):
        report = evaluate_nll(loaded, store.windows(32, 160, batch_size), (2,))
        assert report["results"][0]["nll"] == pytest.approx(float(expected), abs=1e-5)
        assert report["windows"] == 5 == len(report["window_nll"]["2"])


def test_masked_positions_do_not_count(loaded: Loaded, data: Path) -> None:
    rows = TokenStore(data, "valid").rows(np.arange(4), 32)
    rows.mask[:, 10:] = False
    rows.targets[:, 10:] = 5
    report = evaluate_nll(loaded, [rows], (1,))
    other = evaluate_nll(
        loaded,
        [
            type(rows)(
                rows.inputs, rows.targets.clamp(max=5) * ~rows.mask + rows.targets * rows.mask, rows.mask
            )
        ],
        (1,),
    )
    assert report["tokens"] == 40 and report["results"] == other["results"]


def test_intervals_are_paired_and_shrink_with_more_windows(loaded: Loaded, data: Path) -> None:
    store = TokenStore(data, "valid")
    torch.nn.init.normal_(loaded.denoiser.model.adapter.weight, std=0.3)  # type: ignore[union-attr]
    few, many = (evaluate_nll(loaded, store.windows(16, n, 16), (1, 4))["results"] for n in (160, None))
    width = [r[1]["nll_interval"][1] - r[1]["nll_interval"][0] for r in (few, many)]
    assert 0 < width[1] < width[0]
    for _, last in (few, many):
        assert last["nll_interval"][0] < last["nll"] < last["nll_interval"][1]
        low, high = last["delta_nll_interval"]
        assert low < last["delta_nll"] < high and last["delta_nll"] != 0
    assert evaluate_nll(loaded, store.windows(16, 160, 16), (1, 4))["results"] == few


def test_which_k_are_taken(tiny_config: Callable[..., CheckpointConfig]) -> None:
    cases = {
        ("huginn", "onestep"): (1, 2, 4, 8, 16, 32),
        ("huginn", "evidence"): (1,),
        ("llama", "next_token"): (1,),
    }
    for arguments, expected in cases.items():
        assert check_steps(None, tiny_config(*arguments)) == expected
    assert check_steps([4, 1, 4], tiny_config()) == (1, 4)
    once = tiny_config("llama", "next_token")
    assert once.recurrence.max_steps > 1 and (once.max_steps, once.default_steps) == (1, 1), (
        "its layers run once"
    )
    with pytest.raises(UserError, match="takes 1 to 1"):
        check_steps([2], once)


@pytest.fixture
def folder(loaded: Loaded, tmp_path: Path) -> Path:
    return save(tmp_path / "model", loaded.denoiser, loaded.config, loaded.tokenizer)


def _run(*arguments: object) -> int:
    return run(app, ["eval", "nll", *map(str, arguments)], "rdlm")


def test_command_writes_results_with_their_provenance_and_a_figure(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--checkpoint",
        folder,
        "--data",
        data,
        "--num-steps",
        "4,1",
        "--max-tokens",
        640,
        "--seed",
        3,
    ]
    assert _run(*arguments, "--out", tmp_path / "r" / "nll.json", "--plot", tmp_path / "r" / "nll.png") == 0
    report = json.loads((tmp_path / "r" / "nll.json").read_text())
    assert [r["K"] for r in report["results"]] == [1, 4] and report["seed"] == 3 and report["tokens"] == 640
    assert all(r["estimator"].startswith("normalised") for r in report["results"])
    assert {"command", "git_commit", "threads", "cpu", "torch"} <= report["provenance"].keys()
    assert (
        report["checkpoint"]["weights_sha256"]
        and report["data"]["manifest_sha256"] == TokenStore(data, "valid").manifest_sha256
    )
    assert (tmp_path / "r" / "nll.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(f.name for f in (tmp_path / "r").iterdir()) == ["nll.json", "nll.png"]
    assert f"{report['results'][1]['nll']:.4f}" in capsys.readouterr().out
    assert _run(*arguments, "--out", tmp_path / "r" / "nll.json", "--per-window") == 0
    detailed = json.loads((tmp_path / "r" / "nll.json").read_text())
    assert (
        detailed["results"] == report["results"] and len(detailed["window_nll"]["4"]) == detailed["windows"]
    )


def test_no_more_tokens_are_read_than_were_asked_for(folder: Path, data: Path, tmp_path: Path) -> None:
    few = [
        "--num-steps",
        "1",
        "--max-tokens",
        40,
        "--out",
        tmp_path / "nll.json",
    ]  # windows have 64 by default
    assert _run("--checkpoint", folder, "--data", data, *few) == 0
    report = json.loads((tmp_path / "nll.json").read_text())
    assert report["tokens"] == report["data"]["seq_len"] == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-steps", "1,65"], "--num-steps=65: is out of range; this checkpoint takes 1 to 64"),
        (["--num-steps", "0"], "--num-steps=0"),
        (["--num-steps", "one"], "--num-steps='one'"),
        (["--split", "nowhere"], "split='nowhere'"),
        (["--seq-len", "65"], "--seq-len=65"),
        (["--data", "nowhere"], "there is no manifest.json"),
        (["--checkpoint", "nowhere"], "config.json"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    folder: Path, data: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert _run("--checkpoint", folder, "--data", data, *arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_data_of_another_tokenizer_is_refused(
    folder: Path, tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.txt").write_text("".join(f"Quite another text, line {i}.\n\n" for i in range(3000)))
    prepare(
        Preparation(
            str(tmp_path / "d.txt"), tmp_path / "other", vocab_size=280, valid_fraction=0.4, test_fraction=0.0
        ),
        progress=False,
    )
    assert _run("--checkpoint", folder, "--data", tmp_path / "other") == 2
    assert "was not tokenised with the checkpoint's tokenizer" in capfd.readouterr().err
