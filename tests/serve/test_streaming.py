"""Events on an asyncio loop without a model: comments keep a silent stream open, and nothing ticks after its
end.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from serve.api.openai_format import ChoicesAnswer
from serve.api.streaming import EngineEvents
from serve.engine.sequence import Event, Request, StepBudget
from serve.errors import ApiError


class Silent:
    """An engine that says one token after ``delay`` seconds and ends after twice that."""

    def __init__(self, delay: float) -> None:
        self.delay, self.aborted = delay, []

    def submit(self, requests: Any, sink: Any, call_soon: Any) -> list[int]:
        loop = asyncio.get_running_loop()
        loop.call_later(self.delay, sink, Event(0, 5))
        loop.call_later(2 * self.delay, sink, Event(0, 6, finish="length"))
        return [0]

    def abort(self, ids: list[int]) -> None:
        self.aborted.append(ids)


async def _listen(engine: Any, ping_seconds: float | None) -> list[Event | None]:
    """Events; None stands for an empty batch."""
    events = EngineEvents(engine, [None])  # type: ignore[list-item]
    return [event async for batch in events.batches(ping_seconds) for event in batch or [None]]


def test_silence_is_filled() -> None:
    found = asyncio.run(_listen(Silent(0.5), 0.1))
    first, last = (
        next(i for i, event in enumerate(found) if event is not None and event.token == token)
        for token in (5, 6)
    )
    assert last == len(found) - 1 and all(event is None for event in found[:first]) and first >= 1


def test_events_without_pauses_are_not_interrupted() -> None:
    engine = Silent(0.05)
    for ping_seconds in (30, None):
        assert [event and event.token for event in asyncio.run(_listen(engine, ping_seconds))] == [5, 6]
    assert engine.aborted == []


class Talkative:
    """An engine that sends 50 events at once, and no end."""

    def __init__(self) -> None:
        self.aborted: list[list[int]] = []

    def submit(self, requests: Any, sink: Any, call_soon: Any) -> list[int]:
        for token in range(50):
            call_soon(sink, Event(0, token))
        return [7]

    def abort(self, ids: list[int]) -> None:
        self.aborted.append(ids)


def test_a_reader_that_leaves_events_unread_loses_its_request() -> None:
    """What was queued is still delivered; memory stays bounded, and the slot is free at once."""
    engine = Talkative()

    async def read() -> list[int | None]:
        events, found = EngineEvents(engine, [None], max_unread=20), []  # type: ignore[list-item, arg-type]
        await asyncio.sleep(0.05)
        assert engine.aborted == [[7]] and len(events._unread) == 20
        with pytest.raises(ApiError, match="20 events unread"):
            async for batch in events.batches():
                found += [event.token for event in batch]
        return found

    assert asyncio.run(read()) == list(range(20))


class Failing(Talkative):
    """An engine that sends two tokens and a failure at once."""

    def submit(self, requests: Any, sink: Any, call_soon: Any) -> list[int]:
        for event in (Event(0, 5), Event(0, 6), Event(0, finish="error"), Event(0, 7)):
            sink(event)
        return [0]


def test_what_came_before_a_failure_is_delivered_first() -> None:
    async def read() -> list[int | None]:
        found: list[int | None] = []
        with pytest.raises(ApiError, match="failed on this request"):
            async for batch in EngineEvents(Failing(), [None]).batches():  # type: ignore[list-item, arg-type]
                found += [event.token for event in batch]
        return found

    assert asyncio.run(read()) == [5, 6]


class Plain(ChoicesAnswer):
    """An answer with as little as a stream needs."""

    def head(self, stream: bool) -> dict[str, Any]:
        return {"id": "x", "model": self.model}

    def piece(self, event: Event) -> dict[str, Any]:
        return {"index": event.index, "text": event.text}

    def merge(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        return pieces[-1]


class Lagging:
    """An engine whose second and third token come while the reader is busy with the first."""

    def submit(self, requests: Any, sink: Any, call_soon: Any) -> list[int]:
        self.sink = sink
        sink(Event(0, 5, "a"))
        return [0]

    def go_on(self) -> None:
        self.sink(Event(0, 6, "b\n\n"))
        self.sink(Event(0, 7, "", finish="length"))


def test_a_reader_that_lags_gets_several_chunks_in_one_piece() -> None:
    async def read() -> list[bytes]:
        engine, found = Lagging(), []
        requests = [Request((5,), StepBudget(1), 3)]
        answer = Plain(model="m", names=None, requests=requests)  # type: ignore[arg-type]
        async for part in answer.stream(EngineEvents(engine, requests)):  # type: ignore[arg-type]
            found.append(part)
            if len(found) == 1:
                engine.go_on()
        return found

    first, rest, end = asyncio.run(read())
    assert end == b"data: [DONE]\n\n" and rest.endswith(b"}\n\n")
    texts = [json.loads(part[6:])["choices"][0]["text"] for part in (first + rest).split(b"\n\n")[:-1]]
    assert texts == ["a", "b\n\n", ""] and first.count(b"data: ") == 1
