"""The engine's events on the event loop, and as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from serve.engine.engine import Engine
from serve.engine.sequence import Event, Request
from serve.errors import ApiError, from_user_error

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


def _failure(event: Event) -> ApiError:
    """The error that stands for an end without an answer."""
    if event.error is not None:
        return from_user_error(event.error)
    assert event.finish is not None
    status, message, param, code = ENDINGS[event.finish]
    return ApiError(status, message, "server_error", param, code)


def sse(payload: dict[str, Any], name: str | None = None) -> bytes:
    """One event.

    Events end with a bare blank line ("\\n\\n"): common clients split on nothing else. Strict clients of
    completions and chat fail at an event with a name; those of responses need one.
    """
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + msgspec.json.encode(payload) + b"\n\n"
