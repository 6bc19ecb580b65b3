"""Running a job for a request: collected into one answer, or chunk by chunk; a client that disconnects cancels it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Annotated, Any, TypeVar

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler
from litestar.params import HeaderParameter

from serve.api.depth import STEPS_HEADER
from serve.api.frontend import Frontend
from serve.api.openai_format import glimpse_of, timings_of, usage_of
from serve.api.request_parsing import Job
from serve.api.schemas import SamplingBody
from serve.api.subscription import PING, Subscription
from serve.engine.events import Event, Usage
from serve.errors import ApiError

T = TypeVar("T")
Piece = Callable[[Event, bool], dict[str, Any]]
"""(event, whether it is the first of its choice) -> part of the choice."""
StepsHeader = Annotated[
    int | None,
    HeaderParameter(
        name=STEPS_HEADER,
        ge=1,
        description="Core steps K, as num_steps; for clients that cannot send fields.",
    ),
]


def accepts(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Guard of routes that submit: refuses before the body is read. Raises EngineClosed (503) or QueueFull (429)."""
    connection.app.state.frontend.engine.check_room(1)


async def until_disconnect(request: Request[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, cancelled as soon as the client has gone. Raises ApiError 499 then (nobody reads it)."""
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection", "client_error")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()


async def _disconnected(request: Request[Any, Any, Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def collect(
    frontend: Frontend, job: Job, piece: Piece, merge: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> dict[str, Any]:
    """All choices in order, and the usage: the variable part of a non-streamed answer."""
    subscription = Subscription(frontend.engine, job.requests)
    pieces: list[list[dict[str, Any]]] = [[] for _ in job.requests]
    usages: list[Usage] = []
    try:
        async for event in subscription.events():
            pieces[event.index].append(piece(event, not pieces[event.index]))
            if event.usage is not None:
                usages.append(event.usage)
    finally:
        subscription.cancel()
    return {
        "choices": [merge(parts) for parts in pieces],
        "usage": usage_of(job, usages),
        "timings": timings_of(usages),
    }


async def chunks(
    frontend: Frontend,
    job: Job,
    head: dict[str, Any],
    piece: Piece,
    body: SamplingBody,
    subscription: Subscription,
) -> AsyncIterator[dict[str, Any]]:
    """One chunk a token, the finish reason with the last token's; then, if asked for, one with the usage.

    Between tokens, if asked for, chunks without choices that tell what each core step would have said; {} for a PING.
    """
    options = body.stream_options
    running = options is not None and options.continuous_usage_stats
    started: set[int] = set()
    usages: list[Usage] = []
    counts = [0] * len(job.requests)
    try:
        async for event in subscription.events():
            if event is PING:
                yield {}
                continue
            if event.glimpse is not None:
                yield {**head, "choices": [], "recurrence": glimpse_of(frontend.token_names, event)}
                continue
            chunk = {**head, "choices": [piece(event, event.index not in started)]}
            started.add(event.index)
            counts[event.index] += event.token is not None
            if event.usage is not None:
                usages.append(event.usage)
            if running:
                chunk["usage"] = {**usage_of(job, usages), "completion_tokens": sum(counts)}
                chunk["usage"]["total_tokens"] = chunk["usage"]["prompt_tokens"] + sum(counts)
            yield chunk
    finally:
        subscription.cancel()
    if options is not None and options.include_usage:
        yield {**head, "choices": [], "usage": usage_of(job, usages), "timings": timings_of(usages)}
