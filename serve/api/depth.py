"""How deep a request wants to think: fields, aliases and efforts to numbers of core steps, an exit rule, a deadline. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from serve.api.schemas import Effort, SamplingBody
from serve.engine.events import Served
from serve.engine.exits import ExitRule
from serve.errors import ApiError, invalid

THRESHOLDS = {
    "latent-diff": 0.03, "cosine": 1e-3, "kl": 1e-3, "minp-kl": 1e-5, "entropy-diff": 1e-3, "argmax-stability": 5.0,
}  # fmt: skip
"""Of a request that names none: those of Huginn's reference implementation."""
STEPS_HEADER = "X-Num-Steps"
"""K for clients that can send a header and no field (lm-eval's log-likelihoods)."""
EFFORTS: dict[Effort, Callable[[int], int]] = {
    "none": lambda default: 1,
    "minimal": lambda default: default // 4,
    "low": lambda default: default // 2,
    "medium": lambda default: default,
    "high": lambda default: default * 2,
    "xhigh": lambda default: default * 4,
}
"""``reasoning_effort`` to K, relative to the server's default: a useful K depends on the depths a model was trained at."""


@dataclass(frozen=True)
class Terms:
    """What a request is checked against: the model, the name it is served under, and what the server decides."""

    name: str
    served: Served
    default_steps: int
    """K where a request names none: ``served.default_steps``, or fewer while too many wait (brown-out)."""
    max_ms: int | None = None
    """Longest any request may take."""
    header_steps: int | None = None
    """K as the header X-Num-Steps of the request has it."""


@dataclass(frozen=True)
class DepthChoice:
    """What a request asks of its depth, checked. Fields as in serve.engine.sequence.Request."""

    num_steps: int
    exit: ExitRule | None = None
    schedule: tuple[int, ...] = ()
    min_steps: int = 1
    max_ms: int | None = None
    lowers: bool = False
    browned_out: bool = False
    """K is below the server's default because too many wait."""

    @property
    def varies(self) -> bool:
        """Whether tokens of one answer may differ in their steps."""
        return self.exit is not None or bool(self.schedule) or self.lowers


def efforts(served: Served) -> dict[str, int]:
    """K of each ``reasoning_effort``, cut to what the model takes."""
    return {name: min(max(1, of(served.default_steps)), served.max_steps) for name, of in EFFORTS.items()}


def resolve_depth(body: SamplingBody, terms: Terms) -> DepthChoice:
    """Raises ApiError."""
    asked = _fixed_steps(body, terms)
    exits = body.exit is not None or body.num_steps == "auto"
    _check_masked(body, terms.served)
    if body.schedule is not None and (asked is not None or body.num_steps == "auto"):
        raise invalid(
            "schedule: it names every K itself; leave num_steps, reasoning_effort and the alias out",
            "schedule",
        )
    for param in ("min_steps", "max_steps"):
        if getattr(body, param) is not None and not exits and (param == "max_steps" or body.max_ms is None):
            needs = "exit or num_steps 'auto'" + (" or max_ms" if param == "min_steps" else "")
            raise invalid(f"{param}: it bounds a depth that varies; send it with {needs}", param)
    schedule = (
        tuple(body.schedule) if isinstance(body.schedule, list) else ()
    )  # validation leaves no other form
    for k in schedule:
        _check_range(k, "schedule", terms.served)
    browned_out = (
        asked is None and not exits and not schedule and terms.default_steps < terms.served.default_steps
    )
    most = asked or (max(schedule) if schedule else terms.default_steps)
    rule = None
    if exits:
        most, rule = _exit_rule(body, max(schedule) if schedule else asked, terms.served)
    least = body.min_steps or 1
    if least > most:
        raise invalid(f"min_steps: {least} exceeds the most steps ({most})", "min_steps")
    limits = [limit for limit in (body.max_ms, terms.max_ms) if limit is not None]
    return DepthChoice(
        most, rule, schedule, least, min(limits, default=None), body.max_ms is not None, browned_out
    )


def _check_masked(body: SamplingBody, served: Served) -> None:
    """Raises ApiError for what varies the depth of single tokens, where all of an answer takes part in every step."""
    if served.config.objective.masking is None:
        return
    for param in ("exit", "num_steps", "schedule", "max_ms"):
        value = getattr(body, param)
        if value == "auto" or (value is not None and param != "num_steps"):
            code = "exits_unsupported" if param in ("exit", "num_steps") else None
            raise invalid(
                f"{param}: this model fills in all of an answer in K steps; name a number of steps",
                param,
                code,
            )


def _fixed_steps(body: SamplingBody, terms: Terms) -> int | None:
    """The number of steps that model alias, header, num_steps or reasoning_effort asks for; None where none of them does."""
    found: dict[str, int] = {}
    name, served = terms.name, terms.served
    if body.model is not None and body.model != name:
        match = re.fullmatch(re.escape(name) + r":k([0-9]{1,6})", body.model)
        if match is None:
            hint = f"this server has {name!r} and {name!r}:kN with N from 1 to {served.max_steps}"
            message = f"the model {body.model!r} does not exist; {hint}"
            raise ApiError(404, message, "invalid_request_error", "model", "model_not_found")
        found["model"] = int(match[1])
    if terms.header_steps is not None:
        found[STEPS_HEADER] = terms.header_steps
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


def _exit_rule(body: SamplingBody, asked: int | None, served: Served) -> tuple[int, ExitRule | None]:
    """(most steps, rule); no rule for criterion "none". asked: the most steps as other fields have it."""
    if served.config.objective.k_meaning != "thinking":
        problem = (
            "this model draws each token through K noise levels and needs them all; name a number of steps"
        )
        raise invalid(f"exit: {problem}", "num_steps" if body.exit is None else "exit", "exits_unsupported")
    bounds = {}
    for name in ("min_steps", "max_steps"):
        inside, outside = getattr(body.exit, name, None), getattr(body, name)
        if None not in (inside, outside) and inside != outside:
            raise invalid(
                f"exit.{name}: {inside} contradicts {name} = {outside}; name one of them", f"exit.{name}"
            )
        bounds[name] = (f"exit.{name}", inside) if inside is not None else (name, outside)
    (least_param, least), (most_param, most) = bounds["min_steps"], bounds["max_steps"]
    if most is not None:
        _check_range(most, most_param, served)
        if asked not in (None, most):
            raise invalid(
                f"{most_param}: {most} contradicts the {asked} steps asked for; name one of them", most_param
            )
    most = most or asked or served.max_steps
    if (least or 1) > most:
        raise invalid(f"{least_param}: {least} exceeds the most steps ({most})", least_param)
    given = body.exit
    criterion = "latent-diff" if given is None else given.criterion
    if criterion == "none":
        return most, None
    threshold = THRESHOLDS[criterion] if given is None or given.threshold is None else given.threshold
    if given is None:
        return most, ExitRule(criterion, threshold, least or 1)
    return most, ExitRule(
        criterion, threshold, least or 1, given.check_every or 1, given.prefill is not False
    )
