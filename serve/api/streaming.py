"""The engine's events on the event loop: joined into one answer, or sent as they come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from litestar import Request as HttpRequest
from litestar.response import Stream

from serve.api.openai_format import Format, step_prediction, timings_of, usage_of, warnings_of
from serve.api.schemas import StreamOptions
from serve.engine.engine import Engine
from serve.engine.sequence import Event, Request, Usage
from serve.errors import ApiError, from_user_error

T = TypeVar("T")
logger = logging.getLogger("rdlm.serve")
PING_SECONDS = 15.0
"""Proxies close connections that say nothing for a minute, which is not long in a queue."""
MAX_UNREAD = 4096
"""Events that may wait for a slow reader before its request is abandoned: memory must not grow with its
patience."""
ENDINGS = {
    "error": (500, "the model failed on this request; the server goes on", None, "engine_error"),
    "abort": (503, "the server stopped before the answer was complete", None, "aborted"),
    "expired": (
        504,
        "the time for this request was over before its first token",
        "max_ms",
        "deadline_exceeded",
    ),
}
"""Reasons for an end that leave no answer -> status, message, param, code."""


class EngineEvents:
    """Submits requests and iterates over their events until each has finished. ``cancel`` never awaits."""

    def __init__(self, engine: Engine, requests: Sequence[Request], max_unread: int | None = None) -> None:
        """max_unread: more events than that waiting for the reader end the answer. Raises EngineClosed or
        QueueFull.
        """
        self._engine, self._max_unread = engine, max_unread
        self._loop = asyncio.get_running_loop()
        self._unread: asyncio.Queue[Event] = asyncio.Queue()
        self._open = len(requests)
        self._is_overrun = False
        self._ids = engine.submit(requests, self._deliver)

    def _deliver(self, event: Event) -> None:
        """Called in the engine thread."""
        self._loop.call_soon_threadsafe(self._keep, event)

    def _keep(self, event: Event) -> None:
        if self._is_overrun:
            return
        self._is_overrun = self._max_unread is not None and self._unread.qsize() >= self._max_unread
        if self._is_overrun:
            self._engine.abort(self._ids)
        self._unread.put_nowait(event)

    async def events(self, ping_seconds: float | None = None) -> AsyncIterator[Event | None]:
        """Events as they come; None after each ``ping_seconds`` without one.

        Raises ApiError when the engine loses or drops a request, or the reader fell too far behind; abandons
        the other requests on any exception or early exit.
        """
        try:
            while self._open:
                try:
                    async with asyncio.timeout(ping_seconds):
                        event = await self._unread.get()
                except TimeoutError:
                    yield None
                    continue
                if self._is_overrun and self._unread.empty():
                    message = (
                        f"the client left {self._max_unread} events unread; read faster, or do not stream"
                    )
                    raise ApiError(408, message, "invalid_request_error", code="slow_reader")
                self._open -= event.finish is not None
                if event.error is not None:
                    raise from_user_error(event.error)
                if event.finish in ENDINGS:
                    status, message, param, code = ENDINGS[event.finish]
                    raise ApiError(status, message, "server_error", param, code)
                yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Free the slots of whatever is unfinished."""
        if self._open:
            self._open = 0
            self._engine.abort(self._ids)


async def until_disconnect(request: HttpRequest[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, cancelled as soon as the client has gone. Raises ApiError 499 then (nobody
    reads it).
    """
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection", "client_error")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()


async def _disconnected(request: HttpRequest[Any, Any, Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def last_events(events: EngineEvents) -> list[Event]:
    """The last event of each request, in their order."""
    found = [event async for event in events.events() if event is not None and event.finish is not None]
    return sorted(found, key=lambda event: event.index)


async def collect(events: EngineEvents, answer: Format) -> dict[str, Any]:
    """All choices in order, and the usage, as one answer."""
    pieces: list[list[dict[str, Any]]] = [[] for _ in answer.parsed.requests]
    usages: list[Usage] = []
    async for event in events.events():
        if event is None or event.step_prediction is not None:
            continue
        pieces[event.index].append(answer.piece(event))
        if event.usage is not None:
            usages.append(event.usage)
    return {
        **answer.head(stream=False),
        "choices": [answer.merge(parts) for parts in pieces],
        "usage": usage_of(answer.parsed, usages),
        "timings": timings_of(usages),
        **warnings_of(answer.parsed),
    }


async def chunks(
    events: EngineEvents, answer: Format, options: StreamOptions | None
) -> AsyncIterator[dict[str, Any] | None]:
    """One chunk a token, the finish reason with the last token's; then, if wanted, one with the usage. None
    is a sign of life.

    Between tokens, if wanted, chunks without choices with the predictions of each core step.
    """
    head, parsed = answer.head(stream=True), answer.parsed
    usages: list[Usage] = []
    completion_tokens = 0
    ends_with_usage = options is not None and options.include_usage
    async for event in events.events(PING_SECONDS):
        if event is None:
            yield None
            continue
        if event.step_prediction is not None:
            yield {**head, "choices": [], "recurrence": step_prediction(answer.names, event)}
            continue
        chunk = {**head, "choices": [answer.piece(event)]}
        completion_tokens += event.token is not None
        if event.usage is not None:
            usages.append(event.usage)
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = {**usage_of(parsed, usages), "completion_tokens": completion_tokens}
            chunk["usage"]["total_tokens"] = chunk["usage"]["prompt_tokens"] + completion_tokens
            if len(usages) < len(parsed.requests):  # the work of a choice is known at its end
                del chunk["usage"]["recurrence"]
        if len(usages) == len(parsed.requests) and not ends_with_usage:
            chunk |= warnings_of(parsed)
        yield chunk
    if ends_with_usage:
        account = {"usage": usage_of(parsed, usages), "timings": timings_of(usages)}
        yield {**head, "choices": [], **account, **warnings_of(parsed)}


def sse(payload: dict[str, Any] | None, name: str | None = None) -> bytes:
    """One event. None is a comment, which clients skip.

    Events end with a bare blank line ("\\n\\n"): common clients split on nothing else. Strict clients of
    completions and chat fail at an event with a name; those of responses need one.
    """
    if payload is None:
        return b": ping\n\n"
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + msgspec.json.encode(payload) + b"\n\n"


async def _encoded(payloads: AsyncIterator[dict[str, Any] | None]) -> AsyncIterator[bytes]:
    """Chunks as events. The status line is out already, so an error becomes the last event."""
    try:
        async for payload in payloads:
            yield sse(payload)
    except ApiError as error:
        logger.warning("stream ended with an error: %s", error.message)
        yield sse(error.body())
    yield b"data: [DONE]\n\n"


async def _named(payloads: AsyncIterator[dict[str, Any] | None]) -> AsyncIterator[bytes]:
    """Events that carry their name as ``type``."""
    async for payload in payloads:
        yield sse(payload, None if payload is None else payload["type"])


def event_stream(
    payloads: AsyncIterator[dict[str, Any] | None], more_headers: Mapping[str, str], is_named: bool = False
) -> Stream:
    """The HTTP answer; a client that leaves cancels the iterator, and with it the work."""
    encoded = _named(payloads) if is_named else _encoded(payloads)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **more_headers}
    return Stream(encoded, media_type="text/event-stream", headers=headers, status_code=200)
