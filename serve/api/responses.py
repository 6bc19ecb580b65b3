"""POST /v1/responses, OpenAI's newer form of chat: translated to a chat request, and its answer back. Nothing
is stored.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar, cast

from pydantic import Field, PlainValidator, StrictStr

from serve.api.openai_format import usage_of
from serve.api.request_parsing import Parsed
from serve.api.schemas import (
    MAX_MESSAGES,
    Body,
    ChatRequest,
    Count,
    Effort,
    Message,
    Neutral,
    SamplingBody,
    StreamOptions,
    shorten,
)
from serve.api.streaming import PING_SECONDS, EngineEvents
from serve.errors import ApiError, invalid

TEXT_PARTS = ("input_text", "output_text", "text")


def _input(value: Any) -> list[Message]:
    """A text, or messages as clients write them and as answers have them."""
    items = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(items, list) or not 0 < len(items) <= MAX_MESSAGES:
        raise ValueError(f"it must be a text or a list of 1 to {MAX_MESSAGES} messages")
    return [_message(item) for item in items]


def _message(item: Any) -> Message:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind != "message":
        raise ValueError(f"an item of type {shorten(str(kind))!r} cannot be read; this model takes messages")
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part) for part in content[: MAX_MESSAGES + 1]]
    if unknown := sorted(item.keys() - {"type", "role", "content", "id", "status", "phase"}):
        raise ValueError(f"a message has no field {shorten(unknown[0])!r}")
    return Message.parse({"role": item.get("role"), "content": content})


def _part(part: Any) -> Any:
    """A part of a message as chat has it."""
    if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
        return {"type": "text", "text": part.get("text")}
    return part


class Reasoning(Body):
    path: ClassVar[str] = "reasoning."
    effort: Effort | None = None
    """As reasoning_effort."""
    neutral: ClassVar[Neutral] = {"summary": ("auto",), "generate_summary": ("auto",)}


class ResponsesRequest(SamplingBody):
    """POST /v1/responses."""

    input: Annotated[str | list[dict[str, Any]], PlainValidator(_input)]
    """A text, or messages; those of earlier answers among them, as nothing is stored here."""
    instructions: Annotated[StrictStr, Field(max_length=1 << 24)] | None = None
    """A system message before the input."""
    max_output_tokens: Count | None = None
    reasoning: Reasoning | None = None
    neutral: ClassVar[Neutral] = SamplingBody.neutral | {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "max_tool_calls": (),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "background": (False,),
        "include": ([],),
        "truncation": ("disabled",),
        "top_logprobs": (0,),
        "text": ({}, {"format": {"type": "text"}}, {"format": {"type": "text"}, "verbosity": "medium"}),
        "context_management": ([],),
    }

    def as_chat(self) -> ChatRequest:
        """The same request to /v1/chat/completions. Raises ApiError for fields that this form has no place
        for.
        """
        for name in ("max_tokens", "n", "prompt_logprobs", "return_token_ids", "stream_options"):
            if getattr(self, name) not in (
                None,
                StreamOptions(),
            ):  # include_obfuscation: false changes nothing
                remedy = "send max_output_tokens" if name == "max_tokens" else "use /v1/chat/completions"
                raise invalid(f"{name}: a response has no such field; {remedy}", name)
        effort = None if self.reasoning is None else self.reasoning.effort
        if None not in (effort, self.reasoning_effort) and effort != self.reasoning_effort:
            raise invalid("reasoning.effort: it contradicts reasoning_effort; name one", "reasoning.effort")
        system = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        shared = {name: getattr(self, name) for name in SamplingBody.model_fields}
        shared |= {"reasoning_effort": effort or self.reasoning_effort}
        messages = [*system, *cast(list[Message], self.input)]
        return ChatRequest.model_construct(
            **shared, messages=messages, max_completion_tokens=self.max_output_tokens
        )


class ResponseFormat:
    """The answer to one request, in one piece or as OpenAI's named events."""

    def __init__(self, body: ResponsesRequest, parsed: Parsed) -> None:
        self._body, self._parsed = body, parsed
        self._message_id = f"msg_{secrets.token_hex(12)}"
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": parsed.model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "temperature": body.numbers.get("temperature", 1.0),
            "top_p": body.numbers.get("top_p", 1.0),
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "text": {"format": {"type": "text"}},
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "error": None,
        }

    def _response(self, status: str, output: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "incomplete_details": details,
            "output": output,
            "usage": usage,
        }

    def _message(self, status: str, content: list[Any]) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    async def collect(self, events: EngineEvents) -> dict[str, Any]:
        """The response, from the last of its stream's events."""
        async for payload in self.stream(events, raises=True):
            last = payload
        assert last is not None
        return cast(dict[str, Any], last["response"])

    async def stream(
        self, events: EngineEvents, raises: bool = False
    ) -> AsyncIterator[dict[str, Any] | None]:
        """Events with numbers; None is a sign of life. raises: ApiErrors leave the iterator, else they are
        its last event.
        """
        number = -1
        try:
            async for payload in self._payloads(events):
                number += payload is not None
                yield payload and {"sequence_number": number, **payload}
        except ApiError as error:
            if raises:
                raise
            told = {"code": error.code, "message": error.message, "param": error.param}
            yield {"sequence_number": number + 1, "type": "error", **told}

    async def _payloads(self, events: EngineEvents) -> AsyncIterator[dict[str, Any] | None]:
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        text, finish, usage = "", None, None
        for kind in ("response.created", "response.in_progress"):
            yield {"type": kind, "response": self._response("in_progress", [], None)}
        item = self._message("in_progress", [])
        yield {"type": "response.output_item.added", "output_index": 0, "item": item}
        yield {"type": "response.content_part.added", **place, "part": empty}
        async for event in events.events(PING_SECONDS):
            if event is None:
                yield None
                continue
            if event.text:
                text += event.text
                yield {"type": "response.output_text.delta", **place, "delta": event.text, "logprobs": []}
            finish, usage = event.finish or finish, event.usage or usage
        part = {**empty, "text": text}
        status = "incomplete" if finish == "length" else "completed"
        item = self._message(status, [part])
        yield {"type": "response.output_text.done", **place, "text": text, "logprobs": []}
        yield {"type": "response.content_part.done", **place, "part": part}
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        counts = usage_of(self._parsed, [] if usage is None else [usage])
        account = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
            "recurrence": counts["recurrence"],
        }
        yield {"type": f"response.{status}", "response": self._response(status, [item], account)}
