"""The engine's events on an asyncio loop: one subscription per HTTP request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from serve.engine.engine import Engine
from serve.engine.events import Event
from serve.engine.sequence import Request
from serve.errors import ApiError

PING = Event(-1)
"""Stands for a while without news."""


class Subscription:
    """Submits requests and iterates over their events until each has finished. ``cancel`` never awaits."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], ping_seconds: float | None = None
    ) -> None:
        """ping_seconds: after so long without an event there is a PING. Raises EngineClosed or QueueFull."""
        self._engine = engine
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._open = len(requests)
        loop = asyncio.get_running_loop()
        self._quiet = True
        self._timer: asyncio.TimerHandle | None = None

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        def tick(seconds: float) -> None:
            if self._quiet:
                self._events.put_nowait(PING)
            self._quiet = True
            self._timer = loop.call_later(seconds, tick, seconds)

        self._ids = engine.submit(requests, deliver)
        if ping_seconds is not None:
            self._timer = loop.call_later(ping_seconds, tick, ping_seconds)

    async def events(self) -> AsyncIterator[Event]:
        """Raises ApiError when the engine loses or drops a request; abandons the others on any exception or early exit."""
        try:
            while self._open:
                event = await self._events.get()
                self._quiet = False
                self._open -= event.finish is not None
                if event.finish == "error":
                    raise ApiError(
                        500,
                        "the model failed on this request; the server goes on",
                        "server_error",
                        code="engine_error",
                    )
                if event.finish == "abort":
                    raise ApiError(
                        503,
                        "the server stopped before the answer was complete",
                        "server_error",
                        code="aborted",
                    )
                if event.finish == "expired":
                    raise ApiError(
                        504,
                        "the time for this request was over before its first token",
                        "server_error",
                        "max_ms",
                        "deadline_exceeded",
                    )
                yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Free the slots of whatever is unfinished."""
        if self._timer is not None:
            self._timer.cancel()
        if self._open:
            self._open = 0
            self._engine.abort(self._ids)
