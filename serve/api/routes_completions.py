"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from litestar import Request, Response, post
from litestar.datastructures import State
from litestar.params import JSONBody

from serve.api.answering import StepsHeader, accepts, chunks, collect, until_disconnect
from serve.api.frontend import Frontend
from serve.api.openai_format import (
    CompletionLogprobs,
    completion_piece,
    envelope,
    merge_completion,
    prompt_scores,
)
from serve.api.request_parsing import completion_job
from serve.api.schemas import CompletionRequest
from serve.api.streaming import PING_SECONDS, event_stream
from serve.api.subscription import Subscription
from serve.engine.events import Event


@post(
    "/v1/completions",
    status_code=200,
    summary="Continue one or several prompts",
    tags=["generation"],
    guards=[accepts],
)
async def completions(
    data: JSONBody[CompletionRequest],
    request: Request[Any, Any, Any],
    state: State,
    x_num_steps: StepsHeader = None,
) -> Response[Any]:
    """OpenAI's completions with ``num_steps``; with echo and logprobs it also scores prompts."""
    frontend: Frontend = state.frontend
    job = completion_job(data, frontend.terms(x_num_steps))
    frontend.note(job)
    head = envelope("text_completion", job, "cmpl")
    scribes = [
        CompletionLogprobs(frontend.token_names) if data.logprobs is not None else None for _ in job.requests
    ]

    def piece(event: Event, is_first: bool) -> dict[str, Any]:
        scores = prompt_scores(frontend.token_names, job, event) if is_first else {}
        return completion_piece(job, bool(data.echo), event, scribes[event.index], is_first) | scores

    if data.stream:
        subscription = Subscription(frontend.engine, job.requests, PING_SECONDS)
        return event_stream(chunks(frontend, job, head, piece, data, subscription))
    return Response(head | await until_disconnect(request, collect(frontend, job, piece, merge_completion)))
