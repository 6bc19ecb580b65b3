"""What a GPU would do with the code, shown on a CPU: no tensor on the wrong device, no host that waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import counts
from benchmarks.fake_cuda import Watch, load_guard
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.objective import objective_config
from rdlm.data.batch import Batch, on_device
from rdlm.diffusion.targets import frozen_rows
from rdlm.nn.attention import rotary_table
from rdlm.objectives import Objective
from rdlm.objectives.base import HeldOut, Keys
from rdlm.objectives.edm import Edm
from rdlm.registry import build
from rdlm.sampling_params import SamplingParams
from serve.engine.replay import Eager, Key, Pass
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Request, StepBudget, StepResult
from tests.guard.guard_cases import CUT, MODELS, PAIRS, batch, is_image
from train.trainer import Tally

SERVED = [name for name in (*PAIRS, *CUT) if name.startswith(("huginn", "llama"))]


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        load_guard(tmp_path_factory.mktemp("guard"))
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def watch(guard: None) -> Iterator[Watch]:
    """Caches hold no tensors of another test, and none without data afterwards."""
    rotary_table.cache_clear(), frozen_rows.cache_clear()
    yield Watch()
    rotary_table.cache_clear(), frozen_rows.cache_clear()


def config_of(name: str) -> CheckpointConfig:
    document = MODELS[name]
    objective = objective_config.validate_python(document["objective"])
    model = {**document["model"], "noise_conditioning": objective.noise_conditioned}
    return CheckpointConfig.model_validate({"name": "t", **document, "model": model, "objective": objective})


def on_fake_device(name: str, watch: Watch) -> tuple[Objective, Batch]:
    """The network in bf16 on the device, and a batch of the host."""
    network = build(config_of(name), device="meta")
    watch.move(network)
    with watch.fake:
        for part in network.parts:
            if part.targets is not None:  # made once, when a run starts
                part.targets(part.model.ln_f.weight.device)
    return network, Batch(*batch(MODELS[name], 0))


@pytest.mark.parametrize(
    ("name", "source"), [*((name, "counter") for name in MODELS), *((name, "generator") for name in PAIRS)]
)
def test_a_training_forward_neither_mixes_devices_nor_waits(watch: Watch, name: str, source: Any) -> None:
    """From batches in host memory to sums on the device, as the trainer does it."""
    network, rows = on_fake_device(name, watch)
    tally = Tally()
    with watch.fake, watch:
        there = on_device([rows, rows], torch.device("cuda", 0))
        for part in network.parts:
            for micro, each in enumerate(there):
                terms = part.loss(each, Keys(0, 1, micro=micro, source=source))
                assert terms.total.device.type == "cuda"
                tally.add(terms.total, terms.count, terms.metrics)
    rotary = {line: count for line, count in watch.waits.items() if "attention.py" in line}
    assert sum(rotary.values()) <= 1, "the rotary table is sent once, by the first layer"
    assert {line: count for line, count in watch.waits.items() if line not in rotary} == {}
    assert sum("batch.py" in line or "device.py" in line for line in watch.copies) >= 1


@pytest.mark.parametrize("name", [*PAIRS, *CUT])
def test_nothing_else_mixes_devices(watch: Watch, name: str) -> None:
    """Held-out figures, scores, answers and drawing; these may wait."""
    network, rows = on_fake_device(name, watch)
    with watch.fake, watch, torch.no_grad():
        there = rows.to("cuda:0")
        network.evaluate(there, HeldOut((1,) if is_image(MODELS[name]) else (1, 3)))
        if isinstance(network, Edm):
            network.sample_images(there.targets[:, 0], 3, guidance=2.0)
            return
        most = config_of(name).max_steps
        steps = (1, min(3, most))
        network.answer(there.inputs, steps)
        if config_of(name).objective.left_to_right:
            of_images = is_image(MODELS[name])  # their mixture over draws is not defined
            network.score(there.inputs, there.targets, (1,) if of_images else steps, num_draws=2)
        else:
            network.token_logprobs(there.inputs, there.targets, steps, num_draws=2)


class Captured:
    """A Replayer whose passes, once their tables are made, neither wait nor send anything."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, key: Key, run: Pass) -> tuple[torch.Tensor, ...]:
        run()
        before = self.watch.waits.total(), self.watch.copies.total()
        out = run()
        assert (self.watch.waits.total(), self.watch.copies.total()) == before
        return out

    def forget(self) -> None:
        pass


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize(
    ("name", "cache"),
    [*((name, "shared") for name in SERVED), ("huginn single_pass", "full"), ("huginn onestep", "full")],
)
def test_the_serving_step_mixes_no_devices(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, name: str, cache: Any, is_static: bool
) -> None:
    """Requests of different K that join and leave; tensors of inference mode cannot be fake.

    is_static: single rows run in the parts that a GPU captures, where nothing waits and nothing comes from the host.
    """

    assert serve_three(watch, monkeypatch, name, cache, Captured(watch) if is_static else None, logprobs=2)


