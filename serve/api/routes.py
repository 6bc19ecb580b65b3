"""Routes that run the model: each parses the request, submits it, and formats the events that come back."""

from __future__ import annotations

import asyncio
from collections.abc import Sized
from contextlib import suppress
from typing import Any

from litestar import Request, Response, post
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.handlers.base import BaseRouteHandler
from litestar.params import JSONBody

from serve.api.chat_template import TooSlow
from serve.api.observability import FACTS
from serve.api.openai_format import ChatFormat, CompletionFormat, score_answer
from serve.api.request_parsing import (
    SMALL,
    Parsed,
    in_thread_if_large,
    parse_chat,
    parse_completion,
    parse_score,
    steps_in_header,
)
from serve.api.responses import CHAT_NAMES, ResponseFormat, ResponsesRequest
from serve.api.schemas import ChatRequest, CompletionRequest, ScoreRequest
from serve.api.state import ServerState
from serve.api.streaming import Chunks, collect, event_stream, last_events, submit, until_disconnect
from serve.errors import renamed

MESSAGE_SIZE = 64
"""Characters that rendering one more message is worth."""
QUICK_SECONDS = 0.05
"""Of rendering a short conversation on the event loop; a template that takes longer goes to a thread."""


def has_room(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Guard that refuses before the body is read. Raises EngineClosed (503) or QueueFull (429)."""
    connection.app.state.server.engine.check_room(1)


@post(
    "/v1/completions",
    status_code=200,
    guards=[has_room],
    summary="Continue one or several prompts",
    tags=["generation"],
)
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
        parsed = await in_thread_if_large(_size(data.prompt), parse_completion, data, server, steps)
    else:
        parsed = await server.in_compiler(parse_completion, data, server, steps)
    answer = CompletionFormat(parsed, server.token_names, data.logprobs is not None)
    events = submit(server, parsed, request, bool(data.stream))
    if data.stream:
        return event_stream(Chunks(answer, data.stream_options).of(events), parsed.headers)
    return Response(await until_disconnect(request, collect(events, answer)), headers=parsed.headers)


@post(
    "/v1/chat/completions",
    status_code=200,
    guards=[has_room],
    summary="Answer a conversation",
    tags=["generation"],
)
async def chat_completions(
    data: JSONBody[ChatRequest], request: Request[Any, Any, Any], state: State
) -> Response[Any]:
    """OpenAI's chat with ``num_steps``, through the tokenizer's chat template. K may be a header,
    X-Num-Steps.
    """
    server: ServerState = state.server
    request.scope[FACTS].update(data.identifiers)  # type: ignore[literal-required]
    parsed = await _parsed_chat(data, server, steps_in_header(request))
    answer = ChatFormat(parsed, server.token_names)
    events = submit(server, parsed, request, bool(data.stream))
    if data.stream:
        return event_stream(Chunks(answer, data.stream_options).of(events), parsed.headers)
    return Response(await until_disconnect(request, collect(events, answer)), headers=parsed.headers)


@post(
    "/v1/responses",
    status_code=200,
    guards=[has_room],
    summary="Answer a conversation, in the form of OpenAI's responses",
    tags=["generation"],
)
async def responses(
    data: JSONBody[ResponsesRequest], request: Request[Any, Any, Any], state: State
) -> Response[Any]:
    """OpenAI's responses with ``num_steps``, through the tokenizer's chat template. Nothing is stored."""
    server: ServerState = state.server
    request.scope[FACTS].update(data.identifiers)  # type: ignore[literal-required]
    chat, steps = data.as_chat(), steps_in_header(request)
    with renamed(CHAT_NAMES):
        parsed = await _parsed_chat(chat, server, steps)
    answer = ResponseFormat(data, parsed)
    events = submit(server, parsed, request, bool(data.stream))
    if data.stream:
        return event_stream(answer.stream(events), parsed.headers)
    return Response(await until_disconnect(request, answer.collect(events)), headers=parsed.headers)


@post(
    "/v1/score",
    status_code=200,
    guards=[has_room],
    summary="Log-probabilities of prompts at several K",
    tags=["scoring"],
)
async def score(data: JSONBody[ScoreRequest], request: Request[Any, Any, Any], state: State) -> Response[Any]:
    """The trajectory is shared: scoring at K = 1, 4 and 16 costs 16 core steps a position and three
    read-outs.
    """
    server: ServerState = state.server
    parsed, ks = await in_thread_if_large(
        _size(data.prompt), parse_score, data, server, steps_in_header(request)
    )
    events = await until_disconnect(request, last_events(submit(server, parsed, request)))
    return Response(
        score_answer(parsed, server.token_names, ks, server.served.config.objective.estimator, events),
        headers=parsed.headers,
    )


async def _parsed_chat(body: ChatRequest, server: ServerState, steps: int | None) -> Parsed:
    if body.constraint is not None or body.tools:
        return await server.in_compiler(parse_chat, body, server, steps)
    size = sum(MESSAGE_SIZE + len(message.content) for message in body.messages)
    if size <= SMALL:
        with suppress(TooSlow):
            return parse_chat(body, server, steps, QUICK_SECONDS)
    return await asyncio.to_thread(parse_chat, body, server, steps)


def _size(prompts: Any) -> int:
    """Characters and ids of all prompts."""
    found: list[Sized] = prompts
    return sum(len(prompt) for prompt in found)
