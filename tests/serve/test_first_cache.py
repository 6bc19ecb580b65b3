"""The cache policy ``first``: later steps of a position read the past's keys of the first step, and their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rdlm.errors import UserError
from rdlm.nn.attention import CausalContext, attention
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Event, Request, Speculation, StepBudget, Wavefront
from serve.loading import optimise
from serve.settings import EngineSettings

K = 5
PROMPTS = [(5, 9, 20, 31, 7, 11), tuple(range(20, 41)), (17,)]
GREEDY = SamplingParams(temperature=0)


class FirstKeys(CausalContext):
    """Whole sequences under the policy. step: of the core step now taken, 0 in layers that run once."""

    step = 0

    def __init__(self, length: int) -> None:
        super().__init__(length, torch.device("cpu"))
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        if self.step == 0:
            self.kept[layer] = (k, v)
            return super().attend(q, k, v, layer)
        first_k, first_v = self.kept[layer]
        before = torch.ones(self.length, self.length, dtype=torch.bool).tril(-1)
        mask = torch.cat([before, torch.eye(self.length, dtype=torch.bool)], 1)
        return attention(q, torch.cat([first_k, k], 1), torch.cat([first_v, v], 1), mask=mask)


@torch.no_grad()
def greedy(model: Any, ids: tuple[int, ...], count: int) -> list[int]:
    found = list(ids)
    for _ in range(count):
        inputs = torch.tensor([found])
        ctx = FirstKeys(len(found))
        e = model.encode(inputs, ctx)
        state = model.initial_state(e)
        for ctx.step in range(K):
            state = model.core(state, e, None, ctx)
        ctx.step = 0
        found.append(int(model.logits(model.decode(state, ctx))[0, -1].argmax()))
    return found[len(ids) :]


def first(**more: Any) -> EngineSettings:
    return EngineSettings(kv_cache="first", max_slots=6, **{"chunk": 8, "prefill_rows": 16, **more})


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


@pytest.mark.parametrize("kernels", [False, True])
def test_answers_are_those_of_the_definition(make_served: Callable[..., Any], kernels: bool) -> None:
    """In chunks of any size, guessed early, and with a prefix that is known: each is plain greedy decoding."""
    plain = [Request(prompt, StepBudget(K), 10, GREEDY) for prompt in PROMPTS]
    for chunk in (3, 16):
        served = make_served("bptt", settings=first(chunk=chunk), state_init="zero")
        expected = [greedy(served.runner.denoiser.model, prompt, 10) for prompt in PROMPTS]
        if kernels:
            optimise(served.runner.denoiser, first())
        budgets = [
            StepBudget(K),
            StepBudget(K, speculation=Speculation(2, 4)),
            StepBudget(K, wavefront=Wavefront(4, 1, 0.0)),
        ]
        with Engine(lambda served=served: served) as engine:
            found = engine.generate([replace(r, budget=budget) for budget in budgets for r in plain])
        assert [tokens(events) for events in found] == expected * 3


def test_memory_is_that_of_the_shared_cache(make_served: Callable[..., Any]) -> None:
    wanted, found = Request(PROMPTS[1], StepBudget(K), 4, GREEDY), []
    for policy in ("first", "shared", "full"):
        settings = first().model_copy(update={"kv_cache": policy, "prefix_cache": "off"})
        with Engine(lambda settings=settings: make_served("bptt", settings=settings)) as engine:
            (events,) = engine.generate([wanted])
        usage = events[-1].usage
        assert usage is not None
        found.append(usage.kv_bytes)
    assert found[0] == found[1] < found[2]


@pytest.mark.parametrize("objective", ["evidence", "next_token"])
def test_models_without_such_keys_are_refused(make_served: Callable[..., Any], objective: str) -> None:
    with pytest.raises(UserError, match="kv_cache='first'"):
        make_served(objective, settings=first(), **({"family": "llama"} if objective == "next_token" else {}))
