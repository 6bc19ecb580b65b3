"""The ASGI application: routes, guards, limits, OpenAPI. No torch."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Any

from litestar import Litestar, Request, Router
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.exceptions import NotFoundException
from litestar.handlers.base import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.plugins.pydantic import PydanticPlugin

from rdlm import __version__
from serve.api.errors import EXCEPTION_HANDLERS
from serve.api.observability import Outermost, traced
from serve.api.request_parsing import WARNING_HEADER, JsonRequest
from serve.api.routes import chat_completions, completions, responses, score
from serve.api.routes_info import (
    detokenize,
    health,
    metrics,
    model,
    models,
    page,
    ready,
    tokenize,
    tokenizer_info,
)
from serve.api.state import ServerState
from serve.engine.engine import Engine
from serve.errors import ApiError
from serve.settings import HttpSettings

ROUTES = [
    completions,
    chat_completions,
    responses,
    score,
    models,
    model,
    tokenize,
    detokenize,
    tokenizer_info,
    health,
    ready,
    metrics,
    page,
]
OPEN_PATHS = ("/health", "/ready", "/schema")
"""Answered without a key: load balancers and people reading the documentation have none."""


def create_app(engine: Engine, settings: HttpSettings) -> Litestar:
    """The application around an engine that may still be loading. Whoever started the engine stops it."""
    description = "Completions and chat from recurrent-depth models; `num_steps` chooses K per request."
    app = Litestar(
        ROUTES,
        state=State({"server": ServerState(engine, settings)}),
        guards=[_check_host, _check_key],
        exception_handlers=EXCEPTION_HANDLERS,
        request_class=JsonRequest,
        request_max_body_size=settings.max_body_bytes,
        cors_config=_cors(settings),
        plugins=[PydanticPlugin()],  # for the OpenAPI document
        openapi_config=OpenAPIConfig(
            title="rdlm",
            version=__version__,
            description=description,
            openapi_router=Router(
                "/schema", route_handlers=[], include_in_schema=False, before_request=_check_schema_path
            ),
        ),
        logging_config=None,
    )
    app.asgi_handler = Outermost(app.asgi_handler)  # Litestar's middleware misses wrong paths and methods
    if settings.tracing:
        app.asgi_handler = traced(app.asgi_handler)
    return app


async def _check_schema_path(request: Request[Any, Any, Any]) -> None:
    """Raises NotFoundException where only Litestar's own page of an error would answer."""
    if request.path_params:
        raise NotFoundException


def _check_host(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Raises ApiError 403 for a Host that is not allowed: web pages can give their names this server's
    address."""
    allowed = connection.app.state.server.settings.allowed_hosts
    host = re.sub(r":[^\]:]*$", "", connection.headers.get("host", "")).lower()
    if allowed and "*" not in allowed and host not in allowed:
        problem = "this Host is not allowed; name the server by its address, or start it with --allowed-host"
        raise ApiError(403, problem, "invalid_request_error", "Host", "host_not_allowed")


def _check_key(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Bearer key, compared in constant time against every accepted one. Raises ApiError 401."""
    keys, path = connection.app.state.server.settings.api_keys, connection.scope["path"]
    if not keys or path == "/" or path.startswith(OPEN_PATHS):
        return
    header = connection.headers.get("authorization", "")
    given = _digest(header[7:].strip() if header[:7].lower() == "bearer " else "")
    matches = [
        hmac.compare_digest(given, _digest(accepted)) for accepted in keys
    ]  # a list: no key is skipped
    if not any(matches):
        problem = "missing or wrong API key; send it as 'Authorization: Bearer KEY'"
        raise ApiError(401, problem, "authentication_error", code="invalid_api_key")


def _digest(key: str) -> bytes:
    """Of equal length for all keys, which a comparison of the keys themselves would give away."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _cors(settings: HttpSettings) -> CORSConfig | None:
    """Any header is allowed: clients add their own (x-stainless-...), and none grants anything here."""
    if not settings.cors_origins:
        return None
    return CORSConfig(
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after", WARNING_HEADER.lower()],
    )
