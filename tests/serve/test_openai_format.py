"""What lm-eval reads of log-probabilities, where it is easily wrong: equal texts, infinities, raw values,
long prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from rdlm.data.tokenizer import Tokenizer
from rdlm.sampling_params import SamplingParams
from serve.api.openai_format import FLOOR, chat_logprobs, completion_logprobs
from serve.engine import runner
from serve.engine.detokenizer import TokenNames
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget, TokenLogprobs


def test_of_two_tokens_that_read_the_same_the_likelier_is_kept(tokenizer: Tokenizer) -> None:
    """Half characters all read as one replacement sign, and top_logprobs is keyed by text."""
    names = TokenNames(tokenizer)
    halves = [i for i in range(tokenizer.vocab_size) if names.name(i) == "\ufffd"][:2]
    assert len(halves) == 2
    for chosen, other in (halves, halves[::-1]):
        entry = TokenLogprobs(-3.0, ((other, -0.5),))
        assert completion_logprobs(names, [(chosen, 0, entry)])["top_logprobs"] == [{"\ufffd": -0.5}]
        assert [e["logprob"] for e in chat_logprobs(names, chosen, entry)["top_logprobs"]] == [-0.5]


def test_no_reply_has_a_number_that_json_lacks(tokenizer: Tokenizer) -> None:
    names = TokenNames(tokenizer)
    entry = TokenLogprobs(-math.inf, ((7, math.nan), (8, -1.0)))
    for reply in (completion_logprobs(names, [(6, 0, entry)]), chat_logprobs(names, 6, entry)):
        text = json.dumps(reply, allow_nan=False)
        assert str(FLOOR) in text and "null" not in text


def test_logprobs_are_those_of_the_raw_model(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever shapes the draw: read back as a prompt (a few rows at a time), tokens have the
    log-probabilities they were said with."""
    engine = make_engine()
    shaped = SamplingParams(
        temperature=3.0, top_k=40, repetition_penalty=1.7, presence_penalty=1.5, logit_bias={9: 4.0}
    )
    said = engine.generate([Request((5, 6, 7), StepBudget(1), 20, shaped, seed=5, logprobs=0)])[0]
    monkeypatch.setattr(runner, "LOGITS_AT_ONCE", 3 * engine.served.config.model.vocab_size)
    tokens = [event.token for event in said if event.token is not None]
    read = engine.generate([Request((5, 6, 7, *tokens), StepBudget(1), 0, logprobs=0, prompt_logprobs=0)])[0]
    scored = [entry.logprob for event in read for entry in event.prompt_logprobs or []]
    assert len(scored) == 22 and len(set(tokens)) > 10
    assert scored[2:] == pytest.approx(
        [event.logprobs.logprob for event in said if event.logprobs is not None], abs=1e-4
    )
