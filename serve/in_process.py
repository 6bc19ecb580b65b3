"""The server's engine around a model that is in memory: behind ``generate`` and ``chat`` of ``rdlm.load(...)``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Literal

from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError
from rdlm.exit_criteria import CRITERIA, ExitRule
from rdlm.inference import Generation, Message, Model
from rdlm.sampling_params import SamplingParams, check_masked, check_sampler
from serve.api.chat_template import ChatTemplate
from serve.engine.engine import Engine
from serve.engine.exits import default_thresholds
from serve.engine.sequence import (
    MAX_DRAFT,
    MAX_WAVEFRONT,
    Request,
    Speculation,
    StepBudget,
    Wavefront,
)
from serve.errors import ApiError
from serve.loading import build_served, end_ids
from serve.settings import EngineSettings

MOST_TOGETHER = 16
"""Prompts that step together."""


class InProcess:
    """See rdlm.inference.Engine. Each call has a pool of keys that fits its prompts, and none stays behind."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def generate(
        self,
        prompts: Seq[Seq[int]],
        num_steps: int,
        *,
        max_tokens: int,
        sampling: SamplingParams,
        seed: int,
        stop: Seq[str],
        exit_criterion: str | None,
        exit_threshold: float | None,
        kv_cache: Literal["shared", "full", "first"],
        draft_steps: int | None,
        draft_tokens: int,
        wavefront: int | None,
        inner_steps: int | None,
        wavefront_threshold: float | None,
    ) -> list[Generation]:
        if not prompts:
            return []
        model, tokenizer = self.model, self._tokenizer
        check_sampler(sampling.sampler, model.config)
        check_masked(sampling, None, model.config)
        ends = end_ids(model.folder, tokenizer)
        settings = EngineSettings(
            kv_cache=kv_cache,
            max_slots=min(len(prompts), MOST_TOGETHER),
            max_len=max(2, max(map(len, prompts)) + max_tokens),
            max_queue=len(prompts),
        )
        served = build_served(model.denoiser, model.config, tokenizer, settings, ends)
        budget = StepBudget(
            num_steps,
            self._rule(exit_criterion, exit_threshold),
            speculation=speculation_of(draft_steps, draft_tokens),
            wavefront=wavefront_of(wavefront, inner_steps, wavefront_threshold),
        )
        requests = [
            Request(tuple(ids), budget, max_tokens, sampling, seed, stop=tuple(stop), stop_ids=ends)
            for ids in prompts
        ]
        with Engine(lambda: served, settings.max_queue) as engine:
            answers = engine.generate(requests)
        found = []
        for events in answers:
            last = events[-1]
            if last.error is not None:
                raise last.error
            if last.finish not in ("stop", "length"):
                raise RuntimeError(f"generation ended with {last.finish!r}")
            drawn = [(e.token, e.steps) for e in events if e.token is not None and e.steps is not None]
            tokens, steps = [token for token, _ in drawn], [count for _, count in drawn]
            usage, text = last.usage, "".join(e.text for e in events)
            guesses = (0, 0) if usage is None else (usage.drafted, usage.accepted)
            found.append(Generation(text, tokens, steps, last.finish, *guesses))
        return found

    def chat_ids(self, messages: Seq[Message]) -> list[int]:
        """The prompt of a conversation. UserError where there is no template for it, or it refuses."""
        template = ChatTemplate.of(self._tokenizer)
        if template is None:
            problem = "its tokenizer has no chat template"
            raise UserError("checkpoint", self.model.config.name, problem, "continue texts with generate")
        given = list(messages)
        if not given or not all(isinstance(message, Mapping) for message in given):
            remedy = 'give a list of {"role": ..., "content": ...}'
            raise UserError("messages", messages, "it holds no conversation", remedy)
        try:
            return self._tokenizer.encode(template.render([dict(message) for message in given], {}))
        except ApiError as error:
            _, _, problem = error.message.partition(": ")
            raise UserError("messages", len(given), problem or error.message, "change them") from None

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.model.tokenizer is None:
            problem = "it has no tokenizer, so answers cannot be read as text"
            raise UserError("checkpoint", self.model.config.name, problem, "use logits")
        return self.model.tokenizer

    def _rule(self, criterion: str | None, threshold: float | None) -> ExitRule | None:
        """UserError for a criterion that the model does not have."""
        if criterion is None:
            return None
        known = default_thresholds(self.model.config)
        if criterion not in known:
            problem = (
                "this model has no such criterion" if criterion in CRITERIA else "there is no such criterion"
            )
            remedy = f"use one of {', '.join(known)}" if known else "leave it out"
            raise UserError("exit_criterion", criterion, problem, remedy)
        return ExitRule(criterion, known[criterion] if threshold is None else threshold)


def speculation_of(draft_steps: int | None, draft_tokens: int) -> Speculation | None:
    """None where nothing is drafted. UserError for a number that is out of range; K bounds ``draft_steps``."""
    if not 1 <= draft_tokens <= MAX_DRAFT:
        raise UserError("draft_tokens", draft_tokens, "is out of range", f"give 1 to {MAX_DRAFT}")
    return None if draft_steps is None else Speculation(draft_steps, draft_tokens)


def wavefront_of(positions: int | None, inner_steps: int | None, threshold: float | None) -> Wavefront | None:
    """None where there is none. UserError for numbers that are out of range, or belong to none."""
    if positions is None:
        if (inner_steps, threshold) != (None, None):
            problem = "inner_steps and wavefront_threshold belong to wavefront decoding"
            raise UserError("wavefront", None, problem, "give its positions, or leave them out")
        return None
    if not 1 <= positions <= MAX_WAVEFRONT:
        raise UserError("wavefront", positions, "is out of range", f"give 1 to {MAX_WAVEFRONT} positions")
    if inner_steps is not None and inner_steps < 1:
        raise UserError("inner_steps", inner_steps, "is out of range", "give at least 1")
    if threshold is not None and not 0 <= threshold < math.inf:
        raise UserError("wavefront_threshold", threshold, "is out of range", "give 0 or more")
    return Wavefront.of(positions, inner_steps, threshold)
