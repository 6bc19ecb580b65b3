"""A request to a masked model as the engine sees it: nothing is cached, and all of the answer is in every step. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from rdlm.diffusion.unmasking_plan import Turn, turns
from serve.engine.sequence import Segment, Sequence


@dataclass(slots=True, eq=False)
class MaskedSequence(Sequence):
    """First, where the prompt is scored, a segment over the prompt with a step for each token; then one over prompt and answer with a
    step for each turn of the sampler (rdlm/diffusion/unmasking_plan.py)."""

    is_scored: bool = False
    turns: tuple[Turn, ...] = ()

    @property
    def scores(self) -> bool:
        """Whether the open segment, or the next one, scores the prompt."""
        return self.request.prompt_logprobs is not None and not self.is_scored

    @property
    def is_done(self) -> bool:
        return self.segment is None and not self.wants_token and not self.scores

    def next_length(self) -> int:
        return len(self.request.prompt) + (0 if self.scores else self.request.max_tokens)

    def open(self) -> None:
        assert self.segment is None
        self.segment, request = Segment(0, self.next_length()), self.request
        if not self.scores:
            places = range(len(request.prompt), self.segment.length)
            start = len(places) / self.segment.length
            self.turns = tuple(
                turns(places, self.depth.num_steps, start, request.order, request.seed, request.choice)
            )

    def advance(self, exited: bool = False) -> bool:
        segment, prompt = self.segment, len(self.request.prompt)
        assert segment is not None and not exited
        steps = prompt - 1 if self.scores else len(self.turns)
        if steps:  # one prompt token has nothing to be scored, and a text that is not continued no turn
            self.prompt_row_steps += prompt
            self.decode_row_steps += segment.length - prompt
        segment.step += 1
        if segment.step < steps:
            return False
        self.is_scored = self.is_scored or self.scores
        self.segment = None
        return True
