"""Properties of the scheduler over random traffic, without torch: nothing lost, everyone served in turn,
slots never lent twice."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdlm.exit_criteria import ExitRule
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import NO_SLOT, Request, Sequence, StepBudget, StepCounts, StepResult


@dataclass(frozen=True)
class Arrival:
    at: int
    prompt: int
    drawn: int
    context: int
    scored: bool
    max_tokens: int
    abort_after: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        at=st.integers(0, 30),
        prompt=st.integers(1, 23),
        drawn=st.integers(1, 6),
        context=st.integers(1, 6),
        scored=st.booleans(),
        max_tokens=st.integers(0, 4),
        abort_after=st.one_of(st.none(), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=12,
)


def build(number: int, a: Arrival, chunk: int) -> Sequence:
    counts = StepCounts(a.drawn, a.drawn, min(a.context, a.drawn), a.drawn)
    request = Request(
        tuple(range(a.prompt)), StepBudget(a.drawn), a.max_tokens, prompt_logprobs=0 if a.scored else None
    )
    return Sequence(number, request, counts, chunk)


class World:
    """Plays engine: arrivals, aborts, steps; keeps what every position went through."""

    def __init__(self, slots: int, chunk: int, prefill_rows: int) -> None:
        self.scheduler = Scheduler(slots, prefill_rows, chunk)
        self.steps: dict[tuple[int, int], list[int]] = defaultdict(
            list
        )  # (sequence, position) -> steps taken
        self.admitted: list[int] = []
        self.first_step: dict[int, int] = {}
        self.finished: set[int] = set()
        self.clock = 0

    def step(self) -> None:
        scheduler = self.scheduler
        scheduler.admit()
        batch = scheduler.schedule()
        self.admitted += [s.id for s in scheduler.running.values() if s.id not in self.admitted]
        slots = [s.slot for s in scheduler.running.values()]
        assert (
            len(set(slots)) == len(slots)
            and NO_SLOT not in slots
            and len(slots) + scheduler.free_slots == scheduler.num_slots
        )
        assert sum(s.length for s in batch if s.length > 1) <= scheduler.prefill_rows
        for sequence in batch:
            assert sequence.is_open
            self.first_step.setdefault(sequence.id, self.clock)
            for position in range(sequence.start, sequence.start + sequence.length):
                self.steps[sequence.id, position].append(sequence.step)
            draws, ends_context = sequence.draws, sequence.start + sequence.length == sequence.context_length
            sequence.advance(StepResult())
            if not sequence.is_open and ends_context:
                if draws:
                    sequence.output.append(0)
                if not sequence.wants_token:
                    self.finished.add(sequence.id)
                    scheduler.remove(sequence)
        self.clock += 1


@settings(max_examples=80, deadline=None)
@given(arrivals=arrivals, slots=st.integers(1, 4), chunk=st.integers(1, 8), extra_rows=st.integers(0, 8))
def test_every_position_gets_exactly_its_steps(
    arrivals: list[Arrival], slots: int, chunk: int, extra_rows: int
) -> None:
    world = World(slots, chunk, chunk + extra_rows)
    sequences = [build(i, a, chunk) for i, a in enumerate(arrivals)]
    order: list[int] = []
    aborted: set[int] = set()
    for now in range(1000):
        for sequence, a in zip(sequences, arrivals, strict=True):
            if a.at == now:
                world.scheduler.add(sequence)
                order.append(sequence.id)
            if (
                a.abort_after is not None
                and now == a.at + a.abort_after
                and sequence.id not in world.finished
            ):
                world.scheduler.remove(sequence)
                aborted.add(sequence.id)
        world.step()
        if now > 30 and not len(world.scheduler):
            break
    assert world.finished == {s.id for s in sequences} - aborted  # nothing is lost, everything ends
    assert world.scheduler.free_slots == slots
    assert world.admitted == [i for i in order if i in world.admitted]  # first come, first served
    for sequence, a in zip(sequences, arrivals, strict=True):
        if sequence.id not in world.finished:
            continue
        last = a.prompt + max(a.max_tokens, 1) - 2 if a.max_tokens else a.prompt - 1
        context = sequence.counts.scored if a.scored else sequence.counts.context
        for position in range(last + 1):
            is_context = position < a.prompt - 1 or not a.max_tokens
            expected = context if is_context else sequence.counts.drawn
            assert world.steps[sequence.id, position] == list(range(expected)), (position, a)
        assert (sequence.id, last + 1) not in world.steps
        assert sequence.prompt_row_steps == sum(len(world.steps[sequence.id, p]) for p in range(a.prompt))
        assert sequence.decode_row_steps == sum(
            len(world.steps[sequence.id, p]) for p in range(a.prompt, last + 1)
        )


def test_a_long_prompt_is_not_overtaken_and_does_not_stop_decoding() -> None:
    world = World(slots=3, chunk=4, prefill_rows=4)
    decoding = build(0, Arrival(0, 1, 2, 2, False, 50, None), 4)
    long, short = (
        build(1, Arrival(0, 40, 2, 2, False, 1, None), 4),
        build(2, Arrival(0, 3, 2, 2, False, 1, None), 4),
    )
    for sequence in (decoding, long, short):
        world.scheduler.add(sequence)
    for _ in range(20):
        world.step()
    assert len(decoding.output) == 10  # a token every two steps, prompts or not
    assert (
        world.first_step[1] == 0 and world.first_step.get(2, 20) >= 20
    )  # behind the long one's ten chunks of two steps
    world.step()
    assert world.first_step[2] == 20


def test_positions_of_one_k_begin_together() -> None:
    """Whoever joins waits once, for less than K steps, and nobody else waits: not those that were there, nor those
    of another K, nor one whose number of steps varies."""
    world = World(slots=4, chunk=4, prefill_rows=16)
    first, later, other, varying = (
        build(i, Arrival(0, 2, k, k, False, 50, None), 4) for i, k in enumerate((4, 4, 3, 4))
    )
    varying.request = replace(varying.request, budget=StepBudget(4, ExitRule("kl", 0.0)))
    tokens: dict[int, list[int]] = defaultdict(list)
    for now in range(60):
        for at, sequence in ((0, first), (1, later), (2, other), (3, varying)):
            if now == at:
                world.scheduler.add(sequence)
        world.step()
        for sequence in (first, later, other, varying):
            if len(sequence.output) > len(tokens[sequence.id]):
                tokens[sequence.id].append(now)
    gaps = {i: [b - a for a, b in zip(at, at[1:], strict=False)] for i, at in tokens.items()}
    assert set(gaps[0]) == set(gaps[3]) == {4} and set(gaps[2]) == {3}
    assert 4 < gaps[1][0] < 8 and set(gaps[1][1:]) == {4}
    assert set(tokens[1][1:]) <= set(tokens[0]) and tokens[3][1] not in tokens[0]


def test_cut_of_a_prompt_does_not_depend_on_the_traffic() -> None:
    """Same chunk boundaries alone and in a crowd: with the shared cache they are part of what is computed."""

    def cuts(crowd: int) -> set[tuple[int, int]]:
        world = World(slots=8, chunk=5, prefill_rows=7)
        watched = build(0, Arrival(0, 23, 3, 3, False, 2, None), 5)
        for i in range(crowd):
            world.scheduler.add(build(i + 1, Arrival(0, 3 + i, 1 + i, 1, False, 3, None), 5))
        world.scheduler.add(watched)
        found: set[tuple[int, int]] = set()
        while len(world.scheduler):
            world.scheduler.admit()
            batch = world.scheduler.schedule()
            found |= {(s.start, s.length) for s in batch if s.id == 0 and not s.step}
            world.step()
        return found

    assert cuts(0) == cuts(6) == {(0, 5), (5, 5), (10, 5), (15, 5), (20, 3), (23, 1)}


def test_chunk_must_fit() -> None:
    with pytest.raises(ValueError, match="prefill_rows"):
        Scheduler(1, prefill_rows=4, chunk=5)


@pytest.mark.parametrize(
    ("modules", "banned"),
    [
        ("serve.engine.scheduler serve.engine.engine serve.api.app serve.cli serve.generate_cli", "torch"),
        (
            "serve.engine.scheduler serve.engine.engine serve.engine.runner serve.loading serve.generate_cli",
            "litestar",
        ),
    ],
)
def test_who_imports_what(modules: str, banned: str) -> None:
    code = (
        f"import sys\nfor name in {modules.split()!r}:\n    __import__(name)\n    assert {banned!r} not in "
        "sys.modules, name"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
