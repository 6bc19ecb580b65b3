"""What clients send, as pydantic models. Unknown fields and values out of range are errors, never ignored.

Every number has an upper bound here and every list a largest length, so that no later code meets a value it
cannot hold. Lists stop at their first wrong item (``fail_fast``): an error of a megabyte of items would cost
more than the request.
"""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    create_model,
    model_validator,
)

from rdlm.diffusion.samplers import SAMPLERS
from rdlm.exit_criteria import CRITERIA
from rdlm.sampling_params import DEFAULT_SAMPLER, NUMBERS, Order, Range, text_samplers
from serve.api import constraints
from serve.api.constraints import Constraint
from serve.api.json_text import decode
from serve.api.tools import ToolChoice
from serve.engine.sequence import MAX_DRAFT, MAX_WAVEFRONT
from serve.errors import invalid, shorten

INT32 = 2**31 - 1
MAX_CHOICES = 1024
"""Prompts times ``n`` of one HTTP request."""
MAX_IDS = 1 << 20
"""Token ids of one prompt, before the context is looked at."""
MAX_TEXT = 1 << 20
"""Characters that /tokenize takes, and ids that /detokenize takes."""
MAX_SCHEDULE = 4096
MAX_STOPS, MAX_STOP_LENGTH = 64, 512
MAX_STOP_IDS, MAX_BIASES = 1024, 1024
MAX_MESSAGES = 4096
MAX_VARIABLES = 4096
"""Values of all ``chat_template_kwargs``, those inside lists and objects too: rendering copies every one."""

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=0, le=INT32)]
Positive = Annotated[StrictInt, Field(ge=1, le=INT32)]
TokenId = Annotated[StrictInt, Field(ge=0, le=INT32)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Identifier = Annotated[StrictStr, Field(max_length=512)]
ModelName = Annotated[StrictStr, Field(max_length=256)]
Neutral = dict[str, tuple[Any, ...]]
"""Field -> values that change nothing here, null among them; any other value is refused by name."""


def is_count(value: object, least: int = 0) -> bool:
    """Whether ``value`` is an integer (and no boolean) from ``least`` to 2^31 - 1."""
    return type(value) is int and least <= value <= INT32


# One error for the whole field, where a union would report one for each of its members and for each of their
# items.


def _given(value: object) -> str:
    """How a message ends that says what is wrong, but not of what."""
    if isinstance(value, int) and abs(value) >= 1 << 256:  # Python refuses to write thousands of digits
        return ""
    return f", got {shorten(json.dumps(value))}" if isinstance(value, (str, int, float)) else ""


def _steps(value: object) -> object:
    if value is None or value == "auto" or is_count(value, 1):
        return value
    raise ValueError('it must be an integer of at least 1, or "auto"')


def _schedule(value: Any) -> list[int] | None:
    """The two forms of a schedule as K of the prompt, then of each further token."""
    if value is None:
        return None
    if isinstance(value, dict) and value.keys() == {"prefill", "decode"}:
        decode = value["decode"]
        value = [value["prefill"], *(decode if isinstance(decode, list) else [decode])]
    if isinstance(value, list) and 0 < len(value) <= MAX_SCHEDULE and all(is_count(k, 1) for k in value):
        return value
    form = '{"prefill": K, "decode": K or a list}'
    raise ValueError(f"it must be a list of 1 to {MAX_SCHEDULE} core steps, or {form}")


def _prompt(value: Any) -> list[str | list[int]]:
    """Every form of a prompt as a list of texts and id lists."""
    items = value if isinstance(value, list) and not (value and is_count(value[0])) else [value]
    if not items:
        raise ValueError("the list is empty; send at least one prompt")
    if len(items) > MAX_CHOICES:
        raise ValueError(f"{len(items)} prompts exceed {MAX_CHOICES}")
    for item in items:
        if isinstance(item, list) and len(item) > MAX_IDS:
            raise ValueError(f"{len(item)} token ids exceed {MAX_IDS}")
        if not (isinstance(item, str) or (isinstance(item, list) and all(is_count(i) for i in item))):
            raise ValueError("it must be a text, a list of token ids, or a list of such prompts")
    return items


def _stop(value: Any) -> tuple[str, ...]:
    stop = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else None
    if value is None:
        return ()
    if stop is None or len(stop) > MAX_STOPS or not all(isinstance(s, str) for s in stop[:MAX_STOPS]):
        raise ValueError(f"it must be a text or a list of at most {MAX_STOPS} texts")
    if "" in stop:
        raise ValueError("an empty string would end every text; remove it")
    if any(len(s) > MAX_STOP_LENGTH for s in stop):
        raise ValueError(f"a stop string has at most {MAX_STOP_LENGTH} characters")
    return stop


def _samplers() -> str:
    """What ``sampler`` may be, in words."""
    listed = ". ".join(f"{name}: {SAMPLERS[name].description}" for name in text_samplers())
    return f"How a token is drawn through K noise levels ({DEFAULT_SAMPLER} by default). {listed}."


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"it must be an object of at most {MAX_BIASES} token ids")
    found = {}
    for key, bias in value.items():
        # ASCII digits only: int() would read digits of other scripts, and take minutes over a very long
        # number
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= INT32):
            raise ValueError(f"{shorten(key)!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number from -100 to 100")
        found[int(key)] = float(bias)
    return found


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    small = isinstance(value, dict) and len(value) <= 16
    if small and all(len(k) <= 64 and isinstance(v, str) and len(v) <= 512 for k, v in value.items()):
        return value
    raise ValueError("it must be an object of at most 16 short texts (keys of 64, values of 512 characters)")


