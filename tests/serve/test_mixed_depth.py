"""Positions of different depth share every core step: at full load none runs with rows missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.mixed_depth import full_load, workload
from serve.engine.engine import Engine
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
