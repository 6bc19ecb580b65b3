"""Request ids, the access log, and log records as JSON lines. Plain ASGI and logging: it sees every answer, refusals included."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from contextvars import ContextVar
from typing import Any, Literal

from litestar.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("rdlm.serve.access")
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that the current task answers."""
_SAFE_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What is taken over from a client: printable ASCII cannot forge a log line or a header."""


class RequestLog:
    """Gives each request an id (the client's ``x-request-id``, else a new one), returns it, and logs one line per answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
        identifier = given if _SAFE_ID.fullmatch(given) else secrets.token_hex(12)
        began, status = time.monotonic(), 499  # what a client that left before the answer would have got
        token = request_id.set(identifier)

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identifier.encode())]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            facts = {"method": scope.get("method", ""), "path": scope["path"], "status": status}
            facts["seconds"] = round(time.monotonic() - began, 4)
            logger.info("%(method)s %(path)s %(status)s", facts, extra={"facts": facts})
            request_id.reset(token)


class JsonLines(logging.Formatter):
    """One JSON object per record: time (UTC seconds), level, logger, message, request_id, the access log's fields, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(), "request_id": request_id.get(),
        }  # fmt: skip
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(log_format: Literal["text", "json"]) -> None:
    """Send this process's log to stderr: text is warnings and errors, json every answer too."""
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(JsonLines())
        logging.getLogger("rdlm").setLevel(logging.INFO)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
