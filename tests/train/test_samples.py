"""Texts in the log of a run: greedy at every K, the same rows whoever shares the batch, cut back on resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from rdlm.errors import UserError
from train.config_file import load
from train.data.prepare import Preparation, prepare
from train.pretrain import check
from train.samples import UPDATE

PROMPTS = ["and", "it came to pass"]
SAMPLES = {"interval_steps": 2, "prompts": PROMPTS, "num_steps": [1, 3], "max_tokens": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = (f"and it came to pass that {i} went out of the city and were glad. " * 4 for i in range(60))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = Preparation(
        str(folder / "a.jsonl"), folder / "out", vocab_size=257, valid_fraction=0.3, test_fraction=0.0
    )
    prepare(options, progress=False)
    return folder / "out"


@pytest.fixture
def changes(data: Path) -> dict[str, Any]:
    tokens = {"kind": "tokens", "path": str(data), "seq_len": 16}
    return {
        "data": tokens, "model.vocab_size": 257, "samples": dict(SAMPLES), "objective": "onestep",
        "schedule": {"kind": "constant", "steps": 4}, "precision": "fp32", "log.tensorboard": True,
    }  # fmt: skip


def greedy(run: Any, prompt: str, num_steps: int) -> str:
    """One row, one K, one forward a token."""
    tokenizer, network = run.corpus.tokenizer, run.engines[0].module
    ids = tokenizer.encode(prompt)
    for _ in range(5):
        inputs = torch.tensor([ids])
        ids.append(int(network.answer(inputs, [num_steps])[num_steps][0, -1]))
    return tokenizer.decode(ids[len(tokenizer.encode(prompt)) :])


def test_samples_are_the_greedy_texts_at_every_k_and_are_replaced_on_resume(
    trainer: Callable[..., Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    run = trainer(changes)
    run.fit()
    text = (tmp_path / "run" / "samples.md").read_text()
    head, at_2, at_4 = text.split(UPDATE)
    assert head.startswith("# What tiny writes") and at_2.startswith("2\n") and at_4.startswith("4\n")
    for prompt in PROMPTS:
        assert f'**"{prompt}"**' in at_4
        for k in (1, 3):
            assert f"- K = {k}: " in at_4
            shown = at_4.split(f'**"{prompt}"**')[1].split(f"- K = {k}: ")[1].split("\n")[0]
            assert json.loads(shown) == greedy(run, prompt, k)
    longer = {**changes, "schedule": {"kind": "constant", "steps": 6}}
    trainer(longer).fit()
    again = (tmp_path / "run" / "samples.md").read_text()
    assert again.startswith(text.rstrip("\n")) and again.count(UPDATE) == 3
    assert list((tmp_path / "run" / "tensorboard" / "held_out").iterdir())


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"samples.num_steps": [1, 99]}, "samples.num_steps"),
        ({"samples.prompts": []}, "samples"),
        ({"samples.prompts": ["pass " * 20]}, "samples.prompts"),
        ({"data": {"kind": "group_product", "group": "s3", "length": 12}}, "samples.interval_steps"),
    ],
)
def test_samples_that_cannot_be_written_are_refused_before_anything_starts(
    document: Callable[..., dict[str, Any]], changes: dict[str, Any], tmp_path: Path, wrong: Any, field: str
) -> None:
    file = tmp_path / "config.yaml"
    with file.open("w") as stream:
        YAML(typ="safe", pure=True).dump(document({**changes, **wrong}), stream)
    with pytest.raises(UserError) as caught:
        check(load(file), 1)
    assert caught.value.field.startswith(field)
