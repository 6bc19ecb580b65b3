"""From a validated body to engine requests: model aliases, K, prompts to ids, limits. No torch, no litestar."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rdlm.decoding_types import SamplingParams
from serve.chat import render
from serve.depth import resolve_depth
from serve.errors import invalid
from serve.events import Served
from serve.schemas import ChatRequest, CompletionRequest, SamplingBody, ScoreRequest
from serve.sequence import ExitRule, Request

DEFAULT_MAX_TOKENS = 16
"""Of a completion that names none, as OpenAI's; a chat answer may fill the context."""
MAX_CHOICES = 1024
"""Prompts times ``n`` of one HTTP request."""


@dataclass(frozen=True)
class Job:
    """The engine requests of one HTTP request, prompt-major: request i answers prompt i // n."""

    model: str
    num_steps: int
    exit: ExitRule | None
    n: int
    prompts: list[str]
    """Text of each prompt, for ``echo``."""
    requests: list[Request]


def model_names(name: str, served: Served) -> list[str]:
    """The served name and the aliases worth listing: powers of two up to the largest K, the default and the largest."""
    powers = {1 << i for i in range(served.max_steps.bit_length())}
    return [name, *(f"{name}:k{k}" for k in sorted(powers | {served.default_steps, served.max_steps}) if k <= served.max_steps)]


def completion_job(body: CompletionRequest, name: str, served: Served) -> Job:
    """Raises ApiError."""
    depth = resolve_depth(body, name, served)
    if depth[1] is not None and body.echo and body.logprobs is not None:
        problem = "prompts are scored at a fixed K (a chunk of a prompt leaves as one, so later tokens would decide over earlier)"
        raise invalid(f"echo: {problem}; name num_steps, or leave logprobs out", "echo")
    prompts = _prompts(body, served)
    max_tokens = body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise invalid("max_tokens: 0 is only meaningful with echo", "max_tokens")
    if (body.n or 1) * len(prompts) > MAX_CHOICES:
        raise invalid(f"prompt: {len(prompts)} prompts times n = {body.n or 1} exceed {MAX_CHOICES} choices", "prompt")
    requests = []
    for _, ids in prompts:
        room = served.max_len - len(ids)
        limit = min(DEFAULT_MAX_TOKENS, max(room, 1)) if max_tokens is None else max_tokens
        first = _request(body, tuple(ids), depth, limit, served)
        scored = replace(first, logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None)
        requests += _choices(scored, body.n or 1)
    return Job(body.model or name, *depth, body.n or 1, [text for text, _ in prompts], requests)


def chat_job(body: ChatRequest, name: str, served: Served) -> Job:
    """Raises ApiError, also where the tokenizer has no chat template."""
    depth = resolve_depth(body, name, served)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("max_completion_tokens: it contradicts max_tokens; name one of them", "max_completion_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs: it needs logprobs = true", "top_logprobs")
    text = render(served.tokenizer, [message.plain() for message in body.messages])
    ids = served.tokenizer.encode(text)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if limit == 0:
        raise invalid("max_tokens: a chat answer has at least one token", "max_tokens")
    request = _request(body, tuple(ids), depth, max(1, served.max_len - len(ids)) if limit is None else limit, served)
    first = replace(request, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    return Job(body.model or name, *depth, body.n or 1, [text], _choices(first, body.n or 1))


def score_job(body: ScoreRequest, name: str, served: Served) -> tuple[Job, list[int]]:
    """The job and its K in rising order. Raises ApiError, also where K has no likelihood (rdlm/scoring.py says which have)."""
    ks = sorted(set(body.num_steps))
    for k in ks:
        resolve_depth(SamplingBody(model=body.model, num_steps=k), name, served)
    thinking = served.config.objective.k_meaning == "thinking"
    if not thinking and ks != [1]:
        raise invalid("num_steps: of this model only K = 1 has a normalised likelihood; send [1]", "num_steps")
    prompts = _prompts(body, served)
    if len(prompts) > MAX_CHOICES:
        raise invalid(f"prompt: {len(prompts)} prompts exceed {MAX_CHOICES}", "prompt")
    requests = []
    for _, ids in prompts:
        first = _request(SamplingBody(seed=0), tuple(ids), (ks[-1], None), 0, served)
        requests.append(replace(first, prompt_logprobs=0, sweep=tuple(ks) if thinking else ()))
    return Job(body.model or name, ks[-1], None, 1, [text for text, _ in prompts], requests), ks


def _choices(first: Request, n: int) -> list[Request]:
    return [replace(first, choice=i) for i in range(n)]


def _prompts(body: CompletionRequest | ScoreRequest, served: Served) -> list[tuple[str, list[int]]]:
    """(text, ids) of each prompt."""
    prompt, tokenizer = body.prompt, served.tokenizer
    items: Sequence[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    if not items:
        raise invalid("prompt: the list is empty; send at least one prompt", "prompt")
    found = []
    for item in items:
        if isinstance(item, str):
            start = [tokenizer.bos_id] if tokenizer.bos_id is not None and body.add_special_tokens is not False else []
            found.append((item, start + tokenizer.encode(item)))
        else:
            if any(i >= tokenizer.vocab_size for i in item):
                raise invalid(f"prompt: token ids must lie below {tokenizer.vocab_size}", "prompt")
            found.append((tokenizer.decode(item), list(item)))
    return found


def _request(
    body: SamplingBody, ids: tuple[int, ...], depth: tuple[int, ExitRule | None], max_tokens: int, served: Served
) -> Request:
    if not ids:
        raise invalid("prompt: it has no tokens; send at least one", "prompt")
    if len(ids) + max_tokens > served.max_len:
        raise invalid(
            f"the prompt's {len(ids)} tokens and max_tokens = {max_tokens} exceed the context of {served.max_len}",
            "max_tokens" if len(ids) < served.max_len else "prompt", "context_length_exceeded",
        )  # fmt: skip
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid(f"min_tokens: {min_tokens} exceeds max_tokens = {max_tokens}", "min_tokens")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if "" in stop:
        raise invalid("stop: an empty string would end every text; remove it", "stop")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options: it needs stream = true", "stream_options")
    ends = set(body.stop_token_ids or ())
    if served.tokenizer.eos_id is not None and not body.ignore_eos:
        ends.add(served.tokenizer.eos_id)
    seed = secrets.randbits(63) if body.seed is None else body.seed & (1 << 63) - 1
    return Request(
        ids, depth[0], max_tokens, _sampling(body, served), seed,
        stop=stop, stop_ids=frozenset(ends), min_tokens=min_tokens, exit=depth[1],
    )  # fmt: skip


def _sampling(body: SamplingBody, served: Served) -> SamplingParams:
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    vocab = served.tokenizer.vocab_size
    bias: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not key.isdecimal() or int(key) >= vocab:
            raise invalid(f"logit_bias: {key!r} is not a token id below {vocab}", "logit_bias")
        bias[int(key)] = value
    return SamplingParams(**given, top_k=max(0, body.top_k or 0), logit_bias=bias)
