"""Trained exit gates as exit criteria: exit steps are those of the published code."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from litestar.testing import TestClient
from safetensors.torch import load_file
from torch import Tensor

from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.data.tokenizer import train_tokenizer
from rdlm.errors import UserError
from rdlm.exit_criteria import CRITERIA, ExitRule, Gate, Halt
from rdlm.sampling_params import SamplingParams
from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.engine.exits import default_thresholds
from serve.engine.sequence import Request, StepBudget
from serve.loading import load_served
from serve.settings import EngineSettings, HttpSettings


@pytest.fixture(scope="module")
def client(make_served: Callable[..., Served]) -> Iterator[TestClient]:
    """A server of a model without an exit gate."""
    with (
        Engine(make_served) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        yield client


def imported(shared: Path, tmp_path: Path, family: str) -> tuple[Path, dict[str, Tensor]]:
    """A golden checkpoint, imported with a tokenizer of its vocabulary, and its reference outputs."""
    golden = shared / "golden" / f"{family}_tiny"
    if not golden.is_dir():
        pytest.skip(f"no golden outputs at {golden}")
    source = Path(shutil.copytree(golden, tmp_path / "source"))
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(400)]
    train_tokenizer("bpe", iter([" ".join(words)]), 320).save(source)
    folder = import_checkpoint(str(source), tmp_path / "model", name="zoo")
    return folder, load_file(source / "outputs.safetensors")


def first_steps(folder: Path, prompts: list[list[int]], k: int, rule: ExitRule) -> list[int | None]:
    """Core steps of the position that the first token of each answer is drawn from."""
    settings = EngineSettings(max_slots=8, chunk=24, prefill_rows=96, max_len=48)
    budget, greedy = StepBudget(k, exit=rule), SamplingParams(temperature=0)
    with Engine(lambda: load_served(folder, settings)) as engine:
        answers = engine.generate([Request(tuple(ids), budget, 1, greedy) for ids in prompts])
    return [next(event.steps for event in events if event.token is not None) for events in answers]


@pytest.mark.parametrize("chunk", [24, 7])
def test_ouros_weighted_exit_mixes_the_logits_of_all_loops(
    shared_data: Path, tmp_path: Path, chunk: int
) -> None:
    """Golden logits of use_weighted_exit at every second position, of the prompt's last token and of a decoded
    one; rows of plain requests share the steps."""
    folder, expected = imported(shared_data.parent, tmp_path, "ouro")
    prompts = [ids[:length] for ids in expected["input_ids"].tolist() for length in range(2, 25, 2)]
    wanted = expected["logits_weighted_exit_K4"].log_softmax(-1)[:, 1::2].flatten(0, 1)
    settings = EngineSettings(kv_cache="full", max_slots=8, chunk=chunk, prefill_rows=96, max_len=48)
    greedy, rule = SamplingParams(temperature=0), ExitRule("weighted", 0.0)
    budgets = (StepBudget(4, exit=rule), StepBudget(3))
    requests = [Request(tuple(ids), budget, 2, greedy, logprobs=5) for ids in prompts for budget in budgets]
    with Engine(lambda: load_served(folder, settings)) as engine:
        answers = engine.generate(requests)[::2]
    for events, row in zip(answers, wanted, strict=True):
        first, second = (event for event in events if event.token is not None)
        assert first.logprobs is not None and first.steps == 4
        for token, logprob in first.logprobs.top:
            assert logprob == pytest.approx(row[token].item(), abs=1e-4)
    longer = tuple(prompts[-1]) + (answers[-1][0].token,)  # the same token drawn behind a prompt
    with Engine(lambda: load_served(folder, settings)) as engine:
        again = engine.generate([Request(longer, StepBudget(4, exit=rule), 1, greedy, logprobs=5)])[0][0]
    second = next(event for event in answers[-1][1:] if event.token is not None)
    assert second.logprobs is not None and again.logprobs is not None
    assert [i for i, _ in second.logprobs.top] == [i for i, _ in again.logprobs.top]


def test_a_weighted_exit_takes_no_threshold(shared_data: Path, tmp_path: Path) -> None:
    folder, _ = imported(shared_data.parent, tmp_path, "ouro")
    with (
        Engine(lambda: load_served(folder, EngineSettings(max_slots=2))) as engine,
        TestClient(create_app(engine, HttpSettings())) as client,
    ):
        asked = {"prompt": [1, 2, 3], "num_steps": 3, "max_tokens": 2}
        answer = client.post("/v1/completions", json={**asked, "exit": {"criterion": "weighted"}})
        assert answer.status_code == 200 and answer.json()["usage"]["recurrence"]["exits"] == 0
        refused = client.post(
            "/v1/completions", json={**asked, "exit": {"criterion": "weighted", "threshold": 0.5}}
        )
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "exit.threshold"


def test_gates_against_their_definitions() -> None:
    gates = torch.tensor([[0.2, 0.5, 0.9], [0.1, 0.1, 0.3]])
    memory: list[Tensor | None] = [None, None]
    found = []
    for step in range(3):
        value, kept = Gate.measure(gates[:, step], memory)
        memory = [*kept]
        found.append(value)
        assert Halt.measure(gates[:, step], memory)[0].tolist() == gates[:, step].tolist()
    expected = [[0.2, 0.1], [0.6, 0.19], [0.96, 0.433]]
    assert torch.allclose(torch.stack(found), torch.tensor(expected))
    assert Gate.settled(0.6, 0.6) and not Gate.settled(0.59, 0.6) and not Gate.settled(1.0, 1.0)
    assert Halt.settled(0.61, 0.6) and not Halt.settled(0.6, 0.6)
    assert not Gate.settled(1.0, 0.0) and not Halt.settled(1.0, 0.0)


def test_exit_steps_of_every_position_are_those_of_ouro(shared_data: Path, tmp_path: Path) -> None:
    """A prompt ends at each position; the reference computes all loops of what is before it, as one chunk
    does."""
    folder, expected = imported(shared_data.parent, tmp_path, "ouro")
    threshold = expected["exit_threshold"].item()
    prompts = [row[: end + 1] for row in expected["input_ids"].tolist() for end in range(len(row))]
    wanted = (expected["exit_step_threshold_K4"] + 1).flatten().tolist()
    assert 1 < len(set(wanted))
    assert first_steps(folder, prompts, 4, ExitRule("gate", threshold)) == wanted
    assert first_steps(folder, prompts[:24], 2, ExitRule("gate", threshold)) == [
        min(k, 2) for k in wanted[:24]
    ]
    assert first_steps(folder, prompts[:24], 4, ExitRule("gate", 1.0)) == [4] * 24
    rare = first_steps(folder, prompts[:24], 4, ExitRule("gate", threshold, check_every=2))
    assert rare == [k + k % 2 for k in wanted[:24]]  # every step's probability counts, whatever is checked


def test_rows_halt_where_those_of_loopus_do(shared_data: Path, tmp_path: Path) -> None:
    folder, expected = imported(shared_data.parent, tmp_path, "loopus")
    threshold, ids = expected["halt_threshold"].item(), expected["input_ids"].tolist()
    wanted = [
        next((k for k, p in enumerate(row, 1) if p > threshold), 8)
        for row in expected["halt_prob_last_position"].tolist()
    ]
    assert wanted == [8, 1]
    assert first_steps(folder, ids, 8, ExitRule("halt", threshold)) == wanted


def test_a_checkpoint_keeps_the_threshold_of_its_source(shared_data: Path, tmp_path: Path) -> None:
    folder, _ = imported(shared_data.parent, tmp_path, "loopus")
    served = load_served(folder, EngineSettings(max_slots=2, max_len=48))
    assert served.config.recurrence.exit_thresholds == {"halt": 0.9}
    assert default_thresholds(served.config).keys() == CRITERIA.keys()


@pytest.mark.parametrize("name", ["gate", "halt"])
def test_a_model_without_a_gate_refuses_its_criteria(client: TestClient, name: str) -> None:
    body = {"prompt": "a", "max_tokens": 1, "exit": {"criterion": name}}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "exit.criterion: this model has no trained exit gate" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "exit.criterion"
    assert name not in client.get("/v1/models").json()["data"][0]["recurrence"]["exits"]


def test_the_engine_refuses_a_gate_that_is_not_there(make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(UserError, match="no trained exit gate"):
        make_engine().generate([Request((5, 6), StepBudget(4, exit=ExitRule("gate", 0.5)), 1)])
