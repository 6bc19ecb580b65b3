"""Imported looped models behind the engine: with the full cache, greedy answers are the reference's at every
K."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.data.tokenizer import train_tokenizer
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
