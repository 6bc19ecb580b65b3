"""Events on an asyncio loop without a model: comments keep a silent stream open, and nothing ticks after its
end.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve.api.streaming import EngineEvents, sse
from serve.engine.sequence import Event
from serve.errors import ApiError


class Silent:
    """An engine that says one token after ``delay`` seconds and ends after twice that."""

    def __init__(self, delay: float) -> None:
        self.delay, self.aborted = delay, []

    def submit(self, requests: Any, sink: Any) -> list[int]:
        loop = asyncio.get_running_loop()
        loop.call_later(self.delay, sink, Event(0, 5))
        loop.call_later(2 * self.delay, sink, Event(0, 6, finish="length"))
        return [0]

    def abort(self, ids: list[int]) -> None:
        self.aborted.append(ids)


async def _listen(engine: Any, ping_seconds: float | None) -> list[Event | None]:
    events = EngineEvents(engine, [None])  # type: ignore[list-item]
    return [event async for event in events.events(ping_seconds)]


def test_silence_is_filled() -> None:
    found = asyncio.run(_listen(Silent(0.5), 0.1))
    first, last = (
        next(i for i, event in enumerate(found) if event is not None and event.token == token)
        for token in (5, 6)
    )
    assert last == len(found) - 1 and all(event is None for event in found[:first]) and first >= 1
    assert sse(None) == b": ping\n\n"


def test_events_without_pauses_are_not_interrupted() -> None:
    engine = Silent(0.05)
    for ping_seconds in (30, None):
        assert [event and event.token for event in asyncio.run(_listen(engine, ping_seconds))] == [5, 6]
    assert engine.aborted == []


class Talkative:
    """An engine that sends 50 events at once, and no end."""

    def __init__(self) -> None:
        self.aborted: list[list[int]] = []

    def submit(self, requests: Any, sink: Any) -> list[int]:
        for token in range(50):
            sink(Event(0, token))
        return [7]

    def abort(self, ids: list[int]) -> None:
        self.aborted.append(ids)


def test_a_reader_that_leaves_events_unread_loses_its_request() -> None:
    """What was queued is still delivered; memory stays bounded, and the slot is free at once."""
    engine = Talkative()

    async def read() -> list[int | None]:
        events, found = EngineEvents(engine, [None], max_unread=20), []  # type: ignore[list-item, arg-type]
        await asyncio.sleep(0.05)
        assert engine.aborted == [[7]] and events._unread.qsize() == 21
        with pytest.raises(ApiError, match="20 events unread"):
            async for event in events.events():
                found.append(event and event.token)
        return found

    assert asyncio.run(read()) == list(range(20))
