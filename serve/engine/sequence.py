"""One sequence as the engine sees it: what was asked, which rows are in flight, what came out. No torch here.

A *segment* is the contiguous run of positions of one sequence that steps together: a chunk of the prompt, or the one position
that is being decoded. Only a segment that ends the context is drawn from.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from rdlm.sampling_params import History, Order, SamplingParams
from serve.engine.exits import ExitRule


@dataclass(frozen=True, slots=True)
class Depth:
    """How many core steps each kind of position takes at one K; the runner derives it from the checkpoint's step plan."""

    num_steps: int
    """K as the user asked for it."""
    drawn: int
    """Steps of a position that a token is drawn from."""
    context: int
    """Steps of a prompt position that is only context: up to its last committing step."""
    scored: int
    """Steps of a prompt position whose log-probabilities are wanted, at least ``context``."""


@dataclass(frozen=True, slots=True)
class StepBudget:
    """How many core steps (or noise levels, or unmasking steps) the positions of one request may take: the only carrier of K."""

    num_steps: int
    """K; with ``exit``, ``schedule`` or ``max_ms`` the most steps of a position."""
    exit: ExitRule | None = None
    """For thinking models only: the others need every step."""
    schedule: tuple[int, ...] = ()
    """K of the prompt (and so of the first token), of the position of the second token, ...; the last entry goes on. Empty: all K."""
    min_steps: int = 1
    """Fewest steps that a deadline may lower K to."""
    max_ms: int | None = None
    """Milliseconds from submission after which the answer ends, waiting included."""
    lowers: bool = False
    """Whether K is lowered, down to ``min_steps``, where ``max_tokens`` would not fit ``max_ms`` otherwise."""

    @property
    def varies(self) -> bool:
        """Whether tokens of one answer may differ in their steps."""
        return self.exit is not None or bool(self.schedule) or self.lowers

    def steps_at(self, token: int) -> int:
        """K of the position that token number ``token`` is drawn from; 0 is the prompt's."""
        return self.schedule[min(token, len(self.schedule) - 1)] if self.schedule else self.num_steps


@dataclass(frozen=True, slots=True)
class Show:
    """What a stream tells of steps before the last: ``top`` likeliest tokens every ``every`` steps."""

    every: int
    top: int


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and one choice; every field has been validated."""

    prompt: tuple[int, ...]
    budget: StepBudget
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    seed: int = 0
    choice: int = 0
    """Which of the ``n`` answers this is; part of the key of its random draws."""
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    """Ids that end the text, the end-of-text id included unless the request ignores it."""
    min_tokens: int = 0
    logprobs: int | None = None
    """How many alternatives to report for each output token; None reports nothing."""
    prompt_logprobs: int | None = None
    sweep: tuple[int, ...] = ()
    """Score the prompt after each of these numbers of steps (thinking models, with ``prompt_logprobs``): it is one segment then,
    so that step r sees step r everywhere, whatever the cache."""
    show: Show | None = None
    order: Order = "random"
    """Of masked models: which tokens come into sight first."""


@dataclass(slots=True)
class Segment:
    """Positions start .. start + length - 1 of a sequence, about to take core step ``step``."""

    start: int
    length: int
    step: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of a token under the raw model, and of the most likely ones, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What a position would have said after a step that is not its last."""

    step: int
    delta: float
    """Relative change of the state in this step."""
    top: tuple[tuple[int, float], ...]
    """(token, log-probability under the raw model), best first."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token of the answer, with log-probabilities if they were asked for."""

    token: int
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class StepResult:
    """What one sequence got out of one engine step: the next tokens of its answer, log-probabilities if they were asked for."""

    drawn: Seq[Drawn] = ()
    exited: bool = False
    """Whether the segment leaves with this step, before its last."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of prompt tokens start + 1 .. of the segment, in order."""
    glimpse: Glimpse | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in the engine. The scheduler moves it; the runner only reads it."""

    id: int
    request: Request
    depth: Depth
    """Of the open segment; between segments, of the next. ``StepBudget.schedule`` and ``max_ms`` make it change."""
    chunk: int
    """Prompt positions per segment: fixed, so that the cut never depends on what else is running."""
    slot: int | None = None
    segment: Segment | None = None
    next_start: int = 0
    output: list[int] = field(default_factory=list)
    prompt_row_steps: int = 0
    decode_row_steps: int = 0
    saved_row_steps: int = 0
    """Core steps of positions that exits have spared."""

    @property
    def context_length(self) -> int:
        return len(self.request.prompt) + len(self.output)

    @property
    def wants_token(self) -> bool:
        return len(self.output) < self.request.max_tokens

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do: the prompt has been read and no token is wanted."""
        return self.segment is None and not self.wants_token and self.next_start >= len(self.request.prompt)

    @property
    def prompt_steps(self) -> int:
        return self.depth.context if self.request.prompt_logprobs is None else self.depth.scored

    @property
    def draws(self) -> bool:
        """Whether the last position of the current segment is one that a token is drawn from."""
        segment = self.segment
        return (
            segment is not None and self.wants_token and segment.start + segment.length == self.context_length
        )

    @property
    def banned(self) -> Collection[int]:
        return self.request.stop_ids if len(self.output) < self.request.min_tokens else ()

    @property
    def history(self) -> History:
        return History(self.request.prompt, self.output, self.banned)

    def token_ids(self, segment: Segment) -> list[int]:
        """Input ids of the segment's positions."""
        boundary = len(self.request.prompt)
        if segment.start >= boundary:
            return self.output[segment.start - boundary : segment.start - boundary + segment.length]
        return list(self.request.prompt[segment.start : segment.start + segment.length])

    @property
    def next_token(self) -> int:
        """Number of the token that is drawn from the segment to open next, or after it (chunks of a prompt): 0, 1, ..."""
        return max(0, self.next_start - len(self.request.prompt) + 1)

    def next_length(self) -> int:
        """Positions of the segment to open next."""
        remaining = len(self.request.prompt) - self.next_start
        return min(remaining, self.chunk) if remaining > 0 else 1

    def open(self) -> None:
        """Put the next segment in flight."""
        assert self.segment is None
        self.segment = Segment(self.next_start, self.next_length())
        self.next_start += self.segment.length

    def advance(self, exited: bool = False) -> bool:
        """Record one core step. True when the segment's last position is done, or exits, and so the segment is closed."""
        segment = self.segment
        assert segment is not None
        prompt_rows = max(0, min(len(self.request.prompt) - segment.start, segment.length))
        self.prompt_row_steps += prompt_rows
        self.decode_row_steps += segment.length - prompt_rows
        segment.step += 1
        draws = self.draws
        needed = self.depth.drawn if draws else self.prompt_steps
        if exited or segment.step >= needed:
            self.saved_row_steps += (needed - segment.step) * segment.length
            self.segment = None
            return True
        if draws and segment.length > 1 and segment.step >= self.prompt_steps:
            segment.start, segment.length = segment.start + segment.length - 1, 1  # the rest was only context
        return False
