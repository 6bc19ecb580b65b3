"""A request, its sequence (the one object that the engine keeps for it) and its events. No torch here.

A *segment* is the contiguous run of positions of one sequence that steps together: a chunk of the prompt, the
one position that is being decoded, or a wavefront of several. A token is drawn only from a segment that ends
the context.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rdlm.errors import UserError
from rdlm.exit_criteria import ExitRule, LatentDiff
from rdlm.sampling_params import History, Order, SamplingParams
from serve.engine.detokenizer import Detokenizer

if TYPE_CHECKING:
    from serve.engine.grammar import Grammar, Guide

NO_SLOT = -1
MAX_DRAFT = 64
"""Most tokens of a draft."""
MAX_WAVEFRONT = 64
"""Most positions of a wavefront."""


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Core steps that each kind of position takes at one K; the runner derives them from the checkpoint's
    step plan."""

    num_steps: int
    """K as the request has it."""
    drawn: int
    """Steps of a position that a token is drawn from."""
    context: int
    """Steps of a prompt position that is only context: up to its last committing step."""
    scored: int
    """Steps of a prompt position whose log-probabilities are wanted, at least ``context``."""
    plan: Any = field(default=None, compare=False, repr=False)
    """The runner's own: what each of the steps does."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """Self-speculative decoding: the model drafts tokens at a small K and verifies them at the request's.

    The states of drafted positions go on from where the draft read them, so a token that is accepted costs no
    core step more than without speculation. Greedy tokens are those of plain decoding; sampled ones have its law
    (rdlm.sampling.verify) and depend on the request's seed and these two numbers alone.
    """

    draft_steps: int
    """Core steps after which a draft is read; fewer than K."""
    draft_tokens: int
    """Most tokens of a draft."""


@dataclass(frozen=True, slots=True)
class Wavefront:
    """Diffusion forcing (Geiping, Yang and Su 2025, arXiv 2510.14961): later positions begin before the first one
    has taken its K core steps, with the tokens that are predicted so far.

    All positions step together. Once the first one has taken a multiple of ``inner_steps`` core steps, or K,
    all are read out: tokens that changed are replaced, leading positions that have taken K steps or have
    converged leave with their tokens, and positions are added.
    """

    positions: int
    """Most positions at a time; 1 with threshold 0 is plain decoding."""
    inner_steps: int
    """Core steps between two read-outs."""
    threshold: float
    """A position has converged once its state changed relatively by less since the last read-out; 0: never."""
    noise: float = 0.0
    """Share of a fresh initial state in every state after each read-out (published: 0.5)."""
    noise_decays: bool = True
    """Whether that share is divided by 1 + the steps that the position has taken."""
    average: float = 0.0
    """Share of the input before in the input after a read-out: an exponential average over the tokens that a
    position has been given (published: 0.1)."""
    headway: int = 1
    """Positions that are added after a read-out; those behind the first one begin with random tokens."""

    @classmethod
    def of(
        cls, positions: int | None, inner_steps: int | None, threshold: float | None, **more: Any
    ) -> Wavefront:
        """Published defaults for what is None of the three; a single position is plain decoding."""
        if threshold is None:
            threshold = 0.0 if positions == 1 else LatentDiff.default_threshold
        given = {name: value for name, value in more.items() if value is not None}
        return cls(positions or MAX_WAVEFRONT, inner_steps or 4, threshold, **given)


@dataclass(frozen=True, slots=True)
class StepBudget:
    """How many core steps (noise levels, unmasking steps) the positions of one request may take: the only
    carrier of K."""

    num_steps: int
    """K; with ``exit``, ``schedule`` or ``max_ms`` the most steps of a position."""
    exit: ExitRule | None = None
    """Exit rule; for thinking models only: the others need every step."""
    schedule: tuple[int, ...] = ()
    """K of the prompt (and so of the first token), of the position of the second token, ...; the last entry
    goes on. Empty: K."""
    min_steps: int = 1
    """Fewest steps that a deadline may lower K to."""
    max_ms: int | None = None
    """Milliseconds from submission after which the answer ends, waiting included."""
    lowers: bool = False
    """Whether K is lowered, down to ``min_steps``, where ``max_tokens`` would not fit ``max_ms`` otherwise.
    """
    speculation: Speculation | None = None
    """For thinking models at a fixed K, with the full cache."""
    wavefront: Wavefront | None = None
    """For thinking models; K is the most steps of a position."""
    step_sizes: tuple[float, ...] = ()
    """Lengths of the K steps, for models whose steps have some. Empty: those of the model."""

    @property
    def guesses(self) -> bool:
        """Whether positions begin before the tokens ahead of them are certain."""
        return self.speculation is not None or self.wavefront is not None

    @property
    def varies(self) -> bool:
        """Whether tokens of one answer may differ in their steps."""
        converges = self.wavefront is not None and self.wavefront.threshold > 0
        return self.exit is not None or bool(self.schedule) or self.lowers or converges

    def steps_at(self, token: int) -> int:
        """K of the position that token number ``token`` is drawn from; 0 is the prompt's."""
        return self.schedule[min(token, len(self.schedule) - 1)] if self.schedule else self.num_steps


