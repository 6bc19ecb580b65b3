"""POST /v1/responses, OpenAI's newer form of chat: translated to a chat request, and its answer back. Nothing
is stored.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

from pydantic import Field, PlainValidator, StrictBool, StrictStr

from serve.api import constraints
from serve.api.constraints import Constraint
from serve.api.openai_format import ChatAnswer, read_calls, usage_of, warnings_of
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
)
from serve.api.streaming import PING, PING_SECONDS, EngineEvents, sse
from serve.api.tools import Delta, Tool
from serve.errors import ApiError, invalid, renamed, shorten

TEXT_PARTS = ("input_text", "output_text", "text")
CHAT_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages.tool_calls": "input",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
"""Fields of chat -> those of responses that they were made from."""


def _input(value: Any) -> list[Message]:
    """A text, or items as clients write them and as answers have them: messages, calls and their outputs."""
    items = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(items, list) or not 0 < len(items) <= MAX_MESSAGES:
        raise ValueError(f"it must be a text or a list of 1 to {MAX_MESSAGES} messages")
    messages: list[dict[str, Any]] = []
    names: dict[Any, Any] = {}
    for item in items:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "function_call":
            _check_keys(item, {"type", "id", "call_id", "name", "arguments", "status"})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if isinstance(item.get("call_id"), str):
                names[item["call_id"]] = item.get("name")
            if messages and messages[-1]["role"] == "assistant":  # one answer
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            _check_keys(item, {"type", "id", "call_id", "output", "status"})
            if not isinstance(item.get("call_id"), str):
                raise ValueError("an output of a call has its call_id")
            output = {"role": "tool", "content": _parts(item.get("output")), "tool_call_id": item["call_id"]}
            name = names.get(item["call_id"])
            messages.append(output if name is None else output | {"name": name})
        elif kind == "message":
            _check_keys(item, {"type", "role", "content", "id", "status", "phase"})
            messages.append({"role": item.get("role"), "content": _parts(item.get("content"))})
        else:
            problem = "this model takes messages, calls and their outputs"
            raise ValueError(f"an item of type {shorten(str(kind))!r} cannot be read; {problem}")
    try:
        with renamed(CHAT_NAMES):
            return [Message.parse(message) for message in messages]
    except ApiError as error:
        if error.param is None or not error.param.startswith("input"):  # a field of a message
            error.message, error.param = f"input: {error.message}", f"input.{error.param}"
        raise


def _check_keys(item: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(item.keys() - known):
        raise ValueError(f"an item of this type has no field {shorten(unknown[0])!r}")


def _parts(content: Any) -> Any:
    return [_part(part) for part in content[: MAX_MESSAGES + 1]] if isinstance(content, list) else content


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


class TextBody(Body):
    path: ClassVar[str] = "text."
    format: Annotated[
        dict[str, Any] | None,
        PlainValidator(lambda value: constraints.response_format(value, "text.format", is_flat=True)),
    ] = None
    """json_object or json_schema, as response_format of chat."""
    neutral: ClassVar[Neutral] = {"verbosity": ("medium",)}


class ResponsesRequest(SamplingBody):
    """POST /v1/responses."""

    input: Annotated[str | list[dict[str, Any]], PlainValidator(_input)]
    """A text, or messages; those of earlier answers among them, as nothing is stored here."""
    instructions: Annotated[StrictStr, Field(max_length=1 << 24)] | None = None
    """A system message before the input."""
    max_output_tokens: Count | None = None
    reasoning: Reasoning | None = None
    text: TextBody | None = None
    tools: Annotated[
        list[dict[str, Any]] | None, PlainValidator(lambda value: constraints.tool_list(value, is_flat=True))
    ] = None
    """Functions that the answer may call, where the chat template knows them."""
    tool_choice: Annotated[str | dict[str, Any] | None, PlainValidator(lambda value: value)] = None
    """none, auto (default), required, a function, or allowed_tools."""
    parallel_tool_calls: StrictBool | None = None
    """Whether an answer may have several calls (default true)."""
    neutral: ClassVar[Neutral] = SamplingBody.neutral | {
        "max_tool_calls": (),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "background": (False,),
        "include": ([],),
        "truncation": ("disabled",),
        "top_logprobs": (0,),
        "context_management": ([],),
    }

    @property
    def shown_format(self) -> dict[str, Any]:
        """``text.format`` as the answer repeats it."""
        made = None if self.text is None else cast(Constraint | None, self.text.format)
        return {"type": "text"} if made is None else dict(made.given)

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """``tools`` as the answer repeats them."""
        tools = cast(tuple[Tool, ...], self.tools or ())
        return [{"type": "function", "strict": None, **tool.given["function"]} for tool in tools]

    def as_chat(self) -> ChatRequest:
        """The same request to /v1/chat/completions. Raises ApiError for fields that this form has no place
        for.
        """
        remedies = {"max_tokens": "send max_output_tokens", "response_format": "send text.format"}
        for name in (*remedies, "n", "prompt_logprobs", "return_token_ids", "stream_options"):
            if getattr(self, name) not in (
                None,
                StreamOptions(),
            ):  # include_obfuscation: false changes nothing
                remedy = remedies.get(name, "use /v1/chat/completions")
                raise invalid(f"{name}: a response has no such field; {remedy}", name)
        effort = None if self.reasoning is None else self.reasoning.effort
        if None not in (effort, self.reasoning_effort) and effort != self.reasoning_effort:
            raise invalid("reasoning.effort: it contradicts reasoning_effort; name one", "reasoning.effort")
        system = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        shared = {name: getattr(self, name) for name in SamplingBody.model_fields}
        shared |= {"reasoning_effort": effort or self.reasoning_effort}
        shared |= {"response_format": self.text and self.text.format, "tools": self.tools}
        shared |= {"parallel_tool_calls": self.parallel_tool_calls}
        choice = constraints.tool_choice(
            self.tool_choice, cast(tuple[Tool, ...], self.tools or ()), is_flat=True
        )
        messages = [*system, *cast(list[Message], self.input)]
        return ChatRequest.model_construct(
            **shared, tool_choice=choice, messages=messages, max_completion_tokens=self.max_output_tokens
        )


@dataclass(kw_only=True)
class ResponseAnswer(ChatAnswer):
    """An answer of chat in the form of responses: in one piece, or as OpenAI's named events."""

    body: ResponsesRequest

    def __post_init__(self) -> None:
        super().__post_init__()
        body = self.body
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": self.model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "temperature": body.numbers.get("temperature", 1.0),
            "top_p": body.numbers.get("top_p", 1.0),
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "text": {"format": body.shown_format},
            "tools": body.shown_tools,
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
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
            **({} if usage is None else warnings_of(self)),
        }

    async def collect(self, events: EngineEvents) -> dict[str, Any]:
        """The response, from the last of its stream's events."""
        async for payloads in self._payloads(events):
            last = payloads
        return cast(dict[str, Any], last[-1]["response"])

    async def stream(self, events: EngineEvents) -> AsyncIterator[bytes]:
        """Named and numbered events; an error is the last of them."""
        number = itertools.count()
        try:
            async for payloads in self._payloads(events):
                found = [sse({"sequence_number": next(number), **p}, p["type"]) for p in payloads]
                yield b"".join(found) or PING
        except ApiError as error:
            fields = {"code": error.code, "message": error.message, "param": error.param}
            yield sse({"sequence_number": next(number), "type": "error", **fields}, "error")

    async def _payloads(self, events: EngineEvents) -> AsyncIterator[list[dict[str, Any]]]:
        """Events that are sent together; none is a sign of life."""
        finish, usage, reader = None, None, next(iter(self._readers), None)
        output = Output()
        kinds = ("response.created", "response.in_progress")
        yield [{"type": kind, "response": self._response("in_progress", [], None)} for kind in kinds]
        async for batch in events.batches(PING_SECONDS):
            payloads: list[dict[str, Any]] = []
            for event in batch:
                for delta in [Delta(event.text)] if reader is None else read_calls(reader, event):
                    payloads += output.add(delta)
                finish, usage = event.finish or finish, event.usage or usage
            if payloads or not batch:
                yield payloads
        status = "incomplete" if finish == "length" else "completed"
        payloads = [*output.finish(status)]
        counts = usage_of(self, [] if usage is None else [usage])
        account = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
            "recurrence": counts["recurrence"],
        }
        whole = {"type": f"response.{status}", "response": self._response(status, output.items, account)}
        yield [*payloads, whole]