@pytest.mark.parametrize(
    ("name", "cache"),
    [("huginn onestep", "shared"), ("huginn onestep", "full"), ("llama next_token", "shared")],
)
def test_a_decode_step_sends_once_and_reads_tokens_once(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, name: str, cache: Any
) -> None:
    """Where nothing but tokens is wanted, whatever the requests' K and settings."""
    steps = serve_three(watch, monkeypatch, name, cache, Eager(), logprobs=None)
    assert len(steps) > 1 and {(1, 0), (1, 1)} >= set(steps), "copies to the device and waits of each step"
    assert (1, 1) in steps


def serve_three(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, name: str, cache: Any, replay: Any, logprobs: int | None
) -> list[tuple[int, int]]:
    """Requests of different K to their end -> copies to the device and waits of each step in which all rows decode;
    the steps in which tables are made are left out."""
    import serve.engine.runner as module

    monkeypatch.setattr(module, "costs_of", module.costs_of.__wrapped__)
    run: Callable[..., Any] = Runner.run.__wrapped__  # type: ignore[attr-defined]
    network, _ = on_fake_device(name, watch)
    config, most = config_of(name), min(4, config_of(name).max_steps)
    warm = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    steps: list[tuple[int, int]] = []
    with watch.fake, watch, torch.no_grad():
        runner = Runner(
            network.eval(), config, num_slots=4, max_len=64, max_steps=8, num_tokens=60, kv_cache=cache,
            replay=replay,
        )  # fmt: skip
        scheduler = Scheduler(4, 32, 16)
        for number in range(3):
            budget = StepBudget(1 + number % most)
            request = Request((1, 2, 3, 4), budget, 4, warm, seed=number, logprobs=logprobs)
            scheduler.add(runner.sequence(number, request, 16))
        scheduler.admit()
        finished = 0
        for _ in range(60):
            running = scheduler.schedule()
            if not running:
                break
            before = watch.copies.total(), watch.waits.total()
            results = run(runner, running)
            if all(len(sequence.output) > 1 for sequence in running):
                after = watch.copies.total(), watch.waits.total()
                steps.append((after[0] - before[0], after[1] - before[1]))
            for sequence in running:
                result = results.get(sequence.id)
                sequence.advance(result or StepResult())
                sequence.output.extend(result.tokens if result else ())
                if len(sequence.output) == 4:
                    runner.release(sequence)
                    scheduler.remove(sequence)
                    finished += 1
    assert finished == 3
    return steps


def test_the_watch_sees_what_it_is_for(watch: Watch) -> None:
    """A test that could not fail would prove nothing."""
    with watch.fake, watch:
        there, here = watch.cuda(4), torch.ones(4)
        with pytest.raises(RuntimeError, match="device"):
            there + here
        float(there.sum())
        there[there > 0]
        torch.ones(4).to("cuda")
        there.cpu()
        here.to("cuda", non_blocking=True)
    found = sorted(line.partition(" at ")[0] for line in watch.waits.elements())
    assert found == ["blocking copy to the device", "boolean index", "copy to the host", "item"]
    assert sum(watch.copies.values()) == 1


def test_counts_of_a_decode_step(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """What benchmarks/counts.py reports: captured, a step is few launches, one copy and a wait for each token."""
    monkeypatch.setattr(counts.runner_module, "costs_of", counts.runner_module.costs_of.__wrapped__)
    greedy = counts.SETTINGS["greedy"]
    plain, captured = (counts.decode("huginn", 2, 2, greedy, is_static, None) for is_static in (False, True))
    assert captured["copies"] == 1 and captured["waits"] == 0.5, "K = 2: a token in every second step"
    assert plain["launches"] == plain["kernels"] > 100 > 4 * captured["launches"]
    assert 0 < plain["conversions"] < plain["kernels"] < plain["operators"]
    assert counts.is_kernel(torch.ops.aten.mm.default) and counts.is_kernel(torch.ops.aten.copy_.default)
    assert not counts.is_kernel(torch.ops.aten.view.default) and not counts.is_kernel(
        torch.ops.aten.empty.memory_format
    )
