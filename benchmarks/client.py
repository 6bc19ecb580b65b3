"""A load generator's side of `rdlm serve`: the server as a process, timed requests over httpx, closed and
open loops, quantiles."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from rdlm.errors import UserError


@dataclass(frozen=True)
class Server:
    """A running server; ``process`` and ``log`` are None for one that was there before."""

    url: str
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None


@contextmanager
def running_server(checkpoint: Path, options: str, seconds: float = 120.0) -> Iterator[Server]:
    """`rdlm serve` with ``options`` on a free loopback port, stopped with SIGTERM afterwards. Raises
    RuntimeError with its log."""
    with tempfile.TemporaryDirectory() as folder:
        port_file, log = Path(folder) / "port", Path(folder) / "log"
        command = [sys.executable, "-m", "rdlm", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
        command += ["--port-file", str(port_file), "--log-format", "text", *shlex.split(options)]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=os.environ
            )
        try:
            yield Server(_when_ready(process, port_file, log, time.monotonic() + seconds), process, log)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _when_ready(process: subprocess.Popen[bytes], port_file: Path, log: Path, deadline: float) -> str:
    while time.monotonic() < deadline and process.poll() is None:
        if port_file.exists():
            url = f"http://127.0.0.1:{int(port_file.read_text())}"
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    return url
            except httpx.TransportError:
                pass  # bound, not listening yet
        time.sleep(0.1)
    raise RuntimeError(f"the server did not get ready:\n{log.read_text()}")


@dataclass
class Sample:
    """One request as its client saw it. Times are seconds after ``due``, the moment the request was meant to
    leave."""

    kind: str
    num_steps: int
    due: float
    status: int = 0
    """0 until there is an answer."""
    tokens: list[float] = field(default_factory=list)
    """Arrival of each token; of an answer in one piece, its arrival once per token."""
    asked: int = 0
    """Tokens that a complete answer has."""
    done: bool = False
    """The answer came to its proper end ([DONE], no error event)."""
    problem: str | None = None

    @property
    def ttft(self) -> float:
        return self.tokens[0]

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass(frozen=True)
class Workload:
    """Random prompts of token ids; lengths uniform in [half, one and a half] of their means, so that requests
    do not march in step."""

    vocab_size: int
    prompt_tokens: int
    num_tokens: int
    steps: dict[int, float]
    """K -> weight."""

    def body(self, rng: random.Random, **more: Any) -> dict[str, Any]:
        length, answer = (
            rng.randint(max(1, n // 2), n + n // 2) for n in (self.prompt_tokens, self.num_tokens)
        )
        (k,) = rng.choices(list(self.steps), list(self.steps.values()))
        return {
            "prompt": [rng.randrange(5, self.vocab_size) for _ in range(length)], "num_steps": k, "max_tokens": answer,
            "ignore_eos": True, "temperature": 0.8, "seed": rng.getrandbits(31), **more,
        }  # fmt: skip


def parse_steps(text: str) -> dict[int, float]:
    """ "4,8:2" -> {4: 1.0, 8: 2.0}. Raises UserError."""
    try:
        pairs = [item.partition(":") for item in text.split(",")]
        mix = {int(k): float(weight or 1) for k, _, weight in pairs}
    except ValueError:
        mix = {}
    if not mix or min(mix) < 1 or min(mix.values()) <= 0:
        raise UserError("steps", text, "is not a list of K or K:weight", "write for example 4,8,16:2")
    return mix


async def ask(
    client: httpx.AsyncClient,
    body: dict[str, Any],
    due: float,
    kind: str = "stream",
    leave: int | None = None,
) -> Sample:
    """Send a completion and time its tokens. leave: drop the connection after so many tokens."""
    sample = Sample(kind, body["num_steps"], due, asked=body["max_tokens"])
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            sample.status = answer.status_code
            if answer.status_code != 200:
                sample.problem = (await answer.aread()).decode(errors="replace")[:300]
            elif body.get("stream"):
                await _listen(answer, sample, leave)
            else:
                usage = json.loads(await answer.aread())["usage"]
                sample.tokens = [time.monotonic() - due] * usage["completion_tokens"]
                sample.done = True
    except httpx.HTTPError as error:
        sample.problem = repr(error)
    return sample


async def _listen(answer: httpx.Response, sample: Sample, leave: int | None) -> None:
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            sample.done = sample.problem is None
        elif line.startswith("data: "):
            event = json.loads(line[6:])
            if "error" in event:
                sample.problem = event["error"]["message"]
            elif event["choices"]:
                sample.tokens.append(time.monotonic() - sample.due)
        if leave is not None and len(sample.tokens) >= leave:
            return


class RawStream(asyncio.Protocol):
    """A stream's client that costs little: it counts chunks in what it reads and parses nothing.

    Cuts between two reads may fall into a chunk's first bytes, so these are kept until the next one.
    """

    MARK = b"data: {"

    def __init__(self, head: bytes, sample: Sample, ended: asyncio.Future[None]) -> None:
        self._head, self._sample, self._ended = head, sample, ended
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._head)

    def data_received(self, data: bytes) -> None:
        found, sample = self._rest + data, self._sample
        if not sample.status:
            sample.status = int(found[9:12])
        sample.tokens += [time.monotonic() - sample.due] * found.count(self.MARK)
        self._rest = b"" if found.endswith(self.MARK) else found[1 - len(self.MARK) :]
        if sample.status != 200:
            sample.problem = found.decode(errors="replace")[-300:]
        if b"data: [DONE]" in found or sample.problem is not None:
            sample.done = sample.problem is None
            assert self._transport is not None
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


async def ask_raw(url: str, body: dict[str, Any], due: float) -> Sample:
    """Stream a completion as ``ask`` does, over a connection of its own that nothing parses."""
    sample = Sample("stream", body["num_steps"], due, asked=body["max_tokens"])
    address, payload, loop = httpx.URL(url), json.dumps(body).encode(), asyncio.get_running_loop()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {address.host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\n\r\n"
    ).encode()
    ended = loop.create_future()
    await loop.create_connection(lambda: RawStream(head + payload, sample, ended), address.host, address.port)
    await ended
    return sample


async def closed_loop(seconds: float, lanes: int, send: Callable[[float], Awaitable[Sample]]) -> list[Sample]:
    """``lanes`` clients, each sending as soon as it has its answer, until ``seconds`` are over; all answers
    are awaited."""
    end = time.monotonic() + seconds

    async def lane() -> list[Sample]:
        samples = []
        while (now := time.monotonic()) < end:
            samples.append(await send(now))
        return samples

    return [
        sample
        for lane_samples in await asyncio.gather(*(lane() for _ in range(lanes)))
        for sample in lane_samples
    ]


async def open_loop(
    seconds: float,
    rate: float,
    rng: random.Random,
    send: Callable[[float], Awaitable[Sample]],
    tick: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """Poisson arrivals at ``rate`` a second whatever the answers do; times count from the arrival, so a late
    client hides nothing."""
    began = due = time.monotonic()
    tasks = []
    while (due := due + rng.expovariate(rate)) < began + seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.ensure_future(send(due)))
        tick()
    return list(await asyncio.gather(*tasks))


def connect(url: str, key: str | None = None) -> httpx.AsyncClient:
    """As many connections as there are requests: the server does the queueing."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=httpx.Timeout(300, connect=30)
    )


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    """The server's /metrics: sample name (with labels, where it has any) -> value."""
    families = text_string_to_metric_families((await client.get("/metrics")).raise_for_status().text)
    return {
        sample.name + "".join(f"{{{k}={v}}}" for k, v in sorted(sample.labels.items())): float(sample.value)
        for family in families for sample in family.samples
    }  # fmt: skip


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p90, p99, mean and largest; None of nothing."""
    if not values:
        return None
    p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99]).tolist()
    return {"p50": p50, "p90": p90, "p99": p99, "mean": float(np.mean(values)), "max": max(values)}
