"""Weights packed for a CPU answer as plain ones do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rdlm.checkpoints import folder as checkpoint
from rdlm.errors import UserError
from rdlm.sampling_params import SamplingParams
from serve.engine.cpu.library import library
from serve.engine.engine import Engine, Served
from serve.engine.packing import PackedLinear, can_pack, pack_weights, padded
from serve.engine.runner import Runner
from serve.engine.sequence import Request, StepBudget
from serve.loading import load_served
from serve.settings import EngineSettings

SETTINGS = EngineSettings(max_slots=2, chunk=16, prefill_rows=32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@torch.inference_mode()
def test_packed_equals_plain(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias, dtype=dtype)
    if not can_pack(linear.weight):
        pytest.skip(f"oneDNN has no {dtype} here")
    packed = PackedLinear(linear)
    for shape in ((1, 1, 96), (1, 17, 96), (3, 5, 96), (300, 96)):
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(packed(x), linear(x), atol=tolerance, rtol=tolerance)


def test_only_what_can_be_packed_is() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.Embedding(4, 4))
    )
    model.append(nn.Linear(4, 4, device="meta"))
    assert pack_weights(model) == 1 and pack_weights(model) == 0
    assert [type(m) for m in (model[0], model[1][0], model[2])] == [PackedLinear, nn.Linear, nn.Linear]


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_loaded_model_is_packed_and_says_the_same(
    make_served: Callable[..., Served], tmp_path: Path, kernels: str
) -> None:
    """Greedy tokens and log-probabilities (1e-4) of a served checkpoint are those of the model as it was
    saved."""
    plain = make_served("single_pass", settings=SETTINGS)
    assert isinstance(plain.runner, Runner)
    checkpoint.save(tmp_path / "model", copy.deepcopy(plain.runner.denoiser), plain.config, plain.tokenizer)
    loaded = load_served(tmp_path / "model", SETTINGS.model_copy(update={"kernels": kernels}))
    assert isinstance(loaded.runner, Runner)
    kinds = {type(m) for m in loaded.runner.denoiser.modules() if isinstance(m, nn.Linear)}
    compiled = kernels == "auto" and library() is not None
    assert kinds == (set() if compiled else {PackedLinear})
    assert not any(isinstance(m, PackedLinear) for m in plain.runner.denoiser.modules())
    asked = [
        Request(tuple(range(5, 5 + n)), StepBudget(k), 8, SamplingParams(temperature=0), logprobs=0)
        for n, k in ((3, 4), (20, 1))
    ]
    answers = []
    for served in (plain, loaded):
        with Engine(lambda served=served: served) as engine:
            answers.append([event for events in engine.generate(asked) for event in events if event.logprobs])
    assert [e.token for e in answers[0]] == [e.token for e in answers[1]] and len(answers[0]) == 16
    expected, found = (torch.tensor([e.logprobs.logprob for e in events if e.logprobs]) for events in answers)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_row_counts_are_few_and_waste_little() -> None:
    """Kernels are kept by row count: with every count its own, memory grew by half a gigabyte over 300 counts
    at width 512."""
    counts = [padded(rows) for rows in range(1, 4097)]
    assert counts[:16] == list(range(1, 17)) and len(set(counts)) <= 48
    assert all(rows <= count <= 1.25 * rows for rows, count in enumerate(counts, 1))


def test_weights_that_come_and_go_cannot_be_quantised(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"resident_blocks": 1, "weights": "int8"})
    with pytest.raises(UserError, match="resident-blocks"):
        load_served(tmp_path, settings)
