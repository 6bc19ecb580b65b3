"""Answers in OpenAI's form: the engine requests of one HTTP request, and how their events become its reply.

An answer turns each event into a part of its choice (``piece``), which a stream sends as it is, and joins the
parts of a choice for a reply in one piece (``merge``).
"""

from __future__ import annotations

import codecs
import logging
import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from serve.api.schemas import StreamOptions
from serve.api.streaming import PING, PING_SECONDS, EngineEvents, sse
from serve.api.tools import CallReader, Delta, OfferedTools
from serve.engine.detokenizer import TokenNames
from serve.engine.sequence import Event, Request, StepBudget, TokenLogprobs, Usage
from serve.errors import ApiError

logger = logging.getLogger("rdlm.serve")
WARNING_HEADER = "X-Num-Steps-Warning"
"""Says of an answer that its K exceeds what the model was trained with; ``warnings`` in the body says it too."""
FLOOR = -9999.0
"""Stands for -inf and NaN, which JSON cannot carry (vLLM's convention)."""


@dataclass(kw_only=True)
class Answer(ABC):
    """The engine requests of one HTTP request, prompt-major (request i answers prompt i // n), and what its reply
    says besides their events."""

    model: str
    names: TokenNames
    requests: list[Request]
    n: int = 1
    warnings: tuple[str, ...] = ()
    browned_out: bool = False
    """Whether K is below the server's default because too many wait."""

    @property
    def budget(self) -> StepBudget:
        """All requests have one; of several K of a score it is the largest."""
        return self.requests[0].budget

    @property
    def headers(self) -> dict[str, str]:
        return {WARNING_HEADER: "; ".join(self.warnings)} if self.warnings else {}

    @abstractmethod
    async def collect(self, events: EngineEvents) -> dict[str, Any]:
        """The reply in one piece."""

    def stream(self, events: EngineEvents) -> AsyncIterator[bytes]:
        """Server-sent events, where the route has them. The status line is out already, so an error becomes the last
        one."""
        raise NotImplementedError


