"""One connection of the HTTP server: uvicorn's protocol with bounds for requests that do not arrive whole."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from h11 import IDLE, SEND_RESPONSE
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.errors import ApiError

HEAD_SECONDS = 30.0
"""Longest time from the first byte (or the connection) to the end of the headers; uvicorn would wait for
ever."""
BODY_SECONDS = 30.0
"""Between two parts of a body."""
CHECK_SECONDS = 5.0


class StrictReader(h11.Connection):
    """h11's reading of a connection, which refuses requests that two servers in a row may end at two places."""

    problem = "what arrived is no HTTP/1.1 request, or has a header that is not allowed; correct it"

    def next_event(self) -> Any:
        """Raises RemoteProtocolError for what h11 would read in one of several ways (RFC 9112, 2.3 and 6.1):
        Content-Length with Transfer-Encoding, Transfer-Encoding in HTTP/1.0, a version beyond 1."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            lengths = {name for name, _ in event.headers} & {b"content-length", b"transfer-encoding"}
            if len(lengths) > 1:
                self.problem = "the request has Content-Length and Transfer-Encoding; send one of them"
            elif b"transfer-encoding" in lengths and event.http_version == b"1.0":
                self.problem = "HTTP/1.0 has no Transfer-Encoding; send Content-Length, or HTTP/1.1"
            elif not event.http_version.startswith(b"1."):
                self.problem = f"HTTP/{event.http_version.decode()} is not spoken here; send HTTP/1.1"
            else:
                return event
            raise h11.RemoteProtocolError(self.problem)
        return event


class BoundedConnection(H11Protocol):
    """Closes connections whose request stays incomplete; what is no HTTP ends in 400 or the connection's end."""

    conn: StrictReader

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = StrictReader(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._heard = self.loop.time()
        self._head_since: float | None = self._heard
        self._timer = self.loop.call_later(CHECK_SECONDS, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._heard = self.loop.time()
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP in the form of all errors. uvicorn's is a plain text, and fails where an answer
        has begun already, as in the middle of a chunked body."""
        self._end(400, self.conn.problem)

    def _end(self, status: int, message: str) -> None:
        """Close the connection, with an error where no answer has begun."""
        if self.conn.our_state in (IDLE, SEND_RESPONSE):
            body = json.dumps(ApiError(status, message, "invalid_request_error").body()).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nconnection: close\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _check(self) -> None:
        now, cycle = self.loop.time(), self.cycle
        self._timer = self.loop.call_later(CHECK_SECONDS, self._check)
        if cycle is not None and not cycle.response_complete:
            self._head_since = None
            if cycle.more_body and not self.flow.read_paused and now - self._heard > BODY_SECONDS:
                self.transport.close()
        elif cycle is not None and not self.conn.trailing_data[0]:
            self._head_since = None  # between two requests, which is keep-alive's matter
        elif self._head_since is None:
            self._head_since = now
        elif now - self._head_since > HEAD_SECONDS:
            self._end(408, f"the headers did not arrive within {HEAD_SECONDS:g} s; send them at once")