def _variables(value: Any) -> dict[str, Any] | None:
    """``chat_template_kwargs``, few enough to be rendered on the event loop."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("it must be an object")
    pending: list[Any] = [value]
    found = 0
    while pending:
        items = pending.pop()
        found += len(items)
        if found > MAX_VARIABLES:
            raise ValueError(
                f"it has more than {MAX_VARIABLES} values, those inside lists and objects included"
            )
        pending += [
            item
            for item in (items.values() if isinstance(items, dict) else items)
            if isinstance(item, dict | list)
        ]
    return value


def _content(value: Any) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        raise ValueError("it must be a text or a list of parts of type 'text'")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            problem = (
                f"a part of type {shorten(kind)!r}" if isinstance(kind, str) else "a part without a type"
            )
            raise ValueError(f"{problem} cannot be read; this model takes parts of type 'text'")
        # cache_control is a hint to caches, which changes no answer
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text", "cache_control"}:
            raise ValueError("a part of type 'text' has a field text, and no other but cache_control")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(value: Any) -> list[dict[str, Any]] | None:
    """Calls as chat templates take them: their arguments parsed."""
    if not value:
        return None
    if not isinstance(value, list) or len(value) > constraints.MAX_TOOLS:
        raise invalid("messages.tool_calls: it must be a list of calls", "messages.tool_calls")
    return [_tool_call(call) for call in value]


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    form = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
    param = "messages.tool_calls"
    if (
        not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
        or not isinstance(call.get("id"), str | None)
    ):
        raise invalid(f"{param}: a call has the form {form}", param)
    given = {name for part in (call, function) for name, value in part.items() if value is not None}
    unknown = given - {"id", "type", "index", "function", "name", "arguments", "parsed_arguments"}
    if unknown or call.get("type", "function") != "function":
        problem = (
            f"of type {call.get('type')!r}" if not unknown else f"with a field {shorten(min(unknown))!r}"
        )
        raise invalid(f"{param}: a call {shorten(problem)} cannot be read; it has the form {form}", param)
    arguments, param = function.get("arguments"), f"{param}.function.arguments"
    if isinstance(arguments, str | None):
        arguments = decode(arguments or "{}", param)
    if not isinstance(arguments, dict):
        raise invalid(f"{param}: it must be the JSON text of an object", param)
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


class Body(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)
    path: ClassVar[str] = ""
    """Of a nested object: its field, with a dot."""
    neutral: ClassVar[Neutral] = {}
    """Fields of OpenAI's and vLLM's interfaces that are accepted where they change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """``value`` without neutral fields. Raises ApiError at the first unknown field: pydantic would list
        each of a million.
        """
        if not isinstance(value, dict):
            return value
        for name, given in value.items():
            if name not in cls.model_fields:
                shown = shorten(str(name))
                accepted = cls.neutral.get(name)
                if accepted is None:
                    near = difflib.get_close_matches(shown, cls.model_fields, 1)
                    hint = f"did you mean {near[0]}?" if near else "/schema lists the fields"
                    raise invalid(f"{cls.path}{shown}: there is no such field; {hint}", f"{cls.path}{shown}")
                if given is not None and not any(type(given) is type(a) and given == a for a in accepted):
                    choices = "".join(f" or send {json.dumps(a)}" for a in accepted)
                    problem = f"this server does not support this value; leave it out{choices}"
                    raise invalid(f"{cls.path}{shown}: {problem}", f"{cls.path}{shown}", "unsupported_value")
        return {name: given for name, given in value.items() if name in cls.model_fields}

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Raises ApiError that names the first wrong field."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] not in ("value_error", "missing"):  # this class's own messages say it where it helps
            message += _given(first["input"])
        raise invalid(f"{param}: {message}" if param else f"the body: {message}", param or None)


