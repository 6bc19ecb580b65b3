"""One step of masked texts in flight: a turn of those that are filled in, a token of those prompts that are scored.

The counterpart of serve/engine/runner.py for models without a next token. Texts of similar length and one owner share a pass, whatever their K,
order and step; the answer's tokens leave in order, each as soon as all before it are in sight, for what is in sight never changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rdlm.diffusion.unmasking import Asked, Draft, fill, mask_of, read
from rdlm.objectives.masked import MaskedDiffusion
from serve.engine.flops import costs_of
from serve.engine.masked_sequence import MaskedSequence
from serve.engine.rows import logprobs_of, step_of
from serve.engine.sequence import Depth, Drawn, Request, Sequence, StepResult, TokenLogprobs


@dataclass(slots=True)
class _Filled:
    """A text between two turns, and the log-probabilities of its drawn tokens by place, where they are wanted."""

    draft: Draft
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)


class MaskedRunner:
    """A masked denoiser and the texts in flight. Called by one thread only."""

    position_bytes = 0
    """No keys are kept: every step of a text sees tokens that the one before did not."""

    def __init__(self, denoiser: MaskedDiffusion, num_tokens: int) -> None:
        """num_tokens: ids the tokenizer knows; those a padded vocabulary has beyond them are never drawn."""
        self.denoiser, self._num_tokens, self._mask_id = denoiser, num_tokens, mask_of(denoiser)
        self._device = next(denoiser.parameters()).device
        self._costs = {block: costs_of(block) for block in denoiser.parts}
        self._spent: Counter[int] = Counter()
        self._filled: dict[int, _Filled] = {}

    def depth(self, num_steps: int) -> Depth:
        return Depth(num_steps, num_steps, num_steps, num_steps)

    def sequence(self, number: int, request: Request, chunk: int) -> MaskedSequence:
        """chunk is of no use: every token is in every step."""
        return MaskedSequence(number, request, self.depth(request.budget.num_steps), chunk)

    def release(self, sequence_id: int) -> int:
        """Forget a text -> the FLOPs it has taken."""
        self._filled.pop(sequence_id, None)
        return self._spent.pop(sequence_id, 0)

    @torch.inference_mode()
    def run(self, batch: Seq[Sequence]) -> dict[int, StepResult]:
        """One step of every sequence in ``batch`` -> what came out, by sequence id."""
        masked = [s for s in batch if isinstance(s, MaskedSequence)]
        assert len(masked) == len(batch), "this runner makes its sequences itself"
        return self._score([s for s in masked if s.scores]) | self._fill(
            [s for s in masked if not s.scores and s.turns]
        )

    def _score(self, sequences: Seq[MaskedSequence]) -> dict[int, StepResult]:
        """Log-probability of the prompt token that follows as many as there were steps, it and all behind it hidden."""
        results = {s.id: StepResult(prompt_logprobs=[]) for s in sequences}
        sequences = [s for s in sequences if len(s.request.prompt) > 1]
        asked = []
        for s in sequences:
            place, ids = step_of(s) + 1, self._tensor(s.request.prompt)
            ids[place:] = self._mask_id
            asked.append(Asked(ids, (len(ids) - place) / len(ids), self._tensor((place,))))
            self._spend(s, asked[-1].level, len(ids), 1)
        for s, ask, logits in zip(sequences, asked, read(self.denoiser, asked), strict=True):
            token, count = s.request.prompt[int(ask.places)], s.request.prompt_logprobs
            assert count is not None
            results[s.id].prompt_logprobs = logprobs_of(logits, self._tensor((token,)), count)
        return results

    def _fill(self, sequences: Seq[MaskedSequence]) -> dict[int, StepResult]:
        """Take a turn, and say which tokens of the answer are now certain."""
        states = [self._filled.get(s.id) or self._begin(s) for s in sequences]
        for s, state in zip(sequences, states, strict=True):
            turn = state.draft.turn
            assert turn is not None
            hidden = int((state.draft.ids == self._mask_id).sum()) if turn.places is None else turn.count
            self._spend(s, turn.level, len(state.draft.ids), hidden)
        found = fill(self.denoiser, [state.draft for state in states], self._num_tokens)
        results = {}
        for s, state, (places, logits) in zip(sequences, states, found, strict=True):
            if s.request.logprobs is not None:
                entries = logprobs_of(logits, state.draft.ids[places], s.request.logprobs)
                state.logprobs.update(zip(places.tolist(), entries, strict=True))
            results[s.id] = StepResult(self._certain(s, state))
        return results

    def _begin(self, sequence: MaskedSequence) -> _Filled:
        request, prompt = sequence.request, sequence.request.prompt
        ids = self._tensor((*prompt, *[self._mask_id] * request.max_tokens))
        draft = Draft(
            ids,
            sequence.turns,
            request.sampling,
            request.seed,
            request.choice,
            request.stop_ids,
            len(prompt) + request.min_tokens,
        )
        self._filled[sequence.id] = _Filled(draft)
        return self._filled[sequence.id]

    def _certain(self, sequence: MaskedSequence, state: _Filled) -> list[Drawn]:
        """The tokens behind those already said, up to the first hidden one."""
        place, found = sequence.context_length, []
        for token in state.draft.ids[place:].tolist():
            if token == self._mask_id:
                break
            found.append(Drawn(token, state.logprobs.pop(place, None)))
            place += 1
        return found

    def _spend(self, sequence: Sequence, level: float, length: int, read_out: int) -> None:
        """Charge a pass over ``length`` positions, of which so many are read out, to a sequence."""
        cost = self._costs[self.denoiser.at(level)]
        passes = cost.encode.of_all(length) + cost.core.of_all(length) + cost.decode.of_all(length)
        self._spent[sequence.id] += passes + cost.condition + read_out * cost.head

    def _tensor(self, ids: Seq[int]) -> Tensor:
        return torch.tensor(ids, device=self._device)
