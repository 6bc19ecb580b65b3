"""The lm-eval model: log-likelihoods against sums by hand, rolling windows, texts, ties, the command."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rdlm.checkpoints.folder import Loaded, load
from rdlm.cli import app, run
from rdlm.errors import UserError

pytest.importorskip("lm_eval", reason="the harness is not installed")

from lm_eval.api.instance import Instance

from eval.metrics.lm_eval import TASKS, taken_out
from eval.texts import lm_eval_adapter as harness
from eval.texts.likelihood import score_continuations
from eval.texts.lm_eval_adapter import RecurrentLM, run_sweep
from eval.texts.tasks.blimp import load as load_paradigm

MakeModel = Callable[..., RecurrentLM]


def _ask(kind: str, *arguments: Any, doc: int = 0) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("task", doc, 1))  # type: ignore[arg-type]


def _by_hand(loaded: Loaded, context: list[int], continuation: list[int], k: int) -> float:
    """One row at a time, without padding or batches."""
    row = torch.tensor([context + continuation])
    logprobs = loaded.denoiser.token_logprobs(row[:, :-1], row[:, 1:], [k])[k][0]
    return sum(logprobs.tolist()[len(context) - 1 :])


def _greedy(loaded: Loaded, context: list[int], length: int, k: int) -> list[int]:
    """Arg max token by token: the log-probability of every id is asked for."""
    ids = list(context)
    for _ in range(length):
        rows = torch.tensor([ids] * loaded.config.model.vocab_size)
        last = torch.arange(loaded.config.model.vocab_size)
        targets = torch.cat([rows[:, 1:], last[:, None]], 1)
        ids.append(int(loaded.denoiser.token_logprobs(rows, targets, [k])[k][:, -1].argmax()))
    return ids[len(context) :]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_loglikelihood_is_the_sum_over_the_continuation(
    make_model: MakeModel, k: int, batch_size: int
) -> None:
    model = make_model(num_steps=k, batch_size=batch_size)
    pairs = [
        ("in the", " beginning was"),
        ("and it came to pass in those", " days"),
        ("", "the word"),
        ("with", " god was"),
    ]
    found = model.loglikelihood([_ask("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    encode = model.text.encode
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        before = encode(context) or [model.eot_token_id]
        after = encode(context + continuation)[len(encode(context)) :]
        assert logprob == pytest.approx(_by_hand(model.loaded, before, after, k), abs=1e-4)
        assert greedy == (_greedy(model.loaded, before, len(after), k) == after)


@pytest.mark.parametrize(("objective", "k"), [("onestep", 4), ("evidence", 1), ("paper", 1)])
def test_is_greedy_knows_the_greedy_continuation(
    folders: Callable[[str], Path], objective: str, k: int
) -> None:
    loaded = load(folders(objective))
    context = [5, 9, 70]
    best = _greedy(loaded, context, 3, k)
    other = [*best[:-1], (best[-1] + 1) % 256]
    found = score_continuations(
        loaded, [(context, best), (context, other), (context[:1], [3])], [k], batch_size=3, max_length=64
    )[k]
    assert [greedy for _, greedy in found][:2] == [True, False]
    assert (
        found[0][0] == pytest.approx(_by_hand(loaded, context, best, k), abs=1e-4)
        and found[0][0] > found[1][0]
    )


def test_a_context_too_long_loses_its_start(make_model: MakeModel) -> None:
    model = make_model(num_steps=2, max_length=6)
    row = list(range(40, 52))
    found = score_continuations(model.loaded, [(row[:9], row[9:])], [2], batch_size=1, max_length=6)[2][0][0]
    assert found == pytest.approx(_by_hand(model.loaded, row[5:9], row[9:], 2), abs=1e-4)
    with pytest.raises(UserError, match="a continuation has 7 tokens"):
        score_continuations(model.loaded, [(row[:2], row[2:9])], [2], batch_size=1, max_length=6)


def test_rolling_predicts_each_token_once_with_the_most_context(make_model: MakeModel) -> None:
    model = make_model(num_steps=4, max_length=8, batch_size=2)
    text = "in the beginning was the word and xyz zyx"
    ids, k, start = model.text.encode(text), 4, [model.eot_token_id]
    assert 16 < len(ids) < 24
    expected = _by_hand(model.loaded, start, ids[:8], k) + _by_hand(model.loaded, ids[7:8], ids[8:16], k)
    expected += _by_hand(model.loaded, ids[-9:16], ids[16:], k)
    short = "in the"
    found = model.loglikelihood_rolling(
        [_ask("loglikelihood_rolling", t) for t in (text, short, "")], disable_tqdm=True
    )
    assert found[0] == pytest.approx(expected, abs=1e-4) and found[2] == 0
    assert found[1] == pytest.approx(_by_hand(model.loaded, start, model.text.encode(short), k), abs=1e-4)


def test_sampling_checkpoints_are_scored_where_they_are_normalised(make_model: MakeModel) -> None:
    ask = [_ask("loglikelihood", "in the", " beginning")]
    plain, deep = make_model("evidence", num_steps=1), make_model("evidence", num_steps=4)
    assert deep.loglikelihood(ask, disable_tqdm=True) == plain.loglikelihood(ask, disable_tqdm=True)
    assert (deep.get_model_info()["num_steps"], deep.get_model_info()["loglikelihood_num_steps"]) == (4, 1)
    assert deep.get_model_info()["estimator"] == "normalised: logits at sigma_max with z = 0"
    mixture = make_model("evidence", num_steps=4, estimator="mixture", num_draws=2)
    assert mixture.get_model_info()["estimator"].startswith("mixture over noise draws at K = 4")
    assert mixture.loglikelihood(ask, disable_tqdm=True) != plain.loglikelihood(ask, disable_tqdm=True)


def test_generate_until_is_greedy_decoding_cut_at_the_stop_string(make_model: MakeModel) -> None:
    model = make_model(num_steps=4, batch_size=2, kv_cache="full")
    prompt = "in the beginning"
    ids = _greedy(model.loaded, model.text.encode(prompt), 12, 4)
    whole = model.text.decode(ids[: ids.index(model.text.eos_id)] if model.text.eos_id in ids else ids)
    assert len(whole) > 3
    stop = whole[2:4]
    asked = [
        _ask("generate_until", prompt, {"until": [], "max_gen_toks": 12}),
        _ask("generate_until", prompt, {"until": [stop], "max_gen_toks": 12, "do_sample": False}),
        *[
            _ask(
                "generate_until",
                prompt,
                {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0},
            )
        ]
        * 2,
    ]
    greedy, cut, first, second = model.generate_until(asked, disable_tqdm=True)
    assert greedy == whole and cut == whole[: whole.index(stop)]
    assert first != second  # repeats of a prompt differ
    assert model.generate_until(asked[2:], disable_tqdm=True) == [first, second]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 9}, "num_steps=9: is out of range; this checkpoint takes 1 to 8"),
        ({"num_steps": "many"}, "num_steps='many'"),
        ({"estimator": "exact"}, "estimator='exact': there is no such estimator"),
        ({"estimator": "mixture"}, "only sampling checkpoints have it"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"max_length": 65}, "max_length=65"),
        ({"steps": 3}, "steps=3: there is no such argument; use some of checkpoint, num_steps"),
        ({"kv_cache": "none"}, "kv_cache='none'"),
        ({"device": "cuda:99"}, "device='cuda:99'"),
        ({"checkpoint": "nowhere"}, "has no config.json"),
    ],
)
def test_bad_model_args_name_field_and_remedy(
    folders: Callable[[str], Path], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as error:
        RecurrentLM.create_from_arg_obj({"checkpoint": str(folders("onestep")), **arguments})
    assert message in str(error.value)


def test_top_k_of_minus_one_is_off_as_on_the_server(make_model: MakeModel) -> None:
    given = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    off, none = (
        make_model().generate_until([_ask("generate_until", "in the", given | more)], disable_tqdm=True)
        for more in ({"top_k": -1}, {})
    )
    assert off == none


def test_bad_gen_kwargs_are_refused(make_model: MakeModel) -> None:
    for given, message in (
        ({"num_beams": 4}, "num_beams"),
        ({"max_gen_toks": 64}, "leaves no room"),
        ({"num_steps": 9}, "1 to 8"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 1.5}, "top_k=1.5: is not a whole number"),
        ({"do_sample": True, "temperature": 1.0, "top_k": -2}, "top_k=-2"),
        ({"do_sample": True, "temperature": 1.0, "top_p": "all"}, "top_p='all': is not a number"),
    ):
        with pytest.raises(UserError, match=message):
            make_model().generate_until(
                [_ask("generate_until", "in", {"until": ["."], "max_gen_toks": 4} | given)]
            )


def test_a_cache_of_lm_eval_tells_apart_what_decides_a_result(
    make_model: MakeModel, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """One --use_cache file for several K, estimators, seeds and checkpoints: each gets its own numbers, and
    finds them again."""
    from lm_eval.api.model import CachingLM

    file, settings = (
        str(tmp_path / "cache.db"),
        [
            {"num_steps": 1},
            {"num_steps": 8},
            {"num_steps": 8, "dtype": "bfloat16"},
            {"num_steps": 8, "max_length": 4},
            {"objective": "evidence", "num_steps": 4, "estimator": "mixture", "num_draws": 2},
            {"objective": "evidence", "num_steps": 4, "estimator": "mixture", "num_draws": 2, "seed": 1},
            {"objective": "evidence", "num_steps": 4, "estimator": "mixture", "num_draws": 3},
            {"objective": "evidence", "num_steps": 4},
        ],
    )
    asked = [_ask("loglikelihood", "in the beginning was", " the word")]
    answers = [_ask("generate_until", "in the", {"until": [], "max_gen_toks": 2, "do_sample": False})]

    def measured(setting: dict[str, Any], cached: bool) -> Any:
        model: Any = make_model(**setting)
        model = CachingLM(model, file) if cached else model
        return model.loglikelihood(asked), model.generate_until(answers)

    plain = [measured(setting, cached=False) for setting in settings]
    assert len({scores[0] for scores, _ in plain}) == len(settings)
    assert [measured(setting, cached=True) for setting in settings] == plain
    lost = CachingLM(make_model(num_steps=8), file)
    lost.lm._score = None  # whatever is asked for must be in the file
    assert lost.loglikelihood(asked) == plain[1][0]


def test_a_continuation_without_a_token_of_its_own_is_refused(make_model: MakeModel) -> None:
    """Where context and continuation end in one token ("pa" + "ss"), a likelihood of 1 would win every
    choice."""
    model = make_model()
    for pair in (("in the wo", ""), ("", "")):
        with pytest.raises(UserError, match="an empty continuation"):
            model.loglikelihood([_ask("loglikelihood", *pair)])
    text, encode = "and it came to pass in those days", model.text.encode
    cut = next(i for i in range(5, len(text)) if len(encode(text[: i + 1])) <= len(encode(text[:i])))
    with pytest.raises(UserError, match="joins this continuation with its context"):
        model.loglikelihood([_ask("loglikelihood", text[:cut], text[cut])])


def test_pairs_are_encoded_as_lm_evals_own_models_encode_them(make_model: MakeModel) -> None:
    from lm_eval.api.model import TemplateLM

    model = make_model()
    for context, continuation in (
        ("in the", " word"),
        ("in the ", "word"),
        ("and it ca", "me to"),
        ("was\n", "with"),
    ):
        own = TemplateLM._encode_pair(model, context, continuation)
        assert model._encode_pair(context, continuation) == own and own[1]


def test_a_context_of_white_space_is_no_context(make_model: MakeModel) -> None:
    model = make_model(num_steps=2)
    for context in (" ", "\n\n"):
        ids = model.text.encode(f"{context}the word")
        ((logprob, _),) = model.loglikelihood([_ask("loglikelihood", context, "the word")], disable_tqdm=True)
        assert logprob == pytest.approx(_by_hand(model.loaded, [model.eot_token_id], ids, 2), abs=1e-4)


def test_ties_are_counted(make_model: MakeModel) -> None:
    model = make_model()
    asked = [
        _ask("loglikelihood", "in the", text, doc=n)
        for n, text in ((0, " word"), (0, " word"), (1, " word"), (1, " god"))
    ]
    model.loglikelihood(asked, disable_tqdm=True)
    assert model.get_model_info()["tied_documents"] == 1


# BLiMP ------------------------------------------------------------------------------------------------------


def _paradigms() -> list[str]:
    text = (TASKS / "blimp_local.yaml").read_text().replace("!function ", "")
    return [task["dataset_kwargs"]["paradigm"] for task in yaml.safe_load(text)["task"]]


@pytest.fixture(scope="session")
def blimp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """67 files of two rows each; the good sentence repeats what the tokenizer knows."""
    folder = tmp_path_factory.mktemp("blimp")
    for name in _paradigms():
        rows = [
            {"sentence_good": f"the word {i} was", "sentence_bad": f"the word {i} god", "UID": name}
            for i in range(2)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_command_runs_lm_evals_own_with_the_estimator_in_the_results(
    folders: Callable[[str], Path],
    blimp: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    common = [
        "eval",
        "lm-eval",
        "--model",
        "rdlm",
        "--device",
        "cpu",
        "--batch_size",
        "8",
        "--blimp",
        str(blimp),
    ]
    arguments = [
        "--model_args",
        f"checkpoint={folders('onestep')},num_steps=4",
        "--output_path",
        str(tmp_path),
    ]
    assert run(app, [*common, *arguments, "--tasks", "blimp_local"], "rdlm") == 0
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    config = results["config"]
    assert (
        config["estimator"] == "normalised: logits after K = 4 core steps"
        and config["loglikelihood_num_steps"] == 4
    )
    assert f"torch {torch.__version__}" in config["machine"]
    assert len(results["group_subtasks"]["blimp_local"]) == 67 and "blimp_local" in results["groups"]
    model = RecurrentLM(checkpoint=str(folders("onestep")), num_steps=4)
    rows = [json.loads(line) for line in (blimp / "wh_island.jsonl").read_text().splitlines()]
    asked = [_ask("loglikelihood", "", row[key]) for row in rows for key in ("sentence_good", "sentence_bad")]
    scores = [logprob for logprob, _ in model.loglikelihood(asked, disable_tqdm=True)]
    assert results["results"]["blimp_wh_island"]["acc,none"] == statistics.mean(
        [scores[0] > scores[1], scores[2] > scores[3]]
    )


def test_a_sweep_over_k_scores_in_one_pass_what_single_runs_score(
    make_model: MakeModel, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[int]] = []
    found: list[list[tuple[float, bool]]] = []
    pairs = (("in the", " beginning"), ("and it came", " to pass"), ("in the", " beginning"))
    asked = [_ask("loglikelihood", *pair) for pair in pairs]

    def counted(loaded: Any, pairs: Any, ks: Any, **options: Any) -> Any:
        if pairs:
            passes.append([len(pairs), *ks])
        return score_continuations(loaded, pairs, ks, **options)

    def one_run(arguments: list[str]) -> None:
        given = dict(item.split("=") for item in arguments[1].split(","))
        model = make_model(num_steps=int(given["num_steps"]))
        found.append(model.loglikelihood(asked, disable_tqdm=True))

    singly = {k: make_model(num_steps=k).loglikelihood(asked, disable_tqdm=True) for k in (1, 4)}
    monkeypatch.setattr(harness, "score_continuations", counted)
    monkeypatch.setattr(harness, "run", one_run)
    run_sweep(["--model_args", f"checkpoint={folders('onestep')}"], [1, 4])
    assert passes == [[2, 1, 4]] and harness.SWEEP.ks == () and not harness.SWEEP.scores
    for k, scores in zip((1, 4), found, strict=True):
        assert [logprob for logprob, _ in scores] == pytest.approx(
            [logprob for logprob, _ in singly[k]], abs=1e-4
        )
    assert found[0] != found[1]


def test_a_sweep_names_k_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert taken_out(["a", "--num-steps", "1,4", "--num-steps=2", "b"], "--num-steps") == (["a", "b"], "2")
    assert taken_out(["a", "--num-steps"], "--num-steps") == (["a"], "")
    for arguments in (["--model_args", "checkpoint=x,num_steps=4"], ["--tasks", "piqa"]):
        assert run(app, ["eval", "lm-eval", *arguments, "--num-steps", "1,4"], "rdlm") == 2
        assert "--num-steps=[1, 4]" in capfd.readouterr().err.splitlines()[-1]


def test_unreadable_blimp_files_are_named(blimp: Path, tmp_path: Path) -> None:
    rows = load_paradigm("wh_island", str(blimp), num_steps=4)["train"]
    assert rows.num_rows == 2 and rows[0] == {
        "sentence_good": "the word 0 was",
        "sentence_bad": "the word 0 god",
    }
    (tmp_path / "broken.jsonl").write_text('{"sentence_good": "x"}\n')
    for paradigm, folder, message in (
        ("wh_island", None, "need the folder of BLiMP's files; give --blimp FOLDER"),
        ("wh_island", str(tmp_path), "has no readable wh_island.jsonl"),
        ("broken", str(tmp_path), "is not a file of BLiMP"),
    ):
        with pytest.raises(UserError, match=message):
            load_paradigm(paradigm, folder)


@pytest.mark.slow
def test_what_lm_eval_refuses_is_one_line(
    folders: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model",
        "rdlm",
        "--model_args",
        f"checkpoint={folders('onestep')}",
        "--tasks",
        "no_such_task",
    ]
    assert run(app, ["eval", "lm-eval", *arguments], "rdlm") == 2
    assert "Tasks not found: no_such_task" in capfd.readouterr().err.splitlines()[-1]


def test_a_package_that_a_model_of_lm_eval_needs_is_named(
    monkeypatch: pytest.MonkeyPatch, blimp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval.models.api_models.find_spec", lambda name: None)
    over_http = ["--model", "local-completions", "--model_args", "model=x,base_url=http://127.0.0.1:9/v1"]
    tasks = ["--blimp", str(blimp), "--tasks", "blimp_local"]
    assert run(app, ["eval", "lm-eval", *over_http, *tasks], "rdlm") == 2
    assert "pip install lm-eval[api]" in capfd.readouterr().err.splitlines()[-1]


class Noise(RecurrentLM):
    """Knows nothing: a hash of the ids decides."""

    def _score(self, pairs: Any, disable_tqdm: bool) -> list[tuple[float, bool]]:
        digests = [hashlib.sha256(repr(pair).encode()).digest() for pair in pairs]
        return [(-int.from_bytes(digest[:6], "big") / 2**48, False) for digest in digests]


class Constant(RecurrentLM):
    def _score(self, pairs: Any, disable_tqdm: bool) -> list[tuple[float, bool]]:
        return [(-1.0, False)] * len(pairs)


@pytest.mark.slow
def test_blimp_gives_ignorance_one_half_and_reports_ties(
    folders: Callable[[str], Path], shared_data: Path
) -> None:
    """lm-eval resolves ties to the first choice, the right one: a constant model scores 1, and the count of
    ties says so."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), metadata={"blimp": str(shared_data / "blimp")})
    results = {}
    for kind in (Noise, Constant):
        model = kind(checkpoint=str(folders("onestep")))
        found = simple_evaluate(
            model=model, tasks=["blimp_local"], task_manager=manager, limit=60, bootstrap_iters=0
        )
        results[kind] = found["results"]["blimp_local"]["acc,none"], found["config"]["tied_documents"]
    rows = 67 * 60
    assert abs(results[Noise][0] - 0.5) < 4 * 0.5 / math.sqrt(rows) and results[Noise][1] == 0
    assert results[Constant] == (1.0, rows)
