"""Routes that run the model: each parses the request, submits it, and formats the events that come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sized
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from litestar import Request, Response, post
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.handlers.base import BaseRouteHandler
from litestar.params import JSONBody
from litestar.response import Stream

from serve.api.chat_template import TooSlow
from serve.api.observability import FACTS
from serve.api.openai_format import Answer, ChatAnswer
from serve.api.request_parsing import (
    SMALL,
    in_thread_if_large,
    parse_chat,
    parse_completion,
    parse_score,
    steps_in_header,
)
from serve.api.responses import CHAT_NAMES, ResponseAnswer, ResponsesRequest
from serve.api.schemas import ChatRequest, CompletionRequest, ScoreRequest
from serve.api.state import ServerState
from serve.api.streaming import MAX_UNREAD, EngineEvents
from serve.errors import ApiError, renamed

T = TypeVar("T")
MESSAGE_SIZE = 64
"""Characters that rendering one more message is worth."""
QUICK_SECONDS = 0.05
"""Longest time of rendering a short conversation on the event loop; a slower template goes to a thread."""


def has_room(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Guard that refuses before the body is read. Raises EngineClosed (503) or QueueFull (429)."""
    connection.app.state.server.engine.check_room(1)


model_route = partial(post, status_code=200, guards=[has_room])
"""A route that runs the model."""


@model_route("/v1/completions", summary="Continue one or several prompts", tags=["generation"])
async def completions(
    data: JSONBody[CompletionRequest], request: Request[Any, Any, Any], state: State
) -> Response[Any]:
    """OpenAI's completions with ``num_steps``; with echo and logprobs it also scores prompts. K may be a
    header, X-Num-Steps.
    """
    server: ServerState = state.server
    request.scope[FACTS].update(data.identifiers)  # type: ignore[literal-required]
    steps = steps_in_header(request)
    if data.constraint is None:
        answer = await in_thread_if_large(_size(data.prompt), parse_completion, data, server, steps)
    else:
        answer = await server.in_compiler(parse_completion, data, server, steps)
    return await _reply(answer, server, request, bool(data.stream))


@model_route("/v1/chat/completions", summary="Answer a conversation", tags=["generation"])
async def chat_completions(
    data: JSONBody[ChatRequest], request: Request[Any, Any, Any], state: State
) -> Response[Any]:
    """OpenAI's chat with ``num_steps``, through the tokenizer's chat template. K may be a header,
    X-Num-Steps.
    """
    server: ServerState = state.server
    request.scope[FACTS].update(data.identifiers)  # type: ignore[literal-required]
    answer = await _parsed_chat(data, server, steps_in_header(request))
    return await _reply(answer, server, request, bool(data.stream))


@model_route(
    "/v1/responses", summary="Answer a conversation, in the form of OpenAI's responses", tags=["generation"]
)
async def responses(
    data: JSONBody[ResponsesRequest], request: Request[Any, Any, Any], state: State
) -> Response[Any]:
    """OpenAI's responses with ``num_steps``, through the tokenizer's chat template. Nothing is stored."""
    server: ServerState = state.server
    request.scope[FACTS].update(data.identifiers)  # type: ignore[literal-required]
    chat, steps = data.as_chat(), steps_in_header(request)
    with renamed(CHAT_NAMES):
        answer = await _parsed_chat(chat, server, steps, partial(ResponseAnswer, body=data))
    return await _reply(answer, server, request, bool(data.stream))


@model_route("/v1/score", summary="Log-probabilities of prompts at several K", tags=["scoring"])
async def score(data: JSONBody[ScoreRequest], request: Request[Any, Any, Any], state: State) -> Response[Any]:
    """The trajectory is shared: scoring at K = 1, 4 and 16 costs 16 core steps a position and three
    read-outs.
    """
    server: ServerState = state.server
    size, steps = _size(data.prompt), steps_in_header(request)
    answer = await in_thread_if_large(size, parse_score, data, server, steps)
    return await _reply(answer, server, request)


async def _reply(
    answer: Answer, server: ServerState, request: Request[Any, Any, Any], stream: bool = False
) -> Response[Any]:
    """Queue all engine requests of ``answer`` or none, and send what becomes of them. Raises EngineClosed or
    QueueFull.

    A stream ends when its client leaves too many events unread, except where a masked model draws whole
    answers in one step.
    """
    server.metrics.brownouts += answer.browned_out
    facts: dict[str, Any] = request.scope[FACTS]  # type: ignore[literal-required]
    facts["num_steps"] = answer.budget.num_steps
    most = MAX_UNREAD if stream and server.left_to_right else None
    events = EngineEvents(server.engine, answer.requests, most, facts)
    if stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **answer.headers}
        body = answer.stream(events)  # a client that leaves cancels it, and with it the work
        return Stream(body, media_type="text/event-stream", headers=headers, status_code=200)
    return Response(await _until_disconnect(request, answer.collect(events)), headers=answer.headers)


async def _until_disconnect(request: Request[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, cancelled as soon as the client has gone. Raises ApiError 499 then (nobody
    reads it).
    """
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection", "client_error")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()


async def _disconnected(request: Request[Any, Any, Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _parsed_chat(
    body: ChatRequest, server: ServerState, steps: int | None, make: Callable[..., ChatAnswer] = ChatAnswer
) -> ChatAnswer:
    if body.constraint is not None or body.tools:
        return await server.in_compiler(parse_chat, body, server, steps, make=make)
    size = sum(MESSAGE_SIZE + len(message.content) for message in body.messages)
    if size <= SMALL:
        with suppress(TooSlow):
            return parse_chat(body, server, steps, QUICK_SECONDS, make)
    return await asyncio.to_thread(parse_chat, body, server, steps, make=make)


def _size(prompts: Any) -> int:
    """Characters and ids of all prompts."""
    found: list[Sized] = prompts
    return sum(len(prompt) for prompt in found)
