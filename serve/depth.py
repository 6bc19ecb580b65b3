"""How deep a request wants to think: fields, aliases and efforts to a number of core steps and an exit rule. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable

from serve.errors import ApiError, invalid
from serve.events import Served
from serve.schemas import Effort, SamplingBody
from serve.sequence import ExitRule

THRESHOLDS = {"latent-diff": 0.03, "kl": 1e-3}
"""Of a request that names none: those of Huginn's reference implementation."""
EFFORTS: dict[Effort, Callable[[int], int]] = {
    "none": lambda default: 1,
    "minimal": lambda default: default // 4,
    "low": lambda default: default // 2,
    "medium": lambda default: default,
    "high": lambda default: default * 2,
    "xhigh": lambda default: default * 4,
}
"""``reasoning_effort`` to K, relative to the server's default: a useful K depends on the depths a model was trained at."""


def efforts(served: Served) -> dict[str, int]:
    """K of each ``reasoning_effort``, cut to what the model takes."""
    return {name: min(max(1, of(served.default_steps)), served.max_steps) for name, of in EFFORTS.items()}


def resolve_depth(body: SamplingBody, name: str, served: Served) -> tuple[int, ExitRule | None]:
    """(K, or the most steps where an exit rule may end a token earlier; that rule). Raises ApiError."""
    asked = _fixed_steps(body, name, served)
    if body.num_steps != "auto" and body.exit is None:
        return (served.default_steps if asked is None else asked), None
    if served.config.objective.k_meaning != "thinking":
        problem = "this model draws each token through K noise levels and needs them all; name a number of steps"
        raise invalid(f"exit: {problem}", "num_steps" if body.exit is None else "exit", "exits_unsupported")
    return _exit_rule(body, asked, served)


def _fixed_steps(body: SamplingBody, name: str, served: Served) -> int | None:
    """The number of steps that model alias, num_steps or reasoning_effort asks for; None where none of them does."""
    found: dict[str, int] = {}
    if body.model is not None and body.model != name:
        match = re.fullmatch(re.escape(name) + r":k(\d{1,6})", body.model)
        if match is None:
            hint = f"this server has {name!r} and {name!r}:kN with N from 1 to {served.max_steps}"
            message = f"the model {body.model!r} does not exist; {hint}"
            raise ApiError(404, message, "invalid_request_error", "model", "model_not_found")
        found["model"] = int(match[1])
    if body.reasoning_effort is not None:
        found["reasoning_effort"] = efforts(served)[body.reasoning_effort]
    if isinstance(body.num_steps, int):
        found["num_steps"] = body.num_steps
    for param, steps in found.items():
        _check_range(steps, param, served)
    if len(set(found.values())) > 1:
        asks = " and ".join(f"{param} for {steps}" for param, steps in found.items())
        raise invalid(f"{asks} steps contradict each other; name one of them", [*found][-1])
    return next(iter(found.values()), None)


def _check_range(steps: int, param: str, served: Served) -> None:
    if not 1 <= steps <= served.max_steps:
        message = f"{param}: K = {steps} is out of range; this model takes 1 to {served.max_steps}"
        raise invalid(message, param, "num_steps_out_of_range")


def _exit_rule(body: SamplingBody, asked: int | None, served: Served) -> tuple[int, ExitRule]:
    criterion = "latent-diff" if body.exit is None else body.exit.criterion
    threshold = THRESHOLDS[criterion]
    most, least = served.max_steps if asked is None else asked, 1
    if body.exit is not None:
        threshold = threshold if body.exit.threshold is None else body.exit.threshold
        least = body.exit.min_steps or 1
        if body.exit.max_steps is not None:
            _check_range(body.exit.max_steps, "exit.max_steps", served)
            if asked not in (None, body.exit.max_steps):
                message = f"exit.max_steps: {body.exit.max_steps} contradicts the {asked} steps asked for; name one of them"
                raise invalid(message, "exit.max_steps")
            most = body.exit.max_steps
    if least > most:
        raise invalid(f"exit.min_steps: {least} exceeds the most steps ({most})", "exit.min_steps")
    return most, ExitRule(criterion, threshold, least)
