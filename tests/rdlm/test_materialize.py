"""A network built without memory gets the weights that it has when it is built with memory, one at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rdlm.registry import build, materialize

BLOCKS = {"num_blocks": 2}


@pytest.mark.parametrize(
    ("family", "objective", "blocks"),
    [
        ("huginn", "single_pass", None),
        ("huginn", "exit_gate", None),
        ("llama", "evidence", BLOCKS),
        ("masked", "masked", None),
        ("huginn", "paper", None),
    ],
)
def test_the_weights_are_those_of_a_network_built_with_memory(
    tiny_config: Callable[..., Any], family: str, objective: str, blocks: dict[str, int] | None
) -> None:
    document = {**tiny_config(family, objective).model_dump(), "blocks": blocks}
    config = type(tiny_config()).model_validate(document)
    expected, made = build(config, seed=7).state_dict(), build(config, device="meta")
    materialize(made, 7, torch.float32, lambda parameter: None)
    found = made.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_more_than_a_weight_is_in_memory_beside_the_network(
    tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 the network takes two bytes a parameter; of the fp32 values at most one weight's are alive."""
    alive: set[int] = set()
    most = 0
    empty = torch.empty

    def counted(*shape: Any, **named: Any) -> torch.Tensor:
        nonlocal most
        made = empty(*shape, **named)
        if not made.is_meta:
            alive.add(id(made))
            weakref.finalize(made, alive.discard, id(made))
            most = max(most, len(alive))
        return made

    made = build(tiny_config("huginn", "single_pass"), device="meta")
    monkeypatch.setattr(torch, "empty", counted)
    kept: list[nn.Parameter] = []
    materialize(made, 0, torch.bfloat16, kept.append)
    assert most <= 2 and len(kept) == len(list(made.parameters()))
    assert all(parameter.dtype == torch.bfloat16 and not parameter.is_meta for parameter in made.parameters())
