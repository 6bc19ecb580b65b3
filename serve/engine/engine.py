"""The engine: one thread that owns the model and steps every request in flight. No torch, no HTTP.

``submit`` and ``abort`` may be called from any thread and never block on the model; results arrive through a
callback that the engine thread calls. In process, without a server: ``with Engine(load) as engine:
engine.generate([request])``.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import queue
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Protocol

from rdlm.errors import UserError
from serve.engine.detokenizer import Detokenizer, StopStrings
from serve.engine.scheduler import Deadlines, Scheduler
from serve.engine.sequence import (
    CallSoon,
    Event,
    Request,
    Sequence,
    Sink,
    StepCounts,
    StepResult,
    TokenLogprobs,
    Usage,
)
from serve.errors import EngineClosed, QueueFull

if TYPE_CHECKING:
    from rdlm.config.checkpoint import CheckpointConfig
    from rdlm.data.tokenizer import Tokenizer

logger = logging.getLogger("rdlm.serve")
IDLE_SECONDS = 30.0
"""After so long without work, and again each time, the process gives memory back: large requests and long
prompts leave a large heap."""

MOST_UNREAD = 0.01
"""Seconds that core steps of which nothing is read may take together: a request that arrives meanwhile waits so
long."""
MASK_PATIENCE = 0.001
"""Seconds a step waits for the masks of constrained answers, which mostly take less; then the others go on."""
MASK_WAIT = 0.05
"""Seconds that it waits where there is nobody else: only new requests wait then."""


class Runner(Protocol):
    """What the engine needs of serve.engine.runner.Runner and serve.engine.masked_runner.MaskedRunner."""

    waits: bool
    """Whether every step has been computed when ``run`` returns; on an accelerator only those that return a
    result have."""

    @property
    def guesses(self) -> tuple[str, ...]: ...
    def sequence(self, number: int, request: Request, chunk: int) -> Sequence: ...
    def step_counts(self, num_steps: int, blocks: frozenset[int] = ...) -> StepCounts: ...
    def attach(self, sequence: Sequence) -> int | None: ...
    def unread_steps(self, batch: list[Sequence]) -> int: ...
    def run_unread(self, batch: list[Sequence], steps: int) -> dict[int, StepResult]: ...
    def run(self, batch: list[Sequence]) -> dict[int, StepResult]: ...
    def release(self, sequence: Sequence) -> int: ...


@dataclass(frozen=True)
class Served:
    """A loaded model with everything the server needs to know about it."""

    config: CheckpointConfig
    tokenizer: Tokenizer
    runner: Runner
    scheduler: Scheduler
    max_len: int
    """Positions of prompt and answer together."""
    max_steps: int
    default_steps: int
    end_ids: frozenset[int] = frozenset()
    """Ids that end a text unless a request ignores them."""
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    """Numbers of SamplingParams where a request names none: those of the model's generation_config.json."""


