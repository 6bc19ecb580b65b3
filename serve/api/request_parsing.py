"""From a validated body to engine requests: model aliases, K, prompts to ids, limits. No torch, no litestar."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rdlm.errors import UserError
from rdlm.sampling_params import SamplingParams, check_bridge, check_masked
from serve.api.chat_template import render
from serve.api.depth import DepthChoice, Terms, resolve_depth
from serve.api.schemas import ChatRequest, CompletionRequest, SamplingBody, ScoreRequest
from serve.engine.events import Served
from serve.engine.sequence import Request, Show, StepBudget
from serve.errors import invalid

DEFAULT_MAX_TOKENS = 16
"""Of a completion that names none, as OpenAI's; a chat answer may fill the context."""
MAX_CHOICES = 1024
"""Prompts times ``n`` of one HTTP request."""
MAX_STOPS, MAX_BIASES = 1024, 1024
"""Each is looked at for every token, in the thread that serves everybody."""
MIN_TEMPERATURE = 1e-4
"""Below, logits leave the range of fp32."""


@dataclass(frozen=True)
class Job:
    """The engine requests of one HTTP request, prompt-major: request i answers prompt i // n."""

    model: str
    depth: DepthChoice
    n: int
    prompts: list[str]
    """Text of each prompt, for ``echo``."""
    requests: list[Request]
    reports_prompt: bool = False
    """Whether choices carry ``prompt_logprobs``."""


def model_names(name: str, served: Served) -> list[str]:
    """The served name and the aliases worth listing: powers of two up to the largest K, the default and the largest."""
    powers = {1 << i for i in range(served.max_steps.bit_length())}
    return [
        name,
        *(
            f"{name}:k{k}"
            for k in sorted(powers | {served.default_steps, served.max_steps})
            if k <= served.max_steps
        ),
    ]


def completion_job(body: CompletionRequest, terms: Terms) -> Job:
    """Raises ApiError."""
    depth, served = resolve_depth(body, terms), terms.served
    scored = body.logprobs if body.echo else None
    if None not in (scored, body.prompt_logprobs) and scored != body.prompt_logprobs:
        raise invalid(
            "prompt_logprobs: it contradicts the logprobs that echo reports; send the same number",
            "prompt_logprobs",
        )
    scored = body.prompt_logprobs if scored is None else scored
    _check_scoring(
        body, depth, scored is not None, "echo" if body.prompt_logprobs is None else "prompt_logprobs"
    )
    prompts = _prompts(body, served)
    max_tokens = body.max_tokens
    if max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise invalid("max_tokens: 0 is only meaningful with echo or prompt_logprobs", "max_tokens")
    if (body.n or 1) * len(prompts) > MAX_CHOICES:
        raise invalid(
            f"prompt: {len(prompts)} prompts times n = {body.n or 1} exceed {MAX_CHOICES} choices", "prompt"
        )
    requests = []
    for _, ids in prompts:
        room = served.max_len - len(ids)
        limit = min(DEFAULT_MAX_TOKENS, max(room, 1)) if max_tokens is None else max_tokens
        first = _request(body, tuple(ids), depth, limit, served)
        requests += _choices(replace(first, logprobs=body.logprobs, prompt_logprobs=scored), body.n or 1)
    texts = [text for text, _ in prompts]
    return Job(
        body.model or terms.name, depth, body.n or 1, texts, requests, body.prompt_logprobs is not None
    )