class StreamOptions(Body):
    path: ClassVar[str] = "stream_options."
    neutral: ClassVar[Neutral] = {
        "include_obfuscation": (False,),
    }
    include_usage: StrictBool = False
    """Send one more chunk with ``usage`` and no choices before the end of the stream."""
    continuous_usage_stats: StrictBool = False
    """Carry the tokens so far in every chunk's ``usage``, and ``recurrence`` once all choices have ended."""
    include_steps: StrictBool = False
    """Between tokens, send what each core step predicts: chunks without choices whose ``recurrence`` has it.
    """
    steps_every: Positive | None = None
    """With include_steps: only every so many steps (default 1); each costs coda and head."""
    steps_top: Annotated[StrictInt, Field(ge=1, le=20)] | None = None
    """With include_steps: how many likely tokens to name (default 1)."""


class ExitBody(Body):
    """When a position may exit early: once the criterion falls below the threshold."""

    path: ClassVar[str] = "exit."
    criterion: Annotated[StrictStr, Field(max_length=64, json_schema_extra={"enum": [*CRITERIA, "none"]})] = (
        next(iter(CRITERIA))
    )
    """Rule by which a token exits the loop over K early."""
    threshold: Annotated[Finite, Field(ge=0, le=1e12)] | None = None
    """Default by criterion (/v1/models lists them); 0 never exits."""
    min_steps: Positive | None = None
    max_steps: Positive | None = None
    """Default ``num_steps``, or the most the server allows."""
    check_every: Positive | None = None
    """Check only every so many steps; default 1."""
    prefill: StrictBool | None = None
    """Whether chunks of the prompt may exit early too; default true."""


class SpeculationBody(Body):
    """Self-speculative decoding: tokens are drafted at a small K and verified at the request's. A greedy answer is
    that of plain decoding, a sampled one has its law."""

    path: ClassVar[str] = "speculation."
    draft_steps: Positive | None = None
    """Core steps of a draft, fewer than K; default a quarter of K."""
    draft_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_DRAFT)] | None = None
    """Most tokens of a draft; default 4."""


class WavefrontBody(Body):
    """Diffusion forcing: later positions begin before the first one has taken K core steps, with the tokens that
    are predicted so far."""

    path: ClassVar[str] = "wavefront."
    positions: Annotated[StrictInt, Field(ge=1, le=MAX_WAVEFRONT)] | None = None
    """Most positions at a time; default 64, and 1 is plain decoding."""
    inner_steps: Positive | None = None
    """Core steps between two read-outs of all positions; default 4."""
    threshold: Annotated[Finite, Field(ge=0, le=1e12)] | None = None
    """A position leaves before its K steps once its state changes relatively by less between two read-outs;
    default 0.03, and 0 (never) for a single position."""
    noise: Annotated[Finite, Field(ge=0, le=1)] | None = None
    """Share of a fresh initial state that every state gets after a read-out; default 0, published 0.5."""
    noise_decays: StrictBool | None = None
    """Whether that share is divided by 1 + the core steps that a position has taken; default true, as published."""
    average: Annotated[Finite, Field(ge=0, lt=1)] | None = None
    """Share of a position's input before in its input after a read-out; default 0, published 0.1."""
    headway: Annotated[StrictInt, Field(ge=1, le=MAX_WAVEFRONT)] | None = None
    """Positions that are added after a read-out; default 1, as published."""


class Schedule(Body):
    """K of the prompt (and of the first token, which is drawn from its end), and of the tokens after it."""

    prefill: Positive
    decode: Positive | list[Positive]


def _number(kind: type, valid: Range) -> tuple[Any, None]:
    """The field of one number of SamplingParams; null is the default."""
    low = {"gt" if valid.above_low else "ge": valid.low}
    bounds = Field(le=min(valid.high, INT32), description=f"{valid.meaning}.", **low)  # type: ignore[call-overload]
    return Annotated[StrictInt if kind is int else Finite, bounds] | None, None


if TYPE_CHECKING:

    class NumbersBody(Body):
        """What the line below makes."""
else:
    NumbersBody = create_model("NumbersBody", __base__=Body, **{n: _number(*of) for n, of in NUMBERS.items()})


