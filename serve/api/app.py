"""The ASGI application: routes, errors in OpenAI's form, keys, limits, OpenAPI. No torch."""

from __future__ import annotations

import hashlib
import hmac
import logging
from typing import Any

from litestar import Litestar, MediaType, Request, Response
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.exceptions import HTTPException, ValidationException
from litestar.handlers.base import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.plugins.pydantic import PydanticPlugin

from rdlm import __version__
from rdlm.errors import UserError
from serve.api.frontend import Frontend
from serve.api.logs import RequestLog
from serve.api.routes_chat import chat_completions
from serve.api.routes_completions import completions
from serve.api.routes_info import detokenize, health, metrics, model, models, ready, tokenize, tokenizer_info
from serve.api.routes_page import page
from serve.api.routes_score import score
from serve.api.tracing import traced
from serve.engine.engine import Engine
from serve.errors import ApiError, from_user_error, invalid
from serve.settings import HttpSettings

CLIENT_LEFT = "client disconnected prematurely"
"""What Litestar says, as an error of the server's, where a client hangs up in the middle of its body."""
logger = logging.getLogger("rdlm.serve")
OPEN_PATHS = ("/health", "/ready", "/schema")
"""Answered without a key: load balancers and people reading the documentation have none."""


def create_app(engine: Engine, settings: HttpSettings) -> Litestar:
    """The application around an engine that may still be loading. Whoever started the engine stops it."""
    app = Litestar(
        [page, completions, chat_completions, score, models, model, health, ready, metrics, tokenize, detokenize, tokenizer_info],
        state=State({"frontend": Frontend(engine, settings)}),
        guards=[_require_key],
        exception_handlers={
            ApiError: _api_error, UserError: _user_error, HTTPException: _http_error, RecursionError: _too_deep, Exception: _defect
        },
        request_max_body_size=settings.max_body_bytes,
        cors_config=_cors(settings),
        plugins=[PydanticPlugin(validate_strict=True)],
        openapi_config=OpenAPIConfig(
            title="rdlm", version=__version__, path="/schema",
            description="OpenAI-compatible completions and chat from recurrent-depth models; `num_steps` chooses K per request.",
        ),
        logging_config=None,
    )  # fmt: skip
    app.asgi_handler = RequestLog(
        app.asgi_handler
    )  # around everything: Litestar's middleware misses wrong paths and methods
    if settings.tracing:
        app.asgi_handler = traced(app.asgi_handler)
    return app


def _require_key(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Bearer key, compared in constant time against every accepted one."""
    keys = connection.app.state.frontend.settings.api_keys
    if not keys or connection.url.path == "/" or connection.url.path.startswith(OPEN_PATHS):
        return
    given = _digest(connection.headers.get("authorization", "").removeprefix("Bearer "))
    if not any([hmac.compare_digest(given, _digest(key)) for key in keys]):  # a list: no key is skipped
        raise ApiError(
            401,
            "missing or wrong API key; send it as 'Authorization: Bearer KEY'",
            "authentication_error",
            code="invalid_api_key",
        )


def _digest(key: str) -> bytes:
    """Of equal length for all keys, which a comparison of the keys themselves would give away."""
    return hashlib.sha256(key.encode()).digest()


def _cors(settings: HttpSettings) -> CORSConfig | None:
    if not settings.cors_origins:
        return None
    return CORSConfig(
        allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-request-id", "x-num-steps"], expose_headers=["x-request-id", "retry-after"],
    )  # fmt: skip


def _answer(request: Request[Any, Any, Any], error: ApiError) -> Response[dict[str, Any]]:
    request.app.state.frontend.metrics.refusals[error.status] += 1
    headers = {**error.headers, **({"WWW-Authenticate": "Bearer"} if error.status == 401 else {})}
    return Response(error.body(), status_code=error.status, media_type=MediaType.JSON, headers=headers)


def _api_error(request: Request[Any, Any, Any], error: ApiError) -> Response[dict[str, Any]]:
    return _answer(request, error)


def _user_error(request: Request[Any, Any, Any], error: UserError) -> Response[dict[str, Any]]:
    return _answer(request, from_user_error(error))


def _http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[dict[str, Any]]:
    """Litestar's own refusals: malformed JSON, unknown fields, wrong path or method, oversized bodies."""
    if isinstance(error, ValidationException) and isinstance(error.extra, list) and error.extra:
        first = error.extra[0]
        param, message = (
            str(first.get("key") or "") or None,
            str(first["message"]).removeprefix("Value error, "),
        )
        if param and first.get("source") == "header":
            param = param.replace("_", "-")  # as it is sent, and not as the handler's argument is called
        return _answer(request, invalid(f"{param}: {message}" if param else message, param))
    if error.detail == CLIENT_LEFT:
        return _answer(request, ApiError(499, error.detail, "client_error"))
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return _answer(request, ApiError(error.status_code, error.detail, kind))


def _too_deep(request: Request[Any, Any, Any], _: RecursionError) -> Response[dict[str, Any]]:
    """The JSON decoder gives up on brackets within brackets; nothing else here recurses over what a client sent."""
    return _answer(request, invalid("the body is nested too deeply"))


def _defect(request: Request[Any, Any, Any], error: Exception) -> Response[dict[str, Any]]:
    logger.error("a defect while answering %s %s", request.method, request.url.path, exc_info=error)
    return _answer(request, ApiError(500, "the server has a defect; its log has the details", "server_error"))
