"""Raw sockets: what is no request, or never becomes one, ends with a 4xx or the connection's end, without a
traceback."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn

from serve import connection
from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.settings import EngineSettings, HttpSettings

BODY = b'{"prompt": "x", "max_tokens": 1}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"


@pytest.fixture
def port(make_served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    for name, value in (("HEAD_SECONDS", 0.6), ("BODY_SECONDS", 0.6), ("CHECK_SECONDS", 0.1)):
        monkeypatch.setattr(connection, name, value)
    settings = EngineSettings(max_slots=4, chunk=16, prefill_rows=32)
    with Engine(lambda: make_served(settings=settings)) as engine:
        config = uvicorn.Config(
            create_app(engine, HttpSettings()),
            port=0,
            http=connection.BoundedConnection,
            log_config=None,
            lifespan="off",
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        thread.join()


def talk(port: int, *parts: bytes, closes: bool = True) -> bytes:
    """What the server says to ``parts`` until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port)) as wire:
        wire.settimeout(30)
        answer = b""
        for part in parts:
            wire.sendall(part)
            time.sleep(0.05)
        if not closes:
            wire.shutdown(socket.SHUT_WR)
        try:
            while received := wire.recv(65536):
                answer += received
        except ConnectionResetError:
            pass
    return answer


BROKEN = {
    "no HTTP": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n"],
    "no version": [b"GET /\r\n\r\n"],
    "no target": [b"GET  HTTP/1.1\r\nhost: a\r\n\r\n"],
    "a line of 200 kB": [b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n"],
    "100,000 headers": [b"GET /health HTTP/1.1\r\nhost: a\r\n" + b"a: b\r\n" * 100_000 + b"\r\n"],
    "a header without a colon": [b"GET /health HTTP/1.1\r\nhost: a\r\nnothing\r\n\r\n"],
    "two hosts": [b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n"],
    "two lengths": [HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd"],
    "length and chunks": [HEAD + b"content-length: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"],
    "an odd coding": [HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n"],
    "a negative length": [HEAD + b"content-length: -1\r\n\r\n"],
    "a bad chunk length": [HEAD + b"transfer-encoding: chunked\r\n\r\n", b"zz\r\nabc\r\n"],
    "a chunk longer than it says": [HEAD + b"transfer-encoding: chunked\r\n\r\n", b"3\r\nabcdef\r\n0\r\n\r\n"],
    "a control character in a header": [b"GET /health HTTP/1.1\r\nhost: a\r\nx: a\x00b\r\n\r\n"],
    "a bare line feed and garbage": [b"GET /health HTTP/1.1\nhost: a\n\n" + b"\xff" * 100],
    "half a request line": [b"GET /hea"],
    "half of the headers": [HEAD],
    "half of the body": [HEAD + b"content-length: 100\r\n\r\n" + BODY],
    "half of a chunk": [HEAD + b"transfer-encoding: chunked\r\n\r\n40\r\n" + BODY],
    "nothing": [],
    "half of a second request": [b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n", b"GET /health HT"],
}  # fmt: skip


def test_broken_requests_are_refused_or_dropped(port: int, caplog: pytest.LogCaptureFixture) -> None:
    for name, parts in BROKEN.items():
        answer = talk(port, *parts)
        statuses = [int(line.split()[1]) for line in answer.split(b"\n") if line.startswith(b"HTTP/1.1 ")]
        assert all(status == 200 or 400 <= status < 500 for status in statuses), (name, answer[:500])
        assert b"HTTP/1.1 4" not in answer or set(json.loads(answer[answer.rindex(b'{"error"') :])["error"]) == {
            "message", "type", "param", "code"
        }, name  # fmt: skip
    good = talk(port, HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY)
    assert good.startswith(b"HTTP/1.1 200"), "the server still answers"
    wrong = [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]
    assert wrong == []


CHUNKED = b"transfer-encoding: chunked\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
IN_CHUNKS = b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
HIDDEN = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
TWO_ENDS = {
    "both": ("Content-Length and Transfer-Encoding", HEAD + LENGTH + CHUNKED + IN_CHUNKS),
    "the other way": ("Content-Length and Transfer-Encoding", HEAD + CHUNKED + LENGTH + IN_CHUNKS),
    "a hidden request": ("Content-Length and Transfer-Encoding", HEAD + LENGTH + CHUNKED + b"\r\n0\r\n\r\n"),
    "folded": ("Content-Length and", HEAD + LENGTH + b"transfer-encoding:\r\n chunked\r\n" + IN_CHUNKS),
    "without a route": (
        "Content-Length and",
        b"POST /x HTTP/1.1\r\nhost: a\r\n" + CHUNKED + LENGTH + IN_CHUNKS,
    ),
    "before 1.1": ("HTTP/1.0", HEAD.replace(b"1.1", b"1.0") + CHUNKED + IN_CHUNKS),
    "another protocol": ("HTTP/2.0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
}


@pytest.mark.parametrize("name", TWO_ENDS)
def test_a_request_that_may_end_at_two_places_is_refused_and_its_connection_closed(
    name: str, port: int
) -> None:
    problem, request = TWO_ENDS[name]
    answer = talk(port, request + HIDDEN)
    assert answer.count(b"HTTP/1.1 ") == 1 and answer.startswith(b"HTTP/1.1 400 Bad Request"), (
        "nothing hidden"
    )
    assert problem in json.loads(answer[answer.index(b'{"error"') :])["error"]["message"]
    answer = talk(port, HEAD + LENGTH + b"\r\n" + BODY + request + HIDDEN)
    assert answer.count(b"HTTP/1.1 200") == 1 and answer.count(b"HTTP/1.1 400") == 1, "behind a good one"


def test_one_length_is_enough(port: int) -> None:
    for head in (
        LENGTH + b"\r\n" + BODY,
        b"Transfer-Encoding: Chunked\r\n" + IN_CHUNKS,
        LENGTH * 2 + b"\r\n" + BODY,
    ):
        assert talk(port, HEAD + b"connection: close\r\n" + head).startswith(b"HTTP/1.1 200")


def test_pipelined_requests_are_answered_in_order(port: int) -> None:
    one = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
    last = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    answer = talk(port, one * 3 + last)
    assert answer.count(b"HTTP/1.1 200") == 4 and answer.count(b'"text_completion"') == 3
    assert answer.rindex(b'"text_completion"') < answer.index(b'{"status"')


def test_a_slow_but_steady_request_is_answered(port: int) -> None:
    one = HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY)
    with socket.create_connection(("127.0.0.1", port)) as wire:
        wire.sendall(one)
        for i in range(0, len(BODY), 4):
            time.sleep(0.15)
            wire.sendall(BODY[i : i + 4])
        assert wire.recv(65536).startswith(b"HTTP/1.1 200")
