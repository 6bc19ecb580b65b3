"""The engine's events on the event loop: joined into one answer, or sent as they come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from litestar import Request as HttpRequest
from litestar.response import Stream

from serve.api.observability import FACTS
from serve.api.openai_format import Format, step_prediction, timings_of, usage_of, warnings_of
from serve.api.request_parsing import Parsed
from serve.api.schemas import StreamOptions
from serve.api.state import ServerState
from serve.engine.engine import Engine
from serve.engine.sequence import Event, Request, Usage
from serve.errors import ApiError, from_user_error

T = TypeVar("T")
logger = logging.getLogger("rdlm.serve")
PING_SECONDS = 15.0
"""Proxies close connections that say nothing for a minute, which is not long in a queue."""
PING = b": ping\n\n"
"""A comment, which clients skip."""
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

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        max_unread: int | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """max_unread: more events than that waiting for the reader end the answer. facts: gets the number of
        ``tokens`` that were read, for the log. Raises EngineClosed or QueueFull.
        """
        self._engine, self._max_unread = engine, max_unread
        self._facts = {} if facts is None else facts
        self._facts["tokens"] = 0
        self._loop = asyncio.get_running_loop()
        self._unread: list[Event] = []
        self._arrival = asyncio.Event()
        self._open = len(requests)
        self._is_overrun, self._is_silent = False, True
        self._timer: asyncio.TimerHandle | None = None
        self._ids = engine.submit(requests, self._keep, self._loop.call_soon_threadsafe)

    def _keep(self, event: Event) -> None:
        if self._is_overrun:
            return
        if self._max_unread is not None and len(self._unread) >= self._max_unread:
            self._is_overrun = True
            self._engine.abort(self._ids)
        else:
            self._unread.append(event)
        self._arrival.set()

    def _tick(self, seconds: float) -> None:
        """One timer for the whole stream: setting one for each token would cost more than its text."""
        if self._is_silent:
            self._arrival.set()
        self._is_silent = True
        self._timer = self._loop.call_later(seconds, self._tick, seconds)

    async def batches(self, ping_seconds: float | None = None) -> AsyncIterator[list[Event]]:
        """What has come since the last batch was read: the events of one engine step, or of several where the
        reader is slow. An empty batch where nothing came for ``ping_seconds``, or for less than twice as long.

        Raises ApiError when the engine loses or drops a request, or the reader fell too far behind; abandons
        the other requests on any exception or early exit.
        """
        if ping_seconds is not None:
            self._timer = self._loop.call_later(ping_seconds, self._tick, ping_seconds)
        try:
            while self._open:
                await self._arrival.wait()
                self._arrival.clear()
                batch, self._unread, self._is_silent = self._unread, [], False
                end = next((i for i, event in enumerate(batch) if event.finish in ENDINGS), None)
                whole = batch[:end]
                for event in whole:
                    self._open -= event.finish is not None
                    self._facts["tokens"] += event.token is not None
                if whole or end is None:
                    yield whole
                if end is not None:
                    raise _failure(batch[end])
                if self._is_overrun:
                    message = (
                        f"the client left {self._max_unread} events unread; read faster, or do not stream"
                    )
                    raise ApiError(408, message, "invalid_request_error", code="slow_reader")
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Free the slots of whatever is unfinished."""
        if self._timer is not None:
            self._timer.cancel()
        if self._open:
            self._open = 0
            self._engine.abort(self._ids)


def submit(
    server: ServerState, parsed: Parsed, request: HttpRequest[Any, Any, Any], stream: bool = False
) -> EngineEvents:
    """Queue all requests of ``parsed`` or none. Raises EngineClosed or QueueFull.

    A stream ends when its client leaves too many events unread, except where a masked model draws whole
    answers in one step.
    """
    server.metrics.brownouts += parsed.browned_out
    is_bounded = stream and server.left_to_right
    facts: dict[str, Any] = request.scope[FACTS]  # type: ignore[literal-required]
    facts["num_steps"] = parsed.budget.num_steps
    return EngineEvents(server.engine, parsed.requests, MAX_UNREAD if is_bounded else None, facts)


