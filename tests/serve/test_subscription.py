"""Events on an asyncio loop without a model: comments keep a silent stream open, and nothing ticks after its end."""

from __future__ import annotations

import asyncio
from typing import Any

from serve.api.streaming import sse
from serve.api.subscription import PING, Subscription
from serve.engine.events import Event


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


async def _listen(engine: Any, ping: float | None) -> list[Event]:
    subscription = Subscription(engine, [None], ping)  # type: ignore[list-item]
    found = [event async for event in subscription.events()]
    before = subscription._events.qsize()
    await asyncio.sleep(0.3)
    assert subscription._events.qsize() == before
    return found


def test_silence_is_filled() -> None:
    found = asyncio.run(_listen(Silent(0.5), 0.1))
    first, last = (next(i for i, event in enumerate(found) if event.token == token) for token in (5, 6))
    assert last == len(found) - 1 and all(event is PING for event in found[:first]) and first >= 1
    assert sse({}) == b": ping\n\n"


def test_talk_is_not() -> None:
    engine = Silent(0.05)
    assert [event.token for event in asyncio.run(_listen(engine, 30))] == [5, 6]
    assert [event.token for event in asyncio.run(_listen(engine, None))] == [5, 6]
    assert engine.aborted == []
