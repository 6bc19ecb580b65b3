"""OpenAI-shaped answers from engine events: plain dictionaries ready for JSON."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rdlm.data.tokenizer import Tokenizer
from serve.api.request_parsing import Job
from serve.engine.events import Event, Usage
from serve.engine.sequence import TokenLogprobs

_TIMES = ("queue_s", "first_token_s", "total_s")
FLOOR = -9999.0
"""Stands for -inf and NaN, which JSON cannot carry (vLLM's convention)."""


def envelope(kind: str, job: Job, prefix: str) -> dict[str, Any]:
    """id, object, created and model of one answer; every chunk of a stream carries the same."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": job.model,
    }


def usage_of(job: Job, usages: Iterable[Usage]) -> dict[str, Any]:
    """OpenAI's counts, a prompt once however many answers it got, and ``recurrence``: what it took, over all choices."""
    done = list(usages)
    prompt = sum(len(job.requests[i].prompt) for i in range(0, len(job.requests), job.n))
    completion = sum(u.completion_tokens for u in done)
    prefill, decode = sum(u.prefill_core_steps for u in done), sum(u.decode_core_steps for u in done)
    recurrence = {
        "num_steps": job.depth.num_steps, "core_steps": prefill + decode,
        "prefill_core_steps": prefill, "decode_core_steps": decode,
        "flops": sum(u.flops for u in done), "kv_bytes": sum(u.kv_bytes for u in done),
    } | _depth_of(job, done)  # fmt: skip
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, "recurrence": recurrence,
    }  # fmt: skip


def _depth_of(job: Job, done: list[Usage]) -> dict[str, Any]:
    """What made the depth vary, and what came of it: mean steps of a token, what exits spared, whether a deadline was met."""
    depth = job.depth
    found: dict[str, Any] = {}
    if depth.varies:
        completion = sum(u.completion_tokens for u in done)
        found["mean_steps"] = sum(u.token_steps for u in done) / completion if completion else None
    if depth.exit is not None:
        found |= {"exit": asdict(depth.exit), "exits": sum(u.exits for u in done)}
        found["saved_core_steps"] = sum(u.saved_core_steps for u in done)
    if depth.schedule:
        found["schedule"] = depth.schedule
    if depth.lowers:
        found |= {
            "max_ms": depth.max_ms,
            "min_steps": depth.min_steps,
            "lowered": sum(u.lowered for u in done),
        }
    if depth.max_ms is not None:
        found["deadline_hit"] = any(u.overdue for u in done)
    if depth.browned_out:
        found["brownout"] = True
    return found


def timings_of(usages: Iterable[Usage]) -> dict[str, float]:
    """Milliseconds from submission of the slowest choice: waiting for a slot, until its first token, all."""
    done = list(usages)
    queue, first, total = (1000 * max((getattr(u, name) for u in done), default=0.0) for name in _TIMES)
    return {"queue_ms": round(queue, 3), "first_token_ms": round(first, 3), "total_ms": round(total, 3)}


def steps_of(job: Job, event: Event) -> dict[str, Any]:
    """``recurrence.steps`` of a choice: core steps of each token's position, where they may differ."""
    return (
        {}
        if not job.depth.varies
        else {"recurrence": {"steps": [] if event.steps is None else [event.steps]}}
    )


