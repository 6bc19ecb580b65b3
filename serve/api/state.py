"""What every route needs: the engine, the settings, and what requests are checked against. No torch."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import ParamSpec, TypeVar

from serve.api.chat_template import ChatTemplate
from serve.api.observability import Metrics
from serve.api.schemas import Effort
from serve.engine.detokenizer import TokenNames
from serve.engine.engine import Engine, Served
from serve.engine.grammar import Grammars
from serve.engine.sequence import StepBudget
from serve.errors import ApiError, invalid, shorten
from serve.settings import HttpSettings

EFFORTS: dict[Effort, Callable[[int], int]] = {
    "none": lambda default: 1,
    "minimal": lambda default: default // 4,
    "low": lambda default: default // 2,
    "medium": lambda default: default,
    "high": lambda default: default * 2,
    "xhigh": lambda default: default * 4,
}
"""``reasoning_effort`` to K, relative to the server's default: a useful K depends on the numbers of steps a
model was trained at."""

P = ParamSpec("P")
T = TypeVar("T")
MAX_COMPILING = 256
"""Requests with a schema or grammar that may wait to be compiled."""


class ServerState:
    """One application's engine, settings and metrics, and what follows from them."""

    def __init__(self, engine: Engine, settings: HttpSettings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        self._compilers = ThreadPoolExecutor(2, "rdlm-grammars")
        self._compiling = 0

    @property
    def served(self) -> Served:
        """Raises EngineClosed (503) while the model loads."""
        return self.engine.served

    @property
    def name(self) -> str:
        return self.settings.model_name or self.served.config.name

    @cached_property
    def token_names(self) -> TokenNames:
        return TokenNames(self.served.tokenizer)

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.served.tokenizer, self.served.end_ids)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        return ChatTemplate.of(self.served.tokenizer)

    @property
    def default_steps(self) -> int:
        """K where a request names none: the model's default, or fewer while too many wait (brown-out)."""
        most = self.settings.brownout_queue
        pressure = 0 if most is None else self.engine.num_waiting // most
        return max(1, self.served.default_steps // (1 + pressure))

    @property
    def capacity(self) -> int:
        """Sequences that the server can hold at once, running and waiting."""
        return self.served.scheduler.num_slots + self.engine.max_queue

    @property
    def max_ms(self) -> int | None:
        """Longest that any request may take."""
        seconds = self.settings.request_seconds
        return None if seconds is None else round(1000 * seconds)

    @property
    def left_to_right(self) -> bool:
        """Whether the model draws one token after the other."""
        return self.served.config.objective.left_to_right

    @property
    def depends_on_num_steps(self) -> bool:
        """Whether the first steps of K are other ones than those of a smaller K."""
        return self.served.config.model.depends_on_num_steps

    @property
    def supports_exits(self) -> bool:
        """Whether a position may stop before its K steps."""
        return self.served.config.objective.supports_exits

    @property
    def meaning(self) -> str:
        """What K is, in words."""
        if not self.left_to_right:
            return (
                "steps in which the masked tokens of an answer are filled in; "
                "likelihoods are those of one token a step from left to right"
            )
        if self.served.config.runs_once:
            return "1, because the layers run once (`rdlm convert` makes such a model recurrent)"
        if self.supports_exits:
            return "core iterations before each token; likelihoods are those after K iterations"
        return "noise levels each token is drawn through; likelihoods are those at K = 1"

    @property
    def efforts(self) -> dict[str, int]:
        """K of each ``reasoning_effort``, cut to what the model takes and was trained with."""
        default, most = self.served.default_steps, self.most_unnamed
        return {name: min(max(1, of(default)), most) for name, of in EFFORTS.items()}

    @property
    def most_unnamed(self) -> int:
        """Largest K that is chosen without being named: what training covered, or the default where it is
        more."""
        served, trained = self.served, self.served.config.trained_steps
        return (
            served.max_steps if trained is None else min(max(trained, served.default_steps), served.max_steps)
        )

    def warnings(self, budget: StepBudget) -> tuple[str, ...]:
        """What a client should know about the K of a request."""
        warning = self.served.config.depth_warning(budget.num_steps)
        return () if warning is None else (warning,)

    def model_steps(self, model: str | None) -> int | None:
        """K of a model alias, None for the plain name. Raises ApiError 404 for another model."""
        if model is None or model == self.name:
            return None
        match = re.fullmatch(re.escape(self.name) + r":k([0-9]{1,6})", model)
        if match is None:
            hint = (
                f"this server has {self.name!r} and '{self.name}:kN' with N from 1 to {self.served.max_steps}"
            )
            message = f"the model {shorten(model)!r} does not exist; {hint}"
            raise ApiError(404, message, "invalid_request_error", "model", "model_not_found")
        return self.check_range(int(match[1]), "model")

    def check_range(self, steps: int, param: str) -> int:
        """``steps``. Raises ApiError where the model does not take so many."""
        if not 1 <= steps <= self.served.max_steps:
            message = f"{param}: K = {steps} is out of range; this model takes 1 to {self.served.max_steps}"
            raise invalid(message, param, "num_steps_out_of_range")
        return steps

    async def in_compiler(self, parse: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``parse(...)`` of a request that has a grammar to compile, in threads of their own: slow ones delay no
        other kind of request. Raises ApiError 429 where too many wait.
        """
        if self._compiling >= MAX_COMPILING:
            problem = "too many requests with a schema or grammar wait to be compiled; try again in 2 s"
            raise ApiError(429, problem, "rate_limit_error", code="queue_full", retry_after=2)
        self._compiling += 1
        try:
            work = partial(parse, *args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(self._compilers, work)
        finally:
            self._compiling -= 1
