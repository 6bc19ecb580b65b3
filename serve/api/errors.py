"""Exceptions to answers in OpenAI's form. Nothing here parses a URL: a Host header can make that fail."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException, ValidationException

from rdlm.errors import UserError
from serve.errors import ApiError, from_user_error, shorten

logger = logging.getLogger("rdlm.serve")
CLIENT_LEFT = "client disconnected prematurely"
"""Litestar's detail, in an error of the server's, where a client hangs up in the middle of its body."""


def _answer(
    request: Request[Any, Any, Any], error: ApiError, more_headers: Mapping[str, str] | None = None
) -> Response[dict[str, Any]]:
    request.app.state.server.metrics.refusals[error.status] += 1
    headers = {
        **error.headers,
        **(more_headers or {}),
        **({"WWW-Authenticate": "Bearer"} if error.status == 401 else {}),
    }
    return Response(error.body(), status_code=error.status, media_type=MediaType.JSON, headers=headers)


def _user_error(request: Request[Any, Any, Any], error: UserError) -> Response[dict[str, Any]]:
    return _answer(request, from_user_error(error))


def _http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[dict[str, Any]]:
    """Litestar's own refusals: wrong path or method, oversized bodies, parameters of the path."""
    if error.detail == CLIENT_LEFT:
        return _answer(request, ApiError(499, error.detail, "client_error"))
    message = error.detail
    method, path = request.scope["method"], request.scope["path"]
    if error.status_code == 404:
        message = f"there is no route {path!r} here; /schema lists them"
    if error.status_code == 405:
        message = f"{path} does not take {shorten(method)}; use {(error.headers or {}).get('allow')}"
    if error.status_code == 413:
        most = request.app.state.server.settings.max_body_bytes
        message = f"the body has more than {most} bytes; send less, or start the server with --max-body-bytes"
    if isinstance(error, ValidationException) and isinstance(error.extra, list) and error.extra:
        key = error.extra[0].get("key", "the request")
        is_empty = key == "data"  # the routes' name for the body
        message = (
            "the body is empty; send a JSON object" if is_empty else f"{key}: {error.extra[0]['message']}"
        )
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return _answer(request, ApiError(error.status_code, shorten(message, 400), kind), error.headers)


def _defect(request: Request[Any, Any, Any], error: Exception) -> Response[dict[str, Any]]:
    logger.error(
        "a defect while answering %s %s", request.scope["method"], request.scope["path"], exc_info=error
    )
    return _answer(request, ApiError(500, "the server has a defect; its log has the details", "server_error"))


EXCEPTION_HANDLERS: dict[int | type[Exception], Any] = {
    ApiError: _answer,
    UserError: _user_error,
    HTTPException: _http_error,
    Exception: _defect,
}