@dataclass(frozen=True, slots=True)
class StepPredictions:
    """Intermediate read-outs in a stream: the ``top`` likeliest tokens after every ``every`` steps of a
    position."""

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
    """Score the prompt after each of these numbers of steps (thinking models, with ``prompt_logprobs``): it
    is one segment then, so that step r sees step r everywhere, whatever the cache."""
    step_predictions: StepPredictions | None = None
    order: Order = "random"
    """Which tokens a masked model unmasks first."""
    grammar: Grammar | None = None
    """What the answer may be; the answer ends where nothing can follow, also before ``min_tokens``."""
    spelt: frozenset[int] = frozenset()
    """Special tokens that the text spells out, such as the marks of tool calls."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of a token under the raw model, and of the most likely ones, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """An intermediate read-out: what a position predicts after a step that is not its last."""

    step: int
    delta: float
    """Relative change of the state in this step."""
    top: tuple[tuple[int, float], ...]
    """(token, log-probability under the raw model), best first."""


@dataclass(slots=True)
class StepResult:
    """What one sequence got out of one engine step."""

    tokens: Seq[int] = ()
    """The next tokens of its answer."""
    logprobs: Seq[TokenLogprobs | None] = ()
    """One entry a token, None where none were requested."""
    draft: int | None = None
    """The token that was drafted."""
    guesses: Seq[int] = ()
    """Tokens drawn from the positions that stay in a wavefront."""
    headway: Seq[int] = ()
    """Tokens of positions that are added to a wavefront behind the one of the last guess."""
    exited: bool = False
    """Whether the segment exits with this step, before its last."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Log-probabilities of prompt tokens start + 1 .. of the segment, in order."""
    step_prediction: StepPrediction | None = None
    error: Exception | None = None
    """Why the step failed for this sequence; nothing else is set then."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Work done for one sequence. Row steps are core steps of one position; steps are the core forwards it
    took part in."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys were in the prefix cache."""
    cached_core_steps: int
    """Core steps that the prefix cache saved."""
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
    drafted: int
    """Tokens that were drafted (``StepBudget.speculation``), or that a position of a wavefront began or went
    on with."""
    accepted: int
    """Drafted tokens that became part of the answer."""
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
"""Called for every event; must not block."""
CallSoon = Callable[..., object]
"""Has a function called with its arguments in another thread, soon and in order:
``asyncio.AbstractEventLoop.call_soon_threadsafe``."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in the engine: the open segment, the output, its text, its times and the work it took.

    Only the scheduler and the engine write it, except for ``rows`` and ``flops``: a runner replaces these two
    and changes nothing else, so that restoring them undoes a failed step. Times are seconds of the monotonic
    clock.
    """

    id: int
    request: Request
    counts: StepCounts
    """Counts of the open segment; between segments, of the next. ``StepBudget.schedule`` and ``max_ms`` make
    them change."""
    chunk: int
    """Prompt positions per segment: fixed, so that the cut never depends on what else is running."""
    blocks: frozenset[int] = frozenset()
    """Blocks (of a network of blocks) whose cache each position fills although its own K may not run them,
    where K varies."""
    slot: int = NO_SLOT
    start: int = 0
    """Position of the open segment's first row."""
    length: int = 0
    """Rows of the open segment; 0 while none is open."""
    step: int = 0
    """The core step that the open segment is about to take, from 0."""
    lags: list[int] = field(default_factory=list)
    """How many core steps each position of a wavefront is behind the first one."""
    next_start: int = 0
    output: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    """Tokens after ``output`` that are not verified yet."""

    rows: Any = None
    """The runner's tensors of the open segment, an immutable object."""
    flops: int = 0
    cached: int | None = None
    """Positions of the prompt whose keys were in the prefix cache; None before it was asked."""
    waits_for_prefix: bool = False
    """Whether another sequence computes what this one begins with."""
    cached_row_steps: int = 0
    prompt_row_steps: int = 0
    decode_row_steps: int = 0
    saved_row_steps: int = 0
    """Core steps of positions that exits have spared."""
    token_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    """Tokens that were drafted, and of these the ones that were verified to be right."""
    exits: int = 0
    lowered: int = 0
    """Segments that took fewer steps than requested, to meet the deadline."""

    index: int = 0
    """The request's place in the list given to ``Engine.submit``."""
    sink: Sink = field(init=False)
    call_soon: CallSoon | None = None
    """How ``sink`` is called; None: in the engine thread, at once."""
    detokenizer: Detokenizer = field(init=False)
    guide: Guide | None = None
    """Follows the answer through the request's grammar."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Log-probabilities of prompt tokens that no event has carried yet."""
    sweep: dict[int, list[TokenLogprobs]] = field(default_factory=dict)

    submitted: float = 0.0
    started: float | None = None
    first_token: float | None = None
    last_token: float = 0.0
    overdue: bool = False
    """Whether the deadline ended the answer."""

    @property
    def is_open(self) -> bool:
        """Whether a segment is in flight."""
        return self.length > 0

    @property
    def context_length(self) -> int:
        return len(self.request.prompt) + len(self.output) + len(self.draft)

    @property
    def wants_token(self) -> bool:
        return len(self.output) < self.request.max_tokens

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do: the prompt has been read and no token is wanted."""
        return not self.is_open and not self.wants_token and self.next_start >= len(self.request.prompt)

    @property
    def prompt_steps(self) -> int:
        return self.counts.context if self.request.prompt_logprobs is None else self.counts.scored

    @property
    def draws(self) -> bool:
        """Whether a token is drawn from the last position of the open segment."""
        end = self.context_length - self.verifies
        return self.is_open and self.wants_token and self.start + self.length == end

    @property
    def aligns(self) -> bool:
        """Whether the position that is decoded, or the one to open next, begins together with others of its K:
        not where the number of steps varies or a mask may be late, as all would wait again and again."""
        budget = self.request.budget
        return bool(self.output) and not (budget.varies or budget.guesses) and self.guide is None

    @property
    def steps_left(self) -> int | None:
        """Core steps that the position that is decoded still takes; None where that is not known before, or where
        nothing may delay it."""
        budget = self.request.budget
        if budget.guesses or budget.exit is not None or budget.max_ms is not None or self.guide is not None:
            return None
        return self.counts.drawn - self.step if self.length == 1 and self.draws else None

    @property
    def steps_unchanged(self) -> int:
        """Core steps with the last of which the open segment closes, or keeps only the position that is drawn."""
        if not self.draws:
            return self.prompt_steps - self.step
        shrinks = self.length > 1 and self.step < self.prompt_steps
        return (min(self.prompt_steps, self.counts.drawn) if shrinks else self.counts.drawn) - self.step

    @property
    def has_exit_rule(self) -> bool:
        return self.request.budget.exit is not None

    @property
    def is_wavefront(self) -> bool:
        """Whether the open segment is one: of positions after the prompt's."""
        return self.request.budget.wavefront is not None and self.start >= len(self.request.prompt)

    @property
    def reads_wavefront(self) -> bool:
        """Whether the step now taken is one after which a wavefront is read out."""
        wavefront, taken = self.request.budget.wavefront, self.step + 1
        if wavefront is None or not self.is_wavefront:
            return False
        return taken == self.counts.drawn or taken % wavefront.inner_steps == 0

    @property
    def speculates(self) -> bool:
        """Whether the open segment is of positions whose tokens are drafted first: all after the prompt's."""
        return self.request.budget.speculation is not None and self.start >= len(self.request.prompt)

    @property
    def drafts(self) -> bool:
        """Whether a token is drafted from the step now taken."""
        speculation = self.request.budget.speculation
        return speculation is not None and self.speculates and self.step + 1 == speculation.draft_steps

    @property
    def verifies(self) -> bool:
        """Whether the open segment is a draft: the token after each of its rows is drawn."""
        speculation = self.request.budget.speculation
        return speculation is not None and self.speculates and self.step >= speculation.draft_steps

    @property
    def history(self) -> History:
        return self.history_after(len(self.draft))

    def history_after(self, drafted: int) -> History:
        """What the token after the output and ``drafted`` drafted ones is drawn with."""
        output = [*self.output, *self.draft[:drafted]] if drafted else self.output
        banned = self.request.stop_ids if len(output) < self.request.min_tokens else ()
        return History(
            self.request.prompt, output, banned, None if self.guide is None else self.guide.allowed
        )

    @property
    def deadline(self) -> float | None:
        limit = self.request.budget.max_ms
        return None if limit is None else self.submitted + limit / 1000

    @property
    def next_token(self) -> int:
        """Number of the token that is drawn from the segment to open next, or after it (chunks of a prompt):
        0, 1, ..."""
        return max(0, self.next_start - len(self.request.prompt) + 1)

    def token_ids(self) -> list[int]:
        """Input ids of the open segment's positions."""
        boundary, end = len(self.request.prompt), self.start + self.length
        if self.start >= boundary:
            output = [*self.output, *self.draft] if self.draft else self.output
            return output[self.start - boundary : end - boundary]
        return list(self.request.prompt[self.start : end])

    def steps_of(self, row: int) -> int:
        """Core steps of a row of the open segment, with the one now taken."""
        return self.step + 1 - (self.lags[row] if self.is_wavefront else 0)

    def next_length(self) -> int:
        """Positions of the segment to open next."""
        remaining = len(self.request.prompt) - self.next_start
        return min(remaining, self.chunk) if remaining > 0 else 1

    def skip(self, positions: int | None) -> None:
        """Begin after the first positions of the prompt, whose keys are known; None: not yet."""
        self.waits_for_prefix = positions is None
        if positions is not None:
            self.cached = self.next_start = positions
            self.cached_row_steps = positions * self.prompt_steps

    def open(self) -> None:
        """Put the next segment in flight."""
        assert not self.is_open
        self.start, self.length, self.step = self.next_start, self.next_length(), 0
        self.next_start += self.length
        self.lags = [0]

    def advance(self, result: StepResult) -> None:
        """Record one core step; close the segment where it was the last one of its last position, or where it
        exits."""
        assert self.is_open
        exited = result.exited
        prompt_rows = max(0, min(len(self.request.prompt) - self.start, self.length))
        self.prompt_row_steps += prompt_rows
        self.decode_row_steps += self.length - prompt_rows
        self.step += 1
        if self.is_wavefront:
            if result.tokens or result.guesses:
                self._move_wavefront(result.tokens, result.guesses, result.headway)
            return
        if result.draft is not None:
            self._extend_draft(result.draft)
            return
        draws = self.draws
        needed = self.counts.drawn if draws else self.prompt_steps
        if exited or self.step >= needed:
            if self.speculates:
                self._end_draft(result.tokens)
            self.saved_row_steps += (needed - self.step) * self.length
            self.length = 0
        elif draws and self.length > 1 and self.step >= self.prompt_steps:
            self.start, self.length = self.start + self.length - 1, 1  # the rest was only context

    def _extend_draft(self, token: int) -> None:
        """The position of the drafted token is drafted from next; the last one, and one that may end the
        answer, is verified with those before it: all of them go on together from the step that they are at."""
        speculation = self.request.budget.speculation
        assert speculation is not None
        self.draft.append(token)
        self.drafted += 1
        left = self.request.max_tokens - len(self.output) - len(self.draft)
        if token in self.request.stop_ids or left == 0 or len(self.draft) == speculation.draft_tokens:
            self.start, self.length = self.start - len(self.draft) + 1, len(self.draft)
        else:
            self.start, self.step = self.start + 1, 0

    def _end_draft(self, tokens: Seq[int]) -> None:
        """``tokens`` take the place of the draft: of them only the last can differ from what was drafted. Keys of
        later positions are written again."""
        self.accepted += sum(token == drafted for token, drafted in zip(tokens, self.draft, strict=False))
        self.next_start = self.start + len(tokens)
        self.draft.clear()

    def _move_wavefront(self, tokens: Seq[int], guesses: Seq[int], headway: Seq[int]) -> None:
        """The positions of ``tokens`` leave, those of ``guesses`` stay, and others are added where there is room:
        one, and those of ``headway``. Where none stays, the next segment is a new wavefront."""
        wavefront, gone = self.request.budget.wavefront, len(tokens)
        assert wavefront is not None
        before, lags = self.draft[gone:], self.lags[gone : gone + len(guesses)]
        self.accepted += sum(token == guess for token, guess in zip(tokens, self.draft, strict=False))
        self.saved_row_steps += sum(self.counts.drawn - self.step + lag for lag in self.lags[:gone])
        self.start += gone
        self.next_start = self.start
        self.step -= lags[0] if lags else self.step
        self.lags = [lag - lags[0] for lag in lags]
        room = min(wavefront.positions, self.request.max_tokens - len(self.output) - gone) - len(lags)
        if lags:
            self.lags += [self.step] * max(0, min(room, 1 + len(headway)))
        self.length = len(self.lags)
        self.draft = [*guesses, *headway][: max(0, self.length - 1)]
        self.drafted += sum(before[i : i + 1] != [guess] for i, guess in enumerate(self.draft))

    def append(self, token: int, steps: int, exited: bool) -> tuple[str, str | None]:
        """Append a drawn token -> the text that is now certain, and why the answer ends with it (None: it
        goes on)."""
        self.output.append(token)
        self.token_steps += steps
        self.exits += exited
        may_stop = len(self.output) > self.request.min_tokens
        if token in self.request.stop_ids and may_stop:
            return self.detokenizer.finish(), "stop"
        is_complete = self.guide is not None and self.guide.accept(token)
        text, stopped = self.detokenizer.feed(token, may_stop)
        if stopped:
            return text, "stop"
        if is_complete:
            return text + self.detokenizer.finish(), "stop"
        return (text, None) if self.wants_token else (text + self.detokenizer.finish(), "length")

    def add_prompt_logprobs(self, logprobs: list[TokenLogprobs], steps: int) -> None:
        """Record log-probabilities of prompt tokens after ``steps`` core steps."""
        if self.request.sweep:
            self.sweep[steps] = logprobs
        else:
            self.prompt_logprobs += logprobs

    def take_prompt_logprobs(self) -> list[TokenLogprobs] | None:
        taken, self.prompt_logprobs = self.prompt_logprobs, []
        return taken or None

    def time_token(self, now: float) -> float | None:
        """Record the time of a token -> seconds since the one before; None for the first."""
        before, self.last_token = self.last_token, now
        if self.first_token is None:
            self.first_token = now
            return None
        return now - before

    def expire(self) -> str:
        """Record that the deadline has passed -> why the answer ends: "length", or "expired" where there is
        nothing to return."""
        self.overdue = True
        only_scores = self.request.prompt_logprobs is not None and not self.output
        return "expired" if self.started is None or only_scores else "length"

    def usage(self, now: float, kv_bytes: int) -> Usage:
        started = self.started or now
        return Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached or 0,
            cached_core_steps=self.cached_row_steps,
            completion_tokens=len(self.output),
            num_steps=self.request.budget.num_steps,
            prefill_core_steps=self.prompt_row_steps,
            decode_core_steps=self.decode_row_steps,
            saved_core_steps=self.saved_row_steps,
            flops=self.flops,
            kv_bytes=kv_bytes,
            token_steps=self.token_steps,
            drafted=self.drafted,
            accepted=self.accepted,
            exits=self.exits,
            lowered=self.lowered,
            overdue=self.overdue,
            queue_s=started - self.submitted,
            first_token_s=(self.first_token or now) - self.submitted,
            total_s=now - self.submitted,
        )
