"""POST /v1/score: log-probabilities of a prompt at many K from one pass."""

from __future__ import annotations

from typing import Any

from litestar import Request, Response, post
from litestar.datastructures import State
from litestar.params import JSONBody

from serve.api.answering import accepts, until_disconnect
from serve.api.frontend import Frontend
from serve.api.openai_format import envelope, finite, usage_of
from serve.api.request_parsing import Job, score_job
from serve.api.schemas import ScoreRequest
from serve.api.subscription import Subscription
from serve.engine.events import Event


@post(
    "/v1/score",
    status_code=200,
    summary="Log-probabilities of prompts at several K",
    tags=["scoring"],
    guards=[accepts],
)
async def score(data: JSONBody[ScoreRequest], request: Request[Any, Any, Any], state: State) -> Response[Any]:
    """The trajectory is shared: scoring at K = 1, 4 and 16 costs 16 core steps a position and three read-outs."""
    frontend: Frontend = state.frontend
    job, ks = score_job(data, frontend.terms())
    ends = await until_disconnect(request, _ends(frontend, job))
    scores = [_scores(frontend, job, ks, event) for event in ends]
    body = {"num_steps": ks, "estimator": frontend.served.config.estimator, "scores": scores}
    return Response(
        envelope("score", job, "score") | body | {"usage": usage_of(job, [e.usage for e in ends if e.usage])}
    )


async def _ends(frontend: Frontend, job: Job) -> list[Event]:
    """The last event of each prompt, in their order: nothing is drawn, so it is the only one."""
    subscription = Subscription(frontend.engine, job.requests)
    try:
        return sorted([event async for event in subscription.events()], key=lambda event: event.index)
    finally:
        subscription.cancel()


def _scores(frontend: Frontend, job: Job, ks: list[int], event: Event) -> dict[str, Any]:
    """token_logprobs: by K, one entry a token, the first null. logprob: by K, their sum."""
    prompt = job.requests[event.index].prompt
    found = event.sweep or {ks[0]: event.prompt_logprobs or []}
    values = {str(k): [finite(entry.logprob) for entry in found[k]] for k in ks}
    return {
        "index": event.index, "tokens": [frontend.token_names.name(i) for i in prompt], "token_ids": prompt,
        "token_logprobs": {k: [None, *logprobs] for k, logprobs in values.items()},
        "logprob": {k: sum(logprobs) for k, logprobs in values.items()},
    }  # fmt: skip
