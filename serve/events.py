"""What the engine is made of and what it says: the loaded model, its state, events, work accounts. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from rdlm.config import CheckpointConfig
from rdlm.tokenizer import Tokenizer
from serve.scheduler import Scheduler
from serve.sequence import Depth, Sequence, StepResult, TokenLogprobs


class Runner(Protocol):
    """What the engine needs of serve.runner.Runner."""

    def depth(self, num_steps: int) -> Depth: ...
    def run(self, batch: list[Sequence]) -> dict[int, StepResult]: ...
    def release(self, sequence_id: int) -> None: ...


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


class State(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Usage:
    """Work done for one sequence. Row steps are core steps of one position; steps are the core forwards it took part in."""

    prompt_tokens: int
    completion_tokens: int
    num_steps: int
    prefill_core_steps: int
    decode_core_steps: int
    queue_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one submitted request, or its end, or both. ``index`` is its place in the list given to ``submit``."""

    index: int
    token: int | None = None
    text: str = ""
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """With the first event of a request that asked for them: of prompt tokens 1, 2, ..."""
    finish: str | None = None
    """stop | length | abort | error, on the last event."""
    usage: Usage | None = None
    """On the last event."""


Sink = Callable[[Event], None]
"""Called in the engine thread for every event; must not block."""


@dataclass(slots=True)
class Counters:
    """Totals since the start; written by the engine thread only."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    model_s: float = 0.0
    busy_s: float = 0.0
