"""What the server has and how it is: models, health, tokenizer."""

from __future__ import annotations

import time
from typing import Any, get_args

from litestar import Response, get, post
from litestar.datastructures import State
from litestar.params import FromPath, JSONBody

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.sampling_params import Order
from serve.api.depth import THRESHOLDS, Terms, efforts, resolve_depth
from serve.api.frontend import Frontend
from serve.api.metrics import CONTENT_TYPE
from serve.api.request_parsing import model_names
from serve.api.schemas import DetokenizeRequest, SamplingBody, TokenizeRequest
from serve.engine.events import State as EngineState
from serve.errors import invalid

STARTED = int(time.time())


@get("/health", summary="Whether the process is alive", tags=["operations"])
async def health(state: State) -> Response[dict[str, str]]:
    """200 while the process can recover by itself, draining and loading included; 503 once the engine has stopped."""
    engine = state.frontend.engine
    return Response(
        {"status": engine.state.value}, status_code=503 if engine.state is EngineState.STOPPED else 200
    )


@get("/ready", summary="Whether requests are accepted", tags=["operations"])
async def ready(state: State) -> Response[dict[str, str]]:
    """503 while the model loads and while the server drains."""
    engine = state.frontend.engine
    return Response(
        {"status": engine.state.value}, status_code=200 if engine.state is EngineState.READY else 503
    )


@get("/metrics", summary="Prometheus metrics", tags=["operations"], media_type=CONTENT_TYPE)
async def metrics(state: State) -> bytes:
    """Asks for a key where the server has any: figures about traffic are not for everyone."""
    return state.frontend.metrics.render()


@get("/v1/models", summary="Names this server answers to", tags=["models"])
async def models(state: State) -> dict[str, Any]:
    """The model and its aliases ``name:kN``; any N in the stated range works, listed or not."""
    frontend: Frontend = state.frontend
    return {
        "object": "list",
        "data": [_card(frontend, name) for name in model_names(frontend.name, frontend.served)],
    }


@get("/v1/models/{name:str}", summary="One model or alias", tags=["models"])
async def model(name: FromPath[str], state: State) -> dict[str, Any]:
    """Also for aliases that are not listed."""
    frontend: Frontend = state.frontend
    return _card(frontend, name)


def _card(frontend: Frontend, name: str) -> dict[str, Any]:
    """Raises ApiError 404 or 400 for a name that is neither the model's nor an alias of it."""
    served, config = frontend.served, frontend.served.config
    terms = Terms(frontend.name, served, served.default_steps)
    return {
        "id": name, "object": "model", "created": STARTED, "owned_by": "rdlm", "root": frontend.name,
        "max_model_len": served.max_len,
        "recurrence": {
            "num_steps": resolve_depth(SamplingBody(model=name), terms).num_steps, "min_steps": 1,
            "max_steps": served.max_steps, "default_steps": served.default_steps, "reasoning_effort": efforts(served),
            "exits": list(THRESHOLDS) if config.objective.k_meaning == "thinking" else [],
            "orders": [] if config.objective.masking is None else list(get_args(Order)),
            "meaning": _meaning(config), "kind": config.objective.k_meaning, "estimator": config.estimator,
            "objective": config.objective.name, "training_step": config.step,
        },
    }  # fmt: skip


def _meaning(config: CheckpointConfig) -> str:
    if config.objective.masking is not None:
        return "steps in which the hidden tokens of an answer come into sight; likelihoods are those of one token a step from left to right"
    return {
        "thinking": "core iterations before each token; likelihoods are those after K iterations",
        "sampling": "noise levels each token is drawn through; likelihoods are those at K = 1",
    }[config.objective.k_meaning]


@post("/tokenize", status_code=200, summary="Text to token ids", tags=["tokenizer"])
async def tokenize(data: JSONBody[TokenizeRequest], state: State) -> dict[str, Any]:
    """The text of a special token becomes its single id."""
    served = state.frontend.served
    tokenizer = served.tokenizer
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None and data.add_special_tokens else []
    tokens = start + tokenizer.encode(data.prompt)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": served.max_len}


@post("/detokenize", status_code=200, summary="Token ids to text", tags=["tokenizer"])
async def detokenize(data: JSONBody[DetokenizeRequest], state: State) -> dict[str, str]:
    """Special tokens decode to nothing."""
    tokenizer = state.frontend.served.tokenizer
    if any(token >= tokenizer.vocab_size for token in data.tokens):
        raise invalid(f"tokens: ids must lie below {tokenizer.vocab_size}", "tokens")
    return {"prompt": tokenizer.decode(data.tokens)}


@get("/tokenizer_info", summary="Special tokens and chat template", tags=["tokenizer"])
async def tokenizer_info(state: State) -> dict[str, Any]:
    """What lm-eval's remote tokenizer asks for."""
    tokenizer = state.frontend.served.tokenizer
    names = {i: text for text, i in tokenizer.special_tokens.items()}
    bos, eos = (None if i is None else names.get(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    return {
        "tokenizer_class": "rdlm", "vocab_size": tokenizer.vocab_size, "model_max_length": state.frontend.served.max_len,
        "bos_token": bos, "eos_token": eos, "pad_token": eos, "chat_template": tokenizer.chat_template,
    }  # fmt: skip
