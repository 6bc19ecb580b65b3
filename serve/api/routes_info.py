"""What the server has and how it is: models, tokenizer, health, metrics, and the page to try it."""

from __future__ import annotations

import time
from functools import cache
from importlib.resources import files
from typing import Any, get_args

from litestar import MediaType, Response, get, post
from litestar.datastructures import State
from litestar.params import FromPath, JSONBody

from rdlm import __version__
from rdlm.exit_criteria import CRITERIA
from rdlm.sampling_params import Order, samplers_of
from serve.api.observability import METRICS_TYPE
from serve.api.request_parsing import in_thread_if_large
from serve.api.schemas import DetokenizeRequest, TokenizeRequest
from serve.api.state import ServerState
from serve.engine.engine import State as EngineState
from serve.engine.exits import default_thresholds
from serve.errors import invalid

STARTED = int(time.time())
CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The browser itself refuses whatever is not on the page or this server."""


@get("/health", summary="Whether the process is alive", tags=["operations"])
async def health(state: State) -> Response[dict[str, str]]:
    """200 while the process can recover by itself, draining and loading included; 503 once the engine has
    stopped.
    """
    return _health(state)


def _health(state: State) -> Response[dict[str, str]]:
    engine = state.server.engine
    return Response(
        {"status": engine.state.value}, status_code=503 if engine.state is EngineState.STOPPED else 200
    )


@get("/ping", summary="The same as /health", tags=["operations"])
async def ping(state: State) -> Response[dict[str, str]]:
    """What SageMaker and vLLM's clients ask for."""
    return _health(state)


@get("/version", summary="Version of rdlm", tags=["operations"])
async def version() -> dict[str, str]:
    """Of the package; the checkpoint's is in /v1/models."""
    return {"version": __version__}


@get("/ready", summary="Whether requests are accepted", tags=["operations"])
async def ready(state: State) -> Response[dict[str, str]]:
    """503 while the model loads and while the server drains."""
    engine = state.server.engine
    return Response(
        {"status": engine.state.value}, status_code=200 if engine.state is EngineState.READY else 503
    )


@get("/metrics", summary="Prometheus metrics", tags=["operations"])
async def metrics(state: State) -> Response[bytes]:
    """Asks for a key where the server has any: figures about traffic are not for everyone."""
    return Response(state.server.metrics.render(), headers={"Content-Type": METRICS_TYPE})


@get("/v1/models", summary="Names this server answers to", tags=["models"])
async def models(state: State) -> dict[str, Any]:
    """The model, and its aliases ``name:kN`` for powers of two, the default and the largest K; any N in the
    stated range works. An alias says its K alone: the rest is the model's.
    """
    server: ServerState = state.server
    most, default = server.served.max_steps, server.served.default_steps
    listed = sorted({1 << i for i in range(most.bit_length())} | {default, most})
    card = _card(server, server.name)
    aliases = [{**card, "id": f"{server.name}:k{k}", "recurrence": {"num_steps": k}} for k in listed]
    return {"object": "list", "data": [card, *aliases]}


@get("/v1/models/{name:path}", summary="One model or alias", tags=["models"])
async def model(name: FromPath[str], state: State) -> dict[str, Any]:
    """Also for aliases that are not listed. A name may have slashes, as on the hub."""
    return _card(state.server, name.removeprefix("/"))


def _card(server: ServerState, name: str) -> dict[str, Any]:
    """Raises ApiError 404 or 400 for a name that is neither the model's nor an alias of it."""
    served, config = server.served, server.served.config
    thresholds = default_thresholds(config)
    recurrence = {
        "num_steps": server.model_steps(name) or served.default_steps,
        "min_steps": 1,
        "max_steps": served.max_steps,
        "default_steps": served.default_steps,
        "trained_steps": config.trained_steps,
        "reasoning_effort": server.efforts,
        "exits": list(thresholds),
        "exit_criteria": {
            name: {"default_threshold": threshold, "description": CRITERIA[name].description}
            for name, threshold in thresholds.items()
        },
        "samplers": samplers_of(config),
        "capabilities": [*served.runner.guesses],
        "orders": [] if server.left_to_right else list(get_args(Order)),
        "meaning": server.meaning,
        "kind": config.objective.k_meaning,
        "estimator": config.objective.estimator,
        "objective": config.objective.name,
        "training_step": config.step,
    }
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "rdlm",
        "root": server.name,
        "max_model_len": served.max_len,
        "chat": served.tokenizer.chat_template is not None,
        "sampling_defaults": dict(served.sampling_defaults),
        "recurrence": recurrence,
    }


@post("/tokenize", status_code=200, summary="Text to token ids", tags=["tokenizer"])
async def tokenize(data: JSONBody[TokenizeRequest], state: State) -> dict[str, Any]:
    """The text of a special token becomes its single id."""
    served = state.server.served
    state.server.model_steps(data.model)
    tokenizer = served.tokenizer
    start = [*tokenizer.start] if data.add_special_tokens else []
    tokens = start + await in_thread_if_large(len(data.prompt), tokenizer.encode, data.prompt)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": served.max_len}


@post("/detokenize", status_code=200, summary="Token ids to text", tags=["tokenizer"])
async def detokenize(data: JSONBody[DetokenizeRequest], state: State) -> dict[str, str]:
    """Special tokens decode to nothing."""
    tokenizer = state.server.served.tokenizer
    state.server.model_steps(data.model)
    if any(token >= tokenizer.vocab_size for token in data.tokens):
        raise invalid(f"tokens: ids must lie below {tokenizer.vocab_size}", "tokens")
    return {"prompt": await in_thread_if_large(len(data.tokens), tokenizer.decode, data.tokens)}


@get("/tokenizer_info", summary="Special tokens and chat template", tags=["tokenizer"])
async def tokenizer_info(state: State) -> dict[str, Any]:
    """What lm-eval's remote tokenizer asks for."""
    tokenizer = state.server.served.tokenizer
    names = {i: text for text, i in tokenizer.special_tokens.items()}
    bos, eos = (None if i is None else names.get(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    return {
        "tokenizer_class": "rdlm",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": state.server.served.max_len,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "chat_template": tokenizer.chat_template,
    }


@cache
def _page() -> bytes:
    return files("serve").joinpath("page.html").read_bytes()


@get("/", include_in_schema=False)
async def page() -> Response[bytes]:
    """A page to try the model from a browser: one file, nothing from elsewhere. Answered without a key: the
    page asks for one.
    """
    headers = {"Content-Security-Policy": CONTENT_POLICY, "Cache-Control": "no-cache"}
    return Response(_page(), media_type=MediaType.HTML, headers=headers)
