"""What every route needs: the engine, the settings, and what follows from them. No torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import ParamSpec, TypeVar

from litestar import Request

from serve.api.chat_template import ChatTemplate
from serve.api.observability import Metrics
from serve.api.openai_format import TokenNames
from serve.api.request_parsing import STEPS_HEADER, Limits, Parsed, header_steps
from serve.api.streaming import MAX_UNREAD, EngineEvents
from serve.engine.engine import Engine, Served
from serve.engine.grammar import Grammars
from serve.errors import ApiError
from serve.settings import HttpSettings

P = ParamSpec("P")
T = TypeVar("T")
MAX_COMPILING = 256
"""Requests with a schema or grammar that may wait to be compiled."""


class ServerState:
    """One application's engine, settings and metrics."""

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

    def limits(self, request: Request | None = None) -> Limits:
        """What ``request``, which arrives now, is checked against. Raises EngineClosed, or ApiError for its
        X-Num-Steps.
        """
        served, settings = self.served, self.settings
        pressure = (
            0 if settings.brownout_queue is None else self.engine.num_waiting // settings.brownout_queue
        )
        return Limits(
            self.name,
            served,
            max(1, served.default_steps // (1 + pressure)),
            capacity=served.scheduler.num_slots + self.engine.max_queue,
            grammars=self.grammars,
            longest_token=self.token_names.longest,
            max_ms=None if settings.request_seconds is None else round(1000 * settings.request_seconds),
            header_steps=None if request is None else header_steps(request.headers.getall(STEPS_HEADER, [])),
        )

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

    def submit(self, parsed: Parsed, stream: bool = False) -> EngineEvents:
        """Queue all requests of ``parsed`` or none. Raises EngineClosed or QueueFull.

        A stream ends when its client leaves too many events unread, except where a masked model draws whole
        answers in one step.
        """
        self.metrics.brownouts += parsed.browned_out
        is_bounded = stream and self.limits().left_to_right
        return EngineEvents(self.engine, parsed.requests, MAX_UNREAD if is_bounded else None)