def _failure(event: Event) -> ApiError:
    """Of an end that leaves no answer."""
    if event.error is not None:
        return from_user_error(event.error)
    assert event.finish is not None
    status, message, param, code = ENDINGS[event.finish]
    return ApiError(status, message, "server_error", param, code)


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
    found = [event async for batch in events.batches() for event in batch if event.finish is not None]
    return sorted(found, key=lambda event: event.index)


async def collect(events: EngineEvents, answer: Format) -> dict[str, Any]:
    """All choices in order, and the usage, as one answer."""
    pieces: list[list[dict[str, Any]]] = [[] for _ in answer.parsed.requests]
    usages: list[Usage] = []
    async for batch in events.batches():
        for event in batch:
            if event.step_prediction is not None:
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


class Chunks:
    """One answer as server-sent events: a chunk a token, the finish reason with the last token's; then, if
    wanted, one with the usage. Between tokens, if wanted, chunks without choices with the predictions of each
    core step.

    What all chunks share is encoded once. What has come together is sent in one piece.
    """

    def __init__(self, answer: Format, options: StreamOptions | None) -> None:
        self._answer, self._options = answer, options or StreamOptions()
        self._head = b"data: " + msgspec.json.encode(answer.head(stream=True))[:-1] + b',"choices":['
        self._usages: list[Usage] = []
        self._completion_tokens = 0

    async def of(self, events: EngineEvents) -> AsyncIterator[bytes]:
        """The body. The status line is out already, so an error becomes the last event."""
        try:
            async for batch in events.batches(PING_SECONDS):
                yield b"".join([self._chunk(event) for event in batch]) or PING
            if self._options.include_usage:
                usage = usage_of(self._answer.parsed, self._usages)
                more = {"usage": usage, "timings": timings_of(self._usages)}
                yield self._encode(b"", {**more, **warnings_of(self._answer.parsed)})
        except ApiError as error:
            logger.warning("stream ended with an error: %s", error.message)
            yield sse(error.body())
        yield b"data: [DONE]\n\n"

    def _chunk(self, event: Event) -> bytes:
        if event.step_prediction is not None:
            return self._encode(b"", {"recurrence": step_prediction(self._answer.names, event)})
        parsed, options, more = self._answer.parsed, self._options, {}
        self._completion_tokens += event.token is not None
        if event.usage is not None:
            self._usages.append(event.usage)
        has_ended = len(self._usages) == len(parsed.requests)
        if options.continuous_usage_stats:
            usage = {**usage_of(parsed, self._usages), "completion_tokens": self._completion_tokens}
            usage["total_tokens"] = usage["prompt_tokens"] + self._completion_tokens
            if not has_ended:  # the work of a choice is known at its end
                del usage["recurrence"]
            more["usage"] = usage
        if has_ended and not options.include_usage:
            more |= warnings_of(parsed)
        return self._encode(msgspec.json.encode(self._answer.piece(event)), more)

    def _encode(self, choice: bytes, more: dict[str, Any]) -> bytes:
        """A chunk with this choice or none, and further fields."""
        rest = b"," + msgspec.json.encode(more)[1:] if more else b"}"
        return self._head + choice + b"]" + rest + b"\n\n"


def sse(payload: dict[str, Any], name: str | None = None) -> bytes:
    """One event.

    Events end with a bare blank line ("\\n\\n"): common clients split on nothing else. Strict clients of
    completions and chat fail at an event with a name; those of responses need one.
    """
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + msgspec.json.encode(payload) + b"\n\n"


def event_stream(body: AsyncIterator[bytes], more_headers: Mapping[str, str]) -> Stream:
    """The HTTP answer; a client that leaves cancels the iterator, and with it the work."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **more_headers}
    return Stream(body, media_type="text/event-stream", headers=headers, status_code=200)
