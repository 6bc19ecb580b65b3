"""What clients send, as pydantic models: unknown fields and values out of range are errors, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
TokenId = Annotated[StrictInt, Field(ge=0)]


class Body(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class StreamOptions(Body):
    include_usage: StrictBool = False
    """Send one more chunk with ``usage`` and no choices before the end of the stream."""
    continuous_usage_stats: StrictBool = False
    """Carry the usage so far in every chunk."""


class SamplingBody(Body):
    """Fields that completions and chat share. ``null`` means the default everywhere."""

    model: StrictStr | None = None
    """Served name, or ``name:kN`` to choose N core steps."""
    num_steps: Annotated[StrictInt, Field(ge=1)] | None = None
    """Core steps K per token; /v1/models states the range, the default and what K means for this model."""
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=100)] | None = None
    """0 is greedy; default 1."""
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: StrictInt | None = Field(None, ge=-1)
    """0 or -1 switches it off."""
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    """Token id -> added logit."""
    seed: StrictInt | None = None
    """Same seed, same request: same text, whatever else the server is doing."""
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: StrictBool | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
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
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
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
