"""Imported looped models behind the engine: with the full cache, greedy answers are the reference's at every
K."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rdlm
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.data.tokenizer import train_tokenizer
from rdlm.errors import UserError
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Request, Speculation, StepBudget, Wavefront
from serve.loading import load_served
from serve.settings import EngineSettings

FAMILIES = (
    "ouro", "retro_llama", "retro_olmo", "parcae", "ifm_p2", "ifm_p2_orthoinj", "ifm_p2_linear", "nanbeige", "loopus",
    "loopformer", "hrm_text",
)  # fmt: skip
STARTS_FROM_TOKENS = ("ouro", "nanbeige", "loopus", "loopformer", "hrm_text")


def waving(k: int) -> StepBudget:
    """K in a wavefront in which no position leaves early."""
    return StepBudget(k, wavefront=Wavefront(4, 1, 0.0))


def drafted(k: int) -> StepBudget:
    """K with self-speculation, where there is a smaller one."""
    return StepBudget(k, speculation=Speculation(k // 2, 3) if k > 1 else None)


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("cache", ["full", "shared"])
def test_the_prompt_of_a_prefix_model_sees_itself_in_both_directions(
    shared_data: Path, tmp_path: Path, cache: Any
) -> None:
    """HRM-Text with its whole prompt as the prefix, longer than a chunk, in a batch and where a prompt came before;
    log-probabilities of a prompt's tokens are those of reading from left to right."""
    golden = shared_data.parent / "golden" / "hrm_text_tiny"
    if not golden.is_dir():
        pytest.skip(f"no golden outputs at {golden}")
    expected = load_file(golden / "outputs.safetensors")
    source = Path(shutil.copytree(golden, tmp_path / "source"))
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(400)]
    train_tokenizer("bpe", iter([" ".join(words)]), 320).save(source)
    folder = import_checkpoint(str(source), tmp_path / "model", name="zoo")
    k, ids, wanted = (2, expected["input_ids"], expected.get("greedy_prefix24_H2_L3"))
    if cache == "shared":  # one high cycle: what is decoded reads the keys that the prompt has written
        k, model, grown = 1, rdlm.load(folder), ids
        for _ in range(16):
            types = (torch.arange(grown.shape[1]) < 24).long().expand_as(grown)
            last = model.logits(grown, k, token_type_ids=types)[k][:, -1]
            grown = torch.cat([grown, last.argmax(-1, keepdim=True)], 1)
        wanted = grown[:, 24:]
    requests = [Request(tuple(row), StepBudget(k), 16, SamplingParams(temperature=0)) for row in ids.tolist()]
    settings = EngineSettings(kv_cache=cache, max_slots=4, chunk=10, prefill_rows=20, max_len=48)
    with Engine(lambda: load_served(folder, settings)) as engine:
        for _ in range(2):
            answers = engine.generate(requests)
            got = [[event.token for event in events if event.token is not None] for events in answers]
            assert wanted is not None and got == wanted.tolist()
        scored = replace(requests[0], budget=StepBudget(1), max_tokens=0, prompt_logprobs=0)
        (events,) = engine.generate([scored])
    logprobs = [entry.logprob for event in events for entry in event.prompt_logprobs or []]
    causal = expected["logits_causal_H1_L3"][0].log_softmax(-1)
    found = causal[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_reference(shared_data: Path, tmp_path: Path, family: str) -> None:
    golden = shared_data.parent / "golden" / f"{family}_tiny"
    if not golden.is_dir():
        pytest.skip(f"no golden outputs at {golden}")
    source = Path(shutil.copytree(golden, tmp_path / "source"))
    expected = load_file(source / "outputs.safetensors")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(400)]
    tokenizer = train_tokenizer("bpe", iter([" ".join(words)]), 320)
    assert tokenizer.vocab_size == 320  # the runner draws no id that the tokenizer lacks
    tokenizer.save(source / "tokenizer" if family.startswith("ifm") else source)
    if family == "hrm_text":
        change(source / "config.json", prefix_lm=False)
    folder = import_checkpoint(
        str(source), tmp_path / "model", name="zoo", zero_state=family not in STARTS_FROM_TOKENS
    )
    wanted = {
        int(match[1]): value
        for name, value in expected.items()
        if (match := re.fullmatch(r"greedy_(?:zero_init_|causal_H)?K?(\d+)(?:_L3)?", name))
    }
    assert wanted
    requests = [
        Request(tuple(ids), budget, values.shape[1], SamplingParams(temperature=0))
        for budget_of in (StepBudget, drafted, waving)
        for k, values in wanted.items()
        for budget in [budget_of(k)]
        for ids in expected["input_ids"].tolist()
    ]
    settings = EngineSettings(kv_cache="full", max_slots=4, chunk=10, prefill_rows=20, max_len=48)
    with Engine(lambda: load_served(folder, settings)) as engine:
        answers = engine.generate(requests)
    got = [[event.token for event in events if event.token is not None] for events in answers]
    assert got == [row for values in wanted.values() for row in values.tolist()] * 3


@pytest.mark.parametrize("family", ["ouro", "parcae", "loopformer"])
def test_ids_are_continued_without_a_tokenizer(shared_data: Path, tmp_path: Path, family: str) -> None:
    golden = shared_data.parent / "golden" / f"{family}_tiny"
    if not golden.is_dir():
        pytest.skip(f"no golden outputs at {golden}")
    expected = load_file(golden / "outputs.safetensors")
    starts = family in STARTS_FROM_TOKENS
    model = rdlm.load(import_checkpoint(str(golden), tmp_path / "model", zero_state=not starts))
    wanted = expected["greedy_K4" if starts else "greedy_zero_init_K4"]
    ids, options = expected["input_ids"].tolist(), {"max_tokens": 16, "temperature": 0.0}
    answers = model.generate(ids, 4, kv_cache="full", **options)
    assert [a.tokens for a in answers] == wanted.tolist()
    assert {(a.text, a.finish) for a in answers} == {("", "length")}
    for asked in (lambda: model.generate("a text"), lambda: model.chat([{"role": "user", "content": "hi"}])):
        with pytest.raises(UserError, match="no tokenizer"):
            asked()
