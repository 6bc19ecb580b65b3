"""One step of masked texts in flight: an unmasking step of those that are filled in, a token of those prompts
that are scored.

The counterpart of serve/engine/runner.py for models without a next token: nothing is cached, and all of the
answer is in every step. Texts of similar length and one owner share a pass, whatever their K, order and step.
Tokens of the answer leave in order, each as soon as all before it are unmasked, for an unmasked token never
changes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from rdlm.diffusion.unmasking import Draft, Query, fill, mask_of, read
from rdlm.diffusion.unmasking_plan import UnmaskingStep, unmasking_steps
from rdlm.errors import UserError
from rdlm.flops import costs_of
from rdlm.objectives.masked import MaskedDiffusion
from serve.engine.runner import logprobs_of
from serve.engine.sequence import Request, Sequence, StepCounts, StepResult, TokenLogprobs


@dataclass(slots=True, eq=False)
class MaskedSequence(Sequence):
    """First, where the prompt is scored, a segment over the prompt with a step for each token; then one over
    prompt and answer with a step for each step of the sampler (rdlm/diffusion/unmasking_plan.py)."""

    is_scored: bool = False
    plan: tuple[UnmaskingStep, ...] = ()

    @property
    def scores(self) -> bool:
        """Whether the open segment, or the next one, scores the prompt."""
        return self.request.prompt_logprobs is not None and not self.is_scored

    @property
    def is_done(self) -> bool:
        return not self.is_open and not self.wants_token and not self.scores

    def next_length(self) -> int:
        return len(self.request.prompt) + (0 if self.scores else self.request.max_tokens)

    def open(self) -> None:
        assert not self.is_open
        self.start, self.length, self.step, request = 0, self.next_length(), 0, self.request
        if not self.scores:
            positions = range(len(request.prompt), self.length)
            start = len(positions) / self.length
            self.plan = tuple(
                unmasking_steps(
                    positions, self.counts.num_steps, start, request.order, request.seed, request.choice
                )
            )

    def advance(self, result: StepResult) -> None:
        assert self.is_open and not result.exited
        prompt = len(self.request.prompt)
        steps = prompt - 1 if self.scores else len(self.plan)
        if steps:  # one prompt token has nothing to be scored, and a text that is not continued no step
            self.prompt_row_steps += prompt
            self.decode_row_steps += self.length - prompt
        self.step += 1
        if self.step >= steps:
            self.is_scored = self.is_scored or self.scores
            self.length = 0


@dataclass(frozen=True, slots=True)
class MaskedRows:
    """A text between two steps, and the log-probabilities of its drawn tokens by position, where they are
    wanted."""

    draft: Draft
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)

    def copy(self) -> MaskedRows:
        """Another that a step may modify: the first one is what a failed step goes back to."""
        return MaskedRows(replace(self.draft, ids=self.draft.ids.clone()), dict(self.logprobs))


class MaskedRunner:
    """A masked denoiser. Called by one thread only."""

    guesses: tuple[str, ...] = ()
    """See serve.engine.runner.Runner."""

    def __init__(self, denoiser: MaskedDiffusion, num_tokens: int) -> None:
        """num_tokens: ids the tokenizer knows; those a padded vocabulary has beyond them are neither drawn
        nor reported."""
        self.denoiser, self._num_tokens, self._mask_id = denoiser, num_tokens, mask_of(denoiser)
        self._device = next(denoiser.parameters()).device
        self.waits = self._device.type == "cpu"
        self._costs = {block: costs_of(block) for block in denoiser.parts}

    def step_counts(self, num_steps: int, blocks: frozenset[int] = frozenset()) -> StepCounts:
        if num_steps < 1:
            raise UserError("num_steps", num_steps, "is out of range", "this model takes 1 or more")
        return StepCounts(num_steps, num_steps, num_steps, num_steps)

    def sequence(self, number: int, request: Request, chunk: int) -> MaskedSequence:
        """chunk has no effect: every token is in every step. Raises UserError."""
        for name in ("speculation", "wavefront"):
            if getattr(request.budget, name) is not None:
                problem = "this model fills in all of an answer in K steps"
                raise UserError(name, "...", problem, "leave it out")
        return MaskedSequence(number, request, self.step_counts(request.budget.num_steps), chunk)

    def attach(self, sequence: Sequence) -> int | None:
        """No keys of prompts are kept: every step changes the whole text."""
        return 0

    def release(self, sequence: Sequence) -> int:
        """Free what is kept for a sequence that leaves -> bytes of its keys and values: none are kept."""
        sequence.rows = None
        return 0

    def unread_steps(self, batch: Seq[Sequence]) -> int:
        """Every step may make tokens of the answer certain."""
        return 0

    def run_unread(self, batch: Seq[Sequence], steps: int) -> dict[int, StepResult]:
        raise AssertionError("no step of this model goes unread")

    @torch.inference_mode()
    def run(self, batch: Seq[Sequence]) -> dict[int, StepResult]:
        """One step of every sequence in ``batch`` -> what came out, by sequence id. It can be repeated as
        serve.engine.runner says."""
        masked = cast(Seq[MaskedSequence], batch)  # ``sequence`` makes no others
        return self._score([s for s in masked if s.scores]) | self._fill(
            [s for s in masked if not s.scores and s.plan]
        )

    def _score(self, sequences: Seq[MaskedSequence]) -> dict[int, StepResult]:
        """Log-probability of the prompt token that follows as many as there were steps, it and all behind it
        masked."""
        results = {s.id: StepResult(prompt_logprobs=[]) for s in sequences}
        sequences = [s for s in sequences if len(s.request.prompt) > 1]
        queries = []
        for s in sequences:
            position, ids = s.step + 1, self._tensor(s.request.prompt)
            ids[position:] = self._mask_id
            queries.append(Query(ids, (len(ids) - position) / len(ids), self._tensor((position,))))
            self._charge(s, queries[-1].level, len(ids), 1)
        for s, query, logits in zip(sequences, queries, read(self.denoiser, queries), strict=True):
            token, count = s.request.prompt[int(query.positions)], s.request.prompt_logprobs
            assert count is not None
            results[s.id].prompt_logprobs = logprobs_of(
                logits, self._tensor((token,)), count, self._num_tokens
            )
        return results

    def _fill(self, sequences: Seq[MaskedSequence]) -> dict[int, StepResult]:
        """Take an unmasking step, and report which tokens of the answer are now certain."""
        states = [self._begin(s) if s.rows is None else cast(MaskedRows, s.rows).copy() for s in sequences]
        for s, state in zip(sequences, states, strict=True):
            step = state.draft.next_step
            assert step is not None
            read_out = int((state.draft.ids == self._mask_id).sum()) if step.positions is None else step.count
            self._charge(s, step.level, len(state.draft.ids), read_out)
        found = fill(self.denoiser, [state.draft for state in states], self._num_tokens)
        results = {}
        for s, state, (positions, logits) in zip(sequences, states, found, strict=True):
            if s.request.logprobs is not None:
                chosen = state.draft.ids[positions]
                entries = logprobs_of(logits, chosen, s.request.logprobs, self._num_tokens)
                state.logprobs.update(zip(positions.tolist(), entries, strict=True))
            tokens = self._certain(s, state)
            first = s.context_length
            logprobs = [state.logprobs.get(first + i) for i in range(len(tokens))]
            results[s.id] = StepResult(tokens, logprobs)
            s.rows = state
        return results

    def _begin(self, sequence: MaskedSequence) -> MaskedRows:
        request, prompt = sequence.request, sequence.request.prompt
        ids = self._tensor((*prompt, *[self._mask_id] * request.max_tokens))
        ends_from = len(prompt) + request.min_tokens
        return MaskedRows(
            Draft(
                ids,
                sequence.plan,
                request.sampling,
                request.seed,
                request.choice,
                request.stop_ids,
                ends_from,
            )
        )

    def _certain(self, sequence: MaskedSequence, state: MaskedRows) -> list[int]:
        """The tokens behind those already reported, up to the first masked one."""
        rest = state.draft.ids[sequence.context_length :].tolist()
        return rest[: rest.index(self._mask_id)] if self._mask_id in rest else rest

    def _charge(self, sequence: Sequence, level: float, length: int, read_out: int) -> None:
        """Add the FLOPs of a pass over ``length`` positions, of which so many are read out."""
        cost = self._costs[self.denoiser.at(level)]
        passes = cost.encode.of_all(length) + cost.core.of_all(length) + cost.decode.of_all(length)
        sequence.flops += passes + cost.condition + read_out * cost.head

    def _tensor(self, ids: Seq[int]) -> Tensor:
        return torch.tensor(ids, device=self._device)