class SamplingBody(NumbersBody):
    """Fields that completions and chat share, those of rdlm/sampling_params.py among them. ``null`` means the
    default everywhere."""

    prompt_field: ClassVar[str] = "prompt"
    """Where its text is, for messages."""
    model: ModelName | None = None
    """Served name, or ``name:kN`` to choose N core steps."""
    num_steps: Annotated[int | Literal["auto"] | None, PlainValidator(_steps)] = None
    """Core steps K per token; /v1/models states the range, the default and what K means for this model. auto:
    see ``exit``."""
    reasoning_effort: Effort | None = None
    """OpenAI's name for K: medium is the default K, each level halves or doubles it; /v1/models states the
    numbers."""
    exit: ExitBody | None = None
    """Adaptive depth: each token takes as many steps as it needs. ``num_steps: "auto"`` is this with its
    defaults."""
    min_steps: Positive | None = None
    """Least steps of a token where ``exit`` or ``max_ms`` makes them vary."""
    max_steps: Positive | None = None
    """Most steps of a token where ``exit`` makes them vary; the same as ``exit.max_steps``."""
    schedule: Annotated[list[int] | Schedule | None, PlainValidator(_schedule)] = None
    """K by token: a list, whose first entry is the prompt's (and first token's) and whose last goes on, or
    prefill and decode."""
    step_sizes: (
        Annotated[
            list[Annotated[Finite, Field(gt=0, le=1)]],
            Field(fail_fast=True, min_length=1, max_length=MAX_SCHEDULE),
        ]
        | None
    ) = None
    """Lengths of the K core steps, of models whose steps have some (LoopFormer): such as 0.5, 0.25, 0.25. They
    should add up to 1; left out, all are 1 / K."""
    max_ms: Annotated[StrictInt, Field(ge=1, le=86_400_000)] | None = None
    """Deadline in milliseconds, waiting included: K is lowered (to ``min_steps`` at least) where max_tokens
    would not fit it, and the answer ends with what there is when it has passed."""
    speculation: SpeculationBody | None = None
    """Draft tokens at fewer core steps and verify several at once. It needs a server with the full cache and a
    fixed K."""
    wavefront: WavefrontBody | None = None
    """Decode several positions at a time. It needs a thinking model at a fixed K."""
    max_tokens: Count | None = None
    logit_bias: Annotated[dict[str, float] | None, PlainValidator(_logit_bias)] = None
    """Token id -> added logit, -100 to 100."""
    sampler: Annotated[
        str | None, Field(max_length=64, examples=text_samplers(), description=_samplers())
    ] = None
    bridge: Annotated[str, Field(max_length=64)] | None = None
    """Older name of ``sampler``: hard is renoise, multistep is dpmpp_2m."""
    order: Order | None = None
    """For masked models: which positions of the answer are unmasked first, random by default; /v1/models
    lists the orders."""
    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    """Same seed, same request: same text, whatever else the server is doing."""
    stop: Annotated[
        str | list[str] | None, PlainValidator(_stop, json_schema_input_type=str | list[str] | None)
    ] = None
    """Texts that end the answer and are left out of it: at most 64 of 512 characters."""
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_IDS)] | None = None
    """Further token ids that end the answer."""
    ignore_eos: StrictBool | None = None
    """Let the model's end of text not end the answer."""
    min_tokens: Count | None = None
    """Fewest tokens of the answer: nothing ends it before."""
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    """Score the prompt and report that many alternatives for each of its tokens, as vLLM does; not in
    streams."""
    return_token_ids: StrictBool | None = None
    """Report the ids of the prompt and of the answer, as vLLM does."""
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    response_format: Annotated[dict[str, Any] | None, PlainValidator(constraints.response_format)] = None
    """``json_object`` or ``json_schema`` with a schema (draft 2020-12): the answer is JSON that fits it."""
    structured_outputs: Annotated[dict[str, Any] | None, PlainValidator(constraints.structured_outputs)] = (
        None
    )
    """vLLM's form: exactly one of json, json_object, regex, choice and grammar (Lark of llguidance)."""

    user: Identifier | None = None
    """Written to the JSON log, like the next three."""
    metadata: Annotated[dict[str, str] | None, PlainValidator(_metadata)] = None
    safety_identifier: Identifier | None = None
    prompt_cache_key: Identifier | None = None

    neutral: ClassVar[Neutral] = {
        "store": (False,),
        "service_tier": ("auto", "default"),
        "prompt_cache_retention": ("in-memory", "in_memory"),
        "best_of": (1,),
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "early_stopping": (False,),
        "typical_p": (1, 1.0),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True, False),
        "include_stop_str_in_output": (False,),
        "return_tokens_as_token_ids": (False,),
        "allowed_token_ids": ([],),
        "bad_words": ([],),
        "logits_processors": ([],),
        "truncate_prompt_tokens": (),
        "priority": (0,),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
    }

    @property
    def numbers(self) -> dict[str, Any]:
        """Those numbers of SamplingParams that are given."""
        return {name: value for name in NUMBERS if (value := getattr(self, name)) is not None}

    @property
    def constraint(self) -> Constraint | None:
        """What the answer must be, tools aside. Raises ApiError where two fields say it."""
        found = [
            cast(Constraint, c) for c in (self.response_format, self.structured_outputs) if c is not None
        ]
        if len(found) > 1:
            problem = "it contradicts response_format; name one of them"
            raise invalid(f"structured_outputs: {problem}", "structured_outputs")
        return found[0] if found else None

    @property
    def identifiers(self) -> dict[str, Any]:
        """What the log gets."""
        names = ("user", "metadata", "safety_identifier", "prompt_cache_key")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_prompt)]


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompt
    """Text or token ids, one or several."""
    echo: StrictBool | None = None
    """Begin each text with its prompt; with ``logprobs``, score the prompt too."""
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    """Alternatives to report for each token."""
    add_special_tokens: StrictBool | None = None
    """Put the beginning-of-text token, where the tokenizer has one, before text prompts (default true)."""
    neutral: ClassVar[Neutral] = SamplingBody.neutral | {
        "suffix": ("",),
    }


