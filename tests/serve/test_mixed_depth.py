"""Positions of different depth share every core step: at full load none runs with rows missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.mixed_depth import full_load, workload
from rdlm.exit_criteria import ExitRule
from serve.engine.engine import Engine
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import StepBudget
from serve.settings import EngineSettings

SLOTS, K = 6, 8


@pytest.mark.parametrize("cache", ["shared", "full"])
def test_core_steps_are_those_that_known_depths_ask_for(make_served: Callable[..., Any], cache: Any) -> None:
    """At least 95 % of what depths from 1 to K save over K steps of every position, counted in steps of the engine
    while requests wait. All start together, which is where full batches of one depth are easiest."""
    settings = EngineSettings(max_slots=SLOTS, prefix_cache="off", kv_cache=cache)
    served = make_served("bptt", settings=settings)
    requests = workload(K, 4 * SLOTS, 12, True, 200)
    with Engine(lambda: served) as engine:
        load = full_load(engine, requests)
    asked = load.rows / (K * load.tokens)
    assert 0.4 < asked < 0.7 and load.tokens > 2 * SLOTS * 12
    assert (1 - load.calls * SLOTS / (K * load.tokens)) / (1 - asked) > 0.95


@pytest.mark.parametrize("cache", ["shared", "full"])
def test_an_exit_gate_saves_what_its_depths_say(make_served: Callable[..., Any], cache: Any) -> None:
    """The same where a gate decides, of which nobody knows before when it lets a position go."""
    settings = EngineSettings(max_slots=SLOTS, prefix_cache="off", kv_cache=cache)
    served = make_served("bptt", settings=settings, exit_gate="linear")
    runner = served.runner
    with torch.no_grad():
        runner.denoiser.model.exit_gate.linear.weight.mul_(3)
    requests = [
        replace(one, budget=StepBudget(K, exit=ExitRule("gate", 0.3 + 0.1 * (i % 7))))
        for i, one in enumerate(workload(K, 4 * SLOTS, 12, False, 200))
    ]
    with Engine(lambda: served) as engine:
        load = full_load(engine, requests)
        steps = [e.steps for events in engine.generate(requests[:7]) for e in events if e.token is not None]
    assert len(set(steps)) > 4
    asked = load.rows / (K * load.tokens)
    assert 0.2 < asked < 0.8 and load.tokens > 2 * SLOTS * 12
    assert (1 - load.calls * SLOTS / (K * load.tokens)) / (1 - asked) > 0.95


@pytest.mark.parametrize("cache", ["shared", "full"])
def test_positions_that_end_at_different_steps_are_read_out_together(
    make_served: Callable[..., Any], cache: Any
) -> None:
    """Fewer passes through the coda, the tokens of an engine in which nobody waits, and at least 95 % of what known
    depths save in core steps; log-probabilities and texts too, next to the rounding of other batches."""
    slots, most = 16, K
    settings = EngineSettings(max_slots=slots, prefix_cache="off", kv_cache=cache)
    requests = workload(most, 3 * slots, 12, True, 200)
    found, tokens = {}, {}
    for waits in (True, False):
        served = make_served("bptt", settings=settings)
        scheduler = Scheduler(slots, settings.prefill_rows, settings.chunk, 1.0 if waits else 0.0)
        with Engine(lambda served=served, own=scheduler: replace(served, scheduler=own)) as engine:  # type: ignore[misc]
            found[waits] = full_load(engine, requests)
            answers = engine.generate(requests)
        tokens[waits] = [[(e.token, e.steps) for e in events if e.token is not None] for events in answers]
    assert tokens[True] == tokens[False]
    together, apart = found[True], found[False]
    assert together.readouts / together.tokens < 0.75 * apart.readouts / apart.tokens
    asked = together.rows / (most * together.tokens)
    assert (1 - together.calls * slots / (most * together.tokens)) / (1 - asked) > 0.95


def test_nobody_waits_alone_or_without_a_bound(make_served: Callable[..., Any]) -> None:
    """A single request takes as many engine steps as without waiting; so do those of one K."""
    settings = EngineSettings(max_slots=16, prefix_cache="off")
    alone, same = workload(K, 1, 12, True, 200), workload(K, 16, 12, False, 200)
    steps = {}
    for cost in (0.0, 5.0):
        served = make_served("bptt", settings=settings)
        scheduler = Scheduler(16, settings.prefill_rows, settings.chunk, cost)
        with Engine(lambda served=served, own=scheduler: replace(served, scheduler=own)) as engine:  # type: ignore[misc]
            counts = []
            for requests in (alone, same):
                before = engine.counters.steps
                engine.generate(requests)
                counts.append(engine.counters.steps - before)
        steps[cost] = counts
    assert steps[0.0] == steps[5.0] and steps[0.0][1] == 12 * K
