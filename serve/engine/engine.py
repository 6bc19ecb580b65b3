"""The engine: one thread that owns the model and steps every request in flight. No torch, no HTTP.

``submit`` and ``abort`` may be called from any thread and never block on the model; results arrive through a callback that the
engine thread calls. In process, without a server: ``with Engine(load) as engine: engine.generate([request])``.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

from serve.engine.active import Active
from serve.engine.deadlines import Pace
from serve.engine.detokenizer import TextStream
from serve.engine.events import Counters, Event, Served, Sink, State
from serve.engine.sequence import Drawn, Request, StepResult
from serve.errors import EngineClosed, QueueFull

logger = logging.getLogger("rdlm.serve")


class Engine:
    """Loads in its own thread, then steps whatever is submitted until it is stopped."""

    def __init__(self, load: Callable[[], Served], max_queue: int = 1024) -> None:
        """load runs in the engine thread. max_queue: sequences that may wait for a slot before ``submit`` refuses more."""
        self._load, self.max_queue = load, max_queue
        self.state = State.LOADING
        self.error: BaseException | None = None
        self.counters = Counters()
        self._served: Served | None = None
        self._ids = itertools.count()
        self._inbox: deque[Active] = deque()
        self._aborts: deque[int] = deque()
        self._active: dict[int, Active] = {}
        self._pace = Pace()
        self._wake = threading.Condition()
        self._loaded = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._seconds_per_sequence = 0.0
        self._thread = threading.Thread(target=self._main, name="rdlm-engine", daemon=True)

    # Called from any thread ------------------------------------------------------------------------------------------

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

    def check_room(self, count: int) -> None:
        """Raises EngineClosed unless the engine is ready, QueueFull if ``count`` more sequences do not all fit the queue."""
        if self.state is not State.READY:
            raise EngineClosed(self.state.value)
        waiting = self.num_waiting
        free = max(0, self.served.scheduler.num_slots - self.num_running - waiting)
        if waiting + count > self.max_queue + free:
            raise QueueFull(waiting, self.max_queue, self._retry_after(waiting))

    def submit(self, requests: Seq[Request], sink: Sink) -> list[int]:
        """Queue all of ``requests`` or none; ``sink`` gets their events in the engine thread and must not block.

        Raises what ``check_room`` raises.
        """
        with self._wake:
            self.check_room(len(requests))
            served, now, ids = self.served, time.monotonic(), []
            for index, request in enumerate(requests):
                sequence = served.runner.sequence(next(self._ids), request, served.scheduler.chunk)
                self._inbox.append(
                    Active(sequence, TextStream(served.tokenizer, request.stop), sink, index, now)
                )
                ids.append(sequence.id)
            self._idle.clear()
            self._wake.notify()
        return ids

    def abort(self, ids: Seq[int]) -> None:
        """Forget these requests before the next step; unknown or finished ones are fine. Never waits."""
        with self._wake:
            self._aborts.extend(ids)
            self._wake.notify()

    def generate(self, requests: Seq[Request], on_event: Sink | None = None) -> list[list[Event]]:
        """Run requests to their end and return each one's events, in the order given; on_event sees them as they come."""
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

    # The engine thread -----------------------------------------------------------------------------------------------

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
        except Exception as error:  # a defect outside the model: stop visibly, so that nobody waits for ever
            logger.exception("the engine stopped")
            self.error, self.state = error, State.STOPPED
        with self._wake:
            for active in [*self._active.values(), *self._inbox]:
                self._finish(active, "abort")
            self._inbox.clear()
            self._idle.set()

    def _await_work(self) -> bool:
        """Take in what arrived and drop what was aborted; sleep while there is nothing to do. False when stopped."""
        with self._wake:
            while True:
                if self.state is State.STOPPED:
                    return False
                scheduler = self.served.scheduler
                while self._inbox:
                    active = self._inbox.popleft()
                    self._active[active.sequence.id] = active
                    self._pace.add(active)
                    scheduler.add(active.sequence)
                while self._aborts:
                    gone = self._active.get(self._aborts.popleft())
                    if gone is not None:
                        self._finish(gone, "abort")
                if len(scheduler):
                    return True
                self._idle.set()
                self._wake.wait()

    def _step(self, served: Served) -> None:
        """One core step of everything that is open, and what follows from it."""
        began = time.monotonic()
        for late in self._pace.expired(began):
            self._end_late(late)
        self._pace.settle(began, len(served.scheduler.running), served.runner.depth)
        batch = served.scheduler.schedule()
        if not batch:
            return
        for sequence in batch:
            active = self._active[sequence.id]
            if active.started is None:
                active.started = began
        rows = sum(s.segment.length for s in batch if s.segment)
        before_model = time.monotonic()
        try:
            results = served.runner.run(batch)
        except Exception:  # the sequences of this step are lost, the server is not
            logger.exception(
                "a step over %d rows failed; its %d requests end with an error", rows, len(batch)
            )
            for sequence in batch:
                self._finish(self._active[sequence.id], "error")
            return
        after_model = time.monotonic()
        self.counters.steps += 1
        self.counters.rows.observe(rows)
        self._pace.cost.observe(rows, after_model - began)
        self.counters.model_s += after_model - before_model
        self.counters.busy_s += after_model - began
        for sequence in batch:  # whoever is told of a token finds its step counted
            self._settle(self._active[sequence.id], results.get(sequence.id))
        self.counters.busy_s += time.monotonic() - after_model

    def _settle(self, active: Active, result: StepResult | None) -> None:
        """Move a sequence past the step it has just taken."""
        sequence = active.sequence
        assert sequence.segment is not None
        steps, found = sequence.segment.step + 1, result or StepResult()
        sequence.advance(found.exited)
        if found.prompt_logprobs is not None:
            active.score(found.prompt_logprobs, steps)
        if found.glimpse is not None:
            self._emit(active, Event(active.index, glimpse=found.glimpse))
        for drawn in found.drawn:
            if self._say(active, drawn, steps, found.exited):
                return
        if sequence.is_done:
            self._finish(active, "length")  # nothing was to be drawn

    def _say(self, active: Active, drawn: Drawn, steps: int, exited: bool) -> bool:
        """Append a token and tell the sink -> whether it ends the answer."""
        text, finish = active.hear(drawn.token, steps, exited)
        now = time.monotonic()
        self.counters.token(steps, active.clock(now), now - active.submitted)
        event = Event(active.index, drawn.token, text, steps, drawn.logprobs)
        if finish is None:
            self._emit(active, event)
        else:
            self._finish(active, finish, event)
        return finish is not None

    def _end_late(self, active: Active) -> None:
        """The deadline has passed: end with what has been said."""
        reason = active.give_up()
        self._finish(active, reason, Event(active.index, text=active.text.finish()))

    def _finish(self, active: Active, reason: str, event: Event | None = None) -> None:
        """Forget a sequence and tell its sink why, with the last token if there is one."""
        self.served.scheduler.remove(active.sequence.id)
        flops = self.served.runner.release(active.sequence.id)
        self._active.pop(active.sequence.id, None)
        self._pace.remove(active.sequence.id)
        usage = active.usage(time.monotonic(), flops, self.served.runner.position_bytes)
        self.counters.end(reason, usage)
        if reason in ("stop", "length"):
            self._seconds_per_sequence += 0.1 * (usage.total_s - usage.queue_s - self._seconds_per_sequence)
        self._emit(
            active,
            replace(event or Event(active.index), finish=reason, usage=usage, sweep=active.sweep or None),
        )

    def _emit(self, active: Active, event: Event) -> None:
        prompt_logprobs = None if event.glimpse is not None else active.take_prompt_logprobs()
        try:
            active.sink(event if prompt_logprobs is None else replace(event, prompt_logprobs=prompt_logprobs))
        except RuntimeError:  # its event loop is gone: nobody is listening any more
            logger.debug("listener of sequence %d is gone", active.sequence.id)
            self.abort([active.sequence.id])