def chat_job(body: ChatRequest, terms: Terms) -> Job:
    """Raises ApiError, also where the tokenizer has no chat template."""
    depth, served = resolve_depth(body, terms), terms.served
    _check_scoring(body, depth, body.prompt_logprobs is not None, "prompt_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid(
            "max_completion_tokens: it contradicts max_tokens; name one of them", "max_completion_tokens"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs: it needs logprobs = true", "top_logprobs")
    text = render(served.tokenizer, [message.plain() for message in body.messages])
    ids = served.tokenizer.encode(text)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if limit == 0:
        raise invalid("max_tokens: a chat answer has at least one token", "max_tokens")
    request = _request(
        body, tuple(ids), depth, max(1, served.max_len - len(ids)) if limit is None else limit, served
    )
    top = (body.top_logprobs or 0) if body.logprobs else None
    first = replace(request, logprobs=top, prompt_logprobs=body.prompt_logprobs)
    choices = _choices(first, body.n or 1)
    return Job(
        body.model or terms.name, depth, body.n or 1, [text], choices, body.prompt_logprobs is not None
    )


def score_job(body: ScoreRequest, terms: Terms) -> tuple[Job, list[int]]:
    """The job and its K in rising order. Raises ApiError, also where K has no likelihood (rdlm/scoring.py says which have)."""
    ks, served = sorted(set(body.num_steps)), terms.served
    if served.config.objective.masking is not None:
        raise invalid(
            "num_steps: a masked model has one likelihood, whatever K is; use completions with echo and logprobs",
            "num_steps",
        )
    depths = [resolve_depth(SamplingBody(model=body.model, num_steps=k), terms) for k in ks]
    thinking = served.config.objective.k_meaning == "thinking"
    if not thinking and ks != [1]:
        raise invalid(
            "num_steps: of this model only K = 1 has a normalised likelihood; send [1]", "num_steps"
        )
    prompts = _prompts(body, served)
    if len(prompts) > MAX_CHOICES:
        raise invalid(f"prompt: {len(prompts)} prompts exceed {MAX_CHOICES}", "prompt")
    requests = []
    for _, ids in prompts:
        first = _request(SamplingBody(seed=0), tuple(ids), depths[-1], 0, served)
        requests.append(replace(first, prompt_logprobs=0, sweep=tuple(ks) if thinking else ()))
    return Job(body.model or terms.name, depths[-1], 1, [text for text, _ in prompts], requests), ks


def _check_scoring(body: SamplingBody, depth: DepthChoice, scored: bool, param: str) -> None:
    """Raises ApiError where the prompt's log-probabilities are wanted and cannot be had."""
    if scored and (depth.lowers or (depth.exit is not None and depth.exit.prefill)):
        problem = "prompts are scored at a fixed K (a chunk of a prompt leaves as one, so later tokens would decide over earlier)"
        raise invalid(
            f"{param}: {problem}; name num_steps, or send exit.prefill = false, and no max_ms", param
        )
    if body.stream and body.prompt_logprobs is not None:
        raise invalid(
            "prompt_logprobs: streams have none; leave stream out, or use echo with logprobs",
            "prompt_logprobs",
        )


def _choices(first: Request, n: int) -> list[Request]:
    return [replace(first, choice=i) for i in range(n)]


def _prompts(body: CompletionRequest | ScoreRequest, served: Served) -> list[tuple[str, list[int]]]:
    """(text, ids) of each prompt."""
    prompt, tokenizer = body.prompt, served.tokenizer
    items: Sequence[Any] = (
        [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    )
    if not items:
        raise invalid("prompt: the list is empty; send at least one prompt", "prompt")
    found = []
    for item in items:
        if isinstance(item, str):
            start = (
                [tokenizer.bos_id]
                if tokenizer.bos_id is not None and body.add_special_tokens is not False
                else []
            )
            found.append((item, start + tokenizer.encode(item)))
        else:
            if any(i >= tokenizer.vocab_size for i in item):
                raise invalid(f"prompt: token ids must lie below {tokenizer.vocab_size}", "prompt")
            found.append((tokenizer.decode(item), list(item)))
    return found


def _request(
    body: SamplingBody, ids: tuple[int, ...], depth: DepthChoice, max_tokens: int, served: Served
) -> Request:
    if not ids and (
        served.config.objective.masking is None
        or getattr(body, "echo", False)
        or body.prompt_logprobs is not None
    ):
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
    if len(stop) > MAX_STOPS:
        raise invalid(f"stop: {len(stop)} strings exceed {MAX_STOPS}", "stop")
    if any(
        i >= served.tokenizer.vocab_size for i in body.stop_token_ids or ()
    ):  # the runner bans them until min_tokens
        raise invalid(f"stop_token_ids: ids must lie below {served.tokenizer.vocab_size}", "stop_token_ids")
    ends = frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else served.end_ids)
    sampling = _sampling(body, served)
    # A greedy answer depends on the seed only through a random initial state: without a seed it shall be the same every time.
    seed = (
        (0 if sampling.greedy else secrets.randbits(63)) if body.seed is None else body.seed & (1 << 63) - 1
    )
    budget = StepBudget(
        depth.num_steps, depth.exit, depth.schedule, depth.min_steps, depth.max_ms, depth.lowers
    )
    return Request(
        ids, budget, max_tokens, sampling, seed, stop=stop, stop_ids=ends, min_tokens=min_tokens, show=_show(body, served),
        order=body.order or "random",
    )  # fmt: skip


def _show(body: SamplingBody, served: Served) -> Show | None:
    options = body.stream_options
    if options is None:
        return None
    if not body.stream:
        raise invalid("stream_options: it needs stream = true", "stream_options")
    if options.include_steps and served.config.objective.masking is not None:
        raise invalid(
            "stream_options: include_steps is of models that draw one token after the other", "stream_options"
        )
    if options.include_steps:
        return Show(options.steps_every or 1, options.steps_top or 1)
    if options.steps_every is not None or options.steps_top is not None:
        raise invalid("stream_options: steps_every and steps_top need include_steps = true", "stream_options")
    return None


def _sampling(body: SamplingBody, served: Served) -> SamplingParams:
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    vocab = served.tokenizer.vocab_size
    if 0 < given.get("temperature", 1) < MIN_TEMPERATURE:
        raise invalid(f"temperature: it must be 0 (greedy) or at least {MIN_TEMPERATURE}", "temperature")
    if len(body.logit_bias or {}) > MAX_BIASES:
        raise invalid(f"logit_bias: {len(body.logit_bias or {})} entries exceed {MAX_BIASES}", "logit_bias")
    bias: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not key.isdecimal() or int(key) >= vocab:
            raise invalid(f"logit_bias: {key!r} is not a token id below {vocab}", "logit_bias")
        bias[int(key)] = value
    try:
        check_bridge(body.bridge or "hard", served.config)
    except UserError as error:
        raise invalid(str(error), "bridge", "bridge_unsupported") from None
    params = SamplingParams(
        **given, top_k=max(0, body.top_k or 0), logit_bias=bias, bridge=body.bridge or "hard"
    )
    check_masked(params, body.order, served.config)
    return params
