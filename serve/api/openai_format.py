"""OpenAI-shaped answers from engine events: plain dictionaries ready for JSON.

A format turns each event into a part of its choice (``piece``), which a stream sends as it is, and joins the
parts of a choice for an answer in one piece (``merge``).
"""

from __future__ import annotations

import codecs
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from serve.api.request_parsing import Parsed
from serve.api.tools import CallReader, Delta
from serve.engine.detokenizer import TokenNames
from serve.engine.sequence import Event, TokenLogprobs, Usage

FLOOR = -9999.0
"""Stands for -inf and NaN, which JSON cannot carry (vLLM's convention)."""


class Format(Protocol):
    """What serve/api/streaming.py needs of a kind of answer."""

    parsed: Parsed
    names: TokenNames

    def head(self, stream: bool) -> dict[str, Any]:
        """id, object, created and model; every chunk of a stream carries the same."""

    def piece(self, event: Event) -> dict[str, Any]:
        """One event as (part of) a choice."""

    def merge(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        """All parts of one choice, in order, as the choice."""


class CompletionFormat:
    """Answers of /v1/completions."""

    def __init__(self, parsed: Parsed, names: TokenNames, reports_logprobs: bool) -> None:
        self.parsed, self.names = parsed, names
        self._head = envelope("text_completion", parsed.model, "cmpl")
        self._started: set[int] = set()
        self._offsets = [TextOffsets(names) if reports_logprobs else None for _ in parsed.requests]

    def head(self, stream: bool) -> dict[str, Any]:
        return self._head

    def piece(self, event: Event) -> dict[str, Any]:
        """The first part of a choice carries the echoed prompt."""
        parsed, request = self.parsed, self.parsed.requests[event.index]
        is_first = event.index not in self._started
        self._started.add(event.index)
        text, offsets = event.text, self._offsets[event.index]
        entries: list[tuple[int, int, TokenLogprobs | None]] = []
        if is_first and parsed.echoed is not None:
            prompt = parsed.echoed[event.index // parsed.n]
            text = prompt + text
            if offsets is not None:
                scored = [None, *(event.prompt_logprobs or [])]
                places = offsets.of_prompt(request.prompt, prompt)
                entries += zip(request.prompt, places, scored, strict=True)
        if event.token is not None and offsets is not None:
            entries.append((event.token, offsets.add(event.token), event.logprobs))
        choice: dict[str, Any] = {"index": event.index, "text": text, "finish_reason": event.finish}
        choice["logprobs"] = None if offsets is None else completion_logprobs(self.names, entries)
        choice |= token_steps(parsed, event)
        if is_first:
            choice |= prompt_scores(self.names, parsed, event)
        if parsed.reports_ids:
            choice["prompt_token_ids"] = list(request.prompt) if is_first else None
            choice["token_ids"] = [] if event.token is None else [event.token]
        return choice

    def merge(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        merged = pieces[0] | pieces[-1] | {"text": "".join(piece["text"] for piece in pieces)}
        merged |= _joined_steps(pieces)
        if merged["logprobs"] is not None:
            merged["logprobs"] = {
                key: [x for piece in pieces for x in piece["logprobs"][key]] for key in merged["logprobs"]
            }
            # a stop string is cut off with the tokens that spell it, whose entries stay
            end = len(merged["text"])
            merged["logprobs"]["text_offset"] = [min(x, end) for x in merged["logprobs"]["text_offset"]]
        if self.parsed.reports_ids:
            merged["prompt_token_ids"] = pieces[0]["prompt_token_ids"]
            merged["token_ids"] = [i for piece in pieces for i in piece["token_ids"]]
        return merged


class ChatFormat:
    """Answers of /v1/chat/completions. The role comes with the first token: clients time the first chunk as
    the first token.
    """

    def __init__(self, parsed: Parsed, names: TokenNames) -> None:
        self.parsed, self.names = parsed, names
        self._head = envelope("chat.completion", parsed.model, "chatcmpl")
        if parsed.reports_ids:
            self._head["prompt_token_ids"] = list(parsed.requests[0].prompt)
        self._started: set[int] = set()
        self._readers = readers(parsed)

    def head(self, stream: bool) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk"} if stream else self._head

    def piece(self, event: Event) -> dict[str, Any]:
        is_first = event.index not in self._started
        self._started.add(event.index)
        logprobs = None
        if event.token is not None and event.logprobs is not None:
            logprobs = {"content": [chat_logprobs(self.names, event.token, event.logprobs)]}
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        finish = event.finish
        if self._readers:
            reader = self._readers[event.index]
            delta |= _chat_delta(read_calls(reader, event))
            finish = "tool_calls" if finish == "stop" and reader.is_whole else finish
        else:
            delta["content"] = event.text
        choice = {"index": event.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        choice |= token_steps(self.parsed, event)
        if is_first:
            choice |= prompt_scores(self.names, self.parsed, event)
        if self.parsed.reports_ids:
            choice["token_ids"] = [] if event.token is None else [event.token]
        return choice

    def merge(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        content = [entry for piece in pieces if piece["logprobs"] for entry in piece["logprobs"]["content"]]
        text = "".join(piece["delta"].get("content", "") for piece in pieces)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls := _joined_calls(pieces):
            message |= {"content": text or None, "tool_calls": calls}
        choice = {
            "index": pieces[-1]["index"],
            "message": message,
            "logprobs": {"content": content} if content else None,
            "finish_reason": pieces[-1]["finish_reason"],
        }
        choice |= {key: pieces[0][key] for key in ("prompt_logprobs",) if key in pieces[0]}
        if self.parsed.reports_ids:
            choice["token_ids"] = [i for piece in pieces for i in piece["token_ids"]]
        return choice | _joined_steps(pieces)


def readers(parsed: Parsed) -> list[CallReader]:
    """One for each answer where tools were offered, else none."""
    tools = parsed.tools
    return (
        []
        if tools is None
        else [CallReader(tools.form, tools.tools, tools.only_first) for _ in parsed.requests]
    )


def read_calls(reader: CallReader, event: Event) -> list[Delta]:
    """Parts of the answer that are certain with this event."""
    return reader.feed(event.text) + (reader.finish() if event.finish is not None else [])


def _chat_delta(deltas: list[Delta]) -> dict[str, Any]:
    """content and tool_calls of a chunk."""
    text = "".join(delta.text for delta in deltas if delta.call is None)
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if delta.call is None:
            continue
        call = calls.setdefault(delta.call, {"index": delta.call, "function": {"arguments": ""}})
        if delta.id is not None:
            call |= {"id": delta.id, "type": "function"}
            call["function"] = {"name": delta.name, "arguments": ""}
        call["function"]["arguments"] += delta.text
    return ({"content": text} if text or not calls else {}) | (
        {"tool_calls": [*calls.values()]} if calls else {}
    )


def _joined_calls(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of an answer from those of its parts."""
    whole: dict[int, dict[str, Any]] = {}
    for part in (part for piece in pieces for part in piece["delta"].get("tool_calls", ())):
        if part["index"] not in whole:
            whole[part["index"]] = {key: part[key] for key in ("id", "type")} | {
                "function": {**part["function"]}
            }
        else:
            whole[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return [*whole.values()]


def score_answer(
    parsed: Parsed, names: TokenNames, ks: list[int], estimator: str, events: Sequence[Event]
) -> dict[str, Any]:
    """The answer of /v1/score from the last event of each prompt, in their order."""
    scores = []
    for event in events:
        prompt = parsed.requests[event.index].prompt
        found = event.sweep or {ks[0]: event.prompt_logprobs or []}
        values = {str(k): [finite(entry.logprob) for entry in found[k]] for k in ks}
        scores.append(
            {
                "index": event.index,
                "tokens": [names.name(i) for i in prompt],
                "token_ids": prompt,
                "token_logprobs": {k: [None, *logprobs] for k, logprobs in values.items()},
                "logprob": {k: sum(logprobs) for k, logprobs in values.items()},
            }
        )
    usage = usage_of(parsed, [event.usage for event in events if event.usage])
    body = {"num_steps": ks, "estimator": estimator, "scores": scores, "usage": usage, **warnings_of(parsed)}
    return envelope("score", parsed.model, "score") | body


def warnings_of(parsed: Parsed) -> dict[str, Any]:
    """The field ``warnings``, where there are any."""
    return {"warnings": list(parsed.warnings)} if parsed.warnings else {}


def envelope(kind: str, model: str, prefix: str) -> dict[str, Any]:
    """id, object, created and model of one answer."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage_of(parsed: Parsed, usages: Iterable[Usage]) -> dict[str, Any]:
    """OpenAI's counts, a prompt once however many answers it got, and ``recurrence``: the work done, over all
    choices.
    """
    done, budget = list(usages), parsed.budget
    prompt = sum(len(parsed.requests[i].prompt) for i in range(0, len(parsed.requests), parsed.n))
    completion = sum(u.completion_tokens for u in done)
    prefill, decode = sum(u.prefill_core_steps for u in done), sum(u.decode_core_steps for u in done)
    recurrence: dict[str, Any] = {
        "num_steps": budget.num_steps,
        "core_steps": prefill + decode,
        "prefill_core_steps": prefill,
        "decode_core_steps": decode,
        "flops": sum(u.flops for u in done),
        "kv_bytes": sum(u.kv_bytes for u in done),
    }
    if budget.varies:
        recurrence["mean_steps"] = sum(u.token_steps for u in done) / completion if completion else None
    if budget.exit is not None:
        recurrence["exit"] = asdict(budget.exit)
    if budget.exit is not None or budget.wavefront is not None:
        recurrence["exits"] = sum(u.exits for u in done)
        recurrence["saved_core_steps"] = sum(u.saved_core_steps for u in done)
    if budget.schedule:
        recurrence["schedule"] = budget.schedule
    if budget.lowers:
        recurrence |= {"max_ms": budget.max_ms, "min_steps": budget.min_steps}
        recurrence["lowered"] = sum(u.lowered for u in done)
    if budget.max_ms is not None:
        recurrence["deadline_hit"] = any(u.overdue for u in done)
    if parsed.browned_out:
        recurrence["brownout"] = True
    # Further answers to a prompt find what the first one has computed; that is not counted.
    cached = sorted(u.cached_tokens for u in done)[: len(done) // parsed.n]
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(cached)},
        "recurrence": recurrence,
    }
    for name, guesses in (("speculation", budget.speculation), ("wavefront", budget.wavefront)):
        if guesses is None:
            continue
        drafted, accepted = sum(u.drafted for u in done), sum(u.accepted for u in done)
        recurrence[name] = {**asdict(guesses), "acceptance": accepted / drafted if drafted else None}
        usage["completion_tokens_details"] = {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        }
    return usage


def timings_of(usages: Iterable[Usage]) -> dict[str, float]:
    """Milliseconds from submission of the slowest choice: waiting for a slot, until its first token, all."""
    done, names = list(usages), ("queue_s", "first_token_s", "total_s")
    queue, first, total = (1000 * max((getattr(u, name) for u in done), default=0.0) for name in names)
    return {"queue_ms": round(queue, 3), "first_token_ms": round(first, 3), "total_ms": round(total, 3)}


def token_steps(parsed: Parsed, event: Event) -> dict[str, Any]:
    """``recurrence.steps`` of a choice: core steps of each token's position, where they may differ."""
    if not parsed.budget.varies:
        return {}
    return {"recurrence": {"steps": [] if event.steps is None else [event.steps]}}


def _joined_steps(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    if "recurrence" not in pieces[-1]:
        return {}
    return {"recurrence": {"steps": [steps for piece in pieces for steps in piece["recurrence"]["steps"]]}}


class TextOffsets:
    """Where each token begins in the text of a choice (its prompt, if echoed, and its answer), in characters.

    A token that begins in the middle of a character is placed where that character begins.
    """

    def __init__(self, names: TokenNames) -> None:
        self._names, self._length = names, 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> int:
        start = self._length
        self._length += len(self._utf8.decode(self._names.raw(token)))
        return start

    def of_prompt(self, ids: Sequence[int], text: str) -> list[int]:
        """Offsets of the prompt's tokens in ``text``, where special tokens may be spelt out (and the added
        first one is not).
        """
        places = []
        for token in ids:
            spelt = self._names.special.get(token)
            if spelt is None:
                places.append(self.add(token))
                continue
            places.append(self._length)
            if text.startswith(spelt, self._length):
                self._length += len(spelt)
        beyond = max(0, self._length - len(text))  # a "dummy prefix": the model reads a space before the text
        self._length -= beyond
        return [max(0, place - beyond) for place in places]


def completion_logprobs(
    names: TokenNames, entries: Iterable[tuple[int, int, TokenLogprobs | None]]
) -> dict[str, list[Any]]:
    """The ``logprobs`` object of tokens, offsets and log-probabilities; a token without them (the first of a
    prompt) gets null.
    """
    out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, offset, logprobs in entries:
        out["tokens"].append(names.name(token))
        out["token_logprobs"].append(None if logprobs is None else finite(logprobs.logprob))
        out["top_logprobs"].append(None if logprobs is None else _top_by_text(names, token, logprobs))
        out["text_offset"].append(offset)
    return out


def _top_by_text(names: TokenNames, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
    """Text -> log-probability, the chosen token included; where two tokens read the same the likelier one
    stays.
    """
    top: dict[str, float] = {}
    for other, value in (*logprobs.top, (token, logprobs.logprob)):
        name = names.name(other)
        top[name] = max(finite(value), top.get(name, -math.inf))
    return top


def chat_logprobs(names: TokenNames, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
    """One entry of a chat choice's ``logprobs.content``."""
    entry = _chat_entry(names, token, logprobs.logprob)
    return entry | {"top_logprobs": [_chat_entry(names, other, value) for other, value in logprobs.top]}


def _chat_entry(names: TokenNames, token: int, logprob: float) -> dict[str, Any]:
    return {"token": names.name(token), "logprob": finite(logprob), "bytes": list(names.raw(token))}


def prompt_scores(names: TokenNames, parsed: Parsed, event: Event) -> dict[str, Any]:
    """``prompt_logprobs`` of a choice in vLLM's form, where wanted: null, then {id: {logprob, rank,
    decoded_token}} by token.
    """
    request = parsed.requests[event.index]
    if not parsed.reports_prompt or (event.prompt_logprobs is None and len(request.prompt) > 1):
        return {}
    pairs = zip(request.prompt[1:], event.prompt_logprobs or (), strict=True)
    return {"prompt_logprobs": [None, *(_ranked(names, token, entry) for token, entry in pairs)]}


def _ranked(names: TokenNames, token: int, entry: TokenLogprobs) -> dict[str, Any]:
    """rank is null for a prompt token that is not among the alternatives."""
    ranks = {other: rank for rank, (other, _) in enumerate(entry.top, 1)}
    values = {token: entry.logprob, **dict(entry.top)}
    return {
        str(i): {"logprob": finite(value), "rank": ranks.get(i), "decoded_token": names.name(i)}
        for i, value in values.items()
    }


def step_prediction(names: TokenNames, event: Event) -> dict[str, Any]:
    """``recurrence`` of a chunk between tokens: what choice ``index`` predicts after ``step`` steps, and how
    far its state moved.
    """
    prediction = event.step_prediction
    assert prediction is not None
    top = [{"id": i, "token": names.name(i), "logprob": finite(value)} for i, value in prediction.top]
    return {"index": event.index, "step": prediction.step, "delta": finite(prediction.delta), "top": top}


def finite(value: float) -> float:
    """JSON has no infinities."""
    return value if math.isfinite(value) else FLOOR
