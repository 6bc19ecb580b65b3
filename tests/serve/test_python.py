"""rdlm.load: the Python interface, and every snippet of docs/python.md."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

import rdlm
from rdlm.checkpoints import folder
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError
from rdlm.inference import GenerationOptions, Model
from rdlm.registry import build
from rdlm.sampling_params import NUMBERS, Numbers, SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.in_process import FIELDS
from serve.loading import load_served
from serve.settings import EngineSettings

REPO = Path(__file__).resolve().parents[2]


def checkpoint(out: Path, tokenizer: Tokenizer | None, vocab_size: int = 300, max_seq_len: int = 64) -> Path:
    model = {
        "family": "huginn", "vocab_size": vocab_size, "d_model": 32, "num_heads": 2, "mlp_width": 32,
        "max_seq_len": max_seq_len,
    }  # fmt: skip
    document = {"name": "demo", "model": model, "objective": "onestep", "recurrence": {"default_steps": 2}}
    config = CheckpointConfig.model_validate(document)
    denoiser, rng = build(config, seed=0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return folder.save(out, denoiser, config, tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return rdlm.load(checkpoint(tmp_path_factory.mktemp("python") / "model", tokenizer))


def test_every_snippet_of_the_documentation_runs(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "runs" / "demo" / "model", tokenizer)
    checkpoint(tmp_path / "runs" / "smollm2-looped", tokenizer, max_seq_len=512)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", (REPO / "docs/python.md").read_text(), re.M | re.S)
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/python.md", "exec"), names)
    assert len(snippets) == 5 and names["scores"].keys() == {1, 4}  # type: ignore[attr-defined]


def test_tokens_that_are_guessed_early_change_no_greedy_text(model: Model) -> None:
    prompts, options = [[5, 9, 20], [7] * 12], {"num_steps": 6, "max_tokens": 12, "temperature": 0.0}
    plain = model.generate(prompts, kv_cache="full", **options)
    drafted = model.generate(prompts, kv_cache="full", draft_steps=3, draft_tokens=5, **options)
    waving = model.generate(
        prompts, kv_cache="full", wavefront=4, inner_steps=1, wavefront_threshold=0.0, **options
    )
    assert [a.text for a in drafted] == [a.text for a in waving] == [a.text for a in plain]
    assert all(a.drafted >= a.accepted for a in (*drafted, *waving)) and sum(a.accepted for a in drafted) > 0
    assert [(a.drafted, a.accepted) for a in plain] == [(0, 0)] * 2


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"draft_steps": 2}, "draft_steps"),
        ({"draft_steps": 6, "kv_cache": "full"}, "draft_steps"),
        ({"draft_steps": 2, "draft_tokens": 0}, "draft_tokens"),
        ({"wavefront": 0}, "wavefront"),
        ({"wavefront": 2, "inner_steps": 0}, "inner_steps"),
        ({"wavefront": 2, "wavefront_threshold": -1.0}, "wavefront_threshold"),
        ({"wavefront": 2, "draft_steps": 2, "kv_cache": "full"}, "draft_steps"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": 101}, "temperature"),
        ({"stop": [""]}, "stop"),
        ({"kv_cache": "both"}, "kv_cache"),
        ({"exit_criterion": "kl", "exit_threshold": -1.0}, "exit_threshold"),
        ({"temprature": 0.5}, "temprature"),
    ],
)
def test_options_out_of_range_are_refused_by_their_names(
    model: Model, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(UserError) as error:
        model.generate([[5, 9]], num_steps=6, **{"max_tokens": 4, **options})
    assert error.value.field == field


def test_options_are_the_fields_of_a_request() -> None:
    listed = get_type_hints(GenerationOptions)
    assert listed.keys() | {"prompts", "num_steps"} == FIELDS.keys() | {"kv_cache"}
    assert get_type_hints(Numbers) == {name: kind for name, (kind, _) in NUMBERS.items()}


def test_greedy_texts_are_the_most_probable_tokens_of_the_logits(model: Model) -> None:
    ids = [model._begun("in the beginning")]
    answer = model.generate(ids, 3, max_tokens=8, temperature=0, kv_cache="full")[0]
    expected = list(ids[0])
    for _ in range(len(answer.tokens)):
        expected.append(int(model.logits(torch.tensor([expected]), 3)[3][0, -1, :300].argmax()))
    assert answer.tokens == expected[len(ids[0]) :] and answer.steps == [3] * len(answer.tokens)


def test_texts_are_those_of_the_servers_engine(model: Model) -> None:
    prompts = ["in the beginning", "and it came"]
    with Engine(lambda: load_served(model.folder, EngineSettings(max_slots=4))) as engine:
        requests = [
            Request(
                tuple(model._begun(prompt)), StepBudget(4), 12, SamplingParams(top_k=20), seed=5,
                stop_ids=engine.served.end_ids,
            )
            for prompt in prompts
        ]  # fmt: skip
        expected = ["".join(event.text for event in events) for events in engine.generate(requests)]
    got = model.generate(prompts, 4, max_tokens=12, top_k=20, seed=5)
    assert [answer.text for answer in got] == expected


def test_a_conversation_is_answered_as_its_templates_text(model: Model) -> None:
    messages = [{"role": "system", "content": "it came"}, {"role": "user", "content": "in the"}]
    assert model.tokenizer is not None
    begin = {i: text for text, i in model.tokenizer.special_tokens.items()}[model.tokenizer.bos_id]
    written = f"{begin}<system>it came\n<user>in the\n<assistant>"
    expected = model.generate([model.tokenizer.encode(written)], 3, max_tokens=8, seed=2)[0]
    assert model.chat(messages, 3, max_tokens=8, seed=2) == expected


def test_scores_are_those_of_the_logits(model: Model) -> None:
    begun = torch.tensor([model._begun("in the word")])
    scores, logits = model.score(["in the word"], [1, 4]), model.logits(begun, [1, 4])
    for k in (1, 4):
        expected = logits[k].log_softmax(-1)[:, :-1].gather(-1, begun[:, 1:, None])[0, :, 0]
        torch.testing.assert_close(scores[k][0], expected, atol=1e-4, rtol=0)


def test_a_name_of_the_hub_is_imported_once(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from rdlm.checkpoints.convert.hf_export import export_hf

    source = tmp_path / "0123456789abcdef"
    export_hf(checkpoint(tmp_path / "model", tokenizer), source, shard_bytes=1 << 30)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("rdlm.inference.local", lambda name: source)
    first = rdlm.load("owner/tiny")
    written = first.folder.stat().st_mtime_ns
    assert first.folder == tmp_path / "cache" / "rdlm" / "owner--tiny--0123456789ab"
    assert rdlm.load("owner/tiny").folder.stat().st_mtime_ns == written


def test_what_cannot_be_done_is_a_line(model: Model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    silent = copy.copy(tokenizer)
    silent.chat_template = None
    for asked, word in (
        (lambda: model.generate("in the", 65, max_tokens=4), "num_steps=65"),
        (lambda: model.generate("in the", max_tokens=4, exit_criterion="gate"), "exit_criterion='gate'"),
        (lambda: model.generate("in the", max_tokens=640), "exceeds the 64 positions"),
        (lambda: model.score("", 1), "no token to score"),
        (lambda: model.chat([]), "no conversation"),
        (lambda: model.chat("in the"), "not a list"),  # type: ignore[arg-type]
        (
            lambda: rdlm.load(checkpoint(tmp_path / "silent", silent)).chat([{"content": "in"}]),
            "no chat template",
        ),
        (lambda: rdlm.load(checkpoint(tmp_path / "ids", None)).score("in", 1), "no tokenizer"),
    ):
        with pytest.raises(UserError, match=word):
            asked()


IDS = [5, 6, 7]
WRONG: dict[str, Callable[[Any], Any]] = {
    "prompts[0]=1.7": lambda m: m.generate([[1.7, 2.2]]),
    "prompts[0]=True": lambda m: m.generate([[True]]),
    "prompts[0]='1'": lambda m: m.generate([["1"]]),
    "prompts[0]=nan": lambda m: m.generate(np.array([[np.nan]])),
    "prompts[1]=-1": lambda m: m.generate([IDS, [-1]]),
    "prompts[0]=300": lambda m: m.generate([[300]]),
    "prompts[0]=5": lambda m: m.generate(IDS),
    "prompts=5": lambda m: m.generate(5),
    "prompts=None": lambda m: m.generate(None),
    "prompts=b'in'": lambda m: m.generate(b"in"),
    "prompts={'in': 1}": lambda m: m.generate({"in": 1}),
    "prompts[1]=None": lambda m: m.generate(["in", None]),
    "prompts[0]=[5, 6, 7]": lambda m: m.generate([[IDS]]),
    "prompts='10001 tokens'": lambda m: m.generate([[5] * 10001]),
    "num_steps=2.0": lambda m: m.generate("in", 2.0),
    "num_steps=True": lambda m: m.logits([IDS], True),
    "num_steps='1'": lambda m: m.logits([IDS], "1"),
    "num_steps=[]": lambda m: m.logits([IDS], []),
    "num_steps=1.5": lambda m: m.score("in the", [1, 1.5]),
    "num_steps=0": lambda m: m.generate("in", 0),
    "num_steps=65": lambda m: m.generate("in", np.int64(65), max_tokens=4),
    "max_tokens='5'": lambda m: m.chat([{"role": "user", "content": "in"}], max_tokens="5"),
    "stop_token_ids=[-1]": lambda m: m.generate("in", stop_token_ids=[-1]),
    "seed='a'": lambda m: m.logits([IDS], seed="a"),
    "input_ids=None": lambda m: m.logits(None),
    "input_ids=-1": lambda m: m.logits([[-1]]),
    "input_states=": lambda m: m.logits([IDS], states=[1]),
    "texts=None": lambda m: m.score(None),
    "texts=5": lambda m: m.score([5]),
    "messages=None": lambda m: m.chat(None),
    "messages=1": lambda m: m.chat([{"role": "user"}]),
    "source=None": lambda m: rdlm.load(None),  # type: ignore[arg-type]
    "dtype=torch.int8": lambda m: rdlm.load(m.folder, dtype=torch.int8),
    "dtype='float32'": lambda m: rdlm.load(m.folder, dtype="float32"),
}


@pytest.mark.parametrize("said", WRONG)
def test_an_argument_of_a_wrong_type_is_a_line_that_names_it(said: str, model: Model) -> None:
    """Floats were cut to integers, True was 1, a message without content was an empty one."""
    with pytest.raises(UserError) as error:
        WRONG[said](model)
    assert str(error.value).startswith(said), str(error.value)


def test_numbers_of_numpy_and_torch_are_numbers_and_a_generator_is_a_list(model: Model) -> None:
    expected = model.generate([IDS, IDS], 2, max_tokens=3, temperature=0.5, stop_token_ids=[9])
    two, half = np.int64(2), np.float64(0.5)
    for prompts in (
        np.array([IDS, IDS]),
        torch.tensor([IDS, IDS]),
        (iter(IDS) for _ in range(2)),
        [np.array(IDS)] * 2,
    ):
        got = model.generate(
            prompts, two, max_tokens=np.int32(3), temperature=half, stop_token_ids=np.array([9])
        )  # type: ignore[arg-type,typeddict-item]
        assert got == expected
    assert model.generate([]) == model.generate(iter(())) == []  # type: ignore[arg-type]
    matrix = torch.tensor([IDS])
    for ids, ks in ((np.array([IDS]), np.array([1, 2])), ([IDS], range(1, 3)), (matrix, (np.int64(1), 2))):
        found = model.logits(ids, ks)  # type: ignore[arg-type]
        assert all(torch.equal(found[k], model.logits(matrix, k)[k]) for k in (1, 2))