class Output:
    """Items of a response as they grow: a message where there is text, then calls of functions."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        """The last one is open until the next begins."""

    def add(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Events of one more part of the answer."""
        if delta.id is not None:
            yield from self._close("completed")
            call = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "status": "in_progress"}
            yield from self._open(call | {"call_id": delta.id, "name": delta.name, "arguments": ""})
        elif delta.text and delta.call is None and not self.items:
            yield from self._open_message()
        if not delta.text:
            return
        item = self.items[-1]
        if item["type"] == "message":
            item["content"][0]["text"] += delta.text
            kind, more = "response.output_text.delta", {"content_index": 0, "logprobs": []}
        else:
            item["arguments"] += delta.text
            kind, more = "response.function_call_arguments.delta", {}
        yield {"type": kind, **self._place, **more, "delta": delta.text}

    def finish(self, status: str) -> Iterator[dict[str, Any]]:
        """Events of the end; an answer without text and calls is an empty message."""
        if not self.items:
            yield from self._open_message()
        yield from self._close(status)

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _open(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.items.append(item)
        shown = {**item, "content": []} if "content" in item else {**item}
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown}

    def _open_message(self) -> Iterator[dict[str, Any]]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant"}
        yield from self._open({**head, "status": "in_progress", "content": [part]})
        yield {"type": "response.content_part.added", **self._place, "content_index": 0, "part": {**part}}

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """Events of the end of the open item."""
        if not self.items:
            return
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            place, part = {**self._place, "content_index": 0}, item["content"][0]
            yield {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []}
            yield {"type": "response.content_part.done", **place, "part": part}
        else:
            fields = {"arguments": item["arguments"], "name": item["name"]}
            yield {"type": "response.function_call_arguments.done", **self._place, **fields}
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}
