"""FLOPs of a request against PyTorch's own count of what the engine ran for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rdlm.exit_criteria import ExitRule
from rdlm.flops import Cost
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine, Served
from serve.engine.sequence import Request, StepBudget, StepPredictions

GREEDY = SamplingParams(temperature=0)


def counted(served: Served, request: Request) -> tuple[int, int]:
    """(what the account says, what PyTorch counted) for a request that is alone."""
    real, total = served.runner.run, []

    def run(batch: list[Any]) -> Any:
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):  # it does not know the CPU's fused kernel
            found = real(batch)
        total.append(counter.get_total_flops())
        return found

    served.runner.run = run  # type: ignore[method-assign]
    with Engine(lambda: served) as engine:
        engine.generate([request])  # what is computed once for all requests
        total.clear()
        usage = engine.generate([request])[0][-1].usage
    assert usage is not None
    return usage.flops, sum(total)


FIELDS: dict[str, dict[str, Any]] = {
    "plain": {}, "scored": {"logprobs": 1, "prompt_logprobs": 1},
    "step_predictions": {"step_predictions": StepPredictions(2, 1)},
    "exits": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "k", "case"),
    [
        ("next_token", 1, "plain"),
        ("evidence", 3, "plain"),
        ("evidence", 3, "step_predictions"),
        ("paper", 3, "scored"),
    ]
    + [("onestep", 5, case) for case in FIELDS],
)
def test_the_account_is_what_pytorch_counts(
    objective: str, k: int, case: str, make_served: Callable[..., Served]
) -> None:
    """Prompts of one position, so that no attention is padded or masked: both counts must be the same to the
    last FLOP."""
    served = make_served(objective, family="llama" if objective == "next_token" else "huginn")
    budget = StepBudget(k, exit=ExitRule("kl", 0.5, check_every=2) if case == "exits" else None)
    account, truth = counted(served, Request((7,), budget, 3, GREEDY, **FIELDS[case]))
    assert account == truth > 0


def test_blocks_are_charged_for_their_own_layers(make_served: Callable[..., Served]) -> None:
    served = make_served("evidence", family="llama", num_layers=5)
    account, truth = counted(served, Request((7,), StepBudget(4), 5, GREEDY))
    assert account == truth


def test_a_chunk_sees_a_triangle(make_served: Callable[..., Served]) -> None:
    """PyTorch counts the masked half of causal attention too; the account does not."""
    assert Cost(10, 2).of(seen=3, length=2) == 2 * 10 + (4 + 5) * 2
    served = make_served("onestep")
    account, truth = counted(served, Request(tuple(range(5, 15)), StepBudget(3), 1, GREEDY))
    layers = 1 + 3 * 2 + 1  # passes through a layer of each position
    masked = 10 * 9 // 2 * 4 * 32 * layers
    assert truth - account == masked


def test_strangers_do_not_change_the_bill(make_served: Callable[..., Served]) -> None:
    requests = [
        Request(tuple(range(5, 5 + length)), StepBudget(k), 4, GREEDY)
        for length, k in ((3, 8), (20, 1), (9, 5))
    ]
    with Engine(lambda: make_served("onestep")) as engine:
        alone = [engine.generate([one])[0][-1].usage for one in requests]
        together = [events[-1].usage for events in engine.generate(requests)]
        assert engine.counters.flops == 2 * sum(usage.flops for usage in alone if usage)
    assert [(u.flops, u.kv_bytes) for u in alone if u] == [(u.flops, u.kv_bytes) for u in together if u]
