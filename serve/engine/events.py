"""What the engine is made of and what it reports: the loaded model, its state, events, usage, totals. No
torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from rdlm.errors import UserError

if TYPE_CHECKING:
    from rdlm.config.checkpoint import CheckpointConfig
    from rdlm.data.tokenizer import Tokenizer
    from serve.engine.scheduler import Scheduler
    from serve.engine.sequence import Request, Sequence, StepCounts, StepPrediction, StepResult, TokenLogprobs


class Runner(Protocol):
    """What the engine needs of serve.engine.runner.Runner and serve.engine.masked_runner.MaskedRunner."""

    waits: bool
    """Whether every step has been computed when ``run`` returns; on an accelerator only those that return a
    result have."""

    def sequence(self, number: int, request: Request, chunk: int) -> Sequence: ...
    def step_counts(self, num_steps: int, blocks: frozenset[int] = ...) -> StepCounts: ...
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


class State(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Usage:
    """Work done for one sequence. Row steps are core steps of one position; steps are the core forwards it
    took part in."""

    prompt_tokens: int
    completion_tokens: int
    num_steps: int
    prefill_core_steps: int
    decode_core_steps: int
    saved_core_steps: int
    """Core steps that exits saved."""
    flops: int
    """Floating-point operations of its rows (rdlm/flops.py)."""
    kv_bytes: int
    """Memory of the keys and values of its positions."""
    token_steps: int
    """Core steps of the positions that tokens were drawn from, summed."""
    exits: int
    """Tokens whose position exited early."""
    lowered: int
    """Chunks of the prompt and tokens that took fewer steps than requested, to meet the deadline."""
    overdue: bool
    """Whether the deadline ended the answer."""
    queue_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one submitted request, or its end, or both; or an intermediate read-out of a token that is
    not drawn yet.

    ``index`` is the request's place in the list given to ``submit``.
    """

    index: int
    token: int | None = None
    text: str = ""
    steps: int | None = None
    """Core steps of the position the token was drawn from."""
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """With the first event of a request that wants them: those of prompt tokens 1, 2, ..."""
    sweep: dict[int, list[TokenLogprobs]] | None = None
    """With the last event of a request that wants one: K -> the prompt's log-probabilities, as above."""
    step_prediction: StepPrediction | None = None
    """Alone on its event."""
    finish: str | None = None
    """stop | length | abort | error | expired, on the last event."""
    error: UserError | None = None
    """With finish "error": what the client can mend; None where the model failed."""
    usage: Usage | None = None
    """On the last event."""


Sink = Callable[[Event], None]
"""Called in the engine thread for every event; must not block."""


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
    tokens: int = 0
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
            self.exits += usage.exits
            self.saved_steps += usage.saved_core_steps
            self.queue_s.observe(usage.queue_s)
            self.total_s.observe(usage.total_s)
