"""Mixtures of prepared folders: shares are exact, every row of a part comes once an epoch, and the step alone
decides what comes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdlm.errors import UserError
from train.data import build_corpus
from train.data.corpus import mixed, shares
from train.data.prepare import Preparation, prepare
from train.settings import MixtureConfig


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three folders whose texts have letters of their own, the first two with one tokenizer."""
    folder = tmp_path_factory.mktemp("mixture")
    made: list[Path] = []
    for name, letters, size in (("a", "abc", 257), ("b", "xyz", 257), ("other", "abc", 258)):
        lines = [json.dumps({"text": letters[n % 3] * 30 + str(n)}) for n in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        options = Preparation(str(folder / f"{name}.jsonl"), folder / name, vocab_size=size)
        if name == "b":
            options = Preparation(options.source, options.out, tokenizer=str(made[0] / "tokenizer"))
        prepare(options, progress=False)
        made.append(folder / name)
    return made


def corpus(parts: list[Path], weights: tuple[float, ...] = (3, 1), **more: Any) -> Any:
    given = [{"path": str(p), "weight": w} for p, w in zip(parts, weights, strict=False)]
    return build_corpus(MixtureConfig(parts=tuple(given), seq_len=16, **more))  # type: ignore[arg-type]


def batch(source: Any, step: int, **place: int) -> Any:
    where = {"rank": 0, "world": 1, "micro_index": 0, "micro_size": 8, **place}
    return source.batch(step, seed=5, global_batch=8, **where)


@pytest.mark.parametrize("counts", [[750, 250], [1, 999], [400, 350, 250]])
def test_shares_are_exact_and_no_row_of_a_part_comes_twice(counts: list[int]) -> None:
    which, numbers = mixed(np.arange(3000), counts, seed=1)
    for part, count in enumerate(counts):
        for first in range(0, 3000, 1000):
            assert int((which[first : first + 1000] == part).sum()) == count
        assert sorted(numbers[which == part].tolist()) == list(range(3 * count))
    assert len(set(zip(which[:50].tolist(), which[1000:1050].tolist(), strict=True))) > 1 or min(counts) < 5


def test_shares_of_weights_are_whole_and_nearest() -> None:
    assert shares([3, 1], 1000) == [750, 250]
    assert shares([1, 1, 1], 1000) == [334, 333, 333]
    assert sum(shares([0.1, 2, 5.3], 1000)) == 1000


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_rows_are_those_of_the_parts_in_their_shares(parts: list[Path], packing: str) -> None:
    source = corpus(parts, packing=packing)
    seen: Counter[str] = Counter()
    for step in range(125):
        found = batch(source, step)
        text = [source.tokenizer.decode(row.tolist()) for row in found.inputs]
        seen.update("b" if set(row) & set("xyz") else "a" for row in text)
        assert (found.documents is None) == (packing == "windows")
    assert seen == {"a": 750, "b": 250}


def test_rows_of_an_update_do_not_depend_on_processes(parts: list[Path]) -> None:
    source = corpus(parts)
    pieces = [
        batch(source, 9, rank=r, world=2, micro_index=m, micro_size=2) for r in range(2) for m in range(2)
    ]
    whole = batch(source, 9)
    for name in ("inputs", "targets", "mask"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(piece, name) for piece in pieces]))


def test_held_out_rows_come_from_every_part(parts: list[Path]) -> None:
    source = corpus(parts)
    text = "".join(source.tokenizer.decode(b.inputs.flatten().tolist()) for b in source.windows(None, 4))
    assert set(text) & set("abc") and set(text) & set("xyz")
    assert sum(b.targets.numel() for b in source.windows(64, 4)) == 64


def test_weights_are_part_of_what_the_data_are(parts: list[Path]) -> None:
    assert corpus(parts).identity == corpus(parts, (6, 2)).identity != corpus(parts, (1, 1)).identity


def test_what_cannot_be_mixed_is_refused(parts: list[Path]) -> None:
    with pytest.raises(UserError, match="data.parts.*another tokenizer"):
        corpus([parts[0], parts[2]])
    with pytest.raises(UserError, match="data.parts.*less than 1 of 1000 rows"):
        corpus(parts, (1, 1e-6))


def test_a_run_on_a_mixture_resumes_bit_for_bit(trainer: Any, parts: list[Path], tmp_path: Path) -> None:
    data = {"kind": "mixture", "parts": [{"path": str(p), "weight": 1} for p in parts[:2]], "seq_len": 16}
    changes = {
        "data": data,
        "model.vocab_size": 257,
        "objective": "onestep",
        "schedule.kind": "constant",
        "schedule.warmup_steps": 0,
    }
    whole = trainer({**changes, "schedule.steps": 4, "output": str(tmp_path / "whole")})
    whole.fit()
    expected = {name: weight.clone() for name, weight in whole.weights().items()}
    trainer({**changes, "schedule.steps": 2}).fit()
    again = trainer({**changes, "schedule.steps": 4})
    assert again.step == 2
    again.fit()
    assert all(torch.equal(weight, expected[name]) for name, weight in again.weights().items())