class State(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class Histogram:
    """Counts of values up to each bound, and their sum. Written by one thread, read by any: a plain list
    costs no lock."""

    def __init__(self, *bounds: float) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


def _seconds() -> Histogram:
    return Histogram(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


def _powers() -> Histogram:
    return Histogram(*(2**i for i in range(11)))


@dataclass(slots=True)
class Counters:
    """Totals since the start; written by the engine thread only. serve/api/observability.py names them for
    Prometheus."""

    steps: int = 0
    """Core steps of the engine, each one forward over all rows."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cached_steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    exits: int = 0
    saved_steps: int = 0
    flops: int = 0
    overdue: int = 0
    lowered: int = 0
    ended: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error", "expired"), 0)
    )
    model_s: float = 0.0
    busy_s: float = 0.0
    rows: Histogram = field(default_factory=_powers)
    """Rows (positions) of each core step."""
    token_steps: Histogram = field(default_factory=_powers)
    """Core steps of the position that each token was drawn from: its mean is the mean K."""
    queue_s: Histogram = field(default_factory=_seconds)
    first_token_s: Histogram = field(default_factory=_seconds)
    between_tokens_s: Histogram = field(default_factory=_seconds)
    total_s: Histogram = field(default_factory=_seconds)

    def token(self, steps: int, gap_s: float | None, since_submission_s: float) -> None:
        """A token was drawn; gap_s: since the one before, None for a first one."""
        self.tokens += 1
        self.token_steps.observe(steps)
        if gap_s is None:
            self.first_token_s.observe(since_submission_s)
        else:
            self.between_tokens_s.observe(gap_s)

    def end(self, reason: str, usage: Usage) -> None:
        """A sequence ended: stop, length, abort, error or expired."""
        self.ended[reason] += 1
        self.overdue += usage.overdue
        self.lowered += usage.lowered
        self.flops += usage.flops
        if reason in ("stop", "length"):
            self.prompt_tokens += usage.prompt_tokens
            self.cached_tokens += usage.cached_tokens
            self.cached_steps += usage.cached_core_steps
            self.drafted += usage.drafted
            self.accepted += usage.accepted
            self.exits += usage.exits
            self.saved_steps += usage.saved_core_steps
            self.queue_s.observe(usage.queue_s)
            self.total_s.observe(usage.total_s)


class Engine:
    """Loads in its own thread, then steps whatever is submitted until it is stopped."""

    def __init__(self, load: Callable[[], Served], max_queue: int = 1024) -> None:
        """load runs in the engine thread. max_queue: sequences that may wait for a slot before ``submit``
        refuses more."""
        self._load, self.max_queue = load, max_queue
        self.state = State.LOADING
        self.error: BaseException | None = None
        self.counters = Counters()
        self._served: Served | None = None
        self._ids = itertools.count()
        self._inbox: deque[Sequence] = deque()
        self._aborts: deque[int] = deque()
        self._sequences: dict[int, Sequence] = {}
        """Sequences that the engine thread has taken in and not finished, by id."""
        self._outbox: dict[CallSoon, list[tuple[Sequence, Event]]] = {}
        """Events of this step that go to other threads, by the way there."""
        self._deadlines = Deadlines()
        self._wake = threading.Condition()
        self._loaded = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._seconds_per_sequence = 0.0
        self._masks = ThreadPoolExecutor(2, "rdlm-masks")
        """Computes which tokens may come next in constrained answers, while the engine steps."""
        self._thread = threading.Thread(target=self._main, name="rdlm-engine", daemon=True)

    # Called from any thread ----------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> Served:
        """The model, once loaded. Raises what loading raised, or TimeoutError."""
        if not self._loaded.wait(timeout):
            raise TimeoutError("the model is still loading")
        if self.error is not None:
            raise self.error
        assert self._served is not None
        return self._served

    @property
    def served(self) -> Served:
        """The model. Raises EngineClosed while it loads or after it failed to."""
        if self._served is None:
            raise EngineClosed(self.state.value)
        return self._served

    @property
    def num_waiting(self) -> int:
        return len(self._inbox) + (len(self._served.scheduler.waiting) if self._served else 0)

    @property
    def num_running(self) -> int:
        return len(self._served.scheduler.running) if self._served else 0

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU time of the engine thread, without those of the kernels' other threads; 0 where the
        platform does not tell (macOS) or the thread does not run."""
        if self._thread.ident is None or not self._thread.is_alive():
            return 0.0
        clock = getattr(time, "pthread_getcpuclockid", None)
        return 0.0 if clock is None else time.clock_gettime(clock(self._thread.ident))

    def check_room(self, count: int) -> None:
        """Raises EngineClosed unless the engine is ready, QueueFull if ``count`` more sequences do not all
        fit the queue."""
        if self.state is not State.READY:
            raise EngineClosed(self.state.value)
        waiting = self.num_waiting
        free = max(0, self.served.scheduler.num_slots - self.num_running - waiting)
        if waiting + count > self.max_queue + free:
            raise QueueFull(waiting, self.max_queue, self._retry_after(waiting))

    def submit(self, requests: Seq[Request], sink: Sink, call_soon: CallSoon | None = None) -> list[int]:
        """Queue all of ``requests`` or none; ``sink`` gets their events in the engine thread and must not
        block. With ``call_soon``, such as ``call_soon_threadsafe`` of an event loop, it gets them where that
        calls it: one call after each step, for the events of all requests that go the same way.

        Raises what ``check_room`` raises, and UserError for a request that no step could serve.
        """
        matchers = {stop: StopStrings(stop) for stop in {tuple(request.stop) for request in requests}}
        served, now, sequences = self.served, time.monotonic(), []
        for request in {id(request.prompt): request for request in requests}.values():
            check_tokens(request, served)  # choices share their prompt
        for index, request in enumerate(requests):
            sequence = served.runner.sequence(next(self._ids), request, served.scheduler.chunk)
            sequence.index, sequence.sink, sequence.submitted = index, sink, now
            sequence.call_soon = call_soon
            matcher = matchers[tuple(request.stop)]
            sequence.detokenizer = Detokenizer(served.tokenizer, matcher, request.spelt)
            if request.grammar is not None:
                sequence.guide = request.grammar.start(self._masks)
            sequences.append(sequence)
        with self._wake:
            self.check_room(len(requests))
            self._inbox.extend(sequences)
            self._idle.clear()
            self._wake.notify()
        return [sequence.id for sequence in sequences]

    def abort(self, ids: Seq[int]) -> None:
        """Forget these requests before the next step; unknown or finished ones are fine. Never waits."""
        with self._wake:
            self._aborts.extend(ids)
            self._wake.notify()

    def generate(self, requests: Seq[Request], on_event: Sink | None = None) -> list[list[Event]]:
        """Run requests to their end and return each one's events, in the order given; on_event sees them as
        they come."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ids = self.submit(requests, events.put)
        answers: list[list[Event]] = [[] for _ in requests]
        open_answers = len(requests)
        try:
            while open_answers:
                event = events.get()
                answers[event.index].append(event)
                open_answers -= event.finish is not None
                if on_event is not None:
                    on_event(event)
        finally:
            if open_answers:
                self.abort(ids)
        return answers

    def refuse(self) -> None:
        """Accept no new requests; accepted ones go on. Safe in a signal handler: it takes no lock."""
        if self.state in (State.LOADING, State.READY):
            self.state = State.DRAINING

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and let accepted ones finish. True if all did within ``timeout`` seconds."""
        self.refuse()
        return self._idle.wait(timeout)

    def stop(self) -> None:
        """End the thread; whatever is unfinished ends with finish "abort"."""
        with self._wake:
            self.state = State.STOPPED
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Engine:
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _retry_after(self, waiting: int) -> int:
        """Seconds after which a refused client may find room, from how long sequences have been taking."""
        slots = self.served.scheduler.num_slots
        return max(1, min(60, round(self._seconds_per_sequence * (waiting + 1) / slots)))

    # The engine thread ---------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._served = self._load()
            with self._wake:
                if self.state is State.LOADING:
                    self.state = State.READY
        except BaseException as error:  # handed to wait_ready, whose caller decides what it means
            self.error, self.state = error, State.STOPPED
            return
        finally:
            self._loaded.set()  # last: whoever waits for it may submit at once
        try:
            while self._await_work():
                self._step(self._served)
                self._deliver()
        except Exception as error:  # a defect outside the model: stop visibly, so that nobody waits for ever
            logger.exception("the engine stopped")
            self.error, self.state = error, State.STOPPED
        with self._wake:
            for sequence in [*self._sequences.values(), *self._inbox]:
                self._finish(sequence, "abort")
            self._inbox.clear()
            self._deliver()
            self._idle.set()

    def _await_work(self) -> bool:
        """Take in what arrived and drop what was aborted; sleep while there is nothing to do. False when
        stopped."""
        with self._wake:
            while True:
                if self.state is State.STOPPED:
                    return False
                scheduler = self.served.scheduler
                while self._inbox:
                    sequence = self._inbox.popleft()
                    self._sequences[sequence.id] = sequence
                    self._deadlines.add(sequence)
                    scheduler.add(sequence)
                while self._aborts:
                    gone = self._sequences.get(self._aborts.popleft())
                    if gone is not None:
                        self._finish(gone, "abort")
                if len(scheduler):
                    return True
                self._deliver()
                self._idle.set()
                if not self._wake.wait(IDLE_SECONDS):
                    trim_heap()

    def _step(self, served: Served) -> None:
        """One core step of everything that is open, and what follows from it; before it those of which nothing is
        read, which are taken at once."""
        began = time.monotonic()
        for late in self._deadlines.expired(began):
            self._finish(late, late.expire(), Event(late.index, text=late.detokenizer.finish()))
        served.scheduler.admit()
        for sequence in served.scheduler.running.values():
            if sequence.cached is None:
                sequence.skip(served.runner.attach(sequence))
        self._deadlines.update(began, len(served.scheduler.running), served.runner.step_counts)
        batch = self._guided(served.scheduler.schedule())
        if not batch:
            return
        for sequence in batch:
            if sequence.started is None:
                sequence.started = began
        rows = sum(sequence.length for sequence in batch)
        before_model = time.monotonic()
        unread = self._unread_steps(served, batch, rows)
        if unread:
            batch = self._run_unread(served.runner, batch, unread)
        results = run_isolated(served.runner.run, batch)
        after_model = time.monotonic()
        self.counters.steps += unread + 1
        seconds = (after_model - began) / (unread + 1)
        for _ in range(unread + 1):
            self.counters.rows.observe(rows)
            self._deadlines.cost.observe(rows, seconds, served.runner.waits or bool(results))
        self.counters.model_s += after_model - before_model
        self.counters.busy_s += after_model - began
        for sequence in batch:  # a reader that gets a token finds its step counted
            try:
                self._advance(sequence, results.get(sequence.id) or StepResult())
            except Exception as error:
                self._fail(sequence, error)
        self.counters.busy_s += time.monotonic() - after_model

    def _unread_steps(self, served: Served, batch: list[Sequence], rows: int) -> int:
        """Core steps before the next one that need nothing but the model."""
        seconds = self._deadlines.cost.predict(rows)
        if not seconds or len(batch) < sum(s.is_open for s in served.scheduler.running.values()):
            return 0  # somebody waits for the end of a step
        return min(served.runner.unread_steps(batch), max(0, int(MOST_UNREAD / seconds) - 1))

    def _run_unread(self, runner: Runner, batch: list[Sequence], steps: int) -> list[Sequence]:
        """Take core steps of which nothing is read -> those of ``batch`` that go on."""
        failed = run_isolated(partial(runner.run_unread, steps=steps), batch)
        going: list[Sequence] = []
        for sequence in batch:
            try:
                for _ in range(steps):
                    self._advance(sequence, failed.get(sequence.id) or StepResult())
            except Exception as error:
                self._fail(sequence, error)
            else:
                going.append(sequence)
        return going

    def _guided(self, batch: list[Sequence]) -> list[Sequence]:
        """``batch`` without the constrained answers whose next mask is not there yet: the others do not wait for
        it."""
        drawing = [(s, s.guide) for s in batch if s.guide is not None and s.draws]
        pending = [guide.pending for _, guide in drawing if guide.pending is not None]
        if pending:
            wait(pending, MASK_PATIENCE)
        if len(pending) == len(batch):
            wait(pending, MASK_WAIT, FIRST_COMPLETED)
        held: set[int] = set()
        for sequence, guide in drawing:
            try:
                if not guide.ready:
                    held.add(sequence.id)
            except Exception as error:
                held.add(sequence.id)
                self._fail(sequence, error)
        return [sequence for sequence in batch if sequence.id not in held]

    def _advance(self, sequence: Sequence, result: StepResult) -> None:
        """Move a sequence past the step it has just taken, and emit what came out."""
        if result.error is not None:
            raise result.error
        steps = [sequence.steps_of(row) for row in range(max(1, len(result.tokens)))]
        sequence.advance(result)
        if result.prompt_logprobs is not None:
            sequence.add_prompt_logprobs(result.prompt_logprobs, steps[0])
        if result.step_prediction is not None:
            self._emit(sequence, Event(sequence.index, step_prediction=result.step_prediction))
        for token, logprobs, taken in zip(result.tokens, result.logprobs, steps, strict=False):
            exited = result.exited or (sequence.is_wavefront and taken < sequence.counts.drawn)
            if self._append(sequence, token, logprobs, taken, exited):
                return
        if sequence.is_done:
            self._finish(sequence, "length")  # nothing was to be drawn

    def _append(
        self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None, steps: int, exited: bool
    ) -> bool:
        """Append a token and emit it -> whether it ends the answer."""
        text, finish = sequence.append(token, steps, exited)
        now = time.monotonic()
        self.counters.token(steps, sequence.time_token(now), now - sequence.submitted)
        event = Event(sequence.index, token, text, steps, logprobs)
        if finish is None:
            self._emit(sequence, event)
        else:
            self._finish(sequence, finish, event)
        return finish is not None

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End one sequence with an error; the others and the server go on."""
        mendable = error if isinstance(error, UserError) else None
        if mendable is None:
            logger.error("request %d ends with an error", sequence.id, exc_info=error)
        if sequence.id in self._sequences:
            self._finish(sequence, "error", Event(sequence.index, error=mendable))

    def _finish(self, sequence: Sequence, reason: str, event: Event | None = None) -> None:
        """Forget a sequence and emit why it ended, with the last token if there is one."""
        try:
            kv_bytes = self.served.runner.release(sequence)
        except Exception:  # whoever waits for the sequence must hear of its end all the same
            logger.exception("the memory of request %d could not be freed", sequence.id)
            kv_bytes = 0
        self.served.scheduler.remove(sequence)
        self._sequences.pop(sequence.id, None)
        self._deadlines.remove(sequence)
        usage = sequence.usage(time.monotonic(), kv_bytes)
        self.counters.end(reason, usage)
        if reason in ("stop", "length"):
            self._seconds_per_sequence += 0.1 * (usage.total_s - usage.queue_s - self._seconds_per_sequence)
        last = event or Event(sequence.index)
        self._emit(sequence, replace(last, finish=reason, usage=usage, sweep=sequence.sweep or None))

    def _emit(self, sequence: Sequence, event: Event) -> None:
        """Hand an event to the sequence's sink, or keep it for ``_deliver``. A sink that raises loses its
        sequence and no other."""
        prompt_logprobs = None if event.step_prediction is not None else sequence.take_prompt_logprobs()
        if prompt_logprobs is not None:
            event = replace(event, prompt_logprobs=prompt_logprobs)
        if sequence.call_soon is not None:
            self._outbox.setdefault(sequence.call_soon, []).append((sequence, event))
            return
        try:
            sequence.sink(event)
        except Exception as error:
            logger.debug("the sink of request %d failed", sequence.id, exc_info=error)
            self.abort([sequence.id])

    def _deliver(self) -> None:
        """Send off what ``_emit`` has kept: one call for each event loop, however many requests have got
        tokens. Where a loop is gone, its sequences are lost and no others."""
        outbox, self._outbox = self._outbox, {}
        for call_soon, kept in outbox.items():
            try:
                call_soon(_call_sinks, kept)
            except Exception as error:
                logger.debug("the sinks of %d events are gone", len(kept), exc_info=error)
                self.abort([sequence.id for sequence, _ in kept])


def _call_sinks(kept: list[tuple[Sequence, Event]]) -> None:
    for sequence, event in kept:
        sequence.sink(event)


def check_tokens(request: Request, served: Served) -> None:
    """Raises UserError for tokens that the model does not have, or more or fewer of them than it can take."""
    prompt, vocab = request.prompt, served.config.model.vocab_size
    if request.grammar is not None and not served.config.objective.left_to_right:
        problem = "only answers that grow from left to right can be constrained"
        raise UserError("grammar", "...", problem, "leave it out")
    if not prompt and (served.config.objective.left_to_right or not request.max_tokens):
        raise UserError("prompt", prompt, "it has no tokens", "send at least one")
    if prompt and not 0 <= min(prompt) <= max(prompt) < vocab:
        raise UserError(
            "prompt", prompt, f"ids must lie below {vocab}", "encode it with the model's tokenizer"
        )
    if request.max_tokens < 0 or len(prompt) + request.max_tokens > served.max_len:
        problem = (
            f"the prompt's {len(prompt)} tokens and the answer do not fit the context of {served.max_len}"
        )
        raise UserError("max_tokens", request.max_tokens, problem, "shorten the prompt or the answer")


def trim_heap() -> None:
    """Return freed memory to the operating system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def run_isolated(
    run: Callable[[list[Sequence]], dict[int, StepResult]], batch: list[Sequence]
) -> dict[int, StepResult]:
    """One step of ``batch``; where it fails, of its halves, until those sequences that fail are alone: they
    get the error.

    The others get what they get without them: a failed step leaves nothing but ``rows`` and ``flops``, which
    are restored here.
    """
    saved = [(sequence, sequence.rows, sequence.flops) for sequence in batch]
    try:
        return run(batch)
    except Exception as error:
        for sequence, rows, flops in saved:
            sequence.rows, sequence.flops = rows, flops
        if len(batch) == 1:
            return {batch[0].id: StepResult(error=error)}
        logger.warning("a step of %d requests failed and is repeated in halves: %r", len(batch), error)
    # Out of the handler, whose traceback holds the tensors of the failed step: it may have run out of memory.
    half = len(batch) // 2
    return run_isolated(run, batch[:half]) | run_isolated(run, batch[half:])
