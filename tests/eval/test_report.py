"""`rdlm eval report`: what it shows, what it says about differences, and what it refuses to mix."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.metric import Picture, Run, Sample, Section, Table
from eval.options import samplers
from eval.registry import METRICS, load_metric
from eval.report.report import current, read_runs, sections, write_report
from eval.stats import mover
from rdlm.cli import app, run

Json = dict[str, Any]
Write = Callable[..., Path]


def _head(evaluation: str, name: str) -> Json:
    origin = {
        "command": f"rdlm eval {evaluation} | {name}",
        "git_commit": "abc-dirty",
        "gpu": None,
        "cpu": "A <CPU>",
    }
    return {
        "evaluation": evaluation,
        "provenance": {**origin, "threads": 1, "torch": "2"},
        "checkpoint": {"name": name, "step": 7, "weights_sha256": "f" * 64},
        "data": {"source": "books", "split": "valid", "manifest_sha256": "d" * 64, "seq_len": 8},
        "seed": 3,
    }


def _figure(name: str, value: float, width: float = 0.1) -> Json:
    return {name: value, f"{name}_interval": [value - width, value + width]}


def _nll(name: str, shift: float, per_window: bool = False) -> Json:
    rng = np.random.default_rng(0)
    nats = (rng.normal(3, 0.5, 50) * 8 + shift * 8).tolist()
    fixed = {"perplexity": 20.0, "bits_per_byte": 1.5, "bits_per_character": 1.6, "estimator": "normalised"}
    rows = [{"K": k, **_figure("nll", 3 + shift), **fixed} for k in (1, 4)]
    windows = {"window_nll": {"1": nats, "4": nats}, "window_tokens": [8] * 50} if per_window else {}
    return {**_head("nll", name), "tokens": 400, "results": rows, **windows}


def _gen_ppl(name: str, reach: float = 0.7, factor: float = 1.0) -> Json:
    """At temperatures 0.5 and 1 distinct-2 is 0.4 and ``reach``, human text has 0.6; perplexity is ``factor``
    times 20 and 40."""

    def texts(x: float, ppl: float) -> Json:
        names = ("distinct_1", "distinct_2", "distinct_3", "repetition", "entropy_bits", "mean_words")
        varied = {
            name: {"value": x, "interval": None, "by_block": [x - 0.01, x + 0.01] * 5} for name in names
        }
        blocks = [[100 * np.log(ppl) + i, 100] for i in (-1, 1)] * 5
        entry = {"value": ppl, "interval": [ppl * 0.9, ppl * 1.1], "by_block": blocks}
        return {"perplexity": {"t": entry}, "diversity": {**varied, "group_texts": 5}}

    rows = []
    for temperature, x, ratio in ((0.5, 0.4, 0.5), (1.0, reach, 1.0)):
        row = {"num_steps": 4, "temperature": temperature, "top_p": 1.0, **texts(x, 40 * ratio * factor)}
        row["perplexity"]["t"]["against_human"] = {
            "ratio": ratio,
            "interval": [ratio - 0.1, ratio + 0.1],
            "inside_noise": ratio == 1,
        }
        rows.append(row)
    return {
        **_head("gen-ppl", name),
        "samples": {"prompts": {"count": 5, "sha256": "p"},
        "shape": {"prompt_tokens": 5, "max_tokens": 6, "continuations": 1}, "seed": 0},
        "judges": [{"name": "t", "fingerprint": "1", "dtype": "float32", "window": 512}],
        "human": texts(0.6, 40.0),
        "results": rows,
        "at_human_distinct_2": {"t": [{"num_steps": 4, "cut": "", "perplexity": None, "interval": None}]},
        "examples": [{"prompt": "In the <b>", "human": "beginning | was", "texts": [f"cool {name}", f"warm {name}"]}],
    }  # fmt: skip


def _depth(name: str, task: str = "s3") -> Json:
    rows = [
        {"length": n, "K": k, **_figure("accuracy", 0.2 * k), **_figure("delta", 0.0), **_figure("last", 0.1),
        "by_position": [0.1] * n}
        for n in (4, 6) for k in (1, 2)
    ]  # fmt: skip
    data = {"task": task, "unit": "positions", "whole": "last", "split": "test", "rows": 9, "seed": 0}
    return {**_head("depth", name), "data": data, "chance": 1 / 6, "results": rows, "convergence": {}}


def _lm_eval(name: str, acc: float, shots: int = 0) -> Json:
    return {
        "results": {"blimp_x": {"alias": "x", "acc,none": acc, "acc_stderr,none": 0.02}},
        "config": {"model": "rdlm", "model_args": {}, "checkpoint": name, "num_steps": 4,
        "estimator": "normalised", "tied_documents": 0},
        "versions": {"blimp_x": 1.0}, "n-shot": {"blimp_x": shots}, "n-samples": {"blimp_x": {"effective": 9}},
        "lm_eval_version": "0.4.13", "git_hash": "abc",
    }  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(name: str, report: Json) -> Path:
        (tmp_path / name).write_text(json.dumps(report))
        return tmp_path / name

    return put


def _report(tmp_path: Path, *files: Path) -> int:
    return run(
        app,
        ["eval", "report", *map(str, files), "--out", str(tmp_path / "r"), "--title", "Two <models>"],
        "rdlm",
    )


def _rows(tmp_path: Path, section: str, table: int = 0) -> list[list[str]]:
    data = json.loads((tmp_path / "r" / "report.json").read_text())
    return next(s for s in data["sections"] if s["title"] == section)["tables"][table]["rows"]


def test_the_page_stands_alone_and_shows_every_kind(tmp_path: Path, write: Write) -> None:
    reports = (_nll("a", 0), _nll("b", 1), _gen_ppl("a"), _gen_ppl("b"), _depth("a"), _lm_eval("a", 0.6))
    files = [write(f"{n}.json", report) for n, report in enumerate(reports)]
    assert _report(tmp_path, *files) == 0
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Two &lt;models&gt;" in page and "A &lt;CPU&gt;" in page and "<models>" not in page
    assert (
        page.count('src="data:image/png;base64,') == page.count("<img ") == 4
        and "http" not in page
        and "<script" not in page
    )
    text = (tmp_path / "r" / "report.md").read_text()
    for name in (
        "Held-out likelihood",
        "Generative perplexity",
        "Depth",
        "lm-eval",
        "Provenance",
        "warm a",
        "warm b",
        "beginning \\| was",
    ):
        assert name in text
    assert "cool a" not in text  # of each K the setting whose diversity is nearest to that of human text
    texts = [f"generative-perplexity-and-diversity-{n}.png" for n in (1, 2)]
    written = {"report.html", "report.md", "report.json", "held-out-likelihood-1.png", "depth-1.png", *texts}
    assert {f.name for f in (tmp_path / "r").iterdir()} == written
    commands = [row[2] for row in _rows(tmp_path, "Provenance")]
    assert "rdlm eval nll | a" in commands and len(commands) == 6


def test_differences_inside_the_noise_are_named(tmp_path: Path, write: Write) -> None:
    files = [write("a.json", _nll("a", 0)), write("b.json", _nll("b", 0.05)), write("c.json", _nll("c", 0.5))]
    assert _report(tmp_path, *files) == 0
    against = {row[0]: row[3] for row in _rows(tmp_path, "Held-out likelihood")}
    assert against["a"] == "" and "within noise" in against["b"] and "within noise" not in against["c"]
    assert against["c"].startswith("+0.5000")


def test_windows_of_both_runs_make_the_difference_paired(tmp_path: Path, write: Write) -> None:
    """0.05 nats lie inside both intervals, yet every window is worse by exactly as much."""
    files = [write("a.json", _nll("a", 0, True)), write("b.json", _nll("b", 0.05, True))]
    assert _report(tmp_path, *files) == 0
    assert _rows(tmp_path, "Held-out likelihood")[-1][3] == "+0.0500 [+0.0500, +0.0500], paired"


def test_lm_eval_scores_are_compared_by_their_standard_errors(tmp_path: Path, write: Write) -> None:
    files = [write(f"{n}.json", _lm_eval(n, acc)) for n, acc in (("a", 0.60), ("b", 0.63), ("c", 0.75))]
    assert _report(tmp_path, *files) == 0
    rows = {row[0]: row[4] for row in _rows(tmp_path, "lm-eval")}
    assert (
        "within noise" in rows["b K = 4"]
        and rows["c K = 4"].startswith("+0.1500")
        and "noise" not in rows["c K = 4"]
    )


def test_runs_are_compared_at_the_diversity_of_human_text(tmp_path: Path, write: Write) -> None:
    """Two thirds of the way from one temperature to the other in distinct-2 and in log perplexity; the ratio
    is paired by blocks."""
    runs = (_gen_ppl("a"), _gen_ppl("b", factor=1.1), _gen_ppl("c", reach=0.5))
    assert _report(tmp_path, *(write(f"{n}.json", run) for n, run in enumerate(runs))) == 0
    first, second, short = _rows(tmp_path, "Generative perplexity and diversity", 1)
    assert first[3].startswith("31.7 [") and first[4] == ""
    assert second[3].startswith("34.9 [") and second[4] == "1.100 [1.100, 1.100]"
    assert short[3] == "-" == short[4]


def _mauve(name: str, *values: float) -> Json:
    def score(value: float) -> Json:
        return {"value": value, "interval": [value - 0.02, value + 0.02], "texts": 100}

    rows = [
        {"num_steps": k, "temperature": 1.0, "top_p": 1.0, **score(v)}
        for k, v in zip((1, 4), values, strict=True)
    ]
    protocol = {"name": "quick", "scaling_factor": 5.0, "seeds": 3}
    judge = {"name": "t", "fingerprint": "1", "dtype": "float32", "window": 512}
    return {
        **_head("mauve", name), "samples": _gen_ppl(name)["samples"], "protocol": protocol,
        "featuriser": judge, "references": 100,
        "ceiling": score(0.95), "floor": score(0.01), "results": rows,
    }  # fmt: skip


def test_a_figure_of_mauve_is_that_of_its_section(tmp_path: Path) -> None:
    metric, report = load_metric("mauve"), _mauve("a", 0.5, 0.6)
    metric.plot(report, tmp_path / "m.png")
    [picture] = metric.section([Run(tmp_path / "m.json", "mauve", "a", report)]).blocks[1:]
    assert (tmp_path / "m.png").read_bytes() == picture.content


def test_mauve_is_compared_with_its_ceiling_the_first_row_and_its_own_first(
    tmp_path: Path, write: Write
) -> None:
    assert (
        _report(
            tmp_path,
            *(write(f"{n}.json", _mauve(n, *v)) for n, v in (("a", (0.5, 0.51)), ("b", (0.6, 0.94)))),
        )
        == 0
    )
    rows = _rows(tmp_path, "MAUVE")
    assert [row[4][:5] for row in rows] == ["0.950", "0.010", "0.500", "0.510", "0.600", "0.940"]
    assert rows[3][7] == rows[3][8] == "+0.010 [-0.018, +0.038] (within noise)"
    assert rows[4][7] == "+0.100 [+0.072, +0.128]" and rows[4][8] == "" and rows[5][8].startswith("+0.340")
    assert "within noise" in rows[5][6] and "within noise" not in rows[4][6]
    assert (tmp_path / "r" / "mauve-1.png").is_file()


def test_scores_of_several_k_are_drawn_against_k(tmp_path: Path, write: Write) -> None:
    one, four = _lm_eval("a", 0.6), _lm_eval("a", 0.7)
    one["config"]["num_steps"] = 1
    assert _report(tmp_path, write("1.json", one), write("4.json", four)) == 0
    assert (tmp_path / "r" / "lm-eval-1.png").is_file()
    assert [row[0] for row in _rows(tmp_path, "lm-eval")] == ["a K = 1", "a K = 4"]


def test_independent_intervals_add_in_quadrature() -> None:
    value, (low, high) = mover((3.0, [2.7, 3.4]), (1.0, [0.6, 1.3]))
    assert (value, low, high) == pytest.approx((2.0, 2 - np.hypot(0.3, 0.3), 2 + np.hypot(0.4, 0.4)))


def test_files_of_one_name_are_told_apart(tmp_path: Path, write: Write) -> None:
    assert _report(tmp_path, write("early.json", _nll("a", 0)), write("late.json", _nll("a", 1))) == 0
    assert [row[0].endswith(("early)", "late)")) for row in _rows(tmp_path, "Held-out likelihood")] == [
        True
    ] * 4


def _changed(report: Json, *path: str | int, value: Any) -> Json:
    changed = copy.deepcopy(report)
    target: Any = changed
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            _nll("a", 0),
            _changed(_nll("b", 0), "data", "manifest_sha256", value="e" * 64),
            "nll: data.manifest_sha256 is eee",
        ),
        (_nll("a", 0), _changed(_nll("b", 0), "tokens", value=800), "nll: tokens is 800"),
        (
            _gen_ppl("a"),
            _changed(_gen_ppl("b"), "judges", 0, "fingerprint", value="2"),
            "gen-ppl: judges is",
        ),
        (
            _gen_ppl("a"),
            _changed(_gen_ppl("b"), "samples", "shape", "max_tokens", value=9),
            "gen-ppl: shape is",
        ),
        (_depth("a"), _depth("b", "s5"), "depth: task is s5"),
        (_lm_eval("a", 0.5), _lm_eval("b", 0.5, shots=5), "blimp_x: n-shot is 5"),
        (_nll("a", 0), {"results": []}, "names no evaluation"),
    ],
)
def test_what_was_measured_otherwise_is_refused_in_one_line(
    tmp_path: Path, write: Write, capfd: pytest.CaptureFixture[str], first: Json, second: Json, message: str
) -> None:
    assert _report(tmp_path, write("1.json", first), write("2.json", second)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and "2.json" in lines[0] and not (tmp_path / "r").exists()


def test_every_file_of_metrics_is_a_command(capfd: pytest.CaptureFixture[str]) -> None:
    for name, line in METRICS.items():
        metric = load_metric(name)
        assert metric.name == name and metric.example.startswith(f"rdlm eval {name} ") and metric.__doc__
        assert line.endswith(".") and len(line) < 80, "the first paragraph of the file"
        if name != "lm-eval":  # whose help is that of lm_eval
            assert run(app, ["eval", name, "--help"], "rdlm") == 0
            shown = capfd.readouterr().out
            assert "Example: rdlm eval" in shown and "--steps" not in shown
            assert "--out" in shown and "--plot" in shown
            assert ("--num-steps" in shown) == (name != "sweep")  # which reads K from its runs


def test_former_names_of_options_still_work_and_say_so(capfd: pytest.CaptureFixture[str]) -> None:
    for metric, given, old, new in (
        ("nll", ["--steps", "4"], "--steps", "--num-steps"),
        ("nll", ["--steps=4"], "--steps", "--num-steps"),
        ("gen-ppl", ["--teacher", "smollm2"], "--teacher", "--judge"),
        ("gen-ppl", ["--bridge=euler"], "--bridge", "--sampler"),
    ):
        command = ["eval", metric, "--checkpoint", "nowhere", "--data", "nowhere", *given]
        assert run(app, command, "rdlm") == 2
        first, last = capfd.readouterr().err.splitlines()
        assert first == f"rdlm eval: {old} is called {new} now; the old name will go"
        assert "nowhere" in last


def test_results_of_earlier_versions_are_read_under_todays_names() -> None:
    """Published files beside the documentation, which are not written anew."""
    raw = Path(__file__).resolve().parents[2] / "docs" / "results" / "raw"
    old = [raw / "quality" / "gen-ppl-single_pass-lr0.002-seed0.json", raw / "quality" / "bridges-paper.json"]
    assert "teachers" in json.loads(old[0].read_text())
    runs = read_runs(old[:1])
    assert [judge["name"] for judge in runs[0].report["judges"]] == ["smollm2"]
    assert "smollm2" in sections(runs)[0].blocks[0].headers[4]  # type: ignore[union-attr]
    found = current(json.loads(old[1].read_text()))
    assert {row["sampler"] for row in found["results"]} >= {"renoise", "euler", "dpmpp_2m"}


def test_a_former_name_of_a_sampler_is_replaced_with_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert samplers("hard,euler") == ["renoise", "euler"]
    assert "sampler hard is called renoise now" in capfd.readouterr().err


def test_text_of_a_report_can_be_anything(tmp_path: Path) -> None:
    """HTML is escaped, and a cell of Markdown stays one cell."""
    odd = '<b>a</b> | b\nc & "d" {{ e }}'
    blocks: list[Any] = [
        Table([odd, "n"], [[odd, "1"]], odd),
        Sample(odd, [(odd, odd)]),
        Picture(b"png", odd),
    ]
    write_report(tmp_path, odd, [Section(odd, odd, blocks)], [])
    html, markdown = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "<b>a</b>" not in html and html.count("&lt;b&gt;a&lt;/b&gt;") > 8 and "{{ e }}" in html
    assert '| <b>a</b> \\| b c & "d" {{ e }} | 1 |\n' in markdown
