"""From bytes and headers to engine requests: JSON, model aliases, K, prompts to ids, server. No torch.

K comes from one of model alias, header, ``num_steps``, ``reasoning_effort``, ``step_sizes``, ``schedule`` or ``exit``
and is resolved here into one ``StepBudget``, which every engine request carries.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar, cast
from urllib.parse import parse_qsl

from litestar import Request as HttpRequest

from rdlm.errors import UserError
from rdlm.exit_criteria import CRITERIA, ExitRule
from rdlm.sampling_params import SamplingParams, check_masked, check_sampler, text_sampler
from serve.api.chat_template import ChatTemplate
from serve.api.constraints import Constraint, tool_choice
from serve.api.json_text import decode
from serve.api.openai_format import ChatAnswer, CompletionAnswer, ScoreAnswer
from serve.api.schemas import (
    MAX_CHOICES,
    Body,
    ChatRequest,
    CompletionRequest,
    SamplingBody,
    ScoreRequest,
)
from serve.api.state import ServerState
from serve.api.tools import OfferedTools, Tool, ToolChoice, tool_grammar
from serve.engine.exits import check_exit_gate, default_thresholds
from serve.engine.grammar import Grammar
from serve.engine.sequence import Request, Speculation, StepBudget, StepPredictions, Wavefront
from serve.errors import ApiError, invalid, shorten

P = ParamSpec("P")
T = TypeVar("T")
STEPS_HEADER = "X-Num-Steps"
"""K for clients that can send a header and no field (lm-eval's log-likelihoods)."""
DEFAULT_MAX_TOKENS = 16
"""max_tokens of a completion that names none, as OpenAI's; a chat answer may fill the context."""
DRAFT_TOKENS = 4
"""draft_tokens of a ``speculation`` that names none."""
MIN_TEMPERATURE = 1e-4
"""Below, logits leave the range of fp32."""
MAX_VALUES = (1 << 20) + (1 << 16)
"""Commas of a body, which bound its values: reading JSON holds up every other thread."""
SMALL = 4096
"""Characters that are parsed on the event loop; longer requests are parsed in a thread."""


class JsonRequest(HttpRequest[Any, Any, Any]):
    """Litestar's request, except for bodies: they must be called JSON and be JSON in UTF-8 that fits the
    route's schema.

    Litestar's own validation lists every wrong item, and parses the URL, which a Host header can make fail.
    """

    async def json(self) -> Body:
        """The body as the type of the route's argument ``data``. Raises ApiError 415 or 400."""
        schema: type[Body] = self.route_handler.parsed_fn_signature.parameters["data"].annotation
        query = self.scope["query_string"].decode("latin-1")
        for name, _ in parse_qsl(query, keep_blank_values=True):
            if name in schema.model_fields:
                raise invalid(
                    f"{name}: it is a parameter of the URL, where it has no effect; send it in the body", name
                )
        given = self.headers.get("content-type", "")
        kind, _, options = given.partition(";")
        charsets = re.findall(r"charset\s*=\s*\"?([^\s;\"]*)", options, re.IGNORECASE)
        if kind.strip().lower() != "application/json" or not {c.lower() for c in charsets} <= {
            "utf-8",
            "utf8",
        }:
            # A web page can send other types to any server without being asked for permission first (CORS).
            problem = f"the content type is {shorten(given)!r}" if given else "there is no content type"
            raise ApiError(
                415,
                f"{problem}; send JSON in UTF-8 as 'Content-Type: application/json'",
                "invalid_request_error",
            )
        coding = self.headers.get("content-encoding", "identity")
        if coding.strip().lower() != "identity":
            problem = f"the body is encoded as {shorten(coding)!r}; send it as it is"
            raise ApiError(415, problem, "invalid_request_error", "content-encoding")
        body = await self.body()
        if body.count(b",") > MAX_VALUES:
            raise invalid(f"the body's values exceed the {MAX_VALUES} of a request")
        try:
            return await in_thread_if_large(len(body) // 16, lambda: schema.parse(decode(body)))
        except RecursionError:
            raise invalid("the body is nested too deeply") from None


async def in_thread_if_large(size: int, parse: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``parse(...)``, off the event loop where ``size`` characters make it slow."""
    return parse(*args, **kwargs) if size <= SMALL else await asyncio.to_thread(parse, *args, **kwargs)


def steps_in_header(request: HttpRequest[Any, Any, Any]) -> int | None:
    """K of a request's X-Num-Steps headers, which a proxy may have joined with commas. Raises ApiError."""
    values = [part for value in request.headers.getall(STEPS_HEADER, []) for part in value.split(",")]
    for value in values:
        if not re.fullmatch("[0-9]{1,9}", value.strip(" ")) or int(value) < 1:
            message = f"{STEPS_HEADER}: {shorten(value)!r} is not an integer of at least 1"
            raise invalid(message, STEPS_HEADER.lower())
    found = {int(value) for value in values}
    if len(found) > 1:
        raise invalid(
            f"{STEPS_HEADER}: {len(values)} headers contradict each other; send one", STEPS_HEADER.lower()
        )
    return next(iter(found), None)


def parse_completion(
    body: CompletionRequest, server: ServerState, header_steps: int | None = None
) -> CompletionAnswer:
    """header_steps: K as the header X-Num-Steps has it, here and below. Raises ApiError."""
    served, n, reports_prompt = server.served, body.n or 1, body.prompt_logprobs is not None
    _check_constraint(body.constraint, server)
    prompts = cast(list[str | list[int]], body.prompt)
    budget, browned_out = step_budget(body, server, header_steps)
    scored = body.logprobs if body.echo else None
    if None not in (scored, body.prompt_logprobs) and scored != body.prompt_logprobs:
        problem = "it contradicts the logprobs that echo reports; send the same number"
        raise invalid(f"prompt_logprobs: {problem}", "prompt_logprobs")
    scored = body.prompt_logprobs if scored is None else scored
    _check_scoring(body, budget, scored is not None, "prompt_logprobs" if reports_prompt else "echo")
    if body.max_tokens == 0 and not body.echo and not reports_prompt:
        raise invalid("max_tokens: 0 is only meaningful with echo or prompt_logprobs", "max_tokens")
    _check_number(len(prompts), n, server)
    requests: list[Request] = []
    for prompt in prompts:
        ids = _ids(prompt, body.add_special_tokens is not False, server)
        room = served.max_len - len(ids)
        max_tokens = min(DEFAULT_MAX_TOKENS, max(room, 1)) if body.max_tokens is None else body.max_tokens
        may_be_empty = not (server.left_to_right or body.echo or reports_prompt)
        first = _request(body, ids, budget, max_tokens, server, may_be_empty)
        grammar = _grammar(body.constraint, server)
        requests += _choices(first, n, grammar=grammar, logprobs=body.logprobs, prompt_logprobs=scored)
    echoed = [p if isinstance(p, str) else served.tokenizer.decode(p) for p in prompts] if body.echo else None
    shared = _shared(body, requests, browned_out, server)
    return CompletionAnswer(**shared, echoed=echoed, reports_logprobs=body.logprobs is not None)


def parse_chat(
    body: ChatRequest,
    server: ServerState,
    header_steps: int | None = None,
    seconds: float | None = None,
    make: Callable[..., ChatAnswer] = ChatAnswer,
) -> ChatAnswer:
    """Raises ApiError, also where the model has no chat template, and TooSlow where that takes longer than
    ``seconds``. make: the class of the answer.
    """
    template = server.chat_template
    served, n, reports_prompt = server.served, body.n or 1, body.prompt_logprobs is not None
    budget, browned_out = step_budget(body, server, header_steps)
    _check_scoring(body, budget, reports_prompt, "prompt_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        problem = "it contradicts max_tokens; name one of them"
        raise invalid(f"max_completion_tokens: {problem}", "max_completion_tokens")
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs: it needs logprobs = true", "top_logprobs")
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = getattr(body, field)
    if max_tokens == 0:
        raise invalid(f"{field}: a chat answer has at least one token", field)
    _check_number(1, n, server)
    _check_constraint(body.constraint, server)
    tools = cast(tuple[Tool, ...], body.tools or ())
    given = body.tool_choice
    choice = given if isinstance(given, ToolChoice) else tool_choice(given, tools)
    if template is None:
        problem = "this model has no chat template, so it cannot take messages"
        remedy = "use /v1/completions, or add chat_template to the checkpoint's tokenizer_config.json"
        raise invalid(f"{problem}; {remedy}", "messages", "no_chat_template")
    messages = [message.plain() for message in body.messages]
    _check_size(sum(len(message["content"]) for message in messages), server, "messages")
    offered = _offered_tools(messages, choice, tools, body.constraint, template, server)
    shown = () if choice.mode == "none" else tools
    text = template.render(messages, body.chat_template_kwargs or {}, shown, seconds)
    _check_size(len(text), server, "messages")
    ids = tuple(served.tokenizer.encode(text))
    if max_tokens is None:
        max_tokens = max(1, served.max_len - len(ids))
    first = _request(body, ids, budget, max_tokens, server, may_be_empty=False, max_field=field)
    if offered is None:
        grammar = _grammar(body.constraint, server)
    else:
        special = served.tokenizer.special_tokens
        parallel = body.parallel_tool_calls is not False
        rule = None if body.constraint is None else body.constraint.rule
        source, lines = tool_grammar(offered.form, tools, choice, parallel, special, rule)
        fields = {line: tools[i].field for line, i in lines.items()}
        fields |= {line: cast(Constraint, body.constraint).param for line in (3,) if rule}
        grammar = _grammar(Constraint("tools", source), server, fields)
        first = replace(first, spelt=offered.form.spelt(special))
    top = (body.top_logprobs or 0) if body.logprobs else None
    requests = _choices(first, n, grammar=grammar, logprobs=top, prompt_logprobs=body.prompt_logprobs)
    return make(**_shared(body, requests, browned_out, server), tools=offered)


def _shared(
    body: SamplingBody, requests: list[Request], browned_out: bool, server: ServerState
) -> dict[str, Any]:
    """What answers of completions and of chat have in common."""
    return {
        "model": body.model or server.name,
        "names": server.token_names,
        "requests": requests,
        "n": body.n or 1,
        "warnings": server.warnings(requests[0].budget),
        "browned_out": browned_out,
        "stream_options": body.stream_options,
        "reports_prompt": body.prompt_logprobs is not None,
        "reports_ids": bool(body.return_token_ids),
    }


def _check_constraint(constraint: Constraint | None, server: ServerState) -> None:
    """Raises ApiError where the model's answers cannot be constrained."""
    if constraint is not None and not server.left_to_right:
        field = constraint.param.partition(".")[0]
        problem = (
            "this model fills in all of an answer together, and only answers that grow can be constrained"
        )
        raise invalid(f"{field}: {problem}; leave {field} out", field, "unsupported_value")


def _grammar(
    constraint: Constraint | None, server: ServerState, lines: dict[int, str] | None = None
) -> Grammar | None:
    """Raises ApiError for what the grammar library refuses."""
    if constraint is None:
        return None
    try:
        return server.grammars.compile(constraint.source, constraint.param, lines)
    except UserError as error:
        raise invalid(f"{error.field}: {error.problem}; {error.remedy}", error.field) from None


def _offered_tools(
    messages: list[dict[str, Any]],
    choice: ToolChoice,
    tools: tuple[Tool, ...],
    constraint: Constraint | None,
    template: ChatTemplate,
    server: ServerState,
) -> OfferedTools | None:
    """How the answer may call tools, None where it may not. Raises ApiError where the model does not know how."""
    if any("tool_calls" in message for message in messages) and not template.knows_tools:
        problem = "this model's chat template knows no tools; leave calls out"
        raise invalid(f"messages.tool_calls: {problem}", "messages.tool_calls", "tools_unsupported")
    if choice.mode == "none":
        return None
    form = template.tool_format
    if not server.left_to_right:
        problem = "this model fills in all of an answer together, which cannot be constrained to calls"
    elif not template.knows_tools:
        problem = "this model's chat template knows no tools"
    elif form is None:
        problem = "this model calls tools in a form that this server does not know"
    elif constraint is not None and choice.mode == "auto" and (constraint.rule is None or form.first):
        problem = f"this model's calls cannot be told from answers that {constraint.param} describes"
    else:
        if form.tag not in server.served.tokenizer.special_tokens:
            form = replace(form, tag="")
        return OfferedTools(form, tools, choice.mode == "required" or constraint is not None)
    raise invalid(
        f"tools: {problem}; leave tools out, or send tool_choice none", "tools", "tools_unsupported"
    )


def parse_score(body: ScoreRequest, server: ServerState, header_steps: int | None = None) -> ScoreAnswer:
    """Raises ApiError, also where K has no likelihood (the objective's ``estimator`` says which have)."""
    ks, prompts = sorted(set(body.num_steps)), cast(list[str | list[int]], body.prompt)
    if not server.left_to_right:
        problem = "a masked model has one likelihood, whatever K is; use completions with echo and logprobs"
        raise invalid(f"num_steps: {problem}", "num_steps")
    budgets = [step_budget(SamplingBody(model=body.model, num_steps=k), server, header_steps)[0] for k in ks]
    if not server.supports_exits and ks != [1]:
        raise invalid(
            "num_steps: of this model only K = 1 has a normalised likelihood; send [1]", "num_steps"
        )
    # One run reads every K, where its first steps are those of a smaller one.
    runs = [(k,) for k in reversed(ks)] if server.depends_on_num_steps else [tuple(ks)]
    _check_number(len(prompts), len(runs), server)
    requests = []
    for prompt in prompts:
        ids = _ids(prompt, body.add_special_tokens is not False, server)
        for run in runs:
            budget = budgets[ks.index(run[-1])]
            one = _request(SamplingBody(seed=0), ids, budget, 0, server, may_be_empty=False)
            requests.append(replace(one, prompt_logprobs=0, sweep=run if server.supports_exits else ()))
    return ScoreAnswer(
        model=body.model or server.name,
        names=server.token_names,
        requests=requests,
        n=len(runs),
        warnings=server.warnings(budgets[-1]),
        ks=ks,
        estimator=server.served.config.objective.estimator,
    )


# K ----------------------------------------------------------------------------------------------------------


def step_budget(body: SamplingBody, server: ServerState, header_steps: int | None) -> tuple[StepBudget, bool]:
    """What a request takes of core steps, and whether a brown-out lowered it. Raises ApiError."""
    named = _named_steps(body, server, header_steps)
    exits = body.exit is not None or body.num_steps == "auto"
    _check_left_to_right(body, server)
    if body.schedule is not None and (named is not None or body.num_steps == "auto"):
        problem = "it names every K itself; leave num_steps, step_sizes, reasoning_effort and the alias out"
        raise invalid(f"schedule: {problem}", "schedule")
    for param in ("min_steps", "max_steps"):
        if getattr(body, param) is not None and not exits and (param == "max_steps" or body.max_ms is None):
            needs = "exit or num_steps 'auto'" + (" or max_ms" if param == "min_steps" else "")
            raise invalid(f"{param}: it bounds a number of steps that varies; send it with {needs}", param)
    schedule = tuple(cast(list[int], body.schedule)) if body.schedule is not None else ()
    for k in schedule:
        server.check_range(k, "schedule")
    most = named or max(schedule, default=server.default_steps)
    rule = None
    if exits:
        most, rule = _exit_rule(body, max(schedule) if schedule else named, server)
    if body.step_sizes is not None and body.max_ms is not None:
        raise invalid("max_ms: it lowers K, and step_sizes names every step; leave one of them out", "max_ms")
    least = body.min_steps or 1
    if least > most:
        raise invalid(f"min_steps: {least} exceeds the most steps ({most})", "min_steps")
    max_ms = min((ms for ms in (body.max_ms, server.max_ms) if ms is not None), default=None)
    browned_out = most < server.served.default_steps and not (named or exits or schedule)
    speculation = None
    if body.speculation is not None:
        wanted = body.speculation
        speculation = Speculation(
            wanted.draft_steps or max(1, most // 4), wanted.draft_tokens or DRAFT_TOKENS
        )
    wave = body.wavefront
    wavefront = None if wave is None else Wavefront.of(**wave.model_dump())
    sizes = tuple(body.step_sizes or ())
    lowers = body.max_ms is not None
    return StepBudget(most, rule, schedule, least, max_ms, lowers, speculation, wavefront, sizes), browned_out


def _check_left_to_right(body: SamplingBody, server: ServerState) -> None:
    """Raises ApiError for what varies the steps of single tokens, where all of an answer takes part in every
    step.
    """
    if server.left_to_right:
        return
    for param in ("exit", "num_steps", "step_sizes", "schedule", "max_ms", "speculation", "wavefront"):
        value = getattr(body, param)
        if value == "auto" or (value is not None and param != "num_steps"):
            code = "exits_unsupported" if param in ("exit", "num_steps") else None
            problem = "this model fills in all of an answer in K steps; name a number of steps"
            raise invalid(f"{param}: {problem}", param, code)


def _named_steps(body: SamplingBody, server: ServerState, header_steps: int | None) -> int | None:
    """The number of steps in model alias, header, num_steps, step_sizes or reasoning_effort; None where none of
    them has one.
    """
    found = {
        "model": server.model_steps(body.model),
        STEPS_HEADER: header_steps,
        "reasoning_effort": None if body.reasoning_effort is None else server.efforts[body.reasoning_effort],
        "num_steps": body.num_steps if isinstance(body.num_steps, int) else None,
        "step_sizes": None if body.step_sizes is None else len(body.step_sizes),
    }
    named = {param: server.check_range(steps, param) for param, steps in found.items() if steps is not None}
    if len(set(named.values())) > 1:
        values = " and ".join(f"{param} = {steps}" for param, steps in named.items())
        raise invalid(f"{values} contradict each other; name one of them", [*named][-1])
    return next(iter(named.values()), None)


def _exit_rule(body: SamplingBody, named: int | None, server: ServerState) -> tuple[int, ExitRule | None]:
    """(most steps, rule); no rule for criterion "none". named: the most steps as other fields have it."""
    if not server.supports_exits:
        problem = (
            "this model draws each token through K noise levels and needs them all; name a number of steps"
        )
        raise invalid(f"exit: {problem}", "num_steps" if body.exit is None else "exit", "exits_unsupported")
    bounds = {}
    for name in ("min_steps", "max_steps"):
        inside, outside = getattr(body.exit, name, None), getattr(body, name)
        if None not in (inside, outside) and inside != outside:
            problem = f"{inside} contradicts {name} = {outside}; name one of them"
            raise invalid(f"exit.{name}: {problem}", f"exit.{name}")
        bounds[name] = (f"exit.{name}", inside) if inside is not None else (name, outside)
    (least_param, least), (most_param, most) = bounds["min_steps"], bounds["max_steps"]
    if most is not None and server.check_range(most, most_param) != (named or most):
        raise invalid(f"{most_param}: {most} contradicts K = {named}; name one of them", most_param)
    most = most or named or server.most_unnamed
    if (least or 1) > most:
        raise invalid(f"{least_param}: {least} exceeds the most steps ({most})", least_param)
    criterion = next(iter(CRITERIA)) if body.exit is None else body.exit.criterion
    if criterion == "none":
        return most, None
    if criterion not in CRITERIA:
        choices = ", ".join([*CRITERIA, "none"])
        raise invalid(f"exit.criterion: there is no {criterion!r}; use one of {choices}", "exit.criterion")
    try:
        check_exit_gate(criterion, server.served.config)
    except UserError as error:
        problem = f"{error.field}: {error.problem}; {error.remedy}"
        raise invalid(problem, error.field, "exits_unsupported") from None
    if body.exit is not None and not CRITERIA[criterion].exits:
        for name in ("threshold", "min_steps", "check_every"):
            if getattr(body.exit, name) is not None:
                problem = (
                    f"with criterion {criterion!r} no position exits, so it would mean nothing; leave it out"
                )
                raise invalid(f"exit.{name}: {problem}", f"exit.{name}")
    threshold = default_thresholds(server.served.config)[criterion]
    if body.exit is None:
        return most, ExitRule(criterion, threshold, least or 1)
    if body.exit.threshold is not None:
        threshold = body.exit.threshold
    return most, ExitRule(
        criterion, threshold, least or 1, body.exit.check_every or 1, body.exit.prefill is not False
    )


# Prompts ----------------------------------------------------------------------------------------------------


def _check_number(prompts: int, n: int, server: ServerState) -> None:
    """Raises ApiError where so many choices could not be held even by an idle server."""
    most = min(MAX_CHOICES, server.capacity)
    if prompts * n > most:
        param = "prompt" if prompts > 1 else "n"
        raise invalid(
            f"{param}: {prompts} prompts times n = {n} exceed the {most} choices of a request", param
        )


def _check_size(size: int, server: ServerState, param: str) -> None:
    """Raises ApiError where ``size`` characters cannot fit the context, before anybody looks at them."""
    if size > server.token_names.longest * server.served.max_len:
        problem = f"the {size} characters are more than {size // server.token_names.longest} tokens"
        raise invalid(
            f"{param}: {problem} and exceed the context of {server.served.max_len}",
            param,
            "context_length_exceeded",
        )


def _ids(prompt: str | list[int], add_special_tokens: bool, server: ServerState) -> tuple[int, ...]:
    tokenizer = server.served.tokenizer
    if isinstance(prompt, str):
        _check_size(len(prompt), server, "prompt")
        start = tokenizer.start if add_special_tokens else ()
        return (*start, *tokenizer.encode(prompt))
    if any(i >= tokenizer.vocab_size for i in prompt):
        raise invalid(f"prompt: token ids must lie below {tokenizer.vocab_size}", "prompt")
    return tuple(prompt)


def _check_scoring(body: SamplingBody, budget: StepBudget, scored: bool, param: str) -> None:
    """Raises ApiError where the prompt's log-probabilities are wanted and cannot be had."""
    if scored and (budget.lowers or (budget.exit is not None and budget.exit.prefill)):
        reason = "a chunk of a prompt exits as one, so later tokens would decide over earlier ones"
        problem = f"prompts are scored at a fixed K ({reason})"
        remedy = "name num_steps, or send exit.prefill = false, and no max_ms"
        raise invalid(f"{param}: {problem}; {remedy}", param)
    if body.stream and body.prompt_logprobs is not None:
        problem = "streams have none; leave stream out, or use echo with logprobs"
        raise invalid(f"prompt_logprobs: {problem}", "prompt_logprobs")


def _choices(first: Request, n: int, **fields: Any) -> list[Request]:
    return [replace(first, choice=i, **fields) for i in range(n)]


def _request(
    body: SamplingBody,
    ids: tuple[int, ...],
    budget: StepBudget,
    max_tokens: int,
    server: ServerState,
    may_be_empty: bool,
    max_field: str = "max_tokens",
) -> Request:
    served = server.served
    vocab = served.tokenizer.vocab_size
    if not ids and not may_be_empty:
        raise invalid("prompt: it has no tokens; send at least one", "prompt")
    if len(ids) + max_tokens > served.max_len:
        sizes = f"the prompt's {len(ids)} tokens and {max_field} = {max_tokens}"
        param = max_field if len(ids) < served.max_len else body.prompt_field
        remedy = f"shorten the prompt, or lower {max_field}"
        message = f"{sizes} exceed the context of {served.max_len}; {remedy}"
        raise invalid(message, param, "context_length_exceeded")
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid(f"min_tokens: {min_tokens} exceeds {max_field} = {max_tokens}", "min_tokens")
    if any(i >= vocab for i in body.stop_token_ids or ()):
        raise invalid(f"stop_token_ids: ids must lie below {vocab}", "stop_token_ids")
    ends = frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else served.end_ids)
    if min_tokens and len(ends) >= vocab:
        raise invalid(
            "stop_token_ids: every id ends the text, so none is left for min_tokens", "stop_token_ids"
        )
    sampling = _sampling(body, server)
    # A greedy answer depends on the seed only through a random initial state: without a seed it shall be the
    # same every time.
    default_seed = 0 if sampling.greedy else secrets.randbits(63)
    return Request(
        ids,
        budget,
        max_tokens,
        sampling,
        default_seed if body.seed is None else body.seed & (1 << 63) - 1,
        stop=cast(tuple[str, ...], body.stop or ()),
        stop_ids=ends,
        min_tokens=min_tokens,
        step_predictions=_step_predictions(body, server),
        order=body.order or "random",
    )


def _step_predictions(body: SamplingBody, server: ServerState) -> StepPredictions | None:
    options = body.stream_options
    if options is None:
        return None
    if not body.stream:
        raise invalid("stream_options: it needs stream = true", "stream_options")
    if not options.include_steps:
        if options.steps_every is not None or options.steps_top is not None:
            raise invalid(
                "stream_options: steps_every and steps_top need include_steps = true", "stream_options"
            )
        return None
    if not server.left_to_right:
        problem = "include_steps needs a model that draws one token after the other"
        raise invalid(f"stream_options: {problem}", "stream_options")
    return StepPredictions(options.steps_every or 1, options.steps_top or 1)


def _sampling(body: SamplingBody, server: ServerState) -> SamplingParams:
    served = server.served
    vocab = served.tokenizer.vocab_size
    given = {**served.sampling_defaults, **body.numbers}
    if 0 < given.get("temperature", 1) < MIN_TEMPERATURE:
        raise invalid(f"temperature: it must be 0 (greedy) or at least {MIN_TEMPERATURE}", "temperature")
    bias = cast(dict[int, float], body.logit_bias or {})
    for token in bias:
        if token >= vocab:
            raise invalid(f"logit_bias: {token} is not a token id below {vocab}", "logit_bias")
    sampler = _sampler(body, server)
    params = SamplingParams(**given, logit_bias=bias, sampler=sampler)
    check_masked(params, body.order, served.config)
    return params


def _sampler(body: SamplingBody, server: ServerState) -> str:
    given = {param: name for param in ("sampler", "bridge") if (name := getattr(body, param)) is not None}
    try:
        names = {param: text_sampler(name, param) for param, name in given.items()}
        if len(set(names.values())) > 1:
            raise invalid(
                "bridge: it is the older name of sampler and contradicts it; leave it out", "bridge"
            )
        param, name = next(iter(names.items()), ("sampler", "renoise"))
    except UserError as error:
        raise invalid(f"{error.field}: {error.problem}; {error.remedy}", error.field) from None
    try:
        check_sampler(name, server.served.config)
    except UserError as error:
        raise invalid(f"{param}: {error.problem}; leave {param} out", param, "sampler_unsupported") from None
    return name
