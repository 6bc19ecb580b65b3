"""Server-sent events as bytes. Events end with a bare blank line ("\\n\\n"): common clients split on nothing else."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from litestar.response import Stream

from serve.errors import ApiError

logger = logging.getLogger("rdlm.serve")
DONE = b"data: [DONE]\n\n"
PING_SECONDS = 15.0
"""Proxies close connections that say nothing for a minute, which is not long in a queue."""


def sse(payload: dict[str, Any]) -> bytes:
    """One unnamed event: a named one would make strict clients fail the request. {} is a comment, which clients skip."""
    if not payload:
        return b": ping\n\n"
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


async def _guarded(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Chunks as events. The status line is out already, so an error becomes the last event."""
    try:
        async for chunk in chunks:
            yield sse(chunk)
    except ApiError as error:
        logger.warning("stream ended with an error: %s", error.message)
        yield sse(error.body())
    yield DONE


def event_stream(chunks: AsyncIterator[dict[str, Any]]) -> Stream:
    """The HTTP answer; a client that leaves cancels the iterator, and with it the work."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Stream(_guarded(chunks), media_type="text/event-stream", headers=headers, status_code=200)