@dataclass(kw_only=True)
class ChoicesAnswer(Answer):
    """An answer of choices, one for each request. Streamed, it is a chunk a token, the finish reason with the last
    token's; then, if wanted, one with the usage. Between tokens, if wanted, chunks without choices with the
    predictions of each core step.

    What all chunks share is encoded once. What has come together is sent in one piece.
    """

    stream_options: StreamOptions | None = None
    reports_prompt: bool = False
    """Whether choices carry ``prompt_logprobs``."""
    reports_ids: bool = False
    """Whether choices carry ``token_ids``."""

    def __post_init__(self) -> None:
        self._started: set[int] = set()
        self._ended: list[Usage] = []
        self._completion_tokens = 0

    @abstractmethod
    def head(self, stream: bool) -> dict[str, Any]:
        """id, object, created and model; every chunk of a stream carries the same."""

    @abstractmethod
    def piece(self, event: Event) -> dict[str, Any]:
        """One event as (part of) a choice."""

    @abstractmethod
    def merge(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        """All parts of one choice, in order, as the choice."""

    async def collect(self, events: EngineEvents) -> dict[str, Any]:
        """All choices in order, and the usage."""
        pieces: list[list[dict[str, Any]]] = [[] for _ in self.requests]
        async for batch in events.batches():
            for event in batch:
                if event.step_prediction is not None:
                    continue
                pieces[event.index].append(self.piece(event))
                if event.usage is not None:
                    self._ended.append(event.usage)
        return {
            **self.head(stream=False),
            "choices": [self.merge(parts) for parts in pieces],
            "usage": usage_of(self, self._ended),
            "timings": timings_of(self._ended),
            **warnings_of(self),
        }

    async def stream(self, events: EngineEvents) -> AsyncIterator[bytes]:
        head = b"data: " + msgspec.json.encode(self.head(stream=True))[:-1] + b',"choices":['
        try:
            async for batch in events.batches(PING_SECONDS):
                yield b"".join([self._chunk(head, event) for event in batch]) or PING
            if self.stream_options is not None and self.stream_options.include_usage:
                more = {"usage": usage_of(self, self._ended), "timings": timings_of(self._ended)}
                yield _chunk_of(head, b"", {**more, **warnings_of(self)})
        except ApiError as error:
            logger.warning("stream ended with an error: %s", error.message)
            yield sse(error.body())
        yield b"data: [DONE]\n\n"

    def _chunk(self, head: bytes, event: Event) -> bytes:
        if event.step_prediction is not None:
            return _chunk_of(head, b"", {"recurrence": step_prediction(self.names, event)})
        options, more = self.stream_options, dict[str, Any]()
        self._completion_tokens += event.token is not None
        if event.usage is not None:
            self._ended.append(event.usage)
        has_ended = len(self._ended) == len(self.requests)
        if options is not None and options.continuous_usage_stats:
            usage = {**usage_of(self, self._ended), "completion_tokens": self._completion_tokens}
            usage["total_tokens"] = usage["prompt_tokens"] + self._completion_tokens
            if not has_ended:  # the work of a choice is known at its end
                del usage["recurrence"]
            more["usage"] = usage
        if has_ended and not (options is not None and options.include_usage):
            more |= warnings_of(self)
        return _chunk_of(head, msgspec.json.encode(self.piece(event)), more)


def _chunk_of(head: bytes, choice: bytes, more: dict[str, Any]) -> bytes:
    """A chunk with this choice or none, and further fields."""
    rest = b"," + msgspec.json.encode(more)[1:] if more else b"}"
    return head + choice + b"]" + rest + b"\n\n"


@dataclass(kw_only=True)
class CompletionAnswer(ChoicesAnswer):
    """The answer of /v1/completions."""

    echoed: list[str] | None = None
    """Text of each prompt, where choices begin with it."""
    reports_logprobs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._head = envelope("text_completion", self.model, "cmpl")
        self._offsets = [TextOffsets(self.names) if self.reports_logprobs else None for _ in self.requests]

    def head(self, stream: bool) -> dict[str, Any]:
        return self._head

    def piece(self, event: Event) -> dict[str, Any]:
        """The first part of a choice carries the echoed prompt."""
        request = self.requests[event.index]
        is_first = event.index not in self._started
        self._started.add(event.index)
        text, offsets = event.text, self._offsets[event.index]
        entries: list[tuple[int, int, TokenLogprobs | None]] = []
        if is_first and self.echoed is not None:
            prompt = self.echoed[event.index // self.n]
            text = prompt + text
            if offsets is not None:
                scored = [None, *(event.prompt_logprobs or [])]
                places = offsets.of_prompt(request.prompt, prompt)
                entries += zip(request.prompt, places, scored, strict=True)
        if event.token is not None and offsets is not None:
            entries.append((event.token, offsets.add(event.token), event.logprobs))
        choice: dict[str, Any] = {"index": event.index, "text": text, "finish_reason": event.finish}
        choice["logprobs"] = None if offsets is None else completion_logprobs(self.names, entries)
        choice |= token_steps(self, event)
        if is_first:
            choice |= prompt_scores(self, event)
        if self.reports_ids:
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
        if self.reports_ids:
            merged["prompt_token_ids"] = pieces[0]["prompt_token_ids"]
            merged["token_ids"] = [i for piece in pieces for i in piece["token_ids"]]
        return merged


@dataclass(kw_only=True)
class ChatAnswer(ChoicesAnswer):
    """The answer of /v1/chat/completions. The role comes with the first token: clients time the first chunk
    as the first token.
    """

    tools: OfferedTools | None = None
    """How answers call the tools that were offered."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._head = envelope("chat.completion", self.model, "chatcmpl")
        if self.reports_ids:
            self._head["prompt_token_ids"] = list(self.requests[0].prompt)
        self._readers = [] if self.tools is None else [self.tools.reader() for _ in self.requests]

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
        choice |= token_steps(self, event)
        if is_first:
            choice |= prompt_scores(self, event)
        if self.reports_ids:
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
        if self.reports_ids:
            choice["token_ids"] = [i for piece in pieces for i in piece["token_ids"]]
        return choice | _joined_steps(pieces)


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


@dataclass(kw_only=True)
class ScoreAnswer(Answer):
    """The answer of /v1/score."""

    ks: list[int]
    """Values of K in rising order."""
    estimator: str

    async def collect(self, events: EngineEvents) -> dict[str, Any]:
        """Scores of the prompts in their order, from the last event of each."""
        last = [event async for batch in events.batches() for event in batch if event.finish is not None]
        scores, swept = [], [dict[int, list[TokenLogprobs]]() for _ in self.requests[:: self.n]]
        for event in last:
            swept[event.index // self.n] |= event.sweep or {self.ks[0]: event.prompt_logprobs or []}
        for index, found in enumerate(swept):
            prompt = self.requests[index * self.n].prompt
            values = {str(k): [finite(entry.logprob) for entry in found[k]] for k in self.ks}
            scores.append(
                {
                    "index": index,
                    "tokens": [self.names.name(i) for i in prompt],
                    "token_ids": prompt,
                    "token_logprobs": {k: [None, *logprobs] for k, logprobs in values.items()},
                    "logprob": {k: sum(logprobs) for k, logprobs in values.items()},
                }
            )
        body = {"num_steps": self.ks, "estimator": self.estimator, "scores": scores}
        usage = usage_of(self, [event.usage for event in last if event.usage])
        return envelope("score", self.model, "score") | body | {"usage": usage, **warnings_of(self)}


def warnings_of(answer: Answer) -> dict[str, Any]:
    """The field ``warnings``, where there are any."""
    return {"warnings": list(answer.warnings)} if answer.warnings else {}


def envelope(kind: str, model: str, prefix: str) -> dict[str, Any]:
    """id, object, created and model of one answer."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage_of(answer: Answer, usages: Iterable[Usage]) -> dict[str, Any]:
    """OpenAI's counts, a prompt once however many answers it got, and ``recurrence``: the work done, over all
    choices.
    """
    done, budget = list(usages), answer.budget
    prompt = sum(len(answer.requests[i].prompt) for i in range(0, len(answer.requests), answer.n))
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
    if budget.step_sizes:
        recurrence["step_sizes"] = budget.step_sizes
    if budget.lowers:
        recurrence |= {"max_ms": budget.max_ms, "min_steps": budget.min_steps}
        recurrence["lowered"] = sum(u.lowered for u in done)
    if budget.max_ms is not None:
        recurrence["deadline_hit"] = any(u.overdue for u in done)
    if answer.browned_out:
        recurrence["brownout"] = True
    # Further answers to a prompt find what the first one has computed; that is not counted.
    cached = sorted(u.cached_tokens for u in done)[: len(done) // answer.n]
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


def token_steps(answer: Answer, event: Event) -> dict[str, Any]:
    """``recurrence.steps`` of a choice: core steps of each token's position, where they may differ."""
    if not answer.budget.varies:
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


def prompt_scores(answer: ChoicesAnswer, event: Event) -> dict[str, Any]:
    """``prompt_logprobs`` of a choice in vLLM's form, where wanted: null, then {id: {logprob, rank,
    decoded_token}} by token.
    """
    names, request = answer.names, answer.requests[event.index]
    if not answer.reports_prompt or (event.prompt_logprobs is None and len(request.prompt) > 1):
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
