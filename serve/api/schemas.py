"""What clients send, as pydantic models: unknown fields and values out of range are errors, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictBool, StrictInt, StrictStr

from rdlm.sampling_params import Bridge, Order

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
TokenId = Annotated[StrictInt, Field(ge=0)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
MAX_SCHEDULE = 4096


def _steps(value: object) -> object:
    """One error for the whole field, where a union would report one for each of its members."""
    if (
        value is None
        or value == "auto"
        or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)
    ):
        return value
    raise ValueError('it must be an integer of at least 1, or "auto"')


def _schedule(value: Any) -> list[int] | None:
    """The two forms of a schedule as K of the prompt, then of each further token."""
    if value is None:
        return None
    if isinstance(value, dict) and value.keys() == {"prefill", "decode"}:
        decode = value["decode"]
        value = [value["prefill"], *(decode if isinstance(decode, list) else [decode])]
    fits = isinstance(value, list) and 0 < len(value) <= MAX_SCHEDULE
    if fits and all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in value):
        return value
    problem = (
        f'it must be a list of 1 to {MAX_SCHEDULE} core steps, or {{"prefill": K, "decode": K or a list}}'
    )
    raise ValueError(problem)


class Body(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class StreamOptions(Body):
    include_usage: StrictBool = False
    """Send one more chunk with ``usage`` and no choices before the end of the stream."""
    continuous_usage_stats: StrictBool = False
    """Carry the usage so far in every chunk."""
    include_steps: StrictBool = False
    """Between tokens, tell what each core step would have said: chunks without choices whose ``recurrence`` has it."""
    steps_every: Annotated[StrictInt, Field(ge=1)] | None = None
    """With include_steps: only every so many steps (default 1); each costs coda and head."""
    steps_top: Annotated[StrictInt, Field(ge=1, le=20)] | None = None
    """With include_steps: how many likely tokens to name (default 1)."""


class ExitBody(Body):
    """When a position may leave early: once the criterion falls below the threshold."""

    criterion: Literal[
        "latent-diff", "cosine", "kl", "minp-kl", "entropy-diff", "argmax-stability", "none"
    ] = "latent-diff"
    """latent-diff, cosine: change of the state, free. The others look at the prediction: coda and head at every check."""
    threshold: Annotated[Finite, Field(ge=0)] | None = None
    """Default by criterion, those of Huginn's code; 0 never exits. Of argmax-stability: how many repeats suffice."""
    min_steps: Annotated[StrictInt, Field(ge=1)] | None = None
    max_steps: Annotated[StrictInt, Field(ge=1)] | None = None
    """Default ``num_steps``, or the most the server allows."""
    check_every: Annotated[StrictInt, Field(ge=1)] | None = None
    """Check only every so many steps; default 1."""
    prefill: StrictBool | None = None
    """Whether chunks of the prompt may leave early too; default true."""


class Schedule(Body):
    """K of the prompt (and of the first token, which is drawn from its end), and of the tokens after it."""

    prefill: Annotated[StrictInt, Field(ge=1)]
    decode: Annotated[StrictInt, Field(ge=1)] | list[Annotated[StrictInt, Field(ge=1)]]


class SamplingBody(Body):
    """Fields that completions and chat share. ``null`` means the default everywhere."""

    model: StrictStr | None = None
    """Served name, or ``name:kN`` to choose N core steps."""
    num_steps: Annotated[int | Literal["auto"] | None, PlainValidator(_steps)] = None
    """Core steps K per token; /v1/models states the range, the default and what K means for this model. auto: see ``exit``."""
    reasoning_effort: Effort | None = None
    """OpenAI's name for K: medium is the default K, each level halves or doubles it; /v1/models states the numbers."""
    exit: ExitBody | None = None
    """Adaptive depth: each token takes as many steps as it needs. ``num_steps: "auto"`` is this with its defaults."""
    min_steps: Annotated[StrictInt, Field(ge=1)] | None = None
    """Least steps of a token where ``exit`` or ``max_ms`` makes them vary."""
    max_steps: Annotated[StrictInt, Field(ge=1)] | None = None
    """Most steps of a token where ``exit`` makes them vary; the same as ``exit.max_steps``."""
    schedule: Annotated[list[int] | Schedule | None, PlainValidator(_schedule)] = None
    """K by token: a list, whose first entry is the prompt's (and first token's) and whose last goes on, or prefill and decode."""
    max_ms: Annotated[StrictInt, Field(ge=1, le=86_400_000)] | None = None
    """Deadline in milliseconds, waiting included: K is lowered (to ``min_steps`` at least) where max_tokens would not fit it, and
    the answer ends with what there is when it has passed."""
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=100)] | None = None
    """0 is greedy; default 1."""
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: StrictInt | None = Field(None, ge=-1)
    """0 or -1 switches it off."""
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    """Token id -> added logit."""
    bridge: Bridge | None = None
    """Of models that draw a token through K noise levels: hard (default) draws at each level and re-noises what it drew; euler and
    multistep follow the ODE from one draw of noise and draw at the last level. /v1/models states what K means for this model."""
    order: Order | None = None
    """Of masked models: which tokens of the answer come into sight first, random by default; /v1/models lists what the model takes."""
    seed: StrictInt | None = None
    """Same seed, same request: same text, whatever else the server is doing."""
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: StrictBool | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    """Score the prompt and report that many alternatives for each of its tokens, as vLLM does; not in streams."""
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    prompt: StrictStr | list[StrictStr] | list[TokenId] | list[list[TokenId]]
    """Text or token ids, one or several."""
    echo: StrictBool | None = None
    """Begin each text with its prompt; with ``logprobs``, score the prompt too."""
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    """Alternatives to report for each token."""
    add_special_tokens: StrictBool | None = None
    """Put the beginning-of-text token, where the tokenizer has one, before text prompts (default true)."""


class ScoreRequest(Body):
    """POST /v1/score."""

    prompt: StrictStr | list[StrictStr] | list[TokenId] | list[list[TokenId]]
    """Text or token ids, one or several."""
    num_steps: list[Annotated[StrictInt, Field(ge=1)]] = Field(min_length=1, max_length=64)
    """Every K to score at; the pass costs what the largest costs, and a read-out for each."""
    model: StrictStr | None = None
    add_special_tokens: StrictBool | None = None
    """As in completions."""


class TextPart(Body):
    type: Literal["text"]
    text: StrictStr


class Message(Body):
    role: StrictStr
    content: StrictStr | list[TextPart]
    name: StrictStr | None = None
    type: Literal["text"] | None = None
    """Tolerated: old lm-eval releases send it."""

    def plain(self) -> dict[str, Any]:
        """role, content (and name) as a chat template expects them."""
        content = (
            self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        )
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatRequest(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None


class TokenizeRequest(Body):
    """POST /tokenize."""

    prompt: StrictStr
    add_special_tokens: StrictBool = True
    model: StrictStr | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: StrictStr | None = None