def merge_steps(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """The ``steps_of`` several events as one."""
    if "recurrence" not in pieces[-1]:
        return {}
    return {"recurrence": {"steps": [steps for piece in pieces for steps in piece["recurrence"]["steps"]]}}


class TokenNames:
    """Readable text of single tokens; special tokens by name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._table = tokenizer.token_bytes()
        self._special = {i: text for text, i in tokenizer.special_tokens.items()}

    def name(self, token: int) -> str:
        return (
            self._special[token]
            if token in self._special
            else self.raw(token).decode("utf-8", errors="replace")
        )

    def raw(self, token: int) -> bytes:
        return self._table[token] if token < len(self._table) else b""

    def width(self, token: int) -> int:
        """Characters the token adds to a text."""
        return len(self.raw(token).decode("utf-8", errors="replace"))


class CompletionLogprobs:
    """The ``logprobs`` object of one completion choice, grown token by token. Offsets run over prompt (if echoed) and answer."""

    def __init__(self, names: TokenNames) -> None:
        self._names, self._offset = names, 0

    def add(self, tokens: Iterable[tuple[int, TokenLogprobs | None]]) -> dict[str, list[Any]]:
        """Entries of ``tokens`` in order; one without log-probabilities (the first of a prompt) gets null."""
        out: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, logprobs in tokens:
            out["tokens"].append(self._names.name(token))
            out["token_logprobs"].append(None if logprobs is None else finite(logprobs.logprob))
            out["top_logprobs"].append(None if logprobs is None else self._top(token, logprobs))
            out["text_offset"].append(self._offset)
            self._offset += self._names.width(token)
        return out

    def _top(self, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """Text -> log-probability, the chosen token included; where two tokens read the same the likelier one stays."""
        top: dict[str, float] = {}
        for other, value in (*logprobs.top, (token, logprobs.logprob)):
            name = self._names.name(other)
            top[name] = max(finite(value), top.get(name, -math.inf))
        return top


def chat_logprobs(names: TokenNames, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
    """One entry of a chat choice's ``logprobs.content``."""
    entry = _chat_entry(names, token, logprobs.logprob)
    return entry | {"top_logprobs": [_chat_entry(names, other, value) for other, value in logprobs.top]}


def _chat_entry(names: TokenNames, token: int, logprob: float) -> dict[str, Any]:
    return {"token": names.name(token), "logprob": finite(logprob), "bytes": list(names.raw(token))}


def prompt_scores(names: TokenNames, job: Job, event: Event) -> dict[str, Any]:
    """``prompt_logprobs`` of a choice in vLLM's form, where asked for: null, then {id: {logprob, rank, decoded_token}} by token."""
    request = job.requests[event.index]
    if not job.reports_prompt or event.prompt_logprobs is None and len(request.prompt) > 1:
        return {}
    scored = [
        _ranked(names, token, entry)
        for token, entry in zip(request.prompt[1:], event.prompt_logprobs or (), strict=True)
    ]
    return {"prompt_logprobs": [None, *scored]}


def _ranked(names: TokenNames, token: int, entry: TokenLogprobs) -> dict[str, Any]:
    """rank is null for a prompt token that is not among the alternatives."""
    ranks = {other: rank for rank, (other, _) in enumerate(entry.top, 1)}
    values = {token: entry.logprob, **dict(entry.top)}
    return {
        str(i): {"logprob": finite(value), "rank": ranks.get(i), "decoded_token": names.name(i)}
        for i, value in values.items()
    }


def glimpse_of(names: TokenNames, event: Event) -> dict[str, Any]:
    """``recurrence`` of a chunk between tokens: what choice ``index`` would say after ``step`` steps, and how far it moved."""
    glimpse = event.glimpse
    assert glimpse is not None
    top = [{"id": i, "token": names.name(i), "logprob": finite(value)} for i, value in glimpse.top]
    return {"index": event.index, "step": glimpse.step, "delta": finite(glimpse.delta), "top": top}


def finite(value: float) -> float:
    """JSON has no infinities."""
    return value if math.isfinite(value) else FLOOR


def completion_piece(
    job: Job, echo: bool, event: Event, logprobs: CompletionLogprobs | None, is_first: bool
) -> dict[str, Any]:
    """One event as (part of) a completion choice; the first one carries the echoed prompt."""
    request = job.requests[event.index]
    text, entries = event.text, []
    if is_first and echo:
        text = job.prompts[event.index // job.n] + text
        scored = [None, *(event.prompt_logprobs or [])]
        entries = list(zip(request.prompt, scored, strict=True)) if logprobs is not None else []
    if event.token is not None:
        entries.append((event.token, event.logprobs))
    return {
        "index": event.index, "text": text, "finish_reason": event.finish,
        "logprobs": None if logprobs is None else logprobs.add(entries),
    } | steps_of(job, event)  # fmt: skip


def merge_completion(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """Pieces of one choice, in order, as the choice."""
    merged = (
        pieces[0] | pieces[-1] | {"text": "".join(piece["text"] for piece in pieces)} | merge_steps(pieces)
    )
    if merged["logprobs"] is not None:
        merged["logprobs"] = {
            key: [x for piece in pieces for x in piece["logprobs"][key]] for key in merged["logprobs"]
        }
    return merged
