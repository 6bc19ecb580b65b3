"""A sequence in the engine with its way back to whoever asked: its text, its times, its account. No torch, no HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.engine.detokenizer import TextStream
from serve.engine.events import Sink, Usage
from serve.engine.sequence import Sequence, TokenLogprobs


@dataclass(slots=True, eq=False)
class Active:
    """Times are seconds of the monotonic clock."""

    sequence: Sequence
    text: TextStream
    sink: Sink
    index: int
    submitted: float
    started: float | None = None
    first_token: float | None = None
    last_token: float = 0.0
    token_steps: int = 0
    exits: int = 0
    lowered: int = 0
    """Segments that took fewer steps than asked for, to meet the deadline."""
    overdue: bool = False
    """Whether the deadline ended the answer."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Those the sink has not been told of."""
    sweep: dict[int, list[TokenLogprobs]] = field(default_factory=dict)

    @property
    def deadline(self) -> float | None:
        limit = self.sequence.request.budget.max_ms
        return None if limit is None else self.submitted + limit / 1000

    def give_up(self) -> str:
        """Note that the deadline has passed -> why the answer ends: "length" with what there is, "expired" with nothing to show."""
        self.overdue = True
        scoring = self.sequence.request.prompt_logprobs is not None and not self.sequence.output
        return "expired" if self.started is None or scoring else "length"

    def hear(self, token: int, steps: int, exited: bool) -> tuple[str, str | None]:
        """Take in a drawn token -> text that is now certain, and why the answer ends with it (None: it goes on)."""
        sequence, request = self.sequence, self.sequence.request
        sequence.output.append(token)
        self.token_steps += steps
        self.exits += exited
        may_stop = len(sequence.output) > request.min_tokens
        if token in request.stop_ids and may_stop:
            return self.text.finish(), "stop"
        text, stopped = self.text.feed(token, may_stop)
        if stopped:
            return text, "stop"
        return (text, None) if sequence.wants_token else (text + self.text.finish(), "length")

    def score(self, logprobs: list[TokenLogprobs], steps: int) -> None:
        """Take in log-probabilities of prompt tokens after ``steps`` core steps."""
        if self.sequence.request.sweep:
            self.sweep[steps] = logprobs
        else:
            self.prompt_logprobs += logprobs

    def clock(self, now: float) -> float | None:
        """Note the time of a token -> seconds since the one before; None for the first."""
        before, self.last_token = self.last_token, now
        if self.first_token is None:
            self.first_token = now
            return None
        return now - before

    def take_prompt_logprobs(self) -> list[TokenLogprobs] | None:
        taken, self.prompt_logprobs = self.prompt_logprobs, []
        return taken or None

    def usage(self, now: float, flops: int, position_bytes: int) -> Usage:
        sequence, started = self.sequence, self.started or now
        return Usage(
            prompt_tokens=len(sequence.request.prompt),
            completion_tokens=len(sequence.output),
            num_steps=sequence.request.budget.num_steps,
            prefill_core_steps=sequence.prompt_row_steps,
            decode_core_steps=sequence.decode_row_steps,
            saved_core_steps=sequence.saved_row_steps,
            flops=flops,
            kv_bytes=sequence.next_start * position_bytes,
            token_steps=self.token_steps,
            exits=self.exits,
            lowered=self.lowered,
            overdue=self.overdue,
            queue_s=started - self.submitted,
            first_token_s=(self.first_token or now) - self.submitted,
            total_s=now - self.submitted,
        )