class ScoreRequest(Body):
    """POST /v1/score."""

    prompt: Prompt
    """Text or token ids, one or several."""
    num_steps: Annotated[list[Positive], Field(fail_fast=True, min_length=1, max_length=64)]
    """Every K to score at; the pass costs what the largest costs, and a read-out for each."""
    model: ModelName | None = None
    add_special_tokens: StrictBool | None = None
    """As in completions."""


class Message(Body):
    """One turn of a conversation. What the chat template does with roles and names is its own affair."""

    path: ClassVar[str] = "messages."
    role: Annotated[StrictStr, Field(max_length=64)]
    content: Annotated[str | list[dict[str, Any]], PlainValidator(_content)]
    """A text, or parts of type ``text``."""
    name: Identifier | None = None
    tool_call_id: Identifier | None = None
    tool_calls: Annotated[list[dict[str, Any]] | None, PlainValidator(_tool_calls)] = None
    """Calls of an earlier answer, as it had them."""
    cache_control: dict[str, Any] | None = None
    """A hint to caches; accepted, as it changes no answer."""
    neutral: ClassVar[Neutral] = {
        "type": ("text",),
        "refusal": (),
        "function_call": (),
        "annotations": ([],),
        "audio": (),
        "reasoning": ("",),
        "reasoning_content": ("",),
        "parsed": (),
    }

    def plain(self) -> dict[str, Any]:
        """The fields that a chat template sees."""
        shown = {"role", "content", "name", "tool_call_id", "tool_calls"}
        return self.model_dump(include=shown, exclude_none=True)

    @model_validator(mode="before")
    @classmethod
    def _calls_alone(cls, value: Any) -> Any:
        """An answer of calls has no content."""
        if isinstance(value, dict) and value.get("tool_calls") and value.get("content") is None:
            return {**value, "content": ""}
        return value


class ChatRequest(SamplingBody):
    """POST /v1/chat/completions."""

    prompt_field = "messages"
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, PlainValidator(_variables)] = None
    """Variables for the chat template."""
    tools: Annotated[list[dict[str, Any]] | None, PlainValidator(constraints.tool_list)] = None
    """Functions that the answer may call, where the chat template knows them."""
    tool_choice: Annotated[str | dict[str, Any] | ToolChoice | None, PlainValidator(lambda value: value)] = (
        None
    )
    """none, auto (default), required, a function, or allowed_tools."""
    parallel_tool_calls: StrictBool | None = None
    """Whether an answer may have several calls (default true)."""
    neutral: ClassVar[Neutral] = SamplingBody.neutral | {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "verbosity": ("medium",),
        "chat_template": (),
        "documents": ([],),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "echo": (False,),
    }


class TokenizeRequest(Body):
    """POST /tokenize."""

    prompt: Annotated[StrictStr, Field(max_length=MAX_TEXT)]
    add_special_tokens: StrictBool = True
    model: ModelName | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TEXT)]
    model: ModelName | None = None
