"""Compiled layers: whole graphs, few of them, nothing made in them that belongs outside, and the eager results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
import torch._inductor.metrics as inductor
from torch import Tensor

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.batch import Batch
from rdlm.nn.attention import CausalContext, rotate
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from rdlm.registry import build
from train.compilation import compile_layers, uncompiled
from train.trainer import recompute_layers

MADE_OUTSIDE = {"arange", "polar", "outer", "view_as_complex", "_enter_inference_mode", "tril"}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    dynamo.reset()
    yield
    dynamo.reset()


@pytest.fixture
def graphs() -> list[set[str]]:
    return []


@pytest.fixture
def spy(graphs: list[set[str]]) -> Callable[..., Any]:
    """A backend that runs graphs as they are and notes the names of their operations."""

    def note(module: Any, inputs: Any) -> Any:
        nodes = [node.target for node in module.graph.nodes if node.op.startswith("call")]
        graphs.append({getattr(target, "__name__", str(target)) for target in nodes})
        return module.forward

    return note


@pytest.fixture
def pair(tiny_config: Callable[..., CheckpointConfig]) -> Callable[..., tuple[Objective, Objective]]:
    """``pair("huginn", "single_pass")`` -> the same network twice, several layers in each part."""

    def make(family: str, objective: object, **model: Any) -> tuple[Objective, Objective]:
        parts = {"num_prelude_layers": 2, "num_core_layers": 3, "num_coda_layers": 2}
        shape = parts if family == "huginn" else {"num_layers": 3}
        config = tiny_config(family, objective, **shape, **model)
        return build(config, seed=0), build(config, seed=0)

    return make


def rows() -> Batch:
    ids = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(4, 16, dtype=torch.bool))


def loss_and_gradients(network: Objective, step: int) -> tuple[Tensor, list[Tensor]]:
    network.zero_grad()
    total = network.loss(rows(), Keys(0, step)).total
    total.backward()
    return total.detach(), [p.grad for p in network.parameters() if p.grad is not None]


def test_real_rotation_has_the_bits_of_the_complex_one() -> None:
    x, table = torch.randn(2, 9, 4, 16), CausalContext(9).rope(16, 1e4)
    assert torch.equal(rotate(x, table), rotate(x, torch.view_as_real(table)))
    assert torch.equal(rotate(x.bfloat16(), table), rotate(x.bfloat16(), torch.view_as_real(table)))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(
    ("family", "objective", "most"),
    [
        ("huginn", "single_pass", 3),  # prelude and coda, core without gradient, core with gradient
        ("huginn", "onestep", 2),
        ("huginn", "paper", 3),
        ("llama", "next_token", 1),
        ("llama", "evidence", 1),
        ("masked", "masked", 1),
    ],
)
def test_layers_share_their_graphs_whatever_r_is(
    pair, spy, graphs: list[set[str]], family: str, objective: str, most: int, recomputed: bool
) -> None:
    compiled, plain = pair(family, objective)
    compile_layers(compiled, spy)
    if recomputed:
        recompute_layers(compiled)
    for step in range(6):  # r from 1 to 6
        found, wanted = loss_and_gradients(compiled, step), loss_and_gradients(plain, step)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)
    assert 1 <= len(graphs) <= most
    assert not MADE_OUTSIDE & set().union(*graphs)


def test_evaluation_makes_no_graphs(pair, spy, graphs: list[set[str]]) -> None:
    compiled, plain = pair("huginn", "single_pass")
    compile_layers(compiled, spy)
    ids = rows()
    with uncompiled():
        found = compiled.score(ids.inputs[:3, :11], ids.targets[:3, :11], (1, 3))
    wanted = plain.score(ids.inputs[:3, :11], ids.targets[:3, :11], (1, 3))
    assert graphs == [] and torch.equal(found[3].logprobs, wanted[3].logprobs)


def test_names_of_weights_stay(pair, spy) -> None:
    compiled, plain = pair("huginn", "single_pass")
    compile_layers(compiled, spy)
    assert list(compiled.state_dict()) == list(plain.state_dict())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_computes_the_eager_loss_in_few_kernels(pair, dtype: torch.dtype) -> None:
    """A layer has some 50 pointwise operations; fused they are a few loops around five products."""
    compiled, plain = (network.to(dtype) for network in pair("huginn", "single_pass"))
    compile_layers(compiled)
    inductor.reset()
    for step in (0, 1):
        found, wanted = loss_and_gradients(compiled, step), loss_and_gradients(plain, step)
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=0)
        for mine, theirs in zip(found[1], wanted[1], strict=True):
            assert (mine - theirs).norm() <= max(tolerance * 3 * theirs.norm(), 1e-3)
    graphs_with_backward = 5  # two of three graphs have a backward pass
    assert 0 < inductor.generated_kernel_count <= 24 * graphs_with_backward


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_with_compiled_layers_follows_the_eager_one(trainer, monkeypatch, stage: int) -> None:
    """At stage 3 a layer gathers its weights as a whole, before the compiled code."""
    monkeypatch.setattr(
        "train.trainer.compile_layers", lambda network: compile_layers(network, backend="aot_eager")
    )
    losses = {}
    for mode in ("off", "layers"):
        run = trainer({"compile": mode, "deepspeed.zero_stage": stage, "precision": "fp32"})
        losses[mode] = []
        for step in range(3):
            batches = run._batches(step)
            tally = run.train_step(batches, float(sum(batch.mask.sum() for batch in batches)))
            run.step += 1
            losses[mode].append(float(tally.total))
    assert losses["layers"] == pytest.approx(losses["off"], rel=1e-4)
