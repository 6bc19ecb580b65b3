"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from litestar import Request, Response, post
from litestar.datastructures import State
from litestar.params import JSONBody

from serve.api.answering import StepsHeader, accepts, chunks, collect, until_disconnect
from serve.api.frontend import Frontend
from serve.api.openai_format import TokenNames, chat_logprobs, envelope, merge_steps, prompt_scores, steps_of
from serve.api.request_parsing import Job, chat_job
from serve.api.schemas import ChatRequest
from serve.api.streaming import PING_SECONDS, event_stream
from serve.api.subscription import Subscription
from serve.engine.events import Event


@post(
    "/v1/chat/completions",
    status_code=200,
    summary="Answer a conversation",
    tags=["generation"],
    guards=[accepts],
)
async def chat_completions(
    data: JSONBody[ChatRequest],
    request: Request[Any, Any, Any],
    state: State,
    x_num_steps: StepsHeader = None,
) -> Response[Any]:
    """OpenAI's chat with ``num_steps``, through the tokenizer's chat template."""
    frontend: Frontend = state.frontend
    job = chat_job(data, frontend.terms(x_num_steps))
    frontend.note(job)

    def piece(event: Event, is_first: bool) -> dict[str, Any]:
        scores = prompt_scores(frontend.token_names, job, event) if is_first else {}
        return _delta(frontend.token_names, job, event, is_first) | scores

    if data.stream:
        head = envelope("chat.completion.chunk", job, "chatcmpl")
        subscription = Subscription(frontend.engine, job.requests, PING_SECONDS)
        return event_stream(chunks(frontend, job, head, piece, data, subscription))
    head = envelope("chat.completion", job, "chatcmpl")
    return Response(head | await until_disconnect(request, collect(frontend, job, piece, _merge)))


def _delta(names: TokenNames, job: Job, event: Event, is_first: bool) -> dict[str, Any]:
    """The role comes with the first token, not before it: clients time the first chunk as the first token."""
    role = {"role": "assistant"} if is_first else {}
    logprobs = None
    if event.token is not None and event.logprobs is not None:
        logprobs = {"content": [chat_logprobs(names, event.token, event.logprobs)]}
    return {
        "index": event.index, "delta": {**role, "content": event.text}, "logprobs": logprobs, "finish_reason": event.finish,
    } | steps_of(job, event)  # fmt: skip


def _merge(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    content = [
        entry for piece in pieces if piece["logprobs"] is not None for entry in piece["logprobs"]["content"]
    ]
    return (
        {
            "index": pieces[-1]["index"],
            "message": {
                "role": "assistant",
                "content": "".join(piece["delta"]["content"] for piece in pieces),
            },
            "logprobs": {"content": content} if content else None,
            "finish_reason": pieces[-1]["finish_reason"],
        }
        | {key: pieces[0][key] for key in ("prompt_logprobs",) if key in pieces[0]}
        | merge_steps(pieces)
    )
