"""The ASGI application: routes, guards, limits, OpenAPI. No torch."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from typing import Any, cast

import msgspec
from litestar import Litestar, Request, Router
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.exceptions import NotFoundException
from litestar.handlers.base import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.plugins.pydantic import PydanticPlugin
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from rdlm import __version__
from serve.api.errors import EXCEPTION_HANDLERS
from serve.api.observability import FACTS, request_id, traced
from serve.api.openai_format import WARNING_HEADER
from serve.api.request_parsing import JsonRequest
from serve.api.routes import chat_completions, completions, responses, score
from serve.api.routes_info import (
    detokenize,
    health,
    metrics,
    model,
    models,
    page,
    ping,
    ready,
    tokenize,
    tokenizer_info,
    version,
)
from serve.api.state import ServerState
from serve.engine.engine import Engine
from serve.errors import ApiError, invalid
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
    ping,
    ready,
    version,
    metrics,
    page,
]
access = logging.getLogger("rdlm.serve.access")
_SAFE_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What is taken over from a client: printable ASCII cannot forge a log line or a header."""
OPEN_PATHS = ("/health", "/ping", "/ready", "/version", "/schema")
"""Answered without a key: load balancers and people reading the documentation have none."""


def create_app(engine: Engine, settings: HttpSettings) -> Litestar:
    """The application around an engine that may still be loading. Whoever started the engine stops it."""
    description = "Completions and chat from recurrent-depth models; `num_steps` chooses K per request."
    app = Litestar(
        ROUTES,
        state=State({"server": ServerState(engine, settings)}),
        guards=[_check_host, _check_repeated, _check_key],
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


def _check_repeated(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Raises ApiError 400 for a header that has one value and was sent twice: a proxy may have read the other."""
    names = [name for name, _ in connection.scope["headers"]]
    for name in (b"authorization", b"content-type", b"content-encoding"):
        if names.count(name) > 1:
            shown = name.decode()
            raise invalid(f"{shown}: the header was sent {names.count(name)} times; send it once", shown)


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
    """A hash of the key: of equal length for all keys, so that comparing gives no length away."""
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


class Outermost:
    """Around the whole application, so that it sees every answer, refusals of the framework included.

    Gives each request an id (the client's ``x-request-id``, else a new one), logs one line for each answer,
    answers HEAD as GET without a body, and turns the server's cancellation of what outlives its last grace
    period into a 503.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
        request = cast(dict[str, Any], scope)
        method = request["method"]
        answer = _Answer(given if _SAFE_ID.fullmatch(given) else secrets.token_hex(12), method, send)
        facts: dict[str, Any] = {"method": method, "path": scope["path"]}
        request[FACTS] = facts
        began = time.monotonic()
        token = request_id.set(answer.identifier)
        if method == "HEAD":
            request["method"] = "GET"
        try:
            await self._app(scope, receive, answer.send)
        except asyncio.CancelledError:
            if answer.status is None:
                await answer.refuse(
                    ApiError(
                        503,
                        "the server stopped before the answer was complete",
                        "server_error",
                        code="aborted",
                    )
                )
        finally:
            # 499 is what a client that left before the answer would have got
            facts |= {"status": answer.status or 499, "seconds": round(time.monotonic() - began, 4)}
            access.info(access_line(facts), extra={"facts": facts})
            request_id.reset(token)


def access_line(facts: dict[str, Any]) -> str:
    """One answer in words. What a client chose is escaped, so that it cannot forge another line."""
    path = ascii(facts["path"][:200])[1:-1]
    line = f"{facts['method']} {path} {facts['status']} {1000 * facts['seconds']:.0f} ms"
    if "num_steps" in facts:
        line += f", {facts.get('tokens', 0)} tokens, K = {facts['num_steps']}"
    return line


class _Answer:
    """The way back to the client of one request."""

    def __init__(self, identifier: str, method: str, send: Send) -> None:
        self.identifier, self._send = identifier, send
        self._has_body = method != "HEAD"
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self.identifier.encode())]
        elif message["type"] == "http.response.body" and not self._has_body:
            message["body"] = b""
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        body = msgspec.json.encode(error.body())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})
